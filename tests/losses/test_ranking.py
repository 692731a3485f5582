"""Losses of ranked completions: values worked by hand, ties, pairs as groups of two."""

import math

import pytest
import torch

from fastpref import dpo_loss, ranking_loss
from fastpref.losses.ranking import RANKING_LOSSES

F64 = torch.float64
THREE = torch.tensor([2.0, 1.0, 0.0], dtype=F64)
ONE_GROUP = torch.tensor([0, 3])


def lse(*x):
    return math.log(sum(math.exp(v) for v in x))


def loss(rewards, scores, groups, loss_type, **options):
    scores = torch.tensor(scores)
    return ranking_loss(rewards, None, scores, groups, beta=1.0, loss_type=loss_type, **options)


@pytest.mark.parametrize(
    ("loss_type", "scores", "want"),
    [
        ("plackett_luce", [3.0, 2.0, 1.0], 0.720868),
        ("plackett_luce", [1.0, 2.0, 3.0], 3.720868),
        ("plackett_luce", [2.0, 1.0, 1.0], lse(2, 1, 0) - 2 + 2 * lse(1, 0) - 1 - 0),
        ("plackett_luce", [2.0, 2.0, 1.0], 2 * lse(2, 1, 0) - 3),
        # -log s of the three gaps 1, 2, 1, over three pairs
        (
            "all_pairs",
            [3.0, 2.0, 1.0],
            (2 * math.log1p(math.exp(-1)) + math.log1p(math.exp(-2))) / 3,
        ),
        ("all_pairs", [2.0, 1.0, 1.0], (math.log1p(math.exp(-1)) + math.log1p(math.exp(-2))) / 2),
        ("all_pairs", [1.0, 1.0, 1.0], 0.0),
    ],
)
def test_values(loss_type, scores, want):
    out = loss(THREE, scores, ONE_GROUP, loss_type)
    assert out.losses.tolist() == pytest.approx([want], abs=1e-6)
    assert out.rewards.tolist() == THREE.tolist()


@pytest.mark.parametrize("loss_type", RANKING_LOSSES)
def test_groups_do_not_see_each_other(loss_type):
    gen = torch.Generator().manual_seed(0)
    rewards = torch.randn(9, generator=gen, dtype=F64)
    scores = [3.0, 1.0, 1.0, 5.0, 2.0, 1.0, 7.0, 7.0, 3.0]
    together = loss(rewards, scores, torch.tensor([0, 2, 6, 9]), loss_type)
    for i, (a, b) in enumerate(((0, 2), (2, 6), (6, 9))):
        alone = loss(rewards[a:b], scores[a:b], torch.tensor([0, b - a]), loss_type)
        assert together.losses[i].item() == pytest.approx(alone.losses.item())
        assert torch.equal(together.better[a:b, a:b], alone.better)
    assert together.better.sum() == 1 + 5 + 2


@pytest.mark.parametrize("loss_type", RANKING_LOSSES)
def test_a_pair_is_dpo(loss_type):
    gen = torch.Generator().manual_seed(1)
    logps, refs = (torch.randn(8, generator=gen, dtype=F64) for _ in range(2))
    scores, groups = torch.tensor([1.0, 0.0] * 4), torch.arange(0, 9, 2)
    out = ranking_loss(logps, refs, scores, groups, beta=0.3, loss_type=loss_type)
    want = dpo_loss(logps[::2], logps[1::2], refs[::2], refs[1::2], beta=0.3)
    torch.testing.assert_close(out.losses, want.losses)
    torch.testing.assert_close(out.rewards[::2], want.chosen_rewards)


@pytest.mark.parametrize("loss_type", RANKING_LOSSES)
def test_gradients(loss_type):
    gen = torch.Generator().manual_seed(2)
    logps = torch.randn(7, generator=gen, dtype=F64).requires_grad_()
    scores, groups = torch.tensor([2.0, 1, 1, 0, 3, 3, 1]), torch.tensor([0, 4, 7])

    def fn(logps):
        return ranking_loss(logps, None, scores, groups, beta=0.7, loss_type=loss_type).losses

    assert torch.autograd.gradcheck(fn, logps)
    far = (1e4 * logps.detach().float()).requires_grad_()
    assert torch.isfinite(torch.autograd.grad(fn(far).sum(), far)[0]).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"loss_type": "sigmoid"}, ValueError, "need loss_type in plackett_luce, all_pairs; got"),
        ({"scores": torch.ones(2)}, ValueError, r"need scores \(B,\) = \(3,\), got \(2,\)"),
        ({"ref_logps": torch.ones(1)}, ValueError, r"need ref_logps \(B,\) = \(3,\), got \(1,\)"),
        ({"logps": torch.tensor([1, 2, 3])}, TypeError, "need floating-point logps, got torch.int"),
        ({"groups": torch.tensor([0.0, 3.0])}, TypeError, "need int32 or int64 groups, got"),
        ({"groups": torch.tensor([3])}, ValueError, r"rising from 0 to 3, got \[3\]"),
        ({"groups": torch.tensor([0, 5, 3])}, ValueError, r"rising from 0 to 3, got \[0, 5, 3\]"),
        ({"scores": THREE * math.nan}, ValueError, "need scores without NaN"),
        ({"beta": -1.0}, ValueError, "need beta > 0, got -1.0"),
    ],
)
def test_refuses(change, error, message):
    given = {"logps": THREE, "ref_logps": None, "scores": THREE, "groups": ONE_GROUP, **change}
    with pytest.raises(error, match=message):
        ranking_loss(**given)
