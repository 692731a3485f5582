"""Variable-length attention for models that are given padded batches: a peer's best.

As transformers does it for FlashAttention: rows of tokens without the padding go in, zeros come
back where padding was. But the mask is read once a forward, not in every layer.
"""

import inspect
from dataclasses import dataclass

import torch
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "unpadded_varlen"


@dataclass(frozen=True)
class Unpadding:
    """What a 2-d mask says: places of the tokens (T,), their sequences' offsets (B+1,) int32."""

    places: torch.Tensor
    offsets: torch.Tensor
    longest: int


def torch_varlen(query, key, value, offsets, longest, scale):
    """torch's FlashAttention, causal: (T, Hq, D), (T, Hk, D), (T, Hk, D) -> (T, Hq, D)."""
    from torch.nn.attention.varlen import varlen_attn

    options = {"scale": scale, "window_size": (-1, 0)}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    else:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    return varlen_attn(query, key, value, offsets, offsets, longest, longest, **options)


def unpadding(batch_size, q_length, attention_mask=None, device=None, **_):
    """The mask that transformers hands to every layer: no (L, L) one is ever made."""
    if attention_mask is None:
        attention_mask = torch.ones(batch_size, q_length, dtype=torch.bool, device=device)
    lengths = attention_mask.sum(1)
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    return Unpadding(attention_mask.flatten().nonzero()[:, 0], offsets, int(lengths.max()))


def register(varlen=torch_varlen):
    """Let models have it by ``set_attn_implementation(NAME)``."""

    def attention(module, query, key, value, attention_mask, scaling=None, **_):
        batch, _, length, _ = query.shape
        rows = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        q, k, v = (x.index_select(0, attention_mask.places) for x in rows)
        out = varlen(q, k, v, attention_mask.offsets, attention_mask.longest, scaling)
        padded = out.new_zeros(batch * length, *out.shape[1:])
        padded = padded.index_copy(0, attention_mask.places, out)
        return padded.unflatten(0, (batch, length)), None

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, unpadding)
