"""Reference log-probs: from a frozen model beside the policy, or computed once and kept."""

import hashlib
import os
import shutil
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
from fastpref.methods.base import Method
from fastpref.models.adapters import base_state
from fastpref.models.model import LogpModel
from fastpref.train.checkpoint import CheckpointError
from fastpref.train.console import tell
from fastpref.train.engine import Engine
from fastpref.train.guard import DivergedError, locked, size


@torch.no_grad()
def score(engine: Engine, method: Method, model: LogpModel, batch: Batch) -> Tensor:
    """(B,) fp32 summed log-prob of each completion's scored tokens, in nats."""
    with engine.autocast():
        stats = model(batch)
    return method.sum_logps(stats.logp, batch)


def with_reference(
    engine: Engine, method: Method, reference: LogpModel | None, batch: Batch
) -> Batch:
    """The batch with ``ref_logp``, scored now unless it came with the data."""
    if reference is None or method.compares_models or "ref_logp" in batch.extras:
        return batch
    scores = score(engine, method, reference, batch)
    return replace(batch, extras={**batch.extras, "ref_logp": scores})


def precompute(
    engine: Engine,
    method: Method,
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
        method: what the scores are for: it says how tokens add up.
        model: the reference: the policy before its first step.
        groups: what to score.
        folder: of safetensors files with ``ref_logp`` (completions,) fp32, each named by its key:
            the model's weights and config, the precision, the rule by which tokens add up where it
            is no plain sum, and the tokens, which hold whatever
            tokenizer, template and truncation made of the data. Another key is computed anew.
        batch_size: groups per forward.
        max_tokens: tokens per forward, if groups are to be split by that instead.
        on_batch: called before each forward and while another run fills; what it raises ends this.

    Returns:
        The groups with ``ref_logp`` among their extras: a float per completion, in nats.

    Raises:
        CheckpointError: a file of the folder is damaged or could not be written.
        DivergedError: a score is not finite; names the rows.
    """
    if not groups:
        return []
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"need a folder for reference log-probs, got {error}") from error
    path = folder / f"{cache_key(engine, method, model, groups)}.safetensors"
    if not path.exists():
        limit = None if max_tokens else batch_size
        share = model.shares_prompts
        batches = split_groups(groups, max_groups=limit, max_tokens=max_tokens, share=share)
        try:
            with locked(path.with_suffix(".lock"), while_waiting=on_batch):
                if not path.exists():  # else another run has filled it meanwhile
                    fill(engine, method, model, batches, path, on_batch)
        except (OSError, SafetensorError) as error:
            free = size(shutil.disk_usage(folder).free)
            raise CheckpointError(
                f"could not write reference log-probs to {folder} ({free} free): {error}; those "
                "that lie there are kept"
            ) from error
    flat = iter(read(path, sum(len(group.completions) for group in groups)))
    return [
        replace(g, extras={**g.extras, "ref_logp": tuple(next(flat) for _ in g.completions)})
        for g in groups
    ]


@torch.no_grad()
def fill(
    engine: Engine,
    method: Method,
    model: LogpModel,
    batches: Sequence[Sequence[Group]],
    path: Path,
    on_batch: Callable[[], None],
) -> None:
    """Score batch after batch, then write ``path``; what a fill before this one did is kept."""
    partial = path.with_suffix(".partial")
    counts = [sum(len(group.completions) for group in batch) for batch in batches]
    parts = whole_parts(partial, counts)
    left = batches[len(parts) :]
    told = f"reference: scoring {sum(map(len, left))} groups"
    told += f", those of {len(parts)} batches are there" if parts else ""
    tell(told)
    with partial.open("r+b" if parts else "wb") as file:
        file.truncate(sum(len(part) + 4 for part in parts))
        file.seek(0, os.SEEK_END)
        for batch in left:
            on_batch()
            packed = pack(batch, share=model.shares_prompts).to(engine.device)
            scores = score(engine, method, model, packed).cpu()
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
    whole.chmod(partial.stat().st_mode)  # safetensors leaves it to its owner alone
    whole.rename(path)
    partial.unlink()


def whole_parts(partial: Path, counts: Sequence[int]) -> list[bytes]:
    """The batches, of ``counts`` scores each, that lie undamaged in a fill that was cut short."""
    raw = partial.read_bytes() if partial.exists() else b""
    parts: list[bytes] = []
    at = 0
    for count in counts:
        end = at + 4 * count
        part, code = raw[at:end], raw[end : end + 4]
        if code != crc(part):
            break
        parts.append(part)
        at = end + 4
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
        raise CheckpointError(f"{path} is damaged (CRC-32): delete it")
    scores: list[float] = values.tolist()
    return scores


def cache_key(engine: Engine, method: Method, model: LogpModel, groups: Sequence[Group]) -> str:
    """Hash of everything that the scores depend on: weights, config, precision, tokens."""
    digest = hashlib.sha256()
    digest.update(model.model.config.to_json_string(use_diff=False).encode())
    with engine.autocast():
        digest.update(f"{autocast_dtype(engine.device)}".encode())
    digest.update(method.reference_rule.encode())
    digest.update(hash_weights(model).encode())
    digest.update(hash_groups(groups).encode())
    return digest.hexdigest()


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    enabled = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if enabled else None


def hash_weights(model: LogpModel) -> str:
    """Hash of the names, shapes, dtypes and values of all parameters and buffers but adapters'."""
    digest = hashlib.sha256()
    for name, weight in base_state(model).items():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_groups(groups: Sequence[Group], *, numbers: bool = False) -> str:
    """Hash of the tokens of every group, of which of them are scored, and of its own numbers."""
    digest = hashlib.sha256()
    for group in groups:
        for tokens in (group.prompt, *group.completions):
            digest.update(len(tokens).to_bytes(8, "little"))
            digest.update(np.array(tokens, "<i8").tobytes())
        digest.update(repr(group.scored).encode())
        if numbers:
            given = sorted(item for item in group.extras.items() if item[0] != "ref_logp")
            digest.update(repr(given).encode())
    return digest.hexdigest()
