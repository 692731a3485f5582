"""From groups to losses: what a step and an evaluation ask of the model."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.data.packing import Batch
from fastpref.data.tokenize import Group
from fastpref.methods.base import Facts, Method, Metrics, Scored, Values
from fastpref.methods.coupled import differentiate, gathered, surrogate
from fastpref.models.model import LogpModel
from fastpref.train.engine import Engine
from fastpref.train.feed import Groups, Micro
from fastpref.train.reference import with_reference


class Part(NamedTuple):
    """A share of a step or of an evaluation."""

    loss: Tensor
    """What to differentiate; 0-d."""
    value: Tensor
    """The sum of the losses; 0-d, detached."""
    groups: Groups
    """Whose losses they are."""
    metrics: Metrics


@dataclass
class Forward:
    """The model, a method, and what the method remembers from step to step."""

    engine: Engine
    method: Method
    reference: LogpModel | None = None
    moving: dict[str, Tensor] = field(default_factory=dict)

    def score(self, batch: Batch, *, compare: bool = True) -> Scored:
        """A forward of the model, and of the reference unless its scores are known."""
        batch = batch.to(self.engine.device, non_blocking=True)
        if compare:
            batch = with_reference(self.engine, self.method, self.reference, batch)
        with self.engine.autocast():
            return self.method.score(self.engine.model, batch, self.reference)

    def alone(self, part: Micro, known: Facts, *, observe: bool) -> Part:
        """A micro-batch whose losses need no other."""
        scored = self.score(part.batch)
        if not part.groups:
            nothing = no_loss(scored.values)
            return Part(nothing, nothing.detach(), [], {})
        if observe:
            self.moving = self.method.observe(self.moving, scored.values)
        loss, metrics = self.method.loss(scored.values, {**known, **self.moving})
        return Part(loss, loss.detach(), part.groups, {**metrics, **scored.metrics})

    def step(self, parts: Sequence[Micro], known: Facts) -> Iterator[Part]:
        """The micro-batches of an optimizer step, one forward after the other.

        Where losses couple groups that no one forward holds, a pass without gradients finds what
        each of them has to know; the step's sum of losses then comes with the first part.
        """
        split = len(parts) > 1 or self.engine.world_size > 1
        if not (split and self.method.couples):
            yield from (self.alone(part, known, observe=True) for part in parts)
            return
        with torch.no_grad():
            whole = gathered([self.values(part) for part in parts], self.engine.all_gather)
        self.moving = self.method.observe(self.moving, whole.values)
        shares, value, metrics = differentiate(self.method, whole, {**known, **self.moving})
        groups, of_step = [g for part in parts for g in part.groups], self.shared(metrics)
        for part, share in zip(parts, shares, strict=True):
            scored = self.score(part.trained, compare=False)
            loss = surrogate(scored.values, share) if part.groups else no_loss(scored.values)
            seen = scored.metrics if part.groups else {}
            yield Part(loss, value / self.engine.world_size, groups, {**of_step, **seen})
            value, groups, of_step = torch.zeros_like(value), [], {}

    def values(self, part: Micro) -> Values:
        """What the losses couple; no rows of a batch that only keeps step."""
        values = self.score(part.batch).values
        return values if part.groups else {name: x[:0] for name, x in values.items()}

    @torch.no_grad()
    def evaluate(
        self, parts: Iterable[Micro], known: Facts, on_batch: Callable[[], None]
    ) -> Iterator[Part]:
        """The batches of an evaluation; ``on_batch`` is called before each forward."""
        found: list[Values] = []
        groups: list[Group] = []
        for part in parts:
            on_batch()
            if not self.method.couples:
                yield self.alone(part, known, observe=False)
                continue
            scored = self.score(part.batch)
            rows = slice(None if part.groups else 0)
            found.append({name: x[rows] for name, x in scored.values.items()})
            groups += part.groups
            zero = torch.zeros((), device=self.engine.device)
            yield Part(zero, zero, [], scored.metrics if part.groups else {})
        if found:
            whole = gathered(found, self.engine.all_gather)
            loss, metrics = self.method.loss(whole.values, {**known, **self.moving})
            yield Part(loss, loss / self.engine.world_size, groups, self.shared(metrics))

    def shared(self, metrics: Metrics) -> Metrics:
        """A rank's share of metrics that every rank has of the whole step."""
        world = self.engine.world_size
        return {name: (total / world, count / world) for name, (total, count) in metrics.items()}


def no_loss(values: Values) -> Tensor:
    """0, differentiable in the values: a backward then runs through the whole model."""
    return torch.stack([x[:0].sum() for x in values.values() if x.is_floating_point()]).sum()
