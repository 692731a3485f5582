"""Checkpoints: complete or not there, the newest and the best kept."""

import json
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fastpref.train.console import tell
from fastpref.train.engine import STATE as ENGINE_STATE
from fastpref.train.engine import Engine

STATE = "trainer_state.json"
# without it nothing loads a model, or adapters: it comes last
LAST = ("config.json", "adapter_config.json")


class CheckpointError(ValueError):
    """A checkpoint or a run folder that cannot be used as asked."""


@dataclass
class TrainerState:
    """Where a run stands; a checkpoint's trainer_state.json."""

    step: int = 0
    num_tokens: int = 0
    """Of the sequences as they came, a prompt counted once per completion."""
    num_computed_tokens: int = 0
    """That went through the model: a shared prompt once."""
    evaluated: int = -1
    """The last step after which there was an evaluation."""
    best_metric: float | None = None
    best_step: int | None = None
    best_by: str = ""
    """The metric that was best, and whether lower or higher is better."""
    moving: dict[str, float] = field(default_factory=dict)
    """The method's statistics that move from step to step."""
    sums: dict[str, list[float]] = field(default_factory=dict)
    """Sums and counts since the last log line."""
    lines: dict[str, int] = field(default_factory=dict)
    """Lines of metrics.jsonl and samples.jsonl that were written up to here."""
    shape: dict[str, Any] = field(default_factory=dict)
    """What the steps depend on; a run goes on only if it is unchanged."""
    eval_data: str = ""
    files: dict[str, list[int]] = field(default_factory=dict)
    """Bytes and CRC-32 of every other file of the checkpoint."""


def path_of(run: Path, step: int) -> Path:
    return run / f"checkpoint-{step}"


def step_of(path: Path) -> int:
    digits = path.name.removeprefix("checkpoint-")
    return int(digits) if digits.isdigit() else -1


def complete(run: Path) -> list[Path]:
    """The checkpoints of a run that are complete, oldest first."""
    found = [p for p in run.glob("checkpoint-*") if step_of(p) >= 0 and (p / STATE).exists()]
    return sorted(found, key=step_of)


def save(
    run: Path, engine: Engine, tokenizer: Any, state: TrainerState, *, only_model: bool = False
) -> Path:
    """Write a checkpoint beside its place, then put it there with one rename.

    Args:
        only_model: leave optimizer and random state out: no run goes on from there.

    Raises:
        CheckpointError: it could not be written; what was there before is untouched.
    """
    final = path_of(run, state.step)

    def fill(folder: Path) -> None:
        engine.save_model(folder)
        if not only_model:
            engine.save_state(folder)
        tokenizer.save_pretrained(folder)
        state.files = {name: list(checksum(folder / name)) for name in names_in(folder)}
        (folder / STATE).write_text(text_of(state))

    partial = staged(run / f".{final.name}.partial", fill)
    old = run / f".{final.name}.old"
    if final.exists():
        final.rename(old)
    partial.rename(final)
    sync(run)
    shutil.rmtree(old, ignore_errors=True)
    return final


def update(run: Path, state: TrainerState) -> Path:
    """Write the state anew into the checkpoint of its step, whose other files are as they were."""
    final = path_of(run, state.step)
    replace_text(final / STATE, text_of(state))
    return final


def text_of(state: TrainerState) -> str:
    """A state as JSON, with the CRC-32 of its other fields."""
    fields = asdict(state)
    return json.dumps(fields | {"crc32": code_of(fields)}, indent=2) + "\n"


def code_of(fields: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(fields, sort_keys=True).encode())


def publish(run: Path, engine: Engine, tokenizer: Any) -> None:
    """Write the final model, its config last.

    Raises:
        CheckpointError: it could not be written; the run's checkpoints are untouched.
    """

    def fill(folder: Path) -> None:
        engine.save_model(folder)
        tokenizer.save_pretrained(folder)

    partial = staged(run / ".model.partial", fill)
    for name in LAST:
        (run / name).unlink(missing_ok=True)
    for path in sorted(partial.iterdir(), key=lambda p: p.name in LAST):
        target = run / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.rename(target)
    partial.rmdir()
    sync(run)


def staged(folder: Path, fill: Callable[[Path], None]) -> Path:
    """A new folder with what ``fill`` writes, on the disk when this returns; all of it or none."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
        fill(folder)
        for path in (*folder.rglob("*"), folder):
            if path.is_file():  # safetensors leaves its files to their owner alone
                path.chmod(folder.stat().st_mode & 0o666)
            sync(path)
    except (OSError, RuntimeError, SafetensorError) as error:  # each writer has its own
        shutil.rmtree(folder, ignore_errors=True)
        free = shutil.disk_usage(folder.parent).free
        newest = [p.name for p in complete(folder.parent)[-1:]] or ["none"]
        raise CheckpointError(
            f"could not write {folder} ({free} bytes are free): {error}; newest complete "
            f"checkpoint: {newest[0]}"
        ) from error
    return folder


def names_in(folder: Path) -> list[str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return [p.relative_to(folder).as_posix() for p in files]


def checksum(path: Path) -> tuple[int, int]:
    """Bytes and CRC-32 of a file."""
    count = code = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            count, code = count + len(block), zlib.crc32(block, code)
    return count, code


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files; None where all are as they were written."""
    try:
        files = read_state(folder).files
    except CheckpointError as error:
        return str(error)
    for name, (count, code) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        got = checksum(path)
        if got != (count, code):
            how = "by its CRC-32" if got[0] == count else f"{got[0]} bytes of {count}"
            return f"{name} is not what was written ({how})"
    return None


def sync(path: Path) -> None:
    """Ask the system to put a file or folder on the disk now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def remove(path: Path) -> None:
    """Delete a checkpoint; renamed first, since a half-deleted folder must not look complete."""
    doomed = path.with_name(f".{path.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    shutil.rmtree(path.rename(doomed))


def prune(run: Path, limit: int | None, best_step: int | None) -> None:
    """Delete the oldest checkpoints over ``limit``.

    The newest and the best stay, and the newest that a run can go on from.
    """
    if limit is None:
        return
    found = complete(run)
    safe = {*found[-1:]} | ({path_of(run, best_step)} if best_step else set())
    safe |= {*[p for p in found if (p / ENGINE_STATE).exists()][-1:]}
    for path in [p for p in found if p not in safe][: max(0, len(found) - limit)]:
        remove(path)


def restore(run: Path) -> None:
    """Put back what a killed run had moved away to replace it, before anything looks for it."""
    for old in run.glob(".checkpoint-*.old"):
        final = run / old.name.removeprefix(".").removesuffix(".old")
        if final.exists():
            shutil.rmtree(old)
        else:
            old.rename(final)


def sweep(run: Path, step: int) -> None:
    """Delete what a killed run left half-done; set checkpoints after ``step`` aside."""
    for pattern in (".*.partial", ".checkpoint-*.deleted"):
        for path in run.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in complete(run):
        if step_of(path) > step:
            aside = path.with_name(f"{path.name}.aside")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def find(run: Path, resume: str | None) -> Path | None:
    """The checkpoint to go on from: ``auto`` takes the newest whole one of the run, else a folder.

    Raises:
        CheckpointError: the folder is no whole checkpoint, or the run's folder holds steps that
            those to come would be mixed with.
    """
    found = complete(run)
    begun = bool(found) or (run / "metrics.jsonl").exists()
    if resume == "auto":
        return newest_whole(run)
    if resume is None:
        if begun:
            raise CheckpointError(
                f"{run} holds a run already: go on with --resume auto, or give another output_dir"
            )
        return None
    path = Path(resume)
    if begun and path.resolve().parent != run.resolve():
        raise CheckpointError(
            f"{run} holds a run already: give another output_dir to go on from {path}"
        )
    if not (path / STATE).exists():
        raise CheckpointError(f"need a complete checkpoint to resume from, got {path}")
    if problem := unfit(path):
        raise CheckpointError(f"need a whole checkpoint to resume from, but {path} {problem}")
    later = [p.name for p in found if step_of(p) > step_of(path)]
    if later:
        raise CheckpointError(
            f"{run} holds steps after {path.name}: {', '.join(later)}; delete them, or give "
            "another output_dir"
        )
    return path


def newest_whole(run: Path) -> Path | None:
    """The newest checkpoint that a run can go on from, saying what is passed over.

    Returns:
        None where the run has no checkpoint at all.

    Raises:
        CheckpointError: it has some, and none will do.
    """
    problems: list[str] = []
    for path in reversed(complete(run)):
        problem = unfit(path)
        if problem is None:
            for line in problems:
                tell(f"{line}: going on from {path.name}")
            return path
        problems.append(f"{path} {problem}")
    if problems:
        need = "need a checkpoint to go on from, or none to start anew"
        raise CheckpointError(f"{need}, got {'; '.join(problems)}")
    return None


def unfit(folder: Path) -> str | None:
    """Why no run can go on from a complete checkpoint; None where one can."""
    if problem := damage(folder):
        return f"is damaged ({problem})"
    if not (folder / ENGINE_STATE).exists():
        return "holds the model alone (it can be the model_name_or_path of a new run)"
    return None


def read_state(folder: Path) -> TrainerState:
    """The state of a checkpoint.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        fields = json.loads((folder / STATE).read_text())
        code = fields.pop("crc32")
        state = TrainerState(**fields)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder / STATE} is not a trainer state: {error}") from error
    if code != code_of(fields):
        raise CheckpointError(f"{folder / STATE} is not what was written (CRC-32)")
    return state


def load_state(folder: Path, shape: dict[str, Any]) -> TrainerState:
    """The state of a checkpoint, if its run had the same data, order and optimizer.

    Raises:
        CheckpointError: the file is damaged, or names what has changed since.
    """
    state = read_state(folder)
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
