"""Policy losses: by hand, value and gradient against fp64 autograd of the definition, metrics."""

import itertools
import math
import os

import pytest
import torch
import torch._dynamo.testing
from compare import assert_no_worse, assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from fastpref import ppo_policy_loss
from fastpref.kernels import sequences
from fastpref.kernels.ppo_policy import kl_loss_ref, policy_op, surrogate_ref
from fastpref.kernels.sequences import AGGREGATIONS
from fastpref.losses.policy import POLICY_LOSSES

DEV = "cuda" if torch.cuda.is_available() else "cpu"
F64 = torch.float64


def tokens(*values, dtype=torch.float32):
    return torch.tensor([values], dtype=dtype, device=DEV)


def one(ratio, advantage, **options):
    """The loss of a token of a ratio, and its slope in logp."""
    logp = tokens(math.log(ratio)).requires_grad_()
    found = ppo_policy_loss(
        logp=logp, old_logp=tokens(0.0), advantages=tokens(advantage), **options
    )
    found.loss.backward()
    return found.loss.item(), logp.grad.item(), found


# by hand: FORMULAS.md, section 4
@pytest.mark.parametrize(
    ("ratio", "advantage", "dual_clip", "want", "slope"),
    [
        (1.3, 1.0, None, -1.2, 0.0),
        (1.3, -1.0, None, 1.3, 1.3),
        (0.5, -1.0, None, 0.8, 0.0),
        (0.5, 1.0, None, -0.5, -0.5),
        (5.0, -1.0, None, 5.0, 5.0),
        (5.0, -1.0, 3.0, 3.0, 0.0),
        (5.0, 1.0, 3.0, -1.2, 0.0),
        (1.1, 2.0, 3.0, -2.2, -2.2),
    ],
)
def test_the_clipped_loss_of_a_token(ratio, advantage, dual_clip, want, slope):
    loss, grad, found = one(ratio, advantage, dual_clip=dual_clip)
    assert (loss, grad) == pytest.approx((want, slope), rel=1e-6)
    low, high = ratio < 0.8 and advantage < 0, ratio > 1.2 and advantage > 0
    dual = dual_clip is not None and advantage < 0 and ratio > dual_clip
    found = [found.metrics[f"clipfrac_{name}"].item() for name in ("low", "high", "dual")]
    assert found == [low, high, dual]


def test_bounds_of_their_own():
    assert one(1.27, 1.0, clip_high=0.28)[0] == pytest.approx(-1.27)
    assert one(1.3, 1.0, loss_type="dapo")[0] == pytest.approx(-1.28)
    assert one(0.6, -1.0, clip_low=0.3)[0] == pytest.approx(0.7)


def test_gspo_of_three_tokens():
    logp = tokens(0.1, -0.2, 0.05).requires_grad_()
    options = {"old_logp": tokens(0.0, 0.0, 0.0), "loss_type": "gspo", "reduction": "mean"}
    found = ppo_policy_loss(logp=logp, advantages=tokens(1.0, 1.0, 1.0), **options)
    found.loss.backward()
    assert found.metrics["ratio"].item() == pytest.approx(0.983471, abs=1e-6)
    assert found.loss.item() == pytest.approx(-0.983471, abs=1e-6)
    assert logp.grad.tolist()[0] == pytest.approx([-0.983471 / 3] * 3, abs=1e-6)
    found = ppo_policy_loss(logp=logp, advantages=tokens(-1.0)[0], **options)
    assert found.loss.item() == pytest.approx(1 - 3e-4)


def test_apa_of_a_token():
    logp = tokens(0.1).requires_grad_()
    found = ppo_policy_loss(
        logp=logp, ref_logp=tokens(0.0), advantages=tokens(0.5), loss_type="apa", temperature=1.0
    )
    found.loss.backward()
    assert (found.loss.item(), logp.grad.item()) == pytest.approx((0.16, -0.8))


def test_awr_of_a_token():
    loss, grad, _ = one(math.exp(-2.0), 3.0, loss_type="awr")
    assert (loss, grad) == pytest.approx((2 * math.exp(1.5), -math.exp(1.5)))


def test_cispo_weighs_logp_by_the_clipped_ratio():
    loss, grad, found = one(1.5, 2.0, loss_type="cispo")
    assert (loss, grad) == pytest.approx((-1.2 * 2 * math.log(1.5), -2.4))
    assert found.metrics["clipfrac_high"].item() == 1


def test_espo_is_not_clipped_and_says_when_to_stop():
    assert one(5.0, -1.0, loss_type="espo")[:2] == pytest.approx((5.0, 5.0))
    logp = tokens(1.5, 0.5, 0.9).log()
    found = ppo_policy_loss(
        logp=logp, old_logp=0 * logp, advantages=logp, loss_type="espo", reduction="mean"
    )
    assert found.metrics["ratio_deviation"].item() == pytest.approx(1.1 / 3)


@pytest.mark.parametrize(
    ("estimator", "want", "slope"),
    [
        ("k1", (0.1, -0.2), (1, 1)),
        ("k2", (0.005, 0.02), (0.1, -0.2)),
        ("k3", (0.004837, 0.021403), (1 - math.exp(-0.1), 1 - math.exp(0.2))),
        ("k3+", (0.004837, 0.021403), (0.1, -0.2)),
    ],
)
def test_kl_in_the_loss(estimator, want, slope):
    logp = tokens(0.1, -0.2).requires_grad_()
    zero = torch.zeros_like(logp)
    found = ppo_policy_loss(
        logp=logp, advantages=zero, ref_logp=zero, kl_coef=2.0, kl_estimator=estimator
    )
    found.loss.backward()
    assert found.loss.item() == pytest.approx(2 * sum(want), abs=2e-6)
    assert found.metrics["kl"].item() == pytest.approx(sum(want), abs=1e-6)
    assert logp.grad.tolist()[0] == pytest.approx([2 * x for x in slope], abs=1e-6)


def test_entropy_is_rewarded():
    entropy = tokens(2.0, 3.0, 9.0).requires_grad_()
    logp = tokens(0.0, 0.0, 0.0)
    mask = tokens(1.0, 1.0, 0.0) > 0
    options = {"mask": mask, "entropy": entropy, "entropy_coef": 0.1}
    found = ppo_policy_loss(logp=logp, advantages=logp, **options)
    found.loss.backward()
    assert found.loss.item() == pytest.approx(-0.5)
    assert found.metrics["entropy"].item() == 5
    assert entropy.grad.tolist()[0] == pytest.approx([-0.1, -0.1, 0.0])


@pytest.mark.parametrize(
    ("mode", "options", "want", "count"),
    [
        ("token-mean", {}, 15, 4),
        ("seq-mean-token-sum", {}, 15, 2),
        ("seq-mean-token-mean", {}, 2 + 9, 2),
        ("seq-mean-token-sum-norm", {}, 15 / 3, 3),
        ("seq-mean-token-sum-norm", {"max_length": 10}, 15 / 10, 3),
    ],
)
def test_aggregations_by_hand(mode, options, want, count):
    """Three sequences of at most three tokens, with 1 2 3, 9 and no tokens that count."""
    losses = torch.tensor([[1.0, 2.0, 3.0], [5.0, 9.0, 5.0], [5.0, 5.0, 5.0]], device=DEV)
    mask = torch.tensor([[1, 1, 1], [0, 1, 0], [0, 0, 0]], device=DEV)
    inputs = {"logp": torch.zeros_like(losses), "advantages": -losses, "mask": mask}
    found = ppo_policy_loss(**inputs, loss_agg_mode=mode, **options)
    assert (found.loss.item(), found.count.item()) == pytest.approx((want, count))
    mean = ppo_policy_loss(**inputs, loss_agg_mode=mode, **options, reduction="mean")
    assert mean.loss.item() == pytest.approx(want / count)
    packed = {k: v.flatten() for k, v in inputs.items()}
    cu = torch.tensor([0, 3, 6, 9], device=DEV, dtype=torch.int32)
    options = {"max_length": 3, **options} if mode.endswith("norm") else options
    again = ppo_policy_loss(**packed, cu_seqlens=cu, loss_agg_mode=mode, **options)
    assert (again.loss.item(), again.count.item()) == pytest.approx((want, count))


def test_the_table():
    """What every name means when nothing else is said."""
    inf = math.inf
    found = {name: variant[:-1] for name, variant in POLICY_LOSSES.items()}
    assert found == {
        "ppo": ("clip", False, 0.2, 0.2, inf, "token-mean", 1.0),
        "dapo": ("clip", False, 0.2, 0.28, inf, "token-mean", 1.0),
        "grpo": ("clip", False, 0.2, 0.2, inf, "seq-mean-token-mean", 1.0),
        "dr_grpo": ("clip", False, 0.2, 0.2, inf, "seq-mean-token-sum-norm", 1.0),
        "gspo": ("clip", True, 3e-4, 4e-4, inf, "seq-mean-token-mean", 1.0),
        "cispo": ("cispo", False, 0.2, 0.2, inf, "token-mean", 1.0),
        "espo": ("clip", False, inf, inf, inf, "token-mean", 1.0),
        "apa": ("apa", False, 0.2, 0.2, inf, "token-mean", 0.1),
        "awr": ("awr", False, 0.2, 0.2, inf, "token-mean", 2.0),
    }


# against fp64
NAMES = ("logp", "old_logp", "ref_logp", "advantages", "entropy", "is_weight")


def batch(B, T, dtype=torch.float32, seed=0, kept=0.7):
    gen = torch.Generator().manual_seed(seed)
    logp = -torch.randn(B, T, generator=gen).abs()
    x = {"logp": logp}
    for name, width in (("old_logp", 0.3), ("ref_logp", 0.6)):
        x[name] = logp + width * torch.randn(B, T, generator=gen)
    x["advantages"] = torch.randn(B, T, generator=gen)
    x["entropy"], x["is_weight"] = (torch.rand(B, T, generator=gen) for _ in range(2))
    x = {k: v.to(DEV, dtype) for k, v in x.items()}
    return x, (torch.rand(B, T, generator=gen) < kept).to(DEV)


def definition(x, mask, loss_type, mode, estimator, dual_clip, kl_coef=0.3, entropy_coef=0.2):
    """The mean loss, by autograd alone."""
    variant = POLICY_LOSSES[loss_type]
    count = mask.sum(1, keepdim=True).clamp(min=1)
    apart = x["logp"] - x["old_logp"]
    if variant.by_sequence:
        mean = (apart * mask).sum(1, keepdim=True) / count
        apart = x["logp"] - x["logp"].detach() + mean.detach()
    bounds = (variant.clip_low, variant.clip_high, dual_clip or math.inf, variant.temperature)
    surrogate = surrogate_ref(
        variant.form, x["logp"], x["ref_logp"], apart, x["advantages"], *bounds
    )
    loss = surrogate * x["is_weight"] - entropy_coef * x["entropy"]
    loss = loss + kl_coef * kl_loss_ref(x["logp"] - x["ref_logp"], estimator)
    loss = loss.where(mask, 0.0)
    rows = mask.any(1)
    if mode == "token-mean":
        return loss.sum() / mask.sum().clamp(min=1)
    if mode == "seq-mean-token-sum-norm":
        return loss.sum() / loss.numel()
    of_rows = loss.sum(1) / (count[:, 0] if mode == "seq-mean-token-mean" else 1)
    return of_rows.sum() / rows.sum().clamp(min=1)


def gradients(fn, x):
    x = {k: v.detach().clone() for k, v in x.items()}
    leaves = [x[name].requires_grad_() for name in ("logp", "entropy")]
    loss = fn(x)
    dlogp, dentropy = torch.autograd.grad(loss, leaves)
    return {"loss": loss.detach(), "dlogp": dlogp, "dentropy": dentropy}


def wide(x):
    return {k: v.double() for k, v in x.items()}


CASES = list(itertools.product(POLICY_LOSSES, AGGREGATIONS))


@pytest.mark.parametrize(("loss_type", "mode"), CASES, ids=map(str, CASES))
def test_no_worse_than_torch(loss_type, mode):
    found = [compared(loss_type, mode, seed) for seed in range(3)]
    # the sums of several batches: one of torch's may be right by chance
    ours, packed, torchs, truth = (
        {k: torch.stack([x[k] for x in each]) for k in each[0]} for each in zip(*found, strict=True)
    )
    assert_no_worse(ours, torchs, truth)
    assert_no_worse(packed, torchs, truth)


def compared(loss_type, mode, seed):
    """Value and gradients: ours padded and packed, torch's, and in fp64."""
    x, mask = batch(4, 37, seed=seed)
    mask[2] = False
    dual = 1.2 if POLICY_LOSSES[loss_type].form == "clip" else None
    estimator = {"ppo": "k1", "grpo": "k2", "gspo": "k3+"}.get(loss_type, "k3")

    def ours(x, **options):
        options = {"mask": mask, "loss_type": loss_type, "loss_agg_mode": mode, **options}
        options |= {"dual_clip": dual, "kl_estimator": estimator, "reduction": "mean"}
        return ppo_policy_loss(**x, kl_coef=0.3, entropy_coef=0.2, **options).loss

    def packed(x):
        cu = torch.arange(0, mask.numel() + 1, 37, device=DEV)
        x = {k: v.flatten() for k, v in x.items()}
        norm = {"max_length": 37} if mode.endswith("norm") else {}
        return ours(x, mask=mask.flatten(), cu_seqlens=cu, **norm)

    def defined(x):
        return definition(x, mask, loss_type, mode, estimator, dual)

    truth, torchs = gradients(defined, wide(x)), gradients(defined, x)
    for name, found in gradients(ours, wide(x)).items():
        torch.testing.assert_close(found, truth[name], rtol=1e-10, atol=1e-12)
    return gradients(ours, x), gradients(packed, x), torchs, truth


@pytest.mark.parametrize("shape", [(1, 1), (2, 1023), (1, 4097), (3, 2050)], ids=str)
@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_many_tokens(shape, mode):
    x, mask = batch(*shape)
    mask[0, 0] = True
    options = {"kl_coef": 0.3, "entropy_coef": 0.2, "reduction": "mean"}
    found = gradients(
        lambda x: ppo_policy_loss(**x, mask=mask, loss_agg_mode=mode, **options).loss, x
    )
    defined = (
        gradients(lambda x: definition(x, mask, "ppo", mode, "k3", None), y) for y in (x, wide(x))
    )
    assert_no_worse(found, *defined)


def test_metrics_against_their_definitions():
    x, mask = batch(5, 41)
    found = ppo_policy_loss(**x, mask=mask, dual_clip=1.2, kl_estimator="k2").metrics
    x = {k: v.double()[mask] for k, v in x.items()}
    apart, A = x["logp"] - x["old_logp"], x["advantages"]
    ratio, d = apart.exp(), x["logp"] - x["ref_logp"]
    want = {
        "tokens": len(apart),
        "ratio": ratio.sum(),
        "ratio_deviation": (ratio - 1).abs().sum(),
        "ratio_max": ratio.max(),
        "clipfrac_low": ((ratio < 0.8) & (A < 0)).sum(),
        "clipfrac_high": ((ratio > 1.2) & (A > 0)).sum(),
        "clipfrac_dual": ((ratio > 1.2) & (A < 0)).sum(),
        "ppo_kl": -apart.sum(),
        "approx_kl": (apart**2).sum() / 2,
        "kl": (d**2).sum() / 2,
        "entropy": x["entropy"].sum(),
    }
    assert {k: float(v) for k, v in found.items()} == pytest.approx(
        {k: float(v) for k, v in want.items()}, rel=1e-5
    )
    assert all(v > 0 for k, v in want.items() if k.startswith("clipfrac"))


def test_on_policy_is_a_ratio_of_one():
    x, mask = batch(3, 9)
    old = x["logp"].clone()

    def loss(x, **options):
        inputs = {k: x[k] for k in ("logp", "advantages", "entropy")}
        return ppo_policy_loss(**inputs, mask=mask, entropy_coef=0.1, **options)

    both = (gradients(lambda x, o=o: loss(x, old_logp=o).loss, x) for o in (None, old))
    assert_same(*both)
    metrics = loss(x).metrics
    assert metrics["ratio"] == metrics["tokens"] and metrics["ratio_max"] == 1
    assert not metrics["approx_kl"] and not metrics["ratio_deviation"]
    assert metrics.keys() & {"kl", "entropy"} == {"entropy"}


@pytest.mark.parametrize("loss_type", ["ppo", "gspo"])
def test_past_twenty_nats_the_ratio_is_bounded_and_nothing_flows(loss_type):
    for apart, want in ((25.0, math.exp(20)), (-25.0, math.exp(-20))):
        logp = tokens(apart, dtype=F64).requires_grad_()
        found = ppo_policy_loss(
            logp=logp, old_logp=0 * logp.detach(), advantages=tokens(-1.0), loss_type=loss_type,
            clip_low=math.inf, clip_high=math.inf,
        )  # fmt: skip
        found.loss.backward()
        assert found.loss.item() == pytest.approx(want) and logp.grad.item() == 0


@pytest.mark.parametrize("estimator", ["k3", "k3+"])
def test_past_twenty_nats_k3_is_bounded(estimator):
    logp = tokens(-30.0, dtype=F64).requires_grad_()
    found = ppo_policy_loss(
        logp=logp, ref_logp=tokens(0.0), advantages=tokens(0.0), kl_coef=1.0, kl_estimator=estimator
    )
    found.loss.backward()
    assert found.loss.item() == pytest.approx(math.expm1(20) - 20)
    assert logp.grad.item() == (0 if estimator == "k3" else -30)


@pytest.mark.parametrize("d", [-12.0, -0.51, -0.49, -1e-3, 1e-5, 0.12, 0.49, 0.51, 12.0])
def test_k3_is_right_at_any_distance(d):
    """Where exp(-d) - 1 + d would be rounding alone, too."""
    logp = tokens(d).requires_grad_()
    zero = torch.zeros_like(logp)
    found = ppo_policy_loss(logp=logp, advantages=zero, ref_logp=zero, kl_coef=1.0)
    found.loss.backward()
    d = logp.item()
    series = sum((-d) ** n / math.factorial(n) for n in range(2, 30))
    value = series if abs(d) < 1 else math.expm1(-d) + d
    rel = 2e-6 if abs(d) > 0.1 or backend_is_exact() else 2e-2
    assert found.loss.item() == pytest.approx(value, rel=rel)
    assert logp.grad.item() == pytest.approx(-math.expm1(-d), rel=2e-6)


def backend_is_exact():
    """Not plain torch, whose expm1(-d) + d still rounds."""
    return os.environ.get("FASTPREF_BACKEND") != "torch"


def test_past_twenty_the_weight_of_awr_is_bounded():
    loss, grad, _ = one(math.exp(-1.0), 100.0, loss_type="awr")
    assert (loss, grad) == pytest.approx((math.exp(20), -math.exp(20)), rel=1e-5)


def test_past_twenty_nats_the_estimates_are_bounded():
    logp = tokens(25.0, -30.0)
    found = ppo_policy_loss(logp=logp, old_logp=0 * logp, advantages=logp).metrics
    assert (found["approx_kl"].item(), found["ppo_kl"].item()) == (400, 0)


def test_a_reference_that_is_only_watched_may_be_anything():
    logp = tokens(-1.0, -2.0).requires_grad_()
    ref = tokens(-1.0, -math.inf)
    found = ppo_policy_loss(logp=logp, advantages=tokens(1.0, 1.0), ref_logp=ref, kl_estimator="k1")
    found.loss.backward()
    assert found.loss.item() == -2 and logp.grad.tolist() == [[-1.0, -1.0]]
    assert found.metrics["kl"].isinf()


@pytest.mark.parametrize("at", [0, 69])
def test_many_sequences(at):
    """More programs than are added up at once; the largest ratio in the first or the last."""
    x, mask = batch(70, 3)
    mask[:, 0] = True
    x["logp"][at, 0] = x["old_logp"][at, 0] + 3
    found = ppo_policy_loss(**x, mask=mask, loss_type="grpo", reduction="mean").metrics
    ratio = (x["logp"] - x["old_logp"]).double().exp()[mask]
    assert found["ratio_max"].item() == pytest.approx(math.exp(3), rel=1e-5)
    assert found["ratio"].item() == pytest.approx(ratio.mean().item(), rel=1e-5)


def test_programs_that_take_several_blocks(monkeypatch):
    monkeypatch.setattr(sequences, "_MAX_PROGRAMS", 2)
    x, mask = batch(3, 2050)
    found = ppo_policy_loss(**x, mask=mask)
    monkeypatch.undo()
    want = ppo_policy_loss(**wide(x), mask=mask)
    assert found.loss.item() == pytest.approx(want.loss.item(), rel=1e-4)
    for name, value in want.metrics.items():
        assert found.metrics[name].item() == pytest.approx(value.item(), rel=1e-5)


def test_more_tokens_than_a_thread_takes(quick):
    x, mask = batch(1, 80_001)
    found = gradients(lambda x: ppo_policy_loss(**x, mask=mask, kl_coef=0.1).loss, x)
    want = gradients(lambda x: ppo_policy_loss(**x, mask=mask, kl_coef=0.1).loss, wide(x))
    assert found["loss"].item() == pytest.approx(want["loss"].item(), rel=1e-5)
    torch.testing.assert_close(found["dlogp"].double(), want["dlogp"], rtol=1e-5, atol=1e-6)


def test_offsets_with_strides():
    x, mask = batch(1, 6)
    x = {k: v.flatten() for k, v in x.items()}
    cu = torch.tensor([0, 9, 2, 9, 6, 9], device=DEV)[::2]
    options = {"mask": mask.flatten(), "loss_type": "grpo"}
    found, want = (ppo_policy_loss(**x, cu_seqlens=c, **options) for c in (cu, cu.contiguous()))
    assert found.loss == want.loss and found.count == want.count


# masks and lengths
LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=5)


@settings(max_examples=12, deadline=None)
@given(
    lengths=LENGTHS,
    seed=st.integers(0, 999),
    mode=st.sampled_from(list(AGGREGATIONS)),
    loss_type=st.sampled_from(["ppo", "gspo", "cispo"]),
    of_sequences=st.booleans(),
)
def test_packed_is_padded_is_apart(lengths, seed, mode, loss_type, of_sequences):
    """With NaN where nothing counts; sums over calls are those of one."""
    T, B = max(max(lengths), 1), len(lengths)
    x, mask = batch(B, T, seed=seed)
    inside = (torch.arange(T) < torch.tensor(lengths)[:, None]).to(DEV)
    mask = mask & inside
    x = {k: v.where(mask, math.nan) for k, v in x.items()}
    each = torch.linspace(-1, 1, B, device=DEV)
    options = {"loss_type": loss_type, "loss_agg_mode": mode, "kl_coef": 0.1, "entropy_coef": 0.1}
    if mode.endswith("norm"):
        options["max_length"] = 7

    def padded(x, rows=slice(None)):
        x = {k: v[rows] for k, v in x.items()}
        if of_sequences:
            x["advantages"] = each[rows]
        return ppo_policy_loss(**x, mask=mask[rows], **options)

    def packed(x):
        cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device=DEV)
        x = {k: v[inside] for k, v in x.items()}
        if of_sequences and int(cu[-1]) != B:
            x["advantages"] = each
        elif of_sequences:  # as many tokens as sequences: read as one a token
            x["advantages"] = each.repeat_interleave(cu.diff())
        return ppo_policy_loss(**x, mask=mask[inside], cu_seqlens=cu, **options)

    want = gradients(lambda x: padded(x).loss, x)
    assert all(v.isfinite().all() for v in want.values())
    assert not want["dlogp"][~mask].any() and not want["dentropy"][~mask].any()
    found = gradients(lambda x: packed(x).loss, x)
    for name in want:
        torch.testing.assert_close(found[name], want[name], rtol=2e-5, atol=2e-5)
    whole, parts = padded(x), [padded(x, slice(b, b + 1)) for b in range(B)]
    torch.testing.assert_close(sum(p.loss for p in parts), whole.loss, rtol=2e-5, atol=2e-5)
    assert sum(p.count for p in parts) == whole.count
    dense = packed(x).metrics
    for name, total in whole.metrics.items():
        added = [p.metrics[name] for p in parts]
        added = max(added) if name == "ratio_max" else sum(added)
        torch.testing.assert_close(added, total, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(dense[name], total, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_nothing_that_counts(mode):
    x, mask = batch(2, 3)
    found = ppo_policy_loss(
        **x, mask=mask & False, loss_agg_mode=mode, kl_coef=1.0, reduction="mean"
    )
    assert not any(float(v) for v in (found.loss, *found.metrics.values()))
    none = torch.empty(0, 3, device=DEV)
    found = ppo_policy_loss(logp=none, advantages=none, loss_agg_mode=mode, reduction="mean")
    assert not found.loss


def test_lower_precision_comes_back_as_it_went():
    x, mask = batch(2, 9)
    low = {k: v.bfloat16() for k, v in x.items()}
    found = gradients(lambda x: ppo_policy_loss(**x, mask=mask).loss, low)
    assert found["loss"].dtype == torch.float32 and found["dlogp"].dtype == torch.bfloat16
    rounded = {k: v.float() for k, v in low.items()}
    want = gradients(lambda x: ppo_policy_loss(**x, mask=mask).loss, rounded)
    assert_same(
        {"loss": found["loss"], "dlogp": found["dlogp"]},
        {"loss": want["loss"], "dlogp": want["dlogp"].bfloat16()},
    )


@pytest.mark.parametrize("loss_type", ["ppo", "gspo", "cispo", "apa", "awr"])
@pytest.mark.parametrize("name", ["logp", "old_logp", "ref_logp", "advantages", "is_weight"])
def test_nan_in_a_token_that_counts_shows(loss_type, name):
    x, mask = batch(2, 9)
    mask[1, 2] = True
    x[name][1, 2] = math.nan
    read = {"apa": name != "old_logp", "awr": name != "old_logp"}.get(loss_type, True)
    found = ppo_policy_loss(**x, mask=mask, loss_type=loss_type, kl_coef=0.1)
    assert found.loss.isnan() == read
    if name in ("logp", "old_logp"):
        names = ("ratio", "ratio_max", "ppo_kl", "approx_kl")
        assert all(found.metrics[k].isnan() for k in names)
    grad = gradients(
        lambda x: ppo_policy_loss(**x, mask=mask, loss_type=loss_type, kl_coef=0.1).loss, x
    )["dlogp"]
    shared = loss_type == "gspo" and name in ("logp", "old_logp")  # the ratio of the sequence
    assert grad[1, 2].isnan() == read
    assert grad.isnan().sum() == read * (mask[1].sum() if shared else 1)


def test_who_reduces_the_count_changes_no_metric():
    x, mask = batch(2, 9, F64)
    found = ppo_policy_loss(**x, mask=mask)
    tokens = found.metrics["tokens"].item()
    found.count.mul_(2)
    assert found.metrics["tokens"].item() == tokens


def test_backward_scales_and_repeats():
    x, mask = batch(2, 9)
    logp = x.pop("logp").requires_grad_()
    loss = ppo_policy_loss(logp=logp, **x, mask=mask).loss
    first, third = (torch.autograd.grad(loss * s, logp, retain_graph=True)[0] for s in (1, 3))
    torch.testing.assert_close(third, 3 * first)
    with torch.no_grad():
        assert torch.equal(ppo_policy_loss(logp=logp, **x, mask=mask).loss, loss)


def test_a_second_derivative_is_refused():
    x, mask = batch(2, 9)
    logp = x.pop("logp").requires_grad_()
    loss = ppo_policy_loss(logp=logp, **x, mask=mask).loss
    (grad,) = torch.autograd.grad(loss**2, logp, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiat"):
        torch.autograd.grad(grad.sum(), logp)


def test_views_that_start_within_a_word():
    x, mask = batch(1, 300)
    cu = torch.tensor([0, 7, 100, 299], device=DEV)

    def loss(x, start):
        x = {k: v.flatten()[start:] for k, v in x.items()}
        at = mask.flatten()[start:]
        how = {"loss_agg_mode": "seq-mean-token-mean", "kl_coef": 0.1, "entropy_coef": 0.1}
        return ppo_policy_loss(**x, mask=at, cu_seqlens=cu, **how).loss

    apart = {k: v[:, 1:].clone() for k, v in x.items()}
    views = gradients(lambda x: loss(x, 1), x)
    mask = mask[:, 1:]
    copies = gradients(lambda x: loss(x, 0), apart)
    views = {k: v if k == "loss" else v[:, 1:] for k, v in views.items()}
    assert_same(views, copies)


# the op
def test_opcheck():
    x, mask = batch(2, 5)
    rows = [x[k].requires_grad_(k in ("logp", "entropy")) for k in NAMES]
    logp, old, ref, advantages, entropy, weight = rows
    numbers = (0.2, 0.2, 3.0, 1.0, 0.1, 0.1, "k3")
    args = (logp, advantages, old, mask, None, ref, entropy, weight)
    opcheck(policy_op, (*args, "clip", False, *numbers, False, False, True, True))
    cu = torch.tensor([0, 3, 10], device=DEV)
    flat = [a if a is None else a.detach().flatten() for a in args]
    flat[4], flat[0] = cu, flat[0].requires_grad_()
    opcheck(policy_op, (*flat, "clip", True, *numbers, True, True, True, False))


def test_torch_compile(backend):
    if backend == "triton":
        pytest.skip("as in the other backends")
    torch.compiler.reset()
    x, mask = batch(3, 9)

    def loss(x):
        found = ppo_policy_loss(**x, mask=mask, kl_coef=0.1, entropy_coef=0.1, reduction="mean")
        return found.loss + 0 * found.metrics["ratio"]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for name, found in gradients(compiled, x).items():
        torch.testing.assert_close(found, gradients(loss, x)[name])


def test_no_compilation_per_length(backend):
    if backend == "triton":
        pytest.skip("as in the other backends")
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def loss(logp):
        return ppo_policy_loss(logp=logp, advantages=logp.detach(), loss_type="dr_grpo").loss

    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for T in range(3, 12):
        logp = torch.randn(4, T, device=DEV)
        torch.testing.assert_close(compiled(logp), loss(logp))
    assert counter.frame_count <= 2  # the second knows that lengths differ


LOGP = torch.zeros(2, 3, device=DEV)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"loss_type": "pppo"}, ValueError, "need loss_type in ppo, .*; got 'pppo', nearest 'ppo'"),
        ({"loss_agg_mode": "mean"}, ValueError, "need loss_agg_mode in token-mean, .*got 'mean'"),
        ({"reduction": "none"}, ValueError, "need reduction sum or mean, got 'none'"),
        ({"kl_estimator": "k4"}, ValueError, r"need kl_estimator in k1, k2, k3, k3\+; got 'k4'"),
        ({"clip_low": -0.1}, ValueError, "need clip_low >= 0 and finite, got -0.1"),
        ({"clip_high": math.nan}, ValueError, "need clip_high >= 0 and finite, got nan"),
        ({"kl_coef": math.inf}, ValueError, "need kl_coef >= 0 and finite, got inf"),
        ({"kl_coef": 0.1}, ValueError, "need ref_logp for kl_coef 0.1, got None"),
        ({"entropy_coef": 0.1}, ValueError, "need entropy for entropy_coef 0.1, got None"),
        ({"loss_type": "apa"}, ValueError, "need ref_logp for apa, got None"),
        ({"logp": None}, TypeError, "need a tensor for logp, got NoneType"),
        ({"dual_clip": 1.0}, ValueError, "need dual_clip > 1, got 1.0"),
        ({"dual_clip": 3.0, "loss_type": "cispo"}, ValueError, "'cispo' has no dual_clip, got 3.0"),
        ({"temperature": 1.0}, ValueError, "'ppo' has no temperature, got 1.0"),
        ({"temperature": 0.0, "loss_type": "awr"}, ValueError, "need temperature > 0, got 0"),
        ({"clip_low": 0.1, "loss_type": "apa"}, ValueError, "'apa' has no clip_low, got 0.1"),
        ({"logp": LOGP[0]}, ValueError, r"\(T,\) with cu_seqlens, got \(3,\) without them"),
        ({"advantages": 1.0}, TypeError, "need a tensor for advantages, got float"),
        ({"mask": LOGP.int() - 100}, ValueError, "need a mask of 0 and 1, got -100 to -100"),
        ({"max_length": 8}, ValueError, "need max_length None but for seq-mean-token-sum-norm"),
        ({"loss_type": "dr_grpo", "max_length": 0}, ValueError, "need max_length positive, got 0"),
        ({"advantages": LOGP[0]}, ValueError, r"need advantages \(B,\) = \(2,\), got \(3,\)"),
        ({"advantages": LOGP[:, 1:]}, ValueError, "need advantages like logp"),
        ({"old_logp": LOGP[:1]}, ValueError, r"need old_logp like logp, \(2, 3\), got \(1, 3\)"),
        ({"mask": LOGP}, TypeError, "need a bool or integer mask, got torch.float32"),
        ({"logp": LOGP.long()}, TypeError, "need floating-point logp, got torch.int64"),
        (
            {"old_logp": LOGP.clone().requires_grad_()},
            ValueError,
            r"need old_logp without gradient \(old_logp.detach\(\)\), got one with",
        ),
        (
            {"is_weight": LOGP.clone().requires_grad_()},
            ValueError,
            "need is_weight without gradient",
        ),
        ({"mask": LOGP + 0j}, TypeError, "need a bool or integer mask, got torch.complex64"),
        ({"old_logp": LOGP.to("meta")}, ValueError, "need old_logp on .*, got meta"),
        (
            {"loss_type": "dr_grpo", "max_length": math.inf},
            ValueError,
            "need max_length positive, got inf",
        ),
        (
            {"advantages": LOGP.clone().requires_grad_()},
            ValueError,
            "need advantages without gradient",
        ),
    ],
)
def test_what_is_refused(change, error, message):
    with pytest.raises(error, match=message):
        ppo_policy_loss(**{"logp": LOGP, "advantages": LOGP, **change})


def test_a_norm_of_packed_tokens_must_be_told():
    flat, cu = LOGP.flatten(), torch.tensor([0, 2, 6], device=DEV)
    with pytest.raises(ValueError, match="need max_length for seq-mean-token-sum-norm of packed"):
        ppo_policy_loss(logp=flat, advantages=flat, cu_seqlens=cu, loss_type="dr_grpo")
