"""Whole runs of a tiny model: right numbers, right files, and errors before work is lost."""

import json
import math

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from fastpref.losses.preference import PairLoss
from fastpref.train.checkpoint import CheckpointError
from fastpref.train.config import ConfigError
from fastpref.train.loop import Callback
from fastpref.train.run import dpo, sft

TIMES = ("tokens_per_second", "eval_runtime")


def options(folder, **more):
    base = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
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


def plain_dpo(model, tokenizer, steps, *, lr, beta, clip):
    """DPO in plain torch on separate, unpacked sequences: the oracle. Returns losses and norms."""
    import copy

    reference = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)

    def logp(m, prompt, text):
        head = tokenizer(prompt)["input_ids"]
        ids = [*tokenizer(prompt + text)["input_ids"], tokenizer.eos_token_id]
        logits = m(torch.tensor([ids])).logits[0]
        rows = logits[len(head) - 1 : -1].log_softmax(-1)
        return rows.gather(-1, torch.tensor(ids[len(head) :])[:, None]).sum()

    losses, norms = [], []
    total = len(steps)
    for number, rows in enumerate(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - number / total)  # the linear schedule
        parts = []
        for row in rows:
            gap = [
                logp(model, row["prompt"], row[side])
                - logp(reference, row["prompt"], row[side]).detach()
                for side in ("chosen", "rejected")
            ]
            parts.append(-torch.nn.functional.logsigmoid(beta * (gap[0] - gap[1])))
        loss = torch.stack(parts).mean()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms


def test_dpo_steps_equal_plain_torch(tmp_path, tokenizer, new_model, pairs):
    oracle = new_model()
    steps = [pairs[i : i + 8] for i in (0, 8, 16)]
    losses, norms = plain_dpo(oracle, tokenizer, steps, lr=1e-3, beta=0.1, clip=0.5)
    config = options(tmp_path, train_sampling_strategy="sequential", max_grad_norm=0.5)
    result = dpo(config, new_model(), pairs, tokenizer=tokenizer)
    rows = rows_of(tmp_path)
    assert [r["loss"] for r in rows] == pytest.approx(losses, abs=2e-6)
    assert [r["grad_norm"] for r in rows] == pytest.approx(norms, rel=1e-4)
    assert [r["learning_rate"] for r in rows] == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert min(norms) > 0.5  # else nothing was clipped
    # Adam divides by tiny second moments, so weights agree less closely than losses
    assert_same(weights_of(result), oracle.state_dict(), atol=2e-4, rtol=0)


def test_every_metric_has_trls_name(tmp_path, tokenizer, new_model, pairs):
    dpo(
        options(tmp_path, eval_strategy="steps", eval_steps=3),
        new_model(),
        pairs,
        pairs[:8],
        tokenizer=tokenizer,
    )
    names = {
        *("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
        *("logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected", "entropy"),
        "mean_token_accuracy",
    }
    rows = rows_of(tmp_path)
    train, evaluation = rows[0], rows[-1]
    assert names | {"grad_norm", "learning_rate", "epoch", "num_tokens"} <= train.keys()
    assert {f"eval_{name}" for name in names} <= evaluation.keys()
    assert train["rewards/margins"] == pytest.approx(
        train["rewards/chosen"] - train["rewards/rejected"], abs=1e-6
    )
    assert evaluation["eval_rewards/margins"] > 0.01  # three steps on these very pairs


@pytest.mark.parametrize("method", ["dpo", "sft"])
def test_batch_settings_change_no_gradient(tmp_path, tokenizer, new_model, pairs, method):
    """8 x 1, 2 x 4, 3 x 3 with a short last part, and a token budget: the same steps."""
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
    assert (tmp_path / "kept" / "reference_logps" / "train.safetensors").exists()


def test_a_cache_of_another_model_is_not_used(tmp_path, tokenizer, new_model, pairs):
    config = options(tmp_path, precompute_ref_log_probs=True, resume="auto", max_steps=1)
    dpo(config, new_model(), pairs, tokenizer=tokenizer)
    dpo(config, new_model(seed=9), pairs, tokenizer=tokenizer)
    assert rows_of(tmp_path)[-1]["loss"] == pytest.approx(math.log(2), abs=1e-6)


class StopAt(Callback):
    def __init__(self, step):
        self.at = step

    def on_step(self, step, engine):
        if step == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("precompute", [False, True])
def test_resume_is_bit_identical(tmp_path, tokenizer, new_model, pairs, precompute):
    more = {
        "max_steps": 7,
        "save_strategy": "steps",
        "save_steps": 2,
        "precompute_ref_log_probs": precompute,
        "eval_steps": 3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "resume": "auto",
    }
    whole = dpo(options(tmp_path / "a", **more), new_model(), pairs, pairs[:4], tokenizer=tokenizer)
    config = options(tmp_path / "b", **more)
    with pytest.raises(KeyboardInterrupt):
        dpo(config, new_model(), pairs, pairs[:4], tokenizer=tokenizer, callbacks=[StopAt(5)])
    assert [r["step"] for r in rows_of(tmp_path / "b")][-1] == 4
    again = dpo(config, new_model(), pairs, pairs[:4], tokenizer=tokenizer)
    assert_same(weights_of(again), weights_of(whole), atol=0, rtol=0)
    a, b = (
        [{k: v for k, v in row.items() if k not in TIMES} for row in rows_of(tmp_path / name)]
        for name in "ab"
    )
    assert a == b and [r["step"] for r in a] == [1, 2, 3, 3, 4, 5, 6, 6, 7, 7]


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
    ("more", "error", "message"),
    [
        ({"max_tokens_per_micro_batch": 20}, ValueError, "max_tokens=20"),
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
