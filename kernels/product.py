"""The one matrix product of the kernels: sums in fp32 whatever the inputs, never TF32."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)


def upcasts(dtype: torch.dtype, device_type: str) -> bool:
    """Whether the device has no product of this dtype with fp32 output."""
    return dtype in _HALF and device_type != "cuda"


def operand(x: Tensor) -> Tensor:
    """``x`` in a dtype that :func:`product` takes on its device; a copy only where it must be."""
    return x.float() if upcasts(x.dtype, x.device.type) else x


def _setting(owner: Any, name: str) -> Any:
    # a setting of reductions is a pair, whose first half alone would reset the second
    value, split_k = getattr(owner, name), getattr(owner, f"{name}_split_k", None)
    return value if split_k is None else (value, split_k)


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside, fp32 products are no TF32 or bf16 ones, and half-precision ones sum in fp32."""
    matmul = torch.backends.cuda.matmul
    settings = [
        (matmul, "fp32_precision", "ieee"),
        (torch.backends.mkldnn.matmul, "fp32_precision", "ieee"),
        (matmul, "allow_bf16_reduced_precision_reduction", False),
        (matmul, "allow_fp16_reduced_precision_reduction", False),
        (matmul, "allow_fp16_accumulation", False),
    ]
    before = [_setting(owner, name) for owner, name, _ in settings]
    try:
        for owner, name, value in settings:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name, _), value in zip(settings, before, strict=True):
            setattr(owner, name, value)


def product(a: Tensor, b: Tensor, *, out: Tensor, accumulate: bool = False) -> Tensor:
    """``out = a @ b``, or ``out += a @ b``: rounded to the dtype of ``out`` once, after the sum."""
    if a.dtype == out.dtype:
        return torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    if accumulate:
        return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)
