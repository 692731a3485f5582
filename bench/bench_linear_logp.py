"""Log-probs from hidden states, and their gradients: the floor is matrix products of that shape."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from bench import peers
from bench.measure import BACKENDS, DTYPES, Provider, insist
from fastpref import linear_logp

PAIRS = 4
BETA = 0.1
HEAD = ("hidden", "weight")


@dataclass(frozen=True)
class Case:
    """``cost`` is the least work, in products of the live rows."""

    name: str
    device: str
    dtype: str
    N: int
    H: int
    V: int
    cost: float
    trains: tuple[str, ...] = ()
    live: float = 1.0
    active: float = 1.0  # columns that any row gives a probability worth a product
    dpo: bool = False
    workspaces: tuple[tuple[int, float], ...] = ()  # of ours: MiB, and the cost under it

    op = "linear_logp"
    ceiling = "product"
    unit = "tflop_per_s"

    def __str__(self):
        return f"{self.name}, N={self.N}, H={self.H}, V={self.V}, {self.dtype}"

    @property
    def work(self):
        return 2e-12 * self.live * self.N * self.H * self.V

    def load(self):
        """Logits of up to about 30, as trained models have them."""
        gen = {"generator": torch.Generator(self.device).manual_seed(0), "device": self.device}
        target = torch.randint(self.V, (self.N,), **gen)
        length = self.N // (2 * PAIRS)  # a prompt stands before every completion
        position = torch.arange(self.N, device=self.device) % length
        target[position < (1 - self.live) * length] = -100
        hidden = torch.randn(self.N, self.H, **gen)
        weight = torch.randn(self.V, self.H, **gen).mul_(4.5 / self.H**0.5)
        if self.active < 1:  # the other columns fall by 30 nats in every row
            columns = int(self.active * self.V)
            hidden[:, 0], weight[columns:, 0] = 1.0, -30.0
            target %= columns
        x = SimpleNamespace(hidden=hidden, weight=weight, target=target)
        for name in HEAD:
            value = getattr(x, name).to(DTYPES[self.dtype])
            setattr(x, name, value.requires_grad_(name in self.trains))
        return x

    def loss(self, logp, target):
        """A sum, or DPO's of mean log-probs, without a reference."""
        if not self.dpo or logp.ndim == 0:
            return logp.sum()
        live = (target != -100).view(2 * PAIRS, -1)
        chosen, rejected = ((logp.view_as(live) * live).sum(1) / live.sum(1)).chunk(2)
        return -F.logsigmoid(BETA * (chosen - rejected)).mean()

    def result(self, fn, x):
        """The log-probs, or the gradients of their loss."""
        if not self.trains:
            with torch.no_grad():
                return (fn(x.hidden, x.weight, x.target),)
        loss = self.loss(fn(x.hidden, x.weight, x.target), x.target)
        return torch.autograd.grad(loss, [getattr(x, name) for name in self.trains])

    def top(self, x):
        """The product of the live rows; on the CPU in fp32."""
        dtype = torch.float32 if self.device == "cpu" else x.hidden.dtype
        with torch.no_grad():
            a, b = x.hidden[x.target != -100].to(dtype), x.weight.detach().to(dtype).t()
        return lambda: a @ b

    def errors(self, x):
        """Against fp64: of log-probs the largest, in nats; of gradients as shares of their norm."""
        wide = SimpleNamespace(target=x.target)
        for name in HEAD:
            value = getattr(x, name).detach().double()
            setattr(wide, name, value.requires_grad_(name in self.trains))
        truth = self.result(peers.from_hidden, wide)

        def found(result):
            if not self.trains:
                return {"logp_error": float((result[0] - truth[0]).abs().max())}
            both = zip(self.trains, result, truth, strict=True)
            return {f"d{name}_error": float((a - b).norm() / b.norm()) for name, a, b in both}

        return found

    def providers(self):
        spaces = self.workspaces or ((None, self.cost),)
        best = BACKENDS[self.device]
        ours = {_named("fastpref", mib): self.ours(best, mib, cost) for mib, cost in spaces}
        plain = {_named("fastpref_torch", spaces[0][0]): self.ours("torch", *spaces[0])}
        if self.active < 1:
            cost = 1 + 2 * self.active
            plain["fastpref_skip_below"] = self.ours(best, spaces[0][0], cost, skip_below=2**-12)
        return ours | plain | {name: self.theirs(make) for name, make in self.peers().items()}

    def ours(self, backend, mib, cost, **options):
        options["workspace"] = None if mib is None else mib << 20

        def fn(*inputs):
            return linear_logp(*inputs, **options)

        before = insist(backend)
        return lambda x: Provider(lambda: self.result(fn, x), before, cost)

    def theirs(self, make):
        def provider(x):
            fn = make()
            return Provider(lambda: self.result(fn, x))

        return provider

    def peers(self):
        """The closest first."""
        found = {"trl": peers.trl_head}
        if self.device == "cpu" and self.live < 1:
            found["trl_rows_dropped"] = peers.trl_head_rows_dropped
        if self.dpo:
            found["liger_dpo"] = lambda: peers.liger_dpo(PAIRS, BETA)
        else:
            reduction = "sum" if self.trains else "none"
            found["liger"] = lambda: peers.liger_cross_entropy(1, reduction)
            found["liger_2_chunks"] = lambda: peers.liger_cross_entropy(16, reduction)
            found["liger_scaled"] = peers.liger_scaled
        found["cut_cross_entropy"] = lambda: peers.cut_cross_entropy(self.device, "high")
        if self.device == "cuda" and self.trains:
            found["cut_cross_entropy_exact"] = lambda: peers.cut_cross_entropy("cuda", None)
        found["torch_compile"] = lambda: torch.compile(peers.from_hidden)
        found["torch"] = lambda: peers.from_hidden
        if not self.trains and self.dtype == "bf16":
            found["torch_fp32_product"] = lambda: peers.from_wide_product
        return found


def _named(name, mib):
    return name if mib is None else f"{name}_{mib}_mib"


# MiB that keep every slab of exponentials, half of them, hardly one; every one beside skip_below's
WORKSPACES = {
    "cuda bf16": (2304, 1280, 256, 3072),
    "cpu bf16": (48, 20, 4, 64),
    "cpu fp32": (80, 36, 4, 96),
}


def cases(device):
    """The most important first."""
    if device == "cuda":
        return _cases("cuda", "bf16", 8192, 4096, 128_256)
    wide, half = (_cases("cpu", dtype, 512, 256, 32_000) for dtype in ("fp32", "bf16"))
    return [wide[0], half[0], wide[1], half[1], *wide[2:]]


def _cases(*where):
    spaces = WORKSPACES[" ".join(where[:2])]
    trained = {"cost": 3, "trains": HEAD}
    half = {**trained, "live": 0.5, "workspaces": ((spaces[1], 3),)}
    kept = tuple(zip(spaces[:3], (3, 3.5, 4), strict=True))
    rare = {**trained, "active": 0.2, "workspaces": ((spaces[3], 3),)}
    return [
        Case("no gradient", *where, cost=1),
        Case("trained head", *where, **trained, workspaces=kept),
        Case("trained head, half of the rows live", *where, **half),
        Case("frozen head", *where, cost=2, trains=("hidden",)),
        Case("DPO loss, half of the rows live", *where, **half, dpo=True),
        Case("trained head, a fifth of the columns active", *where, **rare),
    ]


def test_linear_logp(timed):
    timed()
