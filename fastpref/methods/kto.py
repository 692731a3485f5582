"""Learning from completions labelled good or bad: KTO, BCO and APO without pairs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fastpref.data.formats import Kind
from fastpref.data.packing import Batch
from fastpref.data.tokenize import Group
from fastpref.losses.unpaired import UnpairedLoss, UnpairedType, bco_loss, kto_loss, mismatched_kl
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
from fastpref.methods.coupled import running_mean
from fastpref.models.model import LogpModel


@dataclass(frozen=True)
class KTO(Method):
    """The losses of losses/unpaired.py; the count is the step's completions.

    A batch holds ``label`` (G,) and ``ref_logp`` (B,) among its extras; its groups hold a
    completion, and for "kto" one of another prompt after it.
    """

    beta: float = 0.1
    loss_type: UnpairedType = "kto"
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    columns: tuple[str, ...] = ()
    precomputes_reference: bool = False
    needs_reference = True
    kind: ClassVar[Kind] = "unpaired"

    @property
    def metric_names(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*PAIR_METRICS, *(["kl"] if self.mismatches else []))

    @property
    def couples(self) -> bool:  # type: ignore[override]
        return self.loss_type != "apo_zero_unpaired"

    @property
    def mismatches(self) -> bool:  # type: ignore[override]
        return self.loss_type == "kto"

    def lacks(self, groups: Sequence[Group]) -> tuple[str, ...]:
        labels = {group.extras["label"] != 0 for group in groups}
        sides = {True: "chosen", False: "rejected"}
        gone = [side for label, side in sides.items() if labels and label not in labels]
        names = [f"{part}/{side}" for part in ("rewards", "logps", "logits") for side in gone]
        return (*names, *(["rewards/margins"] if gone else []))

    def trained(self, group: Group) -> Group:
        return replace(
            group,
            completions=group.completions[:1],
            scored=group.scored[:1],
            extras={k: x[:1] if isinstance(x, tuple) else x for k, x in group.extras.items()},
        )

    def score(self, model: LogpModel, batch: Batch, reference: LogpModel | None) -> Scored:
        stats = model(batch, outputs=OUTPUTS)
        logps = self.sum_logps(stats.logp, batch)
        labels = batch.extras["label"]
        each = len(logps) // len(labels)
        values = {"logps": logps[::each], "labels": labels}
        values |= {name: batch.extras[name] for name in self.columns}
        ref_logps = batch.extras.get("ref_logp")  # where it is known, a second pass has none
        if ref_logps is not None:
            values["ref_logps"] = ref_logps[::each]
        if ref_logps is not None and each == 2:
            values |= {"kl_logps": logps[1::2].detach(), "kl_ref_logps": ref_logps[1::2]}
        own = torch.arange(len(logps), device=logps.device) % each == 0
        good = labels.repeat_interleave(each, output_size=len(logps)) != 0
        chosen, rejected = of_tokens(own & good, batch), of_tokens(own & ~good, batch)
        return Scored(values, token_metrics(stats, chosen, rejected))

    def observe(self, moving: Facts, values: Values) -> dict[str, Tensor]:
        if self.loss_type != "bco":
            return {}
        ratios = (values["logps"] - values["ref_logps"]).detach().double()
        return running_mean(moving, "delta", self.beta * ratios)

    def loss(self, values: Values, facts: Facts) -> tuple[Tensor, Metrics]:
        out, pivot = self.losses(values, facts)
        good = values["labels"] != 0
        metrics = {
            "rewards/chosen": mean_over(out.rewards, good),
            "rewards/rejected": mean_over(out.rewards, ~good),
            "rewards/accuracies": mean_over((out.rewards > pivot) == good),
            "logps/chosen": mean_over(values["logps"], good),
            "logps/rejected": mean_over(values["logps"], ~good),
        }
        if self.mismatches:
            metrics["kl"] = mean_over((pivot / self.beta).expand(len(good)))
        return out.losses.sum(), metrics

    def losses(self, values: Values, facts: Facts) -> tuple[UnpairedLoss, Tensor]:
        """Losses, and the reward from which on a completion counts as good."""
        inputs = values["logps"], values["ref_logps"], values["labels"]
        if self.loss_type == "bco":
            rewards = self.beta * (inputs[0] - inputs[1]).detach()
            delta = torch.as_tensor(facts.get("delta", rewards.mean()))
            weight = values.get("weight")
            return bco_loss(*inputs, beta=self.beta, delta=delta, weight=weight), delta
        kl = None
        if self.mismatches:
            kl = mismatched_kl(values["kl_logps"], values["kl_ref_logps"])
        out = kto_loss(
            *inputs,
            kl=kl,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )
        return out, inputs[0].new_zeros(()) if kl is None else self.beta * kl

    def derived(self, metrics: dict[str, float]) -> dict[str, float]:  # type: ignore[override]
        sides = [metrics.get(f"rewards/{side}") for side in ("chosen", "rejected")]
        if sides[0] is None or sides[1] is None:
            return {}
        return {"rewards/margins": sides[0] - sides[1]}
