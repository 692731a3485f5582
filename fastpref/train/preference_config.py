"""What runs on preferences are told: losses by name, with what each of them can be told."""

import math
from dataclasses import dataclass
from typing import Any, get_args

import torch

from fastpref.losses.pairs import dpo_loss, loss_inputs, uses_reference
from fastpref.losses.preference import LOSSES
from fastpref.losses.ranking import RANKING_LOSSES
from fastpref.losses.unpaired import UnpairedType
from fastpref.train.config import LOSS_OPTIONS, ConfigError, TrainConfig, at_least, unknown


@dataclass(kw_only=True)
class ReferenceConfig(TrainConfig):
    """What methods share that compare with the model as it came."""

    learning_rate: float = 1e-6
    """Peak learning rate."""
    beta: float = 0.1
    """Strength of the pull to the reference; higher stays closer."""
    precompute_ref_log_probs: bool = False
    """Score the data with the reference once, before training, and keep no second model."""
    reference_cache: str | None = None
    """Folder of those scores, which several runs may share; None: in the run's own folder."""
    loss_columns: list[str] | None = None
    """Numbers of rows that the loss is to read though it can do without: margin, weight."""

    def check(self) -> None:
        super().check()
        if not 0 < self.beta < float("inf"):
            raise ConfigError(f"need beta > 0, got {self.beta}")
        if self.reference_cache and not self.precompute_ref_log_probs:
            raise ConfigError("need precompute_ref_log_probs for a reference_cache, got it off")


@dataclass(kw_only=True)
class DPOConfig(ReferenceConfig):
    """Direct preference optimisation and its kin."""

    loss_type: str | list[str] = "sigmoid"
    """One preference loss or several, summed with loss_weights; losses/preference.py defines each:
    sigmoid, robust, ipo, ipo_sum, hinge, slic, exo_pair, nca_pair, bco_pair, bco_pair_delta, sppo,
    sppo_hard, aot, aot_unpaired, aot_global, sft, unlikelihood, discopop, apo_zero, apo_down,
    sigmoid_norm, rdpo, alpha_dpo, modpo, rpo, rpo_sq, rpo_bwd_kl, rpo_fwd_kl, simpo, cpo, orpo,
    tdpo, tdpo2; plackett_luce and all_pairs learn from rankings."""
    loss_weights: list[float] | None = None
    """A weight for each loss_type; None: 1 each."""
    loss_options: dict[str, float] | None = None
    """Numbers of the losses' own by name, each of them a key too: slic_delta, slic_lambda,
    unlikelihood_alpha, discopop_tau, rdpo_alpha, alpha_dpo_gamma, alpha_dpo_alpha, modpo_weight,
    rpo_alpha, reward_scale, simpo_gamma, cpo_alpha, tdpo_alpha."""
    label_smoothing: float | None = None
    """Probability that a preference is flipped (conservative DPO); None: the loss's own default."""
    f_divergence_type: str = "reverse_kl"
    """reverse_kl, forward_kl, js_divergence or alpha_divergence."""
    f_alpha_divergence_coef: float = 0.5
    """Alpha of alpha_divergence."""
    ld_alpha: float | None = None
    """What tokens count that only the longer completion of a pair has; None: as all others."""
    use_weighting: bool = False
    """Weigh pairs by how likely the policy is to write them (WPO)."""

    def loss_types(self) -> list[str]:
        return [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type or [])

    def check(self) -> None:
        super().check()
        types = self.loss_types()
        for name in types:
            if name in get_args(UnpairedType):
                raise ConfigError(f"need fastpref kto for loss_type {name!r}, got fastpref dpo")
            if name not in LOSSES and name not in RANKING_LOSSES:
                raise ConfigError(unknown("loss_type", name, [*LOSSES, *RANKING_LOSSES]))
        if not types:
            raise ConfigError(f"need at least one loss_type, got {self.loss_type}")
        self.settle(types)
        if self.loss_weights is not None and len(self.loss_weights) != len(types):
            raise ConfigError(
                f"need one of loss_weights per loss_type {types}, got {self.loss_weights}"
            )
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise ConfigError(f"need ld_alpha in [0, 1], got {self.ld_alpha}")
        if any(name in RANKING_LOSSES for name in types):
            self.check_ranking()
        else:
            self.check_losses()

    def settle(self, types: list[str]) -> None:
        """Write what asks for nothing as nothing, so that equal runs have equal keys."""
        self.loss_type = types[0] if len(types) == 1 else types
        if self.label_smoothing == 0 and "exo_pair" not in types:
            self.label_smoothing = None
        options = self.loss_options or {}
        for key, value in options.items():
            if key not in LOSS_OPTIONS:
                raise ConfigError(unknown("key of loss_options", key, LOSS_OPTIONS))
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise ConfigError(f"need a finite number for {key}, got {value!r}")
        asked = {key: value for key, value in options.items() if value != LOSS_OPTIONS[key]}
        self.loss_options = asked or None
        for weight in self.loss_weights or []:
            if not math.isfinite(weight):
                raise ConfigError(f"need finite loss_weights, got {self.loss_weights}")
        if self.f_alpha_divergence_coef != 0.5 and self.f_divergence_type != "alpha_divergence":
            raise ConfigError(
                "need f_divergence_type alpha_divergence for f_alpha_divergence_coef "
                f"{self.f_alpha_divergence_coef}, got {self.f_divergence_type}"
            )

    def columns(self) -> tuple[str, ...]:
        """Numbers of rows that the losses read: what they need, and what they are told to."""
        inputs = [loss_inputs(name) for name in self.loss_types() if name in LOSSES]
        needed = [k for k in ("margin", "win_rate") if any(not x.get(k, True) for x in inputs)]
        return tuple(dict.fromkeys([*needed, *(self.loss_columns or [])]))

    def told(self) -> str:
        """The keys that shape the losses and are set."""
        default = DPOConfig()
        keys = ("loss_type", *PAIR_KEYS)
        return ", ".join(key for key in keys if getattr(self, key) != getattr(default, key))

    def check_ranking(self) -> None:
        """A ranking loss stands alone, without what pairs can be told."""
        types = self.loss_types()
        if len(types) > 1:
            raise ConfigError(f"need a ranking loss alone, got {types}")
        if told := self.told().replace("loss_type", "").lstrip(", "):
            raise ConfigError(f"loss_type {types[0]!r} has no {told}, got one")

    def check_losses(self) -> None:
        """Take each loss once on one pair: it knows which options it takes."""
        types, one = self.loss_types(), torch.ones(1)
        needs = {k for t in types for k, optional in loss_inputs(t).items() if not optional}
        refs = any(map(uses_reference, types))
        names = {"chosen_lengths", "rejected_lengths", *self.columns()}
        names |= {"chosen_kl", "rejected_kl"} & needs
        names |= {"weight"} if self.use_weighting else set()
        options: dict[str, Any] = {**dict.fromkeys(names, one), **(self.loss_options or {})}
        try:
            dpo_loss(
                one,
                one,
                *([one, one] if refs else []),
                beta=self.beta,
                loss_type=types,
                label_smoothing=self.label_smoothing,
                f_divergence_type=self.f_divergence_type,
                f_alpha_divergence_coef=self.f_alpha_divergence_coef,
                **options,
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if self.precompute_ref_log_probs and not refs:
            raise ConfigError(f"need a loss with a reference to precompute, got {types}")
        if self.precompute_ref_log_probs and "chosen_kl" in needs:
            need = f"need the reference's whole distributions for {types}"
            raise ConfigError(f"{need}, got precompute_ref_log_probs")


@dataclass(kw_only=True)
class KTOConfig(ReferenceConfig):
    """Learning from single completions that are labelled good or bad."""

    loss_type: UnpairedType = "kto"
    """kto, bco or apo_zero_unpaired; fastpref/losses/unpaired.py defines them."""
    desirable_weight: float = 1.0
    """Weight of good completions; not of bco."""
    undesirable_weight: float = 1.0
    """Weight of bad completions; not of bco."""

    def check(self) -> None:
        super().check()
        at_least(self, 0, "desirable_weight", "undesirable_weight")
        weights = self.desirable_weight, self.undesirable_weight
        if not 0 < sum(weights) < float("inf"):
            raise ConfigError(f"need finite weights, one of them above 0, got {weights}")
        if self.loss_type == "bco" and weights != (1.0, 1.0):
            raise ConfigError(f"loss_type 'bco' has no desirable_weight, got {weights}")
        read = ["weight"] if self.loss_type == "bco" else []
        if not {*(self.loss_columns or [])} <= {*read}:
            need = f"need loss_columns in {read} for loss_type {self.loss_type!r}"
            raise ConfigError(f"{need}, got {self.loss_columns}")


# what a ranking loss cannot be told
PAIR_KEYS = (
    *("loss_weights", "loss_options", "label_smoothing", "f_divergence_type"),
    *("f_alpha_divergence_coef", "ld_alpha", "use_weighting", "loss_columns"),
)
