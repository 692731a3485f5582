"""pack: every token sees its own sequence and nothing else; every scored token is read once."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref.data.packing import Batch, num_tokens, pack, split_groups
from fastpref.data.tokenize import Group


def group(prompt, *completions, scored=None, row=0, extras=None):
    flags = (None,) * len(completions) if scored is None else scored
    return Group(prompt, completions, flags, row, {} if extras is None else extras)


TOKENS = st.lists(st.integers(0, 999), min_size=1, max_size=6)


@st.composite
def any_group(draw):
    completions = draw(st.lists(TOKENS, min_size=1, max_size=4))
    flags = [
        draw(st.none() | st.lists(st.booleans(), min_size=len(c), max_size=len(c)))
        for c in completions
    ]
    return group(draw(TOKENS), *completions, scored=tuple(flags), row=draw(st.integers(0, 99)))


def seen_by(batch: Batch) -> dict[int, tuple[list[int], list[int]]]:
    """Token -> (ids, positions) that its query sees, from cu_q, cu_k and k_index alone."""
    s = batch.segments
    out = {}
    for i in range(len(s.cu_q) - 1):
        q0, q1, k0, k1 = (int(x) for x in (*s.cu_q[i : i + 2], *s.cu_k[i : i + 2]))
        assert s.bounds[i] == (q0, q1, k0, k1)
        for q in range(q0, q1):
            keys = s.k_index[k0 : k1 - (q1 - 1 - q)]  # causal, aligned at the bottom right
            assert q not in out
            out[q] = (batch.input_ids[keys].tolist(), batch.position_ids[keys].tolist())
    return out


@settings(max_examples=150, deadline=None)
@given(st.lists(any_group(), min_size=1, max_size=4), st.booleans())
def test_every_token_sees_its_own_sequence(groups, share):
    batch = pack(groups, share=share)
    seen = seen_by(batch)
    total = sum(num_tokens(g, share=share) for g in groups)
    assert len(batch.input_ids) == len(seen) == total
    s = batch.segments
    if not share:
        assert s.k_index.tolist() == list(range(total)) and torch.equal(s.cu_q, s.cu_k)
    assert s.max_q == int(s.cu_q.diff().max()) and s.max_k == int(s.cu_k.diff().max())
    assert len(s.k_index) == s.cu_k[-1] and len(batch.rows) == batch.completions[-1]
    for ids, positions in seen.values():
        assert positions == list(range(len(ids)))
    completion = 0
    for g, (b0, b1) in zip(groups, batch.groups.unfold(0, 2, 1).tolist(), strict=True):
        assert b1 - b0 == len(g.completions) and b0 == completion
        for ids, flags in zip(g.completions, g.scored, strict=True):
            m0, m1 = batch.completions[completion : completion + 2].tolist()
            scored = [i for i in range(len(ids)) if flags is None or flags[i]]
            assert batch.target[m0:m1].tolist() == [ids[i] for i in scored]
            for row, i in zip(batch.rows[m0:m1].tolist(), scored, strict=True):
                assert seen[row][0] == g.prompt + ids[:i]
            completion += 1


def test_worked_out_by_hand():
    pair = group([1, 2, 3], [4, 5], [6, 7, 8], row=7, extras={"margin": 0.5, "ref": (-1.0, -2.0)})
    one = group([9], [10], row=3, extras={"margin": 1.5, "ref": (-3.0,)})
    batch = pack([pair, one])
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 0, 1]
    assert batch.segments.bounds == ((0, 5, 0, 5), (5, 8, 5, 11), (8, 10, 11, 13))
    assert batch.segments.k_index.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8, 9]
    assert batch.rows.tolist() == [2, 3, 2, 5, 6, 8]
    assert batch.target.tolist() == [4, 5, 6, 7, 8, 10]
    assert batch.completions.tolist() == [0, 2, 5, 6]
    assert batch.groups.tolist() == [0, 2, 3]
    assert batch.extras["margin"].tolist() == [0.5, 1.5]
    assert batch.extras["ref"].tolist() == [-1.0, -2.0, -3.0]
    assert batch.extras["row"].tolist() == [7, 3]
    dtypes = {batch.segments.cu_q.dtype, batch.segments.cu_k.dtype}
    assert dtypes == {torch.int32}
    moved = batch.to("meta")
    tensors = [x for part in (moved, moved.segments) for x in vars(part).values()]
    tensors += moved.extras.values()
    assert all(x.is_meta for x in tensors if isinstance(x, torch.Tensor))
    assert moved.segments.bounds == batch.segments.bounds


def test_without_sharing_every_completion_has_a_prompt():
    batch = pack([group([1, 2, 3], [4, 5], [6, 7, 8]), group([9], [10])], share=False)
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, 1, 2, 3, 6, 7, 8, 9, 10]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 0, 1]
    assert batch.segments.bounds == ((0, 5, 0, 5), (5, 11, 5, 11), (11, 13, 11, 13))
    assert batch.rows.tolist() == [2, 3, 7, 8, 9, 11]
    assert batch.target.tolist() == [4, 5, 6, 7, 8, 10]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([], "at least one group"),
        ([group([], [1], row=5)], r"row 5.*got 0 and \[1\]"),
        ([group([1], [2], [], row=5)], r"row 5.*got 1 and \[1, 0\]"),
        ([group([1], row=5)], r"row 5.*got 1 and \[\]"),
        ([group([1], [2, 3], scored=([True],), row=5)], r"row 5.*lengths \[2\].*got \[1\]"),
        ([group([1], [2], scored=(), row=5)], r"row 5.*lengths \[1\].*got \[\]"),
        ([group([1], [2], extras={"a": 1.0}), group([1], [2], row=5)], r"row 5.*\['a'\].*got \[\]"),
        (
            [group([1], [2], extras={"a": 1.0}), group([1], [2], extras={"a": (1.0,)}, row=5)],
            "row 5.*'a' per group as in row 0",
        ),
        ([group([1], [2], extras={"a": (1.0, 2.0)}, row=5)], "row 5.*each of 1.*got 2"),
        ([group([1], [2], extras={"row": 1.0})], "'row'"),
    ],
)
def test_rejects(groups, message):
    with pytest.raises(ValueError, match=message):
        pack(groups)


def test_split_keeps_order_and_limits():
    groups = [group([1] * n, [2], row=n) for n in (3, 4, 2, 9, 1, 1)]  # 4, 5, 3, 10, 2, 2 tokens

    def rows(**limits):
        return [[g.row for g in part] for part in split_groups(groups, **limits)]

    assert rows() == [[3, 4, 2, 9, 1, 1]]
    assert rows(max_groups=4) == [[3, 4, 2, 9], [1, 1]]
    assert rows(max_tokens=10) == [[3, 4], [2], [9], [1, 1]]
    assert rows(max_tokens=12) == [[3, 4, 2], [9, 1], [1]]
    assert rows(max_tokens=12, max_groups=2) == [[3, 4], [2], [9, 1], [1]]
    assert split_groups([], max_tokens=1) == []
    # rows of one completion each, padded: 3 + 1, 4 + 1, 2 + 1, 9 + 1, 1 + 1, 1 + 1
    assert rows(max_tokens=10, share=False) == [[3, 4], [2], [9], [1, 1]]
    assert rows(max_tokens=15, share=False) == [[3, 4, 2], [9], [1, 1]]
    both = [group([1], [2, 2, 2], [2], row=0), group([1], [2], [2], row=1)]
    assert len(split_groups(both, max_tokens=15, share=False)) == 2  # four rows of four
    assert len(split_groups(both, max_tokens=16, share=False)) == 1
    with pytest.raises(ValueError, match=r"row 9: need .*max_tokens=9 tokens, got 10"):
        split_groups(groups, max_tokens=9)
    with pytest.raises(ValueError, match="max_groups of at least 1 or None, got 0"):
        split_groups(groups, max_groups=0)


def test_thousands_of_groups_per_second():
    groups = [group(list(range(170)), list(range(60)), list(range(70)), row=i) for i in range(256)]
    start = time.process_time()
    pack(groups)
    assert len(groups) / (time.process_time() - start) > 2000
