"""Where sequences lie among tokens, the rows of (B, T) or packed, and how they are summed."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

SUMS = 16  # that a program of the token kernels writes; the last is a maximum


# layout
def segments(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """(T,) int64 index of the segment that holds each token; B past the last."""
    token = torch.arange(num_tokens, device=cu_seqlens.device)
    return torch.bucketize(token, cu_seqlens.long(), right=True) - 1


def check_cu_seqlens(cu_seqlens: Tensor, num_tokens: int, *, name: str = "cu_seqlens") -> None:
    if cu_seqlens.ndim != 1 or not len(cu_seqlens):
        raise ValueError(f"need {name} (B+1,), got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"need int32 or int64 {name}, got {cu_seqlens.dtype}")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        ends = cu_seqlens.tolist()
        if ends != sorted(ends) or ends[0] != 0 or ends[-1] != num_tokens:
            raise ValueError(f"need {name} rising from 0 to {num_tokens}, got {ends}")


def sequence_of(tokens: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(T,) int64 number of the sequence of each token, those of (B, T) one row after the other."""
    if cu_seqlens is not None:
        return segments(cu_seqlens, len(tokens))
    row = torch.arange(len(tokens), device=tokens.device)
    return row[:, None].expand_as(tokens).flatten()


def num_sequences(tokens: Tensor, cu_seqlens: Tensor | None) -> int:
    return tokens.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1


def padded(cu_seqlens: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """(B, longest) places of each sequence's tokens among T, and which there are; one sync."""
    lengths = cu_seqlens.diff()
    step = torch.arange(int(lengths.max()) if len(lengths) else 0, device=cu_seqlens.device)
    there = step < lengths[:, None]
    return (cu_seqlens[:-1, None] + step).clamp(max=max(num_tokens - 1, 0)).long(), there


def check_tokens(
    tokens: Mapping[str, Tensor | None],
    sequences: Mapping[str, Tensor | None],
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    needed: int = 1,
) -> torch.dtype:
    """The dtype to compute in, of floating-point tensors a token or a sequence each.

    ValueError, TypeError: they do not fit each other, the mask or cu_seqlens, or one of the first
    ``needed`` of the tokens is lacking.
    """
    where = {"mask": mask, "cu_seqlens": cu_seqlens}
    every = {**tokens, **sequences, **where}
    named = {name: x for i, (name, x) in enumerate(every.items()) if i < needed or x is not None}
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"need a tensor for {name}, got {type(x).__name__}")
    first, like = next(iter(named.items()))
    if like.ndim != (2 if cu_seqlens is None else 1):
        got = f"{tuple(like.shape)} {'without' if cu_seqlens is None else 'with'} them"
        raise ValueError(f"need {first} (B, T), or (T,) with cu_seqlens, got {got}")
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, len(like))
    B = num_sequences(like, cu_seqlens)
    for name, x in named.items():
        if (name in tokens or name == "mask") and x.shape != like.shape:
            raise ValueError(f"need {name} like {first}, {tuple(like.shape)}, got {tuple(x.shape)}")
        if name in sequences and x.shape != (B,):
            raise ValueError(f"need {name} (B,) = ({B},), got {tuple(x.shape)}")
        if name not in where and not x.is_floating_point():
            raise TypeError(f"need floating-point {name}, got {x.dtype}")
        if x.device != like.device:
            raise ValueError(f"need {name} on {like.device}, got {x.device}")
    check_mask(mask)
    dtypes = {x.dtype for name, x in named.items() if name not in where}
    return torch.float64 if torch.float64 in dtypes else torch.float32


def check_mask(mask: Tensor | None) -> None:
    """TypeError, or ValueError (on the CPU only, where it costs no sync): no flags."""
    if mask is None or mask.dtype == torch.bool:
        return
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"need a bool or integer mask, got {mask.dtype}")
    if mask.device.type == "cpu" and not torch.compiler.is_compiling() and mask.numel():
        low, high = (int(x) for x in mask.aminmax())
        if low < 0 or high > 1:
            raise ValueError(f"need a mask of 0 and 1, got {low} to {high}")


def check_number(**options: float) -> None:
    """ValueError, TypeError: none that is finite and not negative."""
    for name, value in options.items():
        if isinstance(value, Tensor):
            raise TypeError(f"need a number for {name}, got a tensor")
        if not 0 <= value < math.inf:
            raise ValueError(f"need {name} >= 0 and finite, got {value}")


def check_constants(**constants: Tensor | None) -> None:
    for name, x in constants.items():
        if x is not None and x.requires_grad:
            raise ValueError(f"need {name} without gradient ({name}.detach()), got one with")


def as_flags(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.bool().contiguous()


def dense(cu_seqlens: Tensor | None) -> Tensor | None:
    return None if cu_seqlens is None else cu_seqlens.contiguous()


def constants(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    """As the kernels read them, without gradients."""
    return [None if x is None else x.detach().to(dtype).contiguous() for x in tensors]


# aggregation
class Aggregation(NamedTuple):
    """How losses of tokens become a sum and what it is divided by."""

    mean: bool = False
    """Whether a sequence's sum is divided by the number of its tokens that count."""
    per: str = "tokens"
    """What is counted: tokens that count, sequences that have one, or all sequences."""
    length: float = 1
    """What the sum is divided by."""

    @property
    def by_sequence(self) -> bool:
        return self.mean or self.per == "sequences"


AGGREGATIONS = {
    "token-mean": Aggregation(),
    "seq-mean-token-sum": Aggregation(per="sequences"),
    "seq-mean-token-mean": Aggregation(mean=True, per="sequences"),
    "seq-mean-token-sum-norm": Aggregation(per="all"),
}


def aggregation(mode: str, max_length: float | None, tokens: Tensor) -> Aggregation:
    """The aggregation of verl's name; ``max_length`` is what the last one divides by beside B."""
    if mode not in AGGREGATIONS:
        raise ValueError(f"need loss_agg_mode in {', '.join(AGGREGATIONS)}; got {mode!r}")
    norm = mode == "seq-mean-token-sum-norm"
    if max_length is not None and not (norm and 0 < max_length < float("inf")):
        need = "positive" if norm else "None but for seq-mean-token-sum-norm"
        raise ValueError(f"need max_length {need}, got {max_length} with {mode}")
    if not norm:
        return AGGREGATIONS[mode]
    if max_length is None and tokens.ndim == 1:
        raise ValueError("need max_length for seq-mean-token-sum-norm of packed tokens, got None")
    length = tokens.shape[1] if max_length is None else max_length
    return AGGREGATIONS[mode]._replace(length=max(length, 1))


def check_reduction(reduction: str) -> None:
    if reduction not in ("sum", "mean"):
        raise ValueError(f"need reduction sum or mean, got {reduction!r}")


def reduced(
    loss: Tensor, sums: Mapping[str, Tensor], how: Aggregation, B: int, reduction: str
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(loss, count, metrics): sums, or divided by what they are sums over."""
    loss = loss / how.length if how.per == "all" else loss
    # of its own: who reduces it over ranks must not change a metric
    count = loss.new_full((), B) if how.per == "all" else sums[how.per].to(loss.dtype, copy=True)
    metrics = {name: x for name, x in sums.items() if name != "sequences"}
    if reduction == "mean":
        loss = loss / count.clamp(min=1)
        each = sums["tokens"].clamp(min=1)
        of_tokens = metrics.keys() - {"tokens", "ratio_max"}
        metrics |= {name: metrics[name] / each for name in metrics if name in of_tokens}
    return loss, count, metrics


# what Triton kernels of tokens share
WORD = tl.constexpr(4)  # tokens of 16 bytes, which a thread reads at once
BLOCK = 1024  # tokens that a program reads at once
_MAX_PROGRAMS = 1024  # each of which then takes several blocks


def programs_for(tokens: Tensor, cu_seqlens: Tensor | None, spans: bool) -> int:
    if spans:
        return num_sequences(tokens, cu_seqlens)
    return min(triton.cdiv(tokens.numel(), BLOCK), _MAX_PROGRAMS)


def aligned(x: Tensor | None) -> Tensor | None:
    """For reads of whole words of 16 bytes, which else could pass the end of a view's memory."""
    return x if x is None or x.data_ptr() % 16 == 0 else x.clone()


def whole_words(tokens: Tensor, cu_seqlens: Tensor | None, spans: bool) -> bool:
    """Whether no word is shared between programs."""
    length = tokens.shape[-1] if spans else tokens.numel()
    return length % WORD.value == 0 and not (spans and cu_seqlens is not None)


@triton.jit
def span(program, cu_ptr, width):
    """Where a program's sequence starts and ends."""
    if cu_ptr is None:
        start = program.to(tl.int64) * width
        return start, start + width
    else:
        return tl.load(cu_ptr + program).to(tl.int64), tl.load(cu_ptr + program + 1).to(tl.int64)


@triton.jit
def reach(cu_ptr, width, N, SPANS: tl.constexpr, BLOCK_T: tl.constexpr):
    """Start and end of what a program works in, its first block, and the step to its next.

    A sequence (SPANS), from the word that holds its first token on, or some blocks of all tokens.
    """
    p = tl.program_id(0)
    if SPANS:
        start, end = span(p, cu_ptr, width)
        return start, end, start // WORD * WORD, BLOCK_T
    else:
        start = tl.full((), 0, tl.int64)
        return start, start + N, start + p * BLOCK_T, tl.num_programs(0) * BLOCK_T


@triton.jit
def words(t, start, end):
    """Whether a token's word of 16 bytes holds one from start to end."""
    word = t // WORD * WORD
    return (word + WORD > start) & (word < end)


@triton.jit
def kept(mask_ptr, t, start, end, there):
    """Which tokens count; ``there`` is what may be read beside them."""
    here = (t >= start) & (t < end)
    if mask_ptr is not None:
        here = here & (tl.load(mask_ptr + t, mask=there, other=0) != 0)
    return here


@triton.jit
def read(ptr, t, there, keep):
    # padding may hold NaN
    return tl.where(keep, tl.load(ptr + t, mask=there, other=0.0), 0.0)


@triton.jit
def write(ptr, t, x, start, end, WHOLE: tl.constexpr):
    """WHOLE: every span starts and ends with a word; else those at its ends are written apart."""
    if WHOLE:
        tl.store(ptr + t, x, mask=words(t, start, end))
    else:
        word = t // WORD * WORD
        inside = (word >= start) & (word + WORD <= end)
        tl.store(ptr + t, x, mask=inside)
        tl.store(ptr + t, x, mask=(t >= start) & (t < end) & (inside == 0))


@triton.jit
def maximum(a, b):
    # a NaN stays one, so that the loss shows it
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def clamp(x, low, high):
    return tl.minimum(maximum(x, low), high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def kl_of(d, KL: tl.constexpr):
    """The estimate of a log-ratio d, and its slope; see gae.kl_estimate."""
    if KL == "k1":
        return d, tl.full(d.shape, 1.0, tl.float32)
    elif KL == "k2":
        return d * d * 0.5, d
    else:
        x = clamp(d, -20.0, 20.0)
        # Taylor's series where 1 would swallow x
        tail = 1 - x * (1 / 6) * (1 - x * (1 / 7) * (1 - x * (1 / 8) * (1 - x * (1 / 9))))
        tail = 1 - x * (1 / 3) * (1 - x * (1 / 4) * (1 - x * (1 / 5) * tail))
        k = tl.where(tl.abs(x) < 0.5, x * x * (1 / 2) * tail, tl.exp(-x) - 1 + x)
        if KL == "k3+":
            slope = d
        else:
            slope = tl.where(tl.abs(d) > 20.0, 0.0, x - k)
        return k, slope


@triton.jit
def moments(count, anchor, away, squares):
    """Sum and sum of squares of what lanes saw, from the same of its distances to their anchor.

    In fp64: of numbers far from 0 little would be left of the variance.
    """
    n, k, far = count.to(tl.float64), anchor.to(tl.float64), away.to(tl.float64)
    total = tl.sum(far + n * k, 0)
    return total, tl.sum(squares.to(tl.float64) + 2 * k * far + n * k * k, 0)


@triton.jit(do_not_specialize=["P"])
def _fold(partial_ptr, out_ptr, first_ptr, P, SUMS: tl.constexpr, BLOCK_P: tl.constexpr):
    lane, column = tl.arange(0, BLOCK_P)[:, None], tl.arange(0, SUMS)[None, :]
    total = tl.zeros((BLOCK_P, SUMS), tl.float64)
    for p in range(0, P, BLOCK_P):
        here = p + lane < P
        x = tl.load(partial_ptr + (p + lane).to(tl.int64) * SUMS + column, mask=here, other=0.0)
        total = tl.where(column == SUMS - 1, maximum(total, x), total + x)
    largest, sums = tl.max(total, 0), tl.sum(total, 0)
    name = tl.arange(0, SUMS)
    out = tl.where((name == SUMS - 1) & (sums == sums), largest, sums)  # a NaN stays one
    tl.store(out_ptr + name, out)
    tl.store(first_ptr + name, out, mask=name == 0)


def new_partials(like: Tensor, programs: int) -> Tensor:
    return like.new_empty((programs, SUMS), dtype=torch.float64)


def fold(partials: Tensor) -> tuple[Tensor, Tensor]:
    """Column sums in one order, of the last column (numbers >= 0) the maximum: () fp32 of the
    first, and (SUMS,) fp64."""
    first, out = partials.new_empty((), dtype=torch.float32), partials.new_empty(SUMS)
    _fold[(1,)](partials, out, first, len(partials), SUMS=SUMS, BLOCK_P=64, num_warps=4)
    return first, out
