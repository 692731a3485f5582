"""Tiny tokenizers and models: lossless, seeded, marked up."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref.models.tiny import CHAT_TEMPLATE, tiny_model, tiny_tokenizer

TEXTS = ["the cat sat on the mat", "the dog sat on the cat"] * 3
TOKENIZER = tiny_tokenizer(TEXTS, 300, chat_template=CHAT_TEMPLATE)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30))
def test_any_text_comes_back(text):
    assert TOKENIZER.decode(TOKENIZER(text).input_ids) == text


def test_special_tokens():
    assert len(TOKENIZER) <= 300
    assert TOKENIZER.eos_token == "<|end|>" and TOKENIZER.pad_token == "<|pad|>"
    assert TOKENIZER.bos_token is None and TOKENIZER.unk_token is None
    assert len(TOKENIZER(" the").input_ids) == 1  # a merge was learnt, nothing is added
    assert len(TOKENIZER("<|turn|><|end|>").input_ids) == 2
    assert tiny_tokenizer(TEXTS, 300).get_vocab() == TOKENIZER.get_vocab()
    with pytest.raises(ValueError, match="at least 259, got 258"):
        tiny_tokenizer(TEXTS, 258)


def test_chat_template():
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": " hi\n"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "bye"},
        {"role": "assistant", "content": "so long"},
    ]
    want = (
        "<|turn|>system\nbe kind<|end|>\n<|turn|>user\n hi\n<|end|>\n"
        "<|turn|>assistant\nhello<|end|>\n"
        "<|turn|>user\nbye<|end|>\n<|turn|>assistant\nso long<|end|>\n"
    )
    assert TOKENIZER.apply_chat_template(messages, tokenize=False) == want
    asked = TOKENIZER.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert want.startswith(asked) and asked.endswith("\n<|turn|>assistant\n")
    out = TOKENIZER.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    scored = [i for i, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m]
    assert TOKENIZER.decode(scored) == "hello<|end|>so long<|end|>"


def test_models_are_seeded_and_leave_the_random_state():
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    first = tiny_model(TOKENIZER, hidden=32, layers=1)
    assert torch.equal(torch.rand(3), want)
    second = tiny_model(TOKENIZER, hidden=32, layers=1)
    other = tiny_model(TOKENIZER, hidden=32, layers=1, seed=1)
    weights = [m.get_input_embeddings().weight for m in (first, second, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert len(weights[0]) == len(TOKENIZER)
    assert first.config.eos_token_id == TOKENIZER.eos_token_id
    assert first.generation_config.pad_token_id == TOKENIZER.pad_token_id
    default = tiny_model(400, tie=True)
    assert default.lm_head.weight is default.get_input_embeddings().weight
    c = default.config
    shape = (c.hidden_size, c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads)
    assert shape == (128, 4, 4, 2) and len(default.lm_head.weight) == 400
