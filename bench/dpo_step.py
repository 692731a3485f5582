"""DPO runs of fastpref and of TRL on one folder, each in a process that is paced step by step.

``python -m bench.dpo_step PROVIDER FOLDER`` is that process. It answers after each step with a
line of JSON on stdout and waits for one on stdin; its last line holds the run's logs and memory.
"""

import contextlib
import copy
import importlib.util
import json
import os
import subprocess
import sys
import threading
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bench.harness import ROOT, memory_mib
from fastpref.train.callbacks import Callback

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
LONGEST = 300  # seconds that a run may take to answer, after which it is ended
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A Llama of random weights and how it is trained, which both sides are told alike."""

    device: str
    dtype: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int
    pairs: int
    steps: int
    learning_rate: float
    checkpointing: bool = False
    micro_batch: int | None = None  # pairs that a padded forward holds; None: the step's
    budget: int | None = None  # tokens that a packed forward holds at most
    precomputed: bool = False  # the reference; else it is live
    lora: int | None = None  # the rank; the reference is the model without its adapter

    def sizes(self):
        """The model's config by transformers' names."""
        return {
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "intermediate_size": self.mlp,
            "vocab_size": self.vocab,
            "max_position_embeddings": 16_384,
        }

    def options(self):
        """Keys that both trainers know."""
        micro_batch = self.micro_batch or self.pairs
        liger = self.device == "cuda" and importlib.util.find_spec("liger_kernel") is not None
        return {
            "per_device_train_batch_size": micro_batch,
            "gradient_accumulation_steps": self.pairs // micro_batch,
            "max_steps": self.steps,
            "max_length": 16_384,
            "learning_rate": self.learning_rate,
            "train_sampling_strategy": "sequential",
            "gradient_checkpointing": self.checkpointing,
            "precompute_ref_log_probs": self.precomputed,
            # the weights' own dtype is that of the products, but for adapters in fp32
            "bf16": self.lora is not None,
            "use_liger_kernel": liger,
            "use_cpu": self.device == "cpu",
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "report_to": "none",
        }

    def own_options(self):
        """Keys that only fastpref knows, where they say something."""
        found = {"report": False}
        if self.budget is not None:
            found["max_tokens_per_micro_batch"] = self.budget
        if self.dtype != "fp32":
            found |= {"dtype": DTYPES[self.dtype], "fp32_master_weights": False}
        if self.lora is not None:
            found["lora"] = self.adapter()
        return found

    def adapter(self):
        return {"r": self.lora, "alpha": 2 * self.lora, "target_modules": list(ADAPTED)}

    def model(self, tokenizer):
        """The same weights in every process, made where they are to be."""
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        config = AutoConfig.for_model("llama", bos_token_id=None, **ends, **self.sizes())
        torch.manual_seed(0)
        with torch.device(self.device):
            return AutoModelForCausalLM.from_config(config, dtype=DTYPES[self.dtype])

    def write(self, folder, tokenizer, rows):
        tokenizer.save_pretrained(folder)
        (folder / "rows.json").write_text(json.dumps(rows))
        (folder / "setup.json").write_text(json.dumps(asdict(self)))


class Run:
    """A provider's run; it has taken its first step when this is built, and each call takes one."""

    def __init__(self, provider, folder):
        self.provider = provider
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.dpo_step", provider, str(folder)],
            cwd=ROOT,
            env={
                **os.environ,
                "HF_HUB_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            self.answer()
        except BaseException:
            self.stop()
            raise

    def __call__(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.answer()

    def answer(self):
        guard = threading.Timer(LONGEST, self.process.kill)
        guard.start()
        try:
            line = self.process.stdout.readline()
        finally:
            guard.cancel()
        if not line:
            code = self.process.wait()
            raise RuntimeError(f"{self.provider} ended with {code}, or after {LONGEST} s was ended")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def finish(self):
        """What the run logged and its memory; steps that are left are taken."""
        self.process.stdin.close()
        while "log" not in (answer := self.answer()):
            pass
        return answer

    def stop(self):
        self.process.kill()
        self.process.wait()


class Finished(Exception):
    """The last step is logged: a run's other ends, such as a model of 16 GB on disk, are no use."""


class Pace(Callback):
    """fastpref's run, step by step; ``log`` is what it wrote of each."""

    def __init__(self, on_step, steps):
        self.paced, self.steps, self.log = on_step, steps, []

    def on_step(self, step, engine):
        self.paced(step)

    def on_log(self, step, row):
        self.log.append(row)
        if step == self.steps:
            raise Finished


def train_fastpref(setup, model, tokenizer, rows, folder, on_step):
    from fastpref.train.run import dpo

    pace = Pace(on_step, setup.steps)
    options = {**setup.options(), **setup.own_options(), "output_dir": str(folder)}
    with contextlib.suppress(Finished):
        dpo(options, model, rows, tokenizer=tokenizer, callbacks=[pace])
    return pace.log


def train_trl(setup, model, tokenizer, rows, folder, on_step, *, attention=None, drop_rows=False):
    import trl
    from datasets import Dataset
    from transformers import TrainerCallback

    class Pace(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            on_step(state.global_step)

    if attention is not None:
        model.set_attn_implementation(attention)
    more = {}
    if setup.lora is not None:
        from peft import LoraConfig

        adapter = setup.adapter()
        more["peft_config"] = LoraConfig(lora_alpha=adapter.pop("alpha"), **adapter)
    elif not setup.precomputed:
        more["ref_model"] = copy.deepcopy(model)
    # a name for a cache that nobody reads, at some 32 GB hashed for 8B weights
    unhashed = mock.patch.object(trl.trainer.dpo_trainer, "hash_module", return_value="")
    # TRL's head leaves out rows of label -100 where this name says that Triton runs; the tiles ask
    # the name of trl.kernels, and stay in torch
    dropping = mock.patch.object(trl.trainer.utils, "_use_triton", return_value=True)
    with unhashed, dropping if drop_rows else contextlib.nullcontext():
        trainer = trl.DPOTrainer(
            model,
            args=trl.DPOConfig(**setup.options(), output_dir=str(folder)),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Pace()],
            **more,
        )
        trainer.train()
    return trainer.state.log_history[: trainer.state.global_step]


def train_trl_varlen(*given):
    from bench.unpadded_attention import NAME, register

    register()
    return train_trl(*given, attention=NAME)


PROVIDERS = {
    "fastpref": train_fastpref,
    "trl": train_trl,
    "trl_rows_dropped": lambda *given: train_trl(*given, drop_rows=True),
    "trl_varlen": train_trl_varlen,
    "trl_sdpa": lambda *given: train_trl(*given, attention="sdpa"),
}


class Memory:
    """Peaks in MiB: on CUDA of what tensors take, past the first step; else of the process."""

    def __init__(self, device):
        self.device, self.peak, self.base = device, 0.0, memory_mib()[0]

    def after(self, step):
        """Whatever the device still had to do is done; what stays between steps is the base."""
        if self.device == "cpu":
            _, self.peak = memory_mib()
            return
        torch.cuda.synchronize()
        if step > 1:
            self.peak = max(self.peak, torch.cuda.max_memory_allocated() / 2**20)
        self.base = torch.cuda.memory_allocated() / 2**20
        torch.cuda.reset_peak_memory_stats()

    def found(self):
        above = "model" if self.device == "cpu" else "state"
        return {"peak_mib": self.peak, f"peak_above_{above}_mib": self.peak - self.base}


def main(provider, folder):
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what trainers print is no answer

    def say(value):
        print(json.dumps(value), file=answers, flush=True)

    try:
        setup = Setup(**json.loads((folder / "setup.json").read_text()))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        rows = json.loads((folder / "rows.json").read_text())
        model = setup.model(tokenizer)
        memory = Memory(setup.device)

        def on_step(step):
            memory.after(step)
            say({"step": step})
            sys.stdin.readline()  # after the last too: what follows would run beside another's

        log = PROVIDERS[provider](setup, model, tokenizer, rows, folder / provider, on_step)
        say({"log": log, "memory": memory.found()})
    except Exception as error:  # of a trainer, of whatever kind: the driver says it and goes on
        traceback.print_exc()
        say({"error": f"{type(error).__name__}: {error}"})
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
