"""Pairwise losses: published values on one fixture, gradients, and what each type refuses."""

import math

import pytest
import torch

from fastpref.losses.preference import LOSSES, dpo_loss

F64 = torch.float64
LOGPS = (-4.0, -7.0, -5.0, -6.5)  # chosen, rejected, and under the reference
LENGTHS = {"chosen_lengths": torch.tensor([4]), "rejected_lengths": torch.tensor([5])}


def pairs(*values, dtype=F64):
    return [torch.tensor([v], dtype=dtype) for v in values]


@pytest.mark.parametrize(
    ("loss_type", "options", "want"),
    [
        ("sigmoid", {}, 0.620957),
        ("sigmoid", {"label_smoothing": 0.1}, 0.635957),
        ("sigmoid", {"margin": torch.tensor([0.05])}, -math.log(1 / (1 + math.exp(-0.1)))),
        ("ipo", LENGTHS, 21.6225),
        ("hinge", {}, 0.85),
        ("hinge", {"margin": torch.tensor([0.25])}, 1.1),
        ("hinge", {"beta": 2.0}, 0.0),
    ],
)
def test_values(loss_type, options, want):
    out = dpo_loss(*pairs(*LOGPS), loss_type=loss_type, **options)
    torch.testing.assert_close(out.losses, torch.tensor([want], dtype=F64), rtol=0, atol=1e-6)
    beta = options.get("beta", 0.1)
    assert torch.cat(out[1:]).tolist() == pytest.approx([beta * 1.0, beta * -0.5])
    twice = dpo_loss(*pairs(*LOGPS), loss_type=loss_type, weight=torch.tensor([2.0]), **options)
    torch.testing.assert_close(twice.losses, 2 * out.losses)
    assert dpo_loss(*pairs(*LOGPS, dtype=torch.bfloat16), loss_type=loss_type, **options)[
        0
    ].dtype == (torch.float32)


def test_gradient_and_detached_rewards():
    logps = [x.requires_grad_() for x in pairs(*LOGPS[:2])]
    out = dpo_loss(*logps, *pairs(*LOGPS[2:]))
    out.losses.sum().backward()
    assert logps[0].grad.item() == pytest.approx(-0.046257, abs=1e-6)
    assert logps[1].grad.item() == pytest.approx(0.046257, abs=1e-6)
    assert not out.chosen_rewards.requires_grad and not out.rejected_rewards.requires_grad


def test_an_untrained_policy_and_no_reference():
    logps = pairs(*LOGPS[:2], dtype=torch.float32)
    assert dpo_loss(*logps, *logps).losses.item() == pytest.approx(math.log(2))
    free, zeros = dpo_loss(*logps), dpo_loss(*logps, *pairs(0.0, 0.0, dtype=torch.float32))
    assert free.losses == zeros.losses and free.chosen_rewards.item() == pytest.approx(-0.4)
    lengths = {k: torch.zeros(1) for k in LENGTHS}
    assert dpo_loss(*pairs(0.0, 0.0), loss_type="ipo", **lengths).losses.item() == 25.0


@pytest.mark.parametrize("loss_type", LOSSES)
def test_gradcheck(loss_type):
    gen = torch.Generator().manual_seed(0)
    x = [torch.randn(7, generator=gen, dtype=F64, requires_grad=True) for _ in range(4)]
    options = {"weight": torch.rand(7, generator=gen, dtype=F64)}
    if loss_type == "ipo":
        options |= {k: torch.arange(1, 8) for k in LENGTHS}
    else:
        options["margin"] = torch.rand(7, generator=gen, dtype=F64)
    if loss_type == "sigmoid":
        options["label_smoothing"] = 0.2

    def fn(*x):
        return dpo_loss(*x, loss_type=loss_type, beta=0.7, **options).losses

    assert torch.autograd.gradcheck(fn, x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_type": "sigmoidd"}, "sigmoid, ipo, hinge; got 'sigmoidd', nearest 'sigmoid'"),
        ({"loss_type": "ipo"}, "'ipo' needs chosen_lengths and rejected_lengths, got None"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "'hinge' has no label_smoothing, got"),
        ({"loss_type": "ipo", "margin": torch.ones(1), **LENGTHS}, "'ipo' has no margin, got"),
        ({"beta": 0.0}, "need beta > 0 .*got 0.0"),
        ({"label_smoothing": 0.5}, "label_smoothing in .*got 0.1 and 0.5"),
        ({"ref_rejected_logps": None}, "got ref_chosen_logps alone"),
        ({"rejected_logps": torch.zeros(2)}, r"need rejected_logps \(P,\) = \(1,\), got \(2,\)"),
        ({"margin": torch.ones(1, 1)}, r"need margin \(P,\) = \(1,\), got \(1, 1\)"),
    ],
)
def test_refuses(change, message):
    names = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    with pytest.raises(ValueError, match=message):
        dpo_loss(**dict(zip(names, pairs(*LOGPS), strict=True)) | change)


def test_refuses_integers():
    with pytest.raises(TypeError, match=r"need floating-point rejected_logps, got torch\.int64"):
        dpo_loss(torch.zeros(1), torch.zeros(1).long())
