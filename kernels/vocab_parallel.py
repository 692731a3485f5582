"""A head whose weight is cut by vocabulary rows over the ranks of a process group.

Rank i holds the columns of z that follow those of ranks 0 to i - 1; hidden states and targets are
the same on every rank. Softmax sums and gradients of hidden are added over ranks.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from fastpref.kernels.logits import IGNORE_INDEX, check_target
from fastpref.kernels.logp_rows_torch import LOWEST


def name_of(group: dist.ProcessGroup | None) -> str:
    """What the schema of an op can hold; "" without a group."""
    return "" if group is None else group.group_name


def sum_over_ranks(x: Tensor, group: str) -> Tensor:
    if group:
        dist.all_reduce(x, group=_resolve_process_group(group))
    return x


@torch.library.custom_op("fastpref::local_target", mutates_args=())
def local_target(target: Tensor, num_columns: int, group: str) -> Tensor:
    """Columns of this rank's shard, ``num_columns`` for a label that another rank holds."""
    ranks = _resolve_process_group(group)
    sizes = target.new_zeros(ranks.size())
    sizes[ranks.rank()] = num_columns
    dist.all_reduce(sizes, group=ranks)
    if target.device.type == "cpu":  # elsewhere it would sync
        check_target(target, int(sizes.sum()))
    column = target - sizes[: ranks.rank()].sum()
    here = (column >= 0) & (column < num_columns)
    return torch.where(here, column, num_columns).where(target != IGNORE_INDEX, IGNORE_INDEX)


@local_target.register_fake
def _(target: Tensor, num_columns: int, group: str) -> Tensor:
    return torch.empty_like(target)


def combine(state: Tensor, num_columns: int, group: str) -> Tensor:
    """Add up what the ranks' rows carried (see Rows), in place; (R,) the columns of all ranks."""
    top, total, _label, _logits, entropy, squares, drop, shrink = state
    ranks = _resolve_process_group(group)
    new_top = top.to(torch.float64, copy=True)  # whatever a rank's backend carries
    dist.all_reduce(new_top, dist.ReduceOp.MAX, group=ranks)
    torch.sub(top, new_top.to(top.dtype), out=drop).clamp_(min=LOWEST)
    torch.exp(drop, out=shrink)
    top.copy_(new_top)
    entropy.addcmul_(drop, total).mul_(shrink)
    squares.mul_(shrink).mul_(shrink)
    total.mul_(shrink)
    sums = torch.cat([state[1:6], torch.full_like(state[:1], num_columns)]).double()
    dist.all_reduce(sums, group=ranks)
    state[1:6] = sums[:5]
    return sums[5].to(state.dtype)
