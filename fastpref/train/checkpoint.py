"""Checkpoints: complete or not there, the newest and the best kept."""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastpref.train.engine import Engine

STATE = "trainer_state.json"


class CheckpointError(ValueError):
    """A checkpoint or a run folder that cannot be used as asked."""


@dataclass
class TrainerState:
    """Where a run stands; a checkpoint's trainer_state.json."""

    step: int = 0
    num_tokens: int = 0
    best_metric: float | None = None
    best_step: int | None = None
    fingerprint: str = ""
    """Hash of what the order of the data depends on."""


def path_of(run: Path, step: int) -> Path:
    return run / f"checkpoint-{step}"


def complete(run: Path) -> list[Path]:
    """The checkpoints of a run that are complete, oldest first."""
    found = [p for p in run.glob("checkpoint-*") if (p / STATE).exists()]
    return sorted(
        (p for p in found if p.name.split("-")[1].isdigit()),
        key=lambda p: int(p.name.split("-")[1]),
    )


def save(run: Path, engine: Engine, tokenizer: Any, state: TrainerState) -> Path:
    """Write a checkpoint beside its place, then put it there with one rename."""
    final = path_of(run, state.step)
    partial = run / f".{final.name}.partial"
    if engine.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    engine.save_model(partial)
    engine.save_state(partial)
    if engine.rank == 0:
        tokenizer.save_pretrained(partial)
        (partial / STATE).write_text(json.dumps(asdict(state), indent=2) + "\n")
        for path in partial.rglob("*"):
            if path.is_file():
                sync(path)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        sync(run)
    return final


def sync(path: Path) -> None:
    """Ask the system to put a file or folder on the disk now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def prune(run: Path, limit: int | None, best_step: int | None) -> None:
    """Delete the oldest checkpoints over ``limit``; the newest and the best stay."""
    if limit is None:
        return
    found = complete(run)
    safe = {found[-1], path_of(run, best_step)} if found and best_step else set(found[-1:])
    for path in [p for p in found if p not in safe][: max(0, len(found) - limit)]:
        # renamed first: a half-deleted folder must not look complete
        doomed = path.rename(run / f".{path.name}.deleted")
        shutil.rmtree(doomed)


def find(run: Path, resume: str | None) -> Path | None:
    """The checkpoint to go on from: ``auto`` takes the newest of the run, else a folder.

    Raises:
        CheckpointError: the folder is no complete checkpoint, or a fresh run would mix its files
            with those of an earlier one.
    """
    if resume == "auto":
        found = complete(run)
        return found[-1] if found else None
    if resume is not None:
        path = Path(resume)
        if not (path / STATE).exists():
            raise CheckpointError(f"need a complete checkpoint to resume from, got {path}")
        return path
    if (run / "metrics.jsonl").exists() or complete(run):
        raise CheckpointError(
            f"{run} holds a run already: go on with --resume auto, or give another output_dir"
        )
    return None


def load_state(folder: Path) -> TrainerState:
    try:
        return TrainerState(**json.loads((folder / STATE).read_text()))
    except (json.JSONDecodeError, TypeError) as error:
        raise CheckpointError(f"{folder / STATE} is not a trainer state: {error}") from error
