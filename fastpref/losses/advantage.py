"""What a policy gradient weighs tokens by, before any critic: advantages of completions in their
group, log-ratios as rewards of tokens, and the coefficient of the KL penalty.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastpref.kernels.gather_rows import sum_rows
from fastpref.kernels.sequences import check_cu_seqlens, segments

_MOST_KL_ERROR = 0.2


def grpo(gaps: Tensor, std: Tensor, others: Tensor) -> Tensor:
    """(r - mean) / (std + 1e-4). Source: Shao et al. 2024, arXiv:2402.03300, section 4.1.2."""
    return gaps / (std + 1e-4)


def dr_grpo(gaps: Tensor, std: Tensor, others: Tensor) -> Tensor:
    """r - mean. Source: Liu et al. 2025, arXiv:2503.20783."""
    return gaps


def rloo(gaps: Tensor, std: Tensor, others: Tensor) -> Tensor:
    """r - mean of the others. Source: Ahmadian et al. 2024, arXiv:2402.14740."""
    return gaps * (1 + 1 / others)


# from (B,) fp64 each: score less the group's mean, the group's standard deviation (of n - 1), and
# how many others the group has, at least 1
ADVANTAGES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
}


def group_advantages(scores: Tensor, groups: Tensor, *, estimator: str = "grpo") -> Tensor:
    """How much better each completion is than the others of its group.

    Args:
        scores: (B,) rewards of completions, of any dtype; finite, which is checked on the CPU only.
        groups: (G+1,) int32 or int64: group g holds completions groups[g] to groups[g+1]. It rises
            from 0 to B, which is checked on the CPU only.
        estimator: a name of ``ADVANTAGES``, where each says its formula.

    Returns:
        (B,) fp32 (fp64 for fp64 scores), detached, the same in every run; exactly 0 in a group of
        equal scores. A group of one has no baseline: its advantage is 0 under every estimator
        (verl gives the score itself).

    Raises:
        ValueError: a shape, range or name differs from the above.
        TypeError: a dtype differs from the above.
    """
    if estimator not in ADVANTAGES:
        raise ValueError(f"need estimator in {', '.join(ADVANTAGES)}; got {estimator!r}")
    if scores.ndim != 1:
        raise ValueError(f"need scores (B,), got {tuple(scores.shape)}")
    if not scores.is_floating_point():
        scores = scores.float()  # of answers that are right or wrong
    check_cu_seqlens(groups, len(scores), name="groups")
    on_cpu = scores.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and not scores.isfinite().all():
        raise ValueError(f"need finite scores, got {scores.tolist()}")
    wide, starts = scores.detach().double(), groups.long()
    index = segments(groups, len(scores))

    def group_sum(x: Tensor) -> Tensor:
        return sum_rows(x, index, len(groups))[index]

    from_first = wide - wide[starts[index]]  # else equal scores may differ from their mean
    count = group_sum(torch.ones_like(wide))
    gaps = from_first - group_sum(from_first) / count
    others = (count - 1).clamp(min=1)
    std = (group_sum(gaps.square()) / others).sqrt()
    advantages = ADVANTAGES[estimator](gaps, std, others)
    return advantages.to(torch.promote_types(scores.dtype, torch.float32))


def token_rewards(
    logp: Tensor, ref_logp: Tensor, *, beta: float, clip: float | None = None
) -> Tensor:
    """beta * (logp - ref_logp): what a model trained with DPO says that each token is worth.

    They sum to the sequence's implicit reward and are meant as rewards of tokens for PPO; RTO clips
    them, with beta 0.05 and clip 0.05.

    Args:
        logp: any shape, log-probs of tokens under the trained model, in nats; floating point.
        ref_logp: the same under its reference.
        beta: positive.
        clip: positive, bounds a reward to [-clip, clip]; None: no bound.

    Returns:
        logp's shape, fp32 (fp64 for fp64 logp), detached.

    Raises:
        ValueError: a shape or range differs from the above.
        TypeError: a dtype differs from the above.

    Source: Rafailov et al. 2024, arXiv:2404.12358; clipped, Zhong et al. 2024, arXiv:2404.18922.
    """
    if logp.shape != ref_logp.shape:
        raise ValueError(f"need ref_logp {tuple(logp.shape)}, got {tuple(ref_logp.shape)}")
    for name, x in {"logp": logp, "ref_logp": ref_logp}.items():
        if not x.is_floating_point():
            raise TypeError(f"need floating-point {name}, got {x.dtype}")
    if not 0 < beta < math.inf or not (clip is None or clip > 0):
        raise ValueError(f"need beta > 0 and clip > 0 or None, got {beta} and {clip}")
    wide = torch.promote_types(logp.dtype, torch.float32)
    rewards = beta * (logp.detach().to(wide) - ref_logp.detach().to(wide))
    return rewards if clip is None else rewards.clamp(-clip, clip)


def adaptive_kl_coef(
    coef: float, kl: float, *, target: float = 6.0, num_samples: int, horizon: float = 10_000
) -> float:
    """The next coefficient of the KL penalty: coef * (1 + clip(kl / target - 1, +-0.2) * n / h).

    Args:
        coef: the present one.
        kl: the policy's sequence KL to its reference, in nats; not NaN.
        target: the KL to hold, in nats; positive.
        num_samples: n, completions since the last update, in [0, 5 h): beyond, the coefficient
            could fall to 0 or below.
        horizon: h, completions; positive. n / h is the paper's K.

    Raises:
        ValueError: a range differs from the above.

    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2.
    """
    if not 0 < target < math.inf or not 0 < horizon < math.inf:
        raise ValueError(f"need target > 0 and horizon > 0, got {target} and {horizon}")
    if not 0 <= num_samples * _MOST_KL_ERROR < horizon:
        raise ValueError(f"need num_samples in [0, 5 * {horizon}), got {num_samples}")
    if math.isnan(coef) or math.isnan(kl):
        raise ValueError(f"need numbers for coef and kl, got {coef} and {kl}")
    error = min(max(kl / target - 1, -_MOST_KL_ERROR), _MOST_KL_ERROR)
    return coef * (1 + error * num_samples / horizon)
