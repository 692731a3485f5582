"""Advantages, KL-shaped rewards and whitening: by hand, against fp64, on any mask and length."""

import math
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from compare import assert_no_worse, assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from fastpref import gae, ppo_advantages, token_moments, token_rewards, whiten
from fastpref.kernels import whiten as whitening
from fastpref.kernels.gae import _op, gae_ref, kl_estimate

DEV = "cuda" if torch.cuda.is_available() else "cpu"
F64 = torch.float64
# FORMULAS.md, section 4
VALUES = torch.tensor([[0.5, 0.4, 0.3]], device=DEV)
RATIOS = torch.tensor([[0.1, -0.2, 0.05]], device=DEV)
SCORE = torch.ones(1, device=DEV)


def near(x, want, abs=1.5e-6):
    assert x.flatten().tolist() == pytest.approx(want, abs=abs)


def shaped(**options):
    inputs = {"scores": SCORE, "logp": RATIOS, "ref_logp": 0 * RATIOS, "values": VALUES}
    return ppo_advantages(**{**inputs, **options})


# by hand
@pytest.mark.parametrize(
    ("lam", "want"), [(0.95, [0.438994, 0.572625, 0.6975]), (1.0, [0.5025, 0.6075, 0.6975])]
)
def test_gae_of_three_tokens(lam, want):
    found = shaped(lam=lam)
    near(found.advantages, want)
    near(found.returns, [a + v for a, v in zip(want, [0.5, 0.4, 0.3], strict=True)])
    rewards = torch.tensor([[-0.005, 0.01, 0.9975]], device=DEV)
    plain = gae(rewards=rewards, values=VALUES, lam=lam)
    near(plain[0], want)
    near(plain[1], found.returns.flatten().tolist())


@pytest.mark.parametrize(
    ("unbiased", "want"),
    [(True, [-1.011097, 0.022577, 0.988520]), (False, [-1.238336, 0.027651, 1.210684])],
    ids=["trl", "openrlhf"],
)
def test_whitening_of_three_tokens(unbiased, want):
    found = shaped()
    near(whiten(found.advantages, found.moments, unbiased=unbiased), want, abs=4e-6)
    near(whiten(found.advantages, token_moments(found.advantages), unbiased=unbiased), want, 4e-6)


def test_reinforce_plus_plus_of_three_tokens():
    found = shaped(values=None, lam=0.5)
    near(found.advantages, [1.0025, 1.0075, 0.9975])
    assert torch.equal(found.advantages, found.returns)


def test_rto_of_three_tokens():
    """Its token rewards, with a discount of 0 as the advantages."""
    dpo = torch.tensor([[0.4, -0.9, 2.0]], device=DEV)
    rewards = token_rewards(dpo, 0 * dpo, beta=0.05, clip=0.05)
    found = shaped(values=None, rewards=rewards, kl_coef=0.01, gamma=0.0)
    near(found.advantages, [0.019, -0.043, 1.0495])


@pytest.mark.parametrize(
    ("estimator", "want"),
    [("k1", [0.1, -0.2]), ("k2", [0.005, 0.02]), ("k3", [0.004837, 0.021403])],
)
def test_kl_estimates(estimator, want):
    d = torch.tensor([[0.1, -0.2]], device=DEV)
    near(kl_estimate(d, estimator), want, abs=5e-7)
    found = shaped(
        scores=None,
        logp=d,
        ref_logp=0 * d,
        values=None,
        kl_coef=1.0,
        kl_estimator=estimator,
        gamma=0,
    )
    near(found.advantages, [-k for k in want], abs=5e-7)
    assert float(found.metrics["non_score_reward"]) == pytest.approx(-sum(want), abs=1e-6)


def test_without_a_reference_and_with_answers_that_are_right():
    plain = shaped(ref_logp=None, kl_coef=0.0, scores=SCORE.bool())
    want = shaped(kl_coef=0.0)
    assert torch.equal(plain.advantages, want.advantages)
    assert not plain.metrics["kl"] and torch.equal(plain.moments, want.moments)


def test_who_reduces_moments_changes_no_metric():
    found = shaped()
    kept = {name: float(x) for name, x in found.metrics.items()}
    found.moments.mul_(2)
    assert {name: float(x) for name, x in found.metrics.items()} == kept


@pytest.mark.parametrize("name", ["logp", "ref_logp", "values", "scores"])
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_nan_in_a_token_that_counts_shows(name, estimator):
    x = {"logp": RATIOS, "ref_logp": 0 * RATIOS, "values": VALUES, "scores": SCORE}
    x[name] = x[name].clone()
    x[name].view(-1)[-1] = math.nan
    found = ppo_advantages(**x, kl_estimator=estimator)
    assert found.advantages.isnan().all() and found.moments[1:].isnan().all()
    assert whiten(found.advantages, found.moments).isnan().all()


def test_past_twenty_nats_k3_is_bounded():
    d = torch.tensor([[-30.0]], device=DEV)
    found = shaped(scores=None, logp=d, ref_logp=0 * d, values=None, kl_estimator="k3", kl_coef=1.0)
    assert found.advantages.item() == pytest.approx(20 - math.expm1(20), rel=1e-5)


def test_eps_is_under_the_root():
    x = torch.tensor([[0.0, 2e-4]], dtype=F64, device=DEV)
    near(whiten(x, token_moments(x), eps=1e-8), [-(0.5**0.5), 0.5**0.5], abs=1e-9)


def test_offsets_with_strides():
    x = {k: v.flatten() for k, v in batch(1, 6, kept=2).items() if k in ("rewards", "values")}
    cu = torch.tensor([0, 9, 2, 9, 6, 9], device=DEV)[::2]
    both = (named(*gae(**x, cu_seqlens=c)) for c in (cu, cu.contiguous()))
    assert_same(*both)


def test_metrics_are_sums_over_the_batch():
    x = torch.tensor([[0.1, -0.2, 9.0], [9.0, 9.0, 9.0], [0.5, 9.0, 9.0]], device=DEV)
    mask = x < 9
    scores = torch.tensor([1.0, 7.0, -0.25], device=DEV)
    found = shaped(scores=scores, logp=x, ref_logp=0 * x, values=0 * x, mask=mask, kl_coef=0.1)
    want = {"tokens": 3, "sequences": 2, "kl": 0.4, "scores": 0.75}
    want |= {"non_score_reward": -0.04, "rlhf_reward": 0.71}
    assert {k: float(v) for k, v in found.metrics.items()} == pytest.approx(want, abs=1e-6)


# against the definition
def batch(B, T, dtype=torch.float32, seed=0, kept=0.7):
    gen = torch.Generator().manual_seed(seed)
    x = {name: torch.randn(B, T, generator=gen).to(dtype) for name in ("rewards", "values")}
    x["bootstrap"] = torch.randn(B, generator=gen).to(dtype)
    x["mask"] = torch.rand(B, T, generator=gen) < kept
    return {k: v.to(DEV) for k, v in x.items()}


def named(advantages, returns):
    return {"advantages": advantages, "returns": returns}


SHAPES = [(1, 1), (3, 2), (2, 127), (2, 1025), (1, 4099)]


@pytest.mark.parametrize("kept", [0.7, 1.1], ids=["gaps", "whole"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_worse_than_torch(shape, kept):
    x = batch(*shape, kept=kept)
    mask = None if kept > 1 else x["mask"]
    ours = gae(**{**x, "mask": mask}, gamma=0.99, lam=0.9)
    order = ("rewards", "values", "mask", "bootstrap")
    wide = [x[k] if k == "mask" else x[k].double() for k in order]
    torchs, truth = (gae_ref(*args, 0.99, 0.9) for args in ([x[k] for k in order], wide))
    assert_no_worse(named(*ours), named(*torchs), named(*truth))
    packed = torch.arange(0, x["mask"].numel() + 1, shape[1], device=DEV)
    flat = {k: v if k == "bootstrap" or v is None else v.flatten() for k, v in x.items()}
    flat["mask"] = None if mask is None else flat["mask"]
    again = gae(**flat, cu_seqlens=packed, gamma=0.99, lam=0.9)
    assert_no_worse(*(named(*(y.view(shape) for y in z)) for z in (again, torchs, truth)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, F64])
def test_dtypes(dtype):
    x = batch(3, 20, dtype)
    found = gae(**x)
    wide = gae(**{k: v if k == "mask" else v.double() for k, v in x.items()})
    assert {y.dtype for y in found} == {F64 if dtype == F64 else torch.float32}
    for ours, truth in zip(found, wide, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("T", [37, 2600])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_shaped_rewards_are_gae_of_rewards_made_by_hand(estimator, T):
    x = batch(4, T)
    y = batch(4, T, seed=1)
    x["mask"][2] = False
    x["mask"][1, 30:] = False  # of many tokens, blocks before the last that counts
    x["mask"][0, -1] = True  # the end of the sequence was never sampled
    logp, ref, extra = y["rewards"], y["values"], x["rewards"]
    scores = torch.tensor([1.0, -2.0, 5.0, 0.5], device=DEV)
    found = ppo_advantages(
        scores=scores,
        logp=logp,
        ref_logp=ref,
        rewards=extra,
        kl_coef=0.3,
        kl_estimator=estimator,
        **{k: x[k] for k in ("values", "mask", "bootstrap")},
    )
    rewards = (extra - 0.3 * kl_estimate(logp - ref, estimator)).double()
    for b, row in enumerate(x["mask"].tolist()):
        last = max((t for t, keep in enumerate(row) if keep), default=None)
        if last is not None:
            rewards[b, last] += scores[b]
    want = gae(**{**x, "rewards": rewards})
    for ours, truth in zip((found.advantages, found.returns), want, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=2e-5, atol=1e-4)
    moments = token_moments(want[0], mask=x["mask"])
    torch.testing.assert_close(found.moments, moments, rtol=1e-4, atol=1e-2)
    kl = (logp - ref).double()[x["mask"]].sum().item()
    assert found.metrics["kl"].item() == pytest.approx(kl, rel=1e-4, abs=1e-3)
    penalty = 0.3 * kl_estimate(logp - ref, estimator).double()[x["mask"]].sum().item()
    assert found.metrics["non_score_reward"].item() == pytest.approx(-penalty, rel=1e-4, abs=1e-3)


# masks and lengths
LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=5)


@settings(max_examples=25, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 999), shape=st.booleans())
def test_sequences_know_nothing_of_each_other(lengths, seed, shape):
    """Padded or packed, with NaN where nothing counts: as each alone without what is masked."""
    T, B = max(max(lengths), 1), len(lengths)
    x = batch(B, T, F64, seed)
    inside = torch.arange(T) < torch.tensor(lengths)[:, None]
    keep = x["mask"].cpu() & inside
    poisoned = {k: x[k].where(keep.to(DEV), math.nan) for k in ("rewards", "values")}
    options = {"bootstrap": x["bootstrap"], "gamma": 0.9, "lam": 0.8}
    if shape:
        found = gae(**poisoned, mask=keep.to(DEV).int(), **options)
    else:
        cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device=DEV)
        flat = {k: v[inside] for k, v in poisoned.items()}
        packed = gae(**flat, mask=keep[inside].to(DEV), cu_seqlens=cu, **options)
        found = [torch.zeros_like(x["values"]) for _ in packed]
        for out, part in zip(found, packed, strict=True):
            out[inside] = part
    for b in range(B):
        rows = {k: x[k][b, keep[b]][None] for k in ("rewards", "values")}
        alone = gae(**rows, **{**options, "bootstrap": x["bootstrap"][b : b + 1]})
        for ours, want in zip(found, alone, strict=True):
            torch.testing.assert_close(ours[b, keep[b]], want[0], rtol=1e-9, atol=1e-12)
            assert not ours[b, ~keep[b]].any()


def test_a_bootstrap_is_worth_a_token_that_earns_its_value():
    x = batch(3, 6, kept=2)
    end = x.pop("bootstrap")
    want = gae(**x, bootstrap=end, gamma=0.9)
    longer = {k: torch.cat([x[k], end[:, None]], 1) for k in ("rewards", "values")}
    found = gae(**longer, gamma=0.9)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a[:, :-1], b)


def test_strided_inputs_and_constants():
    x = batch(3, 8)
    apart = {k: v.repeat_interleave(2, -1)[..., ::2] for k, v in x.items()}
    assert_same(named(*gae(**apart)), named(*gae(**x)))
    leaf = x["values"].requires_grad_()
    assert not gae(**{**x, "values": leaf})[0].requires_grad


def test_no_tokens():
    none = torch.empty(0, device=DEV)
    for ends in ([0], [0, 0]):
        found = gae(rewards=none, values=none, cu_seqlens=torch.tensor(ends, device=DEV))
        assert [y.shape for y in found] == [(0,)] * 2
    flat = torch.empty(2, 0, device=DEV)
    found = ppo_advantages(scores=torch.ones(2, device=DEV), logp=flat, ref_logp=flat, values=flat)
    assert not any(map(float, found.metrics.values()))
    assert whiten(found.advantages, found.moments).shape == (2, 0)


# whitening
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("size", [1, 1023, 5001])
@pytest.mark.parametrize("unbiased", [False, True])
def test_whitened_tokens(dtype, size, unbiased):
    x = batch(1, size, dtype)
    x["mask"][0, 0] = True
    values = (100 + 3 * x["values"]).where(x["mask"], math.nan)
    found = whiten(values, token_moments(values, mask=x["mask"]), mask=x["mask"], unbiased=unbiased)
    assert not found[~x["mask"]].any()
    kept = found[x["mask"]].double()
    if len(kept) == 1:
        assert kept.item() == 0
    else:
        of = kept.std(correction=int(unbiased)).item()
        assert (kept.mean().item(), of) == pytest.approx((0, 1), abs=1e-4)


@pytest.mark.parametrize("T", [5, 700, 2500])
def test_moments_far_from_zero(T):
    """Advantages of 1000 that differ by a tenth keep their variance."""
    x = batch(6, T)
    x["mask"][:, -1] = True
    models = {"logp": x["rewards"], "ref_logp": 0 * x["rewards"]}
    scores = torch.full((6,), 1000.0, device=DEV)
    found = ppo_advantages(scores=scores, values=None, kl_coef=0.1, mask=x["mask"], **models)
    n, total, squares = found.moments.tolist()
    want = found.advantages[x["mask"]].double().var(correction=0).item()
    assert squares / n - (total / n) ** 2 == pytest.approx(want, rel=1e-4)


def test_moments_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"need mask like x, \(6, 1\), got \(1, 6\)"):
        token_moments(torch.ones(6, 1), mask=torch.ones(1, 6, dtype=torch.bool))


def test_equal_advantages_are_whitened_to_zero():
    x = torch.full((2, 5), 0.1, device=DEV)
    assert whiten(x, token_moments(x)).abs().max() < 1e-3


def _whiten_rank(rank, folder, results):
    file = f"file://{folder}/store"
    dist.init_process_group("gloo", file, timedelta(seconds=60), 2, rank)
    x = batch(4, 50, F64)
    mine = [0] if rank == 0 else [1, 2, 3]
    options = {k: x[k][mine] for k in ("values", "mask", "bootstrap")}
    logp = x["rewards"][mine]
    found = ppo_advantages(scores=None, logp=logp, ref_logp=0 * logp, **options)
    dist.all_reduce(found.moments)
    results[rank] = whiten(found.advantages, found.moments, mask=options["mask"], unbiased=True)
    dist.destroy_process_group()


@pytest.mark.dist
@pytest.mark.skipif(DEV == "cuda", reason="gloo, with tensors on the CPU")
def test_two_ranks_whiten_as_one(tmp_path, backend):
    if backend != "cpp":
        pytest.skip("once is enough")
    x = batch(4, 50, F64)
    logp = x.pop("rewards")
    found = ppo_advantages(scores=None, logp=logp, ref_logp=0 * logp, **x)
    want = whiten(found.advantages, found.moments, mask=x["mask"], unbiased=True)
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        context = torch.multiprocessing.spawn(
            _whiten_rank, (str(tmp_path), results), nprocs=2, join=False
        )
        assert context.join(timeout=90) or context.join(timeout=30)
        both = torch.cat([results[0], results[1]])
    torch.testing.assert_close(both, want, rtol=1e-12, atol=1e-12)


# the ops
def op_inputs(dtype=torch.float32):
    x = batch(2, 5, dtype)
    rows = (x["rewards"], x["values"], x["values"], x["rewards"], x["bootstrap"], x["mask"], None)
    return *rows, x["bootstrap"], 0.9, 0.8, 0.1, "k3"


def test_opcheck():
    opcheck(_op, op_inputs())
    x = batch(2, 5)
    opcheck(whitening._op, (x["values"], x["mask"], token_moments(x["values"]), True, 1e-8))


def test_torch_compile(backend):
    if backend == "triton":
        pytest.skip("as in the other backends")
    torch.compiler.reset()

    def both(x):
        found = ppo_advantages(
            scores=x["bootstrap"], logp=x["rewards"], ref_logp=x["values"], values=x["values"]
        )
        return whiten(found.advantages, found.moments), found.metrics["kl"]

    x = batch(3, 9)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for ours, want in zip(compiled(x), both(x), strict=True):
        torch.testing.assert_close(ours, want)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"values": VALUES[0]}, ValueError, r"need values like rewards, \(1, 3\), got \(3,\)"),
        (
            {"values": VALUES[:, :2]},
            ValueError,
            r"need values like rewards, \(1, 3\), got \(1, 2\)",
        ),
        ({"mask": VALUES}, TypeError, "need a bool or integer mask, got torch.float32"),
        ({"bootstrap": VALUES[0]}, ValueError, r"need bootstrap \(B,\) = \(1,\), got \(3,\)"),
        ({"values": VALUES.long()}, TypeError, "need floating-point values, got torch.int64"),
        ({"gamma": 1.1}, ValueError, r"need gamma in \[0, 1\], got 1.1"),
        ({"lam": math.nan}, ValueError, r"need lam in \[0, 1\], got nan"),
        (
            {"cu_seqlens": torch.tensor([0, 3])},
            ValueError,
            r"cu_seqlens, got \(1, 3\) with them",
        ),
        ({"values": None}, TypeError, "need a tensor for values, got NoneType"),
        ({"rewards": [1.0]}, TypeError, "need a tensor for rewards, got list"),
        ({"mask": torch.full((1, 3), 2)}, ValueError, "need a mask of 0 and 1, got 2 to 2"),
    ],
)
def test_gae_refuses(change, error, message):
    with pytest.raises(error, match=message):
        gae(**{"rewards": VALUES, "values": VALUES, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kl_estimator": "k4"}, ValueError, "need kl_estimator in k1, k2, k3; got 'k4'"),
        ({"kl_estimator": "k3+"}, ValueError, "need kl_estimator in k1, k2, k3; got 'k3"),
        ({"kl_coef": -1}, ValueError, "need kl_coef >= 0 and finite, got -1"),
        ({"kl_coef": SCORE}, TypeError, "need a number for kl_coef, got a tensor"),
        ({"ref_logp": None}, ValueError, "need ref_logp for kl_coef 0.05, got None"),
        ({"logp": None}, TypeError, "need a tensor for logp, got NoneType"),
        ({"gamma": -0.1}, ValueError, r"need gamma in \[0, 1\], got -0.1"),
        ({"lam": 1.5}, ValueError, r"need lam in \[0, 1\], got 1.5"),
        ({"kl_coef": math.inf}, ValueError, "need kl_coef >= 0 and finite, got inf"),
        ({"scores": VALUES}, ValueError, r"need scores \(B,\) = \(1,\), got \(1, 3\)"),
        ({"ref_logp": VALUES[:, 1:]}, ValueError, "need ref_logp like logp"),
    ],
)
def test_shaping_refuses(change, error, message):
    with pytest.raises(error, match=message):
        shaped(**change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"moments": torch.ones(3)},
            ValueError,
            r"need moments \(3,\) fp64, got \(3,\) torch.float32",
        ),
        ({"mask": VALUES[0] > 0}, ValueError, r"need mask like advantages, \(1, 3\), got \(3,\)"),
        ({"eps": -1.0}, ValueError, "need eps >= 0 and finite, got -1.0"),
        (
            {"moments": torch.ones(3, dtype=F64, device="meta")},
            ValueError,
            "need moments on .*, got meta",
        ),
        ({"eps": 0.0}, ValueError, "need eps > 0, got 0"),
        ({"advantages": VALUES.long()}, TypeError, "need floating-point advantages"),
    ],
)
def test_whitening_refuses(change, error, message):
    moments = torch.ones(3, dtype=F64, device=DEV)
    with pytest.raises(error, match=message):
        whiten(**{"advantages": VALUES, "moments": moments, **change})


@pytest.mark.skipif(DEV == "cuda", reason="not checked there")
def test_offsets_that_do_not_rise_are_refused():
    flat = VALUES[0]
    with pytest.raises(ValueError, match=r"need cu_seqlens rising from 0 to 3, got \[0, 2\]"):
        gae(rewards=flat, values=flat, cu_seqlens=torch.tensor([0, 2]))
