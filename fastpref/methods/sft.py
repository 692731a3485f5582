"""Supervised fine-tuning: the mean negative log-prob of the scored tokens."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastpref.data.formats import Kind
from fastpref.data.packing import Batch
from fastpref.data.tokenize import Group
from fastpref.methods.base import OUTPUTS, Facts, Method, Metrics, Scored, Values, mean_over
from fastpref.models.model import LogpModel


@dataclass(frozen=True)
class SFT(Method):
    """Cross-entropy in nats per token; its count is the step's scored tokens."""

    kind: ClassVar[Kind] = "sft"
    metric_names: ClassVar[tuple[str, ...]] = ("entropy", "mean_token_accuracy")

    def count(self, group: Group) -> int:
        return sum(
            len(tokens) if flags is None else sum(flags)
            for tokens, flags in zip(group.completions, group.scored, strict=True)
        )

    def score(self, model: LogpModel, batch: Batch, reference: LogpModel | None) -> Scored:
        stats = model(batch, outputs=OUTPUTS)
        metrics = {
            "entropy": mean_over(stats.entropy),
            "mean_token_accuracy": mean_over(stats.is_top1),
        }
        return Scored({"logp": stats.logp}, metrics)

    def loss(self, values: Values, facts: Facts) -> tuple[Tensor, Metrics]:
        return -values["logp"].sum(), {}
