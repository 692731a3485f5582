"""Losses of pairs: no work to speak of, so what counts is the time of the host to ask for it."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch.nn.functional import logsigmoid

from bench.measure import Provider
from fastpref import dpo_loss

BETA = 0.1
NAMES = ("chosen", "rejected", "ref_chosen", "ref_rejected")


def sigmoid(chosen, rejected, ref_chosen, ref_rejected):
    """Plain torch, with the rewards that trainers log."""
    l_w, l_l = chosen - ref_chosen, rejected - ref_rejected
    losses = -logsigmoid(BETA * (l_w - l_l))
    return losses, (BETA * l_w).detach(), (BETA * l_l).detach()


def ipo_sum(chosen, rejected, ref_chosen, ref_rejected):
    """Plain torch."""
    l_w, l_l = chosen - ref_chosen, rejected - ref_rejected
    losses = (l_w - l_l - 1 / (2 * BETA)) ** 2
    return losses, (BETA * l_w).detach(), (BETA * l_l).detach()


@torch.library.custom_op("fastpref_bench::pair_loss", mutates_args=())
def one_op(
    chosen: torch.Tensor, rejected: torch.Tensor, losses: torch.Tensor, slopes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What any kernel behind one op costs before it runs: results that are known beforehand."""
    return losses.clone(), slopes.clone(), torch.empty_like(chosen), torch.empty_like(rejected)


def _setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _backward(ctx, grad, *_):
    d = grad * ctx.saved_tensors[0]
    return d, -d, None, None


one_op.register_autograd(_backward, setup_context=_setup)
LOSSES = {"sigmoid": sigmoid, "ipo_sum": ipo_sum}


@dataclass(frozen=True)
class Case:
    """``cost`` in copies of one input; ``wall``: with the host's time, or the device's alone."""

    name: str  # of LOSSES
    device: str
    P: int
    wall: bool

    op = "preference"
    ceiling = "copy"
    unit = "gb_per_s"
    cost = 4.5  # four inputs in, three results and two gradients out; a copy is two

    def __str__(self):
        time = "wall time" if self.wall else "device time"
        return f"{self.name}, P={self.P}, fp32, forward and backward, {time}"

    @property
    def work(self):
        return 8e-9 * self.P

    def load(self):
        gen = {"generator": torch.Generator(self.device).manual_seed(0), "device": self.device}
        x = SimpleNamespace()
        for name in NAMES:
            value = -200 + 20 * torch.randn(self.P, **gen)
            setattr(x, name, value.requires_grad_(not name.startswith("ref")))
        return x

    def result(self, fn, x):
        """Losses, rewards, and the gradients of their mean."""
        out = fn(*(getattr(x, name) for name in NAMES))
        return (*out[:3], *torch.autograd.grad(out[0].mean(), (x.chosen, x.rejected)))

    def top(self, x):
        copied = torch.empty_like(x.chosen)
        return lambda: copied.copy_(x.chosen.detach())

    def errors(self, x):
        """Of losses and gradients against fp64, as shares of their norm."""
        wide = SimpleNamespace()
        for name in NAMES:
            value = getattr(x, name).detach().double()
            setattr(wide, name, value.requires_grad_(not name.startswith("ref")))
        truth = self.result(LOSSES[self.name], wide)

        def found(result):
            parts = {"loss_error": 0, "dchosen_error": 3, "drejected_error": 4}
            both = {n: (result[i].detach().double(), truth[i].detach()) for n, i in parts.items()}
            return {name: float((a - b).norm() / b.norm()) for name, (a, b) in both.items()}

        return found

    def providers(self):
        plain = LOSSES[self.name]
        return {
            "fastpref": lambda x: self.provider(self.ours, x),
            "fastpref_compiled": lambda x: self.provider(torch.compile(self.ours), x),
            "torch": lambda x: self.provider(plain, x),
            "torch_compile": lambda x: self.provider(torch.compile(plain), x),
            "any_custom_op": self.empty,
        }

    def ours(self, *inputs):
        return dpo_loss(*inputs, beta=BETA, loss_type=self.name)

    def empty(self, x):
        found = LOSSES[self.name](*(getattr(x, name) for name in NAMES))[0]
        slopes = torch.autograd.grad(found.sum(), x.chosen)[0]
        return self.provider(lambda c, r, *_: one_op(c, r, found.detach(), slopes), x)

    def provider(self, fn, x):
        return Provider(lambda: self.result(fn, x))


def cases(device):
    """The most important first."""
    walls = (True, False) if device == "cuda" else (True,)
    return [Case(name, device, P, wall) for P in (256, 65_536) for name in LOSSES for wall in walls]


def test_preference(timed):
    timed()
