"""The clipped value loss: by hand, against fp64 autograd of the definition, metrics."""

import math

import pytest
import torch
from compare import assert_no_worse
from torch.library import opcheck

from fastpref import explained_variance, ppo_value_loss
from fastpref.kernels.ppo_value import _op, value_loss_ref
from fastpref.kernels.sequences import AGGREGATIONS

DEV = "cuda" if torch.cuda.is_available() else "cpu"
F64 = torch.float64


def number(x):
    return torch.tensor([[x]], device=DEV)


@pytest.mark.parametrize(
    ("value", "old", "want", "slope", "clipped"),
    [
        (0.9, 0.5, 0.045, 0.0, 1),  # FORMULAS.md, section 4: bounded to 0.7
        (0.6, 0.5, 0.08, -0.4, 0),
        (0.1, 0.5, 0.405, -0.9, 0),  # bounded to 0.3, which misses by less
        (1.5, 1.5, 0.125, 0.5, 0),
    ],
)
def test_a_token(value, old, want, slope, clipped):
    values = number(value).requires_grad_()
    found = ppo_value_loss(values=values, old_values=number(old), returns=number(1.0))
    found.loss.backward()
    assert (found.loss.item(), values.grad.item()) == pytest.approx((want, slope))
    assert found.metrics["clipfrac"].item() == clipped


def batch(B, T, dtype=torch.float32, seed=0):
    gen = torch.Generator().manual_seed(seed)
    x = {"values": torch.randn(B, T, generator=gen)}
    x["old_values"] = x["values"] + 0.3 * torch.randn(B, T, generator=gen)
    x["returns"] = x["values"] + torch.randn(B, T, generator=gen)
    mask = torch.rand(B, T, generator=gen) < 0.7
    return {k: v.to(DEV, dtype) for k, v in x.items()}, mask.to(DEV)


def definition(x, mask, mode):
    loss = value_loss_ref(x["values"], x["old_values"], x["returns"], 0.2).where(mask, 0.0)
    rows, count = mask.any(1), mask.sum(1).clamp(min=1)
    if mode == "token-mean":
        return loss.sum() / mask.sum()
    if mode == "seq-mean-token-sum-norm":
        return loss.sum() / loss.numel()
    of_rows = loss.sum(1) / (count if mode == "seq-mean-token-mean" else 1)
    return of_rows.sum() / rows.sum()


def gradient(fn, x):
    values = x["values"].detach().clone().requires_grad_()
    loss = fn({**x, "values": values})
    (dvalues,) = torch.autograd.grad(loss, values)
    return {"loss": loss.detach(), "dvalues": dvalues}


@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("shape", [(1, 1), (4, 37), (3, 1030)], ids=str)
def test_no_worse_than_torch(mode, shape):
    x, mask = batch(*shape)
    mask[0, 0] = True
    mask[1:2] = False
    options = {"loss_agg_mode": mode, "reduction": "mean"}

    def ours(x):
        return ppo_value_loss(**x, mask=mask, **options).loss

    def packed(x):
        cu = torch.arange(0, mask.numel() + 1, shape[1], device=DEV)
        norm = {"max_length": shape[1]} if mode.endswith("norm") else {}
        x = {k: v.flatten() for k, v in x.items()}
        return ppo_value_loss(**x, mask=mask.flatten(), cu_seqlens=cu, **options, **norm).loss

    wide = {k: v.double() for k, v in x.items()}
    torchs, truth = (gradient(lambda x: definition(x, mask, mode), y) for y in (x, wide))
    for fn in (ours, packed):
        assert_no_worse(gradient(fn, x), torchs, truth)
    for name, found in gradient(ours, wide).items():
        torch.testing.assert_close(found, truth[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_token_that_is_not_bounded_keeps_its_gradient(dtype):
    """Near values that moved little: V_old + (V - V_old) is V only up to rounding."""
    gen = torch.Generator().manual_seed(0)
    values, moved, off = (0.1 * torch.randn(4, 500, generator=gen).to(DEV, dtype) for _ in range(3))
    moved = moved.clamp(-0.19, 0.19)
    x = {"values": values, "old_values": values + moved, "returns": values + off}
    found = gradient(lambda x: ppo_value_loss(**x).loss, x)
    torch.testing.assert_close(found["dvalues"], values - x["returns"], rtol=0, atol=0)
    assert not ppo_value_loss(**x).metrics["clipfrac"]


@pytest.mark.parametrize("name", ["values", "old_values", "returns"])
def test_nan_in_a_token_that_counts_shows(name):
    x, mask = batch(2, 9)
    mask[1, 2] = True
    x[name][1, 2] = math.nan
    found = gradient(lambda x: ppo_value_loss(**x, mask=mask).loss, x)
    assert found["loss"].isnan()


def test_without_a_clip():
    x, mask = batch(2, 9)
    del x["old_values"]
    found = ppo_value_loss(**x, mask=mask, clip=None)
    want = ((x["values"] - x["returns"]) ** 2 / 2)[mask].sum()
    torch.testing.assert_close(found.loss, want)
    assert not found.metrics["clipfrac"]


def test_metrics_are_sums_of_which_the_explained_variance_is_made():
    x, mask = batch(3, 1200)
    parts = [
        ppo_value_loss(
            **{k: v[b : b + 1] for k, v in x.items()},
            mask=mask[b : b + 1],
            loss_agg_mode=("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")[b],
        )
        for b in range(3)
    ]
    sums = {k: sum(p.metrics[k] for p in parts) for k in parts[0].metrics}
    values, old, returns = (x[k].double()[mask] for k in ("values", "old_values", "returns"))
    error = returns - values
    near = old + (values - old).clamp(-0.2, 0.2)
    want = {
        "tokens": len(values),
        "clipfrac": (((values - old).abs() > 0.2) & ((near - returns) ** 2 > error**2)).sum(),
        "values": values.sum(),
        "returns": returns.sum(),
        "returns_squared": (returns**2).sum(),
        "error": error.sum(),
        "error_squared": (error**2).sum(),
    }
    assert {k: float(v) for k, v in sums.items()} == pytest.approx(
        {k: float(v) for k, v in want.items()}, rel=1e-4
    )
    explained = float(1 - error.var() / returns.var())
    assert float(explained_variance(sums)) == pytest.approx(explained, abs=1e-5)
    whole = ppo_value_loss(**x, mask=mask, reduction="mean").metrics
    assert float(whole["explained_variance"]) == pytest.approx(explained, abs=1e-5)
    assert float(whole["error_squared"]) == pytest.approx(float((error**2).mean()), rel=1e-5)


def test_variance_of_returns_far_from_zero():
    x, mask = batch(2, 1500)
    returns = 1000 + x["returns"]
    values = returns + 300 + 0.5 * x["values"]
    found = ppo_value_loss(values=values, returns=returns, mask=mask, clip=None, reduction="mean")
    error = (returns - values)[mask].double()
    want = 1 - error.var() / returns[mask].double().var()
    assert found.metrics["explained_variance"].item() == pytest.approx(want.item(), abs=1e-4)


def test_the_explained_variance_of_means_is_refused():
    x, mask = batch(2, 5)
    found = ppo_value_loss(**x, mask=mask, reduction="mean")
    with pytest.raises(ValueError, match=r"need sums .*, got the means of a call"):
        explained_variance(found.metrics)


@pytest.mark.parametrize("value", [0.0, 0.1, -1000.3])
def test_returns_that_do_not_vary_explain_nothing(value):
    x = torch.full((2, 500), value, device=DEV)
    noise = torch.linspace(0, 1, 1000, device=DEV).view(2, 500)
    found = ppo_value_loss(values=x + noise, returns=x, clip=None, reduction="mean")
    assert found.metrics["explained_variance"].item() == 0


def test_padding_may_hold_anything():
    x, mask = batch(2, 9)
    x = {k: v.where(mask, math.nan) for k, v in x.items()}
    found = gradient(lambda x: ppo_value_loss(**x, mask=mask, reduction="mean").loss, x)
    assert found["loss"].isfinite() and not found["dvalues"][~mask].any()
    found = ppo_value_loss(**x, mask=mask & False, reduction="mean")
    assert not any(float(v) for v in (found.loss, *found.metrics.values()))


def test_opcheck():
    x, mask = batch(2, 5)
    values = x["values"].requires_grad_()
    args = (values, x["old_values"], x["returns"], mask, None, 0.2)
    opcheck(_op, (*args, True, True, True))


def test_torch_compile(backend):
    if backend == "triton":
        pytest.skip("as in the other backends")
    torch.compiler.reset()
    x, mask = batch(3, 9)

    def loss(x):
        return ppo_value_loss(**x, mask=mask, reduction="mean").loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for name, found in gradient(compiled, x).items():
        torch.testing.assert_close(found, gradient(loss, x)[name])


X = torch.zeros(2, 3, device=DEV)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"clip": None},
            ValueError,
            "need old_values and clip, .*got clip None and old_values giv",
        ),
        ({"old_values": None}, ValueError, "got clip 0.2 and old_values None"),
        ({"clip": 0.0}, ValueError, "need clip > 0, got 0.0"),
        ({"returns": X[:1]}, ValueError, r"need returns like values, \(2, 3\), got \(1, 3\)"),
        ({"returns": X.clone().requires_grad_()}, ValueError, "need returns without gradient"),
        (
            {"old_values": X.clone().requires_grad_()},
            ValueError,
            "need old_values without gradient",
        ),
        ({"values": X.long()}, TypeError, "need floating-point values, got torch.int64"),
        ({"returns": None}, TypeError, "need a tensor for returns, got NoneType"),
        ({"reduction": "max"}, ValueError, "need reduction sum or mean, got 'max'"),
        ({"loss_agg_mode": "sum"}, ValueError, "need loss_agg_mode in token-mean"),
    ],
)
def test_what_is_refused(change, error, message):
    with pytest.raises(error, match=message):
        ppo_value_loss(**{"values": X, "old_values": X, "returns": X, **change})
