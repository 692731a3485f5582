"""Attention over packed, prefix-shared segments, reached through transformers' registry.

Letters: T tokens, Tk gathered keys, Hq query heads, Hk key heads, D head size.
"""

from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from fastpref.data.packing import Segments
from fastpref.kernels.gather_rows import gather_rows

NAME = "fastpref"

# what models hand to every attention function and what changes nothing here
_WITHOUT_EFFECT = {
    "cache_position",
    "dropout",  # off: see LogpModel
    "position_ids",  # the rotation is done before
    "return_dict",
    "use_cache",
}


class ModelError(ValueError):
    """A model that fastpref cannot train as it stands; the message says what was needed."""


class Backend(Protocol):
    """(T, Hq, D), (Tk, Hk, D), (Tk, Hk, Dv) -> (T, Hq, Dv), causal from the bottom right."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        segments: Segments,
        *,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
    ) -> Tensor: ...


def _visible(n_q: int, n_k: int, window: int | None, device: torch.device) -> Tensor:
    # (n_q, n_k) bool: query i stands at key i + n_k - n_q
    seen = torch.ones(n_q, n_k, dtype=torch.bool, device=device).tril(n_k - n_q)
    return seen if window is None else seen.triu(n_k - n_q - window + 1)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    # (1, H, L, D) each; without a mask: causal where square, one query that sees all otherwise
    repeat = query.shape[1] // key.shape[1]
    if softcap is None or mask is None:
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None and query.shape[2] > 1,
            scale=scaling,
            enable_gqa=repeat > 1,
        )
    key, value = (x.repeat_interleave(repeat, 1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * (scaling or query.shape[-1] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    at_least_fp32 = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(-1, dtype=at_least_fp32).to(value.dtype) @ value


def _sdpa_per_segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    *,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    q_lengths = [q1 - q0 for q0, q1, _, _ in segments.bounds]
    k_lengths = [k1 - k0 for _, _, k0, k1 in segments.bounds]
    masks: dict[tuple[int, int], Tensor] = {}
    out = []
    # split, not slices: its backward is one cat instead of a (T, H, D) of zeros per segment
    for q, k, v in zip(
        torch.split_with_sizes(query, q_lengths),
        torch.split_with_sizes(key, k_lengths),
        torch.split_with_sizes(value, k_lengths),
        strict=True,
    ):
        shape = n_q, n_k = len(q), len(k)
        near = None if window is None or window >= n_k else window
        mask = None
        if near is not None or softcap is not None or n_q not in (1, n_k):
            if shape not in masks:
                masks[shape] = _visible(n_q, n_k, near, query.device)
            mask = masks[shape]
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out.append(_attend(q, k, v, mask, scaling, softcap)[0].transpose(0, 1))
    return torch.cat(out)


# the cuts are host integers: compiling them would recompile for every batch
_sdpa: Backend = cast(Any, torch.compiler.disable)(_sdpa_per_segment)


def choose_backend(query: Tensor, softcap: float | None) -> Backend:
    """The attention for these tensors: SDPA per segment, on any device and in any dtype."""
    return _sdpa


def _check_arguments(
    module: nn.Module, attention_mask: Tensor | None, others: dict[str, Any]
) -> None:
    who = f"{type(module).__name__} of layer {getattr(module, 'layer_idx', '?')}"
    if attention_mask is not None:
        raise ModelError(
            f"need attention without a mask (segments say who sees whom), got a mask of shape"
            f" {tuple(attention_mask.shape)} from {who}"
        )
    if others.pop("is_causal", None) is False or getattr(module, "is_causal", True) is False:
        raise ModelError(f"need causal attention, got is_causal=False from {who}")
    unknown = [
        name
        for name, value in others.items()
        if name not in _WITHOUT_EFFECT and value is not None and value is not False
    ]
    if unknown:
        raise ModelError(
            f"need attention whose every argument is understood (scaling, sliding_window,"
            f" softcap), got {', '.join(sorted(unknown))} from {who}"
        )


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
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if len(segments.k_index) != len(k):  # equal: no prompt is shared, keys are in place
        k = gather_rows(k.contiguous(), segments.k_index)
        v = gather_rows(v.contiguous(), segments.k_index)
    backend = choose_backend(q, softcap)
    out = backend(q, k, v, segments, scaling=scaling, window=sliding_window, softcap=softcap)
    return out[None], None


# no mask function beside it: for such a name transformers makes no mask at all, where a registered
# one costs a device sync per forward (it looks for packed sequences in position_ids)
AttentionInterface.register(NAME, attention)
