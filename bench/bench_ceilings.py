"""What the machine gives: a matrix product and a copy, of sizes past its caches."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch

from bench.measure import DTYPES, Provider


@dataclass(frozen=True)
class Product:
    """(N, H) @ (H, V), also with an unrounded result where torch has that."""

    device: str
    dtype: str
    N: int
    H: int
    V: int

    op = "ceilings"
    ceiling = "product"
    unit = "tflop_per_s"
    cost = 1.0

    def __str__(self):
        return f"product, N={self.N}, H={self.H}, V={self.V}, {self.dtype}"

    @property
    def work(self):
        return 2e-12 * self.N * self.H * self.V

    def load(self):
        options = {"device": self.device, "dtype": DTYPES[self.dtype]}
        return SimpleNamespace(
            a=torch.randn(self.N, self.H, **options), b=torch.randn(self.V, self.H, **options).t()
        )

    def top(self, x):
        return lambda: x.a @ x.b

    def errors(self, x):
        return lambda result: {}

    def providers(self):
        if self.device == "cpu":
            return {}
        return {"fp32_output": lambda x: Provider(lambda: torch.mm(x.a, x.b, torch.float32))}


@dataclass(frozen=True)
class Copy:
    """``work`` counts what is read and what is written."""

    device: str
    gigabytes: float

    op = "ceilings"
    ceiling = "copy"
    unit = "gb_per_s"
    cost = 1.0

    def __str__(self):
        return f"copy of {self.gigabytes} GB"

    @property
    def work(self):
        return 2 * self.gigabytes

    def load(self):
        return torch.randn(int(self.gigabytes * 1e9 / 4), device=self.device)

    def top(self, x):
        copied = torch.empty_like(x)
        return lambda: copied.copy_(x)

    def errors(self, x):
        return lambda result: {}

    def providers(self):
        return {}


def cases(device):
    if device == "cuda":
        shapes = [("bf16", 8192, 4096, 128_256), ("bf16", 8192, 8192, 8192)]
        return [*(Product("cuda", *shape) for shape in shapes), Copy("cuda", 4)]
    products = [Product("cpu", dtype, 512, 256, 32_000) for dtype in ("fp32", "bf16")]
    return [*products, Copy("cpu", 0.25)]


def test_ceilings(timed):
    timed()
