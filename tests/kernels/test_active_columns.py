"""skip_below leaves out what it says, reports it, and nothing else changes."""

import pytest
import torch
from compare import least_workspace

from fastpref import linear_logp, linear_logp_stats

DEV = "cuda" if torch.cuda.is_available() else "cpu"
M, H, V = 12, 16, 500


def leaves(bias=False, dtype=torch.float32):
    gen = torch.Generator().manual_seed(0)
    hidden = torch.randn(M, H, generator=gen).to(DEV, dtype).requires_grad_()
    weight = torch.randn(V, H, generator=gen).to(DEV, dtype).requires_grad_()
    b = torch.randn(V, generator=gen).to(DEV, dtype).requires_grad_() if bias else None
    target = torch.randint(V, (M,), generator=gen)
    target[3] = -100
    return hidden, weight, b, target.to(DEV)


def gradients(inputs, *, entropy=False, **options):
    hidden, weight, bias, target = inputs
    gen = torch.Generator().manual_seed(1)
    g, h = (torch.randn(M, generator=gen).to(DEV) for _ in range(2))
    stats = linear_logp_stats(hidden, weight, target, bias=bias, **options)
    loss = (stats.logp * g).sum()
    if entropy:
        loss = loss + (stats.entropy * h).sum()
    wanted = [x for x in (hidden, weight, bias) if x is not None]
    return g, h, torch.autograd.grad(loss, wanted)


def probabilities(inputs):
    hidden, weight, bias, target = (None if x is None else x.detach() for x in inputs)
    keep = target != -100
    logits = torch.nn.functional.linear(hidden, weight, bias).double()
    return logits.softmax(-1)[keep], target[keep], keep


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("threshold", [0.3, 2**-6, 2**-10])
def test_what_is_left_out_and_what_is_said_of_it(threshold, bias):
    inputs = leaves(bias)
    stats = torch.full((2,), float("nan"), device=DEV)
    g, _, (dX, dW, *db) = gradients(inputs, skip_below=threshold, skip_stats=stats)
    _, _, (exact_dX, exact_dW, *exact_db) = gradients(inputs)
    p, labels, keep = probabilities(inputs)
    active = (p >= threshold).any(0)
    active[labels] = True
    assert 0 < active.sum() < V
    mass = torch.zeros(M, dtype=torch.float64, device=DEV)
    mass[keep] = (p * ~active).sum(1)
    want = torch.stack([active.double().mean(), mass.max()])
    torch.testing.assert_close(stats.double(), want, rtol=1e-5, atol=1e-7)

    assert not dW[~active].any() and exact_dW[~active].any(1).all()
    torch.testing.assert_close(dW[active], exact_dW[active])
    assert len(db) == bias and all(torch.equal(*both) for both in zip(db, exact_db, strict=True))
    # what a row loses: g sum of p W over the columns left out
    bound = g.abs().double() * mass * inputs[1].detach().double().norm(dim=1).max()
    lost = (dX - exact_dX).double().norm(dim=1)
    assert (lost <= bound + 1e-5).all() and lost.max() > 1e-3


def test_entropy_keeps_columns_by_their_slope():
    inputs = leaves()
    stats = torch.zeros(2, device=DEV)
    *_, (_, dW) = gradients(inputs, entropy=True, skip_below=2**-7, skip_stats=stats)
    *_, (_, exact) = gradients(inputs, entropy=True)
    p, labels, _ = probabilities(inputs)
    entropy = -(p * p.log()).sum(1, keepdim=True)
    active = (p * (p.log() + entropy).abs().clamp(min=1) >= 2**-7).any(0)
    active[labels] = True
    assert active.sum() > ((p >= 2**-7).any(0)).sum()
    assert stats[0].item() == pytest.approx(active.double().mean().item(), rel=1e-6)
    assert not dW[~active].any()
    torch.testing.assert_close(dW[active], exact[active])


@pytest.mark.parametrize("options", [{"skip_below": 1e-30}, {"skip_below": 0.5, "workspace": 0}])
def test_exact_where_nothing_is_left_out(options):
    """No column is small enough, or none was kept."""
    inputs = leaves()
    if "workspace" in options:
        options = {"skip_below": 0.5}
        options["workspace"] = least_workspace(gradients, inputs, **options)
    stats = torch.full((2,), float("nan"), device=DEV)
    _, _, got = gradients(inputs, skip_stats=stats, **options)
    torch.testing.assert_close(got, gradients(inputs)[2])
    assert stats.tolist() == [1.0, 0.0]
    hidden, weight, _, target = inputs
    stats.fill_(float("nan"))
    linear_logp(hidden, weight.detach(), target, skip_below=0.5, skip_stats=stats).sum().backward()
    assert stats.tolist() == [1.0, 0.0]  # a frozen weight is exact in any case


def test_nan_is_not_small():
    hidden, weight, _, target = leaves()
    with torch.no_grad():
        hidden[5, 2] = float("nan")
    _, _, (dX, dW) = gradients((hidden, weight, None, target), skip_below=2**-6)
    assert dX[5].isnan().all() and dW.isnan().any(1).all()


def test_bf16_and_two_runs_alike():
    inputs = leaves(dtype=torch.bfloat16)
    runs = [gradients(inputs, skip_below=2**-6)[2] for _ in range(2)]
    assert all(torch.equal(*both) for both in zip(*runs, strict=True))
    exact = gradients(inputs)[2]
    active = runs[0][1].any(1)
    assert 0 < active.sum() < V
    torch.testing.assert_close(runs[0][1][active], exact[1][active])


@pytest.mark.parametrize(
    "options",
    [
        {"skip_below": -0.1},
        {"skip_below": 1.0},
        {"skip_below": float("nan")},
        {"skip_stats": torch.zeros(3)},
        {"skip_stats": torch.zeros(2, dtype=torch.float64)},
    ],
)
def test_rejects(options):
    hidden, weight, _, target = leaves()
    with pytest.raises(ValueError, match=r"need skip_.*got"):
        linear_logp(hidden, weight, target, **options)
