"""Attention over packed, prefix-shared segments, reached through transformers' registry.

Letters: T tokens, Tk gathered keys, Hq query heads, Hk key heads, D head size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from fastpref.data.packing import Segments
from fastpref.kernels.gather_rows import gather_rows
from fastpref.models.attention_backends import Backend, sdpa_per_segment

NAME = "fastpref"

# what models hand to every attention function and what changes nothing here
_WITHOUT_EFFECT = {
    "cache_position",
    "dropout",  # off: see LogpModel
    "output_router_logits",
    "position_ids",  # the rotation is done before
    "return_dict",
    "use_cache",
}


class ModelError(ValueError):
    """A model that fastpref cannot train as it stands; the message says what was needed."""


def _who(module: nn.Module) -> str:
    # asked only where something is refused: compiled code would be bound to the layer's number
    return f"{type(module).__name__} of layer {getattr(module, 'layer_idx', '?')}"


def _check_arguments(
    module: nn.Module, attention_mask: Tensor | None, others: dict[str, Any]
) -> None:
    if attention_mask is not None:
        raise ModelError(
            f"need attention without a mask (segments say who sees whom), got a mask of shape"
            f" {tuple(attention_mask.shape)} from {_who(module)}"
        )
    if others.pop("is_causal", None) is False or getattr(module, "is_causal", True) is False:
        raise ModelError(f"need causal attention, got is_causal=False from {_who(module)}")
    unknown = [
        name
        for name, value in others.items()
        if name not in _WITHOUT_EFFECT and value is not None and value is not False
    ]
    if unknown:
        raise ModelError(
            f"need attention whose every argument is understood (scaling, sliding_window,"
            f" softcap), got {', '.join(sorted(unknown))} from {_who(module)}"
        )


def _lowered(x: Tensor) -> Tensor:
    # under autocast rotations and norms of heads come in fp32, products in the lower dtype
    if x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    segments: Segments | None = None,
    backend: Backend = sdpa_per_segment,
    **others: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in every layer: (1, Hq, T, D), (1, Hk, T, D) twice
    -> (1, T, Hq, D). Raises ModelError for any argument that would change the result unseen.
    """
    if segments is None:
        raise ModelError(
            f"need segments, got none in {type(module).__name__}: this model's attention belongs"
            " to a LogpModel; call that with a Batch, or model(...) and generate() inside its"
            " plain(). (Where the LogpModel was called: the layers of this model do not hand"
            " keyword arguments on to their attention, so it cannot be used.)"
        )
    _check_arguments(module, attention_mask, others)
    if len(query) != 1:
        raise ModelError(f"need one packed row of tokens, got a batch of {len(query)}")
    q, k, v = (_lowered(x[0].transpose(0, 1)) for x in (query, key, value))
    if len(segments.k_index) != len(k):  # equal: no prompt is shared, keys are in place
        k = gather_rows(k.contiguous(), segments.k_index)
        v = gather_rows(v.contiguous(), segments.k_index)
    out = backend(q, k, v, segments, scaling=scaling, window=sliding_window, softcap=softcap)
    return out[None], None


# no mask function beside it: for such a name transformers makes no mask at all, where a registered
# one costs a device sync per forward (it looks for packed sequences in position_ids)
AttentionInterface.register(NAME, attention)
