"""A run from configuration to final model: what ``fastpref sft`` and ``fastpref dpo`` do."""

import dataclasses
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml

from fastpref.data.files import DataError
from fastpref.data.formats import Example, Kind, load_examples, to_examples
from fastpref.data.tokenize import Group, tokenize
from fastpref.methods.base import Method
from fastpref.methods.dpo import DPO, LossFn
from fastpref.methods.sft import SFT
from fastpref.models.head import LogpModel
from fastpref.models.load import (
    check_agreement,
    check_vocabulary,
    load_generation_config,
    load_model,
    load_tokenizer,
)
from fastpref.train import checkpoint
from fastpref.train.config import (
    ConfigError,
    DPOConfig,
    SFTConfig,
    TrainConfig,
    check_keys,
)
from fastpref.train.engine import TorchEngine
from fastpref.train.loop import Callback, Trainer, eval_strategy
from fastpref.train.reference import hash_groups, precompute

Rows = Iterable[Mapping[str, Any]]
Config = TypeVar("Config", bound=TrainConfig)


@dataclass(frozen=True)
class Result:
    """What a run leaves behind."""

    model: LogpModel
    tokenizer: Any
    metrics: dict[str, float]
    """The last value of everything that was logged, ``eval_`` names included."""
    steps: int
    output_dir: Path


def sft(
    config: SFTConfig | Mapping[str, Any],
    model: Any = None,
    train_dataset: Rows | None = None,
    eval_dataset: Rows | None = None,
    *,
    tokenizer: Any = None,
    callbacks: Sequence[Callback] = (),
) -> Result:
    """Supervised fine-tuning on prompts and completions; arguments as for :func:`dpo`."""
    config = as_config(SFTConfig, config)
    data = Data(train_dataset, eval_dataset)
    return run(config, SFT(), data, model, tokenizer, callbacks)


def dpo(
    config: DPOConfig | Mapping[str, Any],
    model: Any = None,
    train_dataset: Rows | None = None,
    eval_dataset: Rows | None = None,
    *,
    tokenizer: Any = None,
    loss_fn: LossFn | None = None,
    callbacks: Sequence[Callback] = (),
) -> Result:
    """Train on preference pairs against a frozen copy of the model as it came.

    Args:
        config: a DPOConfig, or its keys and values.
        model: a transformers CausalLM to train in place of ``config.model_name_or_path``.
        train_dataset: rows (dicts, or a datasets.Dataset) in place of ``config.dataset_name``.
        eval_dataset: rows in place of ``config.eval_dataset_name``.
        tokenizer: the model's, where it does not lie in ``config.model_name_or_path``.
        loss_fn: a loss of (chosen, rejected, ref_chosen, ref_rejected) log-probs, each (P,) in
            nats, in place of ``config.loss_type``; returns losses (P,) or a PairLoss.
        callbacks: called after steps, evaluations and saves.

    Returns:
        Result: the trained model, its last metrics, and the run's folder.

    Raises:
        ConfigError: a key or value that cannot be honoured.
        DataError: a file or row that cannot be read; opens with file and line.
        CheckpointError: the run's folder does not fit ``config.resume``.
    """
    config = as_config(DPOConfig, config)
    method = DPO(
        beta=config.beta,
        loss_types=tuple(config.loss_types()),
        loss_weights=tuple(config.loss_weights) if config.loss_weights else None,
        label_smoothing=config.label_smoothing,
        loss_fn=loss_fn,
    )
    data = Data(train_dataset, eval_dataset)
    return run(config, method, data, model, tokenizer, callbacks)


@dataclass(frozen=True)
class Data:
    """Rows given from Python; None: the configuration names them."""

    train: Rows | None = None
    evaluation: Rows | None = None


def as_config(cls: type[Config], config: Config | Mapping[str, Any]) -> Config:
    if isinstance(config, cls):
        config.check()  # a field may have been set since it was made
        return config
    if isinstance(config, Mapping):
        values, notes = check_keys(cls, config)
        for note in notes:
            say(note)
        return cls(**values)
    raise ConfigError(f"need a {cls.__name__} or a mapping, got {type(config).__name__}")


def run(
    config: TrainConfig,
    method: Method,
    data: Data,
    model: Any,
    tokenizer: Any,
    callbacks: Sequence[Callback],
) -> Result:
    """Everything between a checked configuration and a saved model."""
    folder = Path(config.output_dir)
    resume = checkpoint.find(folder, config.resume)
    model = model.model if isinstance(model, LogpModel) else model
    if model is None and config.model_name_or_path is None:
        raise ConfigError("need model_name_or_path, or a model from Python")
    if tokenizer is None:
        if config.model_name_or_path is None:
            raise ConfigError("need model_name_or_path or tokenizer for the model's tokens")
        tokenizer = load_tokenizer(
            config.model_name_or_path,
            revision=config.model_revision,
            trust_remote_code=config.trust_remote_code,
        )
    generation_config = (
        load_generation_config(str(config.model_name_or_path), revision=config.model_revision)
        if model is None
        else model.generation_config
    )
    reader = Reader(config, method.kind, tokenizer, generation_config)
    train_groups = reader.groups("train", data.train)
    evaluates = data.evaluation is not None or wants_evaluation(config)
    eval_groups = reader.groups("eval", data.evaluation) if evaluates else []
    device = torch.device("cuda" if torch.cuda.is_available() and not config.use_cpu else "cpu")
    torch.manual_seed(config.seed)
    if model is None:
        model = load_model(
            str(config.model_name_or_path),
            dtype=config.dtype,
            revision=config.model_revision,
            trust_remote_code=config.trust_remote_code,
        )
    policy = LogpModel(model, head_workspace=config.head_workspace)
    engine = TorchEngine(policy, device, bf16=wants_autocast(config, policy, device))
    check_vocabulary(policy.model, tokenizer)
    check_agreement(policy, train_groups[0])

    folder.mkdir(parents=True, exist_ok=True)
    write_config(config, folder / "run.yaml")
    reference = None
    if method.needs_reference:
        if getattr(config, "precompute_ref_log_probs", False):
            train_groups, eval_groups = (
                precompute(
                    engine,
                    policy,
                    groups,
                    folder / "reference_logps" / f"{split}.safetensors",
                    batch_size=getattr(config, "precompute_ref_batch_size", None)
                    or config.per_device_eval_batch_size,
                    max_tokens=config.max_tokens_per_micro_batch,
                )
                for split, groups in (("train", train_groups), ("eval", eval_groups))
            )
        else:
            reference = policy.frozen_copy()
    if config.gradient_checkpointing:
        checkpoint_activations(policy.model)

    trainer = Trainer(
        config, method, engine, tokenizer, train_groups, eval_groups, folder, reference, callbacks
    )
    trainer.state.fingerprint = hash_groups(train_groups)
    metrics = trainer.train(resume)
    best = trainer.state.best_step
    if config.load_best_model_at_end and best is not None:
        engine.load(checkpoint.path_of(folder, best))
    engine.save_model(folder)
    tokenizer.save_pretrained(folder)
    return Result(policy, tokenizer, metrics, trainer.state.step, folder)


def checkpoint_activations(model: Any) -> None:
    """Keep each layer's input alone; transformers renamed the switch between 5.17 and 5.23."""
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    name = next(name for name in names if hasattr(model, name))
    getattr(model, name)({"use_reentrant": False})


def wants_evaluation(config: TrainConfig) -> bool:
    return eval_strategy(config) != "no" or config.eval_on_start


def wants_autocast(config: TrainConfig, policy: LogpModel, device: torch.device) -> bool:
    if config.bf16 is not None:
        return config.bf16
    return device.type == "cuda" and policy.model.dtype == torch.float32


@dataclass(frozen=True)
class Reader:
    """Rows or files to tokenised groups."""

    config: TrainConfig
    kind: Kind
    tokenizer: Any
    generation_config: Any
    """The model's: it may know stop tokens that the tokenizer does not."""

    def groups(self, part: str, rows: Rows | None) -> list[Group]:
        """The groups of the ``train`` or ``eval`` part; a line says what was dropped and why."""
        examples, dropped = self.examples(part, rows)
        groups, cut = tokenize(
            examples,
            self.tokenizer,
            max_length=self.config.max_length,
            truncation_mode=self.config.truncation_mode,
            generation_config=self.generation_config,
        )
        counts = [f"{name} {n}" for name, n in (dropped | cut).items() if n]
        line = ", ".join([f"{part}: {len(groups)} groups of {len(examples)} rows", *counts])
        if not groups:
            raise DataError(f"need at least one group to learn from, got {line}")
        say(line)
        return groups

    def examples(self, part: str, rows: Rows | None) -> tuple[list[Example], dict[str, int]]:
        config = self.config
        options: dict[str, Any] = {
            "turn_marker": config.turn_marker,
            "skip_bad_rows": config.skip_bad_rows,
        }
        if rows is not None:
            return to_examples(rows, self.kind, name=f"{part}_dataset", **options)
        name, split = config.dataset_name, config.dataset_train_split
        if part == "eval":
            split = config.dataset_test_split
            if config.eval_dataset_name is not None:
                name = config.eval_dataset_name
                split = "train" if Path(name).is_file() else split  # a file is one split
        if name is None:
            raise ConfigError(f"need dataset_name, or {part}_dataset from Python")
        return load_examples(
            name, self.kind, split=split, config_name=config.dataset_config, **options
        )


def write_config(config: TrainConfig, path: Path) -> None:
    """The resolved configuration, as a recipe that runs again."""
    path.write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
