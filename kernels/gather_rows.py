"""Rows by index, y[m] = x[index[m]], and the adjoint, x[n] = sum of y[m] over index[m] == n.

Copies of one row are added in the order of m, in fp32 or wider: ``x[index]`` adds them in any order
on the CPU, ``index_add`` does on CUDA.
"""

from typing import Any

import torch
from torch import Tensor


def gather_rows_ref(x: Tensor, index: Tensor) -> Tensor:
    return x[index]


# ops
def add_rows(out: Tensor, index: Tensor, source: Tensor) -> Tensor:
    """``out[index[m]] += source[m]`` in the order of m; one dtype."""
    if out.device.type == "cpu":
        return out.index_add_(0, index, source)
    return out.index_put_((index,), source, accumulate=True)  # sorts the index first


def sum_copies(source: Tensor, index: Tensor, num_rows: int, dtype: torch.dtype) -> Tensor:
    """(M, ...) -> (num_rows, ...) of ``dtype``, rounded once after sums in the source's dtype."""
    if source.dtype == dtype:
        return add_rows(source.new_zeros((num_rows, *source.shape[1:])), index, source)
    # sums in at most M slots of the wide dtype: a wide (num_rows, ...) buffer would not fit
    slot = torch.searchsorted(index.sort()[0], index)
    sums = add_rows(source.new_zeros((len(index) + 1, *source.shape[1:])), slot, source)
    slot_of_row = index.new_full((num_rows,), len(index))  # the last slot holds zeros
    slot_of_row[index] = slot
    return sums.to(dtype).index_select(0, slot_of_row)


def check_index(index: Tensor, num_rows: int) -> None:
    """Refuse an index that would read past the rows; on the CPU only, where it costs no sync."""
    if index.device.type == "cpu" and len(index):
        low, high = index.aminmax()
        if low < 0 or high >= num_rows:
            raise ValueError(f"need rows in [0, {num_rows}), got {int(low)} to {int(high)}")


@torch.library.custom_op("fastpref::gather_rows", mutates_args=())
def _gather(x: Tensor, index: Tensor) -> Tensor:
    check_index(index, x.shape[0])
    return x.index_select(0, index)


@_gather.register_fake
def _(x: Tensor, index: Tensor) -> Tensor:
    return x.new_empty((index.shape[0], *x.shape[1:]))


@torch.library.custom_op("fastpref::sum_rows", mutates_args=())
def _sum(x: Tensor, index: Tensor, num_rows: int) -> Tensor:
    check_index(index, num_rows)
    wide = torch.promote_types(x.dtype, torch.float32)
    return sum_copies(x.to(wide), index, num_rows, x.dtype)


@_sum.register_fake
def _(x: Tensor, index: Tensor, num_rows: int) -> Tensor:
    return x.new_empty((num_rows, *x.shape[1:]))


# autograd: each is the other's backward
def _gather_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, index = inputs
    ctx.num_rows = x.shape[0]
    ctx.save_for_backward(index)


def _gather_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    (index,) = ctx.saved_tensors
    return _sum(dy, index, ctx.num_rows), None


def _sum_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(inputs[1])


def _sum_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    (index,) = ctx.saved_tensors
    return _gather(dy, index), None, None


_gather.register_autograd(_gather_backward, setup_context=_gather_setup)
_sum.register_autograd(_sum_backward, setup_context=_sum_setup)


# public
def _check(x: Tensor, index: Tensor) -> None:
    if x.ndim < 1 or index.ndim != 1:
        got = f"{tuple(x.shape)} and {tuple(index.shape)}"
        raise ValueError(f"need x with at least one dimension and index (M,), got {got}")
    if not x.is_floating_point() or index.dtype != torch.int64:
        raise TypeError(f"need floating-point x and int64 index, got {x.dtype} and {index.dtype}")


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of ``x`` by index, with a backward that is the same in every run.

    Args:
        x: (N, ...) floating point; differentiable.
        index: (M,) int64 in [0, N), repeats allowed. The range is checked on the CPU only.

    Returns:
        (M, ...) of x's dtype. The backward adds the copies of a row in the order of ``index``, in
        fp32 or wider, and rounds once.

    Raises:
        ValueError: a shape differs from the above, or an index is out of range (CPU).
        TypeError: a dtype differs from the above.
    """
    _check(x, index)
    return _gather(x, index)


def sum_rows(x: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """Sum of the rows that share an index, in a fixed order: the adjoint of :func:`gather_rows`.

    Args:
        x: (M, ...) floating point; differentiable.
        index: (M,) int64 in [0, num_rows). The range is checked on the CPU only.
        num_rows: N, the rows of the result.

    Returns:
        (N, ...) of x's dtype, summed in fp32 or wider; zero where no index points.

    Raises:
        ValueError: a shape differs from the above, or an index is out of range (CPU).
        TypeError: a dtype differs from the above.
    """
    _check(x, index)
    if x.shape[:1] != index.shape:
        raise ValueError(f"need one index per row, got {tuple(x.shape)} and {tuple(index.shape)}")
    return _sum(x, index, num_rows)
