"""Packed attention against a dense mask written out from the definition."""

import pytest
import torch
from torch import nn

from fastpref.data.packing import pack
from fastpref.models.attention import ModelError, attention


def dense(q, k, v, segments, scaling, window, softcap):
    """(H, T, D) fp64, query by query: its keys are its own sequence up to itself."""
    k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
    out = torch.zeros(*q.shape[:2], v.shape[-1], dtype=q.dtype)
    for q0, q1, k0, k1 in segments.bounds:
        for i in range(q0, q1):
            keys = segments.k_index[k0 : k1 - (q1 - 1 - i)]
            keys = keys if window is None else keys[-window:]
            scores = torch.einsum("hd,hkd->hk", q[:, i], k[:, keys]) * scaling
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            out[:, i] = torch.einsum("hk,hkd->hd", scores.softmax(-1), v[:, keys])
    return out


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 1, 4, 5000])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_equals_the_definition(groups, key_heads, window, softcap):
    segments = pack(groups(1, 2, 4, 3)).segments
    T, gen = int(segments.cu_q[-1]), torch.Generator().manual_seed(0)
    shapes = [(4, T, 8), (key_heads, T, 8), (key_heads, T, 8)]
    ours = [torch.randn(s, generator=gen, dtype=torch.float64, requires_grad=True) for s in shapes]
    want = [x.detach().clone().requires_grad_() for x in ours]
    got, _ = attention(
        nn.Module(),
        *(x[None] for x in ours),
        None,
        scaling=0.3,
        sliding_window=window,
        softcap=softcap,
        segments=segments,
    )
    truth = dense(*want, segments, 0.3, window, softcap)
    torch.testing.assert_close(got[0].transpose(0, 1), truth)
    grad = torch.randn(truth.shape, generator=gen, dtype=torch.float64)
    truth.backward(grad)
    got[0].transpose(0, 1).backward(grad)
    for a, b in zip(ours, want, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_default_scale_is_that_of_the_head_size(groups):
    segments = pack(groups(2, 3)).segments
    T = int(segments.cu_q[-1])
    q, k, v = torch.randn(3, 2, T, 8, dtype=torch.float64)
    for cap in (None, 2.0):
        got, _ = attention(
            nn.Module(), q[None], k[None], v[None], None, softcap=cap, segments=segments
        )
        want = dense(q, k, v, segments, 8**-0.5, None, cap)
        torch.testing.assert_close(got[0].transpose(0, 1), want)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"s_aux": torch.ones(2)}, "got s_aux from Module of layer 5"),
        ({"head_mask": torch.ones(2), "position_bias": 1.0}, "got head_mask, position_bias from"),
        ({"is_causal": False}, "causal attention, got is_causal=False"),
        ({"attention_mask": torch.ones(1, 1, 3, 3)}, r"mask of shape \(1, 1, 3, 3\)"),
        ({"segments": None}, r"LogpModel.*plain\(\)"),
        ({"query": torch.ones(2, 2, 3, 4)}, "one packed row of tokens, got a batch of 2"),
    ],
)
def test_refuses_what_it_does_not_understand(groups, arguments, message):
    module = nn.Module()
    module.layer_idx = 5
    T = int((segments := pack(groups(1)).segments).cu_q[-1])
    x = torch.ones(1, 2, T, 4)
    known = {"query": x, "key": x, "value": x, "attention_mask": None, "segments": segments}
    harmless = {"position_ids": torch.ones(T), "use_cache": False, "output_attentions": False}
    attention(module, **known, **harmless, dropout=0.5, is_causal=None, sinks=None)
    with pytest.raises(ModelError, match=message):
        attention(module, **(known | arguments))
