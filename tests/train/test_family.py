"""Losses as runs: what each loads, remembers and refuses, from the command line's keys on."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from runs import TIMES

from fastpref.cli import parse
from fastpref.data.files import DataError
from fastpref.losses.preference import LOSSES
from fastpref.losses.ranking import RANKING_LOSSES
from fastpref.methods.kto import KTO
from fastpref.methods.ranking import Ranking
from fastpref.models.model import LogpModel
from fastpref.train.checkpoint import CheckpointError, path_of
from fastpref.train.config import LOSS_OPTIONS, ConfigError, check_keys, typed
from fastpref.train.groups import Reader
from fastpref.train.preference_config import DPOConfig, KTOConfig
from fastpref.train.run import dpo, kto, kto_method, preference_method


def options(folder, **more):
    base = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
    }
    return base | more


def log_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def labelled(pairs):
    return [
        {"prompt": p["prompt"], "completion": p[side], "label": side == "chosen"}
        for p in pairs
        for side in ("chosen", "rejected")
    ]


def ranked(pairs):
    texts = [[p["chosen"], p["rejected"]] for p in pairs]
    return [
        {"prompt": p["prompt"], "completions": [*mine, *other], "scores": [3, 1, 1, i % 3]}
        for i, (p, mine, other) in enumerate(zip(pairs, texts, [*texts[1:], texts[0]], strict=True))
    ]


@pytest.mark.parametrize("loss_type", ["simpo", "cpo", "orpo", "slic", "sft", "unlikelihood"])
def test_a_reference_is_loaded_where_it_is_read(
    loss_type, tmp_path, tokenizer, new_model, pairs, monkeypatch
):
    def refuse(self):
        raise AssertionError("a reference was made")

    monkeypatch.setattr(LogpModel, "frozen_copy", refuse)
    config = options(tmp_path, loss_type=loss_type, max_steps=1)
    result = dpo(config, new_model(), pairs, tokenizer=tokenizer)
    assert result.steps == 1
    with pytest.raises(AssertionError, match="a reference was made"):
        dpo(options(tmp_path / "b"), new_model(), pairs, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("learn", "loss_type", "make"),
    [
        (kto, "kto", labelled),
        (kto, "bco", lambda pairs: pairs),
        (dpo, "plackett_luce", ranked),
        (dpo, "all_pairs", ranked),
        (dpo, "aot", lambda pairs: pairs),
        (dpo, "tdpo2", lambda pairs: pairs),
    ],
)
def test_losses_learn(learn, loss_type, make, tmp_path, tokenizer, new_model, pairs):
    """The loss of the rows that are trained on falls; a precomputed reference changes nothing."""
    rows = make(pairs[:8])
    config = options(tmp_path / "live", loss_type=loss_type, per_device_train_batch_size=16)
    config |= {"max_steps": 6, "eval_on_start": True, "eval_steps": 6, "beta": 0.3}
    learn(config, new_model(), rows, rows, tokenizer=tokenizer)
    live = log_of(tmp_path / "live")
    before, after = (line for line in live if "eval_loss" in line)
    assert after["eval_loss"] < before["eval_loss"] - 1e-3
    assert after["eval_rewards/margins"] > before["eval_rewards/margins"]
    assert after["eval_rewards/accuracies"] > 0.6
    config |= {"output_dir": str(tmp_path / "kept"), "precompute_ref_log_probs": True}
    if loss_type == "tdpo2":
        with pytest.raises(ConfigError, match=r"reference's whole distributions for .*tdpo2"):
            learn(config, new_model(), rows, rows, tokenizer=tokenizer)
        return
    learn(config, new_model(), rows, rows, tokenizer=tokenizer)
    for a, b in zip(live, log_of(tmp_path / "kept"), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    ("learn", "loss_type"), [(dpo, "bco_pair_delta"), (dpo, "alpha_dpo"), (kto, "bco")]
)
def test_a_resumed_run_remembers_its_statistics(
    learn, loss_type, tmp_path, tokenizer, new_model, pairs
):
    config = options(tmp_path / "whole", loss_type=loss_type, save_strategy="steps", save_steps=2)
    whole = learn(config, new_model(), pairs, tokenizer=tokenizer)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(path_of(tmp_path / "cut", 4))
    config |= {"output_dir": str(tmp_path / "cut"), "resume": "auto"}
    again = learn(config, new_model(), pairs, tokenizer=tokenizer)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "cut")


def test_changed_labels_are_changed_data(tmp_path, tokenizer, new_model, pairs):
    rows = labelled(pairs)
    config = options(tmp_path, save_strategy="steps", save_steps=2)
    kto(config, new_model(), rows, tokenizer=tokenizer)
    shutil.rmtree(path_of(tmp_path, 4))
    rows[5]["label"] = not rows[5]["label"]
    with pytest.raises(CheckpointError, match="training data"):
        kto(config | {"resume": "auto"}, new_model(), rows, tokenizer=tokenizer)


def test_scores_of_another_rule_are_not_used(tmp_path, tokenizer, new_model, pairs):
    """LD-DPO counts tail tokens less in the reference too: such scores have a key of their own."""
    cache = {"reference_cache": str(tmp_path / "cache"), "precompute_ref_log_probs": True}
    for number, more in enumerate(({}, {"ld_alpha": 0.5}, {})):
        config = options(tmp_path / str(number), max_steps=1, **cache, **more)
        dpo(config, new_model(), pairs, tokenizer=tokenizer)
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2


@pytest.mark.parametrize("number", [float, np.float32])
def test_numbers_of_rows_reach_the_loss(number, tmp_path, tokenizer, new_model, pairs):
    """At the first step policy and reference agree: the loss is -log sigmoid(-margin)."""
    margins = [0.1 * i for i in range(4)]
    rows = [{**pair, "margin": number(m)} for pair, m in zip(pairs, margins, strict=False)]
    for columns, shift in ((["margin"], torch.tensor(margins)), (None, torch.zeros(4))):
        config = options(tmp_path / str(columns), max_steps=1, loss_columns=columns)
        dpo(config, new_model(), rows, tokenizer=tokenizer)
        want = -torch.nn.functional.logsigmoid(-shift).mean().item()
        assert log_of(tmp_path / str(columns))[0]["loss"] == pytest.approx(want, rel=1e-4)


def test_a_mismatched_completion_takes_nothing_from_its_row(tokenizer):
    """It is cut to the room that is left, and no row is dropped for it."""
    long = " very" * 40
    rows = [
        {"prompt": f"The {word} film was", "completion": completion, "label": True}
        for word, completion in (
            ("first", " good ."),
            ("second", " good" + long),
            ("last", " bad ."),
        )
    ]
    own = {}
    for loss_type in ("bco", "kto"):  # without mismatched completions, and with
        config = KTOConfig(loss_type=loss_type, max_length=20)
        reader = Reader(config, KTO(loss_type=loss_type), tokenizer, None)
        own[loss_type] = reader.groups("train", rows)
    assert len(own["kto"]) == 3
    for plain, both in zip(own["bco"], own["kto"], strict=True):
        assert both.prompt == plain.prompt and both.completions[:1] == plain.completions
        assert len(both.completions) == 2 and len(both.prompt + both.completions[1]) <= 20


@pytest.mark.parametrize(
    ("args", "want"),
    [
        (["--loss_type", "simpo", "--simpo_gamma", "0.3"], {"simpo_gamma": 0.3}),
        (
            ["--loss_type", "simpo", "cpo", "--simpo_gamma=1", "--cpo_alpha", "0"],
            {"simpo_gamma": 1.0, "cpo_alpha": 0.0},
        ),
        (["--loss_type", "rdpo", "--loss_options", '{"rdpo_alpha": 0.2}'], {"rdpo_alpha": 0.2}),
        (["--discopop_tau", "0.05"], {}),  # what TRL's recipes spell out
        (["--loss_type", "ipo", "--label_smoothing", "0.0"], {}),
        (["--loss_type", "all_pairs", "--label_smoothing", "0.0"], {}),
        (["--loss_weights", "2.0"], {}),
    ],
)
def test_a_losses_own_numbers_are_keys(args, want):
    config = parse("dpo", DPOConfig, args)
    assert (config.loss_options or {}) == want
    method = preference_method(config)
    assert getattr(method, "options", {}) == want


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPOConfig(loss_type="simpo", precompute_ref_log_probs=True), "loss with a refer"),
        (lambda: DPOConfig(loss_options={"simpo_gama": 1.0}), "nearest is 'simpo_gamma'"),
        (lambda: DPOConfig(loss_options={"simpo_gamma": 1.0}), "'sigmoid' has no simpo_gamma"),
        (lambda: DPOConfig(loss_type="exo_pair", label_smoothing=0.0), "label_smoothing above 0"),
        (lambda: DPOConfig(loss_type="aot", use_weighting=True), "'aot' sorts pairs and has no"),
        (lambda: DPOConfig(f_divergence_type="forward"), "need f_divergence_type in"),
        (lambda: DPOConfig(ld_alpha=1.5), r"need ld_alpha in \[0, 1\], got 1.5"),
        (lambda: DPOConfig(loss_type=["all_pairs", "sft"]), "need a ranking loss alone"),
        (lambda: DPOConfig(loss_type="all_pairs", ld_alpha=0.5), "'all_pairs' has no ld_alpha"),
        (lambda: KTOConfig(loss_type="bco", desirable_weight=2.0), "'bco' has no desirable_weight"),
        (lambda: KTOConfig(desirable_weight=-1.0), "need desirable_weight of at least 0"),
        (lambda: KTOConfig(beta=0.0), "need beta > 0, got 0"),
        (lambda: KTOConfig(desirable_weight=0.0, undesirable_weight=0.0), "one of them above 0"),
        (lambda: KTOConfig(loss_columns=["weight"]), r"need loss_columns in \[\] for .*'kto'"),
        (lambda: DPOConfig(loss_type="kto"), "need fastpref kto for loss_type 'kto'"),
        (lambda: DPOConfig(loss_type=None), "need at least one loss_type, got None"),
        (lambda: DPOConfig(loss_type="ipo", loss_columns=["margin"]), "'ipo' has no margin"),
        (
            lambda: DPOConfig(loss_type="aot", loss_columns=["weight"]),
            "sorts pairs and has no weight",
        ),
        (lambda: DPOConfig(loss_weights=[float("inf")]), "need finite loss_weights"),
        (lambda: DPOConfig(loss_type="modpo", loss_options={"modpo_weight": 0.0}), "weight > 0"),
        (
            lambda: DPOConfig(loss_options={"simpo_gamma": "0.3"}),
            "need a finite number for simpo_g",
        ),
        (lambda: DPOConfig(f_alpha_divergence_coef=0.3), "need f_divergence_type alpha_divergence"),
        (lambda: check_keys(DPOConfig, {"simpo_gama": 0.3}), "nearest is 'simpo_gamma'"),
        (
            lambda: check_keys(DPOConfig, {"simpo_gamma": 0.3, "loss_options": {"simpo_gamma": 1}}),
            "need one simpo_gamma, got 0.3 and 1",
        ),
    ],
)
def test_configs_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("part", ["train", "eval"])
@pytest.mark.parametrize(
    ("keys", "more", "message"),
    [
        ({"loss_type": "sppo"}, {}, "row 0: need a number 'win_rate' for .*, got the columns none"),
        ({"loss_type": "modpo"}, {"x": 1.0}, "need a number 'margin' for .*, got the columns x"),
        (
            {"loss_type": "sppo"},
            {"win_rate": 55.0},
            r"row 0: need win_rate in \[0.0, 1.0\], got 55",
        ),
        ({"loss_columns": ["weight"]}, {"weight": -1.0}, r"need weight in \[0.0, inf\], got -1.0"),
    ],
)
def test_rows_that_lack_a_number_are_refused_at_the_start(
    part, keys, more, message, tmp_path, tokenizer, new_model, pairs
):
    good = [{**pair, "win_rate": 1.0, "margin": 1.0, "weight": 1.0} for pair in pairs]
    bad = [{**pair, **more} for pair in pairs]
    rows = (bad, good) if part == "train" else (good, bad)
    config = options(tmp_path, eval_steps=1, **keys)
    with pytest.raises(DataError, match=message):
        dpo(config, new_model(), *rows, tokenizer=tokenizer)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_what_one_group_cannot_say_is_refused(tmp_path, tokenizer, new_model, pairs):
    rows = labelled(pairs)
    config = options(tmp_path, per_device_train_batch_size=1)
    with pytest.raises(ConfigError, match="at least 2 groups in an optimizer step"):
        kto(config, new_model(), rows, tokenizer=tokenizer)
    good = [row for row in rows if row["label"]]
    config = options(tmp_path, eval_steps=1, metric_for_best_model="rewards/margins")
    with pytest.raises(ConfigError, match="evaluation data that have rewards/margins, got groups"):
        kto(config, new_model(), rows, good, tokenizer=tokenizer)


def test_a_loss_of_ones_own_refuses_what_it_cannot_read(tmp_path, tokenizer, new_model, pairs):
    config = options(tmp_path, use_weighting=True, loss_columns=["weight"])
    with pytest.raises(ConfigError, match="got one and use_weighting, loss_columns"):
        dpo(config, new_model(), pairs, tokenizer=tokenizer, loss_fn=lambda *x: x[0])


def test_what_asks_for_nothing_changes_no_run():
    spelled = {"simpo_gamma": 0.5, "label_smoothing": 0.0, "loss_type": ["simpo"]}
    values = check_keys(DPOConfig, spelled | {"beta": np.float64(0.1)})[0]
    assert typed(DPOConfig, values) == DPOConfig(loss_type="simpo")


def test_the_help_names_every_loss_and_option(capsys):
    with pytest.raises(SystemExit):
        parse("dpo", DPOConfig, ["--help"])
    told = re.split(r"[\s,:;.]+", capsys.readouterr().out)
    assert {*LOSSES, *RANKING_LOSSES, *LOSS_OPTIONS} <= {*told}


def test_what_a_method_is_told():
    keys = {"loss_type": ["ipo", "sft"], "loss_weights": [0.7, 0.2], "ld_alpha": 0.5, "beta": 0.3}
    keys |= {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7}
    keys |= {"use_weighting": True, "loss_columns": ["weight"], "precompute_ref_log_probs": True}
    method = preference_method(DPOConfig(**keys))
    assert (method.loss_types, method.loss_weights) == (("ipo", "sft"), (0.7, 0.2))
    assert (method.ld_alpha, method.beta, method.use_weighting) == (0.5, 0.3, True)
    assert (method.f_divergence_type, method.f_alpha_divergence_coef) == ("alpha_divergence", 0.7)
    assert method.columns == ("weight",) and method.precomputes_reference
    assert preference_method(DPOConfig(label_smoothing=0.1)).label_smoothing == 0.1
    told = kto_method(KTOConfig(beta=0.3, desirable_weight=1.2, undesirable_weight=0.8))
    assert (told.beta, told.desirable_weight, told.undesirable_weight) == (0.3, 1.2, 0.8)
    ranks = preference_method(DPOConfig(loss_type="all_pairs", beta=0.3))
    assert (ranks.loss_type, ranks.beta) == ("all_pairs", 0.3)


def means(metrics):
    return {name: (total / count).item() for name, (total, count) in metrics.items() if count}


def test_metrics_of_rankings_are_over_pairs():
    logps, scores = torch.tensor([1.0, 3.0, 2.0]), torch.tensor([3.0, 1.0, 1.0])
    values = {"logps": logps, "ref_logps": torch.zeros(3), "scores": scores}
    _, metrics = Ranking(beta=0.5).loss(values | {"groups": torch.tensor([0, 3])}, {})
    assert means(metrics) == pytest.approx(  # of the first against each of the others
        {
            "rewards/chosen": 0.5,
            "rewards/rejected": 1.25,
            "rewards/margins": -0.75,
            "rewards/accuracies": 0.0,
            "logps/chosen": 1.0,
            "logps/rejected": 2.5,
        }
    )


def test_metrics_of_labels():
    """Right is a reward on its label's side of the pivot, which is beta z."""
    values = {"logps": torch.tensor([2.0, -1.0, 0.5]), "ref_logps": torch.zeros(3)}
    values |= {"labels": torch.tensor([1.0, 0.0, 1.0])}
    other = {"kl_logps": torch.tensor([1.0, 2.0, 0.0]), "kl_ref_logps": torch.zeros(3)}
    method = KTO(beta=0.5)
    metrics = means(method.loss(values | other, {})[1])
    assert metrics == pytest.approx(
        {
            "rewards/chosen": 0.625,
            "rewards/rejected": -0.5,
            "rewards/accuracies": 2 / 3,
            "logps/chosen": 1.25,
            "logps/rejected": -1.0,
            "kl": 1.0,
        }
    )
    assert method.derived(metrics) == {"rewards/margins": 1.125}
    assert means(KTO(beta=0.5, loss_type="bco").loss(values, {"delta": 0.3})[1])[
        "rewards/accuracies"
    ] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("learn", "changes"),
    [
        (dpo, {"ld_alpha": 0.5, "use_weighting": True, "loss_columns": ["margin"]}),
        (dpo, {"f_divergence_type": "forward_kl", "loss_type": "robust"}),
        (kto, {"desirable_weight": 1.5, "undesirable_weight": 0.5}),
    ],
)
def test_a_changed_loss_is_another_run(learn, changes, tmp_path, tokenizer, new_model, pairs):
    rows = [{**pair, "margin": 0.5} for pair in pairs]
    config = options(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    learn(config, new_model(), rows, tokenizer=tokenizer)
    for key, value in changes.items():
        with pytest.raises(CheckpointError, match=f"{key} .*, now {re.escape(repr(value))}"):
            learn(config | {"resume": "auto", key: value}, new_model(), rows, tokenizer=tokenizer)
