"""Losses of single completions: values worked by hand, gradients, and what is refused."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref import bco_loss, kto_loss, mismatched_kl

F64 = torch.float64
# l = 1 labelled good, l = -0.5 labelled bad
LOGPS, REFS = torch.tensor([-4.0, -7.0], dtype=F64), torch.tensor([-5.0, -6.5], dtype=F64)
LABELS = torch.tensor([True, False])


def softplus(x):
    return math.log1p(math.exp(x))


def s(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({"kl": 0.2}, [0.480011, 0.482507]),
        ({"kl": torch.tensor(0.2)}, [0.480011, 0.482507]),
        ({"kl": 0.0}, [s(-0.1), s(-0.05)]),
        ({"kl": None}, [s(-0.1), s(-0.05)]),
        ({"kl": 0.2, "desirable_weight": 2.0}, [2 * 0.480011, 0.482507]),
        ({"kl": 0.2, "undesirable_weight": 1.5}, [0.480011, 1.5 * 0.482507]),
        ({"kl": 0.2, "beta": 0.5}, [s(-0.4), s(-0.35)]),
    ],
)
def test_kto(options, want):
    out = kto_loss(LOGPS, REFS, LABELS, **options)
    assert out.losses.tolist() == pytest.approx(want, abs=1e-6)
    beta = options.get("beta", 0.1)
    assert out.rewards.tolist() == pytest.approx([beta, -beta / 2])
    low = kto_loss(LOGPS.bfloat16(), REFS.bfloat16(), LABELS, **options).losses
    assert low.dtype == torch.float32 and low.tolist() == pytest.approx(want, rel=0.01)


def test_kto_as_halos_has_it():
    """A batch of four, each prompt with the next row's completion for the KL; sums by hand."""
    logps, refs = [-3.0, -6.0, -5.0, -2.0], [-4.0, -5.0, -5.5, -2.5]
    other, ref_other = [-9.0, -8.0, -7.0, -9.5], [-9.5, -8.5, -7.8, -9.1]
    z = max(0.0, sum(a - b for a, b in zip(other, ref_other, strict=True)) / 4)
    assert z == pytest.approx(0.35)
    good = [True, False, False, True]
    want = [
        1 - s(0.1 * ((a - b) - z)) if label else 1 - s(0.1 * (z - (a - b)))
        for a, b, label in zip(logps, refs, good, strict=True)
    ]
    kl = mismatched_kl(torch.tensor(other), torch.tensor(ref_other))
    out = kto_loss(torch.tensor(logps), torch.tensor(refs), torch.tensor(good), kl=kl)
    assert out.losses.tolist() == pytest.approx(want, abs=1e-6)


def test_the_kl_is_never_negative_and_detached():
    x = torch.tensor([-3.0, -2.0], requires_grad=True)
    assert mismatched_kl(x, torch.tensor([-1.0, -1.0])) == 0
    kl = mismatched_kl(x, torch.tensor([-4.0, -4.0]))
    assert kl == 1.5 and not kl.requires_grad
    assert mismatched_kl(x.bfloat16(), torch.tensor([-4.0, -4.0]).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({"delta": 0.02}, [softplus(-0.08), softplus(-0.07)]),
        ({}, [softplus(-0.075), softplus(-0.075)]),  # the mean reward is 0.025
        (
            {"delta": 0.02, "weight": torch.tensor([1.0, 3.0])},
            [softplus(-0.08), 3 * softplus(-0.07)],
        ),
    ],
)
def test_bco(options, want):
    out = bco_loss(LOGPS, REFS, LABELS, **options)
    assert out.losses.tolist() == pytest.approx(want, abs=1e-6)
    assert sum(softplus(x) for x in (-0.08, -0.07)) == pytest.approx(1.312707, abs=1e-6)


@pytest.mark.parametrize("loss", [kto_loss, bco_loss])
def test_gradients(loss):
    gen = torch.Generator().manual_seed(0)
    x, ref = (torch.randn(6, generator=gen, dtype=F64) for _ in range(2))
    labels = torch.tensor([1.0, 0, 0, 1, 1, 0])
    constant = {"kl": 0.3} if loss is kto_loss else {"delta": 0.1}
    fn = lambda x: loss(x, ref, labels, beta=0.7, **constant).losses  # noqa: E731
    assert torch.autograd.gradcheck(fn, x.requires_grad_())
    out = loss(x, ref, labels, beta=0.7, **constant)
    assert not out.rewards.requires_grad
    grad = torch.autograd.grad(out.losses.sum(), x)[0]
    assert ((grad < 0) == (labels == 1)).all()  # good ones rise
    if loss is bco_loss:  # its own shift is a constant too
        rewards = 0.7 * (x - ref).detach()
        told = bco_loss(x, ref, labels, beta=0.7, delta=rewards.mean()).losses.sum()
        own = bco_loss(x, ref, labels, beta=0.7).losses.sum()
        assert torch.equal(*(torch.autograd.grad(y, x)[0] for y in (told, own)))


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(1, 20),
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([0.0, 1.0, 1e3, 1e6]),
    kl=st.sampled_from([0.0, 0.5, 1e4]),
)
def test_any_batch_is_finite(count, seed, scale, kl):
    gen = torch.Generator().manual_seed(seed)
    x = (scale * torch.randn(count, generator=gen)).requires_grad_()
    labels = torch.randint(2, (count,), generator=gen)
    for out in (kto_loss(x, 0 * x.detach(), labels, kl=kl), bco_loss(x, 0 * x.detach(), labels)):
        assert torch.isfinite(out.losses).all() and (out.losses >= 0).all()
        assert torch.isfinite(torch.autograd.grad(out.losses.sum(), x)[0]).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda x: kto_loss(*x, kl=torch.ones(2, 1)),
            ValueError,
            r"number or 0-d kl, got \(2, 1\)",
        ),
        (lambda x: bco_loss(*x, delta=torch.ones(2)), ValueError, r"or 0-d delta, got \(2,\)"),
        (
            lambda x: bco_loss(*x, weight=torch.ones(2, 1)),
            ValueError,
            r"need weight \(B,\) = \(2,\)",
        ),
        (
            lambda x: kto_loss(*x, kl=0.0, desirable_weight=-1.0),
            ValueError,
            "of at least 0, got -1",
        ),
        (lambda x: mismatched_kl(x[0], x[1][:1]), ValueError, r"need ref_logps \(B,\) = \(2,\)"),
        (lambda x: mismatched_kl(x[0][:0], x[1][:0]), ValueError, "at least one completion"),
        (lambda x: kto_loss(x[0], None, x[2], kl=0.0), TypeError, "tensor for ref_logps, got None"),
    ],
)
def test_what_would_broadcast_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call((LOGPS, REFS, LABELS))


@pytest.mark.parametrize("loss", [lambda *x, **k: kto_loss(*x, kl=0.1, **k), bco_loss])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ref_logps": torch.zeros(3)}, ValueError, r"need ref_logps \(B,\) = \(2,\), got \(3,\)"),
        ({"labels": torch.zeros(2, 1)}, ValueError, r"need labels \(B,\) = \(2,\), got \(2, 1\)"),
        ({"logps": torch.tensor([1, 2])}, TypeError, "need floating-point logps, got torch.int64"),
        ({"beta": 0.0}, ValueError, "need beta > 0, got 0.0"),
        ({"beta": float("inf")}, ValueError, "need beta > 0, got inf"),
    ],
)
def test_refuses(loss, change, error, message):
    given = {"logps": LOGPS, "ref_logps": REFS, "labels": LABELS, **change}
    inputs = [given.pop(name) for name in ("logps", "ref_logps", "labels")]
    with pytest.raises(error, match=message):
        loss(*inputs, **given)
