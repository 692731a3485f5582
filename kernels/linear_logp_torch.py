"""linear_logp in plain torch, for any device: loops of matrix products over tiles of a plan.

Letters as in linear_logp.py. The forward walks tiles of rows, and in each the slabs of columns; the
backward walks slabs of columns over all rows, so that each slab of dW is rounded once.
"""

import torch
from torch import Tensor

from fastpref.kernels.linear_logp_plan import Case, Plan
from fastpref.kernels.logp_rows import (
    IGNORE_INDEX,
    RowGrads,
    Rows,
    bend_gradient,
    set_labels,
    slab_gradient,
    tiles,
)
from fastpref.kernels.product import operand, product


def _take(hidden: Tensor, rows: Tensor | None, target: Tensor, start: int, stop: int) -> Tensor:
    if rows is None:
        return operand(hidden[start:stop])
    x = hidden.index_select(0, rows[start:stop])
    # an ignored row may hold NaN, and 0 * NaN is NaN
    return operand(x.masked_fill_((target[start:stop] == IGNORE_INDEX)[:, None], 0.0))


class Logits:
    """Slabs of z: a product, then bias, scale, cap and temperature in place."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        temperature: float,
        logit_scale: float,
        softcap: float | None,
    ) -> None:
        self.weight, self.bias = weight, bias
        self.factor = logit_scale / temperature  # d z / d (x @ W.T + b) where no cap bends it
        self.cap = None if softcap is None else softcap / temperature  # in units of z
        self.alpha = self.factor if softcap is None else logit_scale / softcap

    def slab(self, x: Tensor, columns: Tensor, c0: int, out: Tensor) -> Tensor:
        """z of rows ``x`` at columns c0..., whose weight rows are ``columns``."""
        product(x, columns.t(), alpha=self.alpha, out=out)
        if self.bias is not None:
            out.add_(self.bias[c0 : c0 + len(columns)].to(out.dtype) * self.alpha)
        return out if self.cap is None else out.tanh_().mul_(self.cap)


class Kept:
    """Exponentials of the first slabs, each (M, width), and their row maxima, each (M,)."""

    def __init__(self, flat: Tensor, maxima: Tensor, cut: Plan, M: int, V: int) -> None:
        self.flat, self.width, self.V = flat, cut.width, V
        self.maxima = maxima[: cut.kept * M].view(cut.kept, M)

    def __contains__(self, j: int) -> bool:
        return j < len(self.maxima)

    def __getitem__(self, j: int) -> Tensor:
        M, start = self.maxima.shape[1], j * self.width
        stop = min(start + self.width, self.V)
        return self.flat[M * start : M * stop].view(M, stop - start)


class _RowMatrices:
    """Gradient of logp (and entropy) in hidden, per row: all a frozen head has to remember.

    Sums over columns leave the label out, whose share -expm1(logp) W[y] is exact where p is near 1.
    """

    def __init__(self, out: Tensor, logits: Logits) -> None:
        self.sums, self.logits = out.zero_(), logits

    def add(
        self,
        exps: Tensor,
        weighted: Tensor,
        bent: Tensor,
        start: int,
        rows: Rows,
        shrink: Tensor,
        drop: Tensor,
        W: Tensor,
    ) -> None:
        """Add a slab: ``exps``, with an entropy gradient exps * (z - max), with a cap z."""
        parts = (exps, weighted)[: len(self.sums)]
        if len(parts) == 2:  # a weighted sum shifts by the plain one before that changes
            self.sums[1].addcmul_(self.sums[0], drop[:, None])
        self.sums.mul_(shrink[:, None])
        if self.logits.cap is not None:
            bent.mul_(1 / self.logits.cap)
        for part, out in zip(parts, self.sums, strict=True):
            set_labels(part, rows.target, start, 0.0)
            if self.logits.cap is not None:
                bend_gradient(part, bent)
            product(part.to(W.dtype), W, out=out, accumulate=True)

    def finish(self, rows: Rows, stats: dict[str, Tensor]) -> None:
        stats = {name: value.to(self.sums.dtype) for name, value in stats.items()}
        total, logp = rows.total[:, None].to(self.sums.dtype), stats["logp"]
        label = self.logits.weight.index_select(0, rows.target.clamp(min=0)).to(total.dtype)
        if self.logits.cap is not None:
            tanh = (logp + stats["log_total"] + stats["max"]) / self.logits.cap
            label.mul_((1 - tanh**2)[:, None])
        self.sums.div_(total)
        if len(self.sums) == 2:
            mean = rows.weighted[:, None].to(total.dtype) / total
            share = logp.exp() * (logp + stats["entropy"])
            self.sums[1].addcmul_(self.sums[0], mean, value=-1).addcmul_(label, share[:, None])
            self.sums[1].neg_()
        self.sums[0].neg_().addcmul_(label, -logp.expm1()[:, None])
        self.sums.mul_(self.logits.factor)


def forward(
    hidden: Tensor,
    target: Tensor,
    rows: Tensor | None,
    logits: Logits,
    case: Case,
    cut: Plan,
    names: tuple[str, ...],
    flat: dict[str, Tensor],
    kept: Kept,
    matrices: Tensor,
) -> None:
    V = len(logits.weight)
    bends = case.frozen and case.capped
    buffers = hidden.new_empty((case.slabs, cut.rows * cut.width), dtype=case.wide)
    # C++ writes kept exponentials in their dtype, and none that nobody reads
    direct = case.native or kept.flat.dtype == case.wide
    for r0, r1 in tiles(len(target), cut.rows):
        x = _take(hidden, rows, target, r0, r1)
        state = Rows(target[r0:r1], case.wide, names)
        frozen = _RowMatrices(matrices[:, r0:r1], logits) if case.frozen else None
        for j, (c0, c1) in enumerate(tiles(V, cut.width)):
            W = operand(logits.weight[c0:c1])
            R, width = r1 - r0, c1 - c0
            slabs = buffers[:, : R * width].view(-1, R, width)
            z, bent = slabs[0], slabs[-1]  # bent is z again where no gradient needs it
            out = slabs[1] if case.slabs - bends == 2 else z
            if j in kept and direct:
                out = kept[j][r0:r1]
            elif case.native and not case.frozen:
                out = None
            logits.slab(x, W, c0, z)
            if bends:
                bent.copy_(z)
            weighted = frozen is not None and case.grad_entropy
            drop, shrink = state.add(z, c0, out, weighted=weighted)
            if j in kept:
                kept.maxima[j, r0:r1] = state.max
                if not direct:
                    kept[j][r0:r1].copy_(out)
            if frozen is not None:
                frozen.add(out, z, bent, c0, state, shrink, drop, W)
            del W
        stats = state.finish(V)
        for name, value in stats.items():
            flat[name][r0:r1] = value
        if frozen is not None:
            frozen.finish(state, stats)


def backward_slabs(
    hidden: Tensor,
    rows: Tensor | None,
    logits: Logits,
    case: Case,
    cut: Plan,
    grads: RowGrads,
    kept: Kept,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    M, H, V = len(grads.target), hidden.shape[1], len(logits.weight)
    x = _take(hidden, rows, grads.target, 0, M)
    dX = x.new_zeros((M, H), dtype=case.wide) if case.grad_hidden else None
    dW = logits.weight.new_empty((V, H)) if case.grad_weight else None
    db = x.new_zeros(V, dtype=case.wide) if case.grad_bias else None
    if M == 0 and dW is not None:
        dW.zero_()
    scratch = x.new_empty(cut.rows_backward * cut.width, dtype=case.wide)
    two = case.slabs_backward == 2
    spare = torch.empty_like(scratch) if two else scratch
    # rounded once: a slab of dW is summed over every row in the wide dtype
    narrow = dW is not None and dW.dtype != case.wide
    sums = x.new_empty((cut.width, H), dtype=case.wide) if narrow else dW
    for j, (c0, c1) in enumerate(tiles(V, cut.width)):
        W = operand(logits.weight[c0:c1])
        for r0, r1 in tiles(M, cut.rows_backward):
            shape, part = (r1 - r0, c1 - c0), grads.rows(r0, r1)
            slab = scratch[: shape[0] * shape[1]].view(shape)
            other = spare[: shape[0] * shape[1]].view(shape) if two else None
            exps = shift = None
            if j in kept:
                exps, shift = kept[j][r0:r1], kept.maxima[j, r0:r1]
            else:
                logits.slab(x[r0:r1], W, c0, slab)
            slab_gradient(slab, c0, part, exps=exps, shift=shift, cap=logits.cap, spare=other)
            if db is not None:
                db[c0:c1] += slab.sum(0)
            d = slab.to(W.dtype)
            if dX is not None:
                product(d, W, out=dX[r0:r1], accumulate=True)
            if sums is not None:
                dest = sums[: c1 - c0] if narrow else sums[c0:c1]
                product(d.t(), x[r0:r1], out=dest, accumulate=r0 > 0)
            del d
        if narrow and M:
            dW[c0:c1].copy_(sums[: c1 - c0])
        del W
    return dX, dW, db
