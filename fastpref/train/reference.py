"""Reference log-probs: from a frozen model beside the policy, or computed once and kept."""

import hashlib
import os
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastpref.data.packing import Batch, pack, split_groups
from fastpref.data.tokenize import Group
from fastpref.logps import sequence_logp
from fastpref.models.head import LogpModel
from fastpref.train.checkpoint import CheckpointError
from fastpref.train.engine import Engine
from fastpref.train.guard import DivergedError, locked


@torch.no_grad()
def score(engine: Engine, model: LogpModel, batch: Batch) -> Tensor:
    """(B,) fp32 summed log-prob of each completion's scored tokens, in nats."""
    with engine.autocast():
        stats = model(batch)
    return sequence_logp(stats.logp, cu_seqlens=batch.completions)


def with_reference(engine: Engine, reference: LogpModel | None, batch: Batch) -> Batch:
    """The batch with ``ref_logp``, scored now unless it came with the data."""
    if reference is None or "ref_logp" in batch.extras:
        return batch
    return replace(batch, extras={**batch.extras, "ref_logp": score(engine, reference, batch)})


def precompute(
    engine: Engine,
    model: LogpModel,
    groups: Sequence[Group],
    folder: Path,
    *,
    batch_size: int,
    max_tokens: int | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> list[Group]:
    """Score every group with ``model`` as it is now, or read the scores that lie in ``folder``.

    Scores are kept as they come, so that a fill that was cut short goes on from its last batch.
    Runs that share the folder wait for the one that fills.

    Args:
        engine: where the model lives.
        model: the reference: the policy before its first step.
        groups: what to score.
        folder: of safetensors files with ``ref_logp`` (completions,) fp32, each named by its key:
            the model's weights and config, the precision, and the tokens, which hold whatever
            tokenizer, template and truncation made of the data. Another key is computed anew.
        batch_size: groups per forward.
        max_tokens: tokens per forward, if groups are to be split by that instead.
        on_batch: called before each forward; what it raises ends the fill.

    Returns:
        The groups with ``ref_logp`` among their extras: a float per completion, in nats.

    Raises:
        CheckpointError: a file of the folder is damaged.
        DivergedError: a score is not finite; names the rows.
    """
    if not groups:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{cache_key(engine, model, groups)}.safetensors"
    if not path.exists():
        limit = None if max_tokens else batch_size
        batches = split_groups(groups, max_groups=limit, max_tokens=max_tokens)
        with locked(path.with_suffix(".lock")):
            if not path.exists():  # else another run has filled it meanwhile
                fill(engine, model, batches, path, on_batch)
    flat = iter(read(path, sum(len(group.completions) for group in groups)))
    return [
        replace(g, extras={**g.extras, "ref_logp": tuple(next(flat) for _ in g.completions)})
        for g in groups
    ]


@torch.no_grad()
def fill(
    engine: Engine,
    model: LogpModel,
    batches: Sequence[Sequence[Group]],
    path: Path,
    on_batch: Callable[[], None],
) -> None:
    """Score batch after batch, then write ``path``; what a fill before this one did is kept."""
    partial = path.with_suffix(".partial")
    sizes = [sum(len(group.completions) for group in batch) for batch in batches]
    parts = whole_parts(partial, sizes)
    left = batches[len(parts) :]
    told = f"reference: scoring {sum(map(len, left))} groups"
    told += f", those of {len(parts)} batches are there" if parts else ""
    print(told, file=sys.stderr, flush=True)
    with partial.open("r+b" if parts else "wb") as file:
        file.truncate(sum(len(part) + 4 for part in parts))
        file.seek(0, os.SEEK_END)
        for batch in left:
            on_batch()
            scores = score(engine, model, pack(batch).to(engine.device)).cpu()
            if not torch.isfinite(scores).all():
                rows = ", ".join(str(group.row) for group in batch)
                raise DivergedError(f"the reference's log-probs of the rows {rows} are not finite")
            parts.append(scores.numpy().astype("<f4").tobytes())
            file.write(parts[-1] + crc(parts[-1]))
            file.flush()
    values = b"".join(parts)
    whole = path.with_suffix(".whole")
    tensor = torch.from_numpy(np.frombuffer(values, "<f4").copy())
    save_file({"ref_logp": tensor}, whole, metadata={"crc32": crc(values).hex()})
    whole.rename(path)
    partial.unlink()


def whole_parts(partial: Path, sizes: Sequence[int]) -> list[bytes]:
    """The batches, of ``sizes`` scores each, that lie undamaged in a fill that was cut short."""
    raw = partial.read_bytes() if partial.exists() else b""
    parts: list[bytes] = []
    at = 0
    for size in sizes:
        part, code = raw[at : at + 4 * size], raw[at + 4 * size : at + 4 * size + 4]
        if code != crc(part):
            break
        parts.append(part)
        at += 4 * size + 4
    return parts


def crc(part: bytes) -> bytes:
    return zlib.crc32(part).to_bytes(4, "little")


def read(path: Path, count: int) -> list[float]:
    """The ``count`` scores of a cache.

    Raises:
        CheckpointError: they are not those that were written.
    """
    try:
        with safe_open(path, framework="pt") as file:
            values: Tensor = file.get_tensor("ref_logp")
            written = (file.metadata() or {}).get("crc32")
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged ({error}): delete it") from error
    if values.shape != (count,) or crc(values.numpy().tobytes()).hex() != written:
        got = f"{tuple(values.shape)} with other bytes than were written"
        raise CheckpointError(
            f"need ({count},) reference log-probs in {path}, got {got}: delete it"
        )
    scores: list[float] = values.tolist()
    return scores


def cache_key(engine: Engine, model: LogpModel, groups: Sequence[Group]) -> str:
    """Hash of everything that the scores depend on: weights, config, precision, tokens."""
    digest = hashlib.sha256()
    digest.update(model.model.config.to_json_string(use_diff=False).encode())
    with engine.autocast():
        digest.update(f"{autocast_dtype(engine.device)}".encode())
    for name, weight in model.model.state_dict().items():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    digest.update(hash_groups(groups).encode())
    return digest.hexdigest()


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    enabled = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if enabled else None


def hash_groups(groups: Sequence[Group]) -> str:
    """Hash of the tokens of every group, and of which of them are scored."""
    digest = hashlib.sha256()
    for group in groups:
        digest.update(repr((group.prompt, group.completions, group.scored)).encode())
    return digest.hexdigest()
