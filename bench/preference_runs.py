"""Every preference loss as a run: 20 steps each from one fine-tuned model, on the same pairs.

``FASTPREF_DATA=DIR python -m bench.preference_runs --out DIR`` (without the data: made reviews)
appends a row for each: loss and margin over the rows that were trained on, before and after, and
how often a held-out pair is ranked rightly: by log-probs per token, before and after, and by
log-ratios to the fine-tuned model, which tell no pair apart before.
Rankings are four models' solutions of a question, right ones above wrong ones, where the data are
there. ``--table FILE`` prints rows as Markdown.
"""

import argparse
import gzip
import json
import os
import tempfile
from pathlib import Path

import torch

from bench.harness import facts, write
from bench.pairs import pairs
from fastpref.data.formats import to_examples
from fastpref.data.packing import pack, split_groups
from fastpref.data.tokenize import tokenize
from fastpref.losses.pairs import loss_inputs
from fastpref.losses.preference import LOSSES
from fastpref.losses.ranking import RANKING_LOSSES
from fastpref.methods.dpo import DPO
from fastpref.models.load import load_model, load_tokenizer
from fastpref.models.model import LogpModel
from fastpref.models.tiny import tiny_model, tiny_tokenizer
from fastpref.train.engine import TorchEngine
from fastpref.train.forward import Forward
from fastpref.train.run import dpo, kto, sft

UNPAIRED = ("kto", "bco", "apo_zero_unpaired")
STEPS, BATCH, HELD_OUT, TRAIN = 20, 16, 300, 1600
# as papers and trainers have them where it is not 0.1
BETAS = {"simpo": 2.0, "sigmoid_norm": 5.0, "alpha_dpo": 2.5, "nca_pair": 0.01, "sppo": 0.01}
BETAS |= {
    "sppo_hard": 0.01,
    "discopop": 0.05,
    "aot": 0.01,
    "aot_unpaired": 0.01,
    "aot_global": 0.01,
}
# what a loss may need and the data do not hold: the same for every pair
COLUMNS = {"margin": 0.5, "win_rate": 0.9}
COMMON = {
    "max_length": 256,
    "per_device_train_batch_size": BATCH,
    "per_device_eval_batch_size": BATCH,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "save_strategy": "no",
    "report": False,
    "disable_tqdm": True,
}


def prepare(folder, train):
    """A tiny model that has seen the chosen completions."""
    tokenizer = tiny_tokenizer((r["prompt"] + r["chosen"] for r in train), 4096)
    model = tiny_model(tokenizer, hidden=128, layers=4, heads=4)
    config = {"output_dir": str(folder), "num_train_epochs": 1, "learning_rate": 1e-3, **COMMON}
    sft(config, model, train, tokenizer=tokenizer)


def rankings():
    """Questions with four models' solutions; None where the data are not there."""
    file = Path(os.environ.get("FASTPREF_DATA", ".")) / "gsm8k" / "model_solutions.jsonl.gz"
    if not file.exists():
        return None
    rows = []
    for line in gzip.open(file, "rt"):
        row = json.loads(line)
        solutions = [value for value in row.values() if isinstance(value, dict)]
        scores = [int(solution["is_correct"]) for solution in solutions]
        if len(set(scores)) > 1 and all(solution["solution"].strip() for solution in solutions):
            texts = [" " + solution["solution"].strip() for solution in solutions]
            rows.append({"prompt": row["question"], "completions": texts, "scores": scores})
    return rows


def rows_for(name, train):
    """As many rows as the steps take, with what the loss reads."""
    ranked = rankings() if name in RANKING_LOSSES else None
    if ranked is not None:
        return ranked[: STEPS * BATCH]
    wanted = loss_inputs(name) if name in LOSSES else {}
    more = {key: value for key, value in COLUMNS.items() if not wanted.get(key, True)}
    return [{**row, **more} for row in train[: STEPS * BATCH]]


@torch.no_grad()
def accuracies(model, start, tokenizer, rows):
    """How often pairs are ranked rightly, by what."""
    groups, _ = tokenize(to_examples(rows, "preference")[0], tokenizer, max_length=256)
    reference = LogpModel(load_model(str(start))).requires_grad_(False)
    forward = Forward(TorchEngine(model, torch.device("cpu")), DPO(), reference)
    right = {"logp_accuracy_before": 0, "logp_accuracy_after": 0, "ratio_accuracy": 0}
    for part in split_groups(groups, max_groups=BATCH):
        x = forward.score(pack(part)).values
        ratio, gaps = {}, {}
        for side in ("chosen", "rejected"):
            ratio[side] = x[f"{side}_logps"] - x[f"ref_{side}_logps"]
            for prefix in ("", "ref_"):
                gaps[prefix, side] = x[f"{prefix}{side}_logps"] / x[f"{side}_lengths"]
        right["ratio_accuracy"] += (ratio["chosen"] > ratio["rejected"]).sum().item()
        for prefix, name in (("ref_", "logp_accuracy_before"), ("", "logp_accuracy_after")):
            right[name] += (gaps[prefix, "chosen"] > gaps[prefix, "rejected"]).sum().item()
    return {name: count / len(groups) for name, count in right.items()}


def train_with(name, start, folder, train, held_out):
    """The row of one loss."""
    rows = rows_for(name, train)
    beta = BETAS.get(name, 0.1)
    config = {
        "output_dir": str(folder),
        "loss_type": name,
        "beta": beta,
        "max_steps": STEPS,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "eval_steps": STEPS,
        "eval_on_start": True,
        **COMMON,
    }
    learn = kto if name in UNPAIRED else dpo
    tokenizer = load_tokenizer(str(start))
    result = learn(config, load_model(str(start)), rows, rows, tokenizer=tokenizer)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    before, after = (line for line in lines if "eval_loss" in line)
    kept = {"loss": "eval_loss", "margin": "eval_rewards/margins"}
    return {
        "op": "preference_run",
        "loss_type": name,
        "beta": beta,
        "steps": STEPS,
        "batch": BATCH,
        "held_out": len(held_out),
        **{f"{key}_before": before[metric] for key, metric in kept.items()},
        **{f"{key}_after": after[metric] for key, metric in kept.items()},
        **accuracies(result.model, start, tokenizer, held_out),
    }


def markdown(rows):
    """The newest row of each loss."""
    newest = {row["loss_type"]: row for row in rows}
    head = ("loss_type", "beta", "loss", "margin")
    head += ("held-out accuracy of log-probs per token", "of log-ratios")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in newest.values():
        moves = (f"{row[f'{k}_before']:.4g} → {row[f'{k}_after']:.4g}" for k in ("loss", "margin"))
        cells = (row["loss_type"], f"{row['beta']:g}", *moves)
        logps = f"{row['logp_accuracy_before']:.3f} → {row['logp_accuracy_after']:.3f}"
        lines.append(f"| {' | '.join(cells)} | {logps} | {row['ratio_accuracy']:.3f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder whose file of this machine gets the rows")
    parser.add_argument("--types", nargs="*", help="only these")
    parser.add_argument("--table", type=Path, help="print the rows of this file instead")
    args = parser.parse_args()
    if args.table:
        print(markdown(map(json.loads, args.table.read_text().splitlines())))
        return
    data, rows = pairs(TRAIN + HELD_OUT)
    train, held_out = rows[:TRAIN], rows[TRAIN:]
    about = {**facts(), "data": data, "columns": COLUMNS}
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        start = Path(folder) / "start"
        prepare(start, train)
        for name in args.types or [*LOSSES, *RANKING_LOSSES, *UNPAIRED]:
            write(
                {**train_with(name, start, Path(folder) / name, train, held_out), **about}, args.out
            )


if __name__ == "__main__":
    main()
