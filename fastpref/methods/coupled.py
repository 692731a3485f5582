"""Losses that couple a step: their gradient in every log-prob, from a pass without gradients.

All values of the step are gathered over micro-batches and ranks, the losses are differentiated in
them, and each micro-batch then backpropagates its own share. A token budget changes nothing.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.methods.base import Facts, Method, Metrics, Values

# of moments that move, as alpha-DPO has them
DECAY = 0.9
# (n, K) of this rank -> (all ranks' rows, the number of the first of its own)
Gather = Callable[[Tensor], tuple[Tensor, int]]


class Whole(NamedTuple):
    """The values of a whole step, fp64, and which of them are this rank's."""

    values: Values
    start: int
    sizes: list[int]
    """Of the micro-batches."""


def gathered(parts: Sequence[Values], gather: Gather) -> Whole:
    """The values of all micro-batches of all ranks, from those of this rank's; one collective."""
    names = list(parts[0])
    own = torch.stack([torch.cat([part[name] for part in parts]).double() for name in names], 1)
    rows, start = gather(own)
    sizes = [len(part[names[0]]) for part in parts]
    return Whole(dict(zip(names, rows.unbind(1), strict=True)), start, sizes)


def differentiate(
    method: Method, whole: Whole, facts: Facts
) -> tuple[list[Values], Tensor, Metrics]:
    """(dL/dvalue of each micro-batch of this rank, the step's sum of losses, its metrics)."""
    leaves = {name: x.detach().requires_grad_() for name, x in whole.values.items()}
    with torch.enable_grad():
        loss, metrics = method.loss(leaves, facts)
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    gradients = {name: g for name, g in zip(leaves, found, strict=True) if g is not None}
    shares: list[Values] = []
    at = whole.start
    for size in whole.sizes:
        shares.append({name: g[at : at + size] for name, g in gradients.items()})
        at += size
    return shares, loss.detach(), metrics


def as_tensor(value: Tensor | float, like: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)


def moving_moments(moving: Facts, name: str, values: Tensor) -> dict[str, Tensor]:
    """Mean and deviation of values that move with DECAY, over the weights so far.

    The deviation is around the moving mean: a step of one value has none of its own.
    """
    now = {"weight": torch.ones_like(values), "sum": values, "squares": values**2}
    sums = {
        f"{name}_{key}": DECAY * as_tensor(moving.get(f"{name}_{key}", 0.0), x) + x.mean()
        for key, x in now.items()
    }
    weight, total, squares = sums.values()
    mean = total / weight
    deviation = (squares / weight - mean**2).clamp(min=0).sqrt()
    return {**sums, f"{name}_mean": mean, f"{name}_std": deviation}


def running_mean(moving: Facts, name: str, values: Tensor) -> dict[str, Tensor]:
    """The mean of all values seen so far, and how many they are."""
    old, seen = (as_tensor(moving.get(key, 0.0), values) for key in (name, f"{name}_seen"))
    count = seen + len(values)
    return {name: old + (values - old).sum() / count, f"{name}_seen": count}


def surrogate(values: Values, gradients: Values) -> Tensor:
    """A sum whose gradient in the model is the loss's."""
    parts = [
        (values[name] * g.to(values[name])).sum()
        for name, g in gradients.items()
        if name in values and values[name].requires_grad
    ]
    return torch.stack(parts).sum()
