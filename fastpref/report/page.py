"""The page: headline, figures, samples and configuration in one file that needs nothing else."""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastpref.report.draw import MARKERS, Line, draw_outcomes
from fastpref.report.plots import LEARNING, MACHINE, Figure, figures, loss_figures
from fastpref.report.read import Quickstart, ReportError, Run, Sample, read

SHOWN = 4
"""Prompts whose samples are on view; the others unfold."""

NOTHING, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"

# control characters have no place in HTML: their pictures instead, U+2400 and on
PICTURES = {code: 0x2400 + code for code in range(32) if code not in b"\t\n"} | {127: 0x2421}

# the headline's rows: name, unit, key
OUTCOMES = (
    ("Gold reward before", "", "gold_reward_before"),
    ("Gold reward after", "", "gold_reward_after"),
    ("KL to the SFT model", "nats", "kl"),
)
FINAL = (
    ("Accuracy", "share of pairs", "rewards/accuracies"),
    ("Margin", "β · nats", "rewards/margins"),
    ("Loss", "", "loss"),
)


@dataclass(frozen=True)
class Table:
    """A column for each run; a row is its name, its unit, and a cell for each run."""

    columns: list[str]
    rows: list[tuple[str, str, list[str]]]


@dataclass(frozen=True)
class Exhibit:
    """One prompt, and what was sampled from it."""

    prompt: str
    completions: list[tuple[str, str]]
    """Each under a heading that says when, and by which run where they differ."""


def write_report(runs: Sequence[Path], output: Path) -> Path:
    """Write one self-contained HTML page on one run, or on several side by side.

    Args:
        runs: folders of runs (metrics.jsonl, run.yaml, samples.jsonl) or of quickstarts.
        output: the file to write; its folder is made where it is missing.

    Returns:
        The file that was written; the same runs give the same bytes.

    Raises:
        ReportError: a folder without a run, a file that cannot be read, an output that cannot be
            written.
    """
    items = read(runs)
    # a lone surrogate, which JSON can hold and UTF-8 cannot, shows as its escape
    page = render(items).encode("utf-8", errors="backslashreplace")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_bytes(page)
    except OSError as error:
        raise ReportError(f"cannot write {output}: {error.strerror}") from error
    return output


def render(items: Sequence[Run | Quickstart]) -> str:
    """The page's HTML; the template escapes every text that it is given."""
    from jinja2 import Environment, StrictUndefined

    runs: list[Run] = []
    for item in items:
        runs += item.runs if isinstance(item, Quickstart) else [item]
    source = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    exhibits = exhibits_of(runs)
    page = environment.from_string(source).render(
        title=items[0].name if len(items) == 1 else f"{len(items)} runs compared",
        leads=[lead(item, alone=len(items) == 1) for item in items if isinstance(item, Quickstart)],
        origin=origin(items[0]) if len(items) == 1 else "",
        several=len(runs) > 1,
        headline=headline(runs),
        sections=[
            ("Learning", outcome_figures(runs) + loss_figures(runs) + figures(LEARNING, runs)),
            ("Optimizer and machine", figures(MACHINE, runs)),
        ],
        exhibits=(exhibits[:SHOWN], exhibits[SHOWN:]),
        differences=config_table(runs, differing(runs)),
        configuration=config_table(runs, list(dict.fromkeys(k for r in runs for k in r.config))),
        without_config=[run.name for run in runs if not run.config],
        last_values=last_values(runs),
        markers=[path for _, path in MARKERS],
    )
    return page.translate(PICTURES)


def number(value: float | None) -> str:
    """A figure for a table: four digits, or all of a large one's."""
    if value is None:
        return NOTHING
    if math.isnan(value):
        return "not finite"
    whole = abs(value) >= 1000 or value == int(value)
    return (f"{value:z,.0f}" if whole else f"{value:#.4g}").replace("-", MINUS)


def with_error(value: float, error: float) -> str:
    return f"{value:z.3f} ± {error:.3f}".replace("-", MINUS)


def origin(item: Run | Quickstart) -> str:
    """Which model was trained on which data, as far as a run's configuration says."""
    config = item.config if isinstance(item, Run) else {}
    model, data = config.get("model_name_or_path"), config.get("dataset_name")
    return " · ".join([f"from {model}"] * bool(model) + [f"on {data}"] * bool(data))


def lead(quickstart: Quickstart, *, alone: bool) -> str:
    """The summary in a sentence."""
    s, seeds = quickstart.summary, len(quickstart.runs)
    text = (
        f"Gold reward from {s['gold_reward_before']:z.3f} to {s['gold_reward_after']:z.3f}: a gain "
        f"of {with_error(s['gain'], s['gain_se'])} at a KL of {s['kl']:.2f} nats. Held-out reward "
        f"accuracy {s['accuracy']:.3f}; {seeds} seed{'s' * (seeds > 1)} in {s['seconds']:.0f} s."
    )
    if quickstart.shuffled:
        text += " A random half of the pairs was swapped: this is the control, nothing may rise."
    text = text.replace(" -", f" {MINUS}")
    return text if alone else f"{quickstart.name}: {text}"


def headline(runs: Sequence[Run]) -> Table:
    """What decides: where each run stood at its end, how fast it was, what it needed."""
    rows: list[tuple[str, str, list[str]]] = []

    def add(name: str, unit: str, values: list[float | None]) -> None:
        if any(value is not None for value in values):
            rows.append((name, unit, [number(value) for value in values]))

    outcomes = [run.outcome for run in runs]
    for name, unit, key in OUTCOMES if any(outcomes) else ():
        cells = [
            with_error(getattr(o, key), getattr(o, f"{key}_se")) if o else NOTHING for o in outcomes
        ]
        rows.append((name, unit, cells))
    add("Steps", "", [max((c[-1][0] for c in run.curves.values()), default=None) for run in runs])
    add("Best step, whose model was kept", "", [run.best_step for run in runs])
    mixed = len({run.loss_name for run in runs}) > 1
    for name, unit, metric in FINAL:
        unit = "each run's own" if mixed and metric == "loss" else unit
        evaluated = any(f"eval_{metric}" in run.curves for run in runs)
        if evaluated:
            add(f"{name}, evaluation", unit, [run.at_end(f"eval_{metric}") for run in runs])
        if metric == "loss" or not evaluated:
            add(f"{name}, training", unit, [run.last(metric) for run in runs])
    add("Speed, median", "tokens/s", over(runs, "tokens_per_second", statistics.median))
    add("Memory, peak", "GiB", over(runs, "peak_memory_gib", max))
    return Table([run.name for run in runs], rows)


def over(runs: Sequence[Run], name: str, of: Callable[[list[float]], float]) -> list[float | None]:
    """One figure of each run's finite values of a metric."""
    curves = [[v for _, v in run.curves.get(name, []) if math.isfinite(v)] for run in runs]
    return [of(values) if values else None for values in curves]


def outcome_figures(runs: Sequence[Run]) -> list[Figure]:
    """Gold reward against KL, where there is a quickstart among the runs."""
    if not any(run.outcome for run in runs):
        return []
    lines = [
        Line(run.name, number % len(MARKERS), [], [], [])
        for number, run in enumerate(runs)
        if run.outcome
    ]
    caption = (
        "Open: the SFT model, at a KL of 0. Filled: after DPO. Bars are one standard error to "
        "either side. Higher is better, and so is further left: a gain at little KL leaves the "
        "rest of the model as it was."
    )
    title, unit = "Gold reward against KL", f"from {MINUS}1 to 1"
    return [Figure(title, unit, caption, tuple(lines), draw_outcomes(title, runs))]


def exhibits_of(runs: Sequence[Run]) -> list[Exhibit]:
    """The samples by prompt; what all runs said alike, say before training, stands there once."""
    found: dict[str, list[tuple[str, Sample]]] = {}
    for run in runs:
        for sample in run.samples:
            found.setdefault(sample.prompt, []).append((run.name, sample))
    exhibits = []
    for prompt, samples in found.items():
        said: dict[tuple[int, str, str], list[str]] = {}
        for name, sample in samples:
            for nth, (when, text) in enumerate(sample.completions):
                said.setdefault((nth, when, text), []).append(name)
        completions = [
            (when if len(names) == len(samples) else f"{', '.join(names)}: {when}", text)
            for (_, when, text), names in sorted(said.items(), key=lambda item: item[0][0])
        ]
        exhibits.append(Exhibit(prompt, completions))
    return exhibits


def differing(runs: Sequence[Run]) -> list[str]:
    """The keys that do not have one value in all runs that left their configuration."""
    configs = [run.config for run in runs if run.config]
    keys = dict.fromkeys(key for config in configs for key in config)
    return [key for key in keys if len({value_text(c, key) for c in configs}) > 1]


def config_table(runs: Sequence[Run], keys: Sequence[str]) -> Table:
    rows = [(key, "", [value_text(run.config, key) for run in runs]) for key in keys]
    return Table([run.name for run in runs], rows)


def value_text(config: dict[str, Any], key: str) -> str:
    if key not in config:
        return NOTHING
    value = config[key]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def last_values(runs: Sequence[Run]) -> Table:
    """The last value of every metric."""
    names = sorted({name for run in runs for name in run.curves} - {"epoch"})
    rows = [(name, "", [number(run.last(name)) for run in runs]) for name in names]
    return Table([run.name for run in runs], rows)
