"""ppo_policy_loss: the clipped loss of PPO and its kin by name."""

import difflib
import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.kernels.gae import KL_ESTIMATORS
from fastpref.kernels.ppo_policy import SUM_NAMES, policy_op
from fastpref.kernels.sequences import (
    aggregation,
    as_flags,
    check_constants,
    check_number,
    check_reduction,
    check_tokens,
    dense,
    num_sequences,
    reduced,
)


class PolicyVariant(NamedTuple):
    """A form of kernels/ppo_policy.py, and what a caller who says nothing gets."""

    form: str = "clip"
    by_sequence: bool = False
    """Whether the ratio is that of a whole sequence, per token (its geometric mean)."""
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = math.inf
    loss_agg_mode: str = "token-mean"
    temperature: float = 1.0
    """What advantages are divided by, in the forms that do."""
    source: str = ""


POLICY_LOSSES = {
    "ppo": PolicyVariant(source="Schulman et al. 2017, arXiv:1707.06347, eq. 7"),
    "dapo": PolicyVariant(clip_high=0.28, source="arXiv:2503.14476, eq. 8"),
    "grpo": PolicyVariant(
        loss_agg_mode="seq-mean-token-mean", source="Shao et al. 2024, arXiv:2402.03300, eq. 3"
    ),
    "dr_grpo": PolicyVariant(
        loss_agg_mode="seq-mean-token-sum-norm", source="Liu et al. 2025, arXiv:2503.20783"
    ),
    "gspo": PolicyVariant(
        by_sequence=True,
        clip_low=3e-4,
        clip_high=4e-4,
        loss_agg_mode="seq-mean-token-mean",
        source="Zheng et al. 2025, arXiv:2507.18071, eq. 5",
    ),
    "cispo": PolicyVariant("cispo", source="MiniMax-M1 2025, arXiv:2506.13585, eq. 4"),
    # its caller ends the epoch when metrics["ratio_deviation"] per token passes 0.25
    "espo": PolicyVariant(
        clip_low=math.inf, clip_high=math.inf, source="Sun et al. 2022, arXiv:2202.00079"
    ),
    "apa": PolicyVariant("apa", temperature=0.1, source="Zhu et al. 2023, arXiv:2306.02231"),
    "awr": PolicyVariant("awr", temperature=2.0, source="Peng et al. 2019, arXiv:1910.00177"),
}


class PolicyLoss(NamedTuple):
    """What :func:`ppo_policy_loss` returns; each 0-d."""

    loss: Tensor
    """fp32 (fp64 if an input is), differentiable in logp and entropy: a sum, with reduction="mean"
    over count."""
    count: Tensor  # type: ignore[assignment] # a tuple's method of that name gives way
    """What the sum is to be divided by, once, over all micro-batches and ranks: the tokens that
    count, or the sequences, as loss_agg_mode says."""
    metrics: dict[str, Tensor]
    """fp64 sums over tokens, with reduction="mean" means: ``ratio``, ``ratio_deviation`` |rho - 1|,
    ``clipfrac_low``, ``clipfrac_high`` and ``clipfrac_dual`` (where a bound binds), ``ppo_kl``
    (minus the log-ratio, verl's) and ``approx_kl`` (half its square, TRL's); of the inputs that
    came ``kl`` (from the reference) and ``entropy``. Beside them the number of ``tokens``, and the
    largest ratio, ``ratio_max``: over calls its maximum."""


def _variant(loss_type: str, given: dict[str, float | str | None]) -> PolicyVariant:
    """The variant of a name, with what the caller says of it, of which nothing may be idle."""
    if loss_type not in POLICY_LOSSES:
        near = difflib.get_close_matches(str(loss_type), POLICY_LOSSES, n=1, cutoff=0.0)
        known = ", ".join(POLICY_LOSSES)
        raise ValueError(f"need loss_type in {known}; got {loss_type!r}, nearest {near[0]!r}")
    variant = POLICY_LOSSES[loss_type]
    of_ratio = variant.form in ("clip", "cispo")
    idle = {"clip_low": not of_ratio, "clip_high": not of_ratio, "temperature": of_ratio}
    idle["dual_clip"] = variant.form != "clip"
    said = {name: value for name, value in given.items() if value is not None}
    for name, value in said.items():
        if idle.get(name):
            raise ValueError(f"loss_type {loss_type!r} has no {name}, got {value}")
    return variant._replace(**said)  # type: ignore[arg-type]


def _check_numbers(variant: PolicyVariant, kl_estimator: str, **coefs: float) -> None:
    for name, value in {"clip_low": variant.clip_low, "clip_high": variant.clip_high}.items():
        if value != math.inf:
            check_number(**{name: value})
    check_number(temperature=variant.temperature, **coefs)
    if not variant.temperature:
        raise ValueError("need temperature > 0, got 0")
    if not variant.dual_clip > 1:
        raise ValueError(f"need dual_clip > 1, got {variant.dual_clip}")
    if kl_estimator not in (*KL_ESTIMATORS, "k3+"):
        known = ", ".join((*KL_ESTIMATORS, "k3+"))
        raise ValueError(f"need kl_estimator in {known}; got {kl_estimator!r}")


def ppo_policy_loss(
    *,
    logp: Tensor,
    advantages: Tensor,
    old_logp: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    loss_type: str = "ppo",
    clip_low: float | None = None,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    temperature: float | None = None,
    ref_logp: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    is_weight: Tensor | None = None,
    loss_agg_mode: str | None = None,
    max_length: float | None = None,
    reduction: str = "sum",
) -> PolicyLoss:
    """Policy loss of tokens, its gradients and every statistic of them, in one pass.

    In two where the ratio or the mean of a sequence weighs its tokens.

    rho = exp(logp - old_logp), the log-ratio clamped to [-20, 20], past which no gradient flows.
    Not twice differentiable.

    Args:
        logp: (B, T), or (T,) with ``cu_seqlens``: log-probs of the tokens, in nats; floating point,
            differentiable.
        advantages: like logp, or (B,) one a sequence (of packed tokens (T,) means one a token).
        old_logp: like logp, under the policy at the start of the epochs; None: logp itself, the
            ratio is 1.
        mask: like logp, bool or integers 0 and 1 (checked on the CPU only): the tokens that count,
            of packed ones too; others may hold anything.
        cu_seqlens: (B+1,) int32 or int64 offsets of packed sequences, rising from 0 to T, which is
            checked on the CPU only.
        loss_type: a name of ``fastpref.losses.policy.POLICY_LOSSES``, which says what None means
            below: ppo, dapo, grpo, dr_grpo and gspo are clipped (gspo by the ratio of the
            sequence, whose gradient each token has by its own advantage), espo is not; cispo weighs
            logp by the clipped ratio; apa regresses logp - ref_logp on advantages / temperature;
            awr weighs logp by exp(advantages / temperature).
        clip_low: the ratio is bounded below by 1 - clip_low; may be inf.
        clip_high: and above by 1 + clip_high; may be inf.
        dual_clip: c > 1: the loss is at most -c A where A < 0; None: without, as TRL; verl's is 3.
        temperature: positive; of apa (lambda, 0.1) and awr (2).
        ref_logp: like logp, under the reference.
        kl_coef: of the KL from the reference in the loss.
        kl_estimator: "k1", "k2", "k3", or "k3+": k3's value with k2's gradient, which is the KL's.
        entropy: like logp, in nats; differentiable.
        entropy_coef: what it is rewarded by.
        is_weight: like logp: importance weights of the surrogate (not of KL or entropy), as
            exp(old_logp - sampler_logp), truncated.
        loss_agg_mode: "token-mean"; "seq-mean-token-sum" and "seq-mean-token-mean", over sequences
            that have a token; "seq-mean-token-sum-norm": sums of tokens over max_length, a mean
            over all sequences (verl's leaves out the latter).
        max_length: of seq-mean-token-sum-norm; None: T of (B, T).
        reduction: "sum", or "mean" to divide by this call's own count.

    Returns:
        PolicyLoss(loss, count, metrics). Without a token that counts loss and metrics are 0.

    Raises:
        ValueError: a shape, device, range or name differs from the above, a constant needs a
            gradient, or an input is lacking or idle.
        TypeError: a dtype differs from the above.

    Source: the table's; dual clip arXiv:1912.09729; k3+ and the aggregations' names verl.
    """
    given: dict[str, float | str | None] = {"clip_low": clip_low, "clip_high": clip_high}
    given |= {"dual_clip": dual_clip, "temperature": temperature, "loss_agg_mode": loss_agg_mode}
    variant = _variant(loss_type, given)
    _check_numbers(variant, kl_estimator, kl_coef=kl_coef, entropy_coef=entropy_coef)
    check_reduction(reduction)
    if ref_logp is None and (variant.form == "apa" or kl_coef):
        what = loss_type if variant.form == "apa" else f"kl_coef {kl_coef}"
        raise ValueError(f"need ref_logp for {what}, got None")
    if entropy is None and entropy_coef:
        raise ValueError(f"need entropy for entropy_coef {entropy_coef}, got None")
    constants = {"old_logp": old_logp, "ref_logp": ref_logp, "is_weight": is_weight}
    weighed = {"advantages": advantages}
    shape = getattr(logp, "shape", None)
    of_sequences = getattr(advantages, "ndim", None) == 1 and advantages.shape != shape
    tokens = {"logp": logp} | ({} if of_sequences else weighed) | {"entropy": entropy} | constants
    sequences = weighed if of_sequences else {}
    dtype = check_tokens(tokens, sequences, mask, cu_seqlens, needed=2 - of_sequences)
    check_constants(**constants, **weighed)
    how = aggregation(variant.loss_agg_mode, max_length, logp)

    def read(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(dtype).contiguous()

    trains = torch.is_grad_enabled()
    loss, found, *_ = policy_op(
        *map(read, (logp, advantages, old_logp)),
        *(as_flags(mask), dense(cu_seqlens)),
        *map(read, (ref_logp, entropy, is_weight)),
        *variant[:5],
        *(variant.temperature, kl_coef, entropy_coef, kl_estimator, how.mean),
        variant.by_sequence or how.by_sequence or of_sequences,
        trains and logp.requires_grad,
        trains and entropy is not None and entropy.requires_grad,
    )
    _, *columns = found.unbind()
    sums = dict(zip(SUM_NAMES[1:], columns, strict=False)) | {"ratio_max": columns[-1]}
    for name, x in {"kl": ref_logp, "entropy": entropy}.items():
        if x is None:
            del sums[name]
    return PolicyLoss(*reduced(loss, sums, how, num_sequences(logp, cu_seqlens), reduction))
