"""Keys and values of a recipe: honoured, said to be without effect, or refused by name."""

import pytest
import yaml

from fastpref.cli import normalise, parse
from fastpref.train.config import ConfigError, DPOConfig, SFTConfig, check_keys

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
        (["--lr_scheduler_kwargs", "{num_cycles: 2}"], "lr_scheduler_kwargs", {"num_cycles": 2}),
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
        ({"use_peft": True}, "use_peft: True is not supported"),
        ({"optim": "adafactor"}, "optim: 'adafactor'"),
        ({"report_to": "wandb"}, "report_to: 'wandb'"),
        ({"assistant_only_loss": False}, "assistant_only_loss: False"),
        ({"beta": 0.0}, "need beta > 0"),
        ({"beta": float("nan")}, "need beta > 0"),
        ({"label_smoothing": 0.5}, "label_smoothing in"),
        ({"label_smoothing": 0.1, "loss_type": ["sigmoid", "ipo"]}, "'ipo' has no label_smoothing"),
        ({"loss_weights": [1.0, 2.0]}, "one of loss_weights per loss_type"),
        ({"lr_scheduler_type": "cosin"}, "nearest is 'cosine'"),
        ({"per_device_train_batch_size": 0}, "at least 1, got 0"),
        ({"eval_steps": 1.5}, "eval_steps: a whole number or a fraction"),
        ({"dtype": "fp8"}, "need dtype"),
        ({"max_steps": 0, "num_train_epochs": 0}, "max_steps or num_train_epochs"),
        ({"torch_dtype": "auto", "dtype": "float16"}, "one key"),
    ],
)
def test_refusals_say_what_came_and_what_was_needed(values, message):
    with pytest.raises(ConfigError, match=message):
        DPOConfig.from_mapping(values)


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
    assert normalise(DPOConfig, ["--loss_type", "[sigmoid, ipo]"]) == ["--loss_type=[sigmoid, ipo]"]
