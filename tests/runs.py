"""Runs in processes of their own, started fast, marked phase by phase, and killed on purpose."""

import contextlib
import json
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file

from fastpref.data.synthetic import reviews
from fastpref.data.tokenize import Group
from fastpref.methods.base import Method, Scored, mean_over
from fastpref.train import checkpoint, reference, run
from fastpref.train.loop import Trainer

TIMES = (
    *("tokens_per_second", "computed_tokens_per_second", "tflops_per_second"),
    *("eval_runtime", "peak_memory_gib"),
)
LIMIT = 120  # seconds: no run here takes more than a few
# a fork of a process that has imported everything; no thread of it computes
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fastpref.train.run", "runs"])
PHASES = {
    "fill": (reference, "score"),
    "step": (Trainer, "step"),
    "evaluation": (Trainer, "evaluate"),
    "save": (checkpoint, "save"),
    "final save": (checkpoint, "publish"),
}


@dataclass(frozen=True)
class BestOfFour(Method):
    """The first of four completions against each of the others."""

    kind: ClassVar[str] = "preference"
    needs_reference: ClassVar[bool] = True
    precomputes_reference: ClassVar[bool] = True
    metric_names: ClassVar[tuple[str, ...]] = ("gap",)

    def score(self, model, batch, reference):
        logps = self.sum_logps(model(batch).logp, batch)
        return Scored({"ratio": (logps - batch.extras["ref_logp"]).view(-1, 4)}, {})

    def loss(self, values, facts):
        gap = values["ratio"][:, :1] - values["ratio"][:, 1:]
        losses = -torch.nn.functional.logsigmoid(0.1 * gap).mean(1)
        return losses.sum(), {"gap": mean_over(gap)}


def groups_of_four(tokenizer, count):
    texts = [tokenizer(r.completion)["input_ids"] for r in reviews(4 * count, seed=9)]
    prompt = tokenizer("The film was")["input_ids"]
    return [
        Group(prompt, tuple(texts[4 * i : 4 * i + 4]), (None,) * 4, i, {}) for i in range(count)
    ]


def work(config, four, marks):
    """One run, in the child: what it is about to do goes down the pipe first."""
    torch.set_num_threads(1)
    if marks is not None:
        for phase, (owner, name) in PHASES.items():
            setattr(owner, name, marked(getattr(owner, name), phase, marks))
    if not four:
        run.dpo(config)
        return
    config = run.as_config(run.DPOConfig, config)
    run.read_data = lambda config, method, data, model, tokenizer: (
        groups_of_four(tokenizer, 20),
        groups_of_four(tokenizer, 6),
    )
    run.run(config, BestOfFour(), run.Data(), None, None, ())


def marked(function, phase, marks):
    def call(*args, **kwargs):
        marks.send((phase, time.monotonic()))
        out = function(*args, **kwargs)
        marks.send((None, time.monotonic()))
        return out

    return call


class Run:
    """A child process; ``with`` ends it."""

    def __init__(self, config, *, four=False, log=None):
        self.marks, theirs = CONTEXT.Pipe(duplex=False)
        self.process = CONTEXT.Process(target=logged, args=(log, work, config, four, theirs))
        self.process.start()
        theirs.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.join(LIMIT)
        self.marks.close()

    def next_mark(self):
        """(phase, time) of the next mark; None when the process is gone."""
        try:
            assert self.marks.poll(LIMIT), "the run hangs"
            return self.marks.recv()
        except (EOFError, ConnectionResetError):
            return None

    def until(self, phase, count):
        """Wait for the start of the phase's ``count``-th turn; False if the run ends before."""
        while count and (mark := self.next_mark()):
            count -= mark[0] == phase
        return count == 0

    def signal(self, number):
        os.kill(self.process.pid, number)

    def end(self):
        """Wait; the exit code."""
        while self.next_mark():
            pass
        self.process.join(LIMIT)
        return self.process.exitcode


def logged(log, function, *args):
    """Call the function with what it prints going to a file."""
    handle = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    function(*args)


def finish(config, *, four=False, log=None):
    """Run to the end; its exit code."""
    with Run(config, four=four, log=log) as child:
        return child.end()


def kill(config, phase, count, delay, *, four=False):
    """SIGKILL ``delay`` seconds into a phase; whether the run was still there to be killed."""
    with Run(config, four=four) as child:
        if not child.until(phase, count):
            return False
        time.sleep(delay)
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            child.signal(signal.SIGKILL)
        return child.end() == -signal.SIGKILL


def durations(config, *, four=False):
    """How long each phase takes and how often it comes, in an undisturbed run."""
    found = {phase: [] for phase in PHASES}
    with Run(config, four=four) as child:
        opened = []
        while mark := child.next_mark():
            if mark[0]:
                opened.append(mark)
            else:
                phase, began = opened.pop()
                found[phase].append(mark[1] - began)
        assert child.end() == 0
    return found


def rows_of(path):
    lines = Path(path).read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in TIMES} for x in lines]


def differences(one, other):
    """What two finished runs do not share bit for bit: weights, metrics, samples, left-overs."""
    one, other = Path(one), Path(other)
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    found = [] if a.keys() == b.keys() else ["weights' names"]
    found += [name for name in a if not torch.equal(a[name], b.get(name, torch.zeros(())))]
    for name in ("metrics.jsonl", "samples.jsonl"):
        found += [] if rows_of(one / name) == rows_of(other / name) else [name]
    return found + [p.name for p in other.iterdir() if p.name.startswith(".")]
