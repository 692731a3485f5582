"""A tiny model with its tokenizer, and pairs of unequal lengths."""

import pytest

from fastpref.data.synthetic import reviews
from fastpref.models.tiny import tiny_model, tiny_tokenizer


def make_pairs(count, seed):
    texts = reviews(2 * count, seed)
    return [
        {"prompt": a.prompt, "chosen": a.completion, "rejected": b.completion}
        for a, b in zip(texts[:count], texts[count:], strict=True)
    ]


@pytest.fixture(scope="session")
def tokenizer():
    texts = [r.prompt + r.completion for r in reviews(200, seed=1)]
    return tiny_tokenizer(texts, vocab_size=320)


@pytest.fixture
def new_model(tokenizer):
    def make(**options):
        options = {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "seed": 3} | options
        return tiny_model(tokenizer, **options)

    return make


@pytest.fixture(scope="session")
def pairs():
    return make_pairs(24, seed=5)
