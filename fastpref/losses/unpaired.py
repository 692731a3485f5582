"""Losses on single completions that are labelled good or bad; B completions, values (B,).

l is log pi/pi_ref of a completion, in nats.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

UnpairedType = Literal["kto", "bco", "apo_zero_unpaired"]


class UnpairedLoss(NamedTuple):
    """What an unpaired loss returns: each (B,); the rewards are detached."""

    losses: Tensor
    rewards: Tensor


def mismatched_kl(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """KTO's z: max(0, mean of l over completions of other prompts), 0-d, detached, fp32 or fp64.

    Args:
        logps: (B,) log-probs of completions under prompts that are not theirs, in nats; B > 0.
        ref_logps: (B,) the same under the reference.

    Raises:
        ValueError: a shape differs from the above.
        TypeError: a dtype differs from the above.

    Source: Ethayarajh et al. 2024, arXiv:2402.01306, section 4.
    """
    if not logps.numel():
        raise ValueError("need log-probs of at least one completion, got none")
    ratios, _ = _check(logps, ref_logps, torch.ones_like(logps), 1.0)
    return ratios.detach().mean().clamp(min=0)


def kto_loss(
    logps: Tensor,
    ref_logps: Tensor,
    labels: Tensor,
    *,
    kl: Tensor | float | None,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> UnpairedLoss:
    """w_D (1 - s(beta (l - z))) where labelled good, w_U (1 - s(beta (z - l))) where bad.

    Args:
        logps: (B,) sequence log-probs, in nats; floating point, differentiable.
        ref_logps: (B,) the same under the reference.
        labels: (B,) bool, or numbers of which 0 is bad.
        kl: z, 0-d, over the whole batch (:func:`mismatched_kl`); None: each completion apart, 1 -
            s(beta l) and s(beta l) ("apo_zero_unpaired").
        beta: positive.
        desirable_weight: of good completions; the number of good times this over the number of bad
            times undesirable_weight is best in [1, 4/3].
        undesirable_weight: of bad completions.

    Returns:
        UnpairedLoss of two (B,) tensors, fp32 (fp64 for fp64 inputs): losses, and beta l detached.

    Raises:
        ValueError: a shape or range differs from the above.
        TypeError: a dtype differs from the above.

    Source: Ethayarajh et al. 2024, arXiv:2402.01306.
    """
    ratios, good = _check(logps, ref_logps, labels, beta, kl=kl)
    if not (desirable_weight >= 0 and undesirable_weight >= 0):
        got = f"{desirable_weight} and {undesirable_weight}"
        raise ValueError(f"need weights of at least 0, got {got}")
    shifted = beta * ratios if kl is None else beta * (ratios - kl)
    losses = torch.where(good, -shifted, shifted).sigmoid()
    weights = torch.where(good, float(desirable_weight), float(undesirable_weight))
    return UnpairedLoss(losses * weights.to(losses), (beta * ratios).detach())


def bco_loss(
    logps: Tensor,
    ref_logps: Tensor,
    labels: Tensor,
    *,
    delta: Tensor | float | None = None,
    beta: float = 0.1,
    weight: Tensor | None = None,
) -> UnpairedLoss:
    """-log s(r - d) where labelled good, -log s(d - r) where bad, r = beta l.

    Args:
        logps: (B,) sequence log-probs, in nats; floating point, differentiable.
        ref_logps: (B,) the same under the reference.
        labels: (B,) bool, or numbers of which 0 is bad.
        delta: d, 0-d: the running mean of all rewards seen; None: their mean over these.
        beta: positive.
        weight: (B,) multiplies the losses (the paper's density ratios of underlying distributions).

    Returns:
        UnpairedLoss of two (B,) tensors, fp32 (fp64 for fp64 inputs): losses, and rewards detached.

    Raises:
        ValueError: a shape or range differs from the above.
        TypeError: a dtype differs from the above.

    Source: Jung et al. 2024, arXiv:2404.04656.
    """
    ratios, good = _check(logps, ref_logps, labels, beta, weight=weight, delta=delta)
    rewards = beta * ratios
    shifted = rewards - (rewards.detach().mean() if delta is None else delta)
    losses = -logsigmoid(torch.where(good, shifted, -shifted))
    if weight is not None:
        losses = losses * weight.to(losses.dtype)
    return UnpairedLoss(losses, rewards.detach())


def _check(
    logps: Tensor,
    ref_logps: Tensor,
    labels: Tensor,
    beta: float,
    *,
    weight: Tensor | None = None,
    **numbers: Tensor | float | None,
) -> tuple[Tensor, Tensor]:
    """(log-ratios in at least fp32, which completions are good)."""
    named = {"logps": logps, "ref_logps": ref_logps, "labels": labels, "weight": weight}
    for name, x in named.items():
        if x is None and name == "weight":
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"need a tensor for {name}, got {type(x).__name__}")
        if x.ndim != 1 or x.shape != logps.shape:
            raise ValueError(f"need {name} (B,) = {tuple(logps.shape)}, got {tuple(x.shape)}")
        if name != "labels" and not x.is_floating_point():
            raise TypeError(f"need floating-point {name}, got {x.dtype}")
    for name, number in numbers.items():
        if isinstance(number, Tensor) and number.ndim:
            raise ValueError(f"need a number or 0-d {name}, got {tuple(number.shape)}")
    if not 0 < beta < float("inf"):
        raise ValueError(f"need beta > 0, got {beta}")
    wide = torch.promote_types(logps.dtype, torch.float32)
    return logps.to(wide) - ref_logps.to(wide), labels != 0
