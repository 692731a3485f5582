"""What may watch a run."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastpref.train.config import TrainConfig
    from fastpref.train.engine import Engine


class Callback:
    """Called by the loop; override what is wanted. Steps count from 1."""

    def on_start(self, config: "TrainConfig", run: Path, step: int) -> None:
        """Before the first step; ``step`` were taken before, in a run that goes on."""

    def on_step(self, step: int, engine: "Engine") -> None:
        """After every optimizer step."""

    def on_log(self, step: int, row: dict[str, Any]) -> None:
        """After a line of metrics.jsonl, of training or (``eval_`` names) of evaluation."""

    def on_evaluate(self, step: int, metrics: dict[str, float]) -> None:
        """After every evaluation, with its ``eval_`` metrics."""

    def on_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """After completions were sampled: ``step``, ``row``, ``prompt``, ``completion`` of each."""

    def on_save(self, step: int, folder: Path) -> None:
        """After a checkpoint is complete."""

    def on_end(self) -> None:
        """Once, however the run ends."""
