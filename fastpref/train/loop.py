"""The loop: optimizer steps over groups, with evaluation, logging and checkpoints between."""

import dataclasses
import functools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastpref.data.packing import num_tokens, pack, split_groups
from fastpref.data.tokenize import Group
from fastpref.methods.base import Method
from fastpref.models.head import LogpModel
from fastpref.train import checkpoint
from fastpref.train.checkpoint import CheckpointError, TrainerState
from fastpref.train.config import ConfigError, TrainConfig, unknown
from fastpref.train.engine import Engine, OptimizerSpec
from fastpref.train.metrics import Display, MetricsFile, MetricSums
from fastpref.train.reference import hash_groups, with_reference

# keys that shape the steps; others, such as when to log, may change when a run goes on
STEP_KEYS = (
    *("seed", "train_sampling_strategy", "learning_rate", "lr_scheduler_type"),
    *("lr_scheduler_kwargs", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2"),
    *("adam_epsilon", "max_grad_norm", "dtype", "bf16"),
    *("beta", "loss_type", "loss_weights", "label_smoothing"),
)


class DivergedError(ArithmeticError):
    """A loss that is not a number any more."""


class Callback:
    """Called by the loop; override what is wanted. Steps count from 1."""

    def on_step(self, step: int, engine: Engine) -> None:
        """After every optimizer step."""

    def on_evaluate(self, step: int, metrics: dict[str, float]) -> None:
        """After every evaluation, with its ``eval_`` metrics."""

    def on_save(self, step: int, folder: Path) -> None:
        """After a checkpoint is complete."""


@dataclass(frozen=True)
class Plan:
    """Which groups each optimizer step takes: a pure function of the seed and the step."""

    num_groups: int
    per_step: int
    total_steps: int
    seed: int
    shuffle: bool

    @classmethod
    def of(cls, config: TrainConfig, num_groups: int, world_size: int) -> "Plan":
        per_step = (
            config.per_device_train_batch_size * config.gradient_accumulation_steps * world_size
        )
        epochs = math.ceil(math.ceil(num_groups / per_step) * config.num_train_epochs)
        total = config.max_steps if config.max_steps > 0 else epochs
        shuffle = config.train_sampling_strategy == "random"
        return cls(num_groups, per_step, total, config.seed, shuffle)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_groups / self.per_step)

    def indices(self, step: int) -> list[int]:
        """The groups of a step, counted from 0; the last step of an epoch may hold fewer."""
        epoch, within = divmod(step, self.steps_per_epoch)
        first = within * self.per_step
        last = min(first + self.per_step, self.num_groups)
        if not self.shuffle:
            return list(range(first, last))
        return epoch_order(self.num_groups, self.seed, epoch)[first:last]


@functools.lru_cache(maxsize=2)
def epoch_order(num_groups: int, seed: int, epoch: int) -> list[int]:
    """The shuffled order of an epoch's groups."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order: list[int] = torch.randperm(num_groups, generator=generator).tolist()
    return order


@dataclass
class Trainer:
    """One run: what it learns from, and where it stands."""

    config: TrainConfig
    method: Method
    engine: Engine
    tokenizer: Any
    train_groups: Sequence[Group]
    eval_groups: Sequence[Group]
    run: Path
    reference: LogpModel | None = None
    callbacks: Sequence[Callback] = ()

    def __post_init__(self) -> None:
        config = self.config
        self.plan = Plan.of(config, len(self.train_groups), self.engine.world_size)
        self.counts = [self.method.count(group) for group in self.train_groups]
        self.state = TrainerState(shape=self.shape())
        self.sums = MetricSums()
        self.file = MetricsFile(self.run / "metrics.jsonl")
        total = self.plan.total_steps
        self.log_every = config.every("logging_steps", total)
        self.save_at = self.moments(config.save_strategy, "save_steps")
        self.check_metric(config.metric_for_best_model)
        strategy = eval_strategy(config, bool(self.eval_groups))
        key = "eval_steps" if config.eval_steps is not None else "logging_steps"
        self.eval_at = self.moments(strategy, key)
        if self.eval_at and not self.eval_groups:
            raise ConfigError("need an evaluation data set for eval_strategy, got none")
        if config.load_best_model_at_end and not (self.save_at and self.save_at <= self.eval_at):
            raise ConfigError(
                "need an evaluation at every saved step for load_best_model_at_end, got "
                f"save_strategy {config.save_strategy!r} every {config.save_steps} and "
                f"eval_strategy {strategy!r} every {config.eval_steps}"
            )

    def check_metric(self, name: str | None) -> None:
        known = {"loss", *self.method.metric_names}
        if name is not None and name.removeprefix("eval_") not in known:
            raise ConfigError(unknown("metric_for_best_model", name, sorted(known)))

    def shape(self) -> dict[str, Any]:
        """What the steps depend on: a resumed run must agree with it."""
        config = dataclasses.asdict(self.config)
        kept = {name: config[name] for name in STEP_KEYS if name in config}
        return kept | {
            "groups_per_step": self.plan.per_step,
            "data": hash_groups(self.train_groups),
        }

    def moments(self, strategy: str, key: str) -> set[int]:
        """The steps, counted from 1, after which something is due; the last one always."""
        total = self.plan.total_steps
        if strategy == "no":
            return set()
        every = self.plan.steps_per_epoch if strategy == "epoch" else self.config.every(key, total)
        return {*range(every, total, every), total}

    def train(self, resume: Path | None = None) -> dict[str, float]:
        """Run to the end; returns the last value of every metric that was logged."""
        self.engine.prepare(optimizer_spec(self.config, self.plan.total_steps))
        if resume is not None:
            self.load(resume)
        self.file.keep_until(-1 if resume is None else self.state.step)
        total = self.plan.total_steps
        title = type(self.method).__name__
        self.display = Display(title, total, self.state.step, plain=bool(self.config.disable_tqdm))
        try:
            if resume is not None:
                self.display.say(f"resumed from {resume}, {total - self.state.step} steps to go")
            if self.config.eval_on_start and self.state.step == 0:
                self.evaluate(0)
            self.steps()
        finally:
            self.display.close()
        return self.file.last()

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint."""
        self.state = checkpoint.load_state(folder, self.shape())
        best = self.state.best_step
        if best is not None and not checkpoint.path_of(self.run, best).exists():
            self.state.best_step = self.state.best_metric = None  # it lies in another run's folder
        try:
            self.engine.load_model(folder)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        self.engine.load_state(folder)
        self.sums.load(self.state.sums)

    def steps(self) -> None:
        """All optimizer steps that are left, and what is due after each."""
        total = self.plan.total_steps
        seconds, counted = 0.0, self.state.num_tokens  # of the steps alone, since the last line
        while self.state.step < total:
            began = time.perf_counter()
            norm, rate = self.step()
            seconds += time.perf_counter() - began
            step = self.state.step
            self.display.step(step)
            for callback in self.callbacks:
                callback.on_step(step, self.engine)
            first = step == 1 and self.config.logging_first_step
            if step % self.log_every == 0 or step == total or first:
                row = {
                    "step": step,
                    "epoch": step / self.plan.steps_per_epoch,
                    **self.sums.read(self.engine),
                    "grad_norm": float(norm),
                    "learning_rate": rate,
                    "num_tokens": self.state.num_tokens,
                    "tokens_per_second": (self.state.num_tokens - counted) / seconds,
                }
                self.write(row)
                if not math.isfinite(row["loss"]):
                    raise DivergedError(
                        f"the loss is {row['loss']} at step {step}: lower the learning rate, or go "
                        "on from an earlier checkpoint"
                    )
                seconds, counted = 0.0, self.state.num_tokens
            if step in self.eval_at:
                self.evaluate(step)
            if step in self.save_at:
                self.save()

    def step(self) -> tuple[torch.Tensor, float]:
        """One optimizer step: the mean loss over all its groups, in micro-batches."""
        chosen = self.plan.indices(self.state.step)
        count = sum(self.counts[i] for i in chosen)
        mine = [self.train_groups[i] for i in chosen][self.engine.rank :: self.engine.world_size]
        parts = self.split(mine, self.config.per_device_train_batch_size)
        self.engine.model.train()
        for number, part in enumerate(parts, 1):
            batch = pack(part).to(self.engine.device, non_blocking=True)
            batch = with_reference(self.engine, self.reference, batch)
            with self.engine.autocast():
                loss, metrics = self.method(self.engine.model, batch)
            self.engine.backward(loss, count, last=number == len(parts))
            count_here = loss.new_full((), self.total(part))
            self.sums.add({"loss": (loss.detach(), count_here), **metrics})
        norm, rate = self.engine.step()
        self.state.step += 1
        self.state.num_tokens += sum(original_tokens(self.train_groups[i]) for i in chosen)
        return norm, rate

    def split(self, groups: Sequence[Group], batch_size: int) -> list[list[Group]]:
        """Micro-batches: by tokens if a budget is set, else by groups."""
        budget = self.config.max_tokens_per_micro_batch
        return split_groups(groups, max_groups=None if budget else batch_size, max_tokens=budget)

    def total(self, groups: Sequence[Group]) -> int:
        return sum(self.method.count(group) for group in groups)

    @torch.no_grad()
    def evaluate(self, step: int) -> None:
        """Loss and metrics over all evaluation groups, their names opened by ``eval_``."""
        sums = MetricSums()
        began = time.perf_counter()
        self.engine.model.eval()
        mine = self.eval_groups[self.engine.rank :: self.engine.world_size]
        for part in self.split(mine, self.config.per_device_eval_batch_size):
            batch = pack(part).to(self.engine.device)
            batch = with_reference(self.engine, self.reference, batch)
            with self.engine.autocast():
                loss, metrics = self.method(self.engine.model, batch)
            sums.add({"loss": (loss, loss.new_full((), self.total(part))), **metrics})
        metrics_read = sums.read(self.engine)
        values = {f"eval_{name}": value for name, value in metrics_read.items()}
        self.note_best(step, values)
        row = {
            "step": step,
            "epoch": step / self.plan.steps_per_epoch,
            **values,
            "eval_runtime": time.perf_counter() - began,
        }
        for callback in self.callbacks:
            callback.on_evaluate(step, values)
        self.write(row)

    def note_best(self, step: int, values: dict[str, float]) -> None:
        """Remember the step if its metric is the best so far and a checkpoint of it will be."""
        name = (self.config.metric_for_best_model or "loss").removeprefix("eval_")
        value = values[f"eval_{name}"]
        higher = self.config.greater_is_better
        higher = not name.endswith("loss") if higher is None else higher
        best = self.state.best_metric
        if step in self.save_at and (best is None or (value > best if higher else value < best)):
            self.state.best_metric, self.state.best_step = value, step

    def save(self) -> None:
        self.state.sums = self.sums.state()
        folder = checkpoint.save(self.run, self.engine, self.tokenizer, self.state)
        checkpoint.prune(self.run, self.config.save_total_limit, self.state.best_step)
        for callback in self.callbacks:
            callback.on_save(self.state.step, folder)

    def write(self, row: dict[str, Any]) -> None:
        self.file.write(row)
        self.display.log(row["step"], row)


def original_tokens(group: Group) -> int:
    """Tokens of the group as separate sequences, its prompt counted once per completion."""
    return num_tokens(group) + len(group.prompt) * (len(group.completions) - 1)


def eval_strategy(config: TrainConfig, given: bool) -> str:
    """What eval_strategy means where it is not set; ``given``: an evaluation data set is there."""
    if config.eval_strategy is not None:
        return config.eval_strategy
    if config.eval_steps is not None:
        return "steps"
    return "epoch" if given else "no"


def optimizer_spec(config: TrainConfig, total_steps: int) -> OptimizerSpec:
    warmup = config.warmup_steps
    return OptimizerSpec(
        learning_rate=config.learning_rate,
        total_steps=total_steps,
        warmup_steps=math.ceil(warmup * total_steps) if warmup < 1 else int(warmup),
        schedule=config.lr_scheduler_type,
        schedule_kwargs=config.lr_scheduler_kwargs or {},
        weight_decay=config.weight_decay,
        betas=(config.adam_beta1, config.adam_beta2),
        epsilon=config.adam_epsilon,
        max_grad_norm=config.max_grad_norm,
    )
