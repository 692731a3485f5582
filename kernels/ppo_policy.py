"""Policy losses of tokens: value, gradients and every statistic in one read of the inputs.

rho = exp(logp - old_logp), of a token or exp of its mean over a sequence; A the advantage. Forms:
clip max(-rho A, -clip(rho) A), at most -c A where A < 0; cispo -sg(clip(rho)) A logp; apa
(logp - ref - A / tau)^2; awr -exp(A / tau) logp. A token adds w (u form + k KL - h entropy).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpref.kernels.backend import choose
from fastpref.kernels.gae import MAX_LOG_RATIO, kl_estimate
from fastpref.kernels.gather_rows import gather_rows, sum_rows
from fastpref.kernels.sequences import (
    BLOCK,
    SUMS,
    WORD,
    fold,
    kept,
    kl_of,
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

FORMS = ("clip", "cispo", "apa", "awr")
# what a pass sums over tokens, and last the largest ratio
SUM_NAMES = (
    *("loss", "tokens", "sequences", "ratio", "ratio_deviation"),
    *("clipfrac_low", "clipfrac_high", "clipfrac_dual", "ppo_kl", "approx_kl", "kl", "entropy"),
)


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
def _clipped(
    ratio: Tensor, A: Tensor, low: float, high: float, dual: float, form: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss over logp's part in it, its slope in log rho, and where each bound binds."""
    below, above = ratio < 1 - low, ratio > 1 + high
    bounded = ratio.clamp(1 - low, 1 + high)
    if form == "cispo":
        return -bounded * A, torch.zeros_like(A), below, above, torch.zeros_like(below)
    below, above = below & (A < 0), above & (A > 0)
    past = (ratio > dual) & (A < 0)
    loss = torch.where(past, -dual * A, torch.where(below | above, -bounded * A, -ratio * A))
    return loss, (-ratio * A).masked_fill(below | above | past, 0.0), below, above, past


def _in_torch(
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
    numbers: list[float],
    estimator: str,
    mean: bool,
    spans: bool,
    wanted: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight, low, high, dual, temperature, kl_coef, entropy_coef = numbers
    flat, B = logp.reshape(-1), num_sequences(logp, cu_seqlens)
    keep = torch.ones_like(flat, dtype=torch.bool) if mask is None else mask.reshape(-1)
    place = sequence_of(logp, cu_seqlens)

    def tokens(x: Tensor | None, default: float = 0.0) -> Tensor:
        if x is None:
            return torch.full_like(flat, default)
        x = x.reshape(-1) if x.shape == logp.shape else gather_rows(x, place)
        return x.where(keep, default)

    def over(x: Tensor) -> Tensor:
        return sum_rows(x, place, B + 1)[:B]

    new, A, d = tokens(logp), tokens(advantages), tokens(logp) - tokens(ref_logp)
    apart = torch.zeros_like(new) if old_logp is None else new - tokens(old_logp)
    count = over(keep.to(flat.dtype))
    of_place = count.clamp(min=1)
    used = gather_rows(over(apart) / of_place, place) if by_sequence else apart
    inside = used.abs() <= MAX_LOG_RATIO
    ratio = used.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    none = torch.zeros_like(keep)
    bounds = (none, none, none)
    if form == "apa":
        error = d - A / temperature
        loss, slope = error**2, 2 * error
    elif form == "awr":
        slope = -(A / temperature).clamp(max=MAX_LOG_RATIO).exp()
        loss = slope * new
    else:
        loss, slope, *bounds = _clipped(ratio, A, low, high, dual, form)
        slope = slope.where(inside, 0.0)
        if form == "cispo":
            loss, slope = loss * new, loss
    each = torch.full_like(new, weight)
    each = (each / gather_rows(of_place, place) if mean else each).where(keep, 0.0)
    importance = tokens(is_weight, 1.0)
    kl = torch.zeros_like(new)
    loss, slope = importance * loss, importance * slope
    if ref_logp is not None:
        kl = kl_estimate(d, estimator.removesuffix("+"))
        bent = {"k1": torch.ones_like(d), "k2": d, "k3+": d}.get(estimator)
        if bent is None:
            bent = (-(-d).expm1()).where(d.abs() <= MAX_LOG_RATIO, 0.0)
        loss, slope = loss + kl_coef * kl, slope + kl_coef * bent
    H, near = tokens(entropy), apart.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    loss = each * (loss - entropy_coef * H)
    counted = (ratio, (ratio - 1).abs(), *bounds, -near, near**2 / 2, kl, H)
    parts = [loss, keep, count > 0, *(x.where(keep, 0) for x in counted)]
    out = logp.new_zeros(SUMS)
    out[: len(parts)] = torch.stack([x.sum(dtype=torch.float64) for x in parts])
    out[-1] = torch.cat([ratio.where(keep, 0.0), ratio.new_zeros(1)]).max()
    return (
        out[0].clone(),
        out,
        (each * slope).view_as(logp) if "dlogp" in wanted else logp.new_empty(0),
        (-entropy_coef * each).view_as(logp) if "dentropy" in wanted else logp.new_empty(0),
    )


# 3. kernels
@triton.jit
def _surrogate(
    logp, d, ratio, inside, advantage, low, high, dual, per_temperature, FORM: tl.constexpr
):
    """Loss, its slope in logp, and which bounds bind."""
    below = ratio < 1 - low
    above = ratio > 1 + high
    past = (ratio > dual) & (advantage < 0)
    if FORM == "clip":
        below = below & (advantage < 0)
        above = above & (advantage > 0)
        bounded = tl.minimum(tl.maximum(ratio, 1 - low), 1 + high)
        bound = below | above
        loss = tl.where(past, -dual * advantage, -advantage * tl.where(bound, bounded, ratio))
        slope = tl.where(bound | past | (inside == 0), 0.0, -advantage * ratio)
    elif FORM == "cispo":
        past = past & False
        slope = -advantage * tl.minimum(tl.maximum(ratio, 1 - low), 1 + high)
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
            slope = -tl.exp(tl.minimum(advantage * per_temperature, 20.0))
            loss = slope * logp
    return loss, slope, below, above, past


@triton.jit
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
    weight,
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
    apart_sum = none
    mean_log_ratio = tl.full((), 0.0, tl.float32)
    per_token = weight
    if BY_SEQUENCE or MEAN:
        for e in range(first, end, step):
            t = e + lanes
            there = words(t, start, end)
            keep = kept(mask_ptr, t, start, end, there)
            tokens += tl.sum(tl.where(keep, 1.0, 0.0), 1)
            if BY_SEQUENCE and old_ptr is not None:
                apart = read(logp_ptr, t, there, keep) - read(old_ptr, t, there, keep)
                apart_sum += tl.sum(apart, 1)
        count = tl.maximum(tl.sum(tokens, 0), 1.0)
        mean_log_ratio = tl.sum(apart_sum, 0) / count
        if MEAN:
            per_token = weight / count
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
        apart = zero
        if old_ptr is not None:
            apart = logp - read(old_ptr, t, there, keep)
        used = apart
        if BY_SEQUENCE:
            used = zero + mean_log_ratio
        bounded = tl.minimum(tl.maximum(used, -20.0), 20.0)
        ratio = tl.exp(bounded)
        d = logp
        if ref_ptr is not None:
            d = logp - read(ref_ptr, t, there, keep)
        loss, slope, below, above, past = _surrogate(
            logp, d, ratio, used == bounded, advantage, low, high, dual, per_temperature, FORM
        )
        if importance_ptr is not None:
            importance = read(importance_ptr, t, there, keep)
            loss *= importance
            slope *= importance
        if ref_ptr is not None:
            k, k_slope = kl_of(d, KL)
            loss += kl_coef * k
            slope += kl_coef * k_slope
            kl_sum += tl.sum(tl.where(keep, k, 0.0), 1)
        if entropy_ptr is not None:
            entropy = read(entropy_ptr, t, there, keep)
            loss -= entropy_coef * entropy
            entropies += tl.sum(entropy, 1)
        if dlogp_ptr is not None:
            grad = tl.where(keep, per_token * slope, 0.0)
            write(dlogp_ptr, t, grad, start, end, WHOLE)
        if dentropy_ptr is not None:
            grad = tl.where(keep, -entropy_coef * per_token, 0.0)
            write(dentropy_ptr, t, grad, start, end, WHOLE)
        near = tl.minimum(tl.maximum(apart, -20.0), 20.0)
        tokens += tl.sum(tl.where(keep, 1.0, 0.0), 1)
        loss_sum += tl.sum(tl.where(keep, loss, 0.0), 1)
        ratios += tl.sum(tl.where(keep, ratio, 0.0), 1)
        deviations += tl.sum(tl.where(keep, tl.abs(ratio - 1), 0.0), 1)
        belows += tl.sum(tl.where(keep & below, 1.0, 0.0), 1)
        aboves += tl.sum(tl.where(keep & above, 1.0, 0.0), 1)
        pasts += tl.sum(tl.where(keep & past, 1.0, 0.0), 1)
        ppo_kl -= tl.sum(near, 1)
        approx_kl += tl.sum(0.5 * near * near, 1)
        largest = tl.maximum(largest, tl.max(tl.where(keep, ratio, 0.0), 1))
    out = partial_ptr + p * SUMS
    count = tl.sum(tokens, 0)
    tl.store(out, per_token * tl.sum(loss_sum, 0))
    tl.store(out + 1, count)
    tl.store(out + 2, tl.where(count > 0, 1.0, 0.0))
    tl.store(out + 3, tl.sum(ratios, 0))
    tl.store(out + 4, tl.sum(deviations, 0))
    tl.store(out + 5, tl.sum(belows, 0))
    tl.store(out + 6, tl.sum(aboves, 0))
    tl.store(out + 7, tl.sum(pasts, 0))
    tl.store(out + 8, tl.sum(ppo_kl, 0))
    tl.store(out + 9, tl.sum(approx_kl, 0))
    tl.store(out + 10, tl.sum(kl_sum, 0))
    tl.store(out + 11, tl.sum(entropies, 0))
    rest = tl.arange(0, SUMS)
    tl.store(out + rest, tl.max(largest, 0), mask=rest > 11)


def _in_triton(
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
    numbers: list[float],
    estimator: str,
    mean: bool,
    spans: bool,
    wanted: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    programs = programs_for(logp, cu_seqlens, spans)
    dlogp = torch.empty_like(logp) if "dlogp" in wanted else None
    dentropy = torch.empty_like(logp) if "dentropy" in wanted else None
    partials = new_partials(logp, programs)
    if programs:
        _policy[(programs,)](
            *(logp, advantages, old_logp, mask, cu_seqlens, ref_logp, entropy, is_weight),
            *(dlogp, dentropy, partials, logp.numel(), logp.shape[-1]),
            *numbers[:4],
            1 / numbers[4],  # a division would be a call
            *numbers[5:],
            FORM=form,
            KL=estimator,
            SPANS=spans,
            WHOLE=whole_words(logp, cu_seqlens, spans),
            EACH=advantages.shape != logp.shape,
            BY_SEQUENCE=by_sequence,
            MEAN=mean,
            SUMS=SUMS,
            BLOCK_T=BLOCK,
            num_warps=4,
        )
    grads = (logp.new_empty(0) if x is None else x for x in (dlogp, dentropy))
    return *fold(partials), *grads


# 4. ops; numbers: weight, low, high, dual, temperature, KL and entropy coefficients; spans: a
# pass over each sequence; wanted names gradients
_Found = tuple[Tensor, Tensor, Tensor, Tensor]


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
    numbers: list[float],
    estimator: str,
    mean: bool,
    spans: bool,
    wanted: str,
) -> _Found:
    inputs = (logp, advantages, old_logp, mask, cu_seqlens, ref_logp, entropy, is_weight)
    options = (form, by_sequence, numbers, estimator, mean, spans)
    backend = choose(logp.device.type, logp.dtype, "ppo")
    if backend != "cpp":
        return (_in_triton if backend == "triton" else _in_torch)(*inputs, *options, wanted)
    grads = [torch.empty_like(logp) if name in wanted else None for name in ("dlogp", "dentropy")]
    sums = logp.new_zeros(SUMS)
    torch.ops.fastpref_ppo.policy(*inputs, *options, *grads, sums)
    return sums[0].clone(), sums, *(logp.new_empty(0) if x is None else x for x in grads)


@policy_op.register_fake
def _(logp, *args):  # type: ignore[no-untyped-def]
    grads = (
        torch.empty_like(logp) if name in args[-1] else logp.new_empty(0)
        for name in ("dlogp", "dentropy")
    )
    return logp.new_empty(()), logp.new_empty(SUMS), *grads


# 5. autograd
def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*output[2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    grads = [
        None if dloss is None or not wanted else dloss * d
        for d, wanted in zip(
            ctx.saved_tensors, (ctx.needs_input_grad[i] for i in (0, 6)), strict=True
        )
    ]
    return grads[0], *[None] * 5, grads[1], *[None] * 8


policy_op.register_autograd(_backward, setup_context=_setup)
