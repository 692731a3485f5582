"""The softmax-row functions of the log-prob ops, one implementation per backend.

logp = z[y] - logsumexp(z) of each of R rows of z, logits over the temperature. A slab is a block of
columns; what a row needs is carried from slab to slab. In torch (logp_rows_torch), in C++ for the
CPU (csrc/logp_rows.cpp), in Triton for CUDA (logp_rows_triton).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.kernels import logp_rows_torch, logp_rows_triton
from fastpref.kernels.logits import IGNORE_INDEX, Transform


class Rows:
    """What R rows carry from slab to slab; every sum is relative to the running maximum."""

    def __init__(
        self, target: Tensor, dtype: torch.dtype, outputs: tuple[str, ...], backend: str
    ) -> None:
        self.target, self.outputs, self.backend = target.contiguous().view(-1), outputs, backend
        carried = torch.float64 if backend == "cpp" else dtype
        # maximum, total, label, sum of logits, of exps * (z - max), of squares; the last two are
        # what sums over the old maximum shrink by, its logarithm first
        self.state = target.new_zeros((8, target.numel()), dtype=carried)
        self.max, self.total, self.entropy = self.state[0], self.state[1], self.state[4]
        self.drop, self.shrink = self.state[6:]
        self.max.fill_(torch.finfo(dtype).min)  # finite: -inf - -inf is NaN

    def add(
        self,
        raw: Tensor,
        start: int,
        transform: Transform,
        *,
        exps: Tensor | None = None,
        weighted: Tensor | None = None,
        shift: Tensor | None = None,
        slopes: bool = False,
        spare: Tensor | None = None,
    ) -> None:
        """Take columns ``start:`` of raw products; ``exps`` gets exp(z - max), ``shift`` max.

        ``slopes``: exps times d z / d raw, over transform.slope, and 0 at the label; ``weighted``
        gets that times z - max. Torch takes raw as scratch: with the entropy it needs exps beside
        it, its weighted is raw, and with slopes and a cap it needs ``spare``.
        """
        args = (raw, start, self.target, self.state, transform, self.outputs)
        parts = {"exps": exps, "weighted": weighted, "slopes": slopes}
        if self.backend == "triton":
            logp_rows_triton.slab_rows(*args, **parts, shift=shift)
            return
        if self.backend == "torch":
            logp_rows_torch.add_rows(*args, **parts, spare=spare)
        else:
            wanted = (x in self.outputs for x in ("entropy", "mean_logit", "log_sum_sq_probs"))
            cut = (transform.scale, transform.cap or 0.0, transform.bias)
            torch.ops.fastpref_rows.add(*args[:4], *cut, *parts.values(), *wanted)
        if shift is not None:
            shift.copy_(self.max)

    def read(self, logits: Tensor, scale: float) -> None:
        """Take whole rows of scale * logits in place, of any strides that the backend knows."""
        if self.backend == "triton":
            logp_rows_triton.stream_rows(logits, self.target, self.state, scale, self.outputs)
        else:
            self.add(logits, 0, Transform(scale))

    def finish(self, num_columns: int | Tensor, out: dict[str, Tensor]) -> None:
        """Write statistics into the (R,) tensors of ``out``: 0 where ignored.

        ``max`` and ``log_total`` beside them, whose sum is the log-sum-exp.
        """
        fused = self.backend == "triton" and isinstance(num_columns, int)
        implementation = logp_rows_triton if fused else logp_rows_torch
        implementation.finish_rows(self.state, self.target, num_columns, out)


class RowGrads(NamedTuple):
    """What the gradient of R rows with respect to their logits needs."""

    target: Tensor
    values: Tensor  # (4, R), (6, R) with an entropy gradient

    @classmethod
    def of(
        cls,
        target: Tensor,
        logp: Tensor,
        max: Tensor,
        log_total: Tensor,
        entropy: Tensor,
        dlogp: Tensor | None,
        dentropy: Tensor | None,
        slope: float,
    ) -> "RowGrads":
        """``slope`` is the transform's; ``entropy`` is empty where it was not asked for."""
        keep = target != IGNORE_INDEX
        g = torch.zeros_like(logp) if dlogp is None else (dlogp * slope).where(keep, 0.0)
        values = [logp, max, log_total, g]  # max and log_total apart: their sum would round
        if dentropy is not None:
            values += [(dentropy * slope).where(keep, 0.0), entropy]
        return cls(target.contiguous(), torch.stack(values))

    @property
    def with_entropy(self) -> bool:
        return len(self.values) == 6

    def rows(self, part: slice) -> "RowGrads":
        return RowGrads(self.target[part], self.values[:, part])


def gradient_rows(
    source: Tensor,
    start: int,
    rows: RowGrads,
    out: Tensor,
    transform: Transform,
    backend: str,
    *,
    shift: Tensor | None = None,
    spare: Tensor | None = None,
    slab: bool = True,
) -> None:
    """Write the gradient of columns ``start:`` of raw products into ``out``.

    From the products, or with ``shift`` (R,) from their exp(z - shift). Torch needs an ``out`` in
    the wide dtype that without shift is the source, and with the entropy or a cap ``spare``.
    ``slab``: source and out are slabs of ours, whose padding may be written.
    """
    args = (source, start, *rows)
    if backend == "triton":
        logp_rows_triton.gradient_rows(*args, out, transform, shift=shift, slab=slab)
    elif backend == "torch":
        logp_rows_torch.gradient_rows(*args, out, transform, shift=shift, spare=spare)
    else:
        cut = (transform.scale, transform.cap or 0.0, transform.bias)
        torch.ops.fastpref_rows.gradient(*args, rows.with_entropy, shift, *cut, out)
