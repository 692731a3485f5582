"""Run folders to plain records: metrics, configuration, sampled completions, standings."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeAlias

import yaml

Curve: TypeAlias = list[tuple[int, float]]
"""(step, value) in the order of the steps; NaN where a value was not finite."""


class ReportError(ValueError):
    """A folder that no report can be made of, or a page that cannot be written."""


@dataclass(frozen=True)
class Sample:
    """Completions of one prompt, each under a few words that say when it was sampled."""

    prompt: str
    completions: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Outcome:
    """One quickstart seed: gold reward before and after, KL in nats, their standard errors."""

    gold_reward_before: float
    gold_reward_before_se: float
    gold_reward_after: float
    gold_reward_after_se: float
    kl: float
    kl_se: float


@dataclass(frozen=True)
class Run:
    """One run's records; what its folder lacks is empty."""

    name: str
    place: Path
    config: dict[str, Any]
    curves: dict[str, Curve]
    samples: tuple[Sample, ...] = ()
    outcome: Outcome | None = None
    best_step: int | None = None
    """The step whose model the run ended with, where it was not the last one's."""

    @property
    def loss_name(self) -> str:
        """Runs of one name have losses that can be compared; SFT's is empty."""
        if not any(name.endswith("rewards/margins") for name in self.curves):
            return ""
        loss_type = self.config.get("loss_type", "preference")
        return " + ".join(map(str, loss_type)) if isinstance(loss_type, list) else str(loss_type)

    def last(self, name: str) -> float | None:
        return self.curves[name][-1][1] if name in self.curves else None

    def at_end(self, name: str) -> float | None:
        """The value of the model that the run ended with: the best one's, if that was loaded."""
        values = dict(self.curves.get(name, []))
        return values.get(self.best_step, self.last(name)) if self.best_step else self.last(name)


@dataclass(frozen=True)
class Quickstart:
    """A quickstart's summary and the DPO run of each of its seeds."""

    name: str
    place: Path
    summary: dict[str, float]
    """The summary's means over seeds, by its own names."""
    shuffled: bool
    """Whether a random half of the pairs was swapped: the control."""
    runs: tuple[Run, ...]


MEANS = "gold_reward_before gold_reward_after gain gain_se kl accuracy seconds".split()


def read(folders: Sequence[Path]) -> list[Run | Quickstart]:
    """The record of every folder, under names that tell them apart.

    Raises:
        ReportError: a folder that holds no run, a run without metrics, a file that cannot be read.
    """
    if not folders:
        raise ReportError("need the folder of at least one run, got none")
    places = [folder.expanduser().resolve() for folder in folders]
    for place, folder in zip(places, folders, strict=True):
        if places.count(place) > 1:
            raise ReportError(f"need each run once, got {folder} twice")
    found = [read_folder(place, folder) for place, folder in zip(places, folders, strict=True)]
    runs = [
        run for item in found for run in (item.runs if isinstance(item, Quickstart) else [item])
    ]
    names = dict(zip((run.place for run in runs), distinct(runs), strict=True))
    return [named(item, names) for item in found]


def read_folder(place: Path, folder: Path) -> Run | Quickstart:
    """The record at ``place``; messages call it ``folder``, as it was given."""
    if (place / "summary.json").is_file():
        return read_quickstart(place)
    if (place / "metrics.jsonl").is_file():
        run = read_run(place)
        if not run.curves:
            raise ReportError(f"need metrics, got none in {folder / 'metrics.jsonl'}")
        return run
    if place.is_dir():
        got = ", ".join(sorted(path.name for path in place.iterdir())[:8]) or "an empty folder"
    else:
        got = "a file" if place.exists() else "no such folder"
    raise ReportError(
        f"{folder}: need a run's folder (with metrics.jsonl) or a quickstart's (with "
        f"summary.json), got {got}"
    )


def read_run(place: Path) -> Run:
    config = read_config(place / "run.yaml")
    name = str(config.get("run_name") or place.name)
    samples = read_samples(place / "samples.jsonl")
    curves = read_curves(place / "metrics.jsonl")
    return Run(name, place, config, curves, samples, best_step=read_best_step(place, config))


def read_best_step(place: Path, config: dict[str, Any]) -> int | None:
    """The best step that the newest checkpoint knows of, if the run loads the best at its end."""
    states = list(place.glob("checkpoint-*/trainer_state.json"))
    if not config.get("load_best_model_at_end") or not states:
        return None
    newest = max(map(parsed, states), key=lambda state: int(state.get("step", 0)))
    step = newest.get("best_step")
    return step if isinstance(step, int) and (place / f"checkpoint-{step}").exists() else None


def read_quickstart(place: Path) -> Quickstart:
    path, shown = place / "summary.json", place / "samples.json"
    summary, rows = parsed(path), parsed(shown) if shown.is_file() else []
    try:
        means = {name: float(summary[name]) for name in MEANS}
        shuffled = bool(summary["shuffle_preferences"])
        seeds = [(row["seed"], outcome_of(row)) for row in summary["runs"]]
        samples = tuple(
            Sample(row["prompt"], (("before", row["before"]), ("after", row["after"])))
            for row in rows
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ReportError(f"{place}: need what the quickstart writes, got {error!r}") from error
    if not seeds:
        raise ReportError(f"{path}: need the figures of at least one seed, got none")
    runs: list[Run] = []
    for seed, outcome in seeds:
        home = place / f"seed-{seed}"
        run = replace(read_run(home / "dpo"), name=home.name, place=home, outcome=outcome)
        runs.append(run if runs else replace(run, samples=samples))  # they are the first seed's
    return Quickstart(place.name, place, means, shuffled, tuple(runs))


def outcome_of(row: dict[str, Any]) -> Outcome:
    return Outcome(**{field.name: float(row[field.name]) for field in fields(Outcome)})


def read_config(path: Path) -> dict[str, Any]:
    """The resolved keys; empty where an old run left none."""
    if not path.is_file():
        return {}
    try:
        config = yaml.safe_load(text_of(path))
    except yaml.YAMLError as error:
        raise ReportError(f"{path} is not YAML: {error}") from error
    if not isinstance(config, dict):
        raise ReportError(f"{path}: need keys and values, got {type(config).__name__}")
    return config


def read_curves(path: Path) -> dict[str, Curve]:
    """Every metric by name; a step that was logged twice keeps its later value."""
    points: dict[str, dict[int, float]] = {}
    for row in json_lines(path):
        for name, value in row.items():
            if name != "step" and (value is None or type(value) in (int, float)):
                finite = value is not None and math.isfinite(value)
                points.setdefault(name, {})[row["step"]] = float(value) if finite else math.nan
    return {name: sorted(values.items()) for name, values in points.items()}


def read_samples(path: Path) -> tuple[Sample, ...]:
    """Each prompt's completions at the first and the last step they were sampled at."""
    found: dict[tuple[Any, str], dict[int, str]] = {}
    for row in json_lines(path):
        prompt, completion = row.get("prompt"), row.get("completion")
        if not (isinstance(prompt, str) and isinstance(completion, str)):
            raise ReportError(f"{path}: need a prompt and a completion a line, got {sorted(row)}")
        found.setdefault((row.get("row"), prompt), {})[row["step"]] = completion
    samples = []
    for (_, prompt), completions in found.items():
        steps = sorted({min(completions), max(completions)})
        words = ("before", "after") if len(steps) > 1 else ("sampled",)
        texts = [
            (f"{word} · step {step}", completions[step])
            for word, step in zip(words, steps, strict=True)
        ]
        samples.append(Sample(prompt, tuple(texts)))
    return tuple(samples)


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a file that may not be there; the last one may be torn."""
    if not path.is_file():
        return []
    rows = []
    lines = text_of(path).split("\n")  # splitlines() would also split at U+2028 within a text
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            if number == len(lines):
                break
            raise ReportError(f"{path}:{number}: need a JSON object, got {error}") from error
        if row is None:
            continue
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise ReportError(f"{path}:{number}: need an object with a step, got {line[:60]!r}")
        rows.append(row)
    return rows


def parsed(path: Path) -> Any:
    try:
        return json.loads(text_of(path))
    except ValueError as error:
        raise ReportError(f"{path}: need JSON, got {error}") from error


def text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ReportError(f"cannot read {path}: {error.strerror}") from error


def distinct(runs: Sequence[Run]) -> list[str]:
    """The runs' names, those that several share replaced by the ends of their paths."""
    names = [run.name for run in runs]
    for depth in range(1, max(len(run.place.parts) for run in runs) + 1):
        if len(set(names)) == len(names):
            break
        names = [
            "/".join(run.place.parts[-depth:]) if names.count(name) > 1 else name
            for run, name in zip(runs, names, strict=True)
        ]
    return names


def named(item: Run | Quickstart, names: dict[Path, str]) -> Run | Quickstart:
    if isinstance(item, Run):
        return replace(item, name=names[item.place])
    return replace(item, runs=tuple(replace(run, name=names[run.place]) for run in item.runs))
