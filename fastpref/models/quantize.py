"""Frozen base models in 4 or 8 bits through bitsandbytes, for adapters to be trained on."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from fastpref.models.attention import ModelError
from fastpref.models.model import head_of

# whether bitsandbytes packs a layer anew in evaluation: bf16 products that no gradient passes
_PACKS = "support_avx512bf16_for_cpu"


@dataclass(frozen=True)
class Quantization:
    """How linear layers but the head are kept; TRL's keys.

    Args:
        bits: 4 or 8; 8 needs CUDA.
        quant_type: nf4 or fp4, of 4 bits.
        nested: whether the constants of 4 bits are quantised as well.
        storage: dtype that packed weights of 4 bits lie in; None: uint8.
    """

    bits: int
    quant_type: str = "nf4"
    nested: bool = False
    storage: str | None = None

    def options(self, config: PretrainedConfig, dtype: str, device: torch.device) -> dict[str, Any]:
        """Arguments of from_pretrained: products are in the dtype of the other weights."""
        make: Any = BitsAndBytesConfig
        own = getattr(config, "dtype", None) or torch.float32
        compute = own if dtype == "auto" else getattr(torch, dtype)
        quantization = (
            make(load_in_8bit=True)
            if self.bits == 8
            else make(
                load_in_4bit=True,
                bnb_4bit_compute_dtype=compute,
                bnb_4bit_quant_type=self.quant_type,
                bnb_4bit_use_double_quant=self.nested,
                bnb_4bit_quant_storage=self.storage,
            )
        )
        return {"quantization_config": quantization, "device_map": {"": device}}


def check_bitsandbytes() -> None:
    """Raises ModelError where bitsandbytes is not installed."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        need = "need bitsandbytes for load_in_4bit and load_in_8bit"
        raise ModelError(f"{need}, got none ({error}); pip install 'fastpref[quant]'") from error


def is_quantized(model: nn.Module) -> bool:
    """Whether a transformers model in it holds weights that can be neither trained nor cast."""
    return any(getattr(module, "is_quantized", False) for module in model.modules())


def in_int8(model: nn.Module) -> bool:
    """Whether activations are quantised too: then rows of a product are rounded together."""
    return bool(getattr(model, "is_loaded_in_8bit", False))


def prepare_quantized(model: PreTrainedModel) -> None:
    """Check the head of a quantised model, and have its layers compute the same in every mode.

    Raises:
        ModelError: the head is quantised.
    """
    weight: Any = head_of(model).weight
    if not weight.is_floating_point() or hasattr(weight, "quant_state"):
        raise ModelError(f"need a head that is not quantised, got one of {weight.dtype}")
    for module in model.modules():
        if hasattr(module, _PACKS):
            setattr(module, _PACKS, False)
