"""Sums of metrics, the files of a run's lines, and what a person sees while it goes on."""

import contextlib
import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastpref.methods.base import Metrics
from fastpref.train.checkpoint import replace_text
from fastpref.train.engine import Engine


class MetricSums:
    """Sums and counts on the device; one reduction over ranks and one sync per reading."""

    def __init__(self) -> None:
        self.sums: Metrics = {}

    def add(self, metrics: Metrics) -> None:
        for name, (total, count) in metrics.items():
            old = self.sums.get(name)
            self.sums[name] = (total, count) if old is None else (old[0] + total, old[1] + count)

    def state(self) -> dict[str, list[float]]:
        """The sums as they stand; JSON keeps their doubles exactly."""
        return {name: [float(x) for x in parts] for name, parts in self.sums.items()}

    def load(self, state: dict[str, list[float]]) -> None:
        """Go on from a state; what comes next is added on its own device."""
        self.sums = {
            name: (torch.tensor(total), torch.tensor(count))
            for name, (total, count) in state.items()
        }

    def read(self, engine: Engine) -> dict[str, float]:
        """Global means by name; starts the sums anew."""
        if not self.sums:
            return {}
        names = sorted(self.sums)
        flat = torch.stack([part.double() for name in names for part in self.sums[name]])
        pairs = engine.all_reduce_sum(flat).view(-1, 2).tolist()
        self.sums = {}
        return {
            name: total / count for name, (total, count) in zip(names, pairs, strict=True) if count
        }


class JsonLines:
    """A file of one object a line, in the order of the steps."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        """Lines that this run has written."""

    def keep(self, count: int) -> None:
        """Drop the lines after the first ``count``, which a resumed run writes again."""
        if self.path.exists():
            kept = self.rows()[:count]
            self.count = len(kept)
            replace_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def rows(self) -> list[dict[str, Any]]:
        """Every whole line; the last one of a killed run may be torn."""
        rows = []
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
        return rows

    def last(self) -> dict[str, float]:
        """The last value of every name."""
        return {name: value for row in self.rows() for name, value in row.items()}

    def write(self, row: dict[str, Any]) -> None:
        """Add a line; a number that is not finite becomes null, since JSON has no word for it."""
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in row.items()
        }
        with self.path.open("a") as file:
            file.write(json.dumps(finite) + "\n")
        self.count += 1


def peak_memory(device: torch.device) -> float:
    """The most memory that was in use so far, in GiB: the GPU's, else the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


class Display:
    """A progress bar on a terminal, plain lines anywhere else."""

    def __init__(self, title: str, total: int, start: int, *, plain: bool = False) -> None:
        self.console = Console(file=sys.stderr)
        self.title = title
        self.total = total
        self.began = time.perf_counter()
        self.start = start
        self.progress: Progress | None = None
        if self.console.is_terminal and not plain:
            self.progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self.console,
            )
            self.task = self.progress.add_task(title, total=total, completed=start, note="")
            self.progress.start()

    def step(self, step: int) -> None:
        if self.progress:
            self.progress.update(self.task, completed=step)

    def log(self, step: int, row: dict[str, Any]) -> None:
        """Show a logged line: loss, margin, tokens per second, and on plain lines the time left."""
        shown = {
            "loss": row.get("loss"),
            "margin": row.get("rewards/margins"),
            "tokens/s": row.get("tokens_per_second"),
            "eval_loss": row.get("eval_loss"),
            "eval_accuracy": row.get("eval_rewards/accuracies"),
        }
        note = "  ".join(
            f"{name} {value:.4g}" for name, value in shown.items() if value is not None
        )
        if self.progress:
            if "eval_loss" in row:
                self.say(f"{self.title} {step}/{self.total}  {note}")
            else:
                self.progress.update(self.task, completed=step, note=note)
            return
        left = (time.perf_counter() - self.began) / max(1, step - self.start) * (self.total - step)
        tail = f"  left {left:.0f} s" if step > self.start else ""
        print(f"{self.title} {step}/{self.total}  {note}{tail}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        if self.progress:
            self.progress.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.progress:
            self.progress.stop()
