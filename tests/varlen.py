"""Stand-ins for packages of attention kernels: their signatures, computed from the definition."""

import torch


def attend(q, k, v, cu_q, cu_k, scale, left, cap):
    """(T, Hq, Dv): every query by itself; ``left`` keys before its own are seen, -1 for all."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = []
    for (q0, q1), (k0, k1) in zip(*(cu.unfold(0, 2, 1).tolist() for cu in (cu_q, cu_k)), strict=1):
        for i in range(q1 - q0):
            last = k1 - (q1 - q0 - 1 - i)
            first = k0 if left < 0 else max(k0, last - 1 - left)
            scores = torch.einsum("hd,khd->hk", q[q0 + i], k[first:last]) * scale
            scores = scores if not cap else cap * torch.tanh(scores / cap)
            out.append(torch.einsum("hk,khd->hd", scores.softmax(-1), v[first:last]))
    return torch.stack(out)


def flash_2(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
):
    assert causal and dropout_p == 0.0 and alibi_slopes is None
    assert (max_seqlen_q, max_seqlen_k) == longest(cu_seqlens_q, cu_seqlens_k)
    return attend(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, window_size[0], softcap)


def flash_3(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    deterministic=False,
):
    return flash_2(
        *(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0),
        *(softmax_scale, causal, window_size, softcap),
    )


def flash_4(
    q,
    k,
    v,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    softcap=0.0,
):
    left = -1 if window_size[0] is None else window_size[0]
    out = flash_2(
        *(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0),
        *(softmax_scale, causal, (left, 0), softcap),
    )
    return out, None


def torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)
):
    assert query.shape[1] == key.shape[1] == value.shape[1]
    assert window_size[1] == 0 and (max_q, max_k) == longest(cu_seq_q, cu_seq_k)
    return attend(query, key, value, cu_seq_q, cu_seq_k, scale, window_size[0], None)


def torch_2_12(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
):
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert window_size[1] == 0 and (max_q, max_k) == longest(cu_seq_q, cu_seq_k)
    return attend(query, key, value, cu_seq_q, cu_seq_k, scale, window_size[0], None)


def longest(*offsets):
    return tuple(int(cu.diff().max()) for cu in offsets)
