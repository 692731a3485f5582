"""Groups of a step -> micro-batches: full, no group split, as much work for every rank."""

import heapq
import math
from collections.abc import Sequence


def micro_batches(
    sizes: Sequence[int],
    costs: Sequence[float],
    *,
    ranks: int = 1,
    max_size: int | None = None,
    max_groups: int | None = None,
) -> list[list[list[int]]]:
    """Deal groups out to ranks and micro-steps: as few steps as the limits let there be.

    Every rank takes the same number of steps, and the micro-batches of one step cost about the same
    on all ranks. A function of its arguments alone.

    Args:
        sizes: packed tokens of each group.
        costs: of each group, in any unit (flop); a micro-batch costs their sum.
        ranks: number of ranks.
        max_size: most tokens in a micro-batch; None for no limit.
        max_groups: most groups in a micro-batch; None for no limit.

    Returns:
        For each rank, for each step, the numbers of its groups in ascending order. Where there are
        fewer groups than micro-batches, some are empty.

    Raises:
        ValueError: a limit or ``ranks`` below one, or a group larger than max_size.
    """
    for name, limit in (("ranks", ranks), ("max_size", max_size), ("max_groups", max_groups)):
        if limit is not None and limit < 1:
            raise ValueError(f"need {name} of at least 1, got {limit}")
    if max_size is not None and max(sizes, default=0) > max_size:
        raise ValueError(f"need groups of at most {max_size} tokens, got one of {max(sizes)}")
    if not sizes:
        return [[] for _ in range(ranks)]
    by_size = math.ceil(sum(sizes) / max_size) if max_size else 1
    by_count = math.ceil(len(sizes) / max_groups) if max_groups else 1
    steps = math.ceil(max(by_size, by_count) / ranks)
    # the largest first: what is small finds room anywhere
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], -costs[i], i))
    while (bins := _fill(order, sizes, costs, steps * ranks, max_size, max_groups)) is None:
        steps = min(steps + max(1, steps // 64), math.ceil(len(sizes) / ranks))
    bins.sort(key=lambda members: (-sum(costs[i] for i in members), members))
    return [[bins[step * ranks + rank] for step in range(steps)] for rank in range(ranks)]


def _fill(
    order: Sequence[int],
    sizes: Sequence[int],
    costs: Sequence[float],
    count: int,
    max_size: int | None,
    max_groups: int | None,
) -> list[list[int]] | None:
    """Each group into the cheapest of ``count`` bins that has room; None where one finds none."""
    room = [math.inf if max_size is None else max_size] * count
    least = sizes[order[-1]]
    bins: list[list[int]] = [[] for _ in range(count)]
    cheapest = [(0.0, b) for b in range(count)]
    for i in order:
        full = []
        while cheapest:
            cost, b = heapq.heappop(cheapest)
            if room[b] >= sizes[i]:
                break
            full.append((cost, b))
        else:
            return None
        bins[b].append(i)
        room[b] -= sizes[i]
        if room[b] >= least and (max_groups is None or len(bins[b]) < max_groups):
            full.append((cost + costs[i], b))
        for item in full:
            heapq.heappush(cheapest, item)
    return [sorted(members) for members in bins]
