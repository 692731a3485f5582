"""Micro-batches packed on a thread of their own, ahead of the step that computes on them."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch

from fastpref.data.packing import Batch, pack
from fastpref.data.tokenize import Group
from fastpref.methods.base import Method

Groups = Sequence[Group]
Made = TypeVar("Made")


class Micro(NamedTuple):
    """A micro-batch on the host."""

    groups: Groups
    """Empty where a rank has nothing to do: its batch then keeps step with the other ranks."""
    batch: Batch
    trained: Batch
    """The part of it that a gradient reaches."""


def _enter(device: torch.device) -> None:
    # a thread that pins takes memory on its device, and the first is another rank's
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


class Feed:
    """One thread that packs, in the order in which it is asked.

    Args:
        method: says what of a group a gradient reaches.
        device: where batches will go: pinned memory reaches a GPU without a sync.
        share: whether completions share their prompt.
        filler: a group for ranks that have nothing to do.
    """

    def __init__(
        self,
        method: Method,
        device: torch.device,
        *,
        share: bool = True,
        filler: Group | None = None,
    ) -> None:
        self.method = method
        self.share = share
        self.pins = device.type == "cuda"
        self.filler = filler
        self.thread = ThreadPoolExecutor(1, "packing", _enter, (device,))

    def make(self, groups: Groups) -> Micro:
        filled = groups or [self.filler] if self.filler else groups
        batch = self.pack(filled)
        trained = [self.method.trained(group) for group in filled]
        whole = all(part is group for part, group in zip(trained, filled, strict=True))
        return Micro(groups, batch, batch if whole else self.pack(trained))

    def pack(self, groups: Groups) -> Batch:
        batch = pack(groups, share=self.share)
        return batch.pin_memory() if self.pins else batch

    def soon(self, make: Callable[[], Made]) -> Future[Made]:
        """What a call will give, once all that was asked for before is done."""
        return self.thread.submit(make)

    def ahead(self, parts: Iterable[Groups]) -> Iterator[Micro]:
        """The micro-batches of parts, the next one made while one is computed on."""
        waiting: deque[Future[Micro]] = deque()
        for part in parts:
            waiting.append(self.thread.submit(self.make, part))
            if len(waiting) > 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def close(self) -> None:
        """Drop what is not begun."""
        self.thread.shutdown(wait=True, cancel_futures=True)
