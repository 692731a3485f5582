"""What a run is told: flat dataclasses with the keys and defaults of TRL 1.16."""

import dataclasses
import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from jsonargparse import ArgumentError, ArgumentParser

from fastpref.losses.pairs import OPTIONS
from fastpref.train.peer_keys import ALIASES, INERT, LORA_KEYS, UNSUPPORTED, WORDS

Strategy = Literal["no", "steps", "epoch"]
ATTENTION = ("flash_attention_2", "flash_attention_3", "flash_attention_4", "varlen", "sdpa")
TRACKERS = ("tensorboard", "trackio", "wandb")
BITSANDBYTES = ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit")
OPTIMS = ("adamw_torch_fused", "adamw_torch", *BITSANDBYTES)


class ConfigError(ValueError):
    """A key or a value that a run cannot honour."""


@dataclass(kw_only=True)
class TrainConfig:
    """The keys that every method shares."""

    model_name_or_path: str | None = None
    """Local folder or hub id of the model to train."""
    model_revision: str = "main"
    """Branch, tag or commit of a hub model."""
    dtype: str = "float32"
    """Weights' dtype: float32, bfloat16, or auto for the checkpoint's own."""
    trust_remote_code: bool = False
    """Run Python code that comes with a hub model."""
    lora: dict[str, Any] | None = None
    """Train adapters alone: entries of peft's LoraConfig (r, alpha, target_modules, ...); the
    reference is the model without them. TRL's use_peft, lora_r, ... are read too."""
    load_in_4bit: bool = False
    """Keep the linear layers but the head in 4 bits (QLoRA); with lora."""
    load_in_8bit: bool = False
    """Keep them in 8 bits; with lora, on CUDA."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """The 4 bits: nf4 or fp4."""
    use_bnb_nested_quant: bool = False
    """Quantise the constants of 4 bits as well."""
    bnb_4bit_quant_storage: Literal["uint8", "bfloat16", "float16", "float32"] | None = None
    """Dtype that packed 4-bit weights lie in; None: uint8."""

    dataset_name: str | None = None
    """Local .json, .jsonl, .parquet file (or .gz of it), a folder of them, or a hub id."""
    dataset_config: str | None = None
    """Configuration of a hub data set that has several."""
    dataset_train_split: str = "train"
    """Split to train on."""
    dataset_test_split: str = "test"
    """Split to evaluate on, when eval_dataset_name is not given."""
    eval_dataset_name: str | None = None
    """File, folder or hub id to evaluate on; without it the test split of dataset_name."""
    turn_marker: str = "\n\nAssistant:"
    """Text that opens an assistant's turn; finds the prompt in pairs of whole dialogues."""
    skip_bad_rows: bool = False
    """Count malformed rows instead of stopping at the first."""
    max_length: int | None = 1024
    """Most tokens of a prompt and one completion; None for no limit."""
    truncation_mode: Literal["keep_start", "keep_end"] = "keep_start"
    """Which end of a completion that is too long is kept; a prompt always keeps its end."""

    output_dir: str = "trainer_output"
    """The run's folder: run.yaml, metrics.jsonl, checkpoints, and the final model."""
    resume: str | None = None
    """auto: go on from the newest complete checkpoint, or start; or a checkpoint's folder."""
    seed: int = 42
    """Seed of the data order and of everything else that is drawn."""
    train_sampling_strategy: Literal["random", "sequential"] = "random"
    """Order of the groups within an epoch."""

    per_device_train_batch_size: int = 8
    """Groups (SFT rows, preference pairs) per micro-batch and device."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimizer step."""
    max_tokens_per_micro_batch: int | None = None
    """Split an optimizer step by tokens instead of groups; the step's groups stay the same."""
    num_train_epochs: float = 3.0
    """Passes over the data."""
    max_steps: int = -1
    """Optimizer steps; above 0 it takes the place of num_train_epochs."""
    learning_rate: float = 5e-5
    """Peak learning rate."""
    lr_scheduler_type: str = "linear"
    """A schedule of transformers: linear, cosine, constant, constant_with_warmup, ..."""
    lr_scheduler_kwargs: dict[str, Any] | None = None
    """Further arguments of that schedule."""
    warmup_steps: float = 0
    """Steps of linear warm-up; below 1 a fraction of all steps."""
    weight_decay: float = 0.0
    """AdamW's decay of matrices and embeddings (not of biases and norms)."""
    adam_beta1: float = 0.9
    """AdamW's decay of the first moment."""
    adam_beta2: float = 0.999
    """AdamW's decay of the second moment."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """Clip the global gradient norm; 0 for never."""
    optim: str = "adamw_torch_fused"
    """adamw_torch_fused (adamw_torch is the same); through bitsandbytes, with moments of 8 bits:
    adamw_8bit (or adamw_bnb_8bit), and paged_adamw_8bit, whose moments may leave a GPU."""
    fp32_master_weights: bool = True
    """Where trained weights are half: fp32 copies that steps change, fp32 gradients and moments, 18
    bytes a parameter; false: all in the weights' dtype, 8 bytes, and small updates are lost."""

    bf16: bool | None = None
    """bfloat16 autocast over the weights' dtype; None: on CUDA, unless the weights are half
    (bfloat16 ones with lora do have it: adapters are fp32)."""
    gradient_checkpointing: bool = True
    """Recompute each layer in the backward instead of keeping its activations."""
    torch_compile: bool = False
    """Compile the layers, once for all lengths; the first steps are slow."""
    activation_offloading: bool = False
    """Keep the layers' inputs of gradient_checkpointing in pinned host memory, on CUDA."""
    use_liger_kernel: bool = False
    """Norm, rope and mlp kernels of liger-kernel, on CUDA; never its loss."""
    liger_kernel_config: dict[str, Any] | None = None
    """Which of them, true or false by the names of its function for the architecture, such as rope,
    rms_norm, swiglu; None: all."""
    use_cpu: bool = False
    """Stay on the CPU where there is a GPU."""
    attn_implementation: str | None = None
    """flash_attention_2, flash_attention_3, flash_attention_4, varlen (torch's) or sdpa; None: the
    fastest that can run the model, which a line says."""
    router_aux_loss_coef: float | None = None
    """Factor of the load-balancing loss of a mixture of experts; None: what the model's config
    declares; 0 for none."""
    head_workspace: int | None = None
    """Bytes that the log-prob head may use; None: 1 GiB on CUDA, 256 MiB on the CPU."""

    logging_steps: float = 10
    """Steps between log lines; below 1 a fraction of all steps."""
    logging_first_step: bool = False
    """Log step 1 too."""
    eval_strategy: Strategy | None = None
    """When to evaluate; None: every eval_steps if those are given, else at the end of each epoch
    where eval_dataset_name is given, else never."""
    eval_steps: float | None = None
    """Steps between evaluations (logging_steps if None); below 1 a fraction of all steps."""
    eval_on_start: bool = False
    """Evaluate once before the first step."""
    per_device_eval_batch_size: int = 8
    """Groups per evaluation batch."""
    save_strategy: Strategy = "steps"
    """When to write a checkpoint."""
    save_steps: float = 500
    """Steps between checkpoints; below 1 a fraction of all steps."""
    save_total_limit: int | None = None
    """Checkpoints to keep: the newest ones, and always the best."""
    save_only_model: bool = False
    """Leave optimizer and random state out of checkpoints: smaller, but no run goes on from one."""
    metric_for_best_model: str | None = None
    """Evaluation metric that ranks checkpoints; None: loss."""
    greater_is_better: bool | None = None
    """Direction of that metric; None: lower for a loss, higher for anything else."""
    load_best_model_at_end: bool = False
    """Let the final model be the best checkpoint, not the last step."""
    eval_samples: int = 0
    """Completions sampled at each evaluation, one for each of the first evaluation prompts."""
    max_new_tokens: int = 128
    """Longest of those completions."""
    report_to: str | list[str] = "none"
    """Trackers that get every logged line: none, tensorboard, wandb, trackio, or several."""
    project: str | None = None
    """Project of the run in wandb and trackio; None: WANDB_PROJECT, else fastpref."""
    run_name: str | None = None
    """The run's name in trackers and reports; None: the name of output_dir."""
    report: bool = True
    """Write report.html into output_dir at the end."""
    disable_tqdm: bool | None = None
    """Plain lines instead of a progress bar on a terminal."""
    local_rank: int = -1
    """Set by a launcher."""

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise ConfigError for the first value that no run could honour."""
        at_least(self, 1, "per_device_train_batch_size", "gradient_accumulation_steps")
        at_least(self, 1, "per_device_eval_batch_size")
        at_least(self, 1, "max_tokens_per_micro_batch", "save_total_limit", "head_workspace")
        at_least(self, 1, "max_new_tokens")
        at_least(self, 2, "max_length")
        at_least(self, 0, "warmup_steps", "weight_decay", "max_grad_norm", "learning_rate", "seed")
        at_least(self, 0, "adam_beta1", "adam_beta2", "adam_epsilon", "eval_samples")
        at_least(self, 0, "router_aux_loss_coef")
        for key in ("adam_beta1", "adam_beta2"):
            if getattr(self, key) >= 1:
                raise ConfigError(f"need {key} below 1, got {getattr(self, key)}")
        if self.seed >= 2**32:
            raise ConfigError(f"need a seed below 2**32, got {self.seed}")
        for key in ("logging_steps", "eval_steps", "save_steps"):
            value = getattr(self, key)
            if value is not None and (value <= 0 or (value > 1 and value != int(value))):
                raise ConfigError(f"need {key}: a whole number or a fraction of 1, got {value}")
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            raise ConfigError(
                "need max_steps or num_train_epochs above 0, "
                f"got {self.max_steps} and {self.num_train_epochs}"
            )
        self.check_schedule()
        self.check_adapters()
        if self.dtype not in ("auto", "float32", "bfloat16"):  # float16 needs a loss scaler
            raise ConfigError(f"need dtype: auto, float32 or bfloat16, got {self.dtype!r}")
        if self.activation_offloading and not self.gradient_checkpointing:
            raise ConfigError(
                "need gradient_checkpointing for activation_offloading, got it off: what is kept "
                "of whole layers, autocast's copies of weights among it, is too much to move"
            )
        if self.attn_implementation not in (None, *ATTENTION):
            raise ConfigError(
                unknown("attn_implementation", str(self.attn_implementation), ATTENTION)
            )
        if self.optim not in OPTIMS:
            raise ConfigError(unknown("optim", self.optim, OPTIMS))
        tracker_names(self.report_to)

    def check_schedule(self) -> None:
        """Build the schedule once on a dummy, since only it knows which arguments it takes."""
        from transformers import SchedulerType, get_scheduler

        known = [str(kind.value) for kind in SchedulerType]
        if self.lr_scheduler_type not in known:
            raise ConfigError(unknown("lr_scheduler_type", self.lr_scheduler_type, known))
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        kwargs = self.lr_scheduler_kwargs or {}
        try:
            schedule = get_scheduler(
                self.lr_scheduler_type, optimizer, 1, 10, scheduler_specific_kwargs=kwargs
            )
            optimizer.step()
            schedule.step()
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"need arguments that lr_scheduler_type {self.lr_scheduler_type!r} takes, "
                f"got lr_scheduler_kwargs {kwargs}: {error}"
            ) from error

    def check_adapters(self) -> None:
        from fastpref.train.lora_config import check_quantization, settled

        self.lora = settled(self.lora)
        check_quantization(self)

    def every(self, key: str, total_steps: int) -> int:
        """Steps between two events, where below 1 the key is a fraction of all steps."""
        value = float(getattr(self, key))
        return max(1, math.ceil(value * total_steps) if value < 1 else int(value))


@dataclass(kw_only=True)
class SFTConfig(TrainConfig):
    """Supervised fine-tuning: cross-entropy of completions, mean over the step's tokens."""

    learning_rate: float = 2e-5
    """Peak learning rate."""


# numbers of the losses' own, which a recipe may hold as keys
LOSS_OPTIONS = {key: value for options in OPTIONS.values() for key, value in options.items()}
Config = TypeVar("Config", bound=TrainConfig)


def at_least(config: TrainConfig, least: float, *keys: str) -> None:
    for key in keys:
        value = getattr(config, key)
        if value is not None and not value >= least:
            raise ConfigError(f"need {key} of at least {least}, got {value}")


def unknown(what: str, name: str, known: Any) -> str:
    """The message for a name that is none of the known ones: it gives the nearest."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    hint = f"; the nearest is {near[0]!r}" if near else ""
    short = f"; known: {', '.join(known)}" if len(known) < 20 else ""
    return f"unknown {what} {name!r}{hint}{short}"


def typed(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """A config whose values have the types of their keys, as on the command line.

    Raises:
        ConfigError: a value that is not of its key's type, or that no run could honour.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, None, fail_untyped=False)
    try:
        namespace = parser.parse_object({key: plain(value) for key, value in values.items()})
    except ArgumentError as error:
        raise ConfigError(str(error)) from error
    return cls(**{f.name: namespace[f.name] for f in dataclasses.fields(cls)})


def plain(value: Any) -> Any:
    """A value as YAML writes it: paths as text, numbers of numpy as Python's."""
    if isinstance(value, os.PathLike):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    return value


def tracker_names(report_to: str | list[str]) -> list[str]:
    """The trackers that report_to asks for, each once.

    Raises:
        ConfigError: a name that is no tracker; "all" too, for what a run reports to must not depend
            on what happens to be installed.
    """
    names = [report_to] if isinstance(report_to, str) else list(dict.fromkeys(report_to))
    if names == ["none"]:
        return []
    for name in names:
        if name in ("all", "none"):
            known = ", ".join(TRACKERS)
            raise ConfigError(f"need report_to: none, or some of {known}, got {report_to!r}")
        if name not in TRACKERS:
            raise ConfigError(unknown("report_to", name, ["none", *TRACKERS]))
    return names


def names_of(key: str) -> list[str]:
    """A key and its other names."""
    return [key, *(name for name, ours in ALIASES.items() if ours == key)]


def check_keys(
    cls: type[TrainConfig], values: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Sort foreign keys out of a recipe.

    Args:
        cls: the config class that the values are for.
        values: keys as in a YAML recipe or on a command line.

    Returns:
        The values that cls takes, and a line for each key that has no effect here.

    Raises:
        ConfigError: a key of TRL that cannot be honoured, or an unknown one with the nearest.
    """
    fields = {f.name for f in dataclasses.fields(cls)}
    taken: dict[str, Any] = {}
    notes = []
    for given, value in values.items():
        key = ALIASES.get(given, given)
        if key in fields:
            value = (
                WORDS[key].get(value, value) if isinstance(value, bool) and key in WORDS else value
            )
            if key in ("loss_options", "lora") and value is not None:
                value = merged(key, taken.pop(key, None), value)
            if taken.get(key) and value and taken[key] != value:
                raise ConfigError(
                    f"need one of {' and '.join(names_of(key))}, got {taken[key]} and {value}"
                )
            taken[key] = value or taken.get(key, value)  # warmup_steps: 0 beside a warmup_ratio
        elif key in LOSS_OPTIONS and "loss_options" in fields:
            if value is not None:
                known = taken.get("loss_options")
                taken["loss_options"] = merged("loss_options", known, {key: value})
        elif key in LORA_KEYS or key.startswith("lora."):
            entry = key.removeprefix("lora.") if key not in LORA_KEYS else f"trl_{key}"
            taken["lora"] = merged("lora", taken.get("lora"), {entry: value})
        elif key in INERT:
            notes.append(f"{given} has no effect: {INERT[key]}")
        elif key in UNSUPPORTED:
            neutral = UNSUPPORTED[key]
            if value not in neutral:
                raise ConfigError(
                    f"{given}: {value!r} is not supported; leave the key out or set it to "
                    f"{' or '.join(map(repr, neutral))}"
                )
        else:
            more = set(LORA_KEYS) | (set(LOSS_OPTIONS) if "loss_options" in fields else set())
            raise ConfigError(unknown("key", given, fields | set(ALIASES) | more))
    return taken, notes


def merged(what: str, known: Any, more: Any) -> dict[str, Any]:
    """Entries of a mapping from both; ConfigError where they disagree."""
    known, more = known or {}, more or {}
    for options in (known, more):
        if not isinstance(options, Mapping):
            raise ConfigError(f"need names and values for {what}, got {options!r}")
    for key in known.keys() & more.keys():
        if known[key] != more[key]:
            raise ConfigError(f"need one {key}, got {known[key]} and {more[key]}")
    return {**known, **more}
