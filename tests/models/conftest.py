"""Tiny models and random groups, shared by the tests of this folder."""

import random

import pytest

from fastpref.data.tokenize import Group
from fastpref.models.tiny import tiny_model

VOCAB = 300


def make_groups(*counts: int, prompt: int = 7, longest: int = 9, partial: bool = False):
    """A group per count: that many completions of random tokens and lengths, 1 included."""
    pick = random.Random(0)

    def tokens(n):
        return [pick.randrange(VOCAB) for _ in range(n)]

    out = []
    for row, count in enumerate(counts):
        sizes = [pick.choice((1, pick.randint(2, longest))) for _ in range(count)]
        flags = tuple([pick.random() < 0.7 for _ in range(n)] if partial else None for n in sizes)
        completions = tuple(tokens(n) for n in sizes)
        out.append(Group(tokens(pick.randint(1, prompt)), completions, flags, row, {}))
    return out


def make_model(architecture: str = "llama", **options):
    small = {"hidden": 32, "layers": 2, "initializer_range": 0.2, "pad_token_id": None}
    return tiny_model(VOCAB, architecture, **(small | options))


@pytest.fixture
def groups():
    return make_groups


@pytest.fixture
def tiny():
    return make_model
