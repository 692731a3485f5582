"""A DPO step beside TRL's DPOTrainer: same model, pairs, order, options, and losses in one run.

Every provider trains in a process of its own: in turn step by step on the CPU, whose slow minutes
are then slow for all; one after the other on CUDA, whose memory holds one. Losses are compared step
by step: no row is written of a run that computed something else.
"""

import contextlib
import dataclasses
import gc
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.dpo_step import Run, Setup
from bench.harness import times_ms
from bench.measure import is_ours, reason_said
from bench.pairs import grouped, long_pairs, pairs, texts_of
from bench.step_cost import flop, padded_tokens, tokens
from fastpref.models.flops import peak_flops
from fastpref.models.tiny import tiny_tokenizer

# how far from ours: losses in nats, log-probs of completions as a share; bf16 logits round to 0.05
AGREE = {
    "fp32": {"loss_difference": 1e-4, "logps_difference": 1e-4},
    "bf16": {"loss_difference": 0.1, "logps_difference": 5e-3},
}
LARGEST_VOCABULARY = 32_000  # that a tokenizer learns; a larger model has rows that are never read


@dataclass(frozen=True)
class Target:
    """How many times faster than a peer, and the share of its memory, by which name."""

    faster: float
    share: float
    memory: str


ON_CPU = {
    "trl": Target(15, 0.25, "peak_mib"),
    "trl_rows_dropped": Target(4, 0.5, "peak_mib"),
}


@dataclass(frozen=True, kw_only=True)
class Case(Setup):
    """``prompt`` and ``completion``: token counts of long pairs, least and most; else harmless."""

    name: str
    providers: tuple[str, ...]
    warm_up: int = 1
    prompt: tuple[int, int] | None = None
    completion: tuple[int, int] | None = None
    targets: dict[str, Target] = dataclasses.field(default_factory=dict)
    mfu: float | None = None  # the target

    op = "dpo_step"

    def __str__(self):
        parts = [f"llama {self.name}", f"V={self.vocab}", f"{self.pairs} pairs", self.dtype]
        if self.prompt:
            parts.append("prompts of " + " to ".join(map(str, dict.fromkeys(self.prompt))))
        if self.lora is not None:
            parts.append(f"LoRA {self.lora}")
        parts += ["precomputed reference"] * self.precomputed
        parts += ["checkpointing"] * self.checkpointing
        return ", ".join(parts)

    def setup(self):
        names = [field.name for field in dataclasses.fields(Setup)]
        return Setup(**{name: getattr(self, name) for name in names})

    def prepare(self, folder):
        """Write what the runs read; the name of the data, and the pairs' token counts."""
        count = self.pairs * self.steps
        data, rows = pairs(count)
        size = min(self.vocab, LARGEST_VOCABULARY)
        tokenizer = tiny_tokenizer(texts_of(rows), size)
        if self.prompt:
            rows = long_pairs(count, rows, tokenizer, self.prompt, self.completion)
        rows, lengths = grouped(rows, tokenizer, self.pairs)
        self.setup().write(folder, tokenizer, rows)
        return data, lengths

    def rows(self, say):
        """Rows of providers that ran and agree; ``say(reason, name)`` hears of the others."""
        if self.device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()  # what this process measured before is room for the runs
        teams = [[name] for name in self.providers] if self.device == "cuda" else [self.providers]
        found = {}
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
            with reason_said(self, "fastpref and its peers", say):
                data, lengths = self.prepare(Path(folder))
                for team in teams:
                    found |= self.take_turns(team, Path(folder), say)
        found = {name: found[name] for name in self.providers if name in found}
        rows = {
            name: self.row(name, *run, lengths) | {"data": data}
            for name, run in self.agreeing(found, say).items()
        }
        for line in self.readings(rows):
            print(line, flush=True)
        return list(rows.values())

    def take_turns(self, names, folder, say):
        """(seconds of each step past the warm-up, what the run says at its end) by name."""
        runs, seconds, ends = {}, {}, {}
        with contextlib.ExitStack() as stack:
            for name in names:
                with reason_said(self, name, say):
                    runs[name], seconds[name] = Run(name, folder), []
                    stack.callback(runs[name].stop)
            for step in range(1, self.steps):
                for name in list(runs):
                    run = runs.pop(name)
                    with reason_said(self, name, say):
                        began = time.perf_counter()
                        run()
                        if step >= self.warm_up:
                            seconds[name].append(time.perf_counter() - began)
                        runs[name] = run
            for name, run in runs.items():
                with reason_said(self, name, say):
                    ends[name] = run.finish()
        return {name: (seconds[name], end) for name, end in ends.items()}

    def agreeing(self, found, say):
        """Runs with how far each peer's is from ours, without those that computed something else;
        ours counts where a peer's is the same or none ran.
        """
        kept = {}
        for name, (seconds, end) in found.items():
            with reason_said(self, name, say):
                apart = {}
                if "fastpref" in found and not is_ours(name):
                    apart = differences(found["fastpref"][1]["log"], end["log"])
                    check_agreement(apart, AGREE[self.dtype])
                kept[name] = seconds, end, apart
        if len(found) > 1 and kept.keys() == {"fastpref"}:
            with reason_said(self, "fastpref", say):
                raise ArithmeticError("no peer that ran computes the same")
            return {}
        return kept

    def row(self, name, seconds, end, apart, lengths):
        """Tokens and flop are those of the timed steps."""
        lengths = lengths[self.pairs * self.warm_up :]
        original = tokens(lengths, share=False)
        row = {
            "op": self.op,
            "provider": name,
            "case": str(self),
            **times_ms(seconds),
            "tokens_per_second": original / sum(seconds),
            "num_tokens": original,
            "num_computed_tokens": self.computed(name, lengths),
            **end["memory"],
            **apart,
        }
        if self.device == "cuda" and (peak := peak_flops(torch.cuda.get_device_name())):
            work = flop(
                lengths,
                self.sizes(),
                share=is_ours(name),  # prompts once where they are computed once
                live_reference=not self.precomputed,
                frozen=self.lora is not None,
            )
            row["mfu"] = work / sum(seconds) / peak
        if is_ours(name) and self.prompt:
            largest = max(2 * p + c + r for p, c, r in lengths)
            row["logits_mib"] = 4 * self.vocab * largest / 2**20
        return row

    def computed(self, name, lengths):
        """Tokens that pass the trunk, padding included."""
        if is_ours(name):
            return tokens(lengths, share=True)
        return padded_tokens(lengths, self.micro_batch or self.pairs)

    def readings(self, rows):
        """Lines that set the rows beside the targets."""
        ours = rows.get("fastpref")
        for peer, target in self.targets.items():
            if ours and peer in rows:
                faster = rows[peer]["ms_p50"] / ours["ms_p50"]
                share = ours[target.memory] / rows[peer][target.memory]
                yield (
                    f"{self}: {faster:.2f} times faster than {peer} (target {target.faster:g}), "
                    f"{share:.2f} of its {target.memory} (target {target.share:g})"
                )
        if ours and self.mfu:
            yield f"{self}: mfu {ours['mfu']:.3f} (target {self.mfu:g})"


def differences(ours, theirs):
    """Largest distances over all steps: of losses in nats, of gradient norms and of completions'
    log-probs as shares.
    """
    both = list(zip(ours, theirs, strict=True))
    tokens = [(a["num_tokens"], b["num_tokens"]) for a, b in both]
    if any(a != b for a, b in tokens):
        raise ArithmeticError(f"computes something else: tokens after each step {tokens}")

    def share(name):
        return max(abs(a[name] / b[name] - 1) for a, b in both)

    return {
        "loss_difference": max(abs(a["loss"] - b["loss"]) for a, b in both),
        "grad_norm_difference": share("grad_norm"),
        "logps_difference": max(share(f"logps/{side}") for side in ("chosen", "rejected")),
    }


def check_agreement(apart, limits):
    for what, most in limits.items():
        if not apart[what] <= most:
            raise ArithmeticError(f"computes something else: {what} is {apart[what]:.3g}")


TINY = {"device": "cpu", "dtype": "fp32", "heads": 4, "kv_heads": 2, "learning_rate": 1e-6}
SMALL = TINY | {"layers": 4, "hidden": 256, "mlp": 688, "vocab": 32_000}
ONE_B = {"layers": 16, "hidden": 2048, "heads": 32, "kv_heads": 8, "mlp": 8192}
EIGHT_B = {"layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "mlp": 14_336}
LONG = {"prompt": (2048, 4096), "completion": (200, 500)}


def on_cpu():
    peers = tuple(ON_CPU)
    yield Case(
        name="4x256", pairs=8, steps=7, providers=("fastpref", *peers), targets=ON_CPU, **SMALL
    )
    tiny = TINY | {"layers": 2, "hidden": 128, "mlp": 344, "vocab": 4096}
    lengths = {"prompt": (400, 800), "completion": (40, 100)}
    providers = ("fastpref", *peers)
    yield Case(name="2x128", pairs=4, steps=7, providers=providers, **tiny, **lengths)
    for size in (2048, 4096, 8192):  # its memory: what grows with tokens
        lengths = {"prompt": (size, size), "completion": (32, 32)}
        options = {"pairs": 1, "steps": 3, "checkpointing": True, "providers": ("fastpref",)}
        yield Case(name="4x256", **options, **SMALL, **lengths)


def on_cuda(memory):
    """``memory`` of the device in bytes: all states of 8B fit in 128 GiB, adapters in 80 GB."""
    common = {
        "device": "cuda",
        "dtype": "bf16",
        "vocab": 128_256,
        "steps": 8,
        "warm_up": 2,
        "learning_rate": 5e-6,
        "budget": 16_384,
        "providers": ("fastpref", "trl_varlen"),
    }
    states = {"precomputed": True} if memory > 120 << 30 else {"lora": 16}
    eight = common | EIGHT_B | states | {"checkpointing": True, "mfu": 0.4}
    one = common | ONE_B
    above = "peak_above_state_mib"
    harmless, long = ({"targets": {"trl_varlen": Target(n, 0.7, above)}} for n in (1.5, 2))
    sdpa = {"providers": ("fastpref", "trl_varlen", "trl_sdpa")}
    yield Case(name="8B", pairs=32, micro_batch=4, **eight, **harmless)
    yield Case(name="1B", pairs=8, micro_batch=2, **one, **long, **LONG)
    yield Case(name="1B", pairs=64, micro_batch=8, **(one | sdpa), **harmless)
    yield Case(name="8B", pairs=4, micro_batch=2, **eight, **long, **LONG)


def cases(device):
    """The most important first."""
    if device == "cpu":
        return list(on_cpu())
    return list(on_cuda(torch.cuda.get_device_properties(0).total_memory))
