"""Token statistics from logits: logp[n] = z[n, y[n]] - logsumexp(z[n, :]).

z = logits / temperature; N rows, V vocabulary. The row functions of logp_rows on the logits in
place, in plain torch on copies of slabs.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.kernels.backend import choose
from fastpref.kernels.logits import IGNORE_INDEX, Transform, check_target, tiles
from fastpref.kernels.logp_rows import RowGrads, Rows, gradient_rows

STATS = ("entropy", "is_top1", "mean_logit", "log_sum_sq_probs")
_LOGIT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_TILE = 1 << 19  # elements of a slab: fp32 slabs of 2 MiB stay in a CPU's cache


class TokenStats(NamedTuple):
    """Statistics of each target's distribution, in fp32 (fp64 for fp64 inputs); 0 where ignored.

    ``logp`` and ``entropy`` are in nats and differentiable; ``is_top1`` (bool): no logit is larger
    than the target's; ``mean_logit``: mean of z over V; ``log_sum_sq_probs``: log of the sum of
    p**2. A statistic that was not asked for is None.
    """

    logp: Tensor
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    mean_logit: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None


# 1. reference
def stats_from_logits_ref(
    logits: Tensor, target: Tensor, *, temperature: float = 1.0
) -> TokenStats:
    keep = target != IGNORE_INDEX
    z = logits / temperature
    logps = z.log_softmax(-1)
    y = target.clamp(min=0)[..., None]
    probs = logps.exp()
    entropy = -torch.where(probs > 0, probs * logps, 0.0).sum(-1)
    return TokenStats(
        logp=logps.gather(-1, y)[..., 0].where(keep, 0.0),
        entropy=entropy.where(keep, 0.0),
        is_top1=(z.gather(-1, y)[..., 0] == z.amax(-1)) & keep,
        mean_logit=z.mean(-1).where(keep, 0.0),
        log_sum_sq_probs=(2 * logps).logsumexp(-1).where(keep, 0.0),
    )


# 2. ops
def _parts(backend: str, *xs: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """(..., V) tensors as views of their rows in order: (N, V), for Triton also (B, T, V)."""
    x = xs[0]
    if x.ndim == 1:
        yield tuple(x[None] for x in xs)
    elif x.ndim == 2 or (x.ndim == 3 and backend == "triton"):
        yield xs
    elif all(x.stride(0) == x.shape[1] * x.stride(1) for x in xs):
        yield from _parts(backend, *(x.flatten(0, 1) for x in xs))
    else:
        for parts in zip(*(x.unbind(0) for x in xs), strict=True):
            yield from _parts(backend, *parts)


def _blocks(backend: str, *xs: Tensor) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """Flat rows, and views of them: all that strides allow, for torch what its slab holds."""
    done = 0
    for parts in _parts(backend, *xs):
        N, V = parts[0].shape[:-1].numel(), parts[0].shape[-1]
        if backend != "torch":
            yield slice(done, done + N), parts
        else:
            for r0, r1 in tiles(N, max(1, _TILE // V)):
                yield slice(done + r0, done + r1), tuple(x[r0:r1] for x in parts)
        done += N


class _Scratch:
    """Torch's slabs."""

    def __init__(self, logits: Tensor, count: int) -> None:
        wide = torch.promote_types(logits.dtype, torch.float32)
        self.slabs = logits.new_empty((count, min(_TILE, logits.numel())), dtype=wide)

    def of(self, part: Tensor) -> tuple[Tensor, Tensor | None]:
        """A copy of ``part``, and a second slab of its shape where there is one."""
        first, *others = (slab[: part.numel()].view(part.shape) for slab in self.slabs)
        return first.copy_(part), others[0] if others else None


ROW_OUTPUTS = ("logp", "max", "log_total", *STATS)


def empty_stats(like: Tensor, dtype: torch.dtype, outputs: list[str]) -> tuple[Tensor, ...]:
    """ROW_OUTPUTS, each of ``like``'s shape; statistics that are not asked for are empty."""
    out = [torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)]
    out += [torch.empty_like(out[0]) for _ in range(2)]
    for name in STATS:
        kind = torch.bool if name == "is_top1" else dtype
        empty = out[0].new_empty(0, dtype=kind)
        out.append(torch.empty_like(out[0], dtype=kind) if name in outputs else empty)
    return tuple(out)


def named_stats(stats: tuple[Tensor, ...], outputs: list[str]) -> dict[str, Tensor]:
    """ROW_OUTPUTS by name, flat, without what was not asked for."""
    named = zip(ROW_OUTPUTS, stats, strict=False)
    return {k: s.view(-1) for k, s in named if k not in STATS or k in outputs}


_Stats = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("fastpref::logp_from_logits", mutates_args=())
def _op(logits: Tensor, target: Tensor, temperature: float, outputs: str, inplace: bool) -> _Stats:
    names = outputs.split()
    V = logits.shape[-1]
    check_target(target, V)
    wide = torch.promote_types(logits.dtype, torch.float32)
    stats = empty_stats(target, wide, names)
    flat = named_stats(stats, names)
    y, backend = target.reshape(-1), choose(logits.device.type, logits.dtype)
    transform = Transform(1 / temperature)
    scratch = _Scratch(logits, 1 + ("entropy" in names)) if backend == "torch" else None
    for part, (block,) in _blocks(backend, logits):
        rows = Rows(y[part], wide, tuple(names), backend)
        if scratch is not None:
            for c0, c1 in tiles(V, _TILE):
                slab, spare = scratch.of(block[:, c0:c1])
                rows.add(slab, c0, transform, exps=spare)
        else:
            rows.read(block, transform.scale)
        rows.finish(V, {name: value[part] for name, value in flat.items()})
    return stats


@_op.register_fake
def _(logits: Tensor, target: Tensor, temperature: float, outputs: str, inplace: bool) -> _Stats:
    wide = torch.promote_types(logits.dtype, torch.float32)
    return empty_stats(target, wide, outputs.split())


def _write_gradient(
    out: Tensor,
    logits: Tensor,
    target: Tensor,
    logp: Tensor,
    max: Tensor,
    log_total: Tensor,
    entropy: Tensor,
    dlogp: Tensor | None,
    dentropy: Tensor | None,
    temperature: float,
) -> None:
    flat = (None if x is None else x.reshape(-1) for x in (logp, max, log_total, entropy, dlogp))
    y, h = target.reshape(-1), None if dentropy is None else dentropy.reshape(-1)
    transform = Transform(1 / temperature)
    grads = RowGrads.of(y, *flat, h, transform.slope)
    backend = choose(logits.device.type, logits.dtype)
    scratch = _Scratch(logits, 1 + grads.with_entropy) if backend == "torch" else None
    keep = (y != IGNORE_INDEX)[:, None]
    for part, (block, dest) in _blocks(backend, logits, out):
        rows = grads.rows(part)
        if scratch is None:
            gradient_rows(block, 0, rows, dest, transform, backend, slab=False)
            continue
        for c0, c1 in tiles(logits.shape[-1], _TILE):
            slab, spare = scratch.of(block[:, c0:c1])
            gradient_rows(slab, c0, rows, slab, transform, backend, spare=spare)
            slab.masked_fill_(~keep[part], 0.0)  # padding may hold NaN, and 0 * NaN is NaN
            dest[:, c0:c1].copy_(slab)


@torch.library.custom_op("fastpref::logp_from_logits_bwd", mutates_args=())
def _op_bwd(
    logits: Tensor,
    target: Tensor,
    logp: Tensor,
    max: Tensor,
    log_total: Tensor,
    entropy: Tensor,
    dlogp: Tensor | None,
    dentropy: Tensor | None,
    temperature: float,
) -> Tensor:
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    row_values = (logp, max, log_total, entropy, dlogp, dentropy)
    _write_gradient(out, logits, target, *row_values, temperature)
    return out


@_op_bwd.register_fake
def _(logits: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.custom_op("fastpref::logp_from_logits_bwd_", mutates_args=("logits",))
def _op_bwd_(
    logits: Tensor,
    target: Tensor,
    logp: Tensor,
    max: Tensor,
    log_total: Tensor,
    entropy: Tensor,
    dlogp: Tensor | None,
    dentropy: Tensor | None,
    temperature: float,
) -> None:
    row_values = (logp, max, log_total, entropy, dlogp, dentropy)
    _write_gradient(logits, logits, target, *row_values, temperature)


# 3. autograd
def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    logits, target, ctx.temperature, outputs, ctx.inplace = inputs
    logp, top, log_total, entropy, *rest = output
    ctx.save_for_backward(logits, target, logp, top, log_total, entropy)
    unasked = [] if "entropy" in outputs.split() else [entropy]
    ctx.mark_non_differentiable(top, log_total, *rest, *unasked)
    ctx.set_materialize_grads(False)  # an unused output must not cost a dense zero gradient


def _backward(
    ctx: Any,
    dlogp: Tensor | None,
    _dmax: None,
    _dlog_total: None,
    dentropy: Tensor | None,
    *_: None,
) -> tuple[Tensor | None, ...]:
    args = (*ctx.saved_tensors, dlogp, dentropy, ctx.temperature)
    if ctx.inplace:
        _op_bwd_(*args)
        return args[0].detach(), None, None, None, None
    return _op_bwd(*args), None, None, None, None


_op.register_autograd(_backward, setup_context=_setup)


# 4. public
def _overlaps(x: Tensor) -> bool:
    """Whether two elements may share memory, judged by strides alone."""
    span = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride < span:
            return True
        span += stride * (size - 1)
    return False


def check_outputs(outputs: tuple[str, ...]) -> None:
    unknown = [name for name in outputs if name not in STATS]
    if unknown or isinstance(outputs, str):
        raise ValueError(f"need outputs from {STATS}, got {outputs!r}")


def check_positive(**options: float | None) -> None:
    for name, value in options.items():
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"need {name} positive and finite, got {value}")


def logp_stats_from_logits(
    logits: Tensor,
    target: Tensor,
    *,
    outputs: tuple[str, ...] = STATS,
    temperature: float = 1.0,
    inplace_backward: bool = False,
) -> TokenStats:
    """Log-probability of each target token and statistics of its distribution, in one read.

    Args:
        logits: (..., V) bf16, fp16, fp32 or fp64; contiguous in V, any leading strides (so
            ``logits[:, :-1]`` is read in place); differentiable.
        target: (...) int64 in [0, V), or -100. The range is checked on the CPU only.
        outputs: which of "entropy", "is_top1", "mean_logit" and "log_sum_sq_probs" to return.
        temperature: positive; logits are divided by it.
        inplace_backward: write the gradient over the logits, which nothing may read afterwards and
            whose rows may not share memory; a second backward through them raises.

    Returns:
        TokenStats of (...) tensors, fp32 (fp64 for fp64 logits); exactly 0 (False), with zero
        gradient, where the target is -100. Gradients flow through logp and entropy.

    Raises:
        ValueError: a shape, stride or option differs from the above, or a label is out of range.
        TypeError: a dtype differs from the above.

    Source: online softmax, Milakov & Gimelshein 2018, arXiv:1805.02867, alg. 3.
    """
    if logits.ndim < 1 or target.shape != logits.shape[:-1] or logits.shape[-1] < 1:
        got = f"{tuple(logits.shape)} and {tuple(target.shape)}"
        raise ValueError(f"need logits (..., V) and target (...), got {got}")
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        raise ValueError(f"need logits contiguous in V, got strides {logits.stride()}")
    if logits.dtype not in _LOGIT_DTYPES or target.dtype != torch.int64:
        got = f"{logits.dtype} and {target.dtype}"
        raise TypeError(f"need bf16, fp16, fp32 or fp64 logits and int64 target, got {got}")
    if target.device != logits.device:
        raise ValueError(f"need target on {logits.device}, got {target.device}")
    if inplace_backward and _overlaps(logits):
        got = f"{tuple(logits.shape)} with strides {logits.stride()}"
        raise ValueError(f"need logits whose rows share no memory for inplace_backward, got {got}")
    check_outputs(outputs)
    check_positive(temperature=temperature)
    logp, _, _, *stats = _op(logits, target, temperature, " ".join(outputs), inplace_backward)
    named = zip(STATS, stats, strict=True)
    return TokenStats(logp, **{name: value for name, value in named if name in outputs})


def logp_from_logits(
    logits: Tensor, target: Tensor, *, temperature: float = 1.0, inplace_backward: bool = False
) -> Tensor:
    """Log-probability of each target token, in nats; no more than a tile in fp32 at a time.

    Args:
        logits: (..., V) bf16, fp16, fp32 or fp64; contiguous in V, any leading strides (so
            ``logits[:, :-1]`` is read in place); differentiable.
        target: (...) int64 in [0, V), or -100. The range is checked on the CPU only.
        temperature: positive; logits are divided by it.
        inplace_backward: write the gradient over the logits, which nothing may read afterwards and
            whose rows may not share memory; a second backward through them raises.

    Returns:
        (...) fp32 (fp64 for fp64 logits), each <= 0; exactly 0, with zero gradient, where the
        target is -100.

    Raises:
        ValueError: a shape, stride or option differs from the above, or a label is out of range.
        TypeError: a dtype differs from the above.

    Source: online softmax, Milakov & Gimelshein 2018, arXiv:1805.02867, alg. 3.
    """
    return logp_stats_from_logits(
        logits,
        target,
        outputs=(),
        temperature=temperature,
        inplace_backward=inplace_backward,
    ).logp
