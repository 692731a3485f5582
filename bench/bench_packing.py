"""From groups to micro-batches, and to tensors: what happens on the host before a step.

The floor is a copy of what has to be read: the sizes of all groups, or their tokens.
"""

from array import array
from dataclasses import dataclass

import numpy as np

from bench.measure import Provider
from fastpref.data.micro_batches import micro_batches
from fastpref.data.packing import pack
from fastpref.data.tokenize import Group

# medians and spreads of prompts and completions of the Anthropic harmless pairs, about
PROMPT, COMPLETION = (4.6, 0.7), (3.8, 0.8)


def lengths(count, median, spread):
    draws = np.random.default_rng(0).lognormal(median, spread, count)
    return (1 + draws.clip(max=1023)).astype(np.int64)


@dataclass(frozen=True)
class Deal:
    """An epoch's groups to micro-batches, step by step."""

    device: str
    groups: int
    per_step: int
    ranks: int
    budget: int

    op = "packing"
    ceiling = "copy_of_sizes"
    unit = "million_groups_per_s"
    cost = 1.0

    def __str__(self):
        return (
            f"deal {self.groups} groups, {self.per_step} a step, {self.ranks} ranks,"
            f" {self.budget} tokens"
        )

    @property
    def work(self):
        return self.groups / 1e6

    def load(self):
        sizes = lengths(self.groups, *PROMPT) + 2 * lengths(self.groups, *COMPLETION)
        return sizes.tolist()

    def top(self, sizes):
        return lambda: [*sizes]

    def errors(self, sizes):
        def check(steps):
            dealt = [part for ranks in steps for parts in ranks for part in parts]
            return {"groups_lost": abs(sum(map(len, dealt)) - self.groups)}

        return check

    def providers(self):
        def make(sizes):
            def deal():
                return [
                    micro_batches(
                        sizes[at : at + self.per_step],
                        [size * (1 + size / 4096) for size in sizes[at : at + self.per_step]],
                        ranks=self.ranks,
                        max_size=self.budget,
                    )
                    for at in range(0, self.groups, self.per_step)
                ]

            return Provider(deal)

        return {"fastpref": make}


@dataclass(frozen=True)
class Pack:
    """Pairs to packed, prefix-shared batches of tensors."""

    device: str
    groups: int
    per_batch: int

    op = "packing"
    ceiling = "copy_of_tokens"
    unit = "million_groups_per_s"
    cost = 1.0

    def __str__(self):
        return f"pack {self.groups} pairs, {self.per_batch} a batch"

    @property
    def work(self):
        return self.groups / 1e6

    def load(self):
        parts = [lengths(self.groups, *kind).tolist() for kind in (PROMPT, COMPLETION, COMPLETION)]
        token = array("i", [7])
        return [
            Group(p * token, (c * token, r * token), (None, None), row, {"ref_logp": (0.0, 0.0)})
            for row, (p, c, r) in enumerate(zip(*parts, strict=True))
        ]

    def top(self, groups):
        tokens = np.ones(self.count(groups), np.int32)
        return tokens.copy

    def count(self, groups):
        return sum(len(g.prompt) + sum(map(len, g.completions)) for g in groups)

    def errors(self, groups):
        count = self.count(groups)
        return lambda packed: {"tokens_lost": abs(sum(packed) - count)}

    def providers(self):
        def make(groups):
            def run():
                parts = range(0, len(groups), self.per_batch)
                return [len(pack(groups[at : at + self.per_batch]).input_ids) for at in parts]

            return Provider(run)

        return {"fastpref": make}


def cases(device):
    if device == "cpu":  # a GPU has no part in it
        yield Deal(device, groups=1_000_000, per_step=512, ranks=8, budget=8192)
        yield Pack(device, groups=65_536, per_batch=32)


def test_packing(timed):
    timed()
