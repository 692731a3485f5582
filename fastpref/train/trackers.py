"""Trackers: TensorBoard, Weights & Biases and Trackio, each through its own library.

Names are those of transformers' integrations: ``train/loss``, ``eval/rewards/margins``, over
``train/global_step``.
"""

import abc
import dataclasses
import importlib
import json
import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastpref.train import checkpoint
from fastpref.train.callbacks import Callback
from fastpref.train.config import ConfigError, TrainConfig, tracker_names
from fastpref.train.console import tell

STEP = "train/global_step"
SAMPLES = "eval/samples"
KINDS = ("train", "samples", "eval")  # in the order in which a step sends them
FINISH_SECONDS = 300  # the final model is worth more than a dashboard that cannot be reached


def trackers(config: TrainConfig) -> list[Callback]:
    """A callback for each tracker of ``config.report_to``.

    Raises:
        ConfigError: a tracker whose library is missing, or that does not know its user.
    """
    return [TRACKERS[name]() for name in tracker_names(config.report_to)]


def library(name: str, package: str) -> Any:
    """The module of that name, imported now and not before."""
    try:
        module = importlib.import_module(name)
        if getattr(module, "__file__", None) is None:  # a folder of that name, such as ./wandb
            raise ImportError(f"{list(module.__path__)} holds no code")
    except ImportError as error:
        raise ConfigError(
            f"report_to {package} needs the package {package}: pip install {package} ({error})"
        ) from error
    return module


def grouped(row: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl under the names of dashboards."""
    return {
        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
        for name, value in row.items()
        if name != "step"
    }


def kind_of(values: dict[str, Any]) -> str:
    """Which of KINDS was sent under these names."""
    if SAMPLES in values:
        return "samples"
    return "eval" if any(name.startswith("eval/") for name in values) else "train"


class Tracker(Callback, abc.ABC):
    """Shows a run elsewhere: a failure is told once, and the run goes on without the tracker."""

    name: str
    begun = False
    failed = False

    @abc.abstractmethod
    def start(self, config: TrainConfig, run: Path, step: int) -> None:
        """Open the run, or go on with it after ``step``."""

    @abc.abstractmethod
    def log(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Pass on a line of metrics.jsonl, its names grouped."""

    @abc.abstractmethod
    def show(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Pass on sampled completions."""

    @abc.abstractmethod
    def finish(self, exit_code: int) -> None:
        """Close the run, which ended as a process with that exit code does."""

    def holds(self, kind: str, step: int) -> bool:
        """Whether a run that goes on finds this there already."""
        return False

    def on_start(self, config: TrainConfig, run: Path, step: int) -> None:
        """Open the tracker.

        Raises:
            ConfigError: it cannot be opened for a fresh run, which has nothing to lose yet.
        """
        self.begun = True
        self.handled_before = sys.exception()
        self.attempt(step, lambda: self.start(config, run, step), fatal=step == 0)

    def on_log(self, step: int, row: dict[str, Any]) -> None:
        values = grouped(row)
        kind = kind_of(values)
        self.send(kind, step, lambda: self.log(kind, step, values))

    def on_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        if samples:
            self.send("samples", step, lambda: self.show(step, samples))

    def on_end(self) -> None:
        """Close the tracker; also one that has failed, lest the next run goes on with it."""
        error = sys.exception()
        if self.begun:
            code = 0 if error is self.handled_before else exit_code(error)
            self.attempt(None, lambda: self.finish(code))

    def send(self, kind: str, step: int, call: Callable[[], None]) -> None:
        if not self.failed and not self.holds(kind, step):
            self.attempt(step, call)

    def attempt(self, step: int | None, call: Callable[[], None], *, fatal: bool = False) -> None:
        try:
            call()
        except Exception as error:  # whatever a library or a network raises
            told, self.failed = self.failed, True
            text = f"report_to {self.name}: {type(error).__name__}: {error}"
            if fatal:
                raise ConfigError(text) from error
            if not told:
                when = "at the end" if step is None else f"at step {step}"
                tell(f"{text} {when}; the run goes on without it")


def exit_code(error: BaseException | None) -> int:
    """What a process that ends by this error tells its parent."""
    if isinstance(error, KeyboardInterrupt):
        return 255
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return 0
    return 1


class TensorBoard(Tracker):
    """Event files in the run's ``runs`` folder, or in TENSORBOARD_LOGGING_DIR."""

    name = "tensorboard"

    def __init__(self) -> None:
        library("tensorboard", self.name)
        self.writer_class = library("torch.utils.tensorboard", self.name).SummaryWriter

    def start(self, config: TrainConfig, run: Path, step: int) -> None:
        folder = os.environ.get("TENSORBOARD_LOGGING_DIR") or run / "runs"
        # hides what a run that was cut off wrote of steps that are taken again
        self.writer = self.writer_class(folder, purge_step=step + 1 if step else 0)
        settings = json.dumps(dataclasses.asdict(config), indent=2)
        self.writer.add_text("args", as_code(settings), step)

    def log(self, kind: str, step: int, values: dict[str, Any]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def show(self, step: int, samples: list[dict[str, Any]]) -> None:
        parts = [
            f"**row {sample['row']}**\n\n{as_code(sample['prompt'])}\n\n"
            f"**completion**\n\n{as_code(sample['completion'])}"
            for sample in samples
        ]
        self.writer.add_text(SAMPLES, "\n\n".join(parts), step)
        self.writer.flush()

    def finish(self, exit_code: int) -> None:
        self.writer.close()


def as_code(text: str) -> str:
    """Markdown that shows the text as it is."""
    return textwrap.indent(text, "    ", lambda line: True)


class Service(Tracker):
    """A tracker that cannot take back a point.

    The run's folder keeps the id that the run has there, so that a resumed run goes on with it.
    What arrived before a crash only the service knows: a killed process loses what was queued.
    """

    def start(self, config: TrainConfig, run: Path, step: int) -> None:
        path = run / "trackers" / f"{self.name}.id"
        kept = path.read_text().strip() if step and path.exists() else None
        path.parent.mkdir(exist_ok=True)
        checkpoint.replace_text(path, self.open(config, run, kept) + "\n")

    @abc.abstractmethod
    def open(self, config: TrainConfig, run: Path, kept: str | None) -> str:
        """Go on with the run whose id was kept, or begin one; returns its id."""


class WandB(Service):
    """Weights & Biases; WANDB_* variables hold for whatever the configuration leaves open."""

    name = "wandb"

    def __init__(self) -> None:
        self.wandb = wandb = library("wandb", self.name)
        self.settings = wandb.setup().settings
        if self.settings.mode == "online" and wandb.run is None:
            try:  # asks on a terminal, and must not do so hours from here
                wandb.login(verify=False)
            except wandb.Error as error:
                raise ConfigError(
                    f"report_to wandb needs a login ({error}); WANDB_MODE=offline needs none"
                ) from error

    def open(self, config: TrainConfig, run: Path, kept: str | None) -> str:
        environment = os.environ.get
        seconds = self.settings.finish_timeout or FINISH_SECONDS
        self.own = self.wandb.run is None  # else it is the caller's, who finishes it
        self.run = self.wandb.run or self.wandb.init(
            id=kept,
            resume="allow",
            project=config.project or environment("WANDB_PROJECT") or "fastpref",
            name=config.run_name or environment("WANDB_NAME") or run.resolve().name,
            dir=environment("WANDB_DIR") or run,
            settings=self.wandb.Settings(finish_timeout=seconds),
        )
        self.run.config.update(dataclasses.asdict(config), allow_val_change=True)
        self.run.define_metric(STEP)
        self.run.define_metric("*", step_metric=STEP, step_sync=True)
        return str(self.run.id)

    def holds(self, kind: str, step: int) -> bool:
        return self.own and self.place(kind, step) < self.run.starting_step

    def place(self, kind: str, step: int) -> int:
        """wandb's own step: a row for each kind, so that the last one held tells what arrived."""
        return len(KINDS) * step + KINDS.index(kind)

    def log(self, kind: str, step: int, values: dict[str, Any]) -> None:
        place = self.place(kind, step) if self.own else None
        self.run.log({**values, STEP: step}, step=place, commit=True)

    def show(self, step: int, samples: list[dict[str, Any]]) -> None:
        columns = list(samples[0])
        rows = [list(sample.values()) for sample in samples]
        self.log("samples", step, {SAMPLES: self.wandb.Table(columns=columns, data=rows)})

    def finish(self, exit_code: int) -> None:
        if self.own:
            self.run.finish(exit_code=exit_code)


class Trackio(Service):
    """Trackio, on this machine; TRACKIO_SPACE_ID and TRACKIO_SERVER_URL send it elsewhere."""

    name = "trackio"

    def __init__(self) -> None:
        self.trackio = library("trackio", self.name)

    def open(self, config: TrainConfig, run: Path, kept: str | None) -> str:
        project, name = config.project or "fastpref", config.run_name or run.resolve().name
        self.run = self.trackio.init(
            project=project,
            name=name,
            config=dataclasses.asdict(config),
            resume="allow" if kept else "never",
            embed=False,
        )
        # it resumes by name, and another run may have taken this one's since
        self.run.id = kept or self.run.id
        stored = self.trackio.SQLiteStorage.get_logs(project, name, run_id=kept) if kept else []
        self.held = {(kind_of(row), row["step"]) for row in stored}
        return str(self.run.id)

    def holds(self, kind: str, step: int) -> bool:
        return (kind, step) in self.held

    def log(self, kind: str, step: int, values: dict[str, Any]) -> None:
        self.run.log({**values, STEP: step}, step=step)

    def show(self, step: int, samples: list[dict[str, Any]]) -> None:
        self.log("samples", step, {SAMPLES: self.trackio.Table(data=samples)})

    def finish(self, exit_code: int) -> None:
        self.trackio.finish()


TRACKERS: dict[str, type[Tracker]] = {cls.name: cls for cls in (TensorBoard, Trackio, WandB)}
