"""Reward and KL of a policy, against values that are known."""

import pytest
import torch

from fastpref.evaluate.frontier import mean_and_error, standing
from fastpref.models.model import LogpModel
from fastpref.models.tiny import tiny_model, tiny_tokenizer


def make(seed):
    tokenizer = tiny_tokenizer([], vocab_size=259)
    return tokenizer, LogpModel(tiny_model(tokenizer, hidden=16, layers=1, heads=2, seed=seed))


def test_kl_to_itself_is_zero():
    tokenizer, model = make(0)
    got = standing(model, model, tokenizer, [[65], [66, 67]], len, n=2, max_new_tokens=5, seed=0)
    assert got.kl == 0 and got.kl_se == 0 and len(got.texts) == 2


def test_kl_of_one_token_equals_the_exact_sum():
    tokenizer, policy = make(0)
    _, reference = make(1)
    with torch.no_grad():  # make the two differ by more than noise
        policy.model.get_output_embeddings().weight.mul_(30)
    prompt = [65, 66]
    with policy.plain() as p, reference.plain() as r, torch.no_grad():
        logp = p(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        logq = r(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    exact = float((logp.exp() * (logp - logq)).sum())
    got = standing(
        policy, reference, tokenizer, [prompt] * 1500, len, n=2, max_new_tokens=1, seed=0
    )
    assert exact > 0.1 and got.kl_se < 0.1 * exact
    assert abs(got.kl - exact) < 5 * got.kl_se


def test_mean_and_error_by_hand():
    mean, error = mean_and_error(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert mean == 2.5 and error == pytest.approx((5 / 3) ** 0.5 / 2)
