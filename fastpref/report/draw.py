"""Lines and points as SVG by matplotlib, with the page's variables for colours."""

import contextlib
import html
import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastpref.report.read import Curve, Run

WIDTH, HEIGHT = 380, 210  # small, so that a phone shows 12 px text at nearly its size

# colours that stand for the page's own, which differ by light and dark
PAGE, TEXT, RULE = "#010200", "#010201", "#010202"
VARIABLES = {PAGE: "--page", TEXT: "--soft", RULE: "--rule"}
# a marker for matplotlib, and the same as a path for the legend
MARKERS = (
    ("o", "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0z"),
    ("s", "M-3-3h6v6h-6z"),
    ("^", "M0-3.4L3.4 3h-6.8z"),
    ("D", "M0-4L4 0L0 4L-4 0z"),
    ("v", "M0 3.4L3.4-3h-6.8z"),
    ("P", "M-1.2-3.5h2.4v2.3h2.3v2.4h-2.3v2.3h-2.4v-2.3h-2.3v-2.4h2.3z"),
)
COLORS = tuple(f"#0103{number:02x}" for number in range(len(MARKERS)))
VARIABLES |= {color: f"--line-{number}" for number, color in enumerate(COLORS)}

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 12,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": RULE,
    "axes.labelcolor": TEXT,
    "axes.spines.top": False,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-3, 6),
    "grid.color": RULE,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "lines.markeredgewidth": 1.2,
}


@dataclass(frozen=True)
class Line:
    """One legend entry: the training and the evaluation values of a metric in a run."""

    label: str
    style: int
    training: Curve
    evaluation: Curve
    smooth: Curve
    """A long training curve smoothed, which then stands faintly behind it; or empty."""


@dataclass(frozen=True)
class Axis:
    """How values stand on the vertical axis."""

    baseline: float | None = None
    """A value with a line of its own."""
    from_zero: bool = False
    log: bool = False
    """Logarithmic once the values spread over two decades."""


def draw(name: str, lines: Sequence[Line], axis: Axis) -> str:
    """Training as solid lines, evaluation as open points on dashed ones, over the steps."""
    with canvas(name) as (figure, axes):
        if axis.baseline is not None:
            axes.axhline(axis.baseline, color=TEXT, linewidth=0.8, zorder=1)
        for line in lines:
            plot_line(axes, line, alone=len(lines) == 1)
        values = [v for line in lines for _, v in line.training + line.evaluation if v == v]
        if axis.log and min(values) > 0 and max(values) > 100 * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter(lambda value, _: "")
        elif axis.from_zero:
            axes.set_ylim(0, 1.08 * max(values) or 1)
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel("step", loc="right")
        return as_svg(figure, name)


def plot_line(axes: Any, line: Line, *, alone: bool) -> None:
    color, marker = COLORS[line.style], MARKERS[line.style][0]
    if line.smooth:
        axes.plot(*columns(line.training), color=color, linewidth=0.7, alpha=0.3, zorder=1.5)
    strong = line.smooth or line.training
    every = math.ceil(len(strong) / 6) or 1
    axes.plot(
        *columns(strong),
        color=color,
        linewidth=1.5,
        marker=None if alone and len(strong) > 1 else marker,
        markevery=(line.style * every // len(MARKERS), every),  # not all lines' at the same steps
        markersize=4.5,
        zorder=2,
    )
    axes.plot(
        *columns(line.evaluation),
        color=color,
        linewidth=1.2,
        dashes=(3, 2),
        marker=marker,
        markersize=5.5,
        markerfacecolor=PAGE,
        zorder=3,
    )


def columns(curve: Curve) -> tuple[list[int], list[float]]:
    return [step for step, _ in curve], [value for _, value in curve]


def draw_outcomes(name: str, runs: Sequence[Run]) -> str:
    """Gold reward against KL: a line for each seed, from open (before DPO) to filled (after)."""
    with canvas(name) as (figure, axes):
        for number, run in enumerate(runs):
            if run.outcome is None:
                continue
            outcome, style = run.outcome, number % len(MARKERS)
            before, after = outcome.gold_reward_before, outcome.gold_reward_after
            axes.plot((0, outcome.kl), (before, after), color=COLORS[style], dashes=(3, 2))
            bars = {"color": COLORS[style], "fmt": MARKERS[style][0], "capsize": 2.5, "zorder": 3}
            axes.errorbar(0, before, outcome.gold_reward_before_se, markerfacecolor=PAGE, **bars)
            axes.errorbar(outcome.kl, after, outcome.gold_reward_after_se, outcome.kl_se, **bars)
        axes.set_xlabel("KL, nats", loc="right")
        return as_svg(figure, name)


@contextlib.contextmanager
def canvas(name: str) -> Iterator[tuple[Any, Any]]:
    """An empty figure and its axes; ``name`` keeps its ids apart from other figures'."""
    # imported here: a run that stops early must not wait for matplotlib
    import matplotlib.style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", STYLE | {"svg.hashsalt": name}]):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.locator_params(nbins=5)
        yield figure, axes


def as_svg(figure: Any, name: str) -> str:
    """The figure as an element of a page: no ids but those it refers to, no fonts, no sizes."""
    out = io.StringIO()
    figure.savefig(out, format="svg")
    svg = out.getvalue()
    svg = svg[svg.index("<g id=") :]  # before it: prolog, date, a style that would reach the page
    svg = re.sub(r"<g id=\"[^\"]*\"", "<g", svg)
    svg = re.sub(r"font-size: [^;]*; font-family: [^;]*;", "", svg)
    svg = re.sub(r" d=\"[^\"]*\"", lambda match: shortened(match.group()), svg)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}"'
    return f'<svg role="img" aria-label="{html.escape(name)}" {box}>{svg}'


def shortened(path: str) -> str:
    """A path's numbers to a hundredth of a pixel, on one line."""
    path = re.sub(r"-?\d+\.\d+", lambda match: f"{float(match.group()):.2f}", path)
    return re.sub(r"\s+", " ", path)
