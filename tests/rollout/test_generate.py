"""Sampled completions: stop tokens, seeds, order, and the model's own distribution."""

import pytest
import torch
from transformers import GenerationConfig

from fastpref.models.model import LogpModel
from fastpref.models.tiny import tiny_model, tiny_tokenizer
from fastpref.rollout.generate import SamplingParams, generate


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(["a small text of a few words"], vocab_size=270)


@pytest.fixture(scope="module")
def model(tokenizer):
    return LogpModel(tiny_model(tokenizer, hidden=32, layers=1, heads=2, kv_heads=2, seed=0))


def test_order_count_and_seed(model, tokenizer):
    prompts = [[5, 6, 7], [8], [9, 10]]
    params = SamplingParams(max_new_tokens=6)
    before = torch.get_rng_state()
    first = generate(model, tokenizer, prompts, 3, params, seed=1)
    assert torch.equal(torch.get_rng_state(), before)  # the caller's randomness is untouched
    assert [len(row) for row in first] == [3, 3, 3]
    assert generate(model, tokenizer, prompts, 3, params, seed=1) == first
    assert generate(model, tokenizer, prompts, 3, params, seed=2) != first


def test_stop_token_ends_a_completion_and_stays(model, tokenizer):
    stop = tokenizer.eos_token_id
    params = SamplingParams(max_new_tokens=400)
    rows = generate(model, tokenizer, [[5]], 16, params, seed=0)[0]
    finished = [c for c in rows if c.finished]
    assert finished  # one token in 270 is the stop token
    for c in rows:
        assert c.tokens.count(stop) == c.finished and (c.tokens[-1] == stop) == c.finished
        assert len(c.tokens) == 400 or c.finished


def test_padding_does_not_change_the_distribution(model, tokenizer):
    """First tokens after a prompt padded beside a long one follow the model's own softmax."""
    with model.plain() as plain, torch.no_grad():
        want = plain(torch.tensor([[5, 6]])).logits[0, -1].softmax(-1)
    params = SamplingParams(max_new_tokens=1)
    rows = generate(model, tokenizer, [[5, 6], [7] * 9], 4000, params, seed=3, batch_size=8000)
    counts = torch.zeros(len(want))
    for c in rows[0]:
        counts[c.tokens[0]] += 1
    expected = want * 4000
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    cells = len(want)
    assert abs(chi2 - cells) < 6 * (2 * cells) ** 0.5  # six standard deviations of chi squared


def test_the_models_own_sampling_habits_are_left_out(model, tokenizer):
    params = SamplingParams(max_new_tokens=20)
    want = generate(model, tokenizer, [[5, 6, 7]], 8, params, seed=0)
    habits = model.model.generation_config
    model.model.generation_config = GenerationConfig(repetition_penalty=3.0, min_p=0.2)
    try:
        assert generate(model, tokenizer, [[5, 6, 7]], 8, params, seed=0) == want
        assert model.model.generation_config.repetition_penalty == 3.0
    finally:
        model.model.generation_config = habits


def test_top_k_one_is_greedy(model, tokenizer):
    params = SamplingParams(max_new_tokens=5, top_k=1)
    rows = generate(model, tokenizer, [[5, 6, 7]], 4, params, seed=0)[0]
    assert len({tuple(c.tokens) for c in rows}) == 1


@pytest.mark.parametrize(
    "options", [{"max_new_tokens": 0}, {"temperature": 0.0}, {"top_p": 0.0}, {"top_k": -1}]
)
def test_rejects(options):
    with pytest.raises(ValueError, match="got"):
        SamplingParams(**options)
