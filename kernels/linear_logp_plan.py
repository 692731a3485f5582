"""How linear_logp cuts its work so that no more than ``workspace`` bytes exist at a time.

M targets, N rows of hidden, H hidden size, V vocabulary. Sizes may be symbolic (torch.compile), so
there is no branch on M or N: one compiled graph serves every length.
"""

from dataclasses import dataclass

import torch

from fastpref.kernels.product import upcasts

DEFAULT_WORKSPACE = {"cuda": 1 << 30}
OTHER_WORKSPACE = 256 << 20
_LEAST_WIDTH = 64  # columns
_ROW_BYTES = 256  # per-row vectors, all of them at once
_SLACK = 64 << 10  # what does not grow with any size: 0-d tensors, alignment


@dataclass(frozen=True)
class Case:
    """What is computed: everything here is known to the tracer as a constant."""

    dtype: torch.dtype
    device_type: str
    grad_hidden: bool
    grad_weight: bool
    grad_bias: bool
    gathers: bool  # rows are given
    entropy: bool
    grad_entropy: bool
    capped: bool
    native: bool  # row functions that read a slab once, in C++

    @property
    def frozen(self) -> bool:
        """Only hidden has a gradient: the forward saves it per row, up to the upstream factor."""
        return self.grad_hidden and not self.by_slab

    @property
    def by_slab(self) -> bool:
        """The backward needs the softmax itself, slab by slab of columns over all rows."""
        return self.grad_weight or self.grad_bias

    @property
    def wide(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def kept_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype.itemsize == 2 else self.dtype

    @property
    def slabs(self) -> int:
        """Scratch slabs of a forward: z, exponentials where z is read after them, z uncapped."""
        two = self.frozen and self.grad_entropy if self.native else self.entropy
        return 1 + two + (self.frozen and self.capped)

    @property
    def slabs_backward(self) -> int:
        return 2 if not self.native and (self.grad_entropy or self.capped) else 1

    @property
    def row_matrices(self) -> int:
        return 1 + self.grad_entropy if self.frozen else 0


@dataclass(frozen=True)
class Plan:
    rows: int  # of a tile in the forward
    rows_backward: int
    width: int  # columns of a slab
    kept: int  # slabs kept for the backward
    kept_columns: int  # of all kept slabs together
    needed: int  # least workspace in bytes
    workspace: int


def plan(case: Case, M: int, N: int, H: int, V: int, workspace: int | None, reserved: int) -> Plan:
    """Cut (M, V) into tiles; ``reserved`` bytes of the workspace are taken by the caller."""
    cuda = case.device_type == "cuda"
    half = case.dtype.itemsize == 2
    size, wide = case.dtype.itemsize, case.wide.itemsize
    upcast = upcasts(case.dtype, case.device_type)
    cast = half and not upcast  # products take gradients in the input dtype

    # a CPU's tile stays in its caches; on CUDA one product per slab of dW reads all rows
    rows = torch.sym_min(M, 2048 if cuda else 1024)
    rows_backward = M if cuda else rows

    # bytes per row of a tile's hidden states, then per column of a tile, then for all rows
    x_row = H * ((size if case.gathers else 0) + (wide if upcast else 0))
    # C++ holds a row of a slab, or two, in each thread
    threads = torch.get_num_threads() * (1 + case.grad_entropy) if case.native else 0
    column = (
        threads * wide + rows * (case.slabs * wide + (size if cast else 0)) + H * wide * upcast + 1
    )
    fixed = rows * x_row
    if case.frozen:
        fixed = fixed + rows * H * 3 * wide + case.row_matrices * M * H * wide
        scaled = M * H * wide * case.row_matrices
        spread = M * H * (wide + size) if half and case.gathers else 0
        fixed = torch.sym_max(fixed, case.row_matrices * M * H * wide + scaled + spread)
    if case.by_slab:
        back = (
            rows_backward * (case.slabs_backward * wide + (size if cast else 0)) + H * wide * upcast
        )
        back = back + (H * wide if half and case.grad_weight else 0)
        column = torch.sym_max(column, back)
        sums = M * H * wide if case.grad_hidden and (half or case.gathers) else 0
        spread = M * H * (wide + size) if half and case.gathers and case.grad_hidden else 0
        fixed = torch.sym_max(fixed, sums + torch.sym_max(M * x_row, spread))
    fixed = fixed + M * _ROW_BYTES + N * 8 * case.gathers + V * wide * case.grad_bias
    fixed = fixed + reserved + _SLACK

    least = min(V, _LEAST_WIDTH)
    needed = fixed + column * least
    if workspace is None:
        workspace = DEFAULT_WORKSPACE.get(case.device_type, OTHER_WORKSPACE)
        workspace = torch.sym_max(workspace, needed)
    # on CUDA a tile without dW stays in the L2 cache
    tile = (96 << 20 if case.by_slab else 32 << 20) if cuda else 3 << 20
    # half of the room at most: the other half keeps slabs
    room = torch.sym_min(tile, (workspace - fixed) // 2)
    width = torch.sym_min(V, torch.sym_max(least, room // (column * 64) * 64))
    kept = kept_columns = 0
    if case.by_slab:
        per_slab = M * (width * case.kept_dtype.itemsize + wide) + 1
        free = torch.sym_max(0, workspace - fixed - column * width)
        kept = torch.sym_min((V + width - 1) // width, free // per_slab)
        kept_columns = torch.sym_min(V, kept * width)
    return Plan(rows, rows_backward, width, kept, kept_columns, needed, workspace)
