"""A run from configuration to final model: what ``fastpref sft`` and ``fastpref dpo`` do."""

import contextlib
import dataclasses
import errno
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from fastpref.losses.ranking import RANKING_LOSSES
from fastpref.methods.base import Method
from fastpref.methods.dpo import DPO, LossFn
from fastpref.methods.kto import KTO
from fastpref.methods.ranking import Ranking
from fastpref.methods.sft import SFT
from fastpref.models.adapters import unadapted
from fastpref.models.attention import ModelError
from fastpref.models.liger import apply_liger
from fastpref.models.load import (
    check_agreement,
    check_vocabulary,
    load_tokenizer,
    unchanged,
)
from fastpref.models.model import LogpModel
from fastpref.report.page import write_report
from fastpref.train import checkpoint
from fastpref.train.build import build_engine, check_device, check_model, device_of
from fastpref.train.callbacks import Callback
from fastpref.train.checkpoint import CheckpointError
from fastpref.train.config import Config, ConfigError, SFTConfig, TrainConfig, check_keys, typed
from fastpref.train.console import tell
from fastpref.train.engine import TorchEngine
from fastpref.train.groups import Data, Rows, read_data
from fastpref.train.guard import Stopped, only_writer
from fastpref.train.loop import Trainer
from fastpref.train.preference_config import DPOConfig, KTOConfig
from fastpref.train.reference import precompute
from fastpref.train.trackers import trackers


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
    """Train on preference pairs, or on rankings, mostly against a frozen copy of the model.

    Args:
        config: a DPOConfig, or its keys and values.
        model: a transformers CausalLM to train in place of ``config.model_name_or_path``. It is
            changed: afterwards ``result.model.plain()`` gives it back for calls of its own.
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
        CheckpointError: the run's folder does not fit ``config.resume``, or could not be written.
        DivergedError: a loss, gradient or reference score is not finite; names the rows.
        Stopped: SIGTERM, SIGUSR1 or Ctrl-C; a SystemExit with code 0: the run is saved.
    """
    config = as_config(DPOConfig, config)
    method = preference_method(config, loss_fn)
    data = Data(train_dataset, eval_dataset)
    return run(config, method, data, model, tokenizer, callbacks)


def kto(
    config: KTOConfig | Mapping[str, Any],
    model: Any = None,
    train_dataset: Rows | None = None,
    eval_dataset: Rows | None = None,
    *,
    tokenizer: Any = None,
    callbacks: Sequence[Callback] = (),
) -> Result:
    """Train on completions labelled good or bad, or on pairs taken apart; arguments as for
    :func:`dpo`.
    """
    config = as_config(KTOConfig, config)
    data = Data(train_dataset, eval_dataset)
    return run(config, kto_method(config), data, model, tokenizer, callbacks)


def kto_method(config: KTOConfig) -> KTO:
    """What ``fastpref kto`` learns by, from its configuration."""
    return KTO(
        beta=config.beta,
        loss_type=config.loss_type,
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
        columns=tuple(config.loss_columns or ()),
        precomputes_reference=config.precompute_ref_log_probs,
    )


def preference_method(config: DPOConfig, loss_fn: LossFn | None = None) -> Method:
    """What ``fastpref dpo`` learns by, from its configuration."""
    types, precomputes = tuple(config.loss_types()), config.precompute_ref_log_probs
    if loss_fn is not None and (told := config.told()):
        raise ConfigError(f"need a loss_fn without what it cannot read, got one and {told}")
    if types[0] in RANKING_LOSSES:
        return Ranking(config.beta, types[0], precomputes_reference=precomputes)
    return DPO(
        beta=config.beta,
        loss_types=types,
        loss_weights=tuple(config.loss_weights) if config.loss_weights else None,
        label_smoothing=config.label_smoothing,
        f_divergence_type=config.f_divergence_type,
        f_alpha_divergence_coef=config.f_alpha_divergence_coef,
        ld_alpha=config.ld_alpha,
        use_weighting=config.use_weighting,
        options=config.loss_options or {},
        columns=config.columns(),
        loss_fn=loss_fn,
        precomputes_reference=precomputes,
    )


def as_config(cls: type[Config], config: Config | Mapping[str, Any]) -> Config:
    if isinstance(config, cls):
        return typed(cls, dataclasses.asdict(config))
    if isinstance(config, Mapping):
        values, notes = check_keys(cls, config)
        for note in notes:
            tell(note)
        return typed(cls, values)
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
    check_start(config, model, tokenizer)
    callbacks = (*callbacks, *trackers(config))
    folder = Path(config.output_dir)
    try:
        with only_writer(folder):
            return run_alone(config, method, data, model, tokenizer, callbacks)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        kept = [path.name for path in checkpoint.complete(folder)[-1:]] or ["none"]
        raise CheckpointError(
            f"need room on the disk of {folder}, got {error}; newest checkpoint: {kept[0]}"
        ) from error


def run_alone(
    config: TrainConfig,
    method: Method,
    data: Data,
    model: Any,
    tokenizer: Any,
    callbacks: Sequence[Callback],
) -> Result:
    """A run in a folder that no other run writes to."""
    folder = Path(config.output_dir)
    checkpoint.restore(folder)
    resume = checkpoint.find(folder, config.resume)
    model = model.model if isinstance(model, LogpModel) else model
    tokenizer = tokenizer or load_tokenizer(
        str(config.model_name_or_path),
        revision=config.model_revision,
        trust_remote_code=config.trust_remote_code,
    )
    train_groups, eval_groups = read_data(config, method, data, model, tokenizer)
    torch.manual_seed(config.seed)
    engine = build_engine(config, model)
    policy = engine.model
    check_vocabulary(policy.model, tokenizer)
    try:
        with engine.autocast():
            check_agreement(policy, train_groups[0])
    except ModelError:
        raise
    except ValueError as error:  # a head_workspace that is too small
        raise ConfigError(str(error)) from error
    if config.use_liger_kernel:
        with engine.autocast(), unchanged(policy, train_groups[0], "liger-kernel"):
            apply_liger(policy.model, config.liger_kernel_config)

    trainer = Trainer(
        config, method, engine, tokenizer, train_groups, eval_groups, folder, callbacks=callbacks
    )
    if resume is not None:  # a changed run is refused before a file of it is touched
        trainer.state_of(resume)
    checkpoint.replace_text(folder / "run.yaml", recipe(config))
    with contextlib.ExitStack() as ends:  # last: a tracker may take its time
        for callback in reversed(callbacks):
            ends.callback(callback.on_end)
        with trainer.stop:
            prepare_reference(trainer)
            policy.checkpoint_layers(config.gradient_checkpointing)
            policy.offload_activations = config.activation_offloading
            policy.compile_layers(config.torch_compile)
            if trainer.forward.reference is not None and policy.adapters is None:
                trainer.forward.reference.compile_layers(config.torch_compile)
            metrics = trainer.train(resume)
            if config.load_best_model_at_end and trainer.state.best_step is not None:
                load_best(engine, checkpoint.path_of(folder, trainer.state.best_step))
            checkpoint.publish(folder, engine, tokenizer)
        if config.report:
            write_report([folder], folder / "report.html")
        trainer.display.say(f"done: the model is in {folder}")
        if trainer.stop.signal:  # too late to save anything, but whatever comes next must not begin
            message = f"stopped by {trainer.stop.signal} after the last step of {folder}"
            trainer.display.say(message)
            raise Stopped(message, finished=True)
    return Result(policy, tokenizer, metrics, trainer.state.step, folder)


def load_best(engine: TorchEngine, folder: Path) -> None:
    if problem := checkpoint.damage(folder):
        raise CheckpointError(
            f"need the best checkpoint whole to end with it, but {folder} is damaged ({problem}); "
            "delete it, and --resume auto ends with the newest"
        )
    engine.load_model(folder)


def prepare_reference(trainer: Trainer) -> None:
    """The policy as it came, or its scores among the groups' extras.

    That is the policy without its adapters, or a frozen copy where it has none.
    """
    method, policy, config = trainer.method, trainer.engine.model, trainer.config
    base = unadapted(policy)
    if method.needs_reference and not method.precomputes_reference:
        trainer.forward.reference = policy.frozen_copy() if base is policy else base
    elif method.needs_reference:
        shared = getattr(config, "reference_cache", None)
        folder = Path(shared) if shared else trainer.run / "reference_logps"
        trainer.train_groups, trainer.eval_groups = (
            precompute(
                trainer.engine,
                method,
                base,
                groups,
                folder,
                batch_size=config.per_device_eval_batch_size,
                max_tokens=config.max_tokens_per_micro_batch,
                on_batch=trainer.check_stop,
            )
            for groups in (trainer.train_groups, trainer.eval_groups)
        )


def check_start(config: TrainConfig, model: Any, tokenizer: Any) -> None:
    """Refuse what cannot become a run, before anything is loaded."""
    if config.model_name_or_path is None and (model is None or tokenizer is None):
        raise ConfigError("need model_name_or_path, or a model and its tokenizer from Python")
    if isinstance(model, str):
        raise ConfigError(f"need model_name_or_path for a path or hub id, got model={model!r}")
    check_model(config, model)
    folder = Path(config.output_dir).absolute()
    parent = next(p for p in (folder, *folder.parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"need an output_dir that can be made, got {config.output_dir}")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        raise ConfigError(f"need one process, got WORLD_SIZE={processes}")
    check_device(config, device_of(config))


def recipe(config: TrainConfig) -> str:
    """The resolved configuration, as a recipe that runs again."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
