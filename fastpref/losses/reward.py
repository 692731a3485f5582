"""The loss of a reward model: P pairs, of which one completion was preferred."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class RewardLoss(NamedTuple):
    """What a reward model's loss returns."""

    losses: Tensor
    """(P,)"""
    correct: Tensor
    """(P,) bool: whether the chosen completion's reward is the higher; a tie is not correct."""


def reward_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    *,
    margin: Tensor | None = None,
    centering: float = 0.0,
) -> RewardLoss:
    """-log s(r_w - r_l - m) + c (r_w + r_l)^2: Bradley-Terry, per pair.

    Args:
        chosen_rewards: (P,) r_w, the model's rewards of the chosen completions; floating point,
            differentiable, like rejected_rewards.
        rejected_rewards: (P,) r_l.
        margin: (P,) m, floating point: how much better the chosen ones were judged; None: 0.
        centering: c, at least 0: pulls the rewards of a pair to sum to 0, which comparisons leave
            free.

    Returns:
        RewardLoss of two (P,) tensors: losses in fp32 (fp64 for fp64 rewards), and correct.

    Raises:
        ValueError: a shape or range differs from the above.
        TypeError: a dtype differs from the above.

    Source: Stiennon et al. 2020, arXiv:2009.01325; the margin, Touvron et al. 2023,
    arXiv:2307.09288, eq. 2; centering, Eisenstein et al. 2023, arXiv:2312.09244.
    """
    named = {"chosen_rewards": chosen_rewards, "rejected_rewards": rejected_rewards}
    for name, x in {**named, "margin": margin}.items():
        if x is not None and (x.ndim != 1 or x.shape != chosen_rewards.shape):
            shape = "(P,)" if x.ndim != 1 else f"(P,) = {tuple(chosen_rewards.shape)}"
            raise ValueError(f"need {name} {shape}, got {tuple(x.shape)}")
        if x is not None and not x.is_floating_point():
            raise TypeError(f"need floating-point {name}, got {x.dtype}")
    if not 0 <= centering < math.inf:
        raise ValueError(f"need centering >= 0, got {centering}")
    both = torch.promote_types(chosen_rewards.dtype, rejected_rewards.dtype)
    wide = torch.promote_types(both, torch.float32)
    chosen, rejected = chosen_rewards.to(wide), rejected_rewards.to(wide)
    gap = chosen - rejected
    losses = -logsigmoid(gap if margin is None else gap - margin.to(wide))
    if centering:
        losses = losses + centering * (chosen + rejected).square()
    return RewardLoss(losses, chosen > rejected)
