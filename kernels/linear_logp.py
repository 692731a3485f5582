"""Token statistics straight from hidden states: logp[m] = z[m, y[m]] - logsumexp(z[m, :]).

z = softcap(logit_scale * (hidden[rows] @ weight.T + bias)) / temperature, softcap(x) = cap *
tanh(x / cap). N rows of hidden (N, H), weight (V, H), M targets. A loop of matrix products around
the row functions of logp_rows: (M, V) exists a slab of columns at a time.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastpref.kernels.active_columns import ActiveColumns
from fastpref.kernels.backend import choose
from fastpref.kernels.gather_rows import check_index, sum_copies
from fastpref.kernels.linear_logp_loops import Kept, backward_slabs, forward
from fastpref.kernels.linear_logp_plan import Case, Plan, plan
from fastpref.kernels.logits import IGNORE_INDEX, Transform, check_target
from fastpref.kernels.logp_from_logits import (
    STATS,
    check_outputs,
    check_positive,
    empty_stats,
    named_stats,
    stats_from_logits_ref,
)
from fastpref.kernels.logp_from_logits import TokenStats as TokenStats
from fastpref.kernels.logp_rows import RowGrads
from fastpref.kernels.product import full_precision
from fastpref.kernels.vocab_parallel import local_target, name_of, sum_over_ranks

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


# 1. reference
def linear_logp_ref(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> TokenStats:
    x = hidden if rows is None else hidden[rows]
    logits = logit_scale * torch.nn.functional.linear(x, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return stats_from_logits_ref(logits, target, temperature=temperature)


# 2. ops
_Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _prepare(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    softcap: float | None,
    outputs: str,
    grads: list[bool],
    workspace: int | None,
    reserved: int,
    skip_below: float,
) -> tuple[Case, Plan]:
    case = Case(
        hidden.dtype,
        hidden.device.type,
        choose(hidden.device.type, hidden.dtype),
        *grads[:3],
        gathers=rows is not None,
        biased=bias is not None,
        entropy="entropy" in outputs.split(),
        grad_entropy=grads[3],
        capped=softcap is not None,
        skips=skip_below > 0,
    )
    (N, H), M, V = hidden.shape, target.shape[0], weight.shape[0]
    return case, plan(case, M, N, H, V, workspace, reserved)


def _allocate(hidden: Tensor, target: Tensor, case: Case, cut: Plan, outputs: str) -> _Outputs:
    """ROW_OUTPUTS, then kept slabs and their maxima (flat), row matrices."""
    M, H = target.shape[0], hidden.shape[1]
    return (
        *empty_stats(target, case.wide, outputs.split()),
        # never of size 0 or 1: tracing would guard on it, and compile again for another length
        hidden.new_empty(M * cut.kept_columns + 2, dtype=case.kept_dtype),
        hidden.new_empty(M * cut.kept + 2, dtype=case.wide),
        hidden.new_empty((case.row_matrices, M, H), dtype=case.wide),
    )


def _transform(
    bias: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    case: Case,
) -> Transform:
    bias = None if bias is None else bias.to(case.wide).contiguous()
    return Transform.of(temperature, logit_scale, softcap, bias)


@torch.library.custom_op("fastpref::linear_logp", mutates_args=())
def _op(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    skip_stats: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    outputs: str,
    grads: list[bool],
    workspace: int | None,
    reserved: int,
    skip_below: float,
    group: str,
) -> _Outputs:
    check_target(target, len(weight) + bool(group))  # one past the end: another rank's
    if rows is not None:
        check_index(rows, len(hidden))
    options = (softcap, outputs, grads, workspace, reserved, skip_below)
    case, cut = _prepare(hidden, weight, target, bias, rows, *options)
    if cut.workspace < cut.needed:
        raise ValueError(f"need a workspace of {cut.needed} bytes, got {cut.workspace}")
    out = _allocate(hidden, target, case, cut, outputs)
    out[8][-2:] = 0
    flat = named_stats(out, outputs.split())
    kept = Kept(out[7], out[8], cut, len(target), len(weight))
    kept.fill_padding()
    transform = _transform(bias, temperature, logit_scale, softcap, case)
    names = tuple(outputs.split())
    with full_precision():
        forward(
            hidden, weight, target, rows, transform, case, cut, names, flat, kept, out[9], group
        )
    return out


@_op.register_fake
def _(*args: Any) -> _Outputs:
    hidden, weight, target, bias, rows, _stats, _temperature, _logit_scale, *rest, _group = args
    case, cut = _prepare(hidden, weight, target, bias, rows, *rest)
    return _allocate(hidden, target, case, cut, rest[1])


def _to_hidden(dX: Tensor, rows: Tensor | None, N: int, dtype: torch.dtype) -> Tensor:
    return dX.to(dtype) if rows is None else sum_copies(dX, rows, N, dtype)


@torch.library.custom_op("fastpref::linear_logp_bwd", mutates_args=())
def _op_bwd(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    logp: Tensor,
    max: Tensor,
    log_total: Tensor,
    entropy: Tensor,
    kept: Tensor,
    maxima: Tensor,
    dlogp: Tensor | None,
    dentropy: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    outputs: str,
    grads: list[bool],
    workspace: int | None,
    reserved: int,
    skip_below: float,
    group: str,
) -> list[Tensor]:
    options = (softcap, outputs, grads, workspace, reserved, skip_below)
    case, cut = _prepare(hidden, weight, target, bias, rows, *options)
    transform = _transform(bias, temperature, logit_scale, softcap, case)
    row_values = (logp, max, log_total, entropy, dlogp, dentropy)
    row_grads = RowGrads.of(target, *row_values, transform.slope)
    slabs = Kept(kept, maxima, cut, len(target), len(weight))
    skip = ActiveColumns(row_grads, skip_below, cut.rows) if case.skips else None
    args = (hidden, weight, rows, transform, case, cut, row_grads, slabs, skip)
    with full_precision():
        dX, dW, db = backward_slabs(*args)
    if dX is not None:
        sum_over_ranks(dX, group)
    out = [] if dX is None else [_to_hidden(dX, rows, len(hidden), hidden.dtype)]
    out += [] if dW is None else [dW]
    out += [] if db is None else [db.to(hidden.dtype)]
    return out if skip is None else [*out, skip.stats(len(weight), group)]


@_op_bwd.register_fake
def _(*args: Any) -> list[Tensor]:
    hidden, weight, _target, bias, *_ = args
    grads = args[-5]
    shapes = zip((hidden, weight, bias), grads[:3], strict=True)
    out = [x.new_empty(x.shape) for x, wanted in shapes if wanted]
    return [*out, hidden.new_empty(2, dtype=torch.float32)] if args[-2] > 0 else out


@torch.library.custom_op("fastpref::linear_logp_frozen_bwd", mutates_args=())
def _op_frozen_bwd(
    matrices: Tensor,
    target: Tensor,
    rows: Tensor | None,
    dlogp: Tensor | None,
    dentropy: Tensor | None,
    num_rows: int,
    dtype: torch.dtype,
    group: str,
) -> Tensor:
    keep = (target != IGNORE_INDEX)[:, None]
    dX = torch.zeros_like(matrices[0])
    for matrix, g in zip(matrices, (dlogp, dentropy), strict=False):
        if g is not None:
            dX.addcmul_(matrix, g[:, None])
    sum_over_ranks(dX.masked_fill_(~keep, 0.0), group)
    return _to_hidden(dX, rows, num_rows, dtype)


@_op_frozen_bwd.register_fake
def _(
    matrices: Tensor,
    target: Tensor,
    rows: Tensor | None,
    dlogp: Tensor | None,
    dentropy: Tensor | None,
    num_rows: int,
    dtype: torch.dtype,
    group: str,
) -> Tensor:
    return matrices.new_empty((num_rows, matrices.shape[2]), dtype=dtype)


# 3. autograd
def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    hidden, weight, target, bias, rows, ctx.skip_stats, *ctx.options = inputs
    logp, top, log_total, entropy, *rest, kept, maxima, matrices = output
    unasked = [] if ctx.options[4][3] else [entropy]
    ctx.mark_non_differentiable(top, log_total, *rest, kept, maxima, matrices, *unasked)
    ctx.set_materialize_grads(False)  # a kept slab must not cost a dense zero gradient
    ctx.frozen = matrices.shape[0] > 0
    if ctx.frozen:
        ctx.num_rows, ctx.dtype = hidden.shape[0], hidden.dtype
        ctx.save_for_backward(matrices, target, rows)
        return
    ctx.save_for_backward(hidden, weight, target, bias, rows, logp, top, log_total, entropy)
    ctx.kept = kept, maxima  # not saved through hooks: save_on_cpu would move them out and back


def _backward(
    ctx: Any,
    dlogp: Tensor | None,
    _dmax: None,
    _dlog_total: None,
    dentropy: Tensor | None,
    *_: None,
) -> tuple[Tensor | None, ...]:
    none = (None,) * 15
    if dlogp is None and dentropy is None:
        return none
    if ctx.frozen:
        args = (*ctx.saved_tensors, dlogp, dentropy, ctx.num_rows, ctx.dtype, ctx.options[-1])
        return (_op_frozen_bwd(*args), *none[1:])
    found = iter(_op_bwd(*ctx.saved_tensors, *ctx.kept, dlogp, dentropy, *ctx.options))
    if not torch._C._autograd._get_current_graph_task_keep_graph():
        ctx.kept = None  # freed with this backward; the node itself lives as long as the loss
    d = [next(found) if wanted else None for wanted in ctx.options[4][:3]]
    if ctx.skip_stats is not None:
        ctx.skip_stats.copy_(next(found, ctx.skip_stats))
    return (d[0], d[1], None, d[2], *none[4:])


_op.register_autograd(_backward, setup_context=_setup)


# 4. public
def _check(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, rows: Tensor | None
) -> None:
    lead = hidden.shape[:-1] if rows is None else rows.shape
    flat = rows is None or (hidden.ndim == 2 and rows.ndim == 1)
    if hidden.ndim < 1 or weight.ndim != 2 or not flat or target.shape != lead:
        need = "hidden (..., H) and target (...)"
        if rows is not None:
            need = "hidden (N, H), rows (M,) and target (M,)"
        got = ", ".join(str(tuple(x.shape)) for x in (hidden, rows, target) if x is not None)
        raise ValueError(f"need {need} and weight (V, H), got {got} and {tuple(weight.shape)}")
    if hidden.shape[-1] != weight.shape[1] or 0 in weight.shape:
        got = f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"need hidden (..., H) and weight (V, H), both above 0, got {got}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"need bias (V,) = ({len(weight)},), got {tuple(bias.shape)}")
    if 1 not in weight.stride():
        raise ValueError(f"need weight contiguous in H or V, got strides {weight.stride()}")
    floats = [x.dtype for x in (hidden, weight, bias) if x is not None]
    if floats[0] not in _DTYPES or len(set(floats)) > 1:
        got = ", ".join(map(str, floats))
        raise TypeError(f"need hidden, weight and bias in one of {_DTYPES}, got {got}")
    devices = {str(x.device) for x in (hidden, weight, target, bias, rows) if x is not None}
    if len(devices) > 1:
        raise ValueError(f"need all tensors on one device, got {sorted(devices)}")
    integers = [x.dtype for x in (target, rows) if x is not None]
    if set(integers) != {torch.int64}:
        raise TypeError(f"need int64 target and rows, got {', '.join(map(str, integers))}")


def _check_skip_stats(skip_stats: Tensor, device: torch.device) -> None:
    right = skip_stats.dtype == torch.float32 and skip_stats.device == device
    if skip_stats.shape != (2,) or not right:
        got = f"{tuple(skip_stats.shape)} of {skip_stats.dtype} on {skip_stats.device}"
        raise ValueError(f"need skip_stats (2,) of fp32 on {device}, got {got}")
    skip_stats[0], skip_stats[1] = 1.0, 0.0


def _live_rows(
    hidden: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, int]:
    """Leading dimensions off and ignored rows out: hidden, target, rows, where they go, bytes."""
    y, H = target.reshape(-1), hidden.shape[-1]
    reserved = 24 * y.numel()
    index = None
    tracing = torch.compiler.is_compiling()
    if not tracing:
        index = (y != IGNORE_INDEX).nonzero()[:, 0]  # the one sync
        index = None if len(index) == len(y) else index
    view = hidden.ndim <= 2 or all(
        hidden.stride(i) == hidden.shape[i + 1] * hidden.stride(i + 1)
        for i in range(hidden.ndim - 2)
    )
    if view and hidden.stride(-1) == 1:
        rows = index
        hidden = hidden.view(-1, H)
    else:
        rows = None
        if index is not None:  # copies the live rows only
            hidden = hidden[torch.unravel_index(index, target.shape)]
        hidden = hidden.reshape(-1, H).contiguous()
        reserved = reserved + hidden.numel() * hidden.element_size()
    if tracing:  # rows that are given are masked, whatever they hold
        rows = torch.arange(len(y), device=y.device)
    return hidden, y if index is None else y[index], rows, index, reserved


def linear_logp_stats(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    outputs: tuple[str, ...] = STATS,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    workspace: int | None = None,
    entropy_grad: bool = True,
    skip_below: float = 0.0,
    skip_stats: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> TokenStats:
    """Log-probability of each target token and statistics of its distribution, without logits.

    z = softcap(logit_scale * (hidden @ weight.T + bias)) / temperature is never rounded to the
    input dtype, and exists one slab of columns at a time.

    Args:
        hidden: (..., H) bf16, fp16, fp32 or fp64, any strides; (N, H) with ``rows``;
            differentiable.
        weight: (V, H), hidden's dtype; differentiable. Its gradient is rounded once.
        target: (...) int64 in [0, V), or -100; (M,) with ``rows``. Range checked on the CPU only.
        outputs: which of "entropy", "is_top1", "mean_logit" and "log_sum_sq_probs" to return.
        bias: (V,), hidden's dtype; differentiable.
        rows: (M,) int64 in [0, N): hidden row ``rows[m]`` scores ``target[m]``; repeats allowed.
            Their gradients are added in a fixed order. Range checked on the CPU only.
        temperature: positive; divides the logits after the cap.
        logit_scale: positive; multiplies the logits before the cap.
        softcap: positive, or None for no cap: softcap(x) = softcap * tanh(x / softcap).
        workspace: bytes that may exist beyond inputs and returned gradients, from this call to
            the end of its backward. What is left of it keeps slabs of exponentials for the
            backward; the others are computed again. Near the least that works, slabs are narrow
            and products slow. None: 1 GiB on CUDA, 256 MiB elsewhere, or what slabs of full width
            take where that is more.
        entropy_grad: whether the entropy is differentiable. With a frozen weight that costs a third
            matrix product.
        skip_below: in [0, 1); above 0, columns whose probability is smaller in every row (times the
            entropy's slope where that is above 1 and differentiated) are left out of the gradients
            of hidden and weight, labels' columns never. Only kept slabs: (1 + 2 f) matrix products
            instead of 3, f the active fraction, and a host sync for each slab. It bounds entries,
            not what a row loses: ask for ``skip_stats``.
        skip_stats: (2,) fp32, which the backward fills with f and with the largest probability that
            a row lost; 1 and 0 where it is exact.
        group: the ranks over which weight and bias are cut by vocabulary rows, in the order of the
            ranks, one row at least on each; hidden, target and options are the same on all of
            them, targets count from 0 in the whole vocabulary. Results and the gradient of hidden
            are those of the whole weight. Where one rank raises, the others wait for it.

    Without ``rows``, ignored rows are found with one host sync and left out; under torch.compile
    they are computed and masked instead.

    Returns:
        TokenStats of tensors shaped like target, fp32 (fp64 for fp64 inputs); exactly 0 (False),
        with zero gradient, where the target is -100. Gradients flow through logp and entropy.

    Raises:
        ValueError: a shape, stride or option differs from the above, a label or row is out of range
            (CPU), or the workspace is too small, with the bytes needed.
        TypeError: a dtype differs from the above.

    Source: online softmax, Milakov & Gimelshein 2018, arXiv:1805.02867, alg. 3.
    """
    _check(hidden, weight, target, bias, rows)
    check_outputs(outputs)
    check_positive(temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    index, reserved, y = None, 0, target
    if rows is None:
        hidden, y, rows, index, reserved = _live_rows(hidden, target)
    elif hidden.stride(1) != 1 and hidden.shape[1] > 1:
        raise ValueError(f"need hidden contiguous in H with rows, got strides {hidden.stride()}")
    grads = [
        torch.is_grad_enabled() and x is not None and x.requires_grad
        for x in (hidden, weight, bias)
    ]
    grads.append(entropy_grad and "entropy" in outputs and any(grads))
    if not 0 <= skip_below < 1:
        raise ValueError(f"need skip_below in [0, 1), got {skip_below}")
    if skip_stats is not None:
        _check_skip_stats(skip_stats, hidden.device)
    shards = name_of(group)
    if shards:
        y = local_target(y, len(weight), shards)
    options = (temperature, logit_scale, softcap, " ".join(outputs), grads, workspace, reserved)
    options = (skip_stats, *options, float(skip_below), shards)
    logp, _, _, *stats = _op(hidden, weight, y, bias, rows, *options)
    found = {"logp": logp} | {n: s for n, s in zip(STATS, stats, strict=False) if n in outputs}
    if index is not None:
        full = {n: s.new_zeros(target.numel()) for n, s in found.items()}
        found = {n: full[n].index_copy(0, index, s) for n, s in found.items()}
    return TokenStats(**{n: s.view(target.shape) for n, s in found.items()})


def linear_logp(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    workspace: int | None = None,
    skip_below: float = 0.0,
    skip_stats: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Log-probability of each target token, in nats, straight from hidden states.

    Args:
        hidden: (..., H) bf16, fp16, fp32 or fp64, any strides; (N, H) with ``rows``;
            differentiable.
        weight: (V, H), hidden's dtype; differentiable. Its gradient is rounded once.
        target: (...) int64 in [0, V), or -100; (M,) with ``rows``. Range checked on the CPU only.
        bias: (V,), hidden's dtype; differentiable.
        rows: (M,) int64 in [0, N): hidden row ``rows[m]`` scores ``target[m]``; repeats allowed.
        temperature: positive; divides the logits after the cap.
        logit_scale: positive; multiplies the logits before the cap.
        softcap: positive, or None for no cap: softcap(x) = softcap * tanh(x / softcap).
        workspace: bytes that may exist beyond inputs and returned gradients; None: 1 GiB on CUDA,
            256 MiB elsewhere, or what slabs of full width take where that is more.
            See :func:`linear_logp_stats`.
        skip_below: leave columns of smaller probability out of the gradient; see there.
        skip_stats: (2,) fp32, filled by the backward; see there.
        group: ranks over which weight and bias are cut by vocabulary rows; see there.

    Without ``rows``, ignored rows are found with one host sync and left out; under torch.compile
    they are computed and masked instead.

    Returns:
        Shaped like target, fp32 (fp64 for fp64 inputs), each <= 0; exactly 0, with zero gradient,
        where the target is -100.

    Raises:
        ValueError: a shape, stride or option differs from the above, a label or row is out of range
            (CPU), or the workspace is too small, with the bytes needed.
        TypeError: a dtype differs from the above.

    Source: online softmax, Milakov & Gimelshein 2018, arXiv:1805.02867, alg. 3.
    """
    return linear_logp_stats(
        hidden,
        weight,
        target,
        outputs=(),
        bias=bias,
        rows=rows,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        workspace=workspace,
        skip_below=skip_below,
        skip_stats=skip_stats,
        group=group,
    ).logp
