"""The commands as a person types them: what they do, what they say, how they exit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastpref.cli import main

DATA = os.environ.get("FASTPREF_DATA")
SMALL = ["--per_device_train_batch_size", "4", "--max_steps", "2", "--no_gradient_checkpointing"]


def write_pairs(path, count=24):
    rows = [
        {"prompt": f"{i} + {i} =", "chosen": f" {2 * i}", "rejected": f" {2 * i + 1}"}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(*args, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "fastpref.cli", *args],
        capture_output=True,
        text=True,
        timeout=180,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )


def test_tiny_sft_dpo_chain(tmp_path):
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    held = write_pairs(tmp_path / "held.jsonl", 6)
    tiny, tuned, out = (str(tmp_path / name) for name in ("tiny", "sft", "dpo"))
    small = ["--hidden_size", "32", "--num_hidden_layers", "1", "--vocab_size", "300"]
    assert main(["tiny", "--dataset_name", pairs, "--output_dir", tiny, *small]) == 0
    sft = ["--model_name_or_path", tiny, "--output_dir", tuned, *SMALL]
    assert main(["sft", "--dataset_name", pairs, *sft]) == 0
    done = run(
        *("dpo", "--model_name_or_path", tuned, "--output_dir", out, *SMALL),
        *("--dataset_name", pairs, "--eval_dataset_name", held, "--eval_steps", "2"),
        "--logging_first_step",
        "--local_rank=0",
    )
    assert done.returncode == 0, done.stderr
    assert "train: 24 groups of 24 rows" in done.stderr and "loss 0.6931" in done.stderr
    rows = [json.loads(x) for x in (tmp_path / "dpo" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 2] and "eval_rewards/accuracies" in rows[-1]
    assert (tmp_path / "dpo" / "model.safetensors").exists()
    again = run("dpo", "--model_name_or_path", tuned, "--dataset_name", pairs, "--output_dir", out)
    assert again.returncode == 1 and "holds a run already" in again.stderr


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ([], 2, ""),
        (["dop"], 2, "unknown command 'dop'"),
        (["dpo", "pairs.jsonl"], 1, "need --key value, got 'pairs.jsonl'"),
        (["dpo", "--bata", "1"], 1, "nearest is 'beta'"),
        (["dpo", "--beta", "strong"], 1, "beta"),
        (["dpo", "--config", "nowhere.yaml"], 1, "cannot read the recipe nowhere.yaml"),
        (["dpo"], 1, "need model_name_or_path"),
        (["dpo", "--model_name_or_path", "./nowhere"], 1, "./nowhere"),
        (["dpo", "--model_name_or_path", "x", "--output_dir", __file__], 1, "an output_dir"),
        (["tiny"], 1, "dataset_name"),
        (["tiny", "--dataset_name", "", "--output_dir", "x"], 1, "got an empty name"),
        (["tiny", "--dataset_name", "x", "--output_dir", "y", "-v", "3"], 1, "one value for"),
        (["quickstart", "--seed", "x"], 1, "seed"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_errors_are_one_message_and_no_trace(args, code, message, capsys):
    assert main(args) == code
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


def test_bad_line_is_named(tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"pro\n')
    out = str(tmp_path / "tiny")
    assert main(["tiny", "--dataset_name", str(tmp_path / "bad.jsonl"), "--output_dir", out]) == 1
    assert "bad.jsonl:2" in capsys.readouterr().err


def test_help_explains_every_key(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["dpo", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--beta BETA Strength of the pull to the reference" in text
    assert main(["--help"]) == 0 and "quickstart" in capsys.readouterr().out


@pytest.mark.skipif(DATA is None, reason="FASTPREF_DATA names no folder")
def test_real_pairs(tmp_path):
    """Two steps on the harmless pairs from the recipes that ship."""
    folder, recipes = f"{DATA}/hh-rlhf", Path(__file__).parents[1] / "fastpref" / "recipes"
    data = ["--dataset_name", f"{folder}/harmless-base-train.jsonl.gz"]
    held = ["--eval_dataset_name", f"{folder}/harmless-base-eval.jsonl.gz"]
    tiny = str(tmp_path / "tiny")
    assert main(["tiny", *data, "--output_dir", tiny, "--vocab_size", "512"]) == 0
    for command, before in (("sft", tiny), ("dpo", str(tmp_path / "sft"))):
        config = ["--config", str(recipes / f"harmless-{command}.yaml"), *data, *held]
        config += ["--model_name_or_path", before, "--output_dir", str(tmp_path / command)]
        config += ["--max_steps", "2", "--max_length", "96", "--precompute_ref_log_probs", "false"]
        config = config if command == "dpo" else config[:-2]
        assert main([command, *config]) == 0
    rows = [json.loads(x) for x in (tmp_path / "dpo" / "metrics.jsonl").read_text().splitlines()]
    assert 0.3 < rows[-1]["eval_rewards/accuracies"] < 0.7  # nothing can be learned in two steps
