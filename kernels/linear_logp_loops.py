"""linear_logp's loops of matrix products over tiles of a plan, around the row functions.

Letters as in linear_logp.py. The forward walks tiles of rows, and in each the slabs of columns; the
backward walks slabs of columns over all rows, so that each slab of dW is rounded once.
"""

from torch import Tensor

from fastpref.kernels.active_columns import ActiveColumns
from fastpref.kernels.linear_logp_plan import Case, Plan, pitch
from fastpref.kernels.logits import IGNORE_INDEX, Transform, tiles
from fastpref.kernels.logp_rows import RowGrads, Rows, gradient_rows
from fastpref.kernels.product import operand, product
from fastpref.kernels.vocab_parallel import combine


def _take(hidden: Tensor, rows: Tensor | None, target: Tensor, start: int, stop: int) -> Tensor:
    if rows is None:
        return operand(hidden[start:stop])
    x = hidden.index_select(0, rows[start:stop])
    # an ignored row may hold NaN, and 0 * NaN is NaN
    return operand(x.masked_fill_((target[start:stop] == IGNORE_INDEX)[:, None], 0.0))


def _slab(buffer: Tensor, rows: int, columns: int) -> Tensor:
    """(rows, columns) at the start of a flat buffer, every row in whole words."""
    step = pitch(columns)
    return buffer[: rows * step].view(rows, step)[:, :columns]


class Kept:
    """Exponentials of the first slabs, each (M, width), and their row maxima, each (M,)."""

    def __init__(self, flat: Tensor, maxima: Tensor, cut: Plan, M: int, V: int) -> None:
        self.flat, self.width, self.M, self.V = flat, cut.width, M, V
        self.maxima = maxima[: cut.kept * M].view(cut.kept, M)

    def __contains__(self, j: int) -> bool:
        return j < len(self.maxima)

    def __getitem__(self, j: int) -> Tensor:
        start = j * self.width
        return _slab(self.flat[self.M * start :], self.M, min(self.width, self.V - start))

    def fill_padding(self) -> None:
        """Make what no slab covers the same in every run: an op's outputs are compared whole."""
        self.flat[-2:] = 0
        last, columns = divmod(self.V, self.width)
        if columns and last in self:
            start = self.M * last * self.width
            self.flat[start:-2].view(self.M, pitch(columns))[:, columns:] = 0


class _RowMatrices:
    """Gradient of logp (and entropy) in hidden, per row: all a frozen head has to remember.

    Sums over columns leave the label out, whose share -expm1(logp) W[y] is exact where p is near 1.
    """

    def __init__(self, out: Tensor, weight: Tensor, transform: Transform) -> None:
        self.sums, self.weight, self.transform = out.zero_(), weight, transform

    def shift(self, rows: Rows) -> None:
        """Follow the maximum from the last one to the newest."""
        drop, shrink = (x.to(self.sums.dtype)[:, None] for x in (rows.drop, rows.shrink))
        if len(self.sums) == 2:  # a weighted sum shifts by the plain one before that changes
            self.sums[1].addcmul_(self.sums[0], drop)
        self.sums.mul_(shrink)

    def add(self, parts: list[Tensor], rows: Rows, W: Tensor) -> None:
        """Add a slab: exps, with an entropy gradient exps * (z - max)."""
        self.shift(rows)
        for part, out in zip(parts, self.sums, strict=True):
            product(part.to(W.dtype), W, out=out, accumulate=True)

    def finish(self, rows: Rows, stats: dict[str, Tensor]) -> None:
        total, logp = rows.total[:, None].to(self.sums.dtype), stats["logp"]
        V = len(self.weight)
        label = self.weight.index_select(0, rows.target.clamp(0, V - 1)).to(total.dtype)
        label.masked_fill_((rows.target == V)[:, None], 0.0)  # another rank's
        if self.transform.cap is not None:
            tanh = (logp + stats["log_total"] + stats["max"]) / self.transform.cap
            label.mul_((1 - tanh**2)[:, None])
        self.sums.div_(total)
        if len(self.sums) == 2:
            mean = rows.entropy[:, None].to(total.dtype) / total
            share = logp.exp() * (logp + stats["entropy"])
            self.sums[1].addcmul_(self.sums[0], mean, value=-1).addcmul_(label, share[:, None])
            self.sums[1].neg_()
        self.sums[0].neg_().addcmul_(label, -logp.expm1()[:, None])
        self.sums.mul_(self.transform.slope)


class _Scratch:
    """The slabs of a forward's tile."""

    def __init__(self, hidden: Tensor, case: Case, cut: Plan) -> None:
        size = cut.rows * cut.width
        self.case, self.slabs = case, [hidden.new_empty(size, dtype=d) for d in case.slabs]

    def parts(self, rows: int, columns: int, kept: Tensor | None) -> dict[str, Tensor | None]:
        """Where raw products go and where the row functions write, as Rows.add names it."""
        case = self.case
        raw, *beside = (_slab(buffer, rows, columns) for buffer in self.slabs)
        exps = weighted = spare = None
        if not case.fused:
            exps = beside[0] if case.entropy else None
            if kept is not None and kept.dtype == case.wide:
                exps = kept
            weighted = raw if case.row_matrices == 2 else None
            spare = beside[-1] if case.frozen and case.capped else None
        elif case.frozen:
            exps, weighted = (*beside, raw, None)[:2]
            weighted = weighted if case.row_matrices == 2 else None
        else:
            exps = kept
        return {"raw": raw, "exps": exps, "weighted": weighted, "spare": spare}


def forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    rows: Tensor | None,
    transform: Transform,
    case: Case,
    cut: Plan,
    names: tuple[str, ...],
    out: dict[str, Tensor],
    kept: Kept,
    matrices: Tensor,
    group: str,
) -> None:
    V = len(weight)
    scratch = _Scratch(hidden, case, cut)
    for r0, r1 in tiles(len(target), cut.rows):
        x = _take(hidden, rows, target, r0, r1)
        state = Rows(target[r0:r1], case.wide, names, case.backend)
        frozen = _RowMatrices(matrices[:, r0:r1], weight, transform) if case.frozen else None
        for j, (c0, c1) in enumerate(tiles(V, cut.width)):
            W = operand(weight[c0:c1])
            keep, shift = (kept[j][r0:r1], kept.maxima[j, r0:r1]) if j in kept else (None, None)
            parts = scratch.parts(r1 - r0, c1 - c0, keep)
            product(x, W.t(), out=parts["raw"])
            options = {"shift": shift, "slopes": case.frozen, **parts}
            state.add(start=c0, transform=transform.columns(c0, c1), **options)
            exps = parts["raw"] if parts["exps"] is None else parts["exps"]
            if keep is not None and exps is not keep:
                keep.copy_(exps)
            if frozen is not None:
                frozen.add([exps, parts["weighted"]][: case.row_matrices], state, W)
            del W
        columns = V
        if group:
            columns = combine(state.state, V, group)
            if frozen is not None:
                frozen.shift(state)
        stats = {name: value[r0:r1] for name, value in out.items()}
        state.finish(columns, stats)
        if frozen is not None:
            frozen.finish(state, stats)
        del x  # before the next tile's is gathered


def backward_slabs(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    transform: Transform,
    case: Case,
    cut: Plan,
    grads: RowGrads,
    kept: Kept,
    skip: ActiveColumns | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    M, H, V = len(grads.target), hidden.shape[1], len(weight)
    x = _take(hidden, rows, grads.target, 0, M)
    dX = x.new_zeros((M, H), dtype=case.wide) if case.grad_hidden else None
    dW = weight.new_empty((V, H)) if case.grad_weight else None
    db = x.new_zeros(V, dtype=case.wide) if case.grad_bias else None
    if M == 0 and dW is not None:
        dW.zero_()
    size = cut.rows_backward * cut.width
    written = x.new_empty(size, dtype=case.written)
    beside = case.written != case.wide  # products do not fit where their gradient goes
    raw = x.new_empty(cut.rows * cut.width, dtype=case.wide) if beside else None
    two = not case.fused and (case.grad_entropy or case.capped)
    spare = x.new_empty(size, dtype=case.wide) if two else None
    # rounded once: a slab of dW is summed over every row in a wide dtype
    upcast = dW is not None and dW.dtype != case.operand
    packs = dW is not None and (upcast or skip is not None)
    sums = x.new_empty((cut.width, H), dtype=case.wide if upcast else dW.dtype) if packs else dW
    for j, (c0, c1) in enumerate(tiles(V, cut.width)):
        W, width = operand(weight[c0:c1]), c1 - c0
        active = skip.of(kept[j], kept.maxima[j], c0) if skip and j in kept else None
        if active is not None:
            W = W.index_select(0, active)
        for r0, r1 in tiles(M, cut.rows_backward):
            d = _slab(written, r1 - r0, width)
            for t0, t1 in tiles(r1 - r0, M if j in kept else cut.rows):
                out, part = d[t0:t1], slice(r0 + t0, r0 + t1)
                if j in kept:
                    source, shift = kept[j][part], kept.maxima[j, part]
                else:
                    source = out if raw is None else _slab(raw, t1 - t0, width)
                    shift = None
                    product(x[part], W.t(), out=source)
                gradient_rows(
                    source,
                    c0,
                    grads.rows(part),
                    out,
                    transform.columns(c0, c1),
                    case.backend,
                    shift=shift,
                    spare=None if spare is None else _slab(spare, t1 - t0, width),
                )
            if db is not None:
                db[c0:c1] += d.sum(0, dtype=case.wide)
            d = (d if active is None else d.index_select(1, active)).to(W.dtype)
            if dX is not None:
                product(d, W, out=dX[r0:r1], accumulate=True)
            if sums is not None:
                dest = sums[: len(W)] if packs else sums[c0:c1]
                product(d.t(), x[r0:r1], out=dest, accumulate=r0 > 0)
            del d
        if packs and M and active is None:
            dW[c0:c1].copy_(sums[:width])
        elif packs and M:
            dW[c0:c1].zero_().index_copy_(0, active, sums[: len(W)].to(dW.dtype))
        del W
    return dX, dW, db
