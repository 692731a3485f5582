"""Whole runs of a tiny model: right numbers, right files, and errors before work is lost."""

import copy
import json
import math
import statistics

import pytest
import torch
import yaml
from runs import TIMES
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fastpref.data.formats import to_examples
from fastpref.data.packing import num_tokens
from fastpref.data.tokenize import tokenize
from fastpref.losses.pairs import PairLoss
from fastpref.methods.dpo import DPO
from fastpref.train.callbacks import Callback
from fastpref.train.checkpoint import CheckpointError, TrainerState, checksum, text_of
from fastpref.train.config import ConfigError
from fastpref.train.guard import DivergedError
from fastpref.train.run import dpo, sft

COUNTS = ("num_tokens", "num_computed_tokens")


def options(folder, **more):
    base = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "seed": 11,
    }
    return base | more


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights_of(result):
    return {k: v.clone() for k, v in result.model.model.state_dict().items()}


def assert_same(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(
            ours[name], theirs[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def plain_logps(model, tokenizer, row, side):
    """Log-softmax rows (m, V), logits and targets of one completion, run alone and unpacked."""
    head = tokenizer(row["prompt"])["input_ids"]
    ids = [*tokenizer(row["prompt"] + row[side])["input_ids"], tokenizer.eos_token_id]
    logits = model(torch.tensor([ids])).logits[0, len(head) - 1 : -1]
    return logits.log_softmax(-1), logits, torch.tensor(ids[len(head) :])[:, None]


def plain_dpo(model, tokenizer, steps, *, lr, beta, clip, decay=0.0, loss_type="sigmoid"):
    """DPO in plain torch on separate, unpacked sequences: the oracle; one dict a step."""
    reference = copy.deepcopy(model)
    vectors = [p for p in model.parameters() if p.ndim < 2]
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    out = []
    for number, rows in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - number / len(steps))  # the linear schedule
        seen = {"loss": [], "entropy": [], "mean_token_accuracy": [], "rewards/accuracies": []}
        for row in rows:
            ratio, length = {}, {}
            for side in ("chosen", "rejected"):
                logp, logits, y = plain_logps(model, tokenizer, row, side)
                with torch.no_grad():
                    ref = plain_logps(reference, tokenizer, row, side)[0].gather(-1, y).sum()
                total = logp.gather(-1, y).sum()
                ratio[side], length[side] = total - ref, len(y)
                seen.setdefault(f"logps/{side}", []).append(total.item())
                seen.setdefault(f"rewards/{side}", []).append(beta * ratio[side].item())
                seen.setdefault(f"logits/{side}", []).extend(logits.mean(-1).tolist())
                seen["entropy"] += (-(logp.exp() * logp).sum(-1)).tolist()
                if side == "chosen":
                    seen["mean_token_accuracy"] += (logits.argmax(-1) == y[:, 0]).tolist()
            gap = ratio["chosen"] - ratio["rejected"]
            loss = -torch.nn.functional.logsigmoid(beta * gap)
            if loss_type == "ipo":
                gap = ratio["chosen"] / length["chosen"] - ratio["rejected"] / length["rejected"]
                loss = (gap - 1 / (2 * beta)) ** 2
            (loss / len(rows)).backward()
            seen["loss"].append(loss.item())
            seen["rewards/accuracies"].append(ratio["chosen"].item() > ratio["rejected"].item())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        out.append({k: statistics.fmean(v) for k, v in seen.items()} | {"grad_norm": float(norm)})
    return out


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_every_metric_of_every_step_equals_plain_torch(
    tmp_path, tokenizer, new_model, pairs, loss_type
):
    """Three steps, the last one short: 8, 8 and 4 pairs."""
    oracle = new_model()
    steps = [pairs[0:8], pairs[8:16], pairs[16:20]]
    options_of_both = {"beta": 0.2, "loss_type": loss_type}
    want = plain_dpo(oracle, tokenizer, steps, lr=1e-3, clip=0.5, decay=0.1, **options_of_both)
    config = options(tmp_path, train_sampling_strategy="sequential", max_grad_norm=0.5)
    config |= {"weight_decay": 0.1, **options_of_both}
    result = dpo(config, new_model(), pairs[:20], tokenizer=tokenizer)
    rows = rows_of(tmp_path)
    assert set(DPO.metric_names) <= rows[0].keys()
    for row, expected in zip(rows, want, strict=True):
        assert {"loss", "rewards/margins", *expected} >= {"loss", *DPO.metric_names}
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=2e-4, abs=2e-5), name
        margin = expected["rewards/chosen"] - expected["rewards/rejected"]
        assert row["rewards/margins"] == pytest.approx(margin, abs=2e-5)
    assert [r["learning_rate"] for r in rows] == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])
    assert [r["epoch"] for r in rows] == pytest.approx([1 / 3, 2 / 3, 1])
    if loss_type == "sigmoid":
        assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert min(r["grad_norm"] for r in want) > 0.5  # else nothing was clipped
    # Adam divides by tiny second moments, so weights agree less closely than losses
    assert_same(weights_of(result), oracle.state_dict(), atol=3e-4, rtol=0)


def test_evaluation_means_the_same_as_training(tmp_path, tokenizer, new_model, pairs):
    """A frozen model (learning rate 0), one step over the rows that are also evaluated."""
    config = options(tmp_path, learning_rate=0.0, max_steps=1, per_device_train_batch_size=24)
    result = dpo(config, new_model(), pairs, pairs, tokenizer=tokenizer)
    train, evaluation = rows_of(tmp_path)
    for name in train.keys() - {"grad_norm", "learning_rate", *COUNTS, *TIMES}:
        if name not in ("step", "epoch"):
            assert evaluation[f"eval_{name}"] == pytest.approx(train[name], rel=1e-5, abs=1e-6)
    assert result.metrics["eval_loss"] == evaluation["eval_loss"]
    tokens = sum(
        len(tokenizer(p["prompt"] + p[side])["input_ids"]) + 1
        for p in pairs
        for side in ("chosen", "rejected")
    )
    assert train["num_tokens"] == tokens


def test_warmup_as_a_fraction(tmp_path, tokenizer, new_model, pairs):
    config = options(tmp_path, max_steps=10, warmup_steps=0.35, lr_scheduler_type="cosine")
    dpo(config, new_model(), pairs[:4], tokenizer=tokenizer)
    rates = [r["learning_rate"] / 1e-3 for r in rows_of(tmp_path)]
    cosine = [0.5 * (1 + math.cos(math.pi * n / 6)) for n in range(6)]
    assert rates == pytest.approx([0, 0.25, 0.5, 0.75, *cosine])


@pytest.mark.parametrize("method", ["dpo", "sft"])
def test_batch_settings_change_no_gradient(tmp_path, tokenizer, new_model, pairs, method):
    """8 x 1, 2 x 4, and a token budget: the same steps."""
    run = {"dpo": dpo, "sft": sft}[method]
    settings = {
        "whole": {"per_device_train_batch_size": 8},
        "parts": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        "budget": {"per_device_train_batch_size": 8, "max_tokens_per_micro_batch": 200},
    }
    results = {
        name: run(options(tmp_path / name, **more), new_model(), pairs, tokenizer=tokenizer)
        for name, more in settings.items()
    }
    want = rows_of(tmp_path / "whole")
    for name in ("parts", "budget"):
        for row, other in zip(want, rows_of(tmp_path / name), strict=True):
            for key in row.keys() - {*TIMES}:
                assert other[key] == pytest.approx(row[key], rel=2e-4, abs=2e-5), (name, key)
        assert_same(weights_of(results[name]), weights_of(results["whole"]), atol=3e-4, rtol=0)


def test_sft_loss_is_the_mean_over_scored_tokens(tmp_path, tokenizer, new_model, pairs):
    rows = [{"prompt": p["prompt"], "completion": p["chosen"]} for p in pairs[:8]]
    model = new_model()
    total, count = 0.0, 0
    for row in rows:
        head = tokenizer(row["prompt"])["input_ids"]
        ids = [*tokenizer(row["prompt"] + row["completion"])["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logp = model(torch.tensor([ids])).logits[0, len(head) - 1 : -1].log_softmax(-1)
        total -= float(logp.gather(-1, torch.tensor(ids[len(head) :])[:, None]).sum())
        count += len(ids) - len(head)
    sft(options(tmp_path, max_steps=1), model, rows, tokenizer=tokenizer)
    assert rows_of(tmp_path)[0]["loss"] == pytest.approx(total / count, rel=1e-5)


def test_precomputed_reference_equals_the_live_one(tmp_path, tokenizer, new_model, pairs):
    live = dpo(options(tmp_path / "live"), new_model(), pairs, tokenizer=tokenizer)
    config = options(tmp_path / "kept", precompute_ref_log_probs=True)
    kept = dpo(config, new_model(), pairs, tokenizer=tokenizer)
    assert_same(weights_of(kept), weights_of(live), atol=3e-4, rtol=0)
    for a, b in zip(rows_of(tmp_path / "live"), rows_of(tmp_path / "kept"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-6)
    assert len(list((tmp_path / "kept" / "reference_logps").iterdir())) == 1


def test_a_cache_of_another_reference_or_other_data_is_not_used(
    tmp_path, tokenizer, new_model, pairs
):
    """Another step-1 loss than ln 2 would mean that the cache was read for the wrong reference."""
    config = options(tmp_path, precompute_ref_log_probs=True, max_steps=1)
    config |= {"reference_cache": str(tmp_path / "cache")}
    barely = new_model(rope_theta=10.0)
    with torch.no_grad():
        barely.model.layers[0].mlp.up_proj.weight[5, 7] += 10.0
    # each differs from the one before it in one thing
    turned = new_model(rope_theta=10.0)
    back = pairs[::-1]
    runs = [(new_model(), pairs), (new_model(), back), (turned, back), (barely, back)]
    for number, (model, rows) in enumerate(runs):
        folder = tmp_path / f"{number}"
        dpo(config | {"output_dir": str(folder)}, model, rows, tokenizer=tokenizer)
        assert rows_of(folder)[-1]["loss"] == pytest.approx(math.log(2), abs=1e-6)


class StopAt(Callback):
    def __init__(self, step):
        self.at = step

    def on_step(self, step, engine):
        if step == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("log", [1, 3])
def test_resume_is_bit_identical(tmp_path, tokenizer, new_model, pairs, precompute, log):
    more = {
        "max_steps": 7,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": log,
        "precompute_ref_log_probs": precompute,
        "max_tokens_per_micro_batch": 300 if log == 3 else None,
        "eval_steps": 3,
        "eval_on_start": True,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "resume": "auto",
    }
    whole = dpo(options(tmp_path / "a", **more), new_model(), pairs, pairs[:4], tokenizer=tokenizer)
    config = options(tmp_path / "b", **more)
    for stop in (1, 5, 6):  # before the first checkpoint, between two, right after one
        calls = [StopAt(stop)]
        with pytest.raises(KeyboardInterrupt):
            dpo(config, new_model(), pairs, pairs[:4], tokenizer=tokenizer, callbacks=calls)
    again = dpo(config, new_model(), pairs, pairs[:4], tokenizer=tokenizer)
    assert_same(weights_of(again), weights_of(whole), atol=0, rtol=0)
    a, b = (
        [{k: v for k, v in row.items() if k not in TIMES} for row in rows_of(tmp_path / name)]
        for name in "ab"
    )
    steps = {1: [0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 7], 3: [0, 3, 3, 6, 6, 7, 7]}[log]
    assert a == b and [r["step"] for r in a] == steps
    finished = dpo(config, new_model(), pairs, pairs[:4], tokenizer=tokenizer)
    assert finished.metrics == again.metrics and "eval_loss" in finished.metrics


def test_resume_refuses_a_changed_run(tmp_path, tokenizer, new_model, pairs):
    config = options(tmp_path, max_steps=2, save_strategy="steps", save_steps=1, resume="auto")
    dpo(config, new_model(), pairs, tokenizer=tokenizer)
    for more, rows, named in (
        ({"learning_rate": 1e-4}, pairs, "learning_rate 0.001, now 0.0001"),
        ({"beta": 0.3}, pairs, "beta 0.1, now 0.3"),
        ({"gradient_accumulation_steps": 2}, pairs, "groups_per_step 8, now 16"),
        ({"max_steps": 3}, pairs, "steps 2, now 3"),
        ({}, pairs[1:], "training data '24 groups, .*now '23 groups"),
    ):
        with pytest.raises(CheckpointError, match=named):
            dpo(config | more, new_model(), rows, tokenizer=tokenizer)
    assert yaml.safe_load((tmp_path / "run.yaml").read_text())["learning_rate"] == 1e-3
    older = config | {"resume": str(tmp_path / "checkpoint-1")}
    with pytest.raises(CheckpointError, match="steps after checkpoint-1: checkpoint-2"):
        dpo(older, new_model(), pairs, tokenizer=tokenizer)
    other = new_model()
    with torch.no_grad():
        other.lm_head.weight[5, 7] += 1e-3
    with pytest.raises(CheckpointError, match=r"reference model 'sha256 .*, now 'sha256 "):
        dpo(config, other, pairs, tokenizer=tokenizer)


def test_a_constant_rate_lets_a_run_be_prolonged(tmp_path, tokenizer, new_model, pairs):
    config = options(tmp_path, max_steps=2, save_strategy="steps", save_steps=1, resume="auto")
    config |= {"lr_scheduler_type": "constant"}
    dpo(config, new_model(), pairs, tokenizer=tokenizer)
    longer = config | {"max_steps": 3, "logging_steps": 2}
    assert dpo(longer, new_model(), pairs, tokenizer=tokenizer).steps == 3


def test_the_model_that_was_trained_is_no_reference_to_go_on_with(
    tmp_path, tokenizer, new_model, pairs
):
    config = options(tmp_path, save_strategy="steps", save_steps=1, resume="auto")
    model = new_model()
    with pytest.raises(KeyboardInterrupt):
        dpo(config, model, pairs, tokenizer=tokenizer, callbacks=[StopAt(2)])
    with pytest.raises(CheckpointError, match=r"reference model 'sha256 .*, now 'sha256 "):
        dpo(config, model, pairs, tokenizer=tokenizer)
    assert dpo(config, new_model(), pairs, tokenizer=tokenizer).steps == 3


def test_resume_refuses_a_checkpoint_without_a_weight(tmp_path, tokenizer, new_model, pairs):
    config = options(tmp_path, max_steps=1, save_strategy="steps", resume="auto")
    dpo(config, new_model(), pairs, tokenizer=tokenizer)
    path = tmp_path / "checkpoint-1" / "model.safetensors"
    weights = load_file(path)
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, path, metadata={"format": "pt"})
    state = path.with_name("trainer_state.json")
    read = json.loads(state.read_text())
    read["files"][path.name] = checksum(path)  # as an engine that forgot a weight would leave it
    del read["crc32"]
    state.write_text(text_of(TrainerState(**read)))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj"):
        dpo(config, new_model(), pairs, tokenizer=tokenizer)


def test_evaluation_rows_from_python_are_evaluated(tmp_path, tokenizer, new_model, pairs):
    config = options(tmp_path / "a", max_steps=3)
    dpo(config, new_model(), pairs, pairs[:4], tokenizer=tokenizer)
    assert "eval_loss" in rows_of(tmp_path / "a")[-1]
    best = options(tmp_path / "b", load_best_model_at_end=True, save_strategy="steps", save_steps=1)
    for more in ({}, {"eval_steps": 2}, {"eval_strategy": "no"}):
        rows = pairs[:4] if more else None
        with pytest.raises(ConfigError, match="an evaluation at every saved step"):
            dpo(best | more, new_model(), pairs, rows, tokenizer=tokenizer)


def test_a_run_is_not_written_over(tmp_path, tokenizer, new_model, pairs):
    dpo(options(tmp_path, max_steps=1), new_model(), pairs, tokenizer=tokenizer)
    with pytest.raises(CheckpointError, match="holds a run already"):
        dpo(options(tmp_path, max_steps=1), new_model(), pairs, tokenizer=tokenizer)
    with pytest.raises(CheckpointError, match="complete checkpoint to resume from"):
        dpo(
            options(tmp_path, resume=str(tmp_path / "checkpoint-9")),
            new_model(),
            pairs,
            tokenizer=tokenizer,
        )


def test_best_and_last_checkpoints_stay(tmp_path, tokenizer, new_model, pairs):
    """A rate far too high makes the evaluation worse from its first reading on."""
    more = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "eval_steps": 2}
    config = options(tmp_path, **more, save_total_limit=2, learning_rate=0.5)
    config |= {"load_best_model_at_end": True, "lr_scheduler_type": "constant"}
    result = dpo(config, new_model(), pairs, pairs[:8], tokenizer=tokenizer)
    losses = {r["step"]: r["eval_loss"] for r in rows_of(tmp_path) if "eval_loss" in r}
    best = min(losses, key=losses.get)
    kept = sorted(p.name for p in tmp_path.glob("checkpoint-*"))
    assert kept == sorted(
        {f"checkpoint-{best}", "checkpoint-8"} | ({"checkpoint-6"} if best == 8 else set())
    )
    state = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    assert state["best_step"] == best and state["best_metric"] == losses[best]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{best}")
    assert_same(weights_of(result), saved.state_dict(), atol=0, rtol=0)


def test_the_folder_of_a_run(tmp_path, tokenizer, new_model, pairs):
    result = dpo(options(tmp_path), new_model(tie=True), pairs, tokenizer=tokenizer)
    recipe = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert recipe["seed"] == 11 and recipe["beta"] == 0.1
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(plain.state_dict(), weights_of(result), atol=0, rtol=0)
    assert "fastpref" not in (tmp_path / "config.json").read_text()
    assert (tmp_path / "tokenizer.json").exists()


def test_own_loss_and_callbacks(tmp_path, tokenizer, new_model, pairs):
    seen = []

    class Watch(Callback):
        def on_step(self, step, engine):
            seen.append(("step", step))

        def on_evaluate(self, step, metrics):
            seen.append(("evaluate", step, "eval_loss" in metrics))

        def on_save(self, step, folder):
            seen.append(("save", step, (folder / "model.safetensors").exists()))

    def loss(chosen, rejected, ref_chosen, ref_rejected):
        return -torch.nn.functional.logsigmoid(
            0.1 * (chosen - rejected - ref_chosen + ref_rejected)
        )

    config = options(tmp_path / "own", max_steps=2, save_strategy="epoch", eval_steps=2)
    own = dpo(
        config,
        new_model(),
        pairs,
        pairs[:4],
        tokenizer=tokenizer,
        loss_fn=loss,
        callbacks=[Watch()],
    )
    theirs = dpo(options(tmp_path / "named", max_steps=2), new_model(), pairs, tokenizer=tokenizer)
    assert_same(weights_of(own), weights_of(theirs), atol=1e-6, rtol=0)
    assert seen == [("step", 1), ("step", 2), ("evaluate", 2, True), ("save", 2, True)]
    wrong = PairLoss(*(torch.zeros(()) for _ in range(3)))
    config = options(tmp_path / "worse")
    with pytest.raises(ValueError, match="loss_fn must return losses"):
        dpo(config, new_model(), pairs, tokenizer=tokenizer, loss_fn=lambda *x: wrong)
    with pytest.raises(ValueError, match="loss_fn must return losses"):
        dpo(
            options(tmp_path / "bad"),
            new_model(),
            pairs,
            tokenizer=tokenizer,
            loss_fn=lambda *x: x[0].sum(),
        )
    assert PairLoss._fields == ("losses", "chosen_rewards", "rejected_rewards")


def test_gradient_checkpointing_changes_nothing(tmp_path, tokenizer, new_model, pairs):
    kept = dpo(options(tmp_path / "a"), new_model(), pairs, tokenizer=tokenizer)
    config = options(tmp_path / "b", gradient_checkpointing=True)
    again = dpo(config, new_model(), pairs, tokenizer=tokenizer)
    assert_same(weights_of(again), weights_of(kept), atol=1e-6, rtol=0)


def test_several_losses_are_summed_with_their_weights(tmp_path, tokenizer, new_model, pairs):
    both = {"loss_type": ["sigmoid", "hinge"], "loss_weights": [1.0, 0.5]}
    dpo(options(tmp_path, max_steps=1, **both), new_model(), pairs, tokenizer=tokenizer)
    # at the reference every margin is 0: ln 2 and 1
    assert rows_of(tmp_path)[0]["loss"] == pytest.approx(math.log(2) + 0.5, abs=1e-5)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train_sampling_strategy", "foo"),
        ("gradient_checkpointing", "often"),
        ("max_steps", 1.5),
        ("per_device_train_batch_size", 2.5),
        ("beta", "much"),
        ("eval_strategy", "step"),
        ("metric_for_best_model", "rewards/acuracies"),
        ("seed", 2**40),
        ("head_workspace", 100),
    ],
)
def test_values_from_python_are_checked_like_flags(
    tmp_path, tokenizer, new_model, pairs, key, value
):
    with pytest.raises(ConfigError, match=f"{key}|workspace"):
        dpo(options(tmp_path) | {key: value}, new_model(), pairs, tokenizer=tokenizer)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_numbers_may_come_as_text(tmp_path, tokenizer, new_model, pairs):
    config = options(tmp_path, learning_rate="1e-5", max_steps=1, output_dir=tmp_path / "run")
    dpo(config, new_model(), pairs, tokenizer=tokenizer)
    assert rows_of(tmp_path / "run")[0]["learning_rate"] == 1e-5


def test_a_diverged_run_stops_and_saves_nothing(tmp_path, tokenizer, new_model, pairs):
    config = options(tmp_path, learning_rate=1e30, max_steps=5, max_grad_norm=0)
    with pytest.raises(DivergedError, match="the loss is nan at step"):
        dpo(config, new_model(), pairs, tokenizer=tokenizer)
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"max_tokens_per_micro_batch": 20}, ConfigError, "max_tokens_per_micro_batch of at least"),
        ({"eval_strategy": "steps"}, ConfigError, "eval_dataset"),
        ({"model_name_or_path": None, "beta": -1.0}, ConfigError, "beta"),
    ],
)
def test_errors_come_before_any_work(tmp_path, tokenizer, new_model, pairs, more, error, message):
    with pytest.raises(error, match=message):
        dpo(options(tmp_path / "run", **more), new_model(), pairs, tokenizer=tokenizer)
    assert (
        not list(tmp_path.glob("run/checkpoint-*"))
        and not (tmp_path / "run/metrics.jsonl").exists()
    )


def test_bf16_autocast_trains(tmp_path, tokenizer, new_model, pairs):
    dpo(options(tmp_path, bf16=True, max_steps=6), new_model(), pairs, tokenizer=tokenizer)
    rows = rows_of(tmp_path)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert rows[-1]["rewards/accuracies"] > 0.6


@pytest.mark.gpu
@pytest.mark.parametrize("bf16", [False, True])
def test_cuda_steps_equal_the_cpus(tmp_path, tokenizer, new_model, pairs, bf16):
    dpo(options(tmp_path / "cpu"), new_model(), pairs, tokenizer=tokenizer)
    config = options(tmp_path / "cuda", use_cpu=False, bf16=bf16)
    dpo(config, new_model(), pairs, tokenizer=tokenizer)
    tolerance = 5e-3 if bf16 else 1e-4
    for a, b in zip(rows_of(tmp_path / "cpu"), rows_of(tmp_path / "cuda"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=tolerance)
        assert b["logps/chosen"] == pytest.approx(a["logps/chosen"], rel=tolerance)


def test_flop_and_tokens_of_a_run_are_those_of_its_groups(tmp_path, tokenizer, new_model, pairs):
    """A live reference costs a forward, scores that are there cost none."""
    found = {}
    for precompute in (False, True):
        config = options(tmp_path / str(precompute), max_steps=1, per_device_train_batch_size=24)
        config |= {"precompute_ref_log_probs": precompute, "max_tokens_per_micro_batch": 400}
        result = dpo(config, new_model(), pairs, tokenizer=tokenizer)
        (row,) = rows_of(tmp_path / str(precompute))
        per_token = 1e12 * row["tflops_per_second"] / row["tokens_per_second"]
        found[precompute] = per_token * row["num_tokens"]
        rates = row["computed_tokens_per_second"] / row["tokens_per_second"]
        assert row["num_computed_tokens"] / row["num_tokens"] == pytest.approx(rates)
    groups, _ = tokenize(to_examples(pairs, "preference")[0], tokenizer)
    flops = result.model.flops()
    assert row["num_computed_tokens"] == sum(map(num_tokens, groups))
    assert found[True] == pytest.approx(sum(map(flops.step, groups)))
    assert found[False] - found[True] == pytest.approx(sum(map(flops.forward, groups)))


def test_rows_of_recurrent_layers_keep_the_budget_with_their_padding(
    tmp_path, tokenizer, new_model, pairs
):
    kinds = {"layer_types": ["conv", "full_attention"]}
    model = new_model(architecture="lfm2", layers=2, **kinds)
    config = options(tmp_path, max_steps=2, per_device_train_batch_size=24)
    config |= {"max_tokens_per_micro_batch": 300, "precompute_ref_log_probs": True}
    seen = []
    model.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: seen.append(args[0].numel())
    )
    result = dpo(config, model, pairs, tokenizer=tokenizer)
    assert 200 < max(seen) <= 300
    del seen[:]
    config |= {"max_tokens_per_micro_batch": 60, "output_dir": str(tmp_path / "small")}
    with pytest.raises(ConfigError, match=r"max_tokens_per_micro_batch of at least \d+, .*got 60"):
        dpo(config, model, pairs, tokenizer=tokenizer)
    assert result.metrics["num_computed_tokens"] >= result.metrics["num_tokens"]


def test_a_run_leaves_no_recomputation_to_the_next(tmp_path, tokenizer, new_model, pairs):
    model, calls = new_model(), []
    mlp = model.model.layers[0].mlp
    for checkpointing in (True, False):
        config = options(tmp_path / str(checkpointing), max_steps=1)
        config |= {"gradient_checkpointing": checkpointing, "loss_type": "simpo"}
        hook = mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        dpo(config, model, pairs, tokenizer=tokenizer)
        hook.remove()
        calls.append("end")
    first = calls.index("end")
    assert first == len(calls[first + 1 :])  # that of the backward
