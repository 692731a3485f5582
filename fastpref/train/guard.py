"""What keeps a run's work safe: one writer per folder, room on the disk, a stop that saves."""

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from fastpref.train.checkpoint import CheckpointError
from fastpref.train.console import tell

LOCK = ".lock"
WAIT = 0.2  # seconds between two tries


class DivergedError(ArithmeticError):
    """A loss, gradient or score that is not a number any more."""


class Stopped(SystemExit):
    """A run that was asked to stop, has saved where it stands, and exits with code 0."""

    def __init__(self, message: str, *, finished: bool = False) -> None:
        super().__init__(0)
        self.message = message
        self.finished = finished
        """Whether the run had come to its end all the same."""

    def __str__(self) -> str:
        return self.message


class StopRequest(contextlib.AbstractContextManager["StopRequest"]):
    """Inside, SIGTERM, SIGUSR1 and Ctrl-C ask for a stop; a second Ctrl-C interrupts at once.

    Off the main thread signals stay as they are, since only that thread may handle them.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.signal: str | None = None
        """The name of the first signal that came."""
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self.note) for number in self.SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or signal.Signals(number).name
        line = f"{signal.Signals(number).name}: saving at the next step, then stopping"
        line += "; Ctrl-C again stops at once\n" if number == signal.SIGINT else "\n"
        with contextlib.suppress(OSError):  # whoever read it may have had the same Ctrl-C
            os.write(2, line.encode())  # print may be the very call that was interrupted


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the run's folder; the lock goes with the process, however that ends.

    Raises:
        CheckpointError: another process writes there.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"need an output_dir that can be made, got {error}") from error
    try:
        with locked(folder / LOCK, refusal=f"need {folder} for one run alone, got a second one"):
            yield
    finally:
        if made:
            with contextlib.suppress(OSError):  # a run has left something in it
                folder.rmdir()


@contextlib.contextmanager
def locked(
    path: Path, *, refusal: str | None = None, while_waiting: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Hold ``path`` as a lock: wait for it, or raise ``refusal`` where another holds it.

    Args:
        while_waiting: called between two tries; what it raises ends the wait.

    Raises:
        CheckpointError: the refusal, with who holds it; or the file system has no locks.
    """
    handle = acquire(path, refusal, while_waiting)
    try:
        os.truncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def acquire(path: Path, refusal: str | None, while_waiting: Callable[[], None]) -> int:
    """The descriptor of the lock file, locked."""
    told = False
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            holder = try_lock(handle, path)
            if holder is None and is_still(path, handle):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        if holder is None:
            continue  # its last holder has just deleted it
        if refusal:
            raise CheckpointError(f"{refusal}: {holder} writes there")
        if not told:
            tell(f"waiting for {holder}, which holds {path}")
            told = True
        time.sleep(WAIT)
        while_waiting()


def try_lock(handle: int, path: Path) -> str | None:
    """Lock the file, or say who holds it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.read(handle, 200).decode(errors="replace") or "another process"
    except OSError as error:
        raise CheckpointError(f"need a file system with locks for {path}, got {error}") from error
    return None


def is_still(path: Path, handle: int) -> bool:
    """Whether the open file is the one that lies there."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), path.stat())
    return False


def check_room(folder: Path, *, checkpoints: int, checkpoint: int, model: int) -> None:
    """Refuse a run whose files will not fit.

    Args:
        folder: where they go.
        checkpoints: how many more will lie there at once.
        checkpoint: bytes of one.
        model: bytes of the final model.

    Raises:
        CheckpointError: with the bytes that are needed and those that are free.
    """
    need, free = checkpoints * checkpoint + model, shutil.disk_usage(folder).free
    if need > free:
        raise CheckpointError(
            f"need {size(need)} in {folder} for {checkpoints} checkpoints of {size(checkpoint)} "
            f"and a model of {size(model)}, got {size(free)} free: set save_total_limit, "
            "save_only_model or save_strategy, or another output_dir"
        )


def size(count: int) -> str:
    """A number of bytes for people."""
    value, unit = float(count), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.4g} {unit}"
