"""Which figures a report holds, what they say, and the lines that go into each."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastpref.report.draw import MARKERS, Axis, Line, draw
from fastpref.report.read import Curve, Run

POINTS = 1000
"""Points of a line above which it is thinned out to about as many."""
LONG = 200
"""Points from which on a noisy line is smoothed."""
LINEAR = Axis()


@dataclass(frozen=True)
class Plot:
    """A figure of the report: metrics that share a unit, and how to read them."""

    title: str
    unit: str
    metrics: dict[str, str]
    """Each metric's own title, short."""
    caption: str
    axis: Axis = LINEAR
    smooth: Callable[[Sequence[float]], float] | None = statistics.fmean
    """What stands for the values around each point of a long curve; None: it is smooth."""


def one(metric: str) -> dict[str, str]:
    return {metric: ""}


def sides(metric: str) -> dict[str, str]:
    return {f"{metric}/chosen": "chosen", f"{metric}/rejected": "rejected"}


LOWER = "Lower is better. Evaluation that rises while training falls is overfitting."
TOKEN_LOSS = Plot("Loss", "nats per token", one("loss"), LOWER)
PAIR_LOSS = Plot("Loss", "per pair", one("loss"), LOWER)
SIGMOID_LOSS = Plot(
    *("Loss", "per pair", one("loss")),
    f"{LOWER} The sigmoid loss starts at ln 2 = 0.693, where no preference is known.",
)
LEARNING = (
    Plot(
        *("Reward accuracy", "share of pairs", one("rewards/accuracies")),
        "Share of pairs whose chosen completion has the higher implicit reward. "
        "The thin line is chance; before the first step all rewards are equal, and a tie is wrong.",
        axis=Axis(baseline=0.5),
    ),
    Plot(
        *("Reward margin", "β · nats", one("rewards/margins")),
        "Implicit reward of the chosen completion minus that of the rejected one; it should rise. "
        "The size depends on β: compare margins at equal β only.",
        axis=Axis(baseline=0),
    ),
    Plot(
        *("Implicit rewards", "β · nats", sides("rewards")),
        "β times how much likelier a completion became than it was to the reference. "
        "Both may fall; the distance between them is what is learned.",
        axis=Axis(baseline=0),
    ),
    Plot(
        *("Log-probs", "nats per completion", sides("logps")),
        "That chosen log-probs fall is common in DPO as long as the margin rises. "
        "A steep fall of both says that the model drifts away from its data.",
    ),
    Plot(
        *("Entropy", "nats per token", one("entropy")),
        "Of the next token's distribution. A fall towards 0 means samples without variety.",
    ),
    Plot(
        *("Token accuracy", "share of tokens", one("mean_token_accuracy")),
        "Share of the scored tokens that the model ranks first.",
    ),
)
MACHINE = (
    Plot(
        *("Gradient norm", "before clipping", one("grad_norm")),
        "Should stay level or fall; single spikes are cut by max_grad_norm.",
        axis=Axis(from_zero=True, log=True),
        smooth=statistics.median,  # a mean would draw a spike as wide as its window
    ),
    Plot(
        *("Learning rate", "per step", one("learning_rate")),
        "The schedule as it was run.",
        axis=Axis(from_zero=True),
        smooth=None,
    ),
    Plot(
        *("Speed", "tokens/s", one("tokens_per_second")),
        "Of the optimizer steps alone, without evaluation and saving.",
        axis=Axis(from_zero=True),
    ),
    Plot(
        *("Memory", "GiB", one("peak_memory_gib")),
        "The most that was in use until then: the GPU's, or on a CPU the process's.",
        axis=Axis(from_zero=True),
        smooth=None,
    ),
)


@dataclass(frozen=True)
class Figure:
    """A drawn figure and what the page says around it."""

    title: str
    unit: str
    caption: str
    lines: tuple[Line, ...]
    svg: str


def figures(plots: Sequence[Plot], runs: Sequence[Run]) -> list[Figure]:
    """The figures that the runs have values for: one run's metrics in one, else a metric each."""
    drawn = []
    for plot in plots:
        if len(runs) == 1:
            drawn += figure(plot, plot.title, lines_of(plot, runs, list(plot.metrics)))
            continue
        for metric, words in plot.metrics.items():
            title = f"{plot.title}, {words}" if words else plot.title
            drawn += figure(plot, title, lines_of(plot, runs, [metric]))
    return drawn


def loss_figures(runs: Sequence[Run]) -> list[Figure]:
    """A figure for each loss that the runs minimise: different ones have no common scale."""
    names = list(dict.fromkeys(run.loss_name for run in runs))
    drawn = []
    for name in names:
        plot = {"": TOKEN_LOSS, "sigmoid": SIGMOID_LOSS}.get(name, PAIR_LOSS)
        title = plot.title if len(names) == 1 else f"{plot.title}, {name or 'SFT'}"
        drawn += figure(plot, title, lines_of(plot, runs, ["loss"], loss_name=name))
    return drawn


def figure(plot: Plot, title: str, lines: tuple[Line, ...]) -> list[Figure]:
    if not lines:
        return []
    svg = draw(f"{title}, {plot.unit}", lines, plot.axis)
    return [Figure(title, plot.unit, plot.caption, lines, svg)]


def lines_of(
    plot: Plot, runs: Sequence[Run], metrics: Sequence[str], *, loss_name: str | None = None
) -> tuple[Line, ...]:
    """A line for each metric of each run that has finite values of it.

    Args:
        loss_name: take the runs with this loss alone.
    """
    lines = []
    for number, run in enumerate(runs):
        if loss_name not in (None, run.loss_name):
            continue
        for nth, metric in enumerate(metrics):
            curves = run.curves.get(metric, []), run.curves.get(f"eval_{metric}", [])
            if any(math.isfinite(value) for curve in curves for _, value in curve):
                alone = len(runs) == 1
                label = plot.metrics[metric] if alone else run.name
                style = (nth if alone else number) % len(MARKERS)
                smooth = smoothed(curves[0], plot.smooth) if plot.smooth else []
                lines.append(Line(label, style, *map(thinned, (*curves, smooth))))
    return tuple(lines)


def thinned(curve: Curve, points: int = POINTS) -> Curve:
    """About ``points`` of a long curve: the ends, and each stretch's extremes and first gap."""
    stretches = max(1, points // 3)
    if len(curve) <= points:
        return curve
    kept = {0, len(curve) - 1}
    for nth in range(stretches):
        stretch = range(nth * len(curve) // stretches, (nth + 1) * len(curve) // stretches)
        finite = [i for i in stretch if math.isfinite(curve[i][1])]
        if finite:
            kept |= {min(finite, key=lambda i: curve[i][1]), max(finite, key=lambda i: curve[i][1])}
        kept |= set([i for i in stretch if not math.isfinite(curve[i][1])][:1])
    return [curve[i] for i in sorted(kept)]


def smoothed(curve: Curve, of: Callable[[Sequence[float]], float]) -> Curve:
    """``of`` a thirtieth of a long curve around each of its points; empty for a short one."""
    if len(curve) < LONG:
        return []
    half = len(curve) // 60
    values = [value for _, value in curve]
    points = []
    for i, (step, value) in enumerate(curve):
        near = [v for v in values[max(0, i - half) : i + half + 1] if math.isfinite(v)]
        points.append((step, of(near) if math.isfinite(value) else math.nan))
    return points
