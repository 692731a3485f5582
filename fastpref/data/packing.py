"""Groups of token ids -> one packed row of tokens, every prompt stored once.

Letters: G groups, B completions, T tokens, M scored tokens, Tk keys, S segments (S = B).
"""

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


def _offsets(lengths: Sequence[int]) -> Ints:
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
    total = 0
    for group in groups:
        _check(group)
        total += num_tokens(group, share=share)
    count = np.arange(total, dtype=np.int64)
    tokens: list[int] = []
    positions: list[Ints] = []
    keys: list[Ints] = []
    rows: list[Ints] = []
    target: list[Ints] = []
    bounds: list[tuple[int, int, int, int]] = []
    k_end = 0
    for group in groups:
        start, prompt = len(tokens), len(group.prompt)
        for i, (completion, flags) in enumerate(zip(group.completions, group.scored, strict=True)):
            whole = i == 0 or not share  # one segment with its prompt: its keys are its queries
            if whole:
                start = len(tokens)
                tokens += group.prompt
            own, size = len(tokens), len(completion)
            tokens += completion
            q0 = start if whole else own
            positions.append(count[0 if whole else prompt : prompt + size])
            keys += [count[start : start + prompt], count[own : own + size]]
            bounds.append((q0, own + size, k_end, k_end + prompt + size))
            k_end += prompt + size
            # the last prompt row scores the first token of every completion
            scores = np.concatenate((count[own - 1 : own], count[own : own + size - 1]))
            scores[0] = start + prompt - 1
            wanted = np.array(completion, np.int64)
            if flags is not None:
                keep = np.array(flags, np.bool_)
                scores, wanted = scores[keep], wanted[keep]
            rows.append(scores)
            target.append(wanted)
    q_lengths = [q1 - q0 for q0, q1, _, _ in bounds]
    k_lengths = [k1 - k0 for _, _, k0, k1 in bounds]
    segments = Segments(
        cu_q=torch.from_numpy(_offsets(q_lengths)).to(torch.int32),
        cu_k=torch.from_numpy(_offsets(k_lengths)).to(torch.int32),
        k_index=torch.from_numpy(np.concatenate(keys)),
        max_q=max(q_lengths),
        max_k=max(k_lengths),
        bounds=tuple(bounds),
    )
    return Batch(
        input_ids=torch.tensor(tokens, dtype=torch.int64),
        position_ids=torch.from_numpy(np.concatenate(positions)),
        segments=segments,
        rows=torch.from_numpy(np.concatenate(rows)),
        target=torch.from_numpy(np.concatenate(target)),
        completions=torch.from_numpy(_offsets([len(x) for x in target])),
        groups=torch.from_numpy(_offsets([len(group.completions) for group in groups])),
        extras=_pack_extras(groups),
    )


def split_groups(
    groups: Sequence[Group], *, max_groups: int | None = None, max_tokens: int | None = None
) -> list[list[Group]]:
    """Cut groups into micro-batches: order kept, no group split, each as full as the limits let it.

    Args:
        max_groups: most groups in a micro-batch; None for no limit.
        max_tokens: most packed tokens (num_tokens) in a micro-batch; None for no limit.

    Raises:
        ValueError: a limit below one, or a single group larger than max_tokens.
    """
    for name, limit in (("max_groups", max_groups), ("max_tokens", max_tokens)):
        if limit is not None and limit < 1:
            raise ValueError(f"need {name} of at least 1 or None, got {limit}")
    out: list[list[Group]] = []
    room_groups = room_tokens = 0.0
    for group in groups:
        size = num_tokens(group)
        if max_tokens is not None and size > max_tokens:
            raise ValueError(
                f"row {group.row}: need a group of at most max_tokens={max_tokens} tokens, got"
                f" {size}: raise the limit or lower max_length"
            )
        if not out or room_groups < 1 or room_tokens < size:
            out.append([])
            room_groups = float("inf") if max_groups is None else max_groups
            room_tokens = float("inf") if max_tokens is None else max_tokens
        out[-1].append(group)
        room_groups -= 1
        room_tokens -= size
    return out
