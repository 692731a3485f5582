"""The softmax-row functions of the log-prob ops, in torch and, for the CPU, in csrc/logp_rows.cpp.

logp = z[y] - logsumexp(z) of each of R rows of z, the logits over the temperature. A slab is a
block of columns of z in fp32 (fp64 for fp64); what a row needs is carried from slab to slab.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.kernels.native import has_native

IGNORE_INDEX = -100
_LOWEST = -1e30  # finite: -inf - -inf is NaN


def tiles(size: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size, max(step, 1)):
        yield start, min(start + step, size)


class Rows:
    """What R rows carry from slab to slab; every sum is relative to the running maximum."""

    def __init__(self, target: Tensor, dtype: torch.dtype, outputs: tuple[str, ...]) -> None:
        self.target, self.outputs = target.contiguous(), outputs
        self.native = has_native(target.device.type)
        self.dtype = dtype
        carried = torch.float64 if self.native else dtype
        # two rows without a name: what the last call to add returned
        self.state = target.new_zeros((8, len(target)), dtype=carried)
        self.state[0] = _LOWEST
        self.max, self.total, self.label, self.logits, self.weighted, self.squares = self.state[:6]

    def add(
        self, z: Tensor, start: int, out: Tensor | None, *, weighted: bool = False, scale: float = 1
    ) -> tuple[Tensor, Tensor]:
        """Take columns ``start:`` of scale * z; ``out`` gets exp(scale * z - max).

        With ``weighted`` z becomes out * (scale * z - max). Torch takes z as scratch, and needs an
        ``out`` that with the entropy is not z; C++ leaves z alone otherwise, and needs no ``out``.
        Returns the logarithm of what sums relative to the old maximum shrink by, and that factor.
        """
        wanted = [name in self.outputs for name in ("entropy", "mean_logit", "log_sum_sq_probs")]
        if self.native:
            kept = out, z if weighted else None
            torch.ops.fastpref_rows.add(z, start, self.target, scale, self.state, *kept, *wanted)
            drop, shrink = self.state[6:].to(self.dtype)
            return drop, shrink
        if scale != 1.0:
            z.mul_(scale)
        where, inside = label_columns(self.target, start, z.shape[1])
        self.label = torch.where(inside, z.gather(1, where)[:, 0], self.label)
        if "mean_logit" in self.outputs:
            self.logits = self.logits + z.sum(1)
        new_max = torch.maximum(self.max, z.amax(1))
        drop = self.max - new_max
        self.max = new_max
        z.sub_(new_max[:, None])
        if "entropy" in self.outputs:
            z.clamp_(min=_LOWEST)  # 0 * -inf is NaN
        torch.exp(z, out=out)
        shrink = drop.exp()
        if "entropy" in self.outputs:
            shifted = self.weighted + drop * self.total
            self.weighted = shrink * shifted + z.mul_(out).sum(1)
        if "log_sum_sq_probs" in self.outputs:
            norm = torch.linalg.vector_norm(out, dim=1)
            self.squares = shrink * shrink * self.squares + norm * norm
        self.total = shrink * self.total + out.sum(1)
        return drop, shrink

    def finish(self, num_columns: int) -> dict[str, Tensor]:
        """``max`` and ``log_total``, whose sum is the log-sum-exp, and the statistics by name.

        Statistics are exactly 0 where ignored.
        """
        log_total = self.total.log()
        # (label - max) first: both are logits, their difference is exact where it matters
        stats = {"logp": (self.label - self.max) - log_total}
        if "entropy" in self.outputs:
            stats["entropy"] = log_total - self.weighted / self.total
        if "mean_logit" in self.outputs:
            stats["mean_logit"] = self.logits / num_columns
        if "log_sum_sq_probs" in self.outputs:
            stats["log_sum_sq_probs"] = (self.squares / self.total**2).log()
        keep = self.target != IGNORE_INDEX
        stats = {name: value.where(keep, 0.0) for name, value in stats.items()}
        if "is_top1" in self.outputs:
            stats["is_top1"] = (self.label == self.max) & keep
        return stats | {"max": self.max, "log_total": log_total}


def label_columns(target: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """(R, 1) column of each target in a slab, clamped into it, and (R,) whether it lies inside."""
    column = target - start
    return column.clamp(0, width - 1)[:, None], (column >= 0) & (column < width)


def set_labels(slab: Tensor, target: Tensor, start: int, value: Tensor | float) -> None:
    """Write ``value`` (R,) into each row's target column, where it lies in the slab."""
    where, inside = label_columns(target, start, slab.shape[1])
    old = slab.gather(1, where)[:, 0]
    slab.scatter_(1, where, torch.where(inside, value, old)[:, None])


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
        factor: float,
    ) -> "RowGrads":
        """``factor`` is d z / d logits; ``entropy`` is empty where it was not asked for."""
        keep = target != IGNORE_INDEX
        g = torch.zeros_like(logp) if dlogp is None else (dlogp * factor).where(keep, 0.0)
        values = [logp, max, log_total, g]  # max and log_total apart: their sum would round
        if dentropy is not None:
            values += [(dentropy * factor).where(keep, 0.0), entropy]
        return cls(target.contiguous(), torch.stack(values))

    @property
    def with_entropy(self) -> bool:
        return len(self.values) == 6

    def rows(self, start: int, stop: int) -> "RowGrads":
        return RowGrads(self.target[start:stop], self.values[:, start:stop])


def slab_gradient(
    slab: Tensor,
    start: int,
    rows: RowGrads,
    *,
    exps: Tensor | None = None,
    shift: Tensor | None = None,
    cap: float | None = None,
    spare: Tensor | None = None,
) -> Tensor:
    """Overwrite ``slab``, columns ``start:``, with the gradient of its rows.

    Without ``exps`` the slab holds z. With it the slab is only written: exps = exp(z - shift).
    ``cap`` is the softcap in units of z; with it or an entropy gradient torch needs ``spare``, a
    scratch slab.
    """
    if has_native(slab.device.type):
        native_gradient(slab if exps is None else exps, start, rows, slab, shift=shift, cap=cap)
        return slab
    logp, top, log_total, dlogp, *rest = rows.values
    if exps is None:
        exps, shift = slab.sub_(top[:, None]).exp_(), top
    scale = ((shift - top) - log_total)[:, None]  # log p = log exps + scale
    at_label = -dlogp * logp.expm1()  # not from the slab: 1 - p is lost where p is near 1
    if not rows.with_entropy and cap is None:
        factor = -dlogp[:, None] * scale.exp()
        if exps.dtype == slab.dtype:
            torch.mul(exps, factor, out=slab)
        else:
            slab.copy_(exps).mul_(factor)
        set_labels(slab, rows.target, start, at_label)
        return slab
    if exps is not slab:
        slab.copy_(exps)
    torch.clamp(slab, min=torch.finfo(slab.dtype).tiny, out=spare).log_()  # finite where p is 0
    spare.add_(scale)
    slab.mul_(scale.exp())
    lse = top + log_total
    if cap is not None:
        bend_gradient(slab, spare.add_(lse[:, None]).mul_(1 / cap))
        spare.mul_(cap).sub_(lse[:, None])
    if not rows.with_entropy:
        slab.mul_(-dlogp[:, None])
    else:
        dentropy, entropy = rest
        slope = spare.add_(entropy[:, None]).mul_(-dentropy[:, None]).sub_(dlogp[:, None])
        slab.mul_(slope)
        at_label = at_label - dentropy * logp.exp() * (logp + entropy)
    if cap is not None:
        at_label = at_label * (1 - ((logp + lse) / cap) ** 2)
    set_labels(slab, rows.target, start, at_label)
    return slab


def native_gradient(
    source: Tensor,
    start: int,
    rows: RowGrads,
    out: Tensor,
    *,
    shift: Tensor | None = None,
    scale: float = 1.0,
    cap: float | None = None,
) -> None:
    """The same in C++ from scale * z, or with ``shift`` from exponentials; 0 in ignored rows."""
    args = (source, shift, start, *rows, rows.with_entropy, scale, cap or 0.0, out)
    torch.ops.fastpref_rows.gradient(*args)


def bend_gradient(slab: Tensor, tanh: Tensor) -> Tensor:
    """``slab *= 1 - tanh**2``, the derivative of the softcap, without a temporary."""
    return slab.addcmul_(slab, tanh).addcmul_(slab, tanh, value=-1)
