"""Norm, rope and mlp kernels of liger-kernel on a loaded model."""

import importlib
import inspect
from collections.abc import Callable, Mapping

from transformers import PreTrainedModel

from fastpref.models.attention import ModelError

# the head has its own
LOSSES = ("cross_entropy", "fused_linear_cross_entropy")


def liger_functions() -> dict[str, Callable[..., None]]:
    """What liger-kernel patches a model with, by transformers' model type.

    Raises:
        ModelError: it is not installed.
    """
    try:
        patches = importlib.import_module("liger_kernel.transformers.monkey_patch")
    except ImportError as error:
        raise ModelError(
            f"need liger-kernel for use_liger_kernel, got {error}: pip install 'fastpref[liger]'"
        ) from error
    known: dict[str, Callable[..., None]] = patches.MODEL_TYPE_TO_APPLY_LIGER_FN
    return known


def apply_liger(model: PreTrainedModel, kernels: Mapping[str, bool] | None = None) -> None:
    """Change the model's norms, rotations and MLPs to liger-kernel's, and never its loss.

    The modules and parameters stay the same objects; copies of the model have the kernels too. The
    rotation is changed for all models of the architecture in this process: that is liger-kernel's.

    Args:
        model: on a CUDA device by its first forward.
        kernels: names of the architecture's kernels, such as rope, rms_norm, swiglu, and whether
            each is used; those not named are.

    Raises:
        ModelError: liger-kernel is not installed, or lacks the architecture or a named kernel.
    """
    known, kind = liger_functions(), model.config.model_type
    if kind not in known:
        raise ModelError(
            f"need an architecture that liger-kernel knows for use_liger_kernel, got"
            f" {type(model).__name__} ({kind}); known: {', '.join(sorted(known))}"
        )
    taken = inspect.signature(known[kind]).parameters
    asked = {name: on for name, on in (kernels or {}).items() if on or name not in LOSSES}
    names = [name for name in taken if name not in ("model", *LOSSES)]
    if other := sorted(asked.keys() - set(names)):
        raise ModelError(
            f"need a liger_kernel_config of {', '.join(names)} for {kind}, got {', '.join(other)}"
        )
    known[kind](model=model, **{name: False for name in LOSSES if name in taken}, **asked)
