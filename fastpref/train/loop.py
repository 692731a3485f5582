"""The loop: optimizer steps over groups, with evaluation, logging and checkpoints between."""

import dataclasses
import math
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastpref.data.micro_batches import micro_batches
from fastpref.data.packing import longest, num_tokens, split_groups
from fastpref.data.tokenize import Group
from fastpref.methods.base import Method
from fastpref.models.router import router_coefficient
from fastpref.rollout.generate import SamplingParams, generate
from fastpref.train import checkpoint
from fastpref.train.callbacks import Callback
from fastpref.train.checkpoint import CheckpointError, TrainerState
from fastpref.train.config import ConfigError, TrainConfig, unknown
from fastpref.train.console import Display
from fastpref.train.engine import Engine
from fastpref.train.feed import Feed, Micro
from fastpref.train.forward import Forward, Part
from fastpref.train.groups import check_budget
from fastpref.train.guard import DivergedError, Stopped, StopRequest, check_room
from fastpref.train.metrics import JsonLines, MetricSums, Throughput, peak_memory
from fastpref.train.optimizer import OptimizerSpec
from fastpref.train.reference import hash_groups, hash_weights
from fastpref.train.schedule import Plan, eval_strategy, moments

# keys that shape the steps; others, such as when to log, may change when a run goes on
STEP_KEYS = (
    *("seed", "train_sampling_strategy", "learning_rate", "lr_scheduler_type"),
    *("lr_scheduler_kwargs", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2"),
    *("adam_epsilon", "max_grad_norm", "dtype", "bf16", "router_aux_loss_coef"),
    *("optim", "fp32_master_weights"),
    *("lora", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant"),
    "bnb_4bit_quant_storage",
    *("beta", "loss_type", "loss_weights", "loss_options", "label_smoothing", "ld_alpha"),
    *("f_divergence_type", "f_alpha_divergence_coef", "use_weighting"),
    *("desirable_weight", "undesirable_weight", "loss_columns"),
)
# groups of an evaluation that are dealt out at once
MOST_DEALT = 4096
# losses that may wait on the device before they are looked at
MOST_UNSEEN = 1000


class Work(NamedTuple):
    """A step: this rank's micro-batches, and what all ranks do."""

    parts: list[Micro]
    tokens: int
    """Of the sequences as they came."""
    computed: int
    """That go through the model."""
    flops: float


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
    callbacks: Sequence[Callback] = ()
    stop: StopRequest = field(default_factory=StopRequest)

    def __post_init__(self) -> None:
        config = self.config
        policy = self.engine.model
        coef = router_coefficient(policy.model, config.router_aux_loss_coef)
        self.forward = Forward(self.engine, self.method, router_coef=coef)
        self.flops = policy.flops()
        self.feed = Feed(self.method, self.engine.device, share=policy.shares_prompts)
        self.coming: dict[int, Future[Work]] = {}
        """Steps that are asked for already."""
        self.throughput = Throughput(self.engine)
        self.plan = Plan.of(config, len(self.train_groups), self.engine.world_size)
        self.counts = [self.method.count(group) for group in self.train_groups]
        for group in self.eval_groups:  # what they lack must not come out at the first evaluation
            self.method.count(group)
        if not policy.shares_prompts:  # which takes more than the reader of the groups knew
            for part, groups in (("train", self.train_groups), ("eval", self.eval_groups)):
                check_budget(config, part, groups, share=False)
        if self.method.couples and self.plan.per_step < 2:
            raise ConfigError(
                "need at least 2 groups in an optimizer step for a loss that couples them, got "
                f"per_device_train_batch_size {config.per_device_train_batch_size} and "
                f"gradient_accumulation_steps {config.gradient_accumulation_steps}"
            )
        name, higher = self.best_by()
        self.state = TrainerState(
            shape=self.shape(),
            eval_data=described(self.eval_groups),
            best_by=f"{name}, {'higher' if higher else 'lower'} is better",
        )
        self.saved = -1  # the step of the newest checkpoint that holds all of the state
        self.sums = MetricSums()
        self.unseen: list[tuple[str, int, list[Group], torch.Tensor]] = []
        """Name, step, groups and value of what has not been looked at yet."""
        self.file = JsonLines(self.run / "metrics.jsonl")
        self.samples = JsonLines(self.run / "samples.jsonl")
        total, title = self.plan.total_steps, type(self.method).__name__
        self.display = Display(title, total, plain=bool(config.disable_tqdm))
        self.log_every = config.every("logging_steps", total)
        self.save_at = moments(config, self.plan, config.save_strategy, "save_steps")
        self.check_metric(config.metric_for_best_model)
        strategy = eval_strategy(config, bool(self.eval_groups))
        key = "eval_steps" if config.eval_steps is not None else "logging_steps"
        self.eval_at = moments(config, self.plan, strategy, key)
        if self.eval_at and not self.eval_groups:
            raise ConfigError("need an evaluation data set for eval_strategy, got none")
        if config.eval_samples and not (self.eval_at or config.eval_on_start):
            raise ConfigError(f"need evaluations for eval_samples {config.eval_samples}, got none")
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
        lacking = self.method.lacks(self.eval_groups)
        if name is not None and name.removeprefix("eval_") in lacking:
            raise ConfigError(f"need evaluation data that have {name}, got groups of one label")

    def shape(self) -> dict[str, Any]:
        """What the steps depend on: a resumed run must agree with it."""
        config = dataclasses.asdict(self.config)
        kept = {name: config[name] for name in STEP_KEYS if name in config}
        adapted = self.engine.model.adapters is not None  # a checkpoint holds adapters alone
        if self.method.needs_reference or adapted:  # a run goes on from the model as it came
            name = "reference model" if self.method.needs_reference else "base model"
            kept[name] = f"sha256 {hash_weights(self.engine.model)[:16]}"
        if self.config.lr_scheduler_type != "constant":  # else its curve would break off
            kept["steps"] = self.plan.total_steps
        return kept | {
            "groups_per_step": self.plan.per_step,
            "training data": described(self.train_groups),
        }

    def train(self, resume: Path | None = None) -> dict[str, float]:
        """Run to the end; returns the last value of every metric that was logged.

        Raises:
            CheckpointError: ``resume`` does not fit, or there is no room for what is to come.
            DivergedError: a loss or gradient is not finite; the weights are as they were before.
            Stopped: a signal asked for it; the run is saved.
        """
        self.engine.prepare(optimizer_spec(self.config, self.plan.total_steps))
        if resume is not None:
            self.load(resume)
        checkpoint.sweep(self.run, self.state.step)
        for file in (self.file, self.samples):
            # another run's checkpoint says nothing of this run's files
            own = resume is not None and resume.resolve().parent == self.run.resolve()
            file.keep(self.state.lines.get(file.path.name, 0) if own else 0)
        self.check_room()
        self.feed.filler = min(self.train_groups, key=num_tokens)
        total = self.plan.total_steps
        self.display.start(self.state.step)
        try:
            for callback in self.callbacks:
                callback.on_start(self.config, self.run, self.state.step)
            if resume is not None:
                self.display.say(f"resumed from {resume}, {total - self.state.step} steps to go")
            step = self.state.step
            wanted = self.config.eval_on_start if step == 0 else step in self.eval_at
            if wanted and self.state.evaluated < step:
                self.due()  # or what a stop left undone
            self.steps()
        finally:
            self.display.close()
            self.feed.close()
        return self.file.last()

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint."""
        now, self.state = self.state, self.state_of(folder)
        own = folder.resolve() == checkpoint.path_of(self.run, self.state.step).resolve()
        self.saved = self.state.step if own else -1
        self.forget_best(now)
        self.state.eval_data, self.state.best_by = now.eval_data, now.best_by
        try:
            self.engine.load_model(folder)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        self.engine.load_state(folder)
        self.sums.load(self.state.sums)
        self.forward.moving = {
            name: torch.tensor(value, dtype=torch.float64, device=self.engine.device)
            for name, value in self.state.moving.items()
        }

    def state_of(self, folder: Path) -> TrainerState:
        """The state of a checkpoint that this run may go on from.

        Raises:
            CheckpointError: the file is damaged, or names what has changed since.
        """
        state = checkpoint.load_state(folder, self.state.shape)
        changed = measure_changes(state, self.state)
        if changed and state.best_step is not None and self.config.load_best_model_at_end:
            raise CheckpointError(
                "need the run unchanged to go on with load_best_model_at_end, got "
                f"{'; '.join(changed)}"
            )
        return state

    def forget_best(self, now: TrainerState) -> None:
        """Forget a best that what is to come cannot be measured against, and say so."""
        best = self.state.best_step
        if best is None:
            return
        changed = measure_changes(self.state, now)
        if not checkpoint.path_of(self.run, best).exists():
            changed.append("its checkpoint is not in this folder")
        if changed:
            self.display.say(f"step {best} no longer counts as the best: {'; '.join(changed)}")
            self.state.best_step = self.state.best_metric = None

    def check_room(self) -> None:
        """Refuse to start what the disk cannot hold."""
        model, optimizer = self.engine.sizes()
        coming = len([step for step in self.save_at if step > self.state.step])
        if limit := self.config.save_total_limit:  # those kept, the best, and the one in writing
            coming = min(coming, max(1, limit + 2 - len(checkpoint.complete(self.run))))
        each = model + (0 if self.config.save_only_model else optimizer)
        check_room(self.run, checkpoints=coming, checkpoint=each, model=model)

    def steps(self) -> None:
        """All optimizer steps that are left, and what is due after each."""
        total = self.plan.total_steps
        while self.state.step < total:
            self.check_stop()
            began = time.perf_counter()
            norm, rate = self.step()
            step = self.state.step
            first = step == 1 and self.config.logging_first_step
            logs = step % self.log_every == 0 or step == total or first
            if logs or step in self.eval_at or step in self.save_at:
                self.check_finite()  # waits for the device, so that its time counts
            self.throughput.seconds += time.perf_counter() - began
            self.display.step(step)
            for callback in self.callbacks:
                callback.on_step(step, self.engine)
            if logs:
                row = {
                    "step": step,
                    "epoch": step / self.plan.steps_per_epoch,
                    **self.read(self.sums),
                    "grad_norm": float(norm),
                    "learning_rate": rate,
                    "num_tokens": self.state.num_tokens,
                    "num_computed_tokens": self.state.num_computed_tokens,
                    **self.throughput.read(),
                    "peak_memory_gib": peak_memory(self.engine.device),
                }
                self.write(row)
            self.check_stop()
            self.due()

    def due(self) -> None:
        """Evaluate and save, where the step that was just taken asks for it."""
        step = self.state.step
        if self.state.evaluated < step and (step in self.eval_at or step == 0):
            self.evaluate(step)
        if step in self.save_at:
            self.save(only_model=self.config.save_only_model)

    def step(self) -> tuple[torch.Tensor, float]:
        """One optimizer step: the mean loss over all its groups, in micro-batches."""
        step = self.state.step
        chosen = self.plan.indices(step)
        count = sum(self.counts[i] for i in chosen)
        work = (self.coming.pop(step, None) or self.ask(step)).result()
        parts = work.parts
        if step + 1 < self.plan.total_steps:
            self.coming[step + 1] = self.ask(step + 1)
        self.engine.model.train()
        total = torch.zeros((), device=self.engine.device)
        known = self.method.known([self.train_groups[i] for i in chosen])
        for number, part in enumerate(self.forward.step(parts, known, count), 1):
            self.engine.backward(part.loss, count, last=number == len(parts))
            self.add(self.sums, part)
            if part.groups:
                self.unseen.append(("loss", step + 1, [*part.groups], part.value))
            total += part.value
        norm, rate = self.engine.step(total)
        self.state.step += 1
        self.state.num_tokens += work.tokens
        self.state.num_computed_tokens += work.computed
        self.throughput.count(work.tokens, work.computed, work.flops)
        mine = [group for part in parts for group in part.groups]
        self.unseen.append(("gradient norm", self.state.step, mine, norm))
        if self.engine.device.type == "cpu" or len(self.unseen) > MOST_UNSEEN:
            self.check_finite()
        return norm, rate

    def add(self, sums: MetricSums, part: Part) -> None:
        count = part.value.new_full((), self.total(part.groups))
        sums.add({"loss": (part.value, count), **part.metrics})

    def read(self, sums: MetricSums) -> dict[str, float]:
        values = sums.read(self.engine)
        return values | self.method.derived(values)

    def check_finite(self) -> None:
        """Stop at the first loss or gradient norm that is not finite; one sync."""
        seen, self.unseen = self.unseen, []
        if not seen:
            return
        values = torch.stack([value.float() for *_, value in seen]).tolist()
        for (name, step, groups, _), value in zip(seen, values, strict=True):
            if not math.isfinite(value):
                saved = [p.name for p in checkpoint.complete(self.run)[-1:]] or ["none"]
                rows = ", ".join(map(str, sorted(group.row for group in groups)))
                raise DivergedError(
                    f"the {name} is {value} at step {step}, over the rows {rows} (from 0): the "
                    f"weights were left as step {step - 1} made them. Look at these rows, or start "
                    f"a run with a lower learning rate (newest checkpoint: {saved[0]})"
                )

    def ask(self, step: int) -> Future[Work]:
        """Have this rank's micro-batches of a step made, while what comes before it runs."""
        size = self.config.per_device_train_batch_size
        share = self.engine.model.shares_prompts

        def make() -> Work:
            groups = [self.train_groups[i] for i in self.plan.indices(step)]
            flops = sum(self.flops.step(group, share=share) for group in groups)
            if self.forward.reference is not None:
                flops += sum(self.flops.forward(group, share=share) for group in groups)
            parts = self.deal(groups, size)
            return Work(
                [self.feed.make(part) for part in parts[self.engine.rank]],
                sum(num_tokens(group, share=False) for group in groups),
                sum(computed_tokens(part, share=share) for own in parts for part in own),
                flops,
            )

        return self.feed.soon(make)

    def deal(self, groups: Sequence[Group], batch_size: int) -> list[list[list[Group]]]:
        """The micro-batches of each rank: by tokens if a budget is set, else by groups."""
        ranks, budget = self.engine.world_size, self.config.max_tokens_per_micro_batch
        most = None if budget else batch_size
        if not self.engine.model.shares_prompts:  # rows are padded: those of like lengths together
            order = sorted(groups, key=longest, reverse=True)
            parts = split_groups(order, max_groups=most, max_tokens=budget, share=False)
            parts += [[] for _ in range(-len(parts) % ranks)]
            return [parts[rank::ranks] for rank in range(ranks)]
        dealt = micro_batches(
            [num_tokens(group) for group in groups],
            [self.flops.forward(group) for group in groups],
            ranks=ranks,
            max_size=budget,
            max_groups=most,
        )
        return [[[groups[i] for i in part] for part in own] for own in dealt]

    def total(self, groups: Sequence[Group]) -> int:
        return sum(self.method.count(group) for group in groups)

    @torch.no_grad()
    def evaluate(self, step: int) -> None:
        """Loss and metrics over all evaluation groups, their names opened by ``eval_``."""
        sums = MetricSums()
        began = time.perf_counter()
        self.engine.model.eval()
        rank, size = self.engine.rank, self.config.per_device_eval_batch_size
        parts = (
            part
            for start in range(0, len(self.eval_groups), MOST_DEALT)
            for part in self.deal(self.eval_groups[start : start + MOST_DEALT], size)[rank]
        )
        known = self.method.known(self.eval_groups)
        count = self.total(self.eval_groups)
        batches = self.feed.ahead(parts)
        for part in self.forward.evaluate(batches, known, count, self.check_stop):
            self.add(sums, part)
        metrics_read = self.read(sums)
        values = {f"eval_{name}": value for name, value in metrics_read.items()}
        self.note_best(step, values)
        row = {
            "step": step,
            "epoch": step / self.plan.steps_per_epoch,
            **values,
            "eval_runtime": time.perf_counter() - began,
        }
        if self.config.eval_samples:
            self.sample(step)
        self.state.evaluated = step
        for callback in self.callbacks:
            callback.on_evaluate(step, values)
        self.write(row)

    def sample(self, step: int) -> None:
        """Complete the first evaluation prompts, with the same draws at every evaluation."""
        groups = self.eval_groups[: self.config.eval_samples]
        params = SamplingParams(max_new_tokens=self.config.max_new_tokens)
        prompts = [group.prompt for group in groups]
        with self.engine.autocast():
            sampled = generate(
                self.engine.model, self.tokenizer, prompts, 1, params, seed=self.config.seed
            )
        rows: list[dict[str, Any]] = [
            {
                "step": step,
                "row": group.row,
                "prompt": self.tokenizer.decode([*group.prompt]),
                "completion": self.tokenizer.decode(one.tokens, skip_special_tokens=True),
            }
            for group, (one,) in zip(groups, sampled, strict=True)
        ]
        for row in rows:
            self.samples.write(row)
        self.display.say(f"step {step}, row {rows[0]['row']}: {rows[0]['completion']!r}")
        for callback in self.callbacks:
            callback.on_samples(step, rows)

    def best_by(self) -> tuple[str, bool]:
        """The metric that tells the best model, and whether higher is better."""
        name = (self.config.metric_for_best_model or "loss").removeprefix("eval_")
        higher = self.config.greater_is_better
        return name, not name.endswith("loss") if higher is None else higher

    def note_best(self, step: int, values: dict[str, float]) -> None:
        """Remember the step if its metric is the best so far and a checkpoint of it will be."""
        name, higher = self.best_by()
        value = values[f"eval_{name}"]
        best = self.state.best_metric
        better = best is None or (value > best if higher else value < best)
        if step in self.save_at and better and math.isfinite(value):
            self.state.best_metric, self.state.best_step = value, step

    def save(self, *, only_model: bool = False) -> Path:
        self.check_finite()
        self.state.sums = self.sums.state()
        self.state.moving = {name: float(x) for name, x in self.forward.moving.items()}
        self.state.lines = {file.path.name: file.count for file in (self.file, self.samples)}
        for file in (self.file, self.samples):
            file.sync()
        if self.saved == self.state.step:  # by a stop, before its evaluation
            folder = checkpoint.update(self.run, self.state)
        else:
            folder = checkpoint.save(
                self.run, self.engine, self.tokenizer, self.state, only_model=only_model
            )
        self.saved = self.saved if only_model else self.state.step
        checkpoint.prune(self.run, self.config.save_total_limit, self.state.best_step)
        for callback in self.callbacks:
            callback.on_save(self.state.step, folder)
        return folder

    def check_stop(self) -> None:
        """Save and stop, if a signal asked for it."""
        if self.stop.signal is None:
            return
        step = self.state.step
        if step and self.saved != step:
            self.save()
        where = (
            f"saved in {checkpoint.path_of(self.run, step)}"
            if step
            else "no step to save; reference scores are kept"
        )
        message = f"stopped by {self.stop.signal} after step {step}, {where}"
        self.display.say(message)
        raise Stopped(message)

    def write(self, row: dict[str, Any]) -> None:
        self.file.write(row)
        self.display.log(row["step"], row)
        for callback in self.callbacks:
            callback.on_log(row["step"], row)


def measure_changes(was: TrainerState, now: TrainerState) -> list[str]:
    """What the best was told by, where that is another now."""
    named = (
        ("the evaluation data", was.eval_data, now.eval_data),
        ("metric_for_best_model", was.best_by, now.best_by),
    )
    return [f"{name} was {old}, is {new}" for name, old, new in named if old != new]


def described(groups: Sequence[Group]) -> str:
    """Which data these are, in a line that two runs can be held against."""
    return f"{len(groups)} groups, sha256 {hash_groups(groups, numbers=True)[:16]}"


def computed_tokens(groups: Sequence[Group], *, share: bool) -> int:
    """Tokens that pass the model in a micro-batch, the padding of rows among them."""
    if share or not groups:
        return sum(map(num_tokens, groups))
    rows = sum(len(group.completions) for group in groups)
    return rows * max(map(longest, groups))


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
        optim=config.optim,
        fp32_master_weights=config.fp32_master_weights,
    )
