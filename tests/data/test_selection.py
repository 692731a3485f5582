"""Pairs of one prompt's scored samples."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastpref.data.selection import pairs_by_gap


def test_rs_dpo_keeps_a_gap_of_one_at_temperature_a_half_below_0_880797():
    scores = [0.0, 1.0]
    assert pairs_by_gap(scores, temperature=0.5, threshold=0.880797) == [(1, 0)]
    assert pairs_by_gap(scores, temperature=0.5, threshold=0.880798) == []


def test_the_threshold_itself_is_not_enough():
    threshold = 1 / (1 + math.exp(-2.0))
    assert pairs_by_gap([3.0, 1.0], temperature=1.0, threshold=threshold) == []


def test_every_pair_with_the_better_one_first():
    scores = [1.0, 4.0, 1.0, 2.0]
    every = [(1, 0), (1, 2), (1, 3), (3, 0), (3, 2)]
    assert pairs_by_gap(scores, temperature=1.0, threshold=0.5) == every
    assert pairs_by_gap(scores, temperature=1.0, threshold=0.85) == [(1, 0), (1, 2), (1, 3)]
    assert pairs_by_gap(scores, temperature=1.0, threshold=0.9) == [(1, 0), (1, 2)]
    assert pairs_by_gap(scores, temperature=10.0, threshold=0.9) == []


def test_nothing_to_compare():
    for scores in ([], [1.0], [2.0, 2.0, 2.0]):
        assert pairs_by_gap(scores, temperature=1.0, threshold=0.5) == []


@given(
    scores=st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=6),
    temperature=st.floats(1e-6, 1e6),
    threshold=st.floats(0.5, 0.999),
)
def test_any_scores(scores, temperature, threshold):
    pairs = pairs_by_gap(scores, temperature=temperature, threshold=threshold)
    least = temperature * math.log(threshold / (1 - threshold))
    for i, better in enumerate(scores):
        for j, worse in enumerate(scores):
            gap = better - worse
            if not math.isclose(gap, least, rel_tol=1e-6, abs_tol=1e-6 * temperature):
                assert ((i, j) in pairs) == (gap > least)
    assert len(set(pairs)) == len(pairs)
    assert not {(j, i) for i, j in pairs} & set(pairs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, r"need temperature > 0 and threshold in \[0.5, 1\), got 0.0 and"),
        ({"temperature": math.nan}, "need temperature > 0 .* got nan and"),
        ({"threshold": 0.49}, r"threshold in \[0.5, 1\), got 1.0 and 0.49"),
        ({"threshold": 1.0}, r"threshold in \[0.5, 1\), got 1.0 and 1.0"),
        ({"scores": [1.0, math.nan]}, r"need finite scores, got \[1.0, nan\]"),
        ({"scores": [math.inf]}, r"need finite scores, got \[inf\]"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        pairs_by_gap(**{"scores": [1.0, 0.0], "temperature": 1.0, "threshold": 0.8, **change})
