"""The KL from a reference of hidden states, and its gradients: the floor is matrix products."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from bench.measure import DTYPES, Provider
from fastpref import linear_kl

HEAD = ("hidden", "weight")
NAMES = (*HEAD, "ref_hidden", "ref_weight")


def plain(hidden, weight, ref_hidden, ref_weight):
    """Plain torch: logits are widened first, else the log-probs themselves would round."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logp = (hidden @ weight.t()).to(wide).log_softmax(-1)
    ref_logp = (ref_hidden @ ref_weight.t()).to(wide).log_softmax(-1)
    return F.kl_div(logp, ref_logp, log_target=True, reduction="none").sum(-1)


@dataclass(frozen=True)
class Case:
    """``cost`` is the least work, in products."""

    name: str
    device: str
    dtype: str
    N: int
    H: int
    V: int
    cost: float
    trains: tuple[str, ...] = ()

    op = "linear_kl"
    ceiling = "product"
    unit = "tflop_per_s"

    def __str__(self):
        return f"{self.name}, N={self.N}, H={self.H}, V={self.V}, {self.dtype}"

    @property
    def work(self):
        return 2e-12 * self.N * self.H * self.V

    def load(self):
        """Logits of up to about 30, as trained models have them; a policy that has moved little."""
        gen = {"generator": torch.Generator(self.device).manual_seed(0), "device": self.device}
        x = SimpleNamespace()
        x.ref_hidden = torch.randn(self.N, self.H, **gen)
        x.ref_weight = torch.randn(self.V, self.H, **gen).mul_(4.5 / self.H**0.5)
        for name in HEAD:
            start = getattr(x, f"ref_{name}")
            setattr(x, name, start + 0.1 * start.std() * torch.randn(start.shape, **gen))
        for name in NAMES:
            value = getattr(x, name).to(DTYPES[self.dtype])
            setattr(x, name, value.requires_grad_(name in self.trains))
        return x

    def result(self, fn, x):
        """The KL, or the gradients of its sum."""
        inputs = [getattr(x, name) for name in NAMES]
        if not self.trains:
            with torch.no_grad():
                return (fn(*inputs),)
        return torch.autograd.grad(fn(*inputs).sum(), [getattr(x, name) for name in self.trains])

    def top(self, x):
        """One product of all rows; on the CPU in fp32."""
        dtype = torch.float32 if self.device == "cpu" else x.hidden.dtype
        a, b = x.hidden.detach().to(dtype), x.weight.detach().to(dtype).t()
        return lambda: a @ b

    def errors(self, x):
        """Against fp64: of the KL the largest, in nats; of gradients as shares of their norm."""
        wide = SimpleNamespace()
        for name in NAMES:
            value = getattr(x, name).detach().double()
            setattr(wide, name, value.requires_grad_(name in self.trains))
        truth = self.result(plain, wide)

        def found(result):
            if not self.trains:
                return {"kl_error": float((result[0] - truth[0]).abs().max())}
            both = zip(self.trains, result, truth, strict=True)
            return {f"d{name}_error": float((a - b).norm() / b.norm()) for name, a, b in both}

        return found

    def providers(self):
        # logits of both are computed again for the backward
        ours = self.cost + 2 * bool(self.trains)
        return {
            "fastpref": lambda x: Provider(lambda: self.result(linear_kl, x), cost=ours),
            "torch_compile": lambda x: self.theirs(torch.compile(plain), x),
            "torch": lambda x: self.theirs(plain, x),
        }

    def theirs(self, fn, x):
        return Provider(lambda: self.result(fn, x))


def cases(device):
    """The most important first."""
    if device == "cuda":
        shapes = [("cuda", "bf16", 8192, 4096, 128_256)]
    else:
        shapes = [("cpu", dtype, 512, 256, 32_000) for dtype in ("fp32", "bf16")]
    trained = {"cost": 4, "trains": HEAD}
    return [
        Case(name, *shape, **options)
        for name, options in {"no gradient": {"cost": 2}, "trained head": trained}.items()
        for shape in shapes
    ]


def test_linear_kl(timed):
    timed()
