"""Reference log-probs: from a frozen model beside the policy, or computed once and kept."""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastpref.data.packing import Batch, pack, split_groups
from fastpref.data.tokenize import Group
from fastpref.logps import sequence_logp
from fastpref.models.head import LogpModel
from fastpref.train.engine import Engine


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
    cache: Path,
    *,
    batch_size: int,
    max_tokens: int | None = None,
) -> list[Group]:
    """Score every group with ``model`` as it is now, or read the scores that lie in ``cache``.

    Args:
        engine: where the model lives.
        model: the reference: the policy before its first step.
        groups: what to score.
        cache: safetensors file; it holds ``ref_logp`` (completions,) fp32 and the key of the
            model and the tokens that gave it. Another key is computed anew.
        batch_size: groups per forward.
        max_tokens: tokens per forward, if groups are to be split by that instead.

    Returns:
        The groups with ``ref_logp`` among their extras: a float per completion, in nats.
    """
    key = cache_key(engine, model, groups)
    values = read(cache, key)
    if values is None:
        print(f"reference: scoring {len(groups)} groups", file=sys.stderr, flush=True)
        limit = None if max_tokens else batch_size
        parts = [
            score(engine, model, pack(part).to(engine.device)).cpu()
            for part in split_groups(groups, max_groups=limit, max_tokens=max_tokens)
        ]
        values = torch.cat(parts) if parts else torch.zeros(0)
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(".partial")
        save_file({"ref_logp": values}, partial, metadata={"key": key})
        partial.rename(cache)
    flat = iter(values.tolist())
    return [
        replace(g, extras={**g.extras, "ref_logp": tuple(next(flat) for _ in g.completions)})
        for g in groups
    ]


def read(cache: Path, key: str) -> Tensor | None:
    """The cached values, if they belong to this key."""
    if not cache.exists():
        return None
    with safe_open(cache, framework="pt") as file:
        if (file.metadata() or {}).get("key") != key:
            return None
        values: Tensor = file.get_tensor("ref_logp")
        return values


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
