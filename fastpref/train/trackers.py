"""Trackers: TensorBoard, Weights & Biases and Trackio, each through its own library.

Names are those of transformers' integrations: ``train/loss``, ``eval/rewards/margins``, over
``train/global_step``.
"""

import dataclasses
import importlib
import json
import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastpref.train.callbacks import Callback
from fastpref.train.config import ConfigError, TrainConfig, tracker_names

STEP = "train/global_step"
SAMPLES = "eval/samples"
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


class Tracker(Callback):
    """Shows a run elsewhere: a failure is told once, and the run goes on without the tracker."""

    name: str
    begun = False
    failed = False

    def start(self, config: TrainConfig, run: Path, step: int) -> None:
        """Open the run, or go on with it after ``step``."""
        raise NotImplementedError

    def log(self, step: int, values: dict[str, Any]) -> None:
        raise NotImplementedError

    def show(self, step: int, samples: list[dict[str, Any]]) -> None:
        raise NotImplementedError

    def finish(self, exit_code: int) -> None:
        raise NotImplementedError

    def on_start(self, config: TrainConfig, run: Path, step: int) -> None:
        """Open the tracker.

        Raises:
            ConfigError: it cannot be opened for a fresh run, which has nothing to lose yet.
        """
        self.begun = True
        self.handled_before = sys.exception()
        self.attempt(step, lambda: self.start(config, run, step), fatal=step == 0)

    def on_log(self, step: int, row: dict[str, Any]) -> None:
        kind = "eval" if any(name.startswith("eval_") for name in row) else "train"
        self.send(kind, step, lambda: self.log(step, grouped(row)))

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
        """Pass on what is of that kind (train, eval, samples) and step."""
        if not self.failed:
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
                print(f"{text} {when}; the run goes on without it", file=sys.stderr, flush=True)


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

    def log(self, step: int, values: dict[str, Any]) -> None:
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

    The run's folder keeps its run's id there, and the last step that was sent of each kind, so
    that a resumed run goes on with the same one and sends nothing twice.
    """

    def on_start(self, config: TrainConfig, run: Path, step: int) -> None:
        self.path = run / "trackers" / f"{self.name}.json"
        self.id: str | None = None
        self.sent: dict[str, int] = {}
        super().on_start(config, run, step)

    def start(self, config: TrainConfig, run: Path, step: int) -> None:
        if step and self.path.exists():
            kept = json.loads(self.path.read_text())
            self.id, self.sent = kept["id"], kept["sent"]
        self.open(config, config.run_name or run.resolve().name, run)
        self.remember()

    def open(self, config: TrainConfig, name: str, run: Path) -> None:
        """Begin the run ``self.id``, or one that gives ``self.id`` where that is None."""
        raise NotImplementedError

    def send(self, kind: str, step: int, call: Callable[[], None]) -> None:
        def once() -> None:
            call()
            self.sent[kind] = step
            self.remember()

        if step > self.sent.get(kind, -1):
            super().send(kind, step, once)

    def remember(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps({"id": self.id, "sent": self.sent}) + "\n")
        partial.replace(self.path)


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

    def open(self, config: TrainConfig, name: str, run: Path) -> None:
        self.begun_here = self.wandb.run is None  # else it is the caller's, who finishes it
        seconds = self.settings.finish_timeout or FINISH_SECONDS
        self.run = self.wandb.run or self.wandb.init(
            id=self.id,
            resume="allow",
            project=config.project or os.environ.get("WANDB_PROJECT") or "fastpref",
            name=config.run_name or os.environ.get("WANDB_NAME") or name,
            dir=os.environ.get("WANDB_DIR") or run,
            settings=self.wandb.Settings(finish_timeout=seconds),
        )
        self.id = self.run.id
        self.run.config.update(dataclasses.asdict(config), allow_val_change=True)
        self.run.define_metric(STEP)
        self.run.define_metric("*", step_metric=STEP, step_sync=True)

    def log(self, step: int, values: dict[str, Any]) -> None:
        self.run.log({**values, STEP: step})

    def show(self, step: int, samples: list[dict[str, Any]]) -> None:
        columns = list(samples[0])
        rows = [list(sample.values()) for sample in samples]
        self.log(step, {SAMPLES: self.wandb.Table(columns=columns, data=rows)})

    def finish(self, exit_code: int) -> None:
        if self.begun_here:
            self.run.finish(exit_code=exit_code)


class Trackio(Service):
    """Trackio, on this machine; TRACKIO_SPACE_ID and TRACKIO_SERVER_URL send it elsewhere."""

    name = "trackio"

    def __init__(self) -> None:
        self.trackio = library("trackio", self.name)

    def open(self, config: TrainConfig, name: str, run: Path) -> None:
        self.run = self.trackio.init(
            project=config.project or "fastpref",
            name=name,
            config=dataclasses.asdict(config),
            resume="allow" if self.id else "never",
            embed=False,
        )
        # it resumes by name, and another run may have taken this one's since
        self.id = self.run.id = self.id or self.run.id

    def log(self, step: int, values: dict[str, Any]) -> None:
        self.run.log({**values, STEP: step}, step=step)

    def show(self, step: int, samples: list[dict[str, Any]]) -> None:
        self.log(step, {SAMPLES: self.trackio.Table(data=samples)})

    def finish(self, exit_code: int) -> None:
        self.trackio.finish()


TRACKERS: dict[str, type[Tracker]] = {cls.name: cls for cls in (TensorBoard, Trackio, WandB)}
