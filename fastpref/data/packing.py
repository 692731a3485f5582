"""Groups of token ids -> one packed row of tokens, every prompt stored once.

Letters: G groups, B completions, T tokens, M scored tokens, Tk keys, S segments (S = B).
"""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastpref.data.tokenize import Group

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Segments:
    """What attends to what: queries q0..q1 see keys k0..k1 of the gathered row, causal from the
    bottom right. The first completion of a group is one segment with its prompt, each other
    completion is a segment of its own whose keys are the prompt and itself. Unshared, each
    completion is one segment with a copy of the prompt, and its keys are its queries.
    """

    cu_q: Tensor  # (S+1,) int32
    cu_k: Tensor  # (S+1,) int32
    k_index: Tensor  # (Tk,) int64: which token each key is
    max_q: int
    max_k: int
    bounds: tuple[tuple[int, int, int, int], ...]  # (q0, q1, k0, k1) on the host: no sync to cut

    def map(self, move: Callable[[Tensor], Tensor]) -> "Segments":
        return replace(self, cu_q=move(self.cu_q), cu_k=move(self.cu_k), k_index=move(self.k_index))


@dataclass(frozen=True)
class Batch:
    """A micro-batch: one row of tokens without padding."""

    input_ids: Tensor  # (T,) int64
    position_ids: Tensor  # (T,) int64: every completion continues from its prompt
    segments: Segments
    rows: Tensor  # (M,) int64: hidden row rows[m] scores token target[m]
    target: Tensor  # (M,) int64
    completions: Tensor  # (B+1,) int64: offsets of each completion in target
    groups: Tensor  # (G+1,) int64: offsets of each group's completions in 0..B
    extras: dict[str, Tensor]  # (G,) or (B,) fp32 by name; always "row" (G,) int64

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        return self.map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        return self.map(torch.Tensor.pin_memory)

    def map(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        """The same with every tensor moved."""
        return Batch(
            input_ids=move(self.input_ids),
            position_ids=move(self.position_ids),
            segments=self.segments.map(move),
            rows=move(self.rows),
            target=move(self.target),
            completions=move(self.completions),
            groups=move(self.groups),
            extras={name: move(x) for name, x in self.extras.items()},
        )


def num_tokens(group: Group, *, share: bool = True) -> int:
    """Tokens that a group costs in a packed row: every completion, the prompt once if shared."""
    prompts = 1 if share else len(group.completions)
    return prompts * len(group.prompt) + sum(map(len, group.completions))


def row_tokens(group: Group) -> int:
    """Tokens that a group costs as rows of one completion each, padded to its longest."""
    return len(group.completions) * longest(group)


def longest(group: Group) -> int:
    """Tokens of the prompt and the longest completion."""
    return len(group.prompt) + max(map(len, group.completions))


def _check(group: Group) -> None:
    if not group.prompt or not group.completions or not all(group.completions):
        raise ValueError(
            f"row {group.row}: need a prompt and completions of at least one token each, got"
            f" {len(group.prompt)} and {[len(c) for c in group.completions]} tokens"
        )
    if len(group.scored) != len(group.completions) or any(
        flags is not None and len(flags) != len(completion)
        for flags, completion in zip(group.scored, group.completions, strict=False)
    ):
        got = [None if flags is None else len(flags) for flags in group.scored]
        need = [len(c) for c in group.completions]
        raise ValueError(f"row {group.row}: need scored flags of lengths {need} or None, got {got}")


def _offsets(lengths: Sequence[int] | Ints) -> Ints:
    out = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=out[1:])
    return out


def _pack_extras(groups: Sequence[Group]) -> dict[str, Tensor]:
    names = list(groups[0].extras)
    per_completion = {name: isinstance(groups[0].extras[name], tuple) for name in names}
    values: dict[str, list[float]] = {name: [] for name in names}
    for group in groups:
        if group.extras.keys() != values.keys():
            raise ValueError(f"row {group.row}: need extras {names}, got {list(group.extras)}")
        for name, value in group.extras.items():
            if isinstance(value, tuple) != per_completion[name]:
                raise ValueError(
                    f"row {group.row}: need extra {name!r} per"
                    f" {'completion' if per_completion[name] else 'group'} as in row"
                    f" {groups[0].row}, got {value!r}"
                )
            if not isinstance(value, tuple):
                values[name].append(value)
            elif len(value) == len(group.completions):
                values[name].extend(value)
            else:
                raise ValueError(
                    f"row {group.row}: need one {name!r} for each of {len(group.completions)}"
                    f" completions, got {len(value)}"
                )
    if "row" in values:
        raise ValueError("need extras without the name 'row' (it holds the row numbers), got one")
    extras = {name: torch.tensor(x, dtype=torch.float32) for name, x in values.items()}
    extras["row"] = torch.tensor([group.row for group in groups], dtype=torch.int64)
    return extras


def pack(groups: Sequence[Group], *, share: bool = True) -> Batch:
    """Pack groups into one row of tokens with the record that travels with it, on the CPU.

    Args:
        groups: at least one; prompts and completions of at least one token. Tokens whose
            `scored` flag is False are attended to but are no rows and no targets.
        share: whether the completions of a group share its prompt, or each has a copy.

    Returns:
        The Batch; int64 but for cu_q, cu_k (int32) and the extras (fp32).

    Raises:
        ValueError: an empty prompt, completion or list; extras or flags that do not fit.
    """
    if not groups:
        raise ValueError("need at least one group to pack, got none")
    for group in groups:
        _check(group)
    counts = np.array([len(group.completions) for group in groups])
    sizes = np.array([len(c) for group in groups for c in group.completions])
    prompts = np.repeat([len(group.prompt) for group in groups], counts)
    first = np.ones(len(sizes), np.bool_)  # of its group; or with a prompt of its own
    if share:
        first[:] = False
        first[_offsets(counts)[:-1]] = True
    q_sizes, k_sizes = sizes + prompts * first, sizes + prompts
    cu_q, cu_k = _offsets(q_sizes), _offsets(k_sizes)
    start = np.maximum.accumulate(np.where(first, cu_q[:-1], 0))  # of each one's prompt
    own = cu_q[1:] - sizes  # of its own tokens

    into_q, of_q = _within(q_sizes)
    into_k, of_k = _within(k_sizes)
    after = into_k - prompts[of_k]  # a key's place behind the prompt
    into, of = _within(sizes)
    rows = own[of] + into - 1
    rows[into == 0] = (start + prompts - 1)[of[into == 0]]  # the last prompt row, for all of them
    tokens = _tokens(groups, share)
    target = tokens[own[of] + into]
    if (keep := _scored(groups)) is not None:
        rows, target, of = rows[keep], target[keep], of[keep]
    segments = Segments(
        cu_q=torch.from_numpy(cu_q).to(torch.int32),
        cu_k=torch.from_numpy(cu_k).to(torch.int32),
        k_index=torch.from_numpy(np.where(after < 0, start[of_k] + into_k, own[of_k] + after)),
        max_q=int(q_sizes.max()),
        max_k=int(k_sizes.max()),
        bounds=tuple(
            zip(*(x.tolist() for x in (cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:])), strict=True)
        ),
    )
    return Batch(
        input_ids=torch.from_numpy(tokens),
        position_ids=torch.from_numpy(into_q + (prompts * ~first)[of_q]),
        segments=segments,
        rows=torch.from_numpy(rows),
        target=torch.from_numpy(target),
        completions=torch.from_numpy(_offsets(np.bincount(of, minlength=len(sizes)))),
        groups=torch.from_numpy(_offsets(counts)),
        extras=_pack_extras(groups),
    )


def _within(sizes: Ints) -> tuple[Ints, Ints]:
    """Of runs of these sizes, one after the other: each element's place in its run, and its run."""
    of = np.repeat(np.arange(len(sizes)), sizes)
    return np.arange(len(of)) - _offsets(sizes)[of], of


def _tokens(groups: Sequence[Group], share: bool) -> Ints:
    flat = array("i")
    for group in groups:
        for i, completion in enumerate(group.completions):
            if not (share and i):
                flat.extend(group.prompt)
            flat.extend(completion)
    return np.array(flat, np.int64)


def _scored(groups: Sequence[Group]) -> NDArray[np.bool_] | None:
    """Which tokens of all completions are; None where all are."""
    if all(flags is None for group in groups for flags in group.scored):
        return None
    flags = [
        np.ones(len(completion), np.bool_) if some is None else np.array(some, np.bool_)
        for group in groups
        for completion, some in zip(group.completions, group.scored, strict=True)
    ]
    return np.concatenate(flags)


def split_groups(
    groups: Sequence[Group],
    *,
    max_groups: int | None = None,
    max_tokens: int | None = None,
    share: bool = True,
) -> list[list[Group]]:
    """Cut groups into micro-batches: order kept, no group split, each as full as the limits let it.

    Args:
        max_groups: most groups in a micro-batch; None for no limit.
        max_tokens: most tokens in a micro-batch; None for no limit.
        share: whether that is of one packed row (num_tokens), or of a row per completion, all of
            them padded to the longest.

    Raises:
        ValueError: a limit below one, or a single group larger than max_tokens.
    """
    for name, limit in (("max_groups", max_groups), ("max_tokens", max_tokens)):
        if limit is not None and limit < 1:
            raise ValueError(f"need {name} of at least 1 or None, got {limit}")
    out: list[list[Group]] = []
    rows = tokens = width = 0
    for group in groups:
        size = num_tokens(group) if share else row_tokens(group)
        if max_tokens is not None and size > max_tokens:
            raise ValueError(
                f"row {group.row}: need a group of at most max_tokens={max_tokens} tokens, got"
                f" {size}: raise the limit or lower max_length"
            )
        rows, width = rows + len(group.completions), max(width, longest(group))
        tokens = tokens + size if share else rows * width
        full = bool(out) and max_groups is not None and len(out[-1]) >= max_groups
        if not out or full or (max_tokens is not None and tokens > max_tokens):
            out.append([])
            rows, width, tokens = len(group.completions), longest(group), size
        out[-1].append(group)
    return out
