"""Generalised advantages: A_t = r_t - V_t + S_{t+1}, S_t = gamma (V_t + lambda A_t), returns A + V.

B sequences of tokens, the rows of (B, T) or packed; a masked token carries S unchanged and gives 0.
The reward r_t = reward_t - c k(logp_t - ref_t), plus the score at the last valid token, is made on
the way, and so are the sums that whitening needs.
"""

from typing import NamedTuple

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
    dense,
    fold,
    kept,
    kl_of,
    moments,
    new_partials,
    num_sequences,
    padded,
    reach,
    read,
    whole_words,
    words,
    write,
)

# of a log-ratio d = logp - ref_logp: d, d**2 / 2, exp(-d) - 1 + d
KL_ESTIMATORS = ("k1", "k2", "k3")
MAX_LOG_RATIO = 20.0  # an exponent stays below: exp(88.8) is no fp32
_PER_THREAD, _PER_SHAPING_THREAD = 16, 8  # tokens in registers: more would leave one program a SM
_SUM_NAMES = ("tokens", "advantages", "squares", "kl", "penalty", "sequences", "scores")


class _Inputs(NamedTuple):
    """What the op takes: tokens (B, T), or (T,) with cu_seqlens, in one dtype."""

    rewards: Tensor | None
    values: Tensor | None
    logp: Tensor | None
    ref_logp: Tensor | None
    scores: Tensor | None  # (B,)
    mask: Tensor | None  # bool
    cu_seqlens: Tensor | None  # (B+1,)
    bootstrap: Tensor | None  # (B,)
    gamma: float
    lam: float
    kl_coef: float
    estimator: str

    @property
    def tokens(self) -> Tensor:
        """One that is there, for its shape."""
        return next(x for x in (self.rewards, self.logp) if x is not None)


# 1. reference
def kl_estimate(d: Tensor, estimator: str) -> Tensor:
    """The KL of one sampled token from its log-ratio d = logp - ref_logp, in nats.

    Source: Schulman 2020, joschu.net/blog/kl-approx.html; k3 clamps d to [-20, 20], as verl does.
    """
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d**2 / 2
    d = d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return (-d).expm1() + d


def gae_ref(
    rewards: Tensor, values: Tensor, mask: Tensor, bootstrap: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """(B, T) each, bootstrap (B,): token by token from the end."""
    advantages = torch.zeros_like(values)
    next_value, advantage = bootstrap, torch.zeros_like(bootstrap)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(mask[:, t], delta + gamma * lam * advantage, advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = torch.where(mask[:, t], advantage, 0.0)
    return advantages, (advantages + values).where(mask, 0.0)


def _in_torch(x: _Inputs) -> tuple[Tensor, Tensor, Tensor]:
    like = x.tokens
    keep = torch.ones_like(like, dtype=torch.bool) if x.mask is None else x.mask
    if x.cu_seqlens is not None:
        place, there = padded(x.cu_seqlens, len(like))
        keep = keep[place] & there if len(like) else there

    def rows(y: Tensor | None) -> Tensor:
        """(B, T) with 0 where nothing counts."""
        if y is None or not y.numel():
            return like.new_zeros(keep.shape)
        return (y if x.cu_seqlens is None else y[place]).where(keep, 0.0)

    d, full = rows(None if x.ref_logp is None else x.logp) - rows(x.ref_logp), keep.any(1)
    penalty = x.kl_coef * kl_estimate(d, x.estimator)
    reward = rows(x.rewards) - penalty
    none = like.new_zeros(len(keep))
    scores = none if x.scores is None else x.scores.where(full, 0.0)
    if keep.shape[1]:
        last = keep.shape[1] - 1 - keep.flip(1).int().argmax(1)
        reward[torch.arange(len(last), device=like.device), last] += scores
    end = none if x.bootstrap is None else x.bootstrap
    found = gae_ref(reward, rows(x.values), keep, end, x.gamma, x.lam)
    parts = (keep, found[0], found[0].double() ** 2, d, penalty, full, scores)
    sums = torch.stack([part.sum(dtype=torch.float64) for part in parts])
    if x.cu_seqlens is not None:
        at, flat = (place[there],), torch.zeros_like(like)
        found = tuple(flat.index_put(at, out[there]) for out in found)
    return *found, sums


# 2. kernels
@triton.jit
def _after(a_later, b_later, a, b):
    # S = a S' + b of a token, after those that follow it
    return a * a_later, a * b_later + b


@triton.jit
def _tokens(
    rewards_ptr,
    values_ptr,
    logp_ptr,
    ref_ptr,
    t,
    there,
    keep,
    last,
    score,
    kl_coef,
    KL: tl.constexpr,
):
    """Reward, value, log-ratio and penalty of tokens; 0 where they do not count."""
    reward = tl.where(t == last, score, 0.0)
    if rewards_ptr is not None:
        reward += read(rewards_ptr, t, there, keep)
    d = tl.zeros_like(reward)
    penalty = d
    if ref_ptr is not None:
        d = read(logp_ptr, t, there, keep) - read(ref_ptr, t, there, keep)
        estimate, _slope = kl_of(d, KL)
        penalty = kl_coef * estimate
        reward -= penalty
    value = tl.zeros_like(reward)
    if values_ptr is not None:
        value = read(values_ptr, t, there, keep)
    return reward, value, d, penalty


@triton.jit
def _gae(
    rewards_ptr,
    values_ptr,
    logp_ptr,
    ref_ptr,
    scores_ptr,
    mask_ptr,
    cu_ptr,
    bootstrap_ptr,
    advantages_ptr,
    returns_ptr,
    partial_ptr,
    width,
    gamma,
    decay,
    kl_coef,
    KL: tl.constexpr,
    SHAPED: tl.constexpr,
    WHOLE: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One program a sequence, from its last block to its first."""
    b = tl.program_id(0)
    start, end, origin, _ = reach(cu_ptr, width, 0, True, BLOCK_T)
    lane = tl.arange(0, BLOCK_T)
    blocks = tl.cdiv(end - origin, BLOCK_T)
    last = start - 1
    score = tl.full((), 0.0, tl.float32)
    if SHAPED:
        for i in range(blocks):
            t = origin + i * BLOCK_T + lane
            keep = kept(mask_ptr, t, start, end, words(t, start, end))
            last = tl.maximum(last, tl.max(tl.where(keep, t, start - 1)))
        if scores_ptr is not None:
            score = tl.load(scores_ptr + b, mask=last >= start, other=0.0)
    state = tl.full((), 0.0, tl.float32)  # S of the token past the block
    if bootstrap_ptr is not None:
        state = gamma * tl.load(bootstrap_ptr + b)
    tokens = tl.zeros((BLOCK_T,), tl.float32)
    anchor = tokens
    away = tokens
    squares = tokens
    kl = tokens
    penalties = tokens
    for i in range(blocks):
        first = origin + (blocks - 1 - i) * BLOCK_T
        # each lane scans the token after its own, so that it ends with the S that its own needs
        t = first + 1 + lane
        there = (t >= start) & (t < end)
        keep = kept(mask_ptr, t, start, end, there)
        reward, value, d, penalty = _tokens(
            rewards_ptr,
            values_ptr,
            logp_ptr,
            ref_ptr,
            t,
            there,
            keep,
            last,
            score,
            kl_coef,
            KL,
        )
        slope = tl.where(keep, decay, 1.0)
        offset = gamma * value + decay * (reward - value)
        slope, offset = tl.associative_scan((slope, offset), 0, _after, reverse=True)
        later = slope * state + offset
        state = tl.sum(tl.where(lane == 0, later, 0.0), 0)
        t = first + lane
        there = words(t, start, end)
        keep = kept(mask_ptr, t, start, end, there)
        reward, value, d, penalty = _tokens(
            rewards_ptr,
            values_ptr,
            logp_ptr,
            ref_ptr,
            t,
            there,
            keep,
            last,
            score,
            kl_coef,
            KL,
        )
        advantage = tl.where(keep, reward - value + later, 0.0)
        write(advantages_ptr, t, advantage, start, end, WHOLE)
        write(returns_ptr, t, advantage + value, start, end, WHOLE)
        if SHAPED:
            anchor = tl.where(keep & (tokens == 0), advantage, anchor)
            far = tl.where(keep, advantage - anchor, 0.0)
            tokens += tl.where(keep, 1.0, 0.0)
            away += far
            squares += far * far
            kl += d
            penalties += penalty
    if SHAPED:
        out = partial_ptr + b.to(tl.int64) * SUMS
        tl.store(out, tl.sum(tokens, 0))
        total, total_squares = moments(tokens, anchor, away, squares)
        tl.store(out + 1, total)
        tl.store(out + 2, total_squares)
        tl.store(out + 3, tl.sum(kl, 0))
        tl.store(out + 4, tl.sum(penalties, 0))
        tl.store(out + 5, tl.where(last >= start, 1.0, 0.0))
        tl.store(out + 6, score)
        rest = tl.arange(0, SUMS)
        tl.store(out + rest, 0.0, mask=rest > 6)


def _in_triton(x: _Inputs) -> tuple[Tensor, Tensor, Tensor]:
    like, shaped = x.tokens, x.logp is not None
    advantages, returns = torch.empty_like(like), torch.empty_like(like)
    B = num_sequences(like, x.cu_seqlens)
    partials = new_partials(like, B)
    if B:
        width = like.numel() // B  # of packed sequences the mean
        per_warp = 32 * (_PER_SHAPING_THREAD if shaped else _PER_THREAD)
        block = min(max(triton.next_power_of_2(width), per_warp), 4 * per_warp)
        _gae[(B,)](
            *map(aligned, x[:8]),
            advantages,
            returns,
            partials if shaped else None,
            # specialised: a width of whole words costs fewer instructions
            like.shape[1] if x.cu_seqlens is None else 0,
            x.gamma,
            x.gamma * x.lam,
            x.kl_coef,
            KL=x.estimator,
            SHAPED=shaped,
            WHOLE=whole_words(like, x.cu_seqlens, True),
            SUMS=partials.shape[1],
            BLOCK_T=block,
            num_warps=block // per_warp,
        )
    sums = fold(partials)[1] if shaped else partials.new_zeros(len(_SUM_NAMES))
    return advantages, returns, sums[: len(_SUM_NAMES)]


# 3. ops
@torch.library.custom_op("fastpref::gae", mutates_args=())
def _op(
    rewards: Tensor | None,
    values: Tensor | None,
    logp: Tensor | None,
    ref_logp: Tensor | None,
    scores: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
    kl_coef: float,
    estimator: str,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens = (rewards, values, logp, ref_logp)
    x = _Inputs(*tokens, scores, mask, cu_seqlens, bootstrap, gamma, lam, kl_coef, estimator)
    backend = choose(x.tokens.device.type, x.tokens.dtype, "ppo")
    if backend != "cpp":
        return _in_triton(x) if backend == "triton" else _in_torch(x)
    out = (torch.empty_like(x.tokens), torch.empty_like(x.tokens))
    sums = x.tokens.new_empty(len(_SUM_NAMES), dtype=torch.float64)
    torch.ops.fastpref_ppo.gae(*x, *out, sums)
    return *out, sums


@_op.register_fake
def _(rewards, values, logp, *args):  # type: ignore[no-untyped-def]
    like = logp if rewards is None else rewards
    sums = like.new_empty(len(_SUM_NAMES), dtype=torch.float64)
    return torch.empty_like(like), torch.empty_like(like), sums


# 4. public
class PPOAdvantages(NamedTuple):
    """What :func:`ppo_advantages` returns."""

    advantages: Tensor
    """Like values, not whitened."""
    returns: Tensor
    """Like values: advantages + values."""
    moments: Tensor
    """(3,) fp64 count, sum and sum of squares of the advantages: all-reduce them, then whiten."""
    metrics: dict[str, Tensor]
    """0-d fp64 sums over the batch: ``tokens`` and ``sequences`` that count; ``kl`` (the log-ratios
    in nats), ``non_score_reward`` (what was taken off), ``scores`` and ``rlhf_reward`` (both
    together)."""


def _check_range(**options: float) -> None:
    for name, value in options.items():
        if not 0 <= value <= 1:
            raise ValueError(f"need {name} in [0, 1], got {value}")


def gae(
    *,
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns; constants, through which no gradient flows.

    Args:
        rewards: (B, T), or (T,) with ``cu_seqlens``; floating point.
        values: like rewards: the value before each token.
        mask: like rewards, bool or integers 0 and 1: the tokens that count. The recursion passes
            over the others, wherever they are, and they may hold anything.
        cu_seqlens: (B+1,) int32 or int64 offsets of packed sequences, rising from 0 to T, which is
            checked on the CPU only.
        gamma: discount, in [0, 1].
        lam: lambda, in [0, 1].
        bootstrap: (B,) the value after each sequence's last token; None: 0, they have ended.

    Returns:
        (advantages, returns = advantages + values), like rewards, fp32 (fp64 if an input is);
        exactly 0 where masked.

    Raises:
        ValueError: a shape, device or range differs from the above.
        TypeError: a dtype differs from the above.

    Source: Schulman et al. 2016, arXiv:1506.02438, eq. 16.
    """
    tokens = {"rewards": rewards, "values": values}
    dtype = check_tokens(tokens, {"bootstrap": bootstrap}, mask, cu_seqlens, needed=2)
    _check_range(gamma=gamma, lam=lam)
    rewards, values, bootstrap = constants(dtype, rewards, values, bootstrap)
    rows = (rewards, values, None, None, None, as_flags(mask), dense(cu_seqlens), bootstrap)
    advantages, returns, _ = _op(*rows, gamma, lam, 0.0, "k1")
    return advantages, returns


def ppo_advantages(
    *,
    scores: Tensor | None,
    logp: Tensor,
    ref_logp: Tensor | None,
    values: Tensor | None,
    rewards: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bootstrap: Tensor | None = None,
    kl_coef: float = 0.05,
    kl_estimator: str = "k1",
    gamma: float = 1.0,
    lam: float = 0.95,
) -> PPOAdvantages:
    """Advantages of KL-shaped rewards: r_t = rewards_t - kl_coef * k(logp_t - ref_logp_t) + score.

    The score arrives at the last token that counts. One pass makes rewards, advantages, returns,
    metrics and the moments of :func:`fastpref.whiten`; no gradient flows through any of them.

    Args:
        scores: (B,) reward of each whole completion, of any dtype; None: 0. That of a sequence
            without a token that counts is left out.
        logp: (B, T), or (T,) with ``cu_seqlens``: log-probs of the tokens under the policy that
            sampled them, in nats; floating point.
        ref_logp: like logp, under the reference; None, with kl_coef 0: no KL.
        values: like logp: the value before each token; None: 0, and lam is 1, which makes the
            advantages REINFORCE++'s returns-to-go.
        rewards: like logp: further rewards of single tokens, as those of
            :func:`fastpref.token_rewards`; None: 0.
        mask: like logp, bool or integers 0 and 1: the tokens that count.
        cu_seqlens: (B+1,) int32 or int64 offsets of packed sequences.
        bootstrap: (B,) the value after the last token of sequences that were cut; None: 0.
        kl_coef: not negative.
        kl_estimator: "k1", "k2" or "k3".
        gamma: discount, in [0, 1].
        lam: lambda, in [0, 1].

    Returns:
        PPOAdvantages; advantages and returns in fp32 (fp64 if an input is), exactly 0 where masked.

    Raises:
        ValueError: a shape, device, range or name differs from the above, or ref_logp is lacking.
        TypeError: a dtype differs from the above.

    Source: Ziegler et al. 2019, arXiv:1909.08593, eq. 2; REINFORCE++, arXiv:2501.03262.
    """
    tokens = {"logp": logp, "ref_logp": ref_logp, "values": values, "rewards": rewards}
    if isinstance(scores, Tensor) and not scores.is_floating_point():
        scores = scores.float()  # of answers that are right or wrong
    sequences = {"scores": scores, "bootstrap": bootstrap}
    dtype = check_tokens(tokens, sequences, mask, cu_seqlens)
    _check_range(gamma=gamma, lam=lam)
    check_number(kl_coef=kl_coef)
    if ref_logp is None and kl_coef:
        raise ValueError(f"need ref_logp for kl_coef {kl_coef}, got None")
    if kl_estimator not in KL_ESTIMATORS:
        raise ValueError(f"need kl_estimator in {', '.join(KL_ESTIMATORS)}; got {kl_estimator!r}")
    lam = 1.0 if values is None else lam
    *inputs, end = constants(dtype, rewards, values, logp, ref_logp, scores, bootstrap)
    rows = (*inputs, as_flags(mask), dense(cu_seqlens), end)
    advantages, returns, sums = _op(*rows, gamma, lam, kl_coef, kl_estimator)
    named = dict(zip(_SUM_NAMES, sums.unbind(), strict=True))
    metrics = {name: named[name] for name in ("tokens", "sequences", "kl", "scores")}
    metrics["non_score_reward"] = -named["penalty"]
    metrics["rlhf_reward"] = named["scores"] - named["penalty"]
    moments = sums[:3].clone()  # of their own: who reduces them must not change a metric
    return PPOAdvantages(advantages, returns, moments, metrics)
