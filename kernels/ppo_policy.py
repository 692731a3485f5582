"""Policy losses of tokens: value, gradients and every statistic in one read of the inputs, in two
where the ratio or the mean of a sequence weighs its tokens.

rho = exp(logp - old_logp), of a token or exp of its mean over a sequence; A the advantage. Forms:
clip max(-rho A, -clip(rho) A), at most -c A where A < 0; cispo -sg(clip(rho)) A logp; apa
(logp - ref - A / tau)^2; awr -exp(A / tau) logp. A token adds w (u form + k KL - h entropy).
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastpref.kernels.backend import choose
from fastpref.kernels.gae import MAX_LOG_RATIO, kl_estimate
from fastpref.kernels.gather_rows import gather_rows, sum_rows
from fastpref.kernels.sequences import (
    BLOCK,
    SUMS,
    WORD,
    aligned,
    clamp,
    fold,
    kept,
    kl_of,
    maximum,
    new_partials,
    num_sequences,
    programs_for,
    reach,
    read,
    sequence_of,
    whole_words,
    words,
    write,
)

# what a pass sums over tokens, and last the largest ratio
SUM_NAMES = (
    *("loss", "tokens", "sequences", "ratio", "ratio_deviation"),
    *("clipfrac_low", "clipfrac_high", "clipfrac_dual", "ppo_kl", "approx_kl", "kl", "entropy"),
)


class _Inputs(NamedTuple):
    """What the op takes: tokens (B, T), or (T,) with cu_seqlens, in one dtype."""

    logp: Tensor
    advantages: Tensor  # or (B,)
    old_logp: Tensor | None
    mask: Tensor | None  # bool
    cu_seqlens: Tensor | None  # (B+1,)
    ref_logp: Tensor | None
    entropy: Tensor | None
    is_weight: Tensor | None
    form: str
    by_sequence: bool  # the ratio
    clip_low: float
    clip_high: float
    dual_clip: float  # inf: none
    temperature: float
    kl_coef: float
    entropy_coef: float
    estimator: str
    mean: bool  # over a sequence's tokens that count
    spans: bool  # a pass over each sequence
    dlogp: bool  # whether gradients are wanted
    dentropy: bool

    def gradients(self) -> list[Tensor | None]:
        """Where those that are wanted go."""
        return [torch.empty_like(self.logp) if wanted else None for wanted in self[-2:]]

    @property
    def each(self) -> bool:
        """Whether an advantage is of a sequence."""
        return self.advantages.shape != self.logp.shape


# 1. reference
def surrogate_ref(
    form: str,
    logp: Tensor,
    ref_logp: Tensor,
    log_ratio: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    temperature: float,
) -> Tensor:
    """The form's loss of each token, differentiable in logp and log_ratio."""
    if form == "apa":
        return (logp - ref_logp - advantages / temperature) ** 2
    if form == "awr":
        weight = (advantages / temperature).clamp(max=MAX_LOG_RATIO).exp()
        return -weight.detach() * logp
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    if form == "cispo":
        return -bounded.detach() * advantages * logp
    loss = torch.maximum(-advantages * ratio, -advantages * bounded)
    most = torch.where(advantages < 0, -dual_clip * advantages, float("inf"))
    return torch.minimum(loss, most)


def kl_loss_ref(d: Tensor, estimator: str) -> Tensor:
    """The KL of a token as a loss; "k3+" is k3's value with k2's gradient."""
    if estimator == "k3+":
        value, slope = kl_estimate(d, "k3"), kl_estimate(d, "k2")
        return value.detach() + slope - slope.detach()
    return kl_estimate(d, estimator)


# 2. in torch
_Found = tuple[Tensor, Tensor, Tensor, Tensor]  # loss, sums, dlogp, dentropy


def _found(x: _Inputs, loss: Tensor, sums: Tensor, *grads: Tensor | None) -> _Found:
    """What the op returns; a gradient that nobody wants is empty."""
    dlogp, dentropy = (x.logp.new_empty(0) if grad is None else grad for grad in grads)
    return loss.to(x.logp.dtype, copy=True), sums, dlogp, dentropy


def _clipped(ratio: Tensor, A: Tensor, x: _Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss over logp's part in it, its slope in log rho, and where each bound binds."""
    below, above = ratio < 1 - x.clip_low, ratio > 1 + x.clip_high
    bounded = ratio.clamp(1 - x.clip_low, 1 + x.clip_high)
    if x.form == "cispo":
        return -bounded * A, torch.zeros_like(A), below, above, torch.zeros_like(below)
    below, above = below & (A < 0), above & (A > 0)
    past = (ratio > x.dual_clip) & (A < 0)
    loss = torch.where(past, -x.dual_clip * A, torch.where(below | above, -bounded * A, -ratio * A))
    return loss, (-ratio * A).masked_fill(below | above | past, 0.0), below, above, past


def _in_torch(x: _Inputs) -> _Found:
    flat, B = x.logp.reshape(-1), num_sequences(x.logp, x.cu_seqlens)
    keep = torch.ones_like(flat, dtype=torch.bool) if x.mask is None else x.mask.reshape(-1)
    place = sequence_of(x.logp, x.cu_seqlens)

    def tokens(y: Tensor | None, default: float = 0.0) -> Tensor:
        if y is None:
            return torch.full_like(flat, default)
        return (y.reshape(-1) if y.shape == x.logp.shape else y[place]).where(keep, default)

    def over(y: Tensor) -> Tensor:
        """The sum over a token's sequence."""
        return gather_rows(sum_rows(y, place, B + 1), place)

    logp, A, d = tokens(x.logp), tokens(x.advantages), tokens(x.logp) - tokens(x.ref_logp)
    log_ratio = torch.zeros_like(logp) if x.old_logp is None else logp - tokens(x.old_logp)
    count = over(keep.to(flat.dtype)).clamp(min=1)
    used_log_ratio = over(log_ratio) / count if x.by_sequence else log_ratio
    outside = used_log_ratio.abs() > MAX_LOG_RATIO
    ratio = used_log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    none = torch.zeros_like(keep)
    bounds = (none, none, none)
    if x.form == "apa":
        error = d - A / x.temperature
        loss, slope = error**2, 2 * error
    elif x.form == "awr":
        slope = -(A / x.temperature).clamp(max=MAX_LOG_RATIO).exp()
        loss = slope * logp
    else:
        loss, slope, *bounds = _clipped(ratio, A, x)
        slope = slope.masked_fill(outside, 0.0)
        if x.form == "cispo":
            loss, slope = loss * logp, loss
    importance, kl = tokens(x.is_weight, 1.0), torch.zeros_like(logp)
    loss, slope = importance * loss, importance * slope
    if x.ref_logp is not None:
        kl = kl_estimate(d, x.estimator.removesuffix("+"))
        bent = {"k1": torch.ones_like(d), "k2": d, "k3+": d}.get(x.estimator)
        if bent is None:
            bent = (-(-d).expm1()).masked_fill(d.abs() > MAX_LOG_RATIO, 0.0)
        if x.kl_coef:  # else a metric, which may be infinite
            loss, slope = loss + x.kl_coef * kl, slope + x.kl_coef * bent
    each = (1 / count if x.mean else torch.ones_like(logp)).where(keep, 0.0)
    H, clamped = tokens(x.entropy), log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    full = sum_rows(keep.to(flat.dtype), place, B + 1) > 0
    counted = (ratio, (ratio - 1).abs(), *bounds, -clamped, clamped**2 / 2, kl, H)
    parts = [
        each * (loss - x.entropy_coef * H if x.entropy_coef else loss),
        keep,
        full,
        *(y.where(keep, 0) for y in counted),
    ]
    out = logp.new_zeros(SUMS, dtype=torch.float64)
    out[: len(parts)] = torch.stack([part.sum(dtype=torch.float64) for part in parts])
    out[-1] = torch.cat([ratio.where(keep, 0.0), ratio.new_zeros(1)]).max()
    dlogp, dentropy = x.gradients()
    if dlogp is not None:
        dlogp.copy_((each * slope).where(keep, 0.0).view_as(dlogp))
    if dentropy is not None:
        dentropy.copy_((-x.entropy_coef * each).view_as(dentropy))
    return _found(x, out[0], out, dlogp, dentropy)


# 3. kernels
@triton.jit
def _surrogate(
    logp, d, ratio, outside, advantage, low, high, dual, per_temperature, FORM: tl.constexpr
):
    """Loss, its slope in logp, and which bounds bind."""
    below = ratio < 1 - low
    above = ratio > 1 + high
    past = (ratio > dual) & (advantage < 0)
    if FORM == "clip":
        below = below & (advantage < 0)
        above = above & (advantage > 0)
        bounded = clamp(ratio, 1 - low, 1 + high)
        bound = below | above
        loss = tl.where(past, -dual * advantage, -advantage * tl.where(bound, bounded, ratio))
        slope = tl.where(bound | past | outside, 0.0, -advantage * ratio)
    elif FORM == "cispo":
        past = past & False
        slope = -advantage * clamp(ratio, 1 - low, 1 + high)
        loss = slope * logp
    else:
        below = below & False
        above = below
        past = below
        if FORM == "apa":
            error = d - advantage * per_temperature
            loss = error * error
            slope = 2 * error
        else:
            slope = -tl.exp(clamp(advantage * per_temperature, float("-inf"), 20.0))
            loss = slope * logp
    return loss, slope, below, above, past


@triton.jit(do_not_specialize=["N", "width"])
def _policy(
    logp_ptr,
    advantages_ptr,
    old_ptr,
    mask_ptr,
    cu_ptr,
    ref_ptr,
    entropy_ptr,
    importance_ptr,
    dlogp_ptr,
    dentropy_ptr,
    partial_ptr,
    N,
    width,
    low,
    high,
    dual,
    per_temperature,
    kl_coef,
    entropy_coef,
    FORM: tl.constexpr,
    KL: tl.constexpr,
    SPANS: tl.constexpr,
    WHOLE: tl.constexpr,
    EACH: tl.constexpr,
    BY_SEQUENCE: tl.constexpr,
    MEAN: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One program a sequence (SPANS), or each some blocks of all tokens."""
    p = tl.program_id(0)
    WORDS: tl.constexpr = BLOCK_T // WORD
    lanes = tl.arange(0, WORDS)[:, None] * WORD + tl.arange(0, WORD)[None, :]
    start, end, first, step = reach(cu_ptr, width, N, SPANS, BLOCK_T)
    none = tl.zeros((WORDS,), tl.float32)
    tokens = none
    log_ratio_sum = none
    mean_log_ratio = tl.full((), 0.0, tl.float32)
    per_token = tl.full((), 1.0, tl.float32)
    if BY_SEQUENCE or MEAN:
        for e in range(first, end, step):
            t = e + lanes
            there = words(t, start, end)
            keep = kept(mask_ptr, t, start, end, there)
            tokens += tl.sum(tl.where(keep, 1.0, 0.0), 1)
            if BY_SEQUENCE and old_ptr is not None:
                log_ratio = read(logp_ptr, t, there, keep) - read(old_ptr, t, there, keep)
                log_ratio_sum += tl.sum(log_ratio, 1)
        count = tl.maximum(tl.sum(tokens, 0), 1.0)
        mean_log_ratio = tl.sum(log_ratio_sum, 0) / count
        if MEAN:
            per_token = 1 / count
        tokens = none
    loss_sum = none
    ratios = none
    deviations = none
    belows = none
    aboves = none
    pasts = none
    ppo_kl = none
    approx_kl = none
    kl_sum = none
    entropies = none
    largest = none
    for e in range(first, end, step):
        t = e + lanes
        there = words(t, start, end)
        keep = kept(mask_ptr, t, start, end, there)
        logp = read(logp_ptr, t, there, keep)
        zero = tl.zeros_like(logp)
        if EACH:
            advantage = zero + tl.load(advantages_ptr + p)
        else:
            advantage = read(advantages_ptr, t, there, keep)
        log_ratio = zero
        if old_ptr is not None:
            log_ratio = logp - read(old_ptr, t, there, keep)
        used_log_ratio = log_ratio
        if BY_SEQUENCE:
            used_log_ratio = zero + mean_log_ratio
        ratio = tl.exp(clamp(used_log_ratio, -20.0, 20.0))
        d = logp
        if ref_ptr is not None:
            d = logp - read(ref_ptr, t, there, keep)
        loss, slope, below, above, past = _surrogate(
            logp,
            d,
            ratio,
            tl.abs(used_log_ratio) > 20.0,
            advantage,
            low,
            high,
            dual,
            per_temperature,
            FORM,
        )
        if importance_ptr is not None:
            importance = read(importance_ptr, t, there, keep)
            loss *= importance
            slope *= importance
        if ref_ptr is not None:
            k, k_slope = kl_of(d, KL)
            # without a coefficient a metric, which may be infinite
            loss += tl.where(kl_coef == 0, 0.0, kl_coef * k)
            slope += tl.where(kl_coef == 0, 0.0, kl_coef * k_slope)
            kl_sum += tl.sum(tl.where(keep, k, 0.0), 1)
        if entropy_ptr is not None:
            entropy = read(entropy_ptr, t, there, keep)
            loss -= tl.where(entropy_coef == 0, 0.0, entropy_coef * entropy)
            entropies += tl.sum(entropy, 1)
        if dlogp_ptr is not None:
            grad = tl.where(keep, per_token * slope, 0.0)
            write(dlogp_ptr, t, grad, start, end, WHOLE)
        if dentropy_ptr is not None:
            grad = tl.where(keep, -entropy_coef * per_token, 0.0)
            write(dentropy_ptr, t, grad, start, end, WHOLE)
        clamped = clamp(log_ratio, -20.0, 20.0)
        tokens += tl.sum(tl.where(keep, 1.0, 0.0), 1)
        loss_sum += tl.sum(tl.where(keep, loss, 0.0), 1)
        ratios += tl.sum(tl.where(keep, ratio, 0.0), 1)
        deviations += tl.sum(tl.where(keep, tl.abs(ratio - 1), 0.0), 1)
        belows += tl.sum(tl.where(keep & below, 1.0, 0.0), 1)
        aboves += tl.sum(tl.where(keep & above, 1.0, 0.0), 1)
        pasts += tl.sum(tl.where(keep & past, 1.0, 0.0), 1)
        ppo_kl -= tl.sum(clamped, 1)
        approx_kl += tl.sum(0.5 * clamped * clamped, 1)
        largest = maximum(largest, tl.max(tl.where(keep, ratio, 0.0), 1))
    out = partial_ptr + p.to(tl.int64) * SUMS
    count = tl.sum(tokens, 0)
    tl.store(out, per_token * tl.sum(loss_sum, 0))
    tl.store(out + 1, count)
    tl.store(out + 2, tl.where(count > 0, 1.0, 0.0))
    ratio_sum = tl.sum(ratios, 0)
    tl.store(out + 3, ratio_sum)
    tl.store(out + 4, tl.sum(deviations, 0))
    tl.store(out + 5, tl.sum(belows, 0))
    tl.store(out + 6, tl.sum(aboves, 0))
    tl.store(out + 7, tl.sum(pasts, 0))
    tl.store(out + 8, tl.sum(ppo_kl, 0))
    tl.store(out + 9, tl.sum(approx_kl, 0))
    tl.store(out + 10, tl.sum(kl_sum, 0))
    tl.store(out + 11, tl.sum(entropies, 0))
    rest = tl.arange(0, SUMS)
    # a reduction's maximum leaves NaN out
    most = tl.where(ratio_sum == ratio_sum, tl.max(largest, 0), ratio_sum)
    tl.store(out + rest, most, mask=rest > 11)


def _in_triton(x: _Inputs) -> _Found:
    programs = programs_for(x.logp, x.cu_seqlens, x.spans)
    partials, grads = new_partials(x.logp, programs), x.gradients()
    if programs:
        _policy[(programs,)](
            *map(aligned, x[:8]),
            *grads,
            partials,
            x.logp.numel(),
            x.logp.shape[-1],
            x.clip_low,
            x.clip_high,
            x.dual_clip,
            1 / x.temperature,  # a division would be a call
            x.kl_coef,
            x.entropy_coef,
            FORM=x.form,
            KL=x.estimator,
            SPANS=x.spans,
            WHOLE=whole_words(x.logp, x.cu_seqlens, x.spans),
            EACH=x.each,
            BY_SEQUENCE=x.by_sequence,
            MEAN=x.mean,
            SUMS=SUMS,
            BLOCK_T=BLOCK,
            num_warps=4,
        )
    return _found(x, *fold(partials), *grads)


# 4. ops
@torch.library.custom_op("fastpref::ppo_policy", mutates_args=())
def policy_op(
    logp: Tensor,
    advantages: Tensor,
    old_logp: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    ref_logp: Tensor | None,
    entropy: Tensor | None,
    is_weight: Tensor | None,
    form: str,
    by_sequence: bool,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    temperature: float,
    kl_coef: float,
    entropy_coef: float,
    estimator: str,
    mean: bool,
    spans: bool,
    dlogp: bool,
    dentropy: bool,
) -> _Found:
    tokens = (logp, advantages, old_logp, mask, cu_seqlens, ref_logp, entropy, is_weight)
    bounds = (form, by_sequence, clip_low, clip_high, dual_clip, temperature)
    how = (kl_coef, entropy_coef, estimator, mean, spans, dlogp, dentropy)
    x = _Inputs(*tokens, *bounds, *how)
    backend = choose(logp.device.type, logp.dtype, "ppo")
    if backend != "cpp":
        return _in_triton(x) if backend == "triton" else _in_torch(x)
    sums, grads = logp.new_zeros(SUMS, dtype=torch.float64), x.gradients()
    torch.ops.fastpref_ppo.policy(*x[:-2], *grads, sums)
    return _found(x, sums[0], sums, *grads)


@policy_op.register_fake
def _(logp, *args):  # type: ignore[no-untyped-def]
    grads = (torch.empty_like(logp) if wanted else logp.new_empty(0) for wanted in args[-2:])
    sums = logp.new_empty(SUMS, dtype=torch.float64)
    return logp.new_empty(()), sums, *grads


# 5. autograd
def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*output[2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


@once_differentiable
def _backward(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    grads = [
        None if dloss is None or not wanted else dloss * d
        for d, wanted in zip(
            ctx.saved_tensors, (ctx.needs_input_grad[i] for i in (0, 6)), strict=True
        )
    ]
    return grads[0], *[None] * 5, grads[1], *[None] * 14


policy_op.register_autograd(_backward, setup_context=_setup)
