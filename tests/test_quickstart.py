"""The quickstart, small: its files, its figures, and that it learns what it is told."""

import json

import pytest

from fastpref.quickstart import QuickstartConfig, quickstart
from fastpref.train.config import ConfigError

SMALL = {"reviews": 2500, "prompts": 256, "eval_prompts": 128, "num_train_epochs": 2.0}


@pytest.mark.slow
def test_reward_rises_over_three_seeds_and_not_when_shuffled(tmp_path):
    told = quickstart(QuickstartConfig(output_dir=str(tmp_path / "told"), seeds=3, **SMALL))
    assert told["gain"] > 3 * told["gain_se"] > 0
    assert 0 < told["kl"] < 40
    config = QuickstartConfig(
        output_dir=str(tmp_path / "shuffled"), seeds=3, shuffle_preferences=True, **SMALL
    )
    shuffled = quickstart(config)
    # the error over three seeds is now and then tiny by luck, that of the samples is not
    errors = [
        r["gold_reward_before_se"] ** 2 + r["gold_reward_after_se"] ** 2 for r in shuffled["runs"]
    ]
    assert shuffled["gain"] < 3 * max(shuffled["gain_se"], (sum(errors) / 9) ** 0.5)
    assert shuffled["accuracy"] < 0.58 < told["accuracy"]  # held-out pairs are never swapped
    written = json.loads((tmp_path / "told" / "summary.json").read_text())
    assert {
        "gold_reward_before",
        "gold_reward_after",
        "kl",
        "accuracy",
        "seconds",
    } <= written.keys()
    assert written["runs"][0]["pairs"] > 100
    samples = json.loads((tmp_path / "told" / "samples.json").read_text())
    assert samples[0].keys() == {"prompt", "before", "after"}


def test_rejects():
    with pytest.raises(ConfigError, match="samples_per_prompt above 1, got 1"):
        QuickstartConfig(samples_per_prompt=1)


def test_it_runs_again_in_its_folder(tmp_path):
    config = QuickstartConfig(
        output_dir=str(tmp_path), reviews=300, prompts=32, eval_prompts=16, num_train_epochs=0.2
    )
    first, again = quickstart(config), quickstart(config)
    assert first["gain"] == again["gain"]
