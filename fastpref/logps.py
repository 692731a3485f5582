"""Sequence log-probabilities: sums of token log-probs over rows of a batch or packed segments."""

from typing import Any

import torch
from torch import Tensor

from fastpref.kernels.gather_rows import sum_rows
from fastpref.kernels.linear_logp import linear_logp
from fastpref.kernels.logits import IGNORE_INDEX
from fastpref.kernels.sequences import check_cu_seqlens, segments


def sequence_logp(
    logp: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    mean: bool = False,
) -> Tensor:
    """Log-probability of each sequence, in nats: the sum of its tokens', or their mean.

    Args:
        logp: (B, T), or (M,) with ``cu_seqlens``; floating point, differentiable.
        mask: like logp, bool or integers 0 and 1: the tokens that count. Others may hold anything.
        cu_seqlens: (B+1,) int32 or int64: sequence b is ``logp[cu_seqlens[b]:cu_seqlens[b+1]]``.
            It rises from 0 to M, which is checked on the CPU only.
        mean: divide by the number of tokens that count.

    Returns:
        (B,) fp32 (fp64 for fp64 logp), the same in every run; 0 for a sequence without a token.

    Raises:
        ValueError: a shape differs from the above, or cu_seqlens does not rise from 0 to M (CPU).
        TypeError: a dtype differs from the above.
    """
    want = 2 if cu_seqlens is None else 1
    if logp.ndim != want or (mask is not None and mask.shape != logp.shape):
        shapes = f"{tuple(logp.shape)} and {None if mask is None else tuple(mask.shape)}"
        need = "logp (B, T)" if want == 2 else "logp (M,) with cu_seqlens"
        raise ValueError(f"need {need} and mask like it, got {shapes}")
    if not logp.is_floating_point():
        raise TypeError(f"need floating-point logp, got {logp.dtype}")
    if mask is not None and (mask.is_floating_point() or mask.is_complex()):
        raise TypeError(f"need a bool or integer mask, got {mask.dtype}")
    dtype = torch.promote_types(logp.dtype, torch.float32)
    kept = logp.double()  # long sums of small terms: rounded once, at the end
    count = torch.ones_like(kept)
    if mask is not None:
        kept, count = kept.where(mask.bool(), 0.0), mask.bool().double()
    if cu_seqlens is None:
        total, count = kept.sum(1), count.sum(1)
    else:
        check_cu_seqlens(cu_seqlens, len(logp))
        index, B = segments(cu_seqlens, len(logp)), len(cu_seqlens) - 1
        total, count = (sum_rows(x, index, B + 1)[:B] for x in (kept, count))
    return (total / count.clamp(min=1) if mean else total).to(dtype)


def tail_weights(cu_seqlens: Tensor, num_tokens: int, alpha: float) -> Tensor:
    """(M,) fp32: 1 for tokens up to the shorter completion of each pair, alpha past it.

    Args:
        cu_seqlens: (B+1,) int64 offsets of completions, those of a pair one after the other.
        num_tokens: M.
        alpha: what a token counts that only the longer completion has.

    Source: LD-DPO, arXiv:2409.06411.
    """
    lengths = cu_seqlens.diff()
    shorter = lengths.view(-1, 2).amin(1).repeat_interleave(2)
    index = segments(cu_seqlens, num_tokens)
    place = torch.arange(num_tokens, device=cu_seqlens.device) - cu_seqlens[index]
    return torch.where(place < shorter[index], 1.0, alpha)


def _shift(labels: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Labels moved to the position that predicts them; the last of each sequence predicts none."""
    target = torch.full_like(labels, IGNORE_INDEX)
    if cu_seqlens is None:
        target[..., :-1] = labels[..., 1:]
        return target
    index = segments(cu_seqlens, len(labels))
    target[:-1] = torch.where(index[1:] == index[:-1], labels[1:], IGNORE_INDEX)
    return target


def linear_sequence_logp(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    shift: bool = True,
    mean: bool = False,
    cu_seqlens: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Log-probability of each labelled sequence, in nats, straight from hidden states.

    Args:
        hidden: (B, T, H), or (M, H) with ``cu_seqlens``; bf16, fp16, fp32 or fp64; differentiable.
        weight: (V, H), hidden's dtype; differentiable.
        labels: (B, T), or (M,) with ``cu_seqlens``; int64 in [0, V), or -100 where not scored.
        shift: position t is scored by the hidden state of t-1 in its sequence, as a trainer holds
            them; False where labels are already moved.
        mean: divide by the number of scored tokens.
        cu_seqlens: (B+1,) int32 or int64 offsets of packed sequences.
        **options: bias, temperature, logit_scale, softcap and workspace of
            :func:`fastpref.linear_logp`.

    Returns:
        (B,) fp32 (fp64 for fp64 inputs); 0 for a sequence without a scored token.

    Raises:
        ValueError: a shape or option differs from the above.
        TypeError: a dtype differs from the above, or an option is unknown.
    """
    want = 2 if cu_seqlens is None else 1
    if labels.ndim != want or hidden.shape[:-1] != labels.shape or "rows" in options:
        got = f"{tuple(hidden.shape)} and {tuple(labels.shape)}, options {sorted(options)}"
        need = "(B, T, H) and labels (B, T)" if want == 2 else "(M, H) and labels (M,)"
        raise ValueError(f"need hidden {need} without rows, got {got}")
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, len(labels))
    target = _shift(labels, cu_seqlens) if shift else labels
    logp = linear_logp(hidden, weight, target, **options)
    return sequence_logp(logp, mask=target != IGNORE_INDEX, cu_seqlens=cu_seqlens, mean=mean)
