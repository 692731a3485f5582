"""What a person sees while a run goes on."""

import contextlib
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def tell(text: str) -> None:
    """A line on stderr; that it cannot be written there any more is no reason to end."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


class Display:
    """A progress bar on a terminal, plain lines anywhere else."""

    def __init__(self, title: str, total: int, *, plain: bool = False) -> None:
        self.console = Console(file=sys.stderr)
        self.title = title
        self.total = total
        self.plain = plain or not self.console.is_terminal
        self.progress: Progress | None = None

    def start(self, step: int) -> None:
        """Count the time from here, with ``step`` steps done."""
        self.began, self.first = time.perf_counter(), step
        if not self.plain:
            self.progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self.console,
            )
            self.task = self.progress.add_task(
                self.title, total=self.total, completed=step, note=""
            )
            self.progress.start()

    def step(self, step: int) -> None:
        if self.progress:
            self.progress.update(self.task, completed=step)

    def log(self, step: int, row: dict[str, Any]) -> None:
        """Show a logged line: loss, margin, speed, memory, and on plain lines the time left."""
        shown = {
            "loss": row.get("loss"),
            "margin": row.get("rewards/margins"),
            "tokens/s": row.get("tokens_per_second"),
            "mfu": row.get("mfu"),
            "GiB": row.get("peak_memory_gib"),
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
        left = (time.perf_counter() - self.began) / max(1, step - self.first) * (self.total - step)
        tail = f"  left {left:.0f} s" if step > self.first else ""
        self.say(f"{self.title} {step}/{self.total}  {note}{tail}")

    def say(self, text: str) -> None:
        if self.progress:
            with contextlib.suppress(OSError):
                self.progress.console.print(text, markup=False, highlight=False)
        else:
            tell(text)

    def close(self) -> None:
        if self.progress:
            self.progress.stop()
