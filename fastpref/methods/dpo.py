"""Direct preference optimisation and its kin: pairs of completions, mostly against a reference."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastpref.data.files import DataError
from fastpref.data.formats import Kind
from fastpref.data.packing import Batch
from fastpref.data.tokenize import Group
from fastpref.logps import sequence_logp, tail_weights
from fastpref.losses.pairs import PairLoss, dpo_loss, loss_inputs, uses_reference
from fastpref.losses.preference import LOSSES
from fastpref.methods.base import (
    OUTPUTS,
    PAIR_METRICS,
    Facts,
    Method,
    Metrics,
    Scored,
    Values,
    mean_over,
    of_tokens,
    token_metrics,
)
from fastpref.methods.coupled import moving_moments, running_mean
from fastpref.models.model import LogpModel

# (chosen, rejected, ref_chosen, ref_rejected), each (P,) -> losses (P,) or a PairLoss
LossFn = Callable[[Tensor, Tensor, Tensor, Tensor], PairLoss | Tensor]


@dataclass(frozen=True)
class DPO(Method):
    """The pairwise losses of losses/preference.py; the count is the step's pairs.

    A batch holds groups of two, chosen first, and ``ref_logp`` (B,) among its extras where the
    losses compare with a reference.
    """

    beta: float = 0.1
    loss_types: tuple[str, ...] = ("sigmoid",)
    loss_weights: tuple[float, ...] | None = None
    label_smoothing: float | None = None
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    ld_alpha: float | None = None
    use_weighting: bool = False
    options: Mapping[str, float] = field(default_factory=dict)
    columns: tuple[str, ...] = ()
    loss_fn: LossFn | None = None
    precomputes_reference: bool = False
    kind: ClassVar[Kind] = "preference"
    metric_names: ClassVar[tuple[str, ...]] = PAIR_METRICS

    @cached_property
    def inputs(self) -> dict[str, bool]:
        """What the losses read, and whether they all can do without."""
        found: dict[str, bool] = {}
        for name in self.loss_types:
            for key, optional in loss_inputs(name).items():
                found[key] = found.get(key, True) and optional
        return found

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        return self.loss_fn is not None or any(map(uses_reference, self.loss_types))

    @property
    def compares_models(self) -> bool:  # type: ignore[override]
        return "chosen_kl" in self.inputs

    @property
    def couples(self) -> bool:  # type: ignore[override]
        return any(LOSSES[name].couples for name in self.loss_types) and self.loss_fn is None

    @property
    def reference_rule(self) -> str:  # type: ignore[override]
        return "" if self.ld_alpha is None else f"ld_alpha {self.ld_alpha}"

    def count(self, group: Group) -> int:
        if len(group.completions) != 2:
            need = f"row {group.row}: need a chosen and a rejected completion"
            raise DataError(f"{need}, got {len(group.completions)}")
        return super().count(group)

    def known(self, groups: Sequence[Group]) -> Facts:
        if "mean_chosen_length" not in self.inputs:
            return {}
        scored = [(g.completions[0], g.scored[0]) for g in groups]
        lengths = [len(tokens) if flags is None else sum(flags) for tokens, flags in scored]
        return {"mean_chosen_length": sum(lengths) / len(lengths)}

    def sum_logps(self, logp: Tensor, batch: Batch) -> Tensor:
        if self.ld_alpha is not None:
            logp = logp * tail_weights(batch.completions, len(logp), self.ld_alpha)
        return super().sum_logps(logp, batch)

    def score(self, model: LogpModel, batch: Batch, reference: LogpModel | None) -> Scored:
        outputs = (*OUTPUTS, "log_sum_sq_probs") if self.use_weighting else OUTPUTS
        values: Values = {}
        if self.compares_models:
            assert reference is not None
            stats, ref_logp, kl = model.against(reference, batch, outputs=outputs)
            both = sequence_logp(kl, cu_seqlens=batch.completions)
            values |= {"chosen_kl": both[0::2], "rejected_kl": both[1::2]}
            reference_logps: Tensor | None = self.sum_logps(ref_logp, batch)
        else:
            stats = model(batch, outputs=outputs)
            reference_logps = batch.extras.get("ref_logp")
        logps, lengths = self.sum_logps(stats.logp, batch), batch.completions.diff()
        values |= {"chosen_logps": logps[0::2], "rejected_logps": logps[1::2]}
        values |= {"chosen_lengths": lengths[0::2], "rejected_lengths": lengths[1::2]}
        if self.needs_reference and reference_logps is not None:
            values["ref_chosen_logps"] = reference_logps[0::2]
            values["ref_rejected_logps"] = reference_logps[1::2]
        if self.ld_alpha is not None and "chosen_nll" in self.inputs:
            means = sequence_logp(stats.logp, cu_seqlens=batch.completions, mean=True)
            values["chosen_nll"] = -means[0::2]
        values |= {name: batch.extras[name] for name in self.columns}
        if stats.log_sum_sq_probs is not None:
            # Zhou et al. 2024 (WPO), arXiv:2406.11827, eq. 2
            aligned = (stats.logp - stats.log_sum_sq_probs).detach()
            each = sequence_logp(aligned, cu_seqlens=batch.completions, mean=True).exp()
            values["weight"] = values.get("weight", 1.0) * each[0::2] * each[1::2]
        # every other completion is a chosen one, from the first on
        is_chosen = of_tokens(torch.arange(len(lengths), device=lengths.device) % 2 == 0, batch)
        return Scored(values, token_metrics(stats, is_chosen, ~is_chosen))

    def observe(self, moving: Facts, values: Values) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        ratios = [
            (values[f"{side}_logps"] - values[f"ref_{side}_logps"]).detach().double()
            for side in ("chosen", "rejected")
            if f"ref_{side}_logps" in values
        ]
        if "delta" in self.inputs:
            found |= running_mean(moving, "delta", self.beta * torch.cat(ratios))
        if "gap_mean" in self.inputs:
            lengths = values["chosen_lengths"], values["rejected_lengths"]
            means = [r / n.clamp(min=1) for r, n in zip(ratios, lengths, strict=True)]
            found |= moving_moments(moving, "gap", means[0] - means[1])
        return found

    def loss(self, values: Values, facts: Facts) -> tuple[Tensor, Metrics]:
        pair = self.losses(values, facts)
        rewards = pair.chosen_rewards, pair.rejected_rewards
        return pair.losses.sum(), {
            "rewards/chosen": mean_over(rewards[0]),
            "rewards/rejected": mean_over(rewards[1]),
            "rewards/margins": mean_over(rewards[0] - rewards[1]),
            "rewards/accuracies": mean_over(rewards[0] > rewards[1]),
            "logps/chosen": mean_over(values["chosen_logps"]),
            "logps/rejected": mean_over(values["rejected_logps"]),
        }

    def losses(self, values: Values, facts: Facts) -> PairLoss:
        """The weighted sum of the loss types, or the caller's own loss."""
        if self.loss_fn is not None:
            names = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
            inputs = tuple(values[name] for name in names)
            return as_pair_loss(self.loss_fn(*inputs), inputs, self.beta)
        known = {name: x for name, x in facts.items() if name in self.inputs}
        options: dict[str, Any] = {**values, **known, **self.options}
        return dpo_loss(
            **options,
            beta=self.beta,
            loss_type=self.loss_types,
            loss_weights=self.loss_weights,
            label_smoothing=self.label_smoothing,
            f_divergence_type=self.f_divergence_type,
            f_alpha_divergence_coef=self.f_alpha_divergence_coef,
        )


def as_pair_loss(out: PairLoss | Tensor, inputs: tuple[Tensor, ...], beta: float) -> PairLoss:
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
