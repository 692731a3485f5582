"""Whitening by moments of the whole batch: (A - mean) / sqrt(variance + eps), tokens that count."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpref.kernels.backend import choose
from fastpref.kernels.sequences import (
    aligned,
    as_flags,
    check_number,
    check_tokens,
    constants,
    kept,
    read,
    whole_words,
    words,
    write,
)

_BLOCK = 4096  # tokens of a program


# 1. kernel
@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["moments_ptr"])
def _whiten(
    x_ptr,
    mask_ptr,
    moments_ptr,
    out_ptr,
    N,
    eps,
    BESSEL,
    WHOLE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.load(moments_ptr)
    mean = tl.load(moments_ptr + 1) / tl.maximum(n, 1.0)
    around = tl.maximum(tl.load(moments_ptr + 2) - n * mean * mean, 0.0)
    variance = (around / tl.maximum(n - BESSEL, 1.0)).to(tl.float32)
    scale = 1 / tl.sqrt(variance + eps)
    there = words(t, 0, N)
    keep = kept(mask_ptr, t, 0, N, there)
    x = read(x_ptr, t, there, keep)
    out = tl.where(keep, (x - mean.to(tl.float32)) * scale, 0.0)
    write(out_ptr, t, out, 0, N, WHOLE)


def _in_torch(
    x: Tensor, mask: Tensor | None, moments: Tensor, unbiased: bool, eps: float
) -> Tensor:
    n, total, squares = moments
    mean = total / n.clamp(min=1)
    variance = (squares - n * mean**2).clamp(min=0) / (n - float(unbiased)).clamp(min=1)
    out = ((x - mean) / (variance + eps).sqrt()).to(x.dtype)
    return out if mask is None else out.where(mask, 0.0)


def _in_triton(
    x: Tensor, mask: Tensor | None, moments: Tensor, unbiased: bool, eps: float
) -> Tensor:
    out = torch.empty_like(x)
    if x.numel():
        grid = (triton.cdiv(x.numel(), _BLOCK),)
        args = (aligned(x), aligned(mask), moments, out, x.numel(), eps, float(unbiased))
        whole = whole_words(x, None, False)
        _whiten[grid](*args, WHOLE=whole, BLOCK_T=_BLOCK, num_warps=8)
    return out


# 2. op
@torch.library.custom_op("fastpref::whiten", mutates_args=())
def _op(x: Tensor, mask: Tensor | None, moments: Tensor, unbiased: bool, eps: float) -> Tensor:
    backend = choose(x.device.type, x.dtype, "ppo")
    if backend != "cpp":
        whitened = _in_triton if backend == "triton" else _in_torch
        return whitened(x, mask, moments, unbiased, eps)
    out = torch.empty_like(x)
    torch.ops.fastpref_ppo.whiten(x, mask, moments, unbiased, eps, out)
    return out


@_op.register_fake
def _(x, *args):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


# 3. public
def _check_flat(name: str, x: Tensor, mask: Tensor | None) -> torch.dtype:
    """As check_tokens, of any shape."""
    if isinstance(x, Tensor) and isinstance(mask, Tensor):
        if mask.shape != x.shape:
            raise ValueError(f"need mask like {name}, {tuple(x.shape)}, got {tuple(mask.shape)}")
        mask = mask.reshape(1, -1)
    flat = x.reshape(1, -1) if isinstance(x, Tensor) else x
    return check_tokens({name: flat}, {}, mask, None)


def token_moments(x: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """(3,) fp64 count, sum and sum of squares of the tokens that count, for :func:`whiten`.

    Args:
        x: any shape; floating point.
        mask: like x, bool or integers 0 and 1; None: all count.

    Raises:
        ValueError: a shape or device differs from the above.
        TypeError: a dtype differs from the above.
    """
    _check_flat("x", x, mask)
    x = x.detach().double()
    keep = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.bool()
    x = x.where(keep, 0.0)
    return torch.stack([keep.sum().double(), x.sum(), (x**2).sum()])


def whiten(
    advantages: Tensor,
    moments: Tensor,
    *,
    mask: Tensor | None = None,
    unbiased: bool = False,
    eps: float = 1e-8,
) -> Tensor:
    """(A - mean) / sqrt(variance + eps), by moments of the whole batch; no gradient flows through.

    Args:
        advantages: any shape; floating point.
        moments: (3,) fp64 count, sum and sum of squares, as :func:`ppo_advantages` or
            :func:`token_moments` give them; over several ranks their sum
            (``torch.distributed.all_reduce(moments)``).
        mask: like advantages, bool or integers 0 and 1: the tokens that count.
        unbiased: Bessel's variance, as TRL and verl have it, over n - 1; else over n, as OpenRLHF.
        eps: positive.

    Returns:
        Like advantages, fp32 (fp64 for fp64); exactly 0 where masked, and where a single token
        counts.

    Raises:
        ValueError: a shape, device or range differs from the above.
        TypeError: a dtype differs from the above.
    """
    dtype = _check_flat("advantages", advantages, mask)
    if not isinstance(moments, Tensor):
        raise TypeError(f"need a tensor for moments, got {type(moments).__name__}")
    if moments.shape != (3,) or moments.dtype != torch.float64:
        raise ValueError(f"need moments (3,) fp64, got {tuple(moments.shape)} {moments.dtype}")
    if moments.device != advantages.device:
        raise ValueError(f"need moments on {advantages.device}, got {moments.device}")
    check_number(eps=eps)
    if not eps:
        raise ValueError("need eps > 0, got 0")
    (x,) = constants(dtype, advantages)
    return _op(x, as_flags(mask), moments.detach().contiguous(), unbiased, eps)
