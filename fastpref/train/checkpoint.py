"""Checkpoints: complete or not there, the newest and the best kept."""

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
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
    sums: dict[str, list[float]] = field(default_factory=dict)
    """Sums and counts since the last log line."""
    shape: dict[str, Any] = field(default_factory=dict)
    """What the steps depend on; a run goes on only if it is unchanged."""


def path_of(run: Path, step: int) -> Path:
    return run / f"checkpoint-{step}"


def step_of(path: Path) -> int:
    digits = path.name.removeprefix("checkpoint-")
    return int(digits) if digits.isdigit() else -1


def complete(run: Path) -> list[Path]:
    """The checkpoints of a run that are complete, oldest first."""
    found = [p for p in run.glob("checkpoint-*") if step_of(p) >= 0 and (p / STATE).exists()]
    return sorted(found, key=step_of)


def save(run: Path, engine: Engine, tokenizer: Any, state: TrainerState) -> Path:
    """Write a checkpoint beside its place, then put it there with one rename."""
    final = path_of(run, state.step)
    partial = run / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    engine.save_model(partial)
    engine.save_state(partial)
    tokenizer.save_pretrained(partial)
    (partial / STATE).write_text(json.dumps(asdict(state), indent=2) + "\n")
    for path in (*partial.rglob("*"), partial):
        sync(path)
    if final.exists():
        remove(final)
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


def remove(path: Path) -> None:
    """Delete a checkpoint; renamed first, since a half-deleted folder must not look complete."""
    doomed = path.with_name(f".{path.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    shutil.rmtree(path.rename(doomed))


def prune(run: Path, limit: int | None, best_step: int | None) -> None:
    """Delete the oldest checkpoints over ``limit``; the newest and the best stay."""
    if limit is None:
        return
    found = complete(run)
    safe = {*found[-1:]} | ({path_of(run, best_step)} if best_step else set())
    for path in [p for p in found if p not in safe][: max(0, len(found) - limit)]:
        remove(path)


def find(run: Path, resume: str | None) -> Path | None:
    """The checkpoint to go on from: ``auto`` takes the newest of the run, else a folder.

    Raises:
        CheckpointError: the folder is no complete checkpoint, or the run's folder holds steps that
            those to come would be mixed with.
    """
    found = complete(run)
    if resume == "auto":
        return found[-1] if found else None
    if resume is None:
        if found or (run / "metrics.jsonl").exists():
            raise CheckpointError(
                f"{run} holds a run already: go on with --resume auto, or give another output_dir"
            )
        return None
    path = Path(resume)
    if not (path / STATE).exists():
        raise CheckpointError(f"need a complete checkpoint to resume from, got {path}")
    later = [p.name for p in found if step_of(p) > step_of(path)]
    if later:
        raise CheckpointError(
            f"{run} holds steps after {path.name}: {', '.join(later)}; delete them, or give "
            "another output_dir"
        )
    return path


def load_state(folder: Path, shape: dict[str, Any]) -> TrainerState:
    """The state of a checkpoint, if its run had the same data, order and optimizer.

    Raises:
        CheckpointError: the file is damaged, or names what has changed since.
    """
    try:
        state = TrainerState(**json.loads((folder / STATE).read_text()))
    except (json.JSONDecodeError, TypeError) as error:
        raise CheckpointError(f"{folder / STATE} is not a trainer state: {error}") from error
    now = json.loads(json.dumps(shape))
    changed = [
        f"{key} {state.shape.get(key)!r}, now {now.get(key)!r}"
        for key in sorted({*now, *state.shape})
        if state.shape.get(key) != now.get(key)
    ]
    if changed:
        raise CheckpointError(
            f"need the run of {folder} unchanged to go on with it, got {'; '.join(changed)}"
        )
    return state
