"""How linear_logp cuts its work so that no more than ``workspace`` bytes exist at a time.

M targets, N rows of hidden, H hidden size, V vocabulary. Sizes may be symbolic (torch.compile), so
there is no branch on M or N: one compiled graph serves every length.
"""

from dataclasses import dataclass

import torch

from fastpref.kernels.logp_rows_triton import MAX_SLAB
from fastpref.kernels.product import upcasts

DEFAULT_WORKSPACE = {"cuda": 1 << 30}
OTHER_WORKSPACE = 256 << 20
_CPU_TILE = 3 << 20  # bytes of a tile that stays in the caches
_LEAST_WIDTH = 64  # columns: whole words of any dtype
_ROW_BYTES = 256  # per-row vectors, all of them at once
_SLACK = 64 << 10  # what does not grow with any size: 0-d tensors, alignment


@dataclass(frozen=True)
class Case:
    """What is computed: everything here is known to the tracer as a constant."""

    dtype: torch.dtype
    device_type: str
    backend: str
    grad_hidden: bool
    grad_weight: bool
    grad_bias: bool
    gathers: bool  # rows are given
    biased: bool
    entropy: bool
    grad_entropy: bool
    capped: bool
    skips: bool  # columns, in the products of the backward

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
        return self.dtype

    @property
    def operand(self) -> torch.dtype:
        """What products take."""
        return self.wide if upcasts(self.dtype, self.device_type) else self.dtype

    @property
    def fused(self) -> bool:
        """Row functions read a slab once, and write what the products take."""
        return self.backend != "torch"

    @property
    def row_matrices(self) -> int:
        return 1 + self.grad_entropy if self.frozen else 0

    @property
    def written(self) -> torch.dtype:
        """Of the slabs that row functions write for products."""
        return self.operand if self.fused else self.wide

    @property
    def slabs(self) -> list[torch.dtype]:
        """Scratch slabs of a forward: products; what is written beside them; torch's spare."""
        if not self.fused:
            return [self.wide] * (1 + self.entropy + (self.frozen and self.capped))
        beside = self.row_matrices - (self.operand == self.wide)
        return [self.wide, *[self.operand] * max(0, beside)]


@dataclass(frozen=True)
class Plan:
    rows: int  # of a tile of products before the softmax
    rows_backward: int  # of a tile of products after it
    width: int  # columns of a slab, whole words
    kept: int  # slabs kept for the backward
    kept_columns: int  # of all kept slabs together
    needed: int  # least workspace in bytes
    workspace: int


def pitch(columns: int) -> int:
    """Elements from row to row of a slab."""
    return (columns + _LEAST_WIDTH - 1) // _LEAST_WIDTH * _LEAST_WIDTH


def plan(case: Case, M: int, N: int, H: int, V: int, workspace: int | None, reserved: int) -> Plan:
    """Cut (M, V) into tiles; ``reserved`` bytes of the workspace are taken by the caller."""
    cuda = case.device_type == "cuda"
    half = case.dtype.itemsize == 2
    size, wide = case.dtype.itemsize, case.wide.itemsize
    upcast = upcasts(case.dtype, case.device_type)
    casts = case.operand != case.wide  # products take gradients in the input dtype

    # products before the softmax stay in the cache; on CUDA one product per slab of dW reads all
    rows = torch.sym_min(M, 1024)
    rows_backward = M if cuda else rows

    # bytes per row of a tile's hidden states, then per column of a tile, then for all rows
    x_row = H * ((size if case.gathers else 0) + (wide if upcast else 0))
    # C++ holds a row of a slab, or two, in each thread
    threads = torch.get_num_threads() * (1 + case.grad_entropy) if case.backend == "cpp" else 0
    slab = sum(dtype.itemsize for dtype in case.slabs)
    slab = slab + (size if casts and not case.fused else 0)
    column = threads * wide + rows * slab + H * wide * upcast + 1
    fixed = rows * x_row
    if case.frozen:
        fixed = fixed + rows * H * 3 * wide + case.row_matrices * M * H * wide
        scaled = M * H * wide * case.row_matrices
        spread = M * H * (wide + size) if half and case.gathers else 0
        fixed = torch.sym_max(fixed, case.row_matrices * M * H * wide + scaled + spread)
    if case.by_slab:
        spare = wide * (not case.fused and (case.grad_entropy or case.capped))
        cast = size if casts and not case.fused else 0
        back = rows_backward * (case.written.itemsize + spare + cast) + H * wide * upcast
        back = back + rows * wide * (case.fused and casts)
        back = back + (H * wide if upcast and case.grad_weight else 0)
        if case.skips:  # probabilities; gradient, weight and its gradient in the active columns
            back = back + rows * wide * (2 + 2 * case.grad_entropy) + 64
            back = back + (rows_backward + H) * case.operand.itemsize + H * (wide + size)
        column = torch.sym_max(column, back)
        sums = M * H * wide if case.grad_hidden and (half or case.gathers) else 0
        spread = M * H * (wide + size) if half and case.gathers and case.grad_hidden else 0
        fixed = torch.sym_max(fixed, sums + torch.sym_max(M * x_row, spread))
    fixed = fixed + M * _ROW_BYTES + N * 8 * case.gathers
    fixed = fixed + V * wide * (case.grad_bias + case.biased) + reserved + _SLACK

    needed = fixed + column * _LEAST_WIDTH
    widest = min(pitch(V), MAX_SLAB)
    if workspace is None:
        workspace = DEFAULT_WORKSPACE.get(case.device_type, OTHER_WORKSPACE)
        full = column * widest if cuda else 2 * _CPU_TILE
        workspace = torch.sym_max(workspace, torch.sym_max(needed, fixed + full))
    room = workspace - fixed
    if not cuda:  # a tile in the caches; half of the room at most: the other half keeps slabs
        room = torch.sym_min(_CPU_TILE, room // 2)
    width = torch.sym_max(_LEAST_WIDTH, room // (column * _LEAST_WIDTH) * _LEAST_WIDTH)
    width = torch.sym_min(widest, width)
    kept = kept_columns = 0
    if case.by_slab:
        slabs = (V + width - 1) // width
        per_slab = M * (width * case.kept_dtype.itemsize + wide) + 1
        all_slabs = M * (pitch(V) * case.kept_dtype.itemsize + slabs * wide) + slabs
        free = torch.sym_max(0, workspace - fixed - column * width)
        all_fit = torch.sym_max(0, torch.sym_min(1, free - all_slabs + 1))  # 1 or 0
        kept = torch.sym_min(slabs, torch.sym_max(free // per_slab, slabs * all_fit))
        kept_columns = torch.sym_min(pitch(V), kept * width)
    return Plan(rows, rows_backward, width, kept, kept_columns, needed, workspace)
