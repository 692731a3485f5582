"""Micro-batches: limits kept, work balanced, nothing lost, the same every time."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref.data.micro_batches import micro_batches


def totals(values, dealt):
    return [[sum(values[i] for i in part) for part in steps] for steps in dealt]


@given(
    sizes=st.lists(st.integers(1, 50), max_size=60),
    ranks=st.integers(1, 5),
    max_size=st.one_of(st.none(), st.integers(50, 120)),
    max_groups=st.one_of(st.none(), st.integers(1, 7)),
)
@settings(max_examples=200, deadline=None)
def test_every_group_once_within_the_limits(sizes, ranks, max_size, max_groups):
    costs = [size + size**2 / 20 for size in sizes]
    dealt = micro_batches(sizes, costs, ranks=ranks, max_size=max_size, max_groups=max_groups)
    parts = [part for steps in dealt for part in steps]
    assert len(dealt) == ranks and len({len(steps) for steps in dealt}) == 1
    assert sorted(i for part in parts for i in part) == list(range(len(sizes)))
    assert all(part == sorted(part) for part in parts)
    assert all(sum(sizes[i] for i in part) <= (max_size or 10**9) for part in parts)
    assert all(len(part) <= (max_groups or 10**9) for part in parts)
    assert dealt == micro_batches(
        sizes, costs, ranks=ranks, max_size=max_size, max_groups=max_groups
    )
    if max_size is None and max_groups is None and sizes:
        assert len(dealt[0]) == 1


def test_by_hand():
    # 8, 7, 5 open a bin each; 3 joins the 5 and 2 the 7, which are the cheapest; 1 the 8, too
    assert micro_batches([5, 8, 3, 7, 2, 1], [5, 8, 3, 7, 2, 1], max_size=10) == [
        [[1, 5], [3, 4], [0, 2]]
    ]
    assert micro_batches([4, 4, 4, 4], [1, 1, 1, 9], ranks=2) == [[[3]], [[0, 1, 2]]]
    assert micro_batches([4], [4.0], ranks=2) == [[[0]], [[]]]
    assert micro_batches([], [], ranks=2) == [[], []]


def test_as_few_as_the_limits_let_there_be():
    """Each alone: a search in larger strides must not end past the last group."""
    sizes = [51 + i % 50 for i in range(147)]
    (steps,) = micro_batches(sizes, sizes, max_size=100)
    assert [len(part) for part in steps] == [1] * 147
    alike = [10] * 1000
    (steps,) = micro_batches(alike, alike, max_size=100)
    assert [len(part) for part in steps] == [10] * 100


def test_micro_batches_are_full_and_ranks_work_alike():
    sizes = [20 + (i * 7919) % 480 for i in range(512)]
    costs = [size * (1 + size / 1000) for size in sizes]
    dealt = micro_batches(sizes, costs, ranks=4, max_size=4096)
    steps = len(dealt[0])
    assert sum(sizes) / (4 * steps * 4096) > 0.9
    work = totals(costs, dealt)
    assert all(max(s) < 1.02 * min(s) for s in zip(*work, strict=True))


def test_a_step_waits_for_no_rank():
    """One long group: those that run beside it are the next longest, not the shortest."""
    costs = [100.0, 10.0, 90.0, 9.0]
    assert micro_batches([1] * 4, costs, ranks=2, max_groups=1) == [[[0], [1]], [[2], [3]]]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_size": 0}, "max_size of at least 1, got 0"),
        ({"max_groups": 0}, "max_groups of at least 1, got 0"),
        ({"ranks": 0}, "ranks of at least 1, got 0"),
        ({"max_size": 4}, "groups of at most 4 tokens, got one of 5"),
    ],
)
def test_refuses(limits, message):
    with pytest.raises(ValueError, match=message):
        micro_batches([5, 2], [1.0, 1.0], **limits)
