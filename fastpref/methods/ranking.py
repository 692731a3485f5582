"""Learning from groups of ranked completions, ties included."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastpref.data.formats import Kind
from fastpref.data.packing import Batch
from fastpref.losses.ranking import ranking_loss
from fastpref.methods.base import OUTPUTS, Facts, Method, Metrics, Scored, Values, mean_over
from fastpref.models.model import LogpModel


@dataclass(frozen=True)
class Ranking(Method):
    """The losses of losses/ranking.py; the count is the step's groups.

    A batch holds ``score`` and ``ref_logp``, both (B,), among its extras.
    """

    beta: float = 0.1
    loss_type: str = "plackett_luce"
    precomputes_reference: bool = False
    needs_reference = True
    kind: ClassVar[Kind] = "ranking"
    metric_names: ClassVar[tuple[str, ...]] = (
        *("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
        *("logps/chosen", "logps/rejected", "entropy"),
    )

    def score(self, model: LogpModel, batch: Batch, reference: LogpModel | None) -> Scored:
        stats = model(batch, outputs=OUTPUTS)
        values = {
            "logps": self.sum_logps(stats.logp, batch),
            "ref_logps": batch.extras["ref_logp"],
            "scores": batch.extras["score"],
            "groups": batch.groups,
        }
        return Scored(values, {"entropy": mean_over(stats.entropy)})

    def loss(self, values: Values, facts: Facts) -> tuple[Tensor, Metrics]:
        """Metrics are over all pairs of a better and a worse completion of one prompt."""
        inputs = (values[name] for name in ("logps", "ref_logps", "scores", "groups"))
        out = ranking_loss(*inputs, beta=self.beta, loss_type=self.loss_type)
        rewards, logps = out.rewards, values["logps"]
        shape = out.better.shape

        def over(of_pair: Tensor) -> tuple[Tensor, Tensor]:
            return mean_over(of_pair.expand(shape), out.better)

        margins = rewards[:, None] - rewards
        return out.losses.sum(), {
            "rewards/chosen": over(rewards[:, None]),
            "rewards/rejected": over(rewards),
            "rewards/margins": over(margins),
            "rewards/accuracies": over(margins > 0),
            "logps/chosen": over(logps[:, None]),
            "logps/rejected": over(logps),
        }
