"""Which groups each optimizer step takes, and after which steps something is due."""

import functools
import math
from dataclasses import dataclass

import torch

from fastpref.train.config import TrainConfig


@dataclass(frozen=True)
class Plan:
    """Which groups each optimizer step takes: a pure function of the seed and the step."""

    num_groups: int
    per_step: int
    total_steps: int
    seed: int
    shuffle: bool

    @classmethod
    def of(cls, config: TrainConfig, num_groups: int, world_size: int) -> "Plan":
        per_step = (
            config.per_device_train_batch_size * config.gradient_accumulation_steps * world_size
        )
        epochs = math.ceil(math.ceil(num_groups / per_step) * config.num_train_epochs)
        total = config.max_steps if config.max_steps > 0 else epochs
        shuffle = config.train_sampling_strategy == "random"
        return cls(num_groups, per_step, total, config.seed, shuffle)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_groups / self.per_step)

    def indices(self, step: int) -> list[int]:
        """The groups of a step, counted from 0; the last step of an epoch may hold fewer."""
        epoch, within = divmod(step, self.steps_per_epoch)
        first = within * self.per_step
        last = min(first + self.per_step, self.num_groups)
        if not self.shuffle:
            return list(range(first, last))
        return epoch_order(self.num_groups, self.seed, epoch)[first:last]


@functools.lru_cache(maxsize=2)
def epoch_order(num_groups: int, seed: int, epoch: int) -> list[int]:
    """The shuffled order of an epoch's groups."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order: list[int] = torch.randperm(num_groups, generator=generator).tolist()
    return order


def moments(config: TrainConfig, plan: Plan, strategy: str, key: str) -> set[int]:
    """The steps, counted from 1, after which something is due; the last one always."""
    total = plan.total_steps
    if strategy == "no":
        return set()
    every = plan.steps_per_epoch if strategy == "epoch" else config.every(key, total)
    return {*range(every, total, every), total}


def eval_strategy(config: TrainConfig, given: bool) -> str:
    """What eval_strategy means where it is not set; ``given``: an evaluation data set is there."""
    if config.eval_strategy is not None:
        return config.eval_strategy
    if config.eval_steps is not None:
        return "steps"
    return "epoch" if given else "no"
