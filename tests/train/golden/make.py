"""Golden curves: 30 steps of TRL's SFTTrainer and DPOTrainer, which test_golden.py holds ours to.

``python tests/train/golden/make.py`` writes sft.json and dpo.json anew; it needs the bench extra.
"""

import hashlib
import json
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

from fastpref.data.synthetic import reviews
from fastpref.models.tiny import tiny_model, tiny_tokenizer

FOLDER = Path(__file__).parent
STEPS, ROWS, VOCAB = 30, 120, 320  # 8 rows a step: the data are read twice
SHARED = {
    "max_steps": STEPS,
    "train_sampling_strategy": "sequential",
    "weight_decay": 0.1,
    "logging_steps": 1,
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
}
OPTIONS = {
    "sft": SHARED
    | {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 5,
        "max_grad_norm": 0.65,  # some steps are clipped, some not
    },
    "dpo": SHARED
    | {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
        "beta": 0.2,
        "max_grad_norm": 2.4,
    },
}
# SFT: TRL's accuracy and entropy are means of the two micro-batches' means, ours are over the
# step's tokens. Both: tokens per second and the like are no part of training.
METRICS = {
    "sft": ("loss", "grad_norm", "learning_rate", "num_tokens"),
    "dpo": (
        *("loss", "grad_norm", "learning_rate", "num_tokens", "entropy", "mean_token_accuracy"),
        *("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
        *("logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected"),
    ),
}


def inputs(method):
    """The rows, the model and its tokenizer that both trainers start from."""
    texts = reviews(2 * ROWS, seed=11)
    first, second = texts[:ROWS], texts[ROWS:]
    if method == "sft":
        rows = [{"prompt": r.prompt, "completion": r.completion} for r in first]
    else:
        rows = [
            {"prompt": a.prompt, "chosen": a.completion, "rejected": b.completion}
            for a, b in zip(first, second, strict=True)
        ]
    tokenizer = tiny_tokenizer((r.prompt + r.completion for r in texts), VOCAB)
    model = tiny_model(tokenizer, hidden=32, layers=2, heads=4, kv_heads=2, seed=7)
    return rows, model, tokenizer


def weight_sums(model):
    """Sum and sum of magnitudes of each tensor: a CPU with other vector units draws the same
    numbers to rounding only, which a hash would not forgive."""
    return {
        name: [w.double().sum().item(), w.double().abs().sum().item()]
        for name, w in model.state_dict().items()
    }


def hash_ids(rows):
    """Hash of token ids: each row's prompt, then its completions."""
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def trl_ids(method, dataset):
    """Prompt and completions of each row as TRL tokenised them."""
    if method == "dpo":
        return [
            [row[f"{part}_ids"] for part in ("prompt", "chosen", "rejected")] for row in dataset
        ]
    prompts = [row["labels"].count(-100) for row in dataset]
    ids = [row["input_ids"] for row in dataset]
    return [[row[:n], row[n:]] for row, n in zip(ids, prompts, strict=True)]


def make(method, folder):
    """Train with TRL; returns what the golden file holds."""
    import trl
    from datasets import Dataset

    rows, model, tokenizer = inputs(method)
    model.save_pretrained(folder)
    config, trainer = {
        "sft": (trl.SFTConfig, trl.SFTTrainer),
        "dpo": (trl.DPOConfig, trl.DPOTrainer),
    }[method]
    args = config(output_dir=folder, report_to="none", disable_tqdm=True, **OPTIONS[method])
    dataset = Dataset.from_list(rows)
    run = trainer(str(folder), args=args, train_dataset=dataset, processing_class=tokenizer)
    assert run.model.dtype == torch.float32
    run.train()
    logged = run.state.log_history[:STEPS]
    return {
        "versions": {name: version(name) for name in ("trl", "transformers", "torch")},
        "options": OPTIONS[method],
        "token_ids": hash_ids(trl_ids(method, run.train_dataset)),
        "weights": weight_sums(model),
        "curve": {name: [row[name] for row in logged] for name in METRICS[method]},
    }


if __name__ == "__main__":
    for name in OPTIONS:
        with tempfile.TemporaryDirectory() as scratch:
            golden = make(name, scratch)
        (FOLDER / f"{name}.json").write_text(json.dumps(golden, indent=1) + "\n")
