"""The model of a run and the engine that it trains in, from the run's configuration."""

from typing import Any

import torch

from fastpref.models.adapters import add_adapters, has_adapters
from fastpref.models.attention_backends import sdpa_per_segment
from fastpref.models.liger import liger_functions
from fastpref.models.load import load_model
from fastpref.models.model import LogpModel
from fastpref.models.quantize import is_quantized
from fastpref.train.config import ConfigError, TrainConfig
from fastpref.train.console import tell
from fastpref.train.engine import TorchEngine
from fastpref.train.lora_config import quantization
from fastpref.train.optimizer import check_dtypes, check_optim

# key -> keys that say more about what it switches on
SWITCHES = {
    "load_in_4bit": ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"),
    "use_liger_kernel": ("liger_kernel_config",),
}


def check_device(config: TrainConfig, device: torch.device) -> None:
    """Refuse what the device, or what is installed, cannot do."""
    check_optim(config.optim, device)
    for key in ("activation_offloading", "use_liger_kernel"):
        if getattr(config, key) and device.type != "cuda":
            raise ConfigError(f"need a CUDA device for {key}, got {device.type}")
    if config.use_liger_kernel:
        liger_functions()
    for switch, keys in SWITCHES.items():
        told = [key for key in keys if getattr(config, key) != getattr(TrainConfig, key)]
        if told and not getattr(config, switch):
            tell(f"{switch} is off, so there is no effect of {', '.join(told)}")


def device_of(config: TrainConfig) -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() and not config.use_cpu else "cpu")


def check_model(config: TrainConfig, model: Any) -> None:
    """Refuse a model from Python that has adapters, and bits that the device has no layers for."""
    given = model.model if isinstance(model, LogpModel) else model
    if given is not None and has_adapters(given):
        raise ConfigError(
            "need a model without adapters (lora puts new ones on it), got one that has some: "
            "call merge_and_unload() of its PeftModel first"
        )
    asked = [key for key in ("load_in_4bit", "load_in_8bit") if getattr(config, key)]
    if asked and given is not None:
        raise ConfigError(f"need model_name_or_path for {asked[0]}, got a model that is loaded")
    if config.load_in_8bit and device_of(config).type != "cuda":
        raise ConfigError(
            "need CUDA for load_in_8bit (on a CPU bitsandbytes computes otherwise in training than "
            "in evaluation), got none: load_in_4bit runs here"
        )


def build_engine(config: TrainConfig, model: Any) -> TorchEngine:
    """The model, given or loaded, where it will be trained."""
    device = device_of(config)
    if model is None:
        model = load_model(
            str(config.model_name_or_path),
            dtype=config.dtype,
            revision=config.model_revision,
            trust_remote_code=config.trust_remote_code,
            quantization=quantization(config),
            device=device,
        )
    if is_quantized(model) and (config.lora is None or model.device.type != device.type):
        got = f"one on {model.device} without lora" if config.lora is None else f"{model.device}"
        raise ConfigError(f"need lora for a quantised model, which lies on {device}, got {got}")
    adapters = None
    if config.lora is not None:
        adapters = add_adapters(model, config.lora, revision=config.model_revision)
    check_dtypes(model)
    bf16 = config.bf16
    if bf16 is None:  # adapters are fp32, and a product of both would be too
        lower = (torch.float32,) if adapters is None else (torch.float32, torch.bfloat16)
        bf16 = device.type == "cuda" and model.dtype in lower
    policy = LogpModel(
        model,
        head_workspace=config.head_workspace,
        attn_implementation=config.attn_implementation,
        adapters=adapters,
    )
    engine = TorchEngine(policy, device, bf16=bf16)
    with engine.autocast():
        attention = policy.attention(device)
    tell(f"attention: {attention}")
    segmented = attention.backend is sdpa_per_segment and policy.shares_prompts
    if segmented and config.torch_compile and config.gradient_checkpointing:
        raise ConfigError(
            "need gradient_checkpointing off for torch_compile where attention is sdpa, got both: "
            "layers that are computed again can be compiled around one attention kernel only"
        )
    return engine
