"""The attention kernels behind fastpref's attention, and which of them a model gets.

Letters: T tokens, Tk gathered keys, Hq query heads, Hk key heads, D head size, Dv value size.
"""

import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpref.data.packing import Segments

HALF = (torch.bfloat16, torch.float16)
# queries of a segment that SDPA takes at once where it needs a mask: masks grow with tokens only
_MASKED = 1024


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


class Needs(NamedTuple):
    """What a model asks of its attention."""

    who: str
    device: torch.device
    dtype: torch.dtype
    """Of queries, keys and values."""
    head_size: int
    value_size: int
    window: int | None
    softcap: float | None


class Choice(NamedTuple):
    """The attention that a model runs with."""

    name: str
    backend: Backend
    why: str
    """What stood against those that are faster; empty where nothing did."""

    def __str__(self) -> str:
        return self.name + (f" ({self.why})" if self.why else "")


def _visible(
    queries: range, keys: range, offset: int, window: int | None, device: torch.device
) -> Tensor:
    """(queries, keys) bool: query i stands at key i + offset."""
    behind = (
        torch.arange(queries.start, queries.stop, device=device)[:, None]
        + offset
        - torch.arange(keys.start, keys.stop, device=device)
    )
    return behind >= 0 if window is None else (behind >= 0) & (behind < window)


def _pieces(n_q: int, n_k: int, window: int | None) -> Iterator[tuple[range, range]]:
    """Queries in runs of bounded length, each with the keys that it may see."""
    offset = n_k - n_q
    for start in range(0, n_q, _MASKED):
        stop = min(start + _MASKED, n_q)
        first = 0 if window is None else max(0, start + offset - window + 1)
        yield range(start, stop), range(first, stop + offset)


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
    masks: dict[tuple[range, range, int], Tensor] = {}
    out = []
    # split, not slices: its backward is one cat instead of a (T, H, D) of zeros per segment
    for q, k, v in zip(
        torch.split_with_sizes(query, q_lengths),
        torch.split_with_sizes(key, k_lengths),
        torch.split_with_sizes(value, k_lengths),
        strict=True,
    ):
        n_q, n_k = len(q), len(k)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        near = None if window is None or window >= n_k else window
        if near is None and softcap is None and n_q in (1, n_k):
            out.append(_attend(q, k, v, None, scaling, None)[0].transpose(0, 1))
            continue
        for queries, keys in _pieces(n_q, n_k, near):
            shape = queries, keys, n_k - n_q
            if shape not in masks:
                masks[shape] = _visible(queries, keys, n_k - n_q, near, query.device)
            some_q = q[:, :, queries.start : queries.stop]
            some_k, some_v = (x[:, :, keys.start : keys.stop] for x in (k, v))
            some = _attend(some_q, some_k, some_v, masks[shape], scaling, softcap)
            out.append(some[0].transpose(0, 1))
    return torch.cat(out)


# the cuts are host integers: compiling them would recompile for every batch
sdpa_per_segment: Backend = cast(Any, torch.compiler.disable)(_sdpa_per_segment)


def _window_sizes(window: int | None, segments: Segments) -> tuple[int, int]:
    # keys to the left of a query's own, and to the right; -1 for all, which kernels do faster
    return (-1 if window is None or window >= segments.max_k else window - 1, 0)


def _flash(varlen: Callable[..., Any]) -> Backend:
    """flash-attn's varlen function, whichever arguments this release of it has."""
    known = inspect.signature(varlen).parameters

    def flash(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        segments: Segments,
        *,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        options: dict[str, Any] = {}
        if window is not None and window < segments.max_k:
            options["window_size"] = _window_sizes(window, segments)
        if softcap is not None:
            options["softcap"] = softcap
        if "deterministic" in known:
            options["deterministic"] = torch.are_deterministic_algorithms_enabled()
        out = varlen(
            query,
            key,
            value,
            cu_seqlens_q=segments.cu_q,
            cu_seqlens_k=segments.cu_k,
            max_seqlen_q=segments.max_q,
            max_seqlen_k=segments.max_k,
            softmax_scale=scaling,
            causal=True,
            **options,
        )
        attended: Tensor = out[0] if isinstance(out, tuple) else out  # some return the lse too
        return attended

    return flash


def _torch_varlen(varlen: Callable[..., Any]) -> Backend:
    """torch's varlen_attn; torch 2.11 wants as many key heads as query heads."""
    grouped = "enable_gqa" in inspect.signature(varlen).parameters

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        segments: Segments,
        *,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        repeat = query.shape[1] // key.shape[1]
        options: dict[str, Any] = {}
        if repeat > 1 and grouped:
            options["enable_gqa"] = True
        elif repeat > 1:
            key, value = (x.repeat_interleave(repeat, 1) for x in (key, value))
        out: Tensor = varlen(
            query,
            key,
            value,
            segments.cu_q,
            segments.cu_k,
            segments.max_q,
            segments.max_k,
            scale=scaling,
            window_size=_window_sizes(window, segments),
            **options,
        )
        return out

    return attend


@dataclass(frozen=True)
class _Kernel:
    """A varlen function of some package: where it lies, and what it can do."""

    package: str
    function: str
    wrap: Callable[[Callable[..., Any]], Backend]
    capability: tuple[int, int] = (8, 0)
    """The least of the GPU."""
    newest: tuple[int, int] = (99, 0)
    """The last that it is built for."""
    other_value_size: bool = False
    """Whether values may be of another size than keys."""

    def find(self, needs: Needs) -> Backend | str:
        """The backend, or what stands against it."""
        if needs.device.type != "cuda":
            return f"needs CUDA, not {needs.device.type}"
        if needs.dtype not in HALF:
            return f"needs bfloat16 or float16, not {str(needs.dtype).removeprefix('torch.')}"
        have = torch.cuda.get_device_capability(needs.device)
        if not self.capability <= have <= self.newest:
            return f"is not for GPUs of compute capability {have[0]}.{have[1]}"
        if needs.head_size % 8 or needs.head_size > 256:
            return f"needs heads of a multiple of 8 up to 256, not of {needs.head_size}"
        if needs.head_size != needs.value_size and not self.other_value_size:
            sizes = f"{needs.head_size} and {needs.value_size}"
            return f"needs keys and values of one size, not of {sizes}"
        try:
            varlen = getattr(importlib.import_module(self.package), self.function)
        except (ImportError, AttributeError, OSError) as error:
            return f"cannot be imported: {error}"
        known = inspect.signature(varlen).parameters
        wanted = {"window_size": needs.window, "softcap": needs.softcap}
        lacking = [name for name, value in wanted.items() if value and name not in known]
        if lacking:
            return f"has no {' and no '.join(lacking)}"
        return self.wrap(varlen)


# the fastest first; names are transformers' where it has one
KERNELS = {
    "flash_attention_3": _Kernel(
        *("flash_attn_interface", "flash_attn_varlen_func", _flash, (9, 0), (9, 0)),
        other_value_size=True,
    ),
    "flash_attention_4": _Kernel(
        *("flash_attn.cute", "flash_attn_varlen_func", _flash, (9, 0)), other_value_size=True
    ),
    "flash_attention_2": _Kernel("flash_attn", "flash_attn_varlen_func", _flash),
    "varlen": _Kernel("torch.nn.attention.varlen", "varlen_attn", _torch_varlen),
}
NAMES = (*KERNELS, "sdpa")


def choose(needs: Needs, asked: str | None = None) -> Choice:
    """The fastest attention that does what a model needs, or the one that was asked for.

    Args:
        asked: one of NAMES; None for the fastest.

    Raises:
        ValueError: what was asked for is unknown, or cannot do what the model needs; names both.
    """
    if asked is not None and asked not in NAMES:
        raise ValueError(f"need attn_implementation of {', '.join(NAMES)}, got {asked!r}")
    if asked == "sdpa":
        return Choice("sdpa", sdpa_per_segment, "asked for")
    against: dict[str, list[str]] = {}
    for name in (asked,) if asked else KERNELS:
        found = KERNELS[name].find(needs)
        if not isinstance(found, str):
            return Choice(name, found, "asked for" if asked else _told(against))
        against.setdefault(found, []).append(name)
    if asked:
        raise ValueError(
            f"need an attn_implementation that can run {needs.who}, got {asked}, which"
            f" {next(iter(against))}; leave the key out for the fastest that can"
        )
    return Choice("sdpa", sdpa_per_segment, f"segment by segment; {_told(against)}")


def _told(against: dict[str, list[str]]) -> str:
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in against.items())
