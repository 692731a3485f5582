"""Losses of PPO over tokens, with gradients and statistics: bytes, or products from hidden states.

Of bytes the least is every input once, every gradient written by the forward, and scaled, so read
and written, by the backward that autograd asks for: 25 a token, 17 but for the scaling.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import torch

from bench import peers
from bench.measure import BACKENDS, DTYPES, Provider, insist
from fastpref import linear_logp, ppo_policy_loss, ppo_value_loss

CLIP = 0.2
KL_COEF = 0.05
ENTROPY_COEF = 0.01
POLICY = ("logp", "advantages", "old_logp")
INPUTS = {
    "policy loss": POLICY,
    "policy loss with KL, entropy and weights": (*POLICY, "ref_logp", "entropy", "is_weight"),
    "value loss": ("values", "returns", "old_values"),
}
TRAINED = ("logp", "entropy", "values")
HEAD = ("hidden", "weight")
TOKENS = ("target", "mask", "advantages", "old_logp", "ref_logp")


def plain_policy(logp, advantages, old_logp, ref_logp=None, entropy=None, is_weight=None, *, mask):
    """Plain torch: the sum, its count and sums of what trainers log."""
    log_ratio = logp - old_logp
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1 - CLIP, 1 + CLIP)
    loss = torch.maximum(-advantages * ratio, -advantages * bounded)
    seen = {
        "ratio": ratio,
        "clipfrac_low": (ratio < 1 - CLIP) & (advantages < 0),
        "clipfrac_high": (ratio > 1 + CLIP) & (advantages > 0),
        "approx_kl": log_ratio**2 / 2,
    }
    if is_weight is not None:
        loss = is_weight * loss
    if ref_logp is not None:
        d = logp - ref_logp
        seen["kl"] = (-d).exp() - 1 + d
        loss = loss + KL_COEF * seen["kl"]
    if entropy is not None:
        seen["entropy"] = entropy
        loss = loss - ENTROPY_COEF * entropy
    metrics = {name: (value.detach() * mask).sum() for name, value in seen.items()}
    metrics["ratio_max"] = (ratio.detach() * mask).max()
    return (loss * mask).sum(), mask.sum(), metrics


def plain_value(values, returns, old_values, *, mask):
    """Plain torch: the sum, its count and sums of what trainers log."""
    near = old_values + (values - old_values).clamp(-CLIP, CLIP)
    error, miss = (values - returns) ** 2, (near - returns) ** 2
    seen = {
        "clipfrac": miss > error,
        "values": values,
        "returns": returns,
        "returns_squared": returns**2,
        "error": returns - values,
        "error_squared": error,
    }
    metrics = {name: (value.detach() * mask).sum() for name, value in seen.items()}
    return (torch.maximum(error, miss) * mask).sum() / 2, mask.sum(), metrics


@dataclass(frozen=True)
class Case:
    """``cost`` in copies of one input; ``wall``: with the host's time, or the device's alone."""

    name: str  # of INPUTS
    device: str
    B: int
    T: int
    wall: bool

    op = "ppo_policy"
    ceiling = "copy"
    unit = "gb_per_s"

    def __str__(self):
        time = "wall time" if self.wall else "device time"
        return f"{self.name}, B={self.B}, T={self.T}, fp32, forward and backward, {time}"

    @property
    def names(self):
        return INPUTS[self.name]

    @property
    def trained(self):
        return [name for name in self.names if name in TRAINED]

    @property
    def cost(self):
        return (4 * len(self.names) + 1 + 12 * len(self.trained)) / 8

    @property
    def work(self):
        return 8e-9 * self.B * self.T

    def load(self):
        """A policy that has moved: about a twentieth of the ratios is bounded."""
        gen = {"generator": torch.Generator(self.device).manual_seed(0), "device": self.device}

        def normal():
            return torch.randn(self.B, self.T, **gen)

        x = SimpleNamespace(advantages=normal(), entropy=3 + normal(), values=0.5 + normal())
        x.logp = -2 * torch.rand(self.B, self.T, **gen)
        x.old_logp, x.ref_logp = x.logp + 0.1 * normal(), x.logp + 0.2 * normal()
        x.is_weight = (0.1 * normal()).exp().clamp(max=2)
        x.old_values, x.returns = x.values + 0.1 * normal(), x.values + 0.5 * normal() + 0.5
        lengths = torch.randint(1, self.T + 1, (self.B, 1), **gen)
        x.mask = torch.arange(self.T, device=self.device) < lengths
        for name in self.trained:
            getattr(x, name).requires_grad_()
        return x

    def result(self, fn, x):
        """Loss, count, metrics, and the gradients of the loss."""
        out = fn(*(getattr(x, name) for name in self.names), mask=x.mask)
        return (*out, *torch.autograd.grad(out[0], [getattr(x, name) for name in self.trained]))

    def top(self, x):
        source = getattr(x, self.names[0]).detach()
        copied = torch.empty_like(source)
        return lambda: copied.copy_(source)

    def errors(self, x):
        """Against fp64: of the loss per token, of gradients as shares of their norm."""
        wide = SimpleNamespace(mask=x.mask)
        for name in self.names:
            value = getattr(x, name).detach().double()
            setattr(wide, name, value.requires_grad_(name in self.trained))
        loss, count, metrics, *grads = self.result(self.plain, wide)

        def found(result):
            off = {"loss": (result[0].detach() - loss.detach()).abs() / count}
            pairs = [(result[2][name], value) for name, value in metrics.items()]
            off["metrics"] = max((a - b).abs() / b.abs() for a, b in pairs)
            for name, a, b in zip(self.trained, result[3:], grads, strict=True):
                off[f"d{name}"] = (a - b).norm() / b.norm()
            return {f"{name}_error": float(value) for name, value in off.items()}

        return found

    @property
    def plain(self):
        return plain_value if self.name == "value loss" else plain_policy

    def ours(self, *inputs, mask):
        given = dict(zip(self.names, inputs, strict=True), mask=mask)
        if self.name == "value loss":
            return ppo_value_loss(**given, clip=CLIP)
        if "ref_logp" in given:
            given |= {"kl_coef": KL_COEF, "entropy_coef": ENTROPY_COEF}
        return ppo_policy_loss(**given, clip_low=CLIP, clip_high=CLIP)

    def providers(self):
        best = BACKENDS[self.device]
        return {
            "fastpref": lambda x: self.provider(self.ours, x, insist(best)),
            "fastpref_torch": lambda x: self.provider(self.ours, x, insist("torch")),
            "torch_compile": lambda x: self.provider(torch.compile(self.plain), x),
            "torch": lambda x: self.provider(self.plain, x),
        }

    def provider(self, fn, x, *before):
        return Provider(lambda: self.result(fn, x), *before)


def plain_from_hidden(hidden, weight, target, mask, advantages, old_logp, ref_logp):
    """Plain torch: the mean over tokens; hidden (B, T, H), advantages (B,), others (B, T)."""
    logp = peers.from_hidden(hidden.flatten(0, 1), weight, target.flatten()).view_as(target)
    loss, count, _ = plain_policy(logp, advantages[:, None], old_logp, ref_logp, mask=mask)
    return loss / count


def ours_from_hidden(hidden, weight, target, mask, advantages, old_logp, ref_logp):
    logp = linear_logp(hidden.flatten(0, 1), weight, target.flatten()).view_as(target)
    return ppo_policy_loss(
        logp=logp,
        advantages=advantages,
        old_logp=old_logp,
        mask=mask,
        clip_low=CLIP,
        clip_high=CLIP,
        ref_logp=ref_logp,
        kl_coef=KL_COEF,
        reduction="mean",
    ).loss


@dataclass(frozen=True)
class FromHidden:
    """GRPO's loss with the head's gradients; ``cost`` in products of all rows."""

    device: str
    dtype: str
    B: int
    T: int
    H: int
    V: int

    op = "ppo_policy"
    ceiling = "product"
    unit = "tflop_per_s"
    cost = 3

    def __str__(self):
        shape = f"B={self.B}, T={self.T}, H={self.H}, V={self.V}"
        return f"from hidden states, trained head, {shape}, {self.dtype}"

    @property
    def work(self):
        return 2e-12 * self.B * self.T * self.H * self.V

    def load(self):
        """Logits of up to about 30, as trained models have them; every token counts."""
        gen = {"generator": torch.Generator(self.device).manual_seed(0), "device": self.device}
        dtype, shape = DTYPES[self.dtype], (self.B, self.T)
        x = SimpleNamespace(advantages=torch.randn(self.B, **gen))
        x.hidden = torch.randn(*shape, self.H, **gen).to(dtype)
        x.weight = torch.randn(self.V, self.H, **gen).mul_(4.5 / self.H**0.5).to(dtype)
        x.target = torch.randint(self.V, shape, **gen)
        x.mask = torch.ones(shape, dtype=torch.bool, device=self.device)
        rows = zip(x.hidden, x.target, strict=True)
        logp = torch.stack([peers.from_wide_product(h, x.weight, t) for h, t in rows])
        x.old_logp, x.ref_logp = (logp + 0.1 * torch.randn(shape, **gen) for _ in range(2))
        for name in HEAD:
            getattr(x, name).requires_grad_()
        return x

    def result(self, fn, x):
        """The loss, and the gradients of the head's inputs."""
        loss = fn(x.hidden, x.weight, *(getattr(x, name) for name in TOKENS))
        return (loss.detach(), *torch.autograd.grad(loss, (x.hidden, x.weight)))

    def top(self, x):
        """One product of all rows; on the CPU in fp32."""
        dtype = torch.float32 if self.device == "cpu" else x.hidden.dtype
        a, b = x.hidden.detach().flatten(0, 1).to(dtype), x.weight.detach().to(dtype).t()
        return lambda: a @ b

    def errors(self, x):
        """Against fp64: of the loss the difference, of gradients as shares of their norm."""
        names = ("loss", *(f"d{name}" for name in HEAD))
        truth = self.truth(x)

        def found(result):
            off = [(result[0] - truth[0]).abs()]
            off += [(a - b).norm() / b.norm() for a, b in zip(result[1:], truth[1:], strict=True)]
            return {f"{name}_error": float(value) for name, value in zip(names, off, strict=True)}

        return found

    def truth(self, x):
        """Sequence by sequence: fp64 logits of them all take more memory than some devices have."""
        hidden, weight = (getattr(x, name).detach().double().requires_grad_() for name in HEAD)
        total = 0
        for b in range(self.B):
            row = (getattr(x, name)[b : b + 1] for name in TOKENS)
            loss = plain_from_hidden(hidden[b : b + 1], weight, *row) / self.B
            loss.backward()
            total += loss.detach()
        return total, hidden.grad, weight.grad

    def providers(self):
        best = BACKENDS[self.device]
        return {
            "fastpref": lambda x: self.provider(ours_from_hidden, x, insist(best)),
            "fastpref_torch": lambda x: self.provider(ours_from_hidden, x, insist("torch")),
            "liger_grpo": lambda x: self.provider(peers.liger_grpo(1, CLIP, KL_COEF), x),
            "liger_grpo_whole": lambda x: self.provider(peers.liger_grpo(self.B, CLIP, KL_COEF), x),
            "liger_grpo_from_logits": lambda x: self.provider(
                peers.liger_grpo_from_logits(CLIP, KL_COEF), x
            ),
            "torch_compile": lambda x: self.provider(torch.compile(plain_from_hidden), x),
            "torch": lambda x: self.provider(plain_from_hidden, x),
        }

    def provider(self, fn, x, *before):
        return Provider(lambda: self.result(fn, x), *before)


def cases(device):
    """The most important first."""
    if device == "cuda":
        walls, rows, head = (True, False), 16_384, ("bf16", 32, 512, 4096, 128_256)
    else:
        walls, rows, head = (True,), 2048, ("fp32", 8, 64, 256, 32_000)
    policies = [name for name in INPUTS if name.startswith("policy")]
    return [
        *(Case(name, device, 512, 2048, wall) for name in INPUTS for wall in walls),
        FromHidden(device, *head),
        *(Case(name, device, rows, 2048, walls[-1]) for name in policies),
    ]


def test_ppo_policy(timed):
    timed()
