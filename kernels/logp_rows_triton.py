"""The row functions of logp_rows in Triton: see there for the formulas and for what a row carries.

R rows of V columns; maths in fp32, u are raw products with their bias. Words of 16 bytes are read
whole: a row that starts inside one is read from the word's start, and elements e outside the row
are dropped, so that rows of an odd V are read as fast as others. Too many instructions would cost
more than the bytes: what only some blocks need stands in branches that whole blocks skip.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastpref.kernels.logits import IGNORE_INDEX, Transform

WORD = 16  # bytes that a thread reads at once
MAX_SLAB = 8192  # columns of a slab: a row of it waits in registers
_BLOCK_FORWARD = 4096  # columns of a longer row that are read at a time
_BLOCK_BACKWARD = 8192
_MIN = tl.constexpr(-3.4028234663852886e38)  # finite: -inf - -inf is NaN
_LOWEST = tl.constexpr(-1e30)  # of distances: finite, since 0 * -inf is NaN
_TINY = tl.constexpr(1.1754944e-38)  # the smallest normal number
_LOG_TINY = tl.constexpr(-87.33654)
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


# kernels
@triton.jit
def _exp2(x):
    if _INTERPRETED:
        return tl.exp2(x)
    else:  # three instructions less: results below the smallest normal number are 0
        asm: tl.constexpr = "ex2.approx.ftz.f32 $0, $1;"
        return tl.inline_asm_elementwise(asm, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _exp(x):
    return _exp2(x * _LOG2E)


@triton.jit
def _exp_exactly(x):
    # with the part of x * log2(e) that its rounding loses
    high = x * _LOG2E
    low = tl.fma(x, _LOG2E, -high) + x * 1.925963e-8
    return _exp2(high) * (1 + low * _LN2)


@triton.jit
def _expm1(x):
    # Taylor's series where 1 would swallow x
    y = 1 + x * (1 / 6) * (1 + x * (1 / 7) * (1 + x * (1 / 8) * (1 + x * (1 / 9))))
    y = 1 + x * (1 / 2) * (1 + x * (1 / 3) * (1 + x * (1 / 4) * (1 + x * (1 / 5) * y)))
    return tl.where(tl.abs(x) < 0.5, x * y, _exp(x) - 1)


@triton.jit
def _tanh(x):
    # at most: inf / inf is NaN; a NaN stays one
    y = _expm1(tl.minimum(2 * x, 60.0, propagate_nan=tl.PropagateNan.ALL))
    return y / (y + 2)


@triton.jit
def _finite(d):
    # a NaN stays one
    return tl.maximum(d, _LOWEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _row(r, T, stride_batch, stride_row):
    # divided in 32 bits: in 64 it is a call
    return (r // T).to(tl.int64) * stride_batch + (r % T).to(tl.int64) * stride_row


@triton.jit
def _logit(u, scale, cap, CAP: tl.constexpr):
    return cap * _tanh(scale * u) if CAP else scale * u


@triton.jit
def _label_logit(row_ptr, bias_ptr, v, here, scale, cap, BIAS: tl.constexpr, CAP: tl.constexpr):
    u = tl.load(row_ptr + v, mask=here, other=0.0).to(tl.float32)
    if BIAS:
        u += tl.load(bias_ptr + v, mask=here, other=0.0)
    return _logit(u, scale, cap, CAP)


@triton.jit
def _store_state(ptr, R, top, total, label, logits, entropy, squares, drop):
    tl.store(ptr, top)
    tl.store(ptr + R, total)
    tl.store(ptr + 2 * R, label)
    tl.store(ptr + 3 * R, logits)
    tl.store(ptr + 4 * R, entropy)
    tl.store(ptr + 5 * R, squares)
    tl.store(ptr + 6 * R, drop)
    tl.store(ptr + 7 * R, _exp(drop))


@triton.jit(
    do_not_specialize=["R", "T"], do_not_specialize_on_alignment=["target_ptr", "state_ptr"]
)
def _stream_rows(
    raw_ptr,
    target_ptr,
    state_ptr,
    R,
    V,
    T,
    offset,
    stride_batch,
    stride_row,
    scale,
    ENTROPY: tl.constexpr,
    MEAN: tl.constexpr,
    SQUARES: tl.constexpr,
    PER_WORD: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The state of R rows of any length, each word of which carries its own until the end."""
    r = tl.program_id(0)
    row = _row(r, T, stride_batch, stride_row) + offset
    lead = (row % PER_WORD).to(tl.int32)
    row_ptr = raw_ptr + row // PER_WORD * PER_WORD
    end = lead + V
    words_end = (end + PER_WORD - 1) // PER_WORD * PER_WORD
    WORDS: tl.constexpr = BLOCK_V // PER_WORD
    lanes = tl.arange(0, WORDS)[:, None] * PER_WORD + tl.arange(0, PER_WORD)[None, :]
    scale2 = scale * _LOG2E  # distances are logarithms to base 2
    top = tl.full((WORDS,), _MIN, tl.float32)
    total = tl.full((WORDS,), 0.0, tl.float32)
    entropy = total
    squares = total
    logits = total
    for e0 in range(0, end, BLOCK_V):
        e = e0 + lanes
        u = tl.load(row_ptr + e, mask=e < words_end, other=float("-inf")).to(tl.float32)
        if (e0 < lead) | (e0 + BLOCK_V > end):
            u = tl.where((e >= lead) & (e < end), u, float("-inf"))
        if MEAN:
            logits += tl.sum(tl.where((e >= lead) & (e < end), u, 0.0), 1)
        new_top = tl.maximum(top, tl.max(u, 1))
        drop = _finite((top - new_top) * scale2)
        shrink = _exp2(drop)
        top = new_top
        d = (u - top[:, None]) * scale2
        if ENTROPY:
            d = _finite(d)
        exps = _exp2(d)
        if ENTROPY:
            entropy = shrink * (entropy + drop * total) + tl.sum(d * exps, 1)
        if SQUARES:
            squares = shrink * shrink * squares + tl.sum(exps * exps, 1)
        total = shrink * total + tl.sum(exps, 1)
    row_top = tl.max(top, 0)
    drop = _finite((top - row_top) * scale2)
    shrink = _exp2(drop)
    entropy = tl.sum(shrink * (entropy + drop * total), 0) * _LN2
    squares = tl.sum(shrink * shrink * squares, 0)
    total = tl.sum(shrink * total, 0)
    label = tl.load(target_ptr + r)
    here = (label >= 0) & (label < V)
    label = _label_logit(row_ptr + lead, None, label, here, scale, 0.0, False, False)
    logits = scale * tl.sum(logits, 0)
    _store_state(state_ptr + r, R, scale * row_top, total, label, logits, entropy, squares, 0.0)


@triton.jit(
    do_not_specialize=["R", "start"],
    do_not_specialize_on_alignment=["target_ptr", "state_ptr", "shift_ptr"],
)
def _slab_rows(
    raw_ptr,
    bias_ptr,
    target_ptr,
    state_ptr,
    exps_ptr,
    weighted_ptr,
    shift_ptr,
    R,
    V,
    start,
    stride_raw,
    stride_exps,
    stride_weighted,
    scale,
    cap,
    FIRST: tl.constexpr,
    BIAS: tl.constexpr,
    CAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    MEAN: tl.constexpr,
    SQUARES: tl.constexpr,
    EXPS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SLOPES: tl.constexpr,
    SHIFT: tl.constexpr,
    PER_WORD: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Carry the state of R rows over a slab of V <= BLOCK_V columns, padded to whole words."""
    r = tl.program_id(0).to(tl.int64)
    row_ptr = raw_ptr + r * stride_raw
    state_ptr += r
    v = tl.arange(0, BLOCK_V)
    words = v < (V + PER_WORD - 1) // PER_WORD * PER_WORD
    column = (tl.load(target_ptr + r) - start).to(tl.int32)
    here = (column >= 0) & (column < V)
    label = _label_logit(row_ptr, bias_ptr, column, here, scale, cap, BIAS, CAP)
    if FIRST:
        before = tl.full((), _MIN, tl.float32)
    else:
        before = tl.load(state_ptr)
        label = tl.where(here, label, tl.load(state_ptr + 2 * R))

    u = tl.load(row_ptr + v, mask=words, other=float("-inf")).to(tl.float32)
    if BIAS:
        u += tl.load(bias_ptr + v, mask=v < V, other=0.0)
    if V % PER_WORD != 0:
        u = tl.where(v < V, u, float("-inf"))
    here_top = tl.maximum(tl.max(u, 0), _MIN)
    here_logit = _logit(here_top, scale, cap, CAP)
    top = tl.maximum(before, here_logit)
    drop = _finite(before - top)
    shrink = _exp(drop)
    if CAP:
        z = _logit(u, scale, cap, CAP)
        d = (z - top) * _LOG2E
    else:  # exactly 0 at the maximum
        d = tl.fma(u - here_top, scale * _LOG2E, (here_logit - top) * _LOG2E)
    if ENTROPY:
        d = _finite(d)
    exps = _exp2(d)
    if CAP:
        exps = tl.where(v < V, exps, 0.0)  # the cap has lifted what is outside from -inf
    total = tl.sum(exps, 0)
    entropy = tl.full((), 0.0, tl.float32)
    squares = entropy
    logits = entropy
    if ENTROPY:
        entropy = tl.sum(d * exps, 0) * _LN2
    if SQUARES:
        squares = tl.sum(exps * exps, 0)
    if MEAN:
        logits = tl.sum(tl.where(v < V, _logit(u, scale, cap, CAP), 0.0), 0)
    if not FIRST:
        old_total = tl.load(state_ptr + R)
        total += shrink * old_total
        if ENTROPY:
            entropy += shrink * (tl.load(state_ptr + 4 * R) + drop * old_total)
        if SQUARES:
            squares += shrink * shrink * tl.load(state_ptr + 5 * R)
        if MEAN:
            logits += tl.load(state_ptr + 3 * R)

    if SLOPES:  # of a frozen weight's products, which leave the label out
        if CAP:
            bent = z / cap
            exps *= 1 - bent * bent
        if here:
            exps = tl.where(v == column, 0.0, exps)
    if WEIGHTED:
        out = (d * _LN2 * exps).to(weighted_ptr.dtype.element_ty)
        tl.store(weighted_ptr + r * stride_weighted + v, out, mask=words)
    if EXPS:
        out = exps.to(exps_ptr.dtype.element_ty)
        tl.store(exps_ptr + r * stride_exps + v, out, mask=words)
    if SHIFT:
        tl.store(shift_ptr + r, top)
    _store_state(state_ptr, R, top, total, label, logits, entropy, squares, drop)


@triton.jit(do_not_specialize=["R", "V"])
def _finish_rows(
    state_ptr,
    target_ptr,
    logp_ptr,
    max_ptr,
    log_total_ptr,
    entropy_ptr,
    is_top1_ptr,
    mean_logit_ptr,
    log_sum_sq_ptr,
    R,
    V,
    IGNORE: tl.constexpr,
    ENTROPY: tl.constexpr,
    TOP1: tl.constexpr,
    MEAN: tl.constexpr,
    SQUARES: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    here = r < R
    keep = here & (tl.load(target_ptr + r, mask=here, other=IGNORE) != IGNORE)
    state_ptr += r
    top = tl.load(state_ptr, mask=here, other=0.0)
    total = tl.load(state_ptr + R, mask=here, other=1.0)
    at_label = tl.load(state_ptr + 2 * R, mask=here, other=0.0)
    log_total = tl.log(total)
    # (label - max) first: both are logits, their difference is exact where it matters
    tl.store(logp_ptr + r, tl.where(keep, (at_label - top) - log_total, 0.0), mask=here)
    tl.store(max_ptr + r, top, mask=here)
    tl.store(log_total_ptr + r, log_total, mask=here)
    if TOP1:
        tl.store(is_top1_ptr + r, (at_label == top) & keep, mask=here)
    if MEAN:
        mean = tl.load(state_ptr + 3 * R, mask=here, other=0.0) / V
        tl.store(mean_logit_ptr + r, tl.where(keep, mean, 0.0), mask=here)
    if ENTROPY:
        weighted = tl.load(state_ptr + 4 * R, mask=here, other=0.0)
        tl.store(entropy_ptr + r, tl.where(keep, log_total - weighted / total, 0.0), mask=here)
    if SQUARES:
        squares = tl.load(state_ptr + 5 * R, mask=here, other=1.0)
        log_sum_sq = tl.log(squares / (total * total))
        tl.store(log_sum_sq_ptr + r, tl.where(keep, log_sum_sq, 0.0), mask=here)


@triton.jit(
    do_not_specialize=["T", "start", "stride_values"],
    do_not_specialize_on_alignment=["target_ptr", "values_ptr", "shift_ptr"],
)
def _gradient_rows(
    source_ptr,
    bias_ptr,
    shift_ptr,
    target_ptr,
    values_ptr,
    out_ptr,
    V,
    T,
    start,
    offset,
    offset_out,
    stride_batch,
    stride_row,
    stride_batch_out,
    stride_row_out,
    stride_values,
    scale,
    cap,
    KEPT: tl.constexpr,
    BIAS: tl.constexpr,
    CAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    IGNORE: tl.constexpr,
    PER_WORD: tl.constexpr,
    PER_WORD_OUT: tl.constexpr,
    SLAB: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Gradient of R rows from raw products, or with KEPT from exponentials over exp(shift)."""
    r = tl.program_id(0)
    row = _row(r, T, stride_batch, stride_row) + offset
    lead = (row % PER_WORD).to(tl.int32)
    source_ptr += row // PER_WORD * PER_WORD
    # PER_WORD_OUT is PER_WORD where both leads are the same in every row, else 1
    row = _row(r, T, stride_batch_out, stride_row_out) + offset_out - lead
    out_ptr += row // PER_WORD_OUT * PER_WORD_OUT
    end = lead + V
    words_end = (end + PER_WORD - 1) // PER_WORD * PER_WORD
    e0 = tl.program_id(1) * BLOCK_V
    e = e0 + tl.arange(0, BLOCK_V)
    whole = (e0 >= lead) & (e0 + BLOCK_V <= end)

    target = tl.load(target_ptr + r)
    label = (target - start).to(tl.int32) + lead
    values_ptr += r
    logp = tl.load(values_ptr)
    top = tl.load(values_ptr + stride_values)
    log_total = tl.load(values_ptr + 2 * stride_values)
    g = tl.load(values_ptr + 3 * stride_values)
    slope = -g
    at_label = slope * _expm1(logp)  # not from the block: 1 - p is lost where p is near 1
    if ENTROPY:
        h = tl.load(values_ptr + 4 * stride_values)
        entropy = tl.load(values_ptr + 5 * stride_values)
        at_label -= h * _exp(logp) * (logp + entropy)
    if CAP:
        bent = ((logp + log_total) + top) / cap  # small ones first: near 1 it is squared
        at_label *= 1 - bent * bent

    u = tl.load(source_ptr + e, mask=e < words_end, other=0.0).to(tl.float32)
    if KEPT:
        shift = tl.load(shift_ptr + r)
        log_scale = (shift - top) - log_total
        exps = u
        if ENTROPY or CAP:
            log_exps = tl.log(tl.maximum(exps, _TINY))  # finite where p is 0
            z = log_exps + shift
    else:
        log_scale = -log_total
        if BIAS:
            u += tl.load(bias_ptr - lead + e, mask=(e >= lead) & (e < end), other=0.0)
        z = _logit(u, scale, cap, CAP)
        log_exps = z - top
        exps = _exp_exactly(tl.maximum(log_exps, -200.0))  # 0, and not -inf - -inf on the way
        log_exps = tl.maximum(log_exps, _LOG_TINY)  # finite where p is 0, and small times h
    if ENTROPY:
        slope = slope - h * ((log_exps + log_scale) + entropy)
    d = exps * (_exp_exactly(log_scale) * slope)
    if CAP:
        bent = z / cap
        d *= 1 - bent * bent
    if (label >= e0) & (label < e0 + BLOCK_V):
        d = tl.where(e == label, at_label, d)
    if target == IGNORE:
        d = tl.zeros_like(d)  # padding may hold NaN, and 0 * NaN is NaN
    d = d.to(out_ptr.dtype.element_ty)
    if SLAB:
        tl.store(out_ptr + e, d, mask=e < words_end)
    elif whole:
        tl.store(out_ptr + e, d)
    else:  # neighbours share the words at a row's ends
        tl.store(out_ptr + e, d, mask=(e >= lead) & (e < end))


# launches
class _Layout:
    """Where the rows of (R, V) or (B, T, V) begin, in elements from the start of a word."""

    def __init__(self, x: Tensor) -> None:
        self.rows, self.per_batch, self.columns = x.shape[:-1].numel(), x.shape[-2], x.shape[-1]
        self.strides = (x.stride(0) if x.ndim == 3 else 0, x.stride(-2))
        whole = x.untyped_storage().data_ptr() % WORD == 0
        self.per_word = WORD // x.element_size() if whole else 1
        self.offset = x.storage_offset() % self.per_word
        first = x.storage_offset() - self.offset
        self.base = x.as_strided((1,), (1,), first) if self.offset else x

    def starts(self, per_word: int) -> tuple[int, ...]:
        """Alike for two tensors whose rows all start at the same places in their words."""
        return tuple(x % per_word for x in (self.offset, *self.strides))


def _whole_words(x: Tensor) -> Tensor:
    size = x.element_size()
    if x.shape[1] > MAX_SLAB or x.stride(0) * size % WORD or x.data_ptr() % WORD:
        got = f"{tuple(x.shape)} with strides {x.stride()}"
        raise ValueError(f"need at most {MAX_SLAB} columns and rows of whole words, got {got}")
    return x


def _warps(block: int) -> int:
    return max(1, min(8, block // 512))


def stream_rows(
    logits: Tensor, target: Tensor, state: Tensor, scale: float, outputs: tuple[str, ...]
) -> None:
    """The ``state`` (8, R) fp32 of rows (R, V) or (B, T, V) of scale * logits."""
    x = _Layout(logits)
    if x.rows == 0:
        return
    block = max(x.per_word, min(triton.next_power_of_2(x.columns), _BLOCK_FORWARD))
    _stream_rows[(x.rows,)](
        x.base,
        target,
        state,
        x.rows,
        x.columns,
        x.per_batch,
        x.offset,
        *x.strides,
        scale,
        ENTROPY="entropy" in outputs,
        MEAN="mean_logit" in outputs,
        SQUARES="log_sum_sq_probs" in outputs,
        PER_WORD=x.per_word,
        BLOCK_V=block,
        num_warps=_warps(block),
    )


def slab_rows(
    raw: Tensor,
    start: int,
    target: Tensor,
    state: Tensor,
    transform: Transform,
    outputs: tuple[str, ...],
    *,
    exps: Tensor | None,
    weighted: Tensor | None,
    slopes: bool,
    shift: Tensor | None,
) -> None:
    """Carry ``state`` (8, R) fp32 over the slab of columns ``start:``; at 0 it starts anew."""
    R, V = raw.shape
    if R == 0:
        return
    slabs = [_whole_words(x) for x in (raw, exps, weighted) if x is not None]
    block = triton.next_power_of_2(V)
    _slab_rows[(R,)](
        raw,
        transform.bias,
        target,
        state,
        exps,
        weighted,
        shift,
        R,
        V,
        start,
        raw.stride(0),
        0 if exps is None else exps.stride(0),
        0 if weighted is None else weighted.stride(0),
        transform.scale,
        transform.cap or 1.0,
        FIRST=start == 0,
        BIAS=transform.bias is not None,
        CAP=transform.cap is not None,
        ENTROPY="entropy" in outputs,
        MEAN="mean_logit" in outputs,
        SQUARES="log_sum_sq_probs" in outputs,
        EXPS=exps is not None,
        WEIGHTED=weighted is not None,
        SLOPES=slopes,
        SHIFT=shift is not None,
        PER_WORD=WORD // min(x.element_size() for x in slabs),
        BLOCK_V=block,
        num_warps=_warps(block),
    )


def finish_rows(state: Tensor, target: Tensor, num_columns: int, out: dict[str, Tensor]) -> None:
    """Write what ``state`` carried into the (R,) tensors of ``out``, by name."""
    R = len(target)
    if R == 0:
        return
    names = ("logp", "max", "log_total", "entropy", "is_top1", "mean_logit", "log_sum_sq_probs")
    _finish_rows[(triton.cdiv(R, 128),)](
        state,
        target,
        *(out.get(name) for name in names),
        R,
        num_columns,
        IGNORE=IGNORE_INDEX,
        ENTROPY="entropy" in out,
        TOP1="is_top1" in out,
        MEAN="mean_logit" in out,
        SQUARES="log_sum_sq_probs" in out,
        BLOCK_R=128,
        num_warps=4,
    )


def gradient_rows(
    source: Tensor,
    start: int,
    target: Tensor,
    values: Tensor,
    out: Tensor,
    transform: Transform,
    *,
    shift: Tensor | None = None,
    slab: bool = True,
) -> None:
    """Gradient of columns ``start:`` of R rows, from raw products or with ``shift`` exponentials.

    Of a ``slab`` of ours the words at a row's end are written whole.
    """
    x, to = _Layout(source), _Layout(out)
    if x.rows == 0:
        return
    if slab:
        per_word = WORD // min(_whole_words(y).element_size() for y in (source, out))
        per_word_out = per_word
    else:
        per_word = x.per_word
        per_word_out = per_word if x.starts(per_word) == to.starts(per_word) else 1
    block = min(triton.next_power_of_2(x.columns), _BLOCK_BACKWARD)
    _gradient_rows[(x.rows, triton.cdiv(x.columns + per_word - 1, block))](
        x.base,
        transform.bias,
        shift,
        target,
        values,
        to.base,
        x.columns,
        x.per_batch,
        start,
        x.offset,
        to.offset,
        *x.strides,
        *to.strides,
        values.stride(0),
        transform.scale,
        transform.cap or 1.0,
        KEPT=shift is not None,
        BIAS=transform.bias is not None,
        CAP=transform.cap is not None,
        ENTROPY=len(values) == 6,
        IGNORE=IGNORE_INDEX,
        PER_WORD=per_word,
        PER_WORD_OUT=per_word_out,
        SLAB=slab,
        BLOCK_V=block,
        num_warps=_warps(block),
    )
