"""What a method is: a batch in, the sum of its losses and its metrics out; no rank, no I/O."""

from typing import Protocol

import torch
from torch import Tensor

from fastpref.data.formats import Kind
from fastpref.data.packing import Batch
from fastpref.data.tokenize import Group
from fastpref.models.head import LogpModel

# name -> (sum, count): 0-d tensors on the batch's device, divided once, when a line is logged
Metrics = dict[str, tuple[Tensor, Tensor]]

# what every method reads off the head beside log-probs
OUTPUTS = ("entropy", "is_top1", "mean_logit")


class Method(Protocol):
    """One way to learn, as the loop sees it."""

    @property
    def kind(self) -> Kind:
        """Which rows it learns from."""

    @property
    def needs_reference(self) -> bool:
        """Whether its batches must hold ``ref_logp``."""

    @property
    def precomputes_reference(self) -> bool:
        """Whether those are scored once, before the first step."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The names of its metrics."""

    def count(self, group: Group) -> int:
        """What a group adds to the loss's denominator."""

    def __call__(self, model: LogpModel, batch: Batch) -> tuple[Tensor, Metrics]:
        """The batch's sum of losses (0-d, differentiable) and its metrics."""


def mean_over(values: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(sum, count) of values, of those under mask where it is given; both detached, fp32."""
    values = values.detach().float()
    if mask is None:
        return values.sum(), values.new_full((), values.numel())  # a fill, where a copy would sync
    return torch.where(mask, values, 0.0).sum(), mask.sum().float()
