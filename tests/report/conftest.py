"""Folders as runs and quickstarts leave them, small and made up."""

import json
import math

import pytest
import yaml

HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(2)> & \"quotes\" 'n' {{ 7 * 7 }}\n\n"
    + "antidisestablishment" * 40
    + "\n\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \U0001f600"
    + "\u202eturned\u2028and split \x00\x1b[31m \ud800 end"
)


def row_at(step, scale=1.0):
    """One training line of DPO."""
    return {
        "step": step,
        "epoch": step / 100,
        "loss": 0.69 - 0.002 * step * scale,
        "rewards/chosen": -0.01 * step,
        "rewards/rejected": -0.03 * step * scale,
        "rewards/margins": 0.02 * step * scale,
        "rewards/accuracies": 0.5 + 0.003 * step,
        "logps/chosen": -300.0 - step,
        "logps/rejected": -280.0 - 2 * step,
        "entropy": 2.5 - 0.01 * step,
        "mean_token_accuracy": 0.4,
        "grad_norm": 3.0 + math.sin(step),
        "learning_rate": 5e-7 * (1 - step / 101),
        "num_tokens": 1000 * step,
        "tokens_per_second": 20_000.0 + step,
        "peak_memory_gib": 7.5,
    }


def dpo_rows(steps=40, scale=1.0):
    rows = []
    for step in range(2, steps + 1, 2):
        rows.append(row_at(step, scale))
        if step % 10 == 0:
            values = {k: v for k, v in row_at(step, 0.8 * scale).items() if k != "step"}
            names = [n for n in values if "/" in n or n in ("loss", "entropy")]
            rows.append({"step": step, **{f"eval_{n}": values[n] for n in names}})
    return rows


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def make_run(tmp_path):
    """make_run(name, rows=..., config=..., samples=...) -> the folder."""

    def make(name, rows=None, config=None, samples=()):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        write_lines(folder / "metrics.jsonl", dpo_rows() if rows is None else rows)
        keys = {"run_name": None, "output_dir": f"runs/{name}", "beta": 0.1, "loss_type": "sigmoid"}
        (folder / "run.yaml").write_text(yaml.safe_dump(keys | (config or {})))
        if samples:
            write_lines(folder / "samples.jsonl", samples)
        return folder

    return make


@pytest.fixture
def make_quickstart(tmp_path, make_run):
    """make_quickstart(name, seeds=...) -> the folder."""

    def make(name="quickstart", seeds=2, **summary):
        folder = tmp_path / name
        runs = []
        for seed in range(seeds):
            make_run(f"{name}/seed-{seed}/dpo", dpo_rows(10 + seed))
            figures = {"gold_reward_before": -0.1 + seed / 50, "gold_reward_after": 0.3 + seed / 50}
            errors = {"gold_reward_before_se": 0.02, "gold_reward_after_se": 0.04, "kl_se": 0.5}
            runs.append({"seed": seed, "kl": 4.0 + seed, **figures, **errors})
        means = {"gold_reward_before": -0.1, "gold_reward_after": 0.3, "gain": 0.4, "kl": 4.5}
        rest = {"gain_se": 0.05, "accuracy": 0.71, "seconds": 33.0, "shuffle_preferences": False}
        written = means | rest | {"runs": runs} | summary
        (folder / "summary.json").write_text(json.dumps(written))
        samples = [{"prompt": "The film", "before": " was dull .", "after": " was a joy ."}]
        (folder / "samples.json").write_text(json.dumps(samples))
        return folder

    return make


@pytest.fixture
def hostile(make_run):
    """A run whose every text tries to break out of the page."""
    samples = [
        {"step": step, "row": row, "prompt": f"{row}{HOSTILE}", "completion": f"{step}{HOSTILE}"}
        for step in (0, 40)
        for row in range(6)
    ]
    config = {"run_name": HOSTILE.split("\n")[0], "model_name_or_path": "m" * 300}
    return make_run("hostile", config=config, samples=samples)
