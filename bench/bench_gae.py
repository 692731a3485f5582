"""Advantages of tokens: bytes to move, beside a loop over tokens and scans in plain torch."""

from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch._higher_order_ops.associative_scan import associative_scan

from bench.measure import BACKENDS, Provider, insist
from fastpref import gae, ppo_advantages, whiten

GAMMA = 0.99
LAM = 0.95
KL_COEF = 0.05
SUMS = ("kl", "rlhf_reward")
# a token: rewards and values in, advantages and returns out, perhaps a mask; or log-probs of two
# models, values and a mask in, both out, then advantages and the mask again, whitened ones out
BYTES = {"no mask": 16, "bool mask": 17, "shaped rewards, whitened": 30, "packed": 16}


def loop(rewards, values, mask):
    """Token by token from the end, as TRL, verl and OpenRLHF do; masked ones are passed over.

    Compiled whole its T steps are unrolled, and one at a time each call costs more than it saves.
    """
    next_value = advantage = torch.zeros_like(values[:, 0])
    found = []
    for t in reversed(range(values.shape[1])):
        value = values[:, t]
        new = rewards[:, t] + GAMMA * next_value - value + GAMMA * LAM * advantage
        next_value = value if mask is None else torch.where(mask[:, t], value, next_value)
        advantage = new if mask is None else torch.where(mask[:, t], new, advantage)
        found.append(advantage)
    advantages = torch.stack(found[::-1], 1)
    return advantages, advantages + values


def affine(rewards, values, mask):
    """a and b of S_t = a S_{t+1} + b, from which A_t = r_t - V_t + S_{t+1}."""
    offset = GAMMA * values + GAMMA * LAM * (rewards - values)
    slope = torch.full_like(values, GAMMA * LAM)
    if mask is None:
        return slope, offset
    return slope.where(mask, 1.0), offset.where(mask, 0.0)


def from_states(rewards, values, states):
    later = F.pad(states[:, 1:], (0, 1))
    return rewards - values + later, rewards + later


def doubling(rewards, values, mask):
    """log2 T steps, each of spans twice as long; without a mask all spans have one slope."""
    slope, offset = affine(rewards, values, mask)
    if mask is None:
        slope = GAMMA * LAM
    step = 1
    while step < values.shape[1]:
        offset = offset + slope * F.pad(offset[:, step:], (0, step))
        slope = slope**2 if mask is None else slope * F.pad(slope[:, step:], (0, step))
        step *= 2
    return from_states(rewards, values, offset)


def scan(rewards, values, mask):
    """torch's own scan: compiled for CUDA, one kernel; an unstable API of torch."""

    def after(later, token):
        return later[0] * token[0], token[0] * later[1] + token[1]

    mode = "pointwise" if values.is_cuda else "generic"
    pair = affine(rewards, values, mask)
    _, states = associative_scan(after, pair, dim=1, reverse=True, combine_mode=mode)
    return from_states(rewards, values, states)


def tails(advantages_of, rewards, values, mask):
    """Where masked tokens are last, zeros do, as TRL and OpenRLHF know."""
    return advantages_of(rewards * mask, values * mask, None)


def shaped(advantages_of, logp, ref_logp, values, scores, mask):
    """The chain of PPO trainers: rewards, advantages, whitening, and what they log."""
    d = (logp - ref_logp) * mask
    penalty = KL_COEF * d
    last = (torch.arange(len(mask), device=mask.device), mask.sum(1) - 1)
    rewards = (-penalty).index_put(last, scores, accumulate=True)
    advantages, returns = tails(advantages_of, rewards, values, mask)
    count = mask.sum()
    centred = (advantages - (advantages * mask).sum() / count) * mask
    variance = (centred**2).sum() / (count - 1)
    sums = d.sum(), scores.sum() - penalty.sum()
    return centred * torch.rsqrt(variance + 1e-8), returns, *sums


@dataclass(frozen=True)
class Case:
    """``cost`` in copies of one input; peers know no packed tokens and have them as (B, T)."""

    name: str  # of BYTES
    device: str
    B: int
    T: int

    op = "gae"
    ceiling = "copy"
    unit = "gb_per_s"

    def __str__(self):
        return f"{self.name}, B={self.B}, T={self.T}, fp32"

    @property
    def cost(self):
        return BYTES[self.name] / 8

    @property
    def work(self):
        tokens = int(self.lengths().sum()) if self.name == "packed" else self.B * self.T
        return 8e-9 * tokens

    def lengths(self):
        return torch.randint(1, self.T + 1, (self.B,), generator=torch.Generator().manual_seed(0))

    def load(self):
        """Sequences of 1 to T tokens but for no mask; a bool mask has holes too, as of a tool."""
        gen = {"generator": torch.Generator(self.device).manual_seed(0), "device": self.device}
        x = SimpleNamespace()
        x.rewards, x.values = (torch.randn(self.B, self.T, **gen) for _ in range(2))
        x.logp = -2 * torch.rand(self.B, self.T, **gen)
        x.ref_logp = x.logp - 0.1 + 0.1 * torch.randn(self.B, self.T, **gen)
        x.scores = 1 + torch.randn(self.B, **gen)
        lengths = self.lengths().to(self.device)
        place = torch.arange(self.T, device=self.device)
        there = place < lengths[:, None]
        holes = place % 64 < 8
        x.mask = {"no mask": None, "bool mask": there & ~holes}.get(self.name, there)
        x.flat = {"rewards": x.rewards[there], "values": x.values[there]}
        x.flat["cu_seqlens"] = F.pad(lengths.cumsum(0), (1, 0)).int()
        return x

    @property
    def is_shaped(self):
        return "shaped" in self.name

    def ours(self, x):
        """(advantages, returns), of shaped rewards also SUMS."""
        if self.name == "packed":
            return gae(**x.flat, gamma=GAMMA, lam=LAM)
        options = {"values": x.values, "mask": x.mask, "gamma": GAMMA, "lam": LAM}
        if not self.is_shaped:
            return gae(rewards=x.rewards, **options)
        models = {"scores": x.scores, "logp": x.logp, "ref_logp": x.ref_logp}
        out = ppo_advantages(**models, kl_coef=KL_COEF, **options)
        white = whiten(out.advantages, out.moments, mask=x.mask, unbiased=True)
        return white, out.returns, *(out.metrics[name] for name in SUMS)

    def chain(self, advantages_of):
        """What peers run, and the names of its inputs."""
        if self.is_shaped:
            names = ("logp", "ref_logp", "values", "scores", "mask")
            return partial(shaped, advantages_of), names
        names = ("rewards", "values", "mask")
        return partial(tails, advantages_of) if self.name == "packed" else advantages_of, names

    def top(self, x):
        source = x.flat["values"] if self.name == "packed" else x.values
        copied = torch.empty_like(source)
        return lambda: copied.copy_(source)

    def errors(self, x):
        """Against fp64, as shares of their norm, where tokens count."""
        fn, names = self.chain(loop)
        wide = [getattr(x, name) for name in names[:-1]]
        truth = fn(*(value.double() for value in wide), x.mask)
        parts = ("advantages", "returns", *(SUMS if self.is_shaped else ()))

        def live(value):
            return value[x.mask] if value.ndim == 2 and x.mask is not None else value

        def found(result):
            both = {n: (live(a), live(b)) for n, a, b in zip(parts, result, truth, strict=True)}
            return {f"{n}_error": float((a - b).norm() / b.norm()) for n, (a, b) in both.items()}

        return found

    def providers(self):
        return {
            "fastpref": partial(self.on, BACKENDS[self.device]),
            "fastpref_torch": partial(self.on, "torch"),
            "torch_compile": lambda x: self.theirs(torch.compile(self.chain(doubling)[0]), x),
            "torch_compile_scan": lambda x: self.theirs(torch.compile(self.chain(scan)[0]), x),
            "torch_doubling": lambda x: self.theirs(self.chain(doubling)[0], x),
            "torch_loop": lambda x: self.theirs(self.chain(loop)[0], x),
        }

    def on(self, backend, x):
        return Provider(lambda: self.ours(x), insist(backend))

    def theirs(self, fn, x):
        inputs = [getattr(x, name) for name in self.chain(loop)[1]]
        return Provider(lambda: fn(*inputs))


def cases(device):
    """The most important first."""
    return [Case(name, device, 512, 4096) for name in BYTES]


def test_gae(timed):
    timed()
