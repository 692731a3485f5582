"""What a method is: a batch in, the sum of its losses and its metrics out; no rank, no I/O."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fastpref.data.files import DataError
from fastpref.data.formats import Kind
from fastpref.data.packing import Batch
from fastpref.data.tokenize import Group
from fastpref.kernels.logp_from_logits import TokenStats
from fastpref.logps import sequence_logp
from fastpref.models.model import LogpModel
from fastpref.models.router import RouterLoad

# name -> (sum, count): 0-d tensors on the batch's device, divided once, when a line is logged
Metrics = dict[str, tuple[Tensor, Tensor]]
# name -> a number per group or completion
Values = dict[str, Tensor]
# name -> a number of the whole step
Facts = Mapping[str, Tensor | float]

# metrics of completions of which some are better
PAIR_METRICS = (
    *("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
    *("logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected"),
    *("entropy", "mean_token_accuracy"),
)
# of the numbers of a row
RANGES = {"win_rate": (0.0, 1.0), "weight": (0.0, math.inf)}
# what every method reads off the head beside log-probs
OUTPUTS = ("entropy", "is_top1", "mean_logit")


class Scored(NamedTuple):
    """What a forward finds out."""

    values: Values
    """What the losses are a function of."""
    metrics: Metrics
    """Of tokens: what the losses do not change."""
    load: RouterLoad | None = None
    """Of the model's routers, where their loss is trained; no method fills it in."""


class Method(ABC):
    """One way to learn, as the loop sees it."""

    kind: ClassVar[Kind]
    """Which rows it learns from."""
    metric_names: ClassVar[tuple[str, ...]]
    columns: tuple[str, ...] = ()
    """Numbers of a row that its losses read."""
    needs_reference: bool = False
    """Whether it compares with the model as it came."""
    precomputes_reference: bool = False
    """Whether that is scored once, before the first step."""
    compares_models: bool = False
    """Whether it needs the reference itself in every forward, not its log-probs."""
    mismatches: bool = False
    """Whether every group holds a completion of another prompt beside its own."""
    couples: bool = False
    """Whether a group's loss depends on the other groups of the step."""
    reference_rule: str = ""
    """How sum_logps differs from a plain sum: scores that are kept are kept under it."""

    def count(self, group: Group) -> int:
        """What a group adds to the loss's denominator; DataError where it lacks something."""
        for name in self.columns:
            if name not in group.extras:
                got = ", ".join(sorted(group.extras.keys() - {"ref_logp"})) or "none"
                need = f"row {group.row}: need a number {name!r} for the loss"
                raise DataError(f"{need}, got the columns {got}")
            low, high = RANGES.get(name, (-math.inf, math.inf))
            value = group.extras[name]
            if isinstance(value, tuple) or not low <= value <= high:
                raise DataError(f"row {group.row}: need {name} in [{low}, {high}], got {value}")
        return 1

    def lacks(self, groups: Sequence[Group]) -> tuple[str, ...]:
        """The metrics that these groups cannot give."""
        return ()

    def known(self, groups: Sequence[Group]) -> Facts:
        """What the losses need of all groups of a step and no forward has to find out."""
        return {}

    def trained(self, group: Group) -> Group:
        """The part of a group that a gradient reaches."""
        return group

    def sum_logps(self, logp: Tensor, batch: Batch) -> Tensor:
        """(B,) log-probs of the completions, from (M,) of their tokens, in nats."""
        return sequence_logp(logp, cu_seqlens=batch.completions)

    @abstractmethod
    def score(self, model: LogpModel, batch: Batch, reference: LogpModel | None) -> Scored:
        """The forward, differentiable."""

    def observe(self, moving: Facts, values: Values) -> dict[str, Tensor]:
        """Statistics that move from step to step, after the values of one more; 0-d, fp64."""
        return {}

    @abstractmethod
    def loss(self, values: Values, facts: Facts) -> tuple[Tensor, Metrics]:
        """The sum of the losses (0-d, differentiable in the values) and their metrics."""

    def derived(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Metrics that are made of others."""
        return {}


def mean_over(values: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(sum, count) of values, of those under mask where it is given; both detached, fp32."""
    values = values.detach().float()
    if mask is None:
        return values.sum(), values.new_full((), values.numel())  # a fill, where a copy would sync
    return torch.where(mask, values, 0.0).sum(), mask.sum().float()


def of_tokens(flags: Tensor, batch: Batch) -> Tensor:
    """(M,) from a flag (B,) of each completion."""
    return torch.repeat_interleave(flags, batch.completions.diff(), output_size=len(batch.target))


def token_metrics(stats: TokenStats, chosen: Tensor, rejected: Tensor) -> Metrics:
    """What the head says of the tokens (M,) of either kind of completion."""
    assert stats.mean_logit is not None and stats.entropy is not None and stats.is_top1 is not None
    return {
        "logits/chosen": mean_over(stats.mean_logit, chosen),
        "logits/rejected": mean_over(stats.mean_logit, rejected),
        "entropy": mean_over(stats.entropy, chosen | rejected),
        "mean_token_accuracy": mean_over(stats.is_top1, chosen),
    }
