"""DPO runs of fastpref and of TRL from one folder, each in a process that is paced step by step.

``python -m bench.dpo_step PROVIDER FOLDER`` is that process. It answers after each step with a
line of JSON on stdout and waits for one on stdin; its last line holds the run's logs and memory.
"""

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from bench.harness import ROOT, facts, memory_mib
from fastpref.data.formats import load_examples
from fastpref.data.synthetic import reviews
from fastpref.models.tiny import tiny_model, tiny_tokenizer

PROVIDERS = ("fastpref", "trl", "trl_rows_dropped")


@dataclass(frozen=True)
class Case:
    """A model and how it is trained; the first step is no part of the timing."""

    layers: int
    hidden: int
    vocab: int
    pairs: int
    steps: int
    learning_rate: float

    def __str__(self):
        return f"llama {self.layers}x{self.hidden}, V={self.vocab}, {self.pairs} pairs, fp32"

    def options(self):
        """Keys that both trainers know."""
        return {
            "per_device_train_batch_size": self.pairs,
            "max_steps": self.steps,
            "learning_rate": self.learning_rate,
            "train_sampling_strategy": "sequential",
            "gradient_checkpointing": False,
            "bf16": False,
            "use_cpu": True,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "report_to": "none",
        }


def prepare(case, folder):
    """Write model, tokenizer, rows and options; returns the name of the data."""
    data, rows = pairs(case.pairs * case.steps)
    texts = (row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected"))
    tokenizer = tiny_tokenizer(texts, case.vocab)
    model = tiny_model(
        tokenizer, hidden=case.hidden, layers=case.layers, heads=4, vocab_size=case.vocab
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "options.json").write_text(json.dumps(case.options()))
    return data


def pairs(count):
    """Harmless pairs where FASTPREF_DATA names a folder that has them, else made ones.

    Prompts are explicit: where they are not, TRL ends them inside a word that both replies share.
    """
    file = Path(os.environ.get("FASTPREF_DATA", ".")) / "hh-rlhf" / "harmless-base-train.jsonl.gz"
    if file.exists():
        examples = load_examples(str(file), "preference")[0][:count]
        triples = [(e.prompt, *e.completions) for e in examples]
    else:  # about as long: four reviews, then one or two more
        texts = iter(f"{r.prompt}{r.completion}" for r in reviews(7 * count, seed=0))
        take = [(" ".join(next(texts) for _ in range(n)) for n in (4, 1, 2)) for _ in range(count)]
        triples = [(prompt, f" {a}", f" {b}") for prompt, a, b in take]
    rows = [dict(zip(("prompt", "chosen", "rejected"), t, strict=True)) for t in triples]
    return ("harmless" if file.exists() else "synthetic"), rows


class Run:
    """A provider's run; it has taken its first step when this is built, and each call takes one."""

    def __init__(self, provider, folder):
        self.provider = provider
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.dpo_step", provider, str(folder)],
            cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.answer()

    def __call__(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.provider} ended with {self.process.wait()}")
        return json.loads(line)

    def finish(self):
        """What the run logged, its memory and its surroundings; steps that are left are taken."""
        self.process.stdin.close()
        *_, last = self.process.stdout
        if self.process.wait():
            raise RuntimeError(f"{self.provider} ended with {self.process.returncode}")
        return json.loads(last)


def train_fastpref(model, tokenizer, rows, options, on_step):
    from fastpref.train.callbacks import Callback
    from fastpref.train.run import dpo

    class Pace(Callback):
        def on_step(self, step, engine):
            on_step(step)

    result = dpo(options, model, rows, tokenizer=tokenizer, callbacks=[Pace()])
    lines = (result.output_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def train_trl(model, tokenizer, rows, options, on_step, *, drop_rows):
    import trl
    from datasets import Dataset
    from transformers import TrainerCallback

    class Pace(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            on_step(state.global_step)

    trainer = trl.DPOTrainer(
        model,
        args=trl.DPOConfig(**options),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Pace()],
    )
    # TRL's head leaves out rows of label -100 where this name says that Triton runs; the tiles ask
    # the name of trl.kernels, and stay in torch
    dropping = mock.patch.object(trl.trainer.utils, "_use_triton", return_value=True)
    with dropping if drop_rows else contextlib.nullcontext():
        trainer.train()
    return trainer.state.log_history[: trainer.state.global_step]


def main(provider, folder):
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what trainers print is no answer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def say(value):
        print(json.dumps(value), file=answers, flush=True)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    rows = json.loads((folder / "rows.json").read_text())
    options = json.loads((folder / "options.json").read_text())
    options["output_dir"] = str(folder / provider)
    base, _ = memory_mib()
    peak = 0.0

    def on_step(step):
        nonlocal peak
        _, peak = memory_mib()
        say(step)
        sys.stdin.readline()  # after the last step too: what follows would run beside another's

    given = model, tokenizer, rows, options, on_step
    if provider == "fastpref":
        log = train_fastpref(*given)
    else:
        log = train_trl(*given, drop_rows=provider == "trl_rows_dropped")
    memory = {"peak_mib": peak, "peak_above_model_mib": peak - base}
    say({"log": log, "memory": memory, "facts": facts()})


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
