"""Full-vocabulary divergence from a reference, straight from hidden states.

KL[m] = sum_v q[m, v] (log q[m, v] - log p[m, v]), p = softmax(z) of the policy and q = softmax(z')
of the reference, each z as in linear_logp.py. N rows of hidden (N, H) and ref_hidden (N, H'),
weight (V, H), ref_weight (V, H'), M positions. (M, V) exists a tile of rows and columns at a time.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.kernels.gather_rows import check_index, sum_copies
from fastpref.kernels.linear_logp_plan import DEFAULT_WORKSPACE, OTHER_WORKSPACE, pitch
from fastpref.kernels.logits import Transform, tiles
from fastpref.kernels.logp_from_logits import check_positive
from fastpref.kernels.product import full_precision, operand, product, upcasts

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_ROWS = 1024  # of a tile
_CPU_TILE = 3 << 20  # bytes of a tile that stays in the caches
_LEAST_WIDTH = 64  # columns
_ROW_BYTES = 256  # per-row vectors, all of them at once
_SLACK = 64 << 10  # what does not grow with any size


# 1. reference
def linear_kl_ref(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    rows: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    def log_softmax(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits = torch.nn.functional.linear(x if rows is None else x[rows], weight, bias)
        logits = logit_scale * logits.to(torch.promote_types(logits.dtype, torch.float32))
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return (logits / temperature).log_softmax(-1)

    logp = log_softmax(hidden, weight, bias)
    ref_logp = log_softmax(ref_hidden, ref_weight, ref_bias)
    probs = ref_logp.exp()
    return (probs * (ref_logp - logp)).masked_fill(probs == 0, 0.0).sum(-1)


# 2. loops of matrix products
class _Side(NamedTuple):
    """The policy or the reference."""

    hidden: Tensor
    weight: Tensor
    transform: Transform

    def rows(self, rows: Tensor | None, start: int, stop: int) -> Tensor:
        if rows is None:
            return operand(self.hidden[start:stop])
        return operand(self.hidden.index_select(0, rows[start:stop]))

    def columns(self, start: int, stop: int) -> "_Side":
        transform = self.transform.columns(start, stop)
        return _Side(self.hidden, operand(self.weight[start:stop]), transform)


class _Cut(NamedTuple):
    rows: int  # of a tile
    width: int  # columns of a tile
    needed: int  # least workspace in bytes
    workspace: int


def _plan(
    policy: _Side,
    ref: _Side,
    rows: Tensor | None,
    grads: list[bool],
    workspace: int | None,
    reserved: int,
) -> _Cut:
    """Cut (M, V) into tiles; ``reserved`` bytes of the workspace are taken by the caller."""
    (N, H), V, dtype = policy.hidden.shape, len(policy.weight), policy.hidden.dtype
    device, gathers = policy.hidden.device.type, rows is not None
    M = len(rows) if gathers else N
    both = H + ref.hidden.shape[1]
    size, wide, half = dtype.itemsize, max(4, dtype.itemsize), dtype.itemsize == 2
    upcast = wide * upcasts(dtype, device)
    grad_hidden, grad_weight, grad_bias = grads
    height = max(1, min(M, _ROWS))

    # three wide slabs; a byte of a mask, or gradients as half-precision operands
    column = height * (3 * wide + 2) + both * upcast + H * wide * (grad_weight and half)
    fixed = height * both * (size * gathers + upcast)
    if grad_hidden:
        spread = M * H * (wide + size) if half and gathers else 0
        fixed = max(fixed, spread) + M * H * wide * (half or gathers)
    fixed += M * _ROW_BYTES + N * 8 * gathers + reserved + _SLACK
    fixed += V * wide * (grad_bias + sum(x.transform.bias is not None for x in (policy, ref)))

    needed = fixed + column * _LEAST_WIDTH
    if workspace is None:
        workspace = max(needed, DEFAULT_WORKSPACE.get(device, OTHER_WORKSPACE))
    room = workspace - fixed if device == "cuda" else min(workspace - fixed, _CPU_TILE)
    widest = room // (column * _LEAST_WIDTH) * _LEAST_WIDTH
    width = max(_LEAST_WIDTH, min(pitch(V), widest))
    return _Cut(height, width, needed, workspace)


class _Sums:
    """What R rows carry over columns, relative to running maxima; first policy, then reference."""

    def __init__(self, R: int, like: Tensor) -> None:
        lowest = torch.finfo(like.dtype).min  # finite: -inf - -inf is NaN
        self.top = like.new_full((2, R), lowest)
        self.total = like.new_zeros((2, R), dtype=torch.float64)
        # exps of the reference times its (z' - max') - (z - max)
        self.gap = like.new_zeros(R, dtype=torch.float64)

    def add(self, z: Tensor, ref_z: Tensor, spare: Tensor) -> None:
        """Take columns of logits; all three are scratch."""
        old = self.top.double()
        self.top = torch.maximum(self.top, torch.stack([z.amax(1), ref_z.amax(1)]))
        drop = old.sub_(self.top)  # finite in fp64
        shrink = drop.exp()
        self.gap.addcmul_(drop[1] - drop[0], self.total[1]).mul_(shrink[1])
        self.total.mul_(shrink)
        z.sub_(self.top[0, :, None])
        exps = torch.exp(ref_z.sub_(self.top[1, :, None]), out=spare)
        self.total[1] += exps.sum(1)
        gap = ref_z.sub_(z).mul_(exps).masked_fill_(exps == 0, 0.0)  # 0 log 0 is 0
        self.gap += gap.sum(1)
        self.total[0] += z.exp_().sum(1)

    def finish(self, kl: Tensor, stats: Tensor) -> None:
        """KL (R,); maxima, then 1 / totals (4, R), which round less than log-sum-exps."""
        log_total = self.total.log()
        kl.copy_(self.gap / self.total[1] + (log_total[0] - log_total[1]))
        stats.copy_(torch.cat([self.top, self.total.reciprocal()]))


def _slabs(like: Tensor, cut: _Cut) -> Tensor:
    wide = torch.promote_types(like.dtype, torch.float32)
    return like.new_empty((3, cut.rows * cut.width), dtype=wide)


def _logits(
    sides: tuple[_Side, _Side], rows: Tensor | None, start: int, stop: int, slabs: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Logits of both in a tile and a spare slab, and what the policy's were multiplied from."""
    R, C = stop - start, len(sides[0].weight)
    views = [slab[: R * C].view(R, C) for slab in slabs]
    for side, out in zip(reversed(sides), (views[1], views[0]), strict=True):
        x = side.rows(rows, start, stop)
        side.transform.apply_(product(x, side.weight.t(), out=out))
    return views, x


def _forward(
    policy: _Side, ref: _Side, rows: Tensor | None, cut: _Cut, kl: Tensor, stats: Tensor
) -> None:
    slabs = _slabs(policy.hidden, cut)
    for r0, r1 in tiles(len(kl), cut.rows):
        sums = _Sums(r1 - r0, slabs)
        for c0, c1 in tiles(len(policy.weight), cut.width):
            sides = policy.columns(c0, c1), ref.columns(c0, c1)
            views, x = _logits(sides, rows, r0, r1, slabs)
            sums.add(*views)
            del sides, x  # before the next ones are made
        sums.finish(kl[r0:r1], stats[:, r0:r1])


def _dlogits(
    z: Tensor, ref_z: Tensor, spare: Tensor, stats: Tensor, g: Tensor, transform: Transform
) -> Tensor:
    """g (p - q) d z / d raw in the place of ``z``."""
    top, ref_top, scale, ref_scale = stats[:, :, None]
    if transform.cap is not None:
        torch.mul(z, 1 / transform.cap, out=spare).square_().neg_().add_(1.0)
    slope = g[:, None] * transform.slope
    z.sub_(top).exp_().mul_(slope * scale)
    z.sub_(ref_z.sub_(ref_top).exp_().mul_(slope * ref_scale))
    return z if transform.cap is None else z.mul_(spare)


def _backward_slabs(
    policy: _Side,
    ref: _Side,
    rows: Tensor | None,
    cut: _Cut,
    stats: Tensor,
    g: Tensor,
    grads: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    hidden, weight = policy.hidden, policy.weight
    (V, H), M = weight.shape, len(g)
    slabs = _slabs(hidden, cut)
    dX = slabs.new_zeros((M, H)) if grads[0] else None
    dW = weight.new_zeros((V, H)) if grads[1] else None
    db = slabs.new_zeros(V) if grads[2] else None
    rounds = dW is not None and dW.dtype != slabs.dtype
    sums = slabs.new_empty((cut.width, H)) if rounds else None  # so that dW is rounded once
    for c0, c1 in tiles(V, cut.width):
        sides = policy.columns(c0, c1), ref.columns(c0, c1)
        W = sides[0].weight
        for r0, r1 in tiles(M, cut.rows):
            views, x = _logits(sides, rows, r0, r1, slabs)
            d = _dlogits(*views, stats[:, r0:r1], g[r0:r1], policy.transform)
            if db is not None:
                db[c0:c1] += d.sum(0)
            d = d.to(W.dtype)
            if dX is not None:
                product(d, W, out=dX[r0:r1], accumulate=True)
            if dW is not None:
                out = dW[c0:c1] if sums is None else sums[: c1 - c0]
                product(d.t(), x, out=out, accumulate=r0 > 0)
            del d, x
        if sums is not None and M:
            dW[c0:c1] = sums[: c1 - c0]
        del sides, W
    return dX, dW, db


# 3. ops
def _prepare(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    rows: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    *budget: Any,
) -> tuple[_Side, _Side, _Cut]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    both = [None if b is None else b.to(wide).contiguous() for b in (bias, ref_bias)]
    transform, ref = (Transform.of(temperature, logit_scale, softcap, b) for b in both)
    sides = _Side(hidden, weight, transform), _Side(ref_hidden, ref_weight, ref)
    return *sides, _plan(*sides, rows, *budget)


def _allocate(hidden: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    M = hidden.shape[0] if rows is None else rows.shape[0]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_empty(M, dtype=wide), hidden.new_empty((4, M), dtype=wide)


@torch.library.custom_op("fastpref::linear_kl", mutates_args=())
def _op(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    rows: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    grads: list[bool],
    workspace: int | None,
    reserved: int,
) -> tuple[Tensor, Tensor]:
    """KL, and the (4, M) that its backward needs; see _Sums.finish."""
    if rows is not None:
        check_index(rows, len(hidden))
    tensors = (hidden, weight, ref_hidden, ref_weight, bias, ref_bias, rows)
    options = (logit_scale, softcap, temperature, grads, workspace, reserved)
    policy, ref, cut = _prepare(*tensors, *options)
    if cut.workspace < cut.needed:
        raise ValueError(f"need a workspace of {cut.needed} bytes, got {cut.workspace}")
    kl, stats = _allocate(hidden, rows)
    with full_precision():
        _forward(policy, ref, rows, cut, kl, stats)
    return kl, stats


@_op.register_fake
def _(hidden: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _allocate(hidden, args[5])


@torch.library.custom_op("fastpref::linear_kl_bwd", mutates_args=())
def _op_bwd(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    rows: Tensor | None,
    stats: Tensor,
    dkl: Tensor,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    grads: list[bool],
    workspace: int | None,
    reserved: int,
) -> list[Tensor]:
    tensors = (hidden, weight, ref_hidden, ref_weight, bias, ref_bias, rows)
    options = (logit_scale, softcap, temperature, grads, workspace, reserved)
    policy, ref, cut = _prepare(*tensors, *options)
    with full_precision():
        dX, dW, db = _backward_slabs(policy, ref, rows, cut, stats, dkl, grads)
    if dX is not None:
        N, dtype = len(hidden), hidden.dtype
        dX = dX.to(dtype) if rows is None else sum_copies(dX, rows, N, dtype)
    db = None if db is None else db.to(hidden.dtype)
    return [d for d in (dX, dW, db) if d is not None]


@_op_bwd.register_fake
def _(hidden: Tensor, weight: Tensor, *args: Any) -> list[Tensor]:
    shapes = zip((hidden, weight, args[2]), args[-3], strict=True)
    return [x.new_empty(x.shape) for x, wanted in shapes if wanted]


# 4. autograd
def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.options = *inputs[:7], inputs[7:]
    _kl, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, stats)


def _backward(ctx: Any, dkl: Tensor | None, _dstats: None) -> tuple[Tensor | None, ...]:
    none = (None,) * 13
    if dkl is None:
        return none
    found = iter(_op_bwd(*ctx.saved_tensors, dkl, *ctx.options))
    d = [next(found) if wanted else None for wanted in ctx.options[3]]
    return (d[0], d[1], None, None, d[2], *none[5:])


_op.register_autograd(_backward, setup_context=_setup)


# 5. public
def _check_shapes(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    rows: Tensor | None,
) -> None:
    flat = rows is None or (hidden.ndim == 2 and rows.ndim == 1)
    leading = min(hidden.ndim, ref_hidden.ndim) > 0 and hidden.shape[:-1] == ref_hidden.shape[:-1]
    if not flat or not leading:
        need = "hidden (..., H) and ref_hidden (..., H')"
        if rows is not None:
            need = "hidden (N, H), ref_hidden (N, H') and rows (M,)"
        shapes = [tuple(x.shape) for x in (hidden, ref_hidden, rows) if x is not None]
        raise ValueError(f"need {need}, got {', '.join(map(str, shapes))}")
    sides = (("", hidden, weight, bias), ("ref_", ref_hidden, ref_weight, ref_bias))
    for name, x, w, b in sides:
        if w.ndim != 2 or x.shape[-1] != w.shape[1] or len(w) != len(weight) or 0 in w.shape:
            raise ValueError(
                f"need {name}hidden (..., H) and {name}weight (V, H), both above 0 and V that of "
                f"weight, got {tuple(x.shape)} and {tuple(w.shape)}, weight {tuple(weight.shape)}"
            )
        if b is not None and b.shape != w.shape[:1]:
            raise ValueError(f"need {name}bias (V,) = ({len(w)},), got {tuple(b.shape)}")
        if 1 not in w.stride():
            got = w.stride()
            raise ValueError(f"need {name}weight contiguous in H or V, got strides {got}")


def _check_kinds(floats: dict[str, Tensor], rows: Tensor | None) -> None:
    dtypes = [x.dtype for x in floats.values()]
    if dtypes[0] not in _DTYPES or len(set(dtypes)) > 1:
        got = ", ".join(map(str, dtypes))
        raise TypeError(f"need {', '.join(floats)} in one of {_DTYPES}, got {got}")
    if rows is not None and rows.dtype != torch.int64:
        raise TypeError(f"need int64 rows, got {rows.dtype}")
    devices = {str(x.device) for x in (*floats.values(), rows) if x is not None}
    if len(devices) > 1:
        raise ValueError(f"need all tensors on one device, got {sorted(devices)}")
    for name, x in floats.items():
        if name.startswith("ref_") and x.requires_grad:
            raise ValueError(f"need {name} without a gradient: detach it, got requires_grad=True")


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    rows: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    workspace: int | None = None,
) -> Tensor:
    """KL(reference || policy) of each position over the whole vocabulary, in nats, without logits.

    What token-level DPO takes of every token. Plain torch on every device: there is no fused
    kernel. Two matrix products forward; backward two to compute logits again, and one for each of
    hidden and weight that is differentiated. Logits are never rounded to the input dtype.

    Args:
        hidden: the policy's (..., H) bf16, fp16, fp32 or fp64; (N, H) with ``rows``;
            differentiable. What is not contiguous is copied without ``rows``.
        weight: the policy's (V, H), hidden's dtype; differentiable. Its gradient is rounded once.
        ref_hidden: the reference's (..., H') of hidden's leading shape and dtype; detached.
        ref_weight: the reference's (V, H'), hidden's dtype; detached.
        bias: the policy's (V,), hidden's dtype; differentiable. -inf leaves a column out.
        ref_bias: the reference's (V,), hidden's dtype; detached.
        rows: (M,) int64 in [0, N): hidden rows ``rows[m]`` of both are position m; repeats allowed.
            Their gradients are added in a fixed order. Range checked on the CPU only.
        logit_scale: positive; multiplies the logits of both before the cap.
        softcap: positive, or None for no cap: softcap(x) = softcap * tanh(x / softcap).
        temperature: positive; divides the logits of both after the cap.
        workspace: bytes that may exist beyond inputs and returned gradients, from this call to
            the end of its backward. Near the least that works, slabs of columns are narrow and
            products slow. None: 1 GiB on CUDA, 256 MiB elsewhere, or the least where that is more.

    Returns:
        (...), (M,) with ``rows``, fp32 (fp64 for fp64 inputs): 0 or more but for rounding, which in
        fp32 is about 1e-6 nats where the two are near. A column that both leave out counts 0; one
        that only the policy leaves out makes it inf.

    Raises:
        ValueError: a shape, stride or option differs from the above, a row is out of range (CPU),
            the reference requires a gradient, tensors are on several devices, or the workspace is
            too small, with the bytes needed.
        TypeError: a dtype differs from the above.

    Source: token-level DPO, Zeng et al. 2024, arXiv:2404.11999, sequential KL divergence; online
    softmax, Milakov & Gimelshein 2018, arXiv:1805.02867, alg. 3.
    """
    named = {"hidden": hidden, "weight": weight, "ref_hidden": ref_hidden, "ref_weight": ref_weight}
    biases = {"bias": bias, "ref_bias": ref_bias}
    _check_shapes(*named.values(), *biases.values(), rows)
    _check_kinds(named | {k: b for k, b in biases.items() if b is not None}, rows)
    check_positive(logit_scale=logit_scale, softcap=softcap, temperature=temperature)
    leading, reserved = hidden.shape[:-1], 0
    if rows is None:
        copied = [x for x in (hidden, ref_hidden) if not x.is_contiguous()]
        reserved = sum(x.numel() * x.element_size() for x in copied)
        hidden, ref_hidden = (x.contiguous().view(-1, x.shape[-1]) for x in (hidden, ref_hidden))
    grads = [
        torch.is_grad_enabled() and x is not None and x.requires_grad
        for x in (hidden, weight, bias)
    ]
    options = (logit_scale, softcap, temperature, grads, workspace, reserved)
    kl, _ = _op(hidden, weight, ref_hidden, ref_weight, bias, ref_bias, rows, *options)
    return kl if rows is not None else kl.view(leading)
