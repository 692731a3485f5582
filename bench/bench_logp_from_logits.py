"""Log-probs from logits, and their gradients: the floor is reading and writing the logits."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch

from bench import peers
from bench.measure import BACKENDS, DTYPES, Provider, insist
from fastpref import logp_from_logits

PASSES = {"forward": 1, "forward and backward": 3, "backward in place": 3}  # over the logits
CHECKED = 64  # rows that are compared with fp64


@dataclass(frozen=True)
class Case:
    """``cost`` in copies of the logits, which read and write them once."""

    name: str  # of PASSES
    device: str
    dtype: str
    N: int
    V: int

    op = "logp_from_logits"
    ceiling = "copy"
    unit = "gb_per_s"

    def __str__(self):
        return f"{self.name}, N={self.N}, V={self.V}, {self.dtype}"

    @property
    def cost(self):
        return PASSES[self.name] / 2

    @property
    def work(self):
        return 2e-9 * self.N * self.V * DTYPES[self.dtype].itemsize

    def load(self):
        gen = {"generator": torch.Generator(self.device).manual_seed(0), "device": self.device}
        source = torch.empty(self.N, self.V, device=self.device, dtype=DTYPES[self.dtype])
        source.normal_(std=4.5, generator=gen["generator"])
        logits = source.clone().requires_grad_(self.name != "forward")
        return SimpleNamespace(
            source=source, logits=logits, target=torch.randint(self.V, (self.N,), **gen)
        )

    def result(self, fn, x):
        if self.name == "forward":
            with torch.no_grad():
                return fn(x.logits, x.target)
        return torch.autograd.grad(fn(x.logits, x.target).sum(), x.logits)[0]

    def top(self, x):
        copied = torch.empty_like(x.source)
        return lambda: copied.copy_(x.source)

    def errors(self, x):
        """Against fp64 on some rows: the largest in nats, or a share of the gradient's norm."""
        rows = torch.arange(0, self.N, max(1, self.N // CHECKED), device=self.device)
        logits = x.source[rows].double().requires_grad_(x.logits.requires_grad)
        truth = self.result(
            peers.from_logits, SimpleNamespace(logits=logits, target=x.target[rows])
        )

        def found(result):
            off = result[rows] - truth
            if self.name == "forward":
                return {"logp_error": float(off.abs().max())}
            return {"dlogits_error": float(off.norm() / truth.norm())}

        return found

    def providers(self):
        found = {"fastpref": self.ours(BACKENDS[self.device]), "fastpref_torch": self.ours("torch")}
        theirs = {
            "trl": peers.trl_from_logits,
            "liger": peers.liger_from_logits,
            "torch_compile": lambda: torch.compile(peers.from_logits),
            "torch": lambda: peers.from_logits,
        }
        if self.name == "forward and backward":
            del theirs["liger"]  # it has no backward but the one in place
        return found | {name: self.theirs(make) for name, make in theirs.items()}

    def ours(self, backend):
        def fn(*inputs):
            return logp_from_logits(*inputs, inplace_backward=self.name == "backward in place")

        return lambda x: self.provider(fn, x, insist(backend))

    def theirs(self, make):
        return lambda x: self.provider(make(), x)

    def provider(self, fn, x, before=lambda: None):
        def ready():
            before()
            if self.name == "backward in place":
                with torch.no_grad():
                    x.logits.copy_(x.source)

        return Provider(lambda: self.result(fn, x), ready)


def cases(device):
    """The most important first."""
    if device == "cuda":
        shapes = [("bf16", 8192, V) for V in (128_256, 151_936, 50_257)]
    else:
        shapes = [("bf16", 512, 32_000), ("fp32", 512, 32_000), ("bf16", 512, 50_257)]
    return [Case(name, device, *shape) for shape in shapes for name in PASSES]


def test_logp_from_logits(timed):
    timed()
