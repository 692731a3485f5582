"""The loss of a reward model: values worked by hand, gradients, rankings, what is refused."""

import math

import pytest
import torch

from fastpref.losses.ranking import ranking_loss
from fastpref.losses.reward import reward_loss

F64 = torch.float64
CHOSEN, REJECTED = torch.tensor([1.2], dtype=F64), torch.tensor([0.4], dtype=F64)


def softplus(x):
    return math.log1p(math.exp(x))


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_bradley_terry(dtype):
    out = reward_loss(CHOSEN.to(dtype), REJECTED.to(dtype))
    assert out.losses.tolist() == pytest.approx([0.371101], abs=1e-6)
    assert out.losses.dtype == dtype


def test_margin():
    out = reward_loss(CHOSEN, REJECTED, margin=torch.tensor([1 / 3], dtype=F64))
    assert out.losses.tolist() == pytest.approx([0.486793], abs=1e-6)


def test_centering():
    plain = reward_loss(CHOSEN, REJECTED).losses
    centered = reward_loss(CHOSEN, REJECTED, centering=0.01).losses
    assert (centered - plain).tolist() == pytest.approx([0.0256])


def test_pairs_do_not_see_each_other():
    chosen, rejected = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.0, 1.0, 0.5])
    margin = torch.tensor([0.0, 1.0, 2.0])
    out = reward_loss(chosen, rejected, margin=margin, centering=0.5)
    want = [softplus(-1) + 0.5, softplus(4) + 0.5, softplus(2) + 0.5]
    assert out.losses.tolist() == pytest.approx(want)


def test_a_tie_is_not_correct_and_a_margin_changes_no_verdict():
    chosen, rejected = torch.tensor([1.0, 0.5, -2.0]), torch.tensor([0.5, 0.5, -1.0])
    out = reward_loss(chosen, rejected, margin=torch.full((3,), 3.0))
    assert out.correct.tolist() == [True, False, False]


def test_plackett_luce_is_bradley_terry_for_longer_rankings():
    """A reward model learns from rankings by ranking_loss, told its rewards and a beta of 1."""

    def ranked(rewards, scores):
        groups = torch.tensor([0, len(rewards)])
        return ranking_loss(rewards, None, torch.tensor(scores), groups, beta=1.0).losses

    three = torch.tensor([2.0, 1.0, 0.0], dtype=F64)
    assert ranked(three, [3.0, 2.0, 1.0]).tolist() == pytest.approx([0.720868], abs=1e-6)
    assert ranked(three, [1.0, 2.0, 3.0]).tolist() == pytest.approx([3.720868], abs=1e-6)
    two = ranked(torch.cat((CHOSEN, REJECTED)), [1.0, 0.0])
    torch.testing.assert_close(two, reward_loss(CHOSEN, REJECTED).losses)


def test_low_precision_rewards_are_compared_and_summed_in_fp32():
    chosen, rejected = torch.tensor([256.0]), torch.tensor([-0.5])
    low = reward_loss(chosen.bfloat16(), rejected.bfloat16(), centering=1e-3).losses
    assert low.dtype == torch.float32
    assert low.tolist() == pytest.approx([1e-3 * 255.5**2], rel=1e-6)


def test_gradients():
    gen = torch.Generator().manual_seed(0)
    chosen, rejected = (torch.randn(5, generator=gen, dtype=F64).requires_grad_() for _ in range(2))
    margin = torch.rand(5, generator=gen, dtype=F64).requires_grad_()

    def loss(chosen, rejected, margin):
        return reward_loss(chosen, rejected, margin=margin, centering=0.3).losses

    assert torch.autograd.gradcheck(loss, (chosen, rejected, margin))
    far = torch.tensor([1e4, -1e4], requires_grad=True)
    losses = reward_loss(far, torch.zeros(2)).losses
    assert losses.tolist() == [0.0, 1e4]
    assert torch.autograd.grad(losses.sum(), far)[0].tolist() == [0.0, -1.0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"rejected_rewards": torch.ones(2)},
            ValueError,
            r"need rejected_rewards \(P,\) = \(1,\), got \(2,\)",
        ),
        (
            {"chosen_rewards": CHOSEN[None]},
            ValueError,
            r"need chosen_rewards \(P,\), got \(1, 1\)",
        ),
        ({"margin": torch.ones(())}, ValueError, r"need margin \(P,\), got \(\)"),
        ({"margin": torch.ones(1).long()}, TypeError, "need floating-point margin, got torch.int"),
        ({"chosen_rewards": torch.tensor([1])}, TypeError, "need floating-point chosen_rewards"),
        ({"centering": -0.1}, ValueError, "need centering >= 0, got -0.1"),
        ({"centering": math.nan}, ValueError, "need centering >= 0, got nan"),
    ],
)
def test_refuses(change, error, message):
    with pytest.raises(error, match=message):
        reward_loss(**{"chosen_rewards": CHOSEN, "rejected_rewards": REJECTED, **change})
