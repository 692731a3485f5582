"""What the log-prob ops agree on: ignored labels, tiles, and how products become logits."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

IGNORE_INDEX = -100


class Transform(NamedTuple):
    """z = scale * (raw + bias), or cap * tanh of that, for raw products (or raw logits)."""

    scale: float = 1.0
    cap: float | None = None
    bias: Tensor | None = None  # (V,) fp32, fp64 for fp64

    @classmethod
    def of(
        cls, temperature: float, logit_scale: float, softcap: float | None, bias: Tensor | None
    ) -> "Transform":
        if softcap is None:
            return cls(logit_scale / temperature, None, bias)
        return cls(logit_scale / softcap, softcap / temperature, bias)

    @property
    def slope(self) -> float:
        """d z / d raw where no cap bends it."""
        return self.scale * (self.cap or 1.0)

    def columns(self, start: int, stop: int) -> "Transform":
        return self if self.bias is None else self._replace(bias=self.bias[start:stop])

    def apply_(self, raw: Tensor) -> Tensor:
        """z in the place of ``raw``."""
        if self.bias is not None:
            raw.add_(self.bias)
        if self.scale != 1.0:
            raw.mul_(self.scale)
        return raw if self.cap is None else raw.tanh_().mul_(self.cap)


def tiles(size: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size, max(step, 1)):
        yield start, min(start + step, size)


def check_target(target: Tensor, num_columns: int) -> None:
    """Refuse labels that would index memory; on the CPU only, where it costs no sync."""
    if target.device.type == "cpu" and target.numel():
        bad = ((target < 0) & (target != IGNORE_INDEX)) | (target >= num_columns)
        if bad.any():
            got = int(target[bad][0])
            raise ValueError(f"need targets in [0, {num_columns}) or {IGNORE_INDEX}, got {got}")
