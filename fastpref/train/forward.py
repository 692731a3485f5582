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
from fastpref.models.router import (
    RouterLoad,
    add_loads,
    balancing_loss,
    recorded_load,
    whole_load,
)
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
    router_coef: float = 0.0
    """Factor of the load-balancing loss of the model's routers."""

    def score(self, batch: Batch, *, compare: bool = True, counts: bool = True) -> Scored:
        """A forward of the model, and of the reference unless its scores are known.

        Args:
            counts: whether anything of it does; else the batch only keeps step with other ranks.
        """
        batch = batch.to(self.engine.device, non_blocking=True)
        if compare:
            batch = with_reference(self.engine, self.method, self.reference, batch)
        model = self.engine.model
        with self.engine.autocast(), recorded_load(model, bool(self.router_coef)) as loads:
            scored = self.method.score(model, batch, self.reference)
        load = loads[0] if loads else None
        if counts:
            return scored._replace(load=load)
        values = {name: x[:0] for name, x in scored.values.items()}
        return Scored(values, {}, load and load.nothing())

    def alone(self, part: Micro, scored: Scored, known: Facts) -> Part:
        """A micro-batch whose losses need no other."""
        if not part.groups:
            nothing = no_loss(scored.values)
            return Part(nothing, nothing.detach(), [], {})
        loss, metrics = self.method.loss(scored.values, {**known, **self.moving})
        return Part(loss, loss.detach(), part.groups, {**metrics, **scored.metrics})

    def step(self, parts: Sequence[Micro], known: Facts, count: float) -> Iterator[Part]:
        """The micro-batches of an optimizer step, one forward after the other.

        Where losses couple groups that no one forward holds, a pass without gradients finds what
        each of them has to know; the step's sum of losses then comes with the first part. The
        routers' loss couples too, but needs the trunk alone.

        Args:
            count: what the sum of all parts' losses, over all ranks, will be divided by.
        """
        split = len(parts) > 1 or self.engine.world_size > 1
        if split and self.method.couples:
            yield from self.coupled(parts, known, count)
            return
        whole = self.load_of_step(parts) if split and self.router_coef else None
        for part in parts:
            scored = self.score(part.batch, counts=bool(part.groups))
            if part.groups:
                self.moving = self.method.observe(self.moving, scored.values)
            yield self.balanced(self.alone(part, scored, known), scored.load, whole, count)

    def coupled(self, parts: Sequence[Micro], known: Facts, count: float) -> Iterator[Part]:
        with torch.no_grad():
            found = [self.score(part.batch, counts=bool(part.groups)) for part in parts]
        whole = gathered([scored.values for scored in found], self.engine.all_gather)
        loads = [scored.load for scored in found if scored.load is not None]
        load = whole_load(loads, self.engine.all_reduce_sum) if loads else None
        self.moving = self.method.observe(self.moving, whole.values)
        shares, value, metrics = differentiate(self.method, whole, {**known, **self.moving})
        groups, of_step = [g for part in parts for g in part.groups], self.shared(metrics)
        for part, share in zip(parts, shares, strict=True):
            # the routers' loss is of every token that a forward of the whole step would hold
            again = part.batch if loads else part.trained
            scored = self.score(again, compare=False, counts=bool(part.groups))
            loss = surrogate(scored.values, share) if part.groups else no_loss(scored.values)
            metrics = {**of_step, **scored.metrics}
            own = Part(loss, value / self.engine.world_size, groups, metrics)
            yield self.balanced(own, scored.load, load, count)
            value, groups, of_step = torch.zeros_like(value), [], {}

    @torch.no_grad()
    def load_of_step(self, parts: Sequence[Micro]) -> RouterLoad:
        """How the routers spread the tokens of all parts and ranks; nothing is scored."""
        model, loads = self.engine.model, []
        for part in parts:
            with self.engine.autocast(), recorded_load(model, True) as found:
                model.hidden(part.batch.to(self.engine.device, non_blocking=True))
            loads += found if part.groups else [found[0].nothing()]
        return whole_load(loads, self.engine.all_reduce_sum)

    def balanced(
        self, part: Part, load: RouterLoad | None, whole: RouterLoad | None, count: float
    ) -> Part:
        """The part with its share of the routers' loss, which ``count`` will not divide.

        Args:
            load: of the part; None: no such loss is trained.
            whole: of the step; None: the part is all of it.
        """
        if load is None:
            return part
        whole = load if whole is None else whole
        aux_loss = balancing_loss(load, whole)
        added = self.router_coef * count * aux_loss
        metrics = {**part.metrics, "aux_loss": (aux_loss.detach(), load.rows / whole.rows)}
        return Part(part.loss + added, part.value + added.detach(), part.groups, metrics)

    @torch.no_grad()
    def evaluate(
        self, parts: Iterable[Micro], known: Facts, count: float, on_batch: Callable[[], None]
    ) -> Iterator[Part]:
        """The batches of an evaluation; ``on_batch`` is called before each forward.

        Args:
            count: what the sum of all parts' losses, over all ranks, will be divided by.
        """
        zero = torch.zeros((), device=self.engine.device)
        values: list[Values] = []
        loads: list[RouterLoad] = []
        groups: list[Group] = []
        for part in parts:
            on_batch()
            scored = self.score(part.batch, counts=bool(part.groups))
            if scored.load is not None:
                loads.append(scored.load)
            if not self.method.couples:
                yield self.alone(part, scored, known)
                continue
            values.append(scored.values)
            groups += part.groups
            yield Part(zero, zero, [], scored.metrics)
        if values:
            whole = gathered(values, self.engine.all_gather)
            loss, metrics = self.method.loss(whole.values, {**known, **self.moving})
            yield Part(loss, loss / self.engine.world_size, groups, self.shared(metrics))
        if loads:
            load = whole_load(loads, self.engine.all_reduce_sum)
            yield self.balanced(Part(zero, zero, [], {}), add_loads(loads), load, count)

    def shared(self, metrics: Metrics) -> Metrics:
        """A rank's share of metrics that every rank has of the whole step."""
        world = self.engine.world_size
        return {name: (total / world, count / world) for name, (total, count) in metrics.items()}


def no_loss(values: Values) -> Tensor:
    """0, differentiable in the values: a backward then runs through the whole model."""
    return torch.stack([x[:0].sum() for x in values.values() if x.is_floating_point()]).sum()
