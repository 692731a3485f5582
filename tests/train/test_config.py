"""Keys and values of a recipe: honoured, said to be without effect, or refused by name."""

import json
from pathlib import Path

import pytest
import yaml

from fastpref.cli import UsageError, normalise, parse
from fastpref.train.config import ConfigError, SFTConfig, check_keys
from fastpref.train.preference_config import DPOConfig

# what a DPO recipe for TRL holds
TRL_RECIPE = """
model_name_or_path: some/model
dataset_name: some/pairs
dataset_num_proc: 8
learning_rate: 5.0e-7
num_train_epochs: 1
per_device_train_batch_size: 2
max_steps: 1000
gradient_accumulation_steps: 8
gradient_checkpointing: true
gradient_checkpointing_kwargs: {use_reentrant: false}
eval_strategy: steps
eval_steps: 50
output_dir: out
remove_unused_columns: false
lr_scheduler_type: cosine
warmup_ratio: 0.1
loss_type: [sigmoid, ipo]
loss_weights: [1.0, 0.5]
max_length: 512
beta: 0.05
bf16: true
torch_dtype: bfloat16
report_to: none
use_peft: false
push_to_hub: false
seed: 7
"""


def test_defaults_are_trls():
    config = DPOConfig()
    assert (config.beta, config.learning_rate, config.max_length) == (0.1, 1e-6, 1024)
    assert (config.max_grad_norm, config.per_device_train_batch_size, config.seed) == (1.0, 8, 42)
    assert (config.num_train_epochs, config.logging_steps, config.save_steps) == (3.0, 10, 500)
    assert config.gradient_checkpointing and config.lr_scheduler_type == "linear"
    assert SFTConfig().learning_rate == 2e-5


def test_a_trl_recipe_runs_unchanged(tmp_path):
    recipe = tmp_path / "dpo.yaml"
    recipe.write_text(TRL_RECIPE)
    config = parse("dpo", DPOConfig, ["--config", str(recipe), "--beta", "0.2"])
    assert (config.beta, config.learning_rate, config.seed) == (0.2, 5e-7, 7)
    assert (config.warmup_steps, config.dtype, config.bf16) == (0.1, "bfloat16", True)
    assert config.loss_types() == ["sigmoid", "ipo"] and config.loss_weights == [1.0, 0.5]


def test_later_flags_win_over_earlier_files(tmp_path):
    recipe = tmp_path / "a.yaml"
    recipe.write_text("beta: 0.3\nlearning_rate: 1e-5\n")
    late = parse("dpo", DPOConfig, ["--config", str(recipe), "--beta=0.4"])
    assert (late.beta, late.learning_rate) == (0.4, 1e-5)
    early = parse("dpo", DPOConfig, ["--beta=0.4", "--config", str(recipe)])
    assert early.beta == 0.3


@pytest.mark.parametrize(
    ("args", "key", "value"),
    [
        (["--bf16"], "bf16", True),
        (["--no_gradient_checkpointing"], "gradient_checkpointing", False),
        (["--gradient-checkpointing", "false"], "gradient_checkpointing", False),
        (["--loss_type", "sigmoid", "hinge"], "loss_type", ["sigmoid", "hinge"]),
        (["--loss_type", "ipo"], "loss_type", "ipo"),
        (["--max_length", "null"], "max_length", None),
        (["--local_rank=3"], "local_rank", 3),
        (["--warmup_ratio", "0.2"], "warmup_steps", 0.2),
        (["--no_remove_unused_columns"], "beta", 0.1),
        (["--output_dir", "a b"], "output_dir", "a b"),
        (["--output_dir", "007"], "output_dir", "007"),
        (["--output_dir", "@o1"], "output_dir", "@o1"),
        (["--turn_marker", "**Assistant**: "], "turn_marker", "**Assistant**: "),
        (["--turn_marker", "%"], "turn_marker", "%"),
        (["--disable_tqdm"], "disable_tqdm", True),
        (["--eval_strategy", "no"], "eval_strategy", "no"),
        (["--resume_from_checkpoint", "true"], "resume", "auto"),
        (["--warmup_steps", "0", "--warmup_ratio", "0.2"], "warmup_steps", 0.2),
    ],
    ids=lambda x: str(x)[:40],
)
def test_flags_as_recipes_and_launchers_write_them(args, key, value):
    assert getattr(parse("dpo", DPOConfig, args), key) == value


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rat": 1.0}, "nearest is 'learning_rate'"),
        ({"loss_type": "sigmiod"}, "nearest is 'sigmoid'"),
        ({"optim": "adafactor"}, "unknown optim 'adafactor'"),
        ({"attn_implementation": "eager"}, "unknown attn_implementation 'eager'"),
        ({"attn_implementation": "flash_attn_2"}, "nearest is 'flash_attention_2'"),
        ({"optim": "adamw_8bits"}, "nearest is 'adamw_8bit'"),
        ({"dtype": "float16"}, "auto, float32 or bfloat16, got 'float16'"),
        ({"packing": True}, "packing: True"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "arguments that lr_scheduler_type"),
        ({"lr_scheduler_kwargs": {"cycles": 2}}, "arguments that lr_scheduler_type 'linear'"),
        ({"beta": 0.0}, "need beta > 0"),
        ({"adam_beta2": 1.0}, "need adam_beta2 below 1, got 1"),
        ({"reference_cache": "scores"}, "need precompute_ref_log_probs for a reference_cache"),
        ({"beta": float("nan")}, "need beta > 0"),
        ({"label_smoothing": 0.5}, "label_smoothing in"),
        ({"label_smoothing": 0.1, "loss_type": ["sigmoid", "ipo"]}, "'ipo' has no label_smoothing"),
        ({"loss_weights": [1.0, 2.0]}, "one of loss_weights per loss_type"),
        ({"lr_scheduler_type": "cosin"}, "nearest is 'cosine'"),
        ({"per_device_train_batch_size": 0}, "at least 1, got 0"),
        ({"eval_steps": 1.5}, "eval_steps: a whole number or a fraction"),
        ({"dtype": "fp8"}, "need dtype"),
        ({"max_steps": 0, "num_train_epochs": 0}, "max_steps or num_train_epochs"),
        ({"torch_dtype": "auto", "dtype": "float16"}, "need one of dtype and torch_dtype"),
    ],
)
def test_refusals_say_what_came_and_what_was_needed(values, message):
    with pytest.raises(ConfigError, match=message):
        DPOConfig(**check_keys(DPOConfig, values)[0])


@pytest.mark.parametrize(("name", "cls"), [("dpo", DPOConfig), ("sft", SFTConfig)])
def test_every_key_of_trl_is_known_and_its_default_accepted(name, cls):
    """trl_keys.json: the fields of TRL 1.16's config, model and script dataclasses."""
    keys = json.loads((Path(__file__).parent / "trl_keys.json").read_text())[name]
    assert len(keys) > 150
    for key, value in keys.items():
        taken, _ = check_keys(cls, {key: value})
        cls(**{k: v for k, v in taken.items() if v is not None})


def test_keys_without_effect_are_said():
    taken, notes = check_keys(DPOConfig, {"dataset_num_proc": 4, "beta": 0.2})
    assert taken == {"beta": 0.2}
    assert notes == ["dataset_num_proc has no effect: the tokenizer is parallel already"]


def test_printed_config_runs_again(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        parse("dpo", DPOConfig, ["--beta", "0.25", "--print_config"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["beta"] == 0.25
    (tmp_path / "again.yaml").write_text(printed)
    assert parse("dpo", DPOConfig, ["--config", str(tmp_path / "again.yaml")]) == DPOConfig(
        beta=0.25
    )


def test_wrong_type_names_the_key():
    from jsonargparse import ArgumentError

    with pytest.raises(ArgumentError, match="beta"):
        parse("dpo", DPOConfig, ["--beta", "much"])


def test_normalise_keeps_a_value_that_looks_like_a_list():
    args = ["--loss_type", "[sigmoid, ipo]"]
    assert normalise(DPOConfig, args) == ['--loss_type=["sigmoid", "ipo"]']


def test_stray_words_are_not_joined_to_a_value():
    with pytest.raises(UsageError, match="one value for --output_dir, got runs/x"):
        normalise(DPOConfig, ["--output_dir", "runs/x", "pairs.jsonl"])


def test_words_that_yaml_reads_as_booleans(tmp_path):
    (tmp_path / "a.yaml").write_text("eval_strategy: no\nresume_from_checkpoint: false\n")
    config = parse("dpo", DPOConfig, ["--config", str(tmp_path / "a.yaml")])
    assert config.eval_strategy == "no" and config.resume is None
