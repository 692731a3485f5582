"""Losses on groups of ranked completions: B completions, G groups of them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastpref.kernels.sequences import check_cu_seqlens


class RankingLoss(NamedTuple):
    """What a ranking loss returns; the rewards are detached."""

    losses: Tensor
    """(G,)"""
    rewards: Tensor
    """(B,)"""
    better: Tensor
    """(B, B) bool: whether completion i is ranked above j, in one group."""


def plackett_luce(rewards: Tensor, scores: Tensor, same: Tensor) -> Tensor:
    """(B,) log sum exp of r_j over all j not ranked above i, less r_i: summed, the negative
    log-probability of the order; tied ones share their denominator (Breslow).

    Source: Rafailov et al. 2023, arXiv:2305.18290, appendix A.3.
    """
    after = same & (scores <= scores[:, None])
    below = rewards[None].masked_fill(~after, float("-inf"))
    return below.logsumexp(1) - rewards


def all_pairs(rewards: Tensor, scores: Tensor, same: Tensor) -> Tensor:
    """(B,) -log s(r_i - r_j) summed over the j ranked below i, over the group's number of such
    pairs; tied ones are no pair. Source: Ouyang et al. 2022, arXiv:2203.02155, eq. 1.
    """
    better = same & (scores[:, None] > scores)
    losses = -logsigmoid(rewards[:, None] - rewards).where(better, 0.0).sum(1)
    count = (same * better.sum(1)).sum(1).clamp(min=1)  # of pairs in the group
    return losses / count


# what each adds to its group's loss, from (B,) rewards, (B,) scores, (B, B) which share a group
RANKING_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "plackett_luce": plackett_luce,
    "all_pairs": all_pairs,
}


def ranking_loss(
    logps: Tensor,
    ref_logps: Tensor | None,
    scores: Tensor,
    groups: Tensor,
    *,
    beta: float = 0.1,
    loss_type: str = "plackett_luce",
) -> RankingLoss:
    """Loss of each group of ranked completions; memory (B, B).

    Args:
        logps: (B,) sequence log-probs, in nats; floating point, differentiable.
        ref_logps: (B,) the same under the reference; None means zeros.
        scores: (B,) numbers of which higher is better; equal ones in a group are ties.
        groups: (G+1,) int32 or int64: group g holds completions groups[g] to groups[g+1]. It rises
            from 0 to B, which is checked on the CPU only, as is NaN among the scores.
        beta: positive; rewards are beta * (logps - ref_logps).
        loss_type: a name of ``RANKING_LOSSES``.

    Returns:
        RankingLoss: losses in fp32 (fp64 for fp64 inputs). A group of ties alone: all_pairs gives
        0, plackett_luce what pulls its rewards together.

    Raises:
        ValueError: a shape, range or name differs from the above.
        TypeError: a dtype differs from the above.
    """
    if loss_type not in RANKING_LOSSES:
        raise ValueError(f"need loss_type in {', '.join(RANKING_LOSSES)}; got {loss_type!r}")
    named = {"logps": logps, "ref_logps": ref_logps, "scores": scores}
    for name, x in named.items():
        if x is not None and (x.ndim != 1 or x.shape != logps.shape):
            raise ValueError(f"need {name} (B,) = {tuple(logps.shape)}, got {tuple(x.shape)}")
        if x is not None and name != "scores" and not x.is_floating_point():
            raise TypeError(f"need floating-point {name}, got {x.dtype}")
    check_cu_seqlens(groups, len(logps), name="groups")
    if scores.device.type == "cpu" and not torch.compiler.is_compiling() and scores.isnan().any():
        raise ValueError(f"need scores without NaN, got {scores.tolist()}")
    if not 0 < beta < float("inf"):
        raise ValueError(f"need beta > 0, got {beta}")
    wide = torch.promote_types(logps.dtype, torch.float32)
    rewards = beta * (logps.to(wide) - (0.0 if ref_logps is None else ref_logps.to(wide)))
    at = torch.arange(len(logps), device=logps.device)
    group = torch.bucketize(at, groups, right=True) - 1
    same = group[:, None] == group
    parts = RANKING_LOSSES[loss_type](rewards, scores, same)
    member = torch.arange(len(groups) - 1, device=logps.device)[:, None] == group
    better = same & (scores[:, None] > scores)
    return RankingLoss(parts.where(member, 0.0).sum(1), rewards.detach(), better)
