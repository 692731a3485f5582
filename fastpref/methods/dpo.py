"""Direct preference optimisation: pairs of completions against a frozen reference."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastpref.data.formats import Kind
from fastpref.data.packing import Batch
from fastpref.data.tokenize import Group
from fastpref.logps import sequence_logp
from fastpref.losses.preference import PairLoss, dpo_loss
from fastpref.methods.base import OUTPUTS, Metrics, mean_over
from fastpref.models.head import LogpModel

# (chosen, rejected, ref_chosen, ref_rejected), each (P,) -> losses (P,) or a PairLoss
LossFn = Callable[[Tensor, Tensor, Tensor, Tensor], PairLoss | Tensor]


@dataclass(frozen=True)
class DPO:
    """The pairwise losses of losses/preference.py; the count is the step's pairs.

    A batch holds groups of two, chosen first, and ``ref_logp`` (B,) among its extras.
    """

    beta: float = 0.1
    loss_types: tuple[str, ...] = ("sigmoid",)
    loss_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0
    loss_fn: LossFn | None = None
    precomputes_reference: bool = False
    kind: ClassVar[Kind] = "preference"
    needs_reference: ClassVar[bool] = True
    metric_names: ClassVar[tuple[str, ...]] = (
        *("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
        *("logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected"),
        *("entropy", "mean_token_accuracy"),
    )

    def count(self, group: Group) -> int:
        if len(group.completions) != 2:
            raise ValueError(
                f"row {group.row}: need a chosen and a rejected completion, "
                f"got {len(group.completions)}"
            )
        return 1

    def __call__(self, model: LogpModel, batch: Batch) -> tuple[Tensor, Metrics]:
        stats = model(batch, outputs=OUTPUTS)
        logps = sequence_logp(stats.logp, cu_seqlens=batch.completions)
        lengths = batch.completions.diff()
        reference = batch.extras["ref_logp"]
        pair = self.losses(logps, reference, lengths)
        # which scored token belongs to a chosen completion: every other one, from the first on
        completion = torch.arange(len(lengths), device=lengths.device)
        is_chosen = torch.repeat_interleave(
            completion % 2 == 0, lengths, output_size=len(batch.target)
        )
        rewards = pair.chosen_rewards, pair.rejected_rewards
        return pair.losses.sum(), {
            "rewards/chosen": mean_over(rewards[0]),
            "rewards/rejected": mean_over(rewards[1]),
            "rewards/margins": mean_over(rewards[0] - rewards[1]),
            "rewards/accuracies": mean_over(rewards[0] > rewards[1]),
            "logps/chosen": mean_over(logps[0::2]),
            "logps/rejected": mean_over(logps[1::2]),
            "logits/chosen": mean_over(stats.mean_logit, is_chosen),
            "logits/rejected": mean_over(stats.mean_logit, ~is_chosen),
            "entropy": mean_over(stats.entropy),
            "mean_token_accuracy": mean_over(stats.is_top1, is_chosen),
        }

    def losses(self, logps: Tensor, reference: Tensor, lengths: Tensor) -> PairLoss:
        """The weighted sum of the loss types, or the caller's own loss."""
        inputs = logps[0::2], logps[1::2], reference[0::2], reference[1::2]
        if self.loss_fn is not None:
            return as_pair_loss(self.loss_fn(*inputs), inputs, self.beta)
        weights = self.loss_weights or (1.0,) * len(self.loss_types)
        parts = [
            dpo_loss(
                *inputs,
                beta=self.beta,
                loss_type=name,
                label_smoothing=self.label_smoothing,
                chosen_lengths=lengths[0::2],
                rejected_lengths=lengths[1::2],
            )
            for name in self.loss_types
        ]
        losses = [w * part.losses for w, part in zip(weights, parts, strict=True)]
        return parts[0]._replace(losses=torch.stack(losses).sum(0))


def as_pair_loss(
    out: PairLoss | Tensor, inputs: tuple[Tensor, Tensor, Tensor, Tensor], beta: float
) -> PairLoss:
    """What a caller's loss returned, completed with DPO's rewards where it gave losses alone."""
    chosen, rejected, ref_chosen, ref_rejected = (x.detach() for x in inputs)
    parts = out if isinstance(out, PairLoss) else (out,)
    if not all(isinstance(part, Tensor) and part.shape == chosen.shape for part in parts):
        got = [tuple(p.shape) if isinstance(p, Tensor) else type(p).__name__ for p in parts]
        need = f"losses ({len(chosen)},) or a PairLoss of them"
        raise ValueError(f"loss_fn must return {need}, got {got}")
    if isinstance(out, PairLoss):
        return out
    return PairLoss(out, beta * (chosen - ref_chosen), beta * (rejected - ref_rejected))
