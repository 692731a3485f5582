"""Runs that train adapters: the numbers of peft and plain torch, their files, refusals."""

import copy
import json
import sys
from pathlib import Path

import peft
import pytest
import torch
from runs import TIMES
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fastpref.cli import main, parse
from fastpref.models.load import load_model
from fastpref.train import run
from fastpref.train.build import build_engine
from fastpref.train.callbacks import Callback
from fastpref.train.checkpoint import CheckpointError
from fastpref.train.config import ConfigError, SFTConfig, check_keys
from fastpref.train.lora_config import quantization
from fastpref.train.optimizer import OptimizerSpec
from fastpref.train.preference_config import DPOConfig, KTOConfig
from fastpref.train.run import dpo, kto, sft

LORA = {"r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture
def base(tmp_path, new_model, tokenizer):
    """A folder with a model and its tokenizer."""
    new_model(hidden=64).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def options(base):
    def make(folder, **more):
        return {
            "model_name_or_path": str(base),
            "output_dir": str(folder),
            "lora": LORA,
            "per_device_train_batch_size": 8,
            "max_steps": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report": False,
            "gradient_checkpointing": False,
            "use_cpu": True,
        } | more

    return make


def rows_of(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in TIMES} for x in lines]


def plain_logp(model, tokenizer, row, side):
    head = tokenizer(row["prompt"])["input_ids"]
    ids = [*tokenizer(row["prompt"] + row[side])["input_ids"], tokenizer.eos_token_id]
    logits = model(torch.tensor([ids])).logits[0, len(head) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids[len(head) :])[:, None]).sum()


class Gradients(Callback):
    """The adapters' gradients of every step, before it is clipped."""

    def __init__(self):
        self.seen = []

    def keep(self, engine, step):
        def call(loss):
            named = engine.model.model.named_parameters()
            self.seen.append({n: p.grad.clone() for n, p in named if p.grad is not None})
            return step(loss)

        return call


@pytest.mark.parametrize("more", [{}, {"use_dora": True}], ids=str)
def test_steps_are_those_of_peft_and_plain_torch(
    tmp_path, options, base, tokenizer, pairs, more, monkeypatch
):
    """Two DPO steps, fp32: losses, gradients and weights of the adapters."""
    kept = Gradients()
    build = run.build_engine

    def recording(config, model):
        engine = build(config, model)
        engine.step = kept.keep(engine, engine.step)
        return engine

    monkeypatch.setattr(run, "build_engine", recording)
    rows = pairs[:8]
    config = options(tmp_path / "run", lora=LORA | more, max_steps=2, max_grad_norm=0.5)
    result = dpo(config | {"beta": 0.3, "lr_scheduler_type": "constant"}, train_dataset=rows)

    torch.manual_seed(42)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **more
    )
    theirs = peft.get_peft_model(load_model(str(base)), config)
    trained = {n: p for n, p in theirs.base_model.model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.0)
    for number, ours in enumerate(rows_of(tmp_path / "run")):
        losses = []
        for row in rows:
            ratios = []
            for side in ("chosen", "rejected"):
                with theirs.disable_adapter(), torch.no_grad():
                    reference = plain_logp(theirs, tokenizer, row, side)
                ratios.append(plain_logp(theirs, tokenizer, row, side) - reference)
            losses.append(-torch.nn.functional.logsigmoid(0.3 * (ratios[0] - ratios[1])))
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        assert ours["loss"] == pytest.approx(float(loss), rel=1e-5)
        assert kept.seen[number].keys() == trained.keys()
        for name, p in trained.items():
            torch.testing.assert_close(kept.seen[number][name], p.grad, rtol=1e-3, atol=1e-6)
        torch.nn.utils.clip_grad_norm_(trained.values(), 0.5)
        optimizer.step()
    got = dict(result.model.model.named_parameters())
    for name, p in trained.items():
        torch.testing.assert_close(got[name], p, rtol=1e-3, atol=1e-4)
    for name, p in load_model(str(base)).named_parameters():
        mine = got.get(name, got.get(name.replace(".weight", ".base_layer.weight")))
        assert torch.equal(mine, p), name


METHODS = {
    "sigmoid": (dpo, {}),
    "precomputed": (dpo, {"precompute_ref_log_probs": True}),
    "tdpo": (dpo, {"loss_type": "tdpo"}),
    "aot": (dpo, {"loss_type": "aot", "max_tokens_per_micro_batch": 200}),
    "checkpointing": (dpo, {"gradient_checkpointing": True}),
    "kto": (kto, {}),
    "plackett_luce": (dpo, {"loss_type": "plackett_luce"}),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_reference_is_the_same_model_with_its_adapters_off(
    tmp_path, options, pairs, name, monkeypatch
):
    """Beside a run whose reference is a copy that was made before the first step."""
    command, more = METHODS[name]
    rows = pairs
    if name == "plackett_luce":
        rows = [
            {"prompt": p["prompt"], "completions": [p["chosen"], p["rejected"]], "scores": [1, 0]}
            for p in pairs
        ]
    more = {**more, "eval_steps": 2, "max_steps": 3}
    asked = {"train_dataset": rows, "eval_dataset": rows[:8]}
    with monkeypatch.context() as patch:
        patch.setattr(run.LogpModel, "frozen_copy", None)
        patch.setattr(copy, "deepcopy", sealed(copy.deepcopy))
        command(options(tmp_path / "off", **more), **asked)
    monkeypatch.setattr(run, "unadapted", lambda policy: policy)
    command(options(tmp_path / "copy", **more), **asked)
    off, copied = (rows_of(tmp_path / folder) for folder in ("off", "copy"))
    assert off == copied and len({row["loss"] for row in off if "loss" in row}) == 3


def test_scores_before_the_first_step_are_those_of_the_base(tmp_path, options, pairs):
    """Adapters that start away from zero: the policy is no reference of itself."""
    rows = []
    for precompute in (False, True):
        folder, lora = tmp_path / f"{precompute}", LORA | {"init_lora_weights": False}
        more = {"precompute_ref_log_probs": precompute, "max_steps": 2}
        dpo(options(folder, lora=lora, **more), train_dataset=pairs)
        rows.append(rows_of(folder))
    assert rows[0] == rows[1] and abs(rows[0][0]["rewards/margins"]) > 1e-3


def sealed(real):
    def deepcopy(x, *args):
        assert not isinstance(x, torch.nn.Module), "a second model"
        return real(x, *args)

    return deepcopy


@pytest.mark.parametrize("more", [{}, {"load_in_4bit": True}, {"loss_type": "tdpo"}], ids=str)
def test_a_resumed_run_ends_as_an_undisturbed_one(tmp_path, options, pairs, more):
    """Adapters alone are written; the reference of a resumed run is the base model again."""
    whole = options(tmp_path / "whole", save_strategy="steps", save_steps=2, **more)
    dpo(whole, train_dataset=pairs)
    folder = tmp_path / "whole" / "checkpoint-2"
    assert {"adapter_model.safetensors", "adapter_config.json", "state.pt", "tokenizer.json"} <= {
        path.name for path in folder.iterdir()
    }
    assert not list((tmp_path / "whole").rglob("model.safetensors"))
    dpo(
        options(tmp_path / "again", resume=str(folder), **more),
        train_dataset=pairs,
    )
    ends = [load_file(tmp_path / x / "adapter_model.safetensors") for x in ("whole", "again")]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert rows_of(tmp_path / "again") == rows_of(tmp_path / "whole")[2:]


def test_peft_and_transformers_read_the_final_folder(
    tmp_path, options, base, tokenizer, pairs, monkeypatch
):
    """From anywhere, though the run was told of its base by a relative path."""
    with monkeypatch.context() as patch:
        patch.chdir(base.parent)
        result = dpo(options(tmp_path / "run", model_name_or_path=base.name), train_dataset=pairs)
    bare = AutoModelForCausalLM.from_pretrained(base)
    models = [
        AutoModelForCausalLM.from_pretrained(tmp_path / "run"),
        peft.PeftModel.from_pretrained(bare, tmp_path / "run"),
    ]
    with result.model.plain() as ours, torch.no_grad():
        want = plain_logp(ours, tokenizer, pairs[0], "chosen")
        for model in models:
            torch.testing.assert_close(plain_logp(model, tokenizer, pairs[0], "chosen"), want)
        merged = models[1].merge_and_unload()
        torch.testing.assert_close(plain_logp(merged, tokenizer, pairs[0], "chosen"), want)
    assert not (tmp_path / "run" / "config.json").exists()
    with pytest.raises(ConfigError, match="need a model without adapters"):
        dpo(options(tmp_path / "next"), model=result.model, train_dataset=pairs)


def test_the_config_of_final_adapters_comes_last(tmp_path, options, pairs, monkeypatch):
    """A kill before its end leaves nothing that loads: not what an earlier run had left either."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "adapter_config.json").write_text("old")
    moved, rename = [], Path.rename

    def recorded(self, target):
        if self.parent.name == ".model.partial":
            assert not (tmp_path / "run" / "adapter_config.json").exists()
            moved.append(self.name)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", recorded)
    dpo(options(tmp_path / "run", max_steps=1), train_dataset=pairs)
    assert moved[-1] == "adapter_config.json" and "adapter_model.safetensors" in moved


def test_sizes_are_those_of_the_files(tmp_path, options, pairs):
    found = {}

    class Sizes(Callback):
        def on_step(self, step, engine):
            found["sizes"] = engine.sizes()

    dpo(
        options(tmp_path / "run", max_steps=1, save_strategy="steps", save_steps=1),
        train_dataset=pairs,
        callbacks=[Sizes()],
    )
    folder = tmp_path / "run" / "checkpoint-1"
    model, optimizer = found["sizes"]
    assert 0 <= (folder / "adapter_model.safetensors").stat().st_size - model < 4096
    assert 0 <= (folder / "state.pt").stat().st_size - optimizer < 65536


def test_a_resumed_run_refuses_another_base_or_other_adapters(tmp_path, options, pairs, base):
    """SFT too: its checkpoints hold no weights of the base."""
    config = options(tmp_path / "run", max_steps=1, save_strategy="steps", save_steps=1)
    sft(config, train_dataset=pairs)
    again = config | {"resume": "auto", "max_steps": 2, "lr_scheduler_type": "constant"}
    with pytest.raises(CheckpointError, match="lora "):
        sft(again | {"lora": LORA | {"r": 2}}, train_dataset=pairs)
    model = load_model(str(base))
    model.model.norm.weight.data += 0.1
    model.save_pretrained(base)
    with pytest.raises(CheckpointError, match="base model 'sha256"):
        sft(again, train_dataset=pairs)


def test_best_adapters_are_loaded_at_the_end(tmp_path, options, pairs):
    result = dpo(
        options(
            tmp_path / "run",
            save_strategy="steps",
            save_steps=1,
            eval_steps=1,
            load_best_model_at_end=True,
        ),
        train_dataset=pairs,
        eval_dataset=[p | {"chosen": p["rejected"], "rejected": p["chosen"]} for p in pairs[:8]],
    )
    rows = [row for row in rows_of(tmp_path / "run") if "eval_loss" in row]
    best = min(rows, key=lambda row: row["eval_loss"])["step"]
    assert best < 4
    want = load_file(tmp_path / "run" / f"checkpoint-{best}" / "adapter_model.safetensors")
    got = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert result.steps == 4


def test_scores_of_the_reference_are_shared_with_full_runs(tmp_path, options, pairs, capsys):
    more = {"precompute_ref_log_probs": True, "reference_cache": str(tmp_path / "scores")}
    dpo(options(tmp_path / "full", lora=None, max_steps=1, **more), train_dataset=pairs)
    capsys.readouterr()
    dpo(options(tmp_path / "lora", max_steps=1, **more), train_dataset=pairs)
    assert "reference: scoring" not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("args", "lora"),
    [
        (["--lora.r", "8"], {"r": 8, "alpha": 32}),
        (["--lora", "{r: 8}"], {"r": 8, "alpha": 32}),
        (["--lora", "{}"], {"r": 16, "alpha": 32}),
        (["--use_peft"], {"r": 16, "alpha": 32}),
        (["--lora_r", "8", "--use_peft", "--lora_alpha=16"], {"r": 8, "alpha": 16}),
        (["--lora_r", "8"], None),
        (["--use_peft", "false", "--lora_r", "8"], None),
        (["--lora.target_modules", "q_proj", "k_proj"], {"target_modules": ["q_proj", "k_proj"]}),
        (["--lora.target_modules", "q_proj"], {"target_modules": ["q_proj"]}),
        (["--lora.target_modules", "all-linear"], {"target_modules": "all-linear"}),
        (["--lora.target_modules", r".*\.1\.(q|v)_proj"], {"target_modules": r".*\.1\.(q|v)_proj"}),
        (["--use_peft", "--lora_target_modules", "all-linear"], {"target_modules": "all-linear"}),
        (["--use_peft", "--lora_target_modules", "a", "b"], {"target_modules": ["a", "b"]}),
        (["--lora.use_dora", "--lora.use_rslora"], {"use_dora": True, "use_rslora": True}),
        (["--lora.lora_alpha", "4"], {"alpha": 4}),
        (["--config", "RECIPE", "--lora_r", "2"], {"r": 2, "alpha": 7, "use_dora": True}),
        (["--config", "RECIPE", "--lora.r", "2"], None),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_flags_and_recipes_of_both_kinds(args, lora, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("use_peft: true\nlora_r: 4\nlora_alpha: 7\nuse_dora: true\n")
    args = [str(recipe) if arg == "RECIPE" else arg for arg in args]
    if "--lora.r" in args and "--config" in args:
        with pytest.raises(ConfigError, match="need one r of lora, got 2 and 4"):
            parse("dpo", DPOConfig, args)
        return
    got = parse("dpo", DPOConfig, args).lora
    assert got is None if lora is None else lora.items() <= got.items()


def test_a_recipe_of_trl_folds_into_lora(capsys):
    recipe = {
        "use_peft": True,
        "lora_r": 32,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "lora_target_modules": ["q_proj", "v_proj"],
        "lora_modules_to_save": None,
        "lora_task_type": "CAUSAL_LM",
        "use_rslora": False,
    }
    for cls in (SFTConfig, DPOConfig, KTOConfig):
        config = cls(**check_keys(cls, recipe)[0])
        want = {"r": 32, "alpha": 16, "target_modules": ["q_proj", "v_proj"], "use_rslora": False}
        assert config.lora == want
    assert "lora_dropout has no effect: dropout is always off" in capsys.readouterr().err
    off = DPOConfig(**check_keys(DPOConfig, recipe | {"use_peft": False})[0])
    assert off.lora is None
    assert "no effect of lora_r, lora_alpha" in capsys.readouterr().err
    assert run.as_config(DPOConfig, DPOConfig(lora=want)).lora == want


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora": {"rnk": 8}}, "unknown key of lora 'rnk'"),
        ({"lora": {"target_module": ["q_proj"]}}, "the nearest is 'target_modules'"),
        ({"lora.us_dora": True}, "the nearest is 'use_dora'"),
        ({"lora": {"r": 0}}, "lora's r: a whole number of at least 1, got 0"),
        ({"lora": {"r": 1.5}}, "lora's r: a whole number"),
        ({"lora": {"alpha": -1}}, "lora's alpha above 0, got -1"),
        ({"lora": {"bias": "all"}}, "lora: bias: 'all' is not supported"),
        ({"lora": {"init_lora_weights": "pissa"}}, "init_lora_weights of .* got 'pissa'"),
        ({"lora": {"layers_pattern": "layers"}}, "need lora that peft takes"),
        ({"lora": 8}, "need names and values for lora, got 8"),
        ({"lora": {"r": 8}, "use_peft": False}, "need one of lora and use_peft: False"),
        ({"lora": {"r": 8}, "use_peft": True, "lora_r": 4}, "need one r of lora, got 8 and 4"),
        ({"use_peft": True, "lora_task_type": "SEQ_CLS"}, "task_type: 'SEQ_CLS' is not"),
        ({"load_in_4bit": True}, "need lora for load_in_4bit .*cannot be trained"),
        ({"load_in_8bit": True}, "need lora for load_in_8bit"),
        ({"load_in_4bit": True, "load_in_8bit": True, "lora": {}}, "one of load_in_4bit and"),
        ({"lora_rr": 3}, "the nearest is 'lora_r'"),
    ],
    ids=str,
)
def test_refused_when_the_config_is_made(values, message):
    with pytest.raises(ConfigError, match=message):
        DPOConfig(**check_keys(DPOConfig, values)[0])


@pytest.mark.parametrize(
    ("package", "extra"), [("peft", r"fastpref\[lora\]"), ("bitsandbytes", r"fastpref\[quant\]")]
)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    DPOConfig()
    with pytest.raises(ConfigError, match=f"need {package} for .*pip install '{extra}'"):
        DPOConfig(lora={"r": 8}, load_in_4bit=True)


def test_refusals_of_a_run(tmp_path, options, pairs, new_model, tokenizer, base, capsys):
    def refused(error, message, **more):
        given = {"model": more.pop("model", None), "tokenizer": tokenizer}
        with pytest.raises(error, match=message):
            dpo(options(tmp_path / "no", **more), train_dataset=pairs, **given)
        assert not (tmp_path / "no").exists()

    refused(ConfigError, "need CUDA for load_in_8bit", load_in_8bit=True)
    refused(
        ConfigError,
        "need model_name_or_path for load_in_4bit",
        load_in_4bit=True,
        model=new_model(),
    )
    head = LORA | {"target_modules": ["lm_head"]}
    refused(ValueError, "a head that stays as it is, got lora with lm_head", lora=head)
    config = DPOConfig(**options(tmp_path / "no", load_in_4bit=True))
    held = load_model(str(base), quantization=quantization(config), device=torch.device("cpu"))
    refused(ConfigError, "need lora for a quantised model", lora=None, model=held)
    dpo(options(tmp_path / "run", max_steps=1), train_dataset=pairs)
    args = [
        "dpo",
        "--model_name_or_path",
        str(tmp_path / "run"),
        "--output_dir",
        str(tmp_path / "x"),
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    assert main([*args, "--dataset_name", str(data), "--use_cpu"]) == 1
    assert "merge_and_unload()" in capsys.readouterr().err


def test_prepare_trains_adapters_alone(tmp_path, options):
    engine = build_engine(DPOConfig(**options(tmp_path / "run", load_in_4bit=True)), None)
    engine.prepare(OptimizerSpec(1e-3, 1))
    names = {
        n for n, p in engine.model.named_parameters() for q in engine.optimizer.weights if p is q
    }
    assert names and all("lora_" in name for name in names)


def test_one_name_twice_is_refused():
    with pytest.raises(ConfigError, match="need one alpha of lora, got 8 and 16"):
        DPOConfig(lora={"r": 4, "alpha": 8, "lora_alpha": 16})


def test_keys_without_their_switch_are_said(tmp_path, options, pairs, capsys):
    config = options(tmp_path / "run", max_steps=1, lora=None, bnb_4bit_quant_type="fp4")
    dpo(config, train_dataset=pairs)
    assert "load_in_4bit is off, so there is no effect of bnb_4bit_quant_type" in (
        capsys.readouterr().err
    )


def test_targets_that_peft_cannot_guess_are_listed(tmp_path, options, pairs, new_model, tokenizer):
    experts = {"architecture": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    config = options(tmp_path / "run", lora={"r": 4})
    with pytest.raises(ValueError, match=r"target_modules may be all-linear, or some of .*q_proj"):
        dpo(config, new_model(**experts), pairs, tokenizer=tokenizer)
