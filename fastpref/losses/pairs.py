"""dpo_loss: the losses of preference.py by name, on what a trainer holds of each pair."""

import difflib
import inspect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastpref.losses.preference import LOSSES

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
# what dpo_loss makes of its own arguments; a loss reads what its signature names
_MADE = {f"{side}_{name}" for side in ("chosen", "rejected") for name in ("logps", "mean_logps")}
_MADE |= {"ref_chosen_logps", "ref_rejected_logps"}
_SHARED = {"beta", "label_smoothing", "margin", "chosen_nll", "chosen_lengths", "rejected_lengths"}
_RATIOS = {f"{side}_{name}" for side in ("chosen", "rejected") for name in ("logratios", "scores")}
_MADE |= _RATIOS
_MADE_FROM = {
    "chosen_mean_logps": "chosen_lengths",
    "rejected_mean_logps": "rejected_lengths",
    "chosen_nll": "chosen_nll or chosen_lengths",
}
_OF_PAIRS = {"chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps", "weight"}
_OF_PAIRS |= {"chosen_lengths", "rejected_lengths", "chosen_nll", "margin", "win_rate"}
_OF_PAIRS |= {"chosen_kl", "rejected_kl"}
_POSITIVE = {"discopop_tau", "modpo_weight"}  # divisors
# exponents of a log-ratio stay below: exp(88.8) is no fp32
_MOST_EXPONENT = 80.0


class PairLoss(NamedTuple):
    """What a pairwise loss returns: each (P,); the rewards are detached."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


# every input of a loss by name, and whether it can do without
_INPUTS = {
    name: {
        p.name: p.default is not p.empty
        for p in inspect.signature(loss.function).parameters.values()
    }
    for name, loss in LOSSES.items()
}
# numbers of its own that a loss can be told, and their defaults
OPTIONS: dict[str, dict[str, float]] = {
    name: {
        p.name: p.default
        for p in inspect.signature(loss.function).parameters.values()
        if isinstance(p.default, int | float) and p.name not in _SHARED
    }
    for name, loss in LOSSES.items()
}


def loss_inputs(loss_type: str) -> dict[str, bool]:
    """What a loss reads by name, and whether it can do without.

    Raises:
        ValueError: the name is none of ``fastpref.losses.preference.LOSSES``.
    """
    if loss_type not in _INPUTS:
        near = difflib.get_close_matches(str(loss_type), _INPUTS, n=1, cutoff=0.0)
        known = ", ".join(_INPUTS)
        raise ValueError(f"need loss_type in {known}; got {loss_type!r}, nearest {near[0]!r}")
    return _INPUTS[loss_type]


def uses_reference(loss_type: str) -> bool:
    """Whether a loss compares with a reference."""
    names = loss_inputs(loss_type)
    return bool(_RATIOS.intersection(names) or "ref_chosen_logps" in names)


def _check(tensors: dict[str, Any]) -> None:
    shape = getattr(tensors["chosen_logps"], "shape", ())
    for name, x in tensors.items():
        is_number = name not in _OF_PAIRS and not (isinstance(x, Tensor) and x.ndim)
        if x is None or is_number:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"need a tensor for {name}, got {type(x).__name__}")
        if x.ndim != 1 or x.shape != shape:
            of = f"{name} (P,)" if x.ndim != 1 else f"{name} (P,) = {tuple(shape)}"
            raise ValueError(f"need {of}, got {tuple(x.shape)}")
        if not (x.is_floating_point() or name.endswith("_lengths")):
            raise TypeError(f"need floating-point {name}, got {x.dtype}")
    for name in _POSITIVE & tensors.keys():
        if not isinstance(tensors[name], Tensor) and not tensors[name] > 0:
            raise ValueError(f"need {name} > 0, got {tensors[name]}")


def _scores(logratios: Tensor, f_divergence_type: str, alpha: float) -> Tensor:
    """f'(t) of t = exp(logratios).

    Source: Wang et al. 2023, arXiv:2309.16240, table 1, with the constants that TRL has.
    """
    if f_divergence_type == "forward_kl":
        return 1 - (-logratios).clamp(max=_MOST_EXPONENT).exp()
    if f_divergence_type == "js_divergence":
        return math.log(2) + logsigmoid(logratios)
    if f_divergence_type == "alpha_divergence" and abs(alpha - 1) >= 1e-6:  # at 1 the reverse KL
        exponent = ((alpha - 1) * logratios).clamp(max=_MOST_EXPONENT)
        return exponent.expm1() / (alpha - 1)
    return logratios


def _check_divergence(types: Sequence[str], f_divergence_type: str) -> None:
    if f_divergence_type not in F_DIVERGENCES:
        known = ", ".join(F_DIVERGENCES)
        raise ValueError(f"need f_divergence_type in {known}; got {f_divergence_type!r}")
    if f_divergence_type == "reverse_kl":
        return
    fixed = [name for name in types if "chosen_scores" not in _INPUTS[name] and name != "sft"]
    if fixed or set(types) == {"sft"}:
        raise ValueError(
            f"loss_type {(fixed or types)[0]!r} has no f_divergence_type, got {f_divergence_type!r}"
        )


def _check_use(types: Sequence[str], given: dict[str, Any]) -> None:
    """Nothing that a type needs is lacking, and nothing that was given is idle."""
    for name in types:
        lacking = [k for k, optional in _INPUTS[name].items() if not optional and k not in given]
        if lacking:  # by the name of the argument that it is made from
            need = " and ".join(dict.fromkeys(_MADE_FROM.get(k, k) for k in lacking))
            raise ValueError(f"loss_type {name!r} needs {need}, got None")
    at_hand = _MADE | {"beta", "chosen_lengths", "rejected_lengths", "chosen_nll"}
    for key in (k for k in given if k not in at_hand):
        idle = [name for name in types if key not in _INPUTS[name]]
        needed = any(not _INPUTS[name].get(key, True) for name in types)
        # what changes the comparison of a pair must reach all that compare; an option finds its own
        told = needed or key not in _SHARED or set(idle) <= {"sft"}
        if not told or len(idle) == len(types):
            own = ", ".join(sorted({option for name in types for option in OPTIONS[name]}))
            has = f" (its own options: {own})" if own else ""
            raise ValueError(f"loss_type {idle[0]!r} has no {key}, got one{has}")


def _check_fit(
    types: Sequence[str],
    refs: dict[str, Tensor | None],
    weight: Tensor | None,
    options: dict[str, Any],
) -> None:
    """What was given fits the types, whatever its values are."""
    given = [name for name, x in refs.items() if x is not None]
    if len(given) == 1:
        raise ValueError(f"need both reference log-probs or neither, got {given[0]} alone")
    if given and not any(map(uses_reference, types)):
        raise ValueError(f"loss_type {types[0]!r} has no reference, got its log-probs")
    sorts = [name for name in types if LOSSES[name].couples == "sort"]
    if sorts and weight is not None:
        raise ValueError(f"loss_type {sorts[0]!r} sorts pairs and has no weight, got one")
    for key, value in options.items():
        if key in _MADE | {"beta"} or value is None:
            raise ValueError(f"need no {key}, which is made here or means nothing, got one")


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: float = 0.1,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    label_smoothing: float | None = None,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    chosen_nll: Tensor | None = None,
    margin: Tensor | None = None,
    weight: Tensor | None = None,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    **options: Tensor | float,
) -> PairLoss:
    """Preference loss of each pair, with its implicit rewards.

    Args:
        chosen_logps: (P,) sequence log-probs of the chosen completions, in nats; floating point,
            differentiable, like rejected_logps.
        rejected_logps: (P,) the same of the rejected ones.
        ref_chosen_logps: (P,) under the reference; None, for both, means zeros.
        ref_rejected_logps: (P,) the same of the rejected ones.
        beta: positive.
        loss_type: a name of ``fastpref.losses.preference.LOSSES``, where each says its formula, or
            several, which are summed; a name that TRL has means TRL's number (whose "sigmoid" has
            no label_smoothing).
        loss_weights: one per loss_type; None: 1 each.
        label_smoothing: in [0, 0.5), the probability that a label is wrong, for the types that take
            it; None: the type's own default, which is 0 but for "exo_pair" (1e-3).
        chosen_lengths: (P,) scored tokens of the chosen completions, for types that average; a
            completion of none counts as one.
        rejected_lengths: (P,) the same of the rejected ones.
        chosen_nll: (P,) negative log-probs of the chosen completions per token, differentiable;
            None: from chosen_logps and chosen_lengths.
        margin: (P,) what the chosen completion is better by: subtracted from beta * (l_w - l_l)
            ("sigmoid", "hinge"), or the goal itself ("modpo", "rpo_sq" and its kin).
        weight: (P,) multiplies the losses of pairs; not for types that sort.
        f_divergence_type: what the implicit reward measures distance to the reference by:
            "reverse_kl", "forward_kl", "js_divergence" or "alpha_divergence".
        f_alpha_divergence_coef: alpha of that last one.
        **options: numbers and further (P,) tensors that a type names in its signature: win_rate
            ("sppo"), chosen_kl and rejected_kl ("tdpo"), simpo_gamma, rpo_alpha, delta, ...

    Returns:
        PairLoss of three (P,) tensors, fp32 (fp64 for fp64 inputs): losses, and the rewards of
        chosen and rejected, detached: beta * (log-prob - reference log-prob), of the mean per token
        where the (first) type has no reference and averages.

    Raises:
        ValueError: a shape or range differs from the above, a type is unknown, lacks an input or
            has no use for one that was given (lengths excepted).
        TypeError: a dtype differs from the above.

    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; each type names its own.
    """
    types = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    factors = [1.0] * len(types) if loss_weights is None else list(loss_weights)
    if not types or len(factors) != len(types):
        raise ValueError(f"need loss types and a weight for each, got {types} and {factors}")
    for name in types:
        loss_inputs(name)
    if not 0 < beta < float("inf") or not 0 <= (label_smoothing or 0.0) < 0.5:
        got = f"{beta} and {label_smoothing}"
        raise ValueError(f"need beta > 0 and label_smoothing in [0, 0.5), got {got}")
    _check_divergence(types, f_divergence_type)
    refs = {"ref_chosen_logps": ref_chosen_logps, "ref_rejected_logps": ref_rejected_logps}
    _check_fit(types, refs, weight, options)
    given: dict[str, Any] = {
        "chosen_logps": chosen_logps,
        "rejected_logps": rejected_logps,
        "chosen_lengths": chosen_lengths,
        "rejected_lengths": rejected_lengths,
        **{k: x for k, x in refs.items() if x is not None},
        "chosen_nll": chosen_nll,
        "margin": margin,
        **options,
    }
    _check({**given, "weight": weight})
    values = {k: x for k, x in given.items() if x is not None}
    wanted = {key for name in types for key in _INPUTS[name]}
    values = _derived(values, wanted, f_divergence_type, f_alpha_divergence_coef)
    values["beta"] = beta
    if label_smoothing is not None and (label_smoothing or "exo_pair" in types):
        values["label_smoothing"] = label_smoothing
    _check_use(types, values)
    parts = []
    for name, factor in zip(types, factors, strict=True):
        loss = LOSSES[name].function(**{k: values[k] for k in _INPUTS[name] if k in values})
        parts.append(loss if factor == 1 else factor * loss)
    losses = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
    if weight is not None:
        losses = losses * weight.to(losses.dtype)
    averages = not any(map(uses_reference, types)) and "chosen_mean_logps" in _INPUTS[types[0]]
    of = "mean_logps" if averages else "logratios"
    rewards = [(beta * values[f"{side}_{of}"]).detach() for side in ("chosen", "rejected")]
    return PairLoss(losses, *rewards)


def _derived(
    values: dict[str, Any], wanted: set[str], f_divergence_type: str, alpha: float
) -> dict[str, Any]:
    """What losses read, from what a trainer holds: at least fp32, and lengths of at least 1."""
    dtype = torch.promote_types(values["chosen_logps"].dtype, torch.float32)
    out = {k: x.to(dtype) if isinstance(x, Tensor) else x for k, x in values.items()}
    averages = wanted & {"chosen_mean_logps", "chosen_nll"}
    for side in ("chosen", "rejected"):
        logps, ref = out[f"{side}_logps"], out.get(f"ref_{side}_logps")
        ratios = out[f"{side}_logratios"] = logps if ref is None else logps - ref
        out[f"{side}_scores"] = _scores(ratios, f_divergence_type, alpha)
        if ref is None and "ref_chosen_logps" in wanted:
            out[f"ref_{side}_logps"] = torch.zeros_like(logps)
        if f"{side}_lengths" in out:
            lengths = out[f"{side}_lengths"] = out[f"{side}_lengths"].clamp(min=1)
            if averages:
                out[f"{side}_mean_logps"] = logps / lengths
    if "chosen_nll" not in out and "chosen_mean_logps" in out:
        out["chosen_nll"] = -out["chosen_mean_logps"]
    return out
