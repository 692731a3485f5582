"""The row functions of logp_rows in plain torch, for any device."""

import torch
from torch import Tensor

from fastpref.kernels.logits import IGNORE_INDEX, Transform

LOWEST = -1e30  # of distances: finite, since 0 * -inf is NaN


def add_rows(
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
    spare: Tensor | None,
) -> None:
    """Carry ``state`` over columns ``start:``; ``raw`` is scratch, and ``weighted`` if that is."""
    z = transform.apply_(raw)
    top, total, label, logits, entropy, squares, drop, shrink = state
    where, inside = _label_columns(target, start, z.shape[1])
    label.copy_(torch.where(inside, z.gather(1, where)[:, 0], label))
    if "mean_logit" in outputs:
        logits.add_(z.sum(1))
    if spare is not None and transform.cap is not None:
        torch.mul(z, 1 / transform.cap, out=spare)
    new_top = torch.maximum(top, z.amax(1))
    torch.sub(top, new_top, out=drop).clamp_(min=LOWEST)
    torch.exp(drop, out=shrink)
    top.copy_(new_top)
    z.sub_(top[:, None])
    if "entropy" in outputs:
        z.clamp_(min=LOWEST)
    exps = torch.exp(z, out=z if exps is None else exps)
    if "entropy" in outputs:
        entropy.addcmul_(drop, total).mul_(shrink).add_(z.mul_(exps).sum(1))
    if "log_sum_sq_probs" in outputs:
        norm = torch.linalg.vector_norm(exps, dim=1)
        squares.mul_(shrink).mul_(shrink).addcmul_(norm, norm)
    total.mul_(shrink).add_(exps.sum(1))
    for part in (exps, weighted) if slopes else ():
        if part is not None:
            _set_labels(part, target, start, 0.0)
            if transform.cap is not None:
                _bend(part, spare)


def finish_rows(
    state: Tensor, target: Tensor, num_columns: int | Tensor, out: dict[str, Tensor]
) -> None:
    top, total, label, logits, entropy, squares, *_ = state
    log_total = total.log()
    # (label - max) first: both are logits, their difference is exact where it matters
    found = {"logp": (label - top) - log_total}
    if "entropy" in out:
        found["entropy"] = log_total - entropy / total
    if "mean_logit" in out:
        found["mean_logit"] = logits / num_columns
    if "log_sum_sq_probs" in out:
        found["log_sum_sq_probs"] = (squares / total**2).log()
    if "is_top1" in out:
        found["is_top1"] = label == top
    keep = target != IGNORE_INDEX
    for name, value in found.items():
        out[name].copy_(value.where(keep, 0))
    out["max"].copy_(top)
    out["log_total"].copy_(log_total)


def gradient_rows(
    source: Tensor,
    start: int,
    target: Tensor,
    values: Tensor,
    out: Tensor,
    transform: Transform,
    *,
    shift: Tensor | None,
    spare: Tensor | None,
) -> None:
    """Gradient into ``out`` in the wide dtype: over ``source`` without ``shift``."""
    logp, top, log_total, dlogp, *rest = values
    cap = transform.cap
    if shift is None:
        shift = top
        source = transform.apply_(source).sub_(top[:, None]).exp_()
    scale = ((shift - top) - log_total)[:, None]  # log p = log exps + scale
    at_label = -dlogp * logp.expm1()  # not from the slab: 1 - p is lost where p is near 1
    if out is not source:
        out.copy_(source)
    if not rest and cap is None:
        out.mul_(-dlogp[:, None] * scale.exp())
        return _set_labels(out, target, start, at_label)
    torch.clamp(out, min=torch.finfo(out.dtype).tiny, out=spare).log_()  # finite where p is 0
    out.mul_(scale.exp())
    if cap is not None:
        _bend(out, spare.add_(shift[:, None]).mul_(1 / cap))
        spare.mul_(cap).sub_(shift[:, None])
    spare.add_(scale)
    if not rest:
        out.mul_(-dlogp[:, None])
    else:
        dentropy, entropy = rest
        out.mul_(spare.add_(entropy[:, None]).mul_(-dentropy[:, None]).sub_(dlogp[:, None]))
        at_label = at_label - dentropy * logp.exp() * (logp + entropy)
    if cap is not None:
        tanh = ((logp + log_total) + top) / cap  # small ones first: near 1 it is squared
        at_label = at_label * (1 - tanh**2)
    return _set_labels(out, target, start, at_label)


def _label_columns(target: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """(R, 1) column of each target in a slab, clamped into it, and (R,) whether it lies inside."""
    column = target - start
    return column.clamp(0, width - 1)[:, None], (column >= 0) & (column < width)


def _set_labels(slab: Tensor, target: Tensor, start: int, value: Tensor | float) -> None:
    where, inside = _label_columns(target, start, slab.shape[1])
    old = slab.gather(1, where)[:, 0]
    slab.scatter_(1, where, torch.where(inside, value, old)[:, None])


def _bend(slab: Tensor, tanh: Tensor) -> None:
    # the derivative of the softcap, without a temporary
    slab.addcmul_(slab, tanh).addcmul_(slab, tanh, value=-1)
