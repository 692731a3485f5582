"""logp_from_logits against plain torch in fp64, forward and backward."""

import math

import pytest
import torch
from compare import assert_no_worse, assert_same
from torch.library import opcheck

import fastpref.kernels.logp_from_logits as module
from fastpref.kernels.logp_from_logits import (
    _op,
    logp_from_logits,
    logp_stats_from_logits,
    stats_from_logits_ref,
)

DEV = "cuda" if torch.cuda.is_available() else "cpu"


def make(*shape, V=129, dtype=torch.float32, scale=3.0):
    gen = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(*shape, V, generator=gen)
    target = torch.randint(V, shape, generator=gen)
    target.view(-1)[1::3] = -100
    return logits.to(DEV, dtype), target.to(DEV)


def run(fn, logits, target, **options):
    x = logits.detach().requires_grad_()
    stats = fn(x, target, **options)
    gen = torch.Generator().manual_seed(7)
    g, h = (torch.randn(target.shape, generator=gen).to(DEV) for _ in range(2))
    ((stats.logp * g).sum() + (stats.entropy * h).sum()).backward()
    out = {k: v.detach() for k, v in stats._asdict().items() if k != "is_top1"}
    return out | {"dlogits": x.grad, "is_top1": stats.is_top1.to(out["logp"].dtype)}


@pytest.fixture(params=[1 << 19, 100], ids=["one tile", "many tiles"])
def tile(request, monkeypatch):
    monkeypatch.setattr(module, "_TILE", request.param)


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "V"), [((1,), 1), ((15,), 9), ((7,), 129), ((2, 3), 5003)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_no_worse_than_torch(shape, V, dtype, temperature):
    logits, target = make(*shape, V=V, dtype=dtype)
    assert_no_worse(
        run(logp_stats_from_logits, logits, target, temperature=temperature),
        run(stats_from_logits_ref, logits, target, temperature=temperature),
        run(stats_from_logits_ref, logits.double(), target, temperature=temperature),
    )


@pytest.mark.usefixtures("tile")
def test_strided_views_are_read_in_place():
    logits, target = make(3, 5, V=72)  # whole words: sums do not depend on where a row starts
    want = run(logp_stats_from_logits, logits[:, :-1].contiguous(), target[:, 1:])
    assert_same(run(logp_stats_from_logits, logits[:, :-1], target[:, 1:]), want)
    turned = logits.transpose(0, 1).contiguous().transpose(0, 1)
    got = run(logp_stats_from_logits, turned[:, :-1], target[:, 1:])
    torch.testing.assert_close(got, want)


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_start_inside_a_word(dtype):
    base, target = make(4, 5, V=71, dtype=dtype)
    cuts = [lambda x: x[:, 1:], lambda x: x[1:, ::2], lambda x: x[:, 1:, 1:70], lambda x: x[1, 2:]]
    for cut in cuts:
        logits, y = cut(base), cut(target[..., None].expand_as(base))[..., 0]
        y = torch.where(y < logits.shape[-1], y, 0)
        got = run(logp_stats_from_logits, logits, y)
        torchs = run(stats_from_logits_ref, logits, y)
        assert_no_worse(got, torchs, run(stats_from_logits_ref, logits.double(), y))


@pytest.mark.usefixtures("tile")
def test_gradcheck():
    logits, target = make(3, V=150, dtype=torch.float64)

    def fn(x):
        return logp_stats_from_logits(x, target, outputs=("entropy",), temperature=0.7)[:2]

    assert torch.autograd.gradcheck(fn, logits.requires_grad_())


@pytest.mark.usefixtures("tile")
def test_block_of_minus_inf():
    logits, _ = make(2, V=900)
    logits[:, :800] = float("-inf")
    target = torch.tensor([850, 899], device=DEV)
    got = run(logp_stats_from_logits, logits, target)
    want = run(stats_from_logits_ref, logits[:, 800:], target - 800)
    want["dlogits"] = torch.nn.functional.pad(want["dlogits"], (800, 0))
    want["mean_logit"] = torch.full_like(want["mean_logit"], float("-inf"))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_padding_may_hold_nan():
    logits, target = make(6)
    clean = run(logp_stats_from_logits, logits, target)
    logits[target == -100] = float("nan")
    assert_same(run(logp_stats_from_logits, logits, target), clean)
    assert not clean["dlogits"][target == -100].any()


def test_the_gradient_can_replace_the_logits():
    base, target = make(2, 5)
    want = torch.autograd.grad(logp_from_logits(leaf := base.requires_grad_(), target).sum(), leaf)[
        0
    ]
    logits = leaf * 1
    logp = logp_from_logits(logits, target, inplace_backward=True)
    got = torch.autograd.grad(logp.sum(), leaf, retain_graph=True)[0]
    assert torch.equal(got, want)
    assert torch.equal(logits, want)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logp.sum().backward()
    for shared in (logits[:1].expand(2, 5, -1), torch.zeros(60, device=DEV).unfold(0, 9, 2)):
        y = torch.zeros(shared.shape[:-1], dtype=torch.long, device=DEV)
        with pytest.raises(ValueError, match="need logits whose rows share no memory"):
            logp_from_logits(shared, y, inplace_backward=True)
    logp_from_logits(logits.detach()[:, :-1, 1:], target[:, :-1] * 0, inplace_backward=True)


@pytest.mark.parametrize("outputs", ["", "entropy is_top1"])
def test_op_registration(outputs):
    logits, target = make(2, 3, V=17)
    opcheck(_op, (logits.requires_grad_(), target, 0.7, outputs, False))


def test_one_row_without_leading_dimensions():
    logits, target = make(3)
    want = logp_from_logits(logits, target)
    assert torch.equal(logp_from_logits(logits[0], target[0]), want[0])


def test_nothing_to_score():
    logits, target = make(0)
    out = run(logp_stats_from_logits, logits, target)
    assert out["logp"].shape == (0,) and out["dlogits"].shape == logits.shape


X, Y = torch.zeros(2, 4), torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize(
    ("logits", "target", "options", "error"),
    [
        (X, Y[:1], {}, ValueError),
        (X[0], Y, {}, ValueError),
        (X[:, :0], Y, {}, ValueError),
        (torch.zeros(4, 2).T, Y, {}, ValueError),
        (X, Y, {"temperature": -1.0}, ValueError),
        (X, Y + 4, {}, ValueError),
        (X, Y - 1, {}, ValueError),
        (X.int(), Y, {}, TypeError),
        (X, Y.int(), {}, TypeError),
    ],
)
def test_rejects(logits, target, options, error):
    with pytest.raises(error, match=r"need .*got"):
        logp_from_logits(logits, target, **options)


def test_strides_of_target_and_overlapping_logits():
    logits, target = make(3, 4, V=70)
    for turn in (lambda y: y[:, ::2], lambda y: y[:, :1].expand(3, 2)):
        some = logits[:, :2].contiguous()
        want = run(logp_stats_from_logits, some, turn(target).contiguous())
        assert_same(run(logp_stats_from_logits, some, turn(target)), want)
    windows = torch.randn(72, generator=torch.Generator().manual_seed(0)).to(DEV).unfold(0, 70, 1)
    labels = torch.tensor([0, 69, 2], device=DEV)
    sides = [run(stats_from_logits_ref, x, labels) for x in (windows, windows.double())]
    assert_no_worse(run(logp_stats_from_logits, windows, labels), *sides)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_as_low_as_they_get(dtype):
    """What masks often hold: finite, below anything that a running maximum may start from."""
    logits = torch.full((2, 300), torch.finfo(dtype).min, device=DEV, dtype=dtype)
    logits[1, 5] = 3.0
    got = run(logp_stats_from_logits, logits, torch.tensor([7, 5], device=DEV))
    assert got["logp"].tolist() == pytest.approx([-math.log(300), 0.0], abs=1e-6)
    assert got["entropy"].tolist() == pytest.approx([math.log(300), 0.0], abs=1e-5)
    assert got["dlogits"].isfinite().all()


def test_small_probabilities_keep_their_digits():
    """Rounding x * log2(e) alone would cost 20 times as many."""
    logits = torch.linspace(0, -80, 161, device=DEV)[None].clone().requires_grad_()
    logp_from_logits(logits, torch.tensor([0], device=DEV)).sum().backward()
    want = -logits.detach().double().softmax(-1)
    off = (logits.grad.double() / want - 1)[0, 1:150].abs().max()
    assert off < (1e-6 if DEV == "cpu" else 2e-6)


def test_no_probability_times_a_large_gradient_is_nothing():
    logits = torch.tensor([[0.0, float("-inf"), 1.0]], device=DEV, requires_grad=True)
    (logp_stats_from_logits(logits, torch.tensor([0], device=DEV)).entropy * 1e9).sum().backward()
    assert logits.grad.isfinite().all() and logits.grad[0, 1] == 0


def test_rows_more_than_two_to_the_31_elements_apart():
    """Of 6 GiB that are never touched but for three rows."""
    base, target = make(3, V=72, dtype=torch.bfloat16)
    far = torch.empty_strided((3, 72), (3 << 29, 1), dtype=torch.bfloat16, device=DEV)
    far.copy_(base)
    assert_same(run(logp_stats_from_logits, far, target), run(logp_stats_from_logits, base, target))
