"""The one matrix product of the kernels: fp32 sums whatever the inputs, never TF32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)


def upcasts(dtype: torch.dtype, device_type: str) -> bool:
    """Whether the device has no product of this dtype with fp32 output."""
    return dtype in _HALF and device_type != "cuda"


def operand(x: Tensor) -> Tensor:
    """``x`` in a dtype that :func:`product` takes on its device; a copy only where it must be."""
    return x.float() if upcasts(x.dtype, x.device.type) else x


@contextmanager
def full_precision() -> Iterator[None]:
    """Switch TF32 and bf16 products of fp32 inputs off for the products inside."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [b.fp32_precision for b in backends]
    try:
        for b in backends:
            b.fp32_precision = "ieee"
        yield
    finally:
        for b, value in zip(backends, before, strict=True):
            b.fp32_precision = value


def product(
    a: Tensor, b: Tensor, *, out: Tensor, alpha: float = 1.0, accumulate: bool = False
) -> Tensor:
    """``out = alpha * a @ b``, or ``out += alpha * a @ b``, in the fp32 or fp64 of ``out``."""
    beta = 1.0 if accumulate else 0.0
    if a.dtype == out.dtype:
        return torch.addmm(out, a, b, beta=beta, alpha=alpha, out=out)
    if accumulate:
        return torch.addmm(out, a, b, out_dtype=out.dtype, alpha=alpha, out=out)
    torch.mm(a, b, out_dtype=out.dtype, out=out)
    return out if alpha == 1.0 else out.mul_(alpha)
