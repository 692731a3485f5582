"""Supervised fine-tuning: the mean negative log-prob of the scored tokens."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastpref.data.formats import Kind
from fastpref.data.packing import Batch
from fastpref.data.tokenize import Group
from fastpref.methods.base import OUTPUTS, Metrics, mean_over
from fastpref.models.head import LogpModel


@dataclass(frozen=True)
class SFT:
    """Cross-entropy in nats per token; its count is the step's scored tokens."""

    kind: ClassVar[Kind] = "sft"
    needs_reference: ClassVar[bool] = False
    precomputes_reference: ClassVar[bool] = False
    metric_names: ClassVar[tuple[str, ...]] = ("entropy", "mean_token_accuracy")

    def count(self, group: Group) -> int:
        return sum(
            len(tokens) if flags is None else sum(flags)
            for tokens, flags in zip(group.completions, group.scored, strict=True)
        )

    def __call__(self, model: LogpModel, batch: Batch) -> tuple[Tensor, Metrics]:
        stats = model(batch, outputs=OUTPUTS)
        return -stats.logp.sum(), {
            "entropy": mean_over(stats.entropy),
            "mean_token_accuracy": mean_over(stats.is_top1),
        }
