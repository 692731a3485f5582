"""Clipped value loss: max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2) / 2 of each token.

Value, gradient and every statistic in one read of the inputs; of the mask in two, where a mean over
a sequence is asked for.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastpref.kernels.backend import choose
from fastpref.kernels.gather_rows import gather_rows, sum_rows
from fastpref.kernels.sequences import (
    BLOCK,
    SUMS,
    WORD,
    aggregation,
    aligned,
    as_flags,
    check_constants,
    check_reduction,
    check_tokens,
    clamp,
    dense,
    fold,
    kept,
    maximum,
    moments,
    new_partials,
    num_sequences,
    programs_for,
    reach,
    read,
    reduced,
    sequence_of,
    whole_words,
    words,
    write,
)

# what a pass sums over tokens; error is R - V
_SUM_NAMES = (
    *("loss", "tokens", "sequences", "clipfrac", "values", "returns", "returns_squared"),
    *("error", "error_squared"),
)


class _Inputs(NamedTuple):
    """What the op takes: tokens (B, T), or (T,) with cu_seqlens, in one dtype."""

    values: Tensor
    old_values: Tensor | None
    returns: Tensor
    mask: Tensor | None  # bool
    cu_seqlens: Tensor | None  # (B+1,)
    clip: float
    mean: bool  # over a sequence's tokens that count
    spans: bool  # a pass over each sequence
    gradient: bool

    def gradients(self) -> Tensor | None:
        """Where they go, if they are wanted."""
        return torch.empty_like(self.values) if self.gradient else None


# 1. reference
def value_loss_ref(
    values: Tensor, old_values: Tensor | None, returns: Tensor, clip: float
) -> Tensor:
    """Of each token, differentiable in values."""
    plain = (values - returns) ** 2
    if old_values is None:
        return plain / 2
    near = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum(plain, (near - returns) ** 2) / 2


# 2. in torch
_Found = tuple[Tensor, Tensor, Tensor]  # loss, sums, dvalues


def _found(x: _Inputs, loss: Tensor, sums: Tensor, dvalues: Tensor | None) -> _Found:
    """What the op returns; a gradient that nobody wants is empty."""
    dvalues = x.values.new_empty(0) if dvalues is None else dvalues
    return loss.to(x.values.dtype, copy=True), sums, dvalues


def _in_torch(x: _Inputs) -> _Found:
    keep = torch.ones_like(x.values, dtype=torch.bool) if x.mask is None else x.mask
    V, R = x.values.where(keep, 0.0), x.returns.where(keep, 0.0)
    near, binds = V, torch.zeros_like(keep)
    if x.old_values is not None:
        old = x.old_values.where(keep, 0.0)
        near = old + (V - old).clamp(-x.clip, x.clip)
        # else rounding decides: near is V, by another way
        binds = ((V - old).abs() > x.clip) & ((near - R) ** 2 > (V - R) ** 2)
    place, B = sequence_of(V, x.cu_seqlens), num_sequences(V, x.cu_seqlens)
    count = sum_rows(keep.flatten().to(V.dtype), place, B + 1)
    each = keep.to(V.dtype)
    if x.mean:
        each = each / gather_rows(count.clamp(min=1), place).view_as(V)
    loss = each * torch.maximum((near - R) ** 2, (V - R) ** 2) / 2
    squares = (x.double() ** 2 for x in (R, R - V))
    parts = (loss, keep, count > 0, binds & keep, V, R, next(squares), R - V, next(squares))
    out = V.new_zeros(SUMS, dtype=torch.float64)
    out[: len(parts)] = torch.stack([part.sum(dtype=torch.float64) for part in parts])
    dvalues = (each * (V - R)).masked_fill(binds, 0.0) if x.gradient else None
    return _found(x, out[0], out, dvalues)


# 3. kernel
@triton.jit(do_not_specialize=["N", "width"])
def _value(
    values_ptr,
    old_ptr,
    returns_ptr,
    mask_ptr,
    cu_ptr,
    dvalues_ptr,
    partial_ptr,
    N,
    width,
    clip,
    MEAN: tl.constexpr,
    SPANS: tl.constexpr,
    WHOLE: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One program a sequence (SPANS), or each some blocks of all tokens."""
    WORDS: tl.constexpr = BLOCK_T // WORD
    lanes = tl.arange(0, WORDS)[:, None] * WORD + tl.arange(0, WORD)[None, :]
    start, end, first, step = reach(cu_ptr, width, N, SPANS, BLOCK_T)
    none = tl.zeros((WORDS,), tl.float32)
    tokens = none
    per_token = tl.full((), 1.0, tl.float32)
    if MEAN:
        for e in range(first, end, step):
            t = e + lanes
            keep = kept(mask_ptr, t, start, end, words(t, start, end))
            tokens += tl.sum(tl.where(keep, 1.0, 0.0), 1)
        per_token = 1 / tl.maximum(tl.sum(tokens, 0), 1.0)
        tokens = none
    losses = none
    clipped = none
    value_sum = none
    target_anchor = none
    target_away = none
    target_squares = none
    error_anchor = none
    error_away = none
    error_squares = none
    for e in range(first, end, step):
        t = e + lanes
        there = words(t, start, end)
        keep = kept(mask_ptr, t, start, end, there)
        value = read(values_ptr, t, there, keep)
        target = read(returns_ptr, t, there, keep)
        error = target - value
        miss = error
        binds = keep & False
        if old_ptr is not None:
            old = read(old_ptr, t, there, keep)
            miss = target - (old + clamp(value - old, -clip, clip))
            # else rounding decides: one is the other, by another way
            binds = (tl.abs(value - old) > clip) & (miss * miss > error * error)
        losses += tl.sum(0.5 * maximum(miss * miss, error * error), 1)
        if dvalues_ptr is not None:
            grad = tl.where(binds, 0.0, -per_token * error)
            write(dvalues_ptr, t, grad, start, end, WHOLE)
        here = tl.sum(tl.where(keep, 1.0, 0.0), 1)
        first_mean = 1 / tl.maximum(here, 1.0)
        target_anchor = tl.where(tokens == 0, tl.sum(target, 1) * first_mean, target_anchor)
        error_anchor = tl.where(tokens == 0, tl.sum(error, 1) * first_mean, error_anchor)
        target = tl.where(keep, target - target_anchor[:, None], 0.0)
        error = tl.where(keep, error - error_anchor[:, None], 0.0)
        tokens += here
        clipped += tl.sum(tl.where(binds, 1.0, 0.0), 1)
        value_sum += tl.sum(value, 1)
        target_away += tl.sum(target, 1)
        target_squares += tl.sum(target * target, 1)
        error_away += tl.sum(error, 1)
        error_squares += tl.sum(error * error, 1)
    out = partial_ptr + tl.program_id(0).to(tl.int64) * SUMS
    count = tl.sum(tokens, 0)
    tl.store(out, per_token * tl.sum(losses, 0))
    tl.store(out + 1, count)
    tl.store(out + 2, tl.where(count > 0, 1.0, 0.0))
    tl.store(out + 3, tl.sum(clipped, 0))
    tl.store(out + 4, tl.sum(value_sum, 0))
    total, squares = moments(tokens, target_anchor, target_away, target_squares)
    tl.store(out + 5, total)
    tl.store(out + 6, squares)
    total, squares = moments(tokens, error_anchor, error_away, error_squares)
    tl.store(out + 7, total)
    tl.store(out + 8, squares)
    rest = tl.arange(0, SUMS)
    tl.store(out + rest, 0.0, mask=rest > 8)


def _in_triton(x: _Inputs) -> _Found:
    programs = programs_for(x.values, x.cu_seqlens, x.spans)
    partials, dvalues = new_partials(x.values, programs), x.gradients()
    if programs:
        _value[(programs,)](
            *map(aligned, x[:5]),
            dvalues,
            partials,
            x.values.numel(),
            x.values.shape[-1],
            x.clip,
            MEAN=x.mean,
            SPANS=x.spans,
            WHOLE=whole_words(x.values, x.cu_seqlens, x.spans),
            SUMS=SUMS,
            BLOCK_T=BLOCK,
            num_warps=4,
        )
    return _found(x, *fold(partials), dvalues)


# 4. ops
@torch.library.custom_op("fastpref::ppo_value", mutates_args=())
def _op(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    clip: float,
    mean: bool,
    spans: bool,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens = (values, old_values, returns, mask, cu_seqlens)
    x = _Inputs(*tokens, clip, mean, spans, gradient)
    backend = choose(values.device.type, values.dtype, "ppo")
    if backend != "cpp":
        return _in_triton(x) if backend == "triton" else _in_torch(x)
    sums, dvalues = values.new_zeros(SUMS, dtype=torch.float64), x.gradients()
    torch.ops.fastpref_ppo.value(*x[:-1], dvalues, sums)
    return _found(x, sums[0], sums, dvalues)


@_op.register_fake
def _(values, *args):  # type: ignore[no-untyped-def]
    dvalues = torch.empty_like(values) if args[-1] else values.new_empty(0)
    sums = values.new_empty(SUMS, dtype=torch.float64)
    return values.new_empty(()), sums, dvalues


# 5. autograd
def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(output[2])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


@once_differentiable
def _backward(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    (dvalues,) = ctx.saved_tensors
    return None if dloss is None else dloss * dvalues, *[None] * 8


_op.register_autograd(_backward, setup_context=_setup)


# 6. public
class ValueLoss(NamedTuple):
    """What :func:`ppo_value_loss` returns; each 0-d."""

    loss: Tensor
    """fp32 (fp64 if an input is), differentiable in values: a sum, with reduction="mean" over
    count."""
    count: Tensor
    """What the sum is to be divided by, once, over all micro-batches and ranks."""
    metrics: dict[str, Tensor]
    """fp64 sums over tokens, with reduction="mean" means: ``clipfrac`` (where the bound binds),
    ``values``, ``returns``, ``returns_squared``, ``error`` R - V and ``error_squared``. Beside them
    the number of ``tokens``, and with the means ``explained_variance``, which of several calls is
    :func:`explained_variance` of their sums together."""


def explained_variance(sums: dict[str, Tensor]) -> Tensor:
    """1 - var(R - V) / var(R), 0-d fp64; 0 where the returns do not vary.

    Args:
        sums: the metrics of :func:`ppo_value_loss` with reduction="sum", or of several calls and
            ranks their sum by name.

    Raises:
        ValueError: they are means.
    """
    if "explained_variance" in sums:
        raise ValueError('need sums (reduction="sum"), got the means of a call')
    n = sums["tokens"].double().clamp(min=1)

    def variance(name: str) -> Tensor:
        return (sums[f"{name}_squared"].double() / n - (sums[name].double() / n) ** 2).clamp(min=0)

    of_returns = variance("returns")
    varies = of_returns > 1e-12 * sums["returns_squared"].double() / n
    return torch.where(varies, 1 - variance("error") / of_returns, 0.0)


def ppo_value_loss(
    *,
    values: Tensor,
    returns: Tensor,
    old_values: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    clip: float | None = 0.2,
    loss_agg_mode: str = "token-mean",
    max_length: float | None = None,
    reduction: str = "sum",
) -> ValueLoss:
    """Clipped value loss of tokens, its gradient and every statistic of them, in one pass.

    Args:
        values: (B, T), or (T,) with ``cu_seqlens``: the value before each token; floating point,
            differentiable.
        returns: like values, what they should be.
        old_values: like values, at the start of the epochs.
        mask: like values, bool or integers 0 and 1: the tokens that count; others may hold
            anything.
        cu_seqlens: (B+1,) int32 or int64 offsets of packed sequences, rising from 0 to T, which is
            checked on the CPU only.
        clip: positive: how far values may move from old_values; None, without old_values: not
            clipped.
        loss_agg_mode: as in :func:`fastpref.ppo_policy_loss`, like max_length and reduction.
        max_length: of seq-mean-token-sum-norm; None: T of (B, T).
        reduction: "sum", or "mean" to divide by this call's own count.

    Returns:
        ValueLoss(loss, count, metrics). Without a token that counts loss and metrics are 0.

    Raises:
        ValueError: a shape, device, range or name differs from the above, or a constant needs a
            gradient.
        TypeError: a dtype differs from the above.

    Source: Ouyang et al. 2022, arXiv:2203.02155; the clip Schulman's baselines, as TRL has it.
    """
    tokens = {"values": values, "returns": returns, "old_values": old_values}
    dtype = check_tokens(tokens, {}, mask, cu_seqlens, needed=2)
    check_constants(returns=returns, old_values=old_values)
    if (clip is None) != (old_values is None):
        got = f"clip {clip} and old_values {'None' if old_values is None else 'given'}"
        raise ValueError(f"need old_values and clip, or clip=None and no old_values, got {got}")
    if clip is not None and not clip > 0:
        raise ValueError(f"need clip > 0, got {clip}")
    check_reduction(reduction)
    how = aggregation(loss_agg_mode, max_length, values)
    rows = [None if x is None else x.to(dtype).contiguous() for x in tokens.values()]
    gradient = torch.is_grad_enabled() and values.requires_grad
    loss, found, _ = _op(
        *(rows[0], rows[2], rows[1], as_flags(mask), dense(cu_seqlens), clip or 0.0),
        *(how.mean, how.by_sequence, gradient),
    )
    _, *columns = found.unbind()
    sums = dict(zip(_SUM_NAMES[1:], columns, strict=False))
    B = num_sequences(values, cu_seqlens)
    loss, count, metrics = reduced(loss, sums, how, B, reduction)
    if reduction == "mean":
        metrics["explained_variance"] = explained_variance(sums)
    return ValueLoss(loss, count, metrics)
