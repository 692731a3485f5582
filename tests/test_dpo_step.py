"""The whole-step benchmark: what it counts, what it hands to the peer, and which rows it writes."""

import copy
import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # as tests/test_bench.py does

from bench import bench_dpo_step, dpo_step, step_cost, unpadded_attention  # noqa: E402
from bench.bench_dpo_step import TINY, Case, Target, on_cpu, on_cuda  # noqa: E402
from bench.harness import RESULTS  # noqa: E402
from bench.pairs import grouped, long_pairs, pairs, texts_of  # noqa: E402
from fastpref.models.tiny import tiny_model, tiny_tokenizer  # noqa: E402

CASE = Case(
    name="tiny",
    pairs=2,
    micro_batch=1,
    steps=3,
    providers=("fastpref", "trl"),
    **(TINY | {"layers": 1, "hidden": 32, "mlp": 32, "vocab": 300, "learning_rate": 1e-3}),
)
PROMPTS = {"prompt": (30, 60), "completion": (5, 9)}


def test_tokens_by_hand():
    lengths = [(3, 2, 1), (1, 1, 4)]
    assert step_cost.tokens(lengths, share=True) == 6 + 6
    assert step_cost.tokens(lengths, share=False) == 9 + 7
    assert step_cost.padded_tokens(lengths, 2) == 4 * 5
    assert step_cost.padded_tokens([(3, 2, 1), (1, 1, 1)], 1) == 2 * 5 + 2 * 2


def test_flop_by_hand():
    sizes = {
        **{"hidden_size": 4, "num_hidden_layers": 2, "head_dim": 2, "intermediate_size": 5},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 7},
    }
    # query and output 4 x 4, key and value 4 x 2, three of the MLP 4 x 5; then the head 4 x 7
    products = 2 * (2 * (2 * 16 + 2 * 8 + 3 * 20) * 6 + 28 * 3)
    # q . k and p . v, of two heads of two entries, in two layers; 1 to 5 keys, then 4
    attention = 2 * (4 * 2 * 2) * (15 + 4)
    options = {"lengths": [(3, 2, 1)], "sizes": sizes, "share": True}
    for live in (False, True):
        found = step_cost.flop(**options, live_reference=live)
        assert found == (3 + live) * (products + attention)
        found = step_cost.flop(**options, live_reference=live, frozen=True)
        assert found == (2 + live) * products + (3 + live) * attention


def test_flop_near_six_for_each_weight_and_token():
    case = next(case for case in on_cuda(200 << 30) if case.name == "8B")
    lengths = [(1, 500, 500)]  # attention adds little at this length
    found = step_cost.flop(lengths, case.sizes(), share=True, live_reference=False)
    assert found == pytest.approx(6 * 7.5e9 * 1000, rel=0.03)  # 8.03e9 less the embedding


def per_sequence(query, key, value, offsets, longest, scale):
    """What torch's varlen_attn computes, where there is none."""
    assert longest == offsets.diff().max()
    parts = [x.split(offsets.diff().tolist()) for x in (query, key, value)]
    out = []
    for part in zip(*parts, strict=True):
        q, k, v = (x.transpose(0, 1)[None] for x in part)
        got = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        out.append(got[0].transpose(0, 1))
    return torch.cat(out)


def gradients(model, name, ids, mask, coefficients):
    """Hidden states, 0 where there is padding, and the gradients of a sum of the others."""
    model = copy.deepcopy(model)
    model.set_attn_implementation(name)
    hidden = model.model(ids, attention_mask=mask, use_cache=False).last_hidden_state
    hidden = hidden * mask[..., None]
    (hidden * coefficients).sum().backward()
    return hidden, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def compare_with_sdpa(device, dtype, varlen, limit, *, checkpointing=False):
    unpadded_attention.register(varlen)
    model = tiny_model(50, hidden=128, layers=2, heads=4, kv_heads=2).to(device, dtype)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
    torch.manual_seed(0)
    ids = torch.randint(50, (4, 9), device=device)
    lengths = torch.tensor([9, 1, 4, 7], device=device)
    mask = (torch.arange(9, device=device) < lengths[:, None]).long()
    coefficients = torch.randn(4, 9, 128, device=device, dtype=dtype)
    ours, ours_d = gradients(model, unpadded_attention.NAME, ids, mask, coefficients)
    theirs, theirs_d = gradients(model, "sdpa", ids, mask, coefficients)
    assert ours_d.keys() == theirs_d.keys() and len(ours_d) > 10
    assert (ours - theirs).norm() <= limit * theirs.norm()
    for name, gradient in theirs_d.items():
        assert (ours_d[name] - gradient).norm() <= limit * gradient.norm(), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_unpadded_attention_equals_sdpa(checkpointing):
    compare_with_sdpa("cpu", torch.float32, per_sequence, 1e-5, checkpointing=checkpointing)


@pytest.mark.gpu
def test_unpadded_attention_of_torch_equals_sdpa():
    compare_with_sdpa("cuda", torch.bfloat16, unpadded_attention.torch_varlen, 0.03)


def test_unpadding_without_a_mask():
    got = unpadded_attention.unpadding(2, 3, None, "cpu")
    assert got.places.tolist() == [0, 1, 2, 3, 4, 5]
    assert (got.offsets.tolist(), got.longest) == ([0, 3, 6], 3)


def test_the_committed_case_keeps_its_name():
    first = next(on_cpu())
    assert f'"case": "{first}"' in (RESULTS / "cpu-2-cores.jsonl").read_text()
    names = [str(case) for case in on_cpu()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("gib", "lora"), [(80, 16), (140, None)])
def test_cases_fit_their_device(gib, lora):
    cases = list(on_cuda(gib << 30))
    assert [case.name for case in cases].count("8B") == 2
    assert len({str(case) for case in cases}) == 4
    for case in cases:
        adapted = case.lora if case.name == "8B" else lora
        assert adapted == lora
        options, own = case.options(), case.own_options()
        pairs_of_a_step = (
            options["per_device_train_batch_size"] * options["gradient_accumulation_steps"]
        )
        assert pairs_of_a_step == case.pairs
        assert own["dtype"] == "bfloat16" and own["fp32_master_weights"] is False
        assert ("lora" in own) == (case.lora is not None)
        assert options["bf16"] == (case.lora is not None)


def test_long_pairs_and_the_order_within_a_step():
    source = pairs(4)[1]
    tokenizer = tiny_tokenizer(texts_of(source), 400)
    rows = long_pairs(6, source, tokenizer, (40, 80), (5, 9))
    assert rows == long_pairs(6, source, tokenizer, (40, 80), (5, 9))
    ordered, lengths = grouped(rows, tokenizer, 3)
    for row, (prompt, chosen, rejected) in zip(ordered, lengths, strict=True):
        assert 38 <= prompt <= 82
        assert 4 <= min(chosen, rejected) <= max(chosen, rejected) <= 13  # EOS and a cut word
        assert len(tokenizer(row["prompt"] + row["chosen"])["input_ids"]) == prompt + chosen - 1
    for start in (0, 3):
        step = ordered[start : start + 3]
        assert sorted(map(str, step)) == sorted(map(str, rows[start : start + 3]))
        totals = [p + max(c, r) for p, c, r in lengths[start : start + 3]]
        assert totals == sorted(totals)


def log(case, *, loss=0.7, logps=-10.0):
    keys = {"grad_norm": 1.0, "logps/chosen": logps, "logps/rejected": -10.0, "loss": loss}
    return [{"num_tokens": step, **keys} for step in range(case.steps)]


@pytest.fixture
def runs(monkeypatch):
    """Runs that are told what they compute; ``calls`` is who was asked for a step, in order."""
    told, calls = {}, []

    class Told:
        def __init__(self, provider, folder):
            self.provider = provider
            calls.append(provider)

        def __call__(self):
            calls.append(self.provider)
            if told.get(self.provider) is None:
                raise RuntimeError("ModuleNotFoundError: No module named 'trl'")

        def finish(self):
            memory = {"peak_mib": 3.0, "peak_above_state_mib": 1.0}
            return {"log": told[self.provider], "memory": memory}

        def stop(self):
            pass

    monkeypatch.setattr(bench_dpo_step, "Run", Told)
    return told, calls


def rows_of(case):
    said = []
    return {row["provider"]: row for row in case.rows(lambda *why: said.append(why))}, said


def test_rows_of_runs_that_agree(runs, capsys):
    told, calls = runs
    case = dataclasses.replace(CASE, targets={"trl": Target(2, 0.5, "peak_mib")}, **PROMPTS)
    told |= {"fastpref": log(case), "trl": log(case, loss=0.70005)}
    rows, said = rows_of(case)
    assert not said and calls == 3 * ["fastpref", "trl"]
    assert rows["trl"]["loss_difference"] == pytest.approx(5e-5)
    assert rows["trl"]["rounds"] == 2
    ours, theirs = rows["fastpref"], rows["trl"]
    assert ours["num_computed_tokens"] < ours["num_tokens"] == theirs["num_tokens"]
    assert theirs["num_tokens"] < theirs["num_computed_tokens"]
    assert "times faster than trl (target 2), 1.00 of its peak_mib (target 0.5)" in (
        capsys.readouterr().out
    )


def test_tokens_and_utilisation_are_those_of_the_timed_steps(runs, monkeypatch):
    told, calls = runs
    case = dataclasses.replace(CASE, device="cuda", warm_up=2, micro_batch=2)
    told |= {"fastpref": log(case), "trl": log(case)}
    lengths = [(9, 9, 9)] * 4 + [(3, 2, 1), (1, 1, 4)]
    monkeypatch.setattr(Case, "prepare", lambda self, folder: ("made", lengths))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(bench_dpo_step, "times_ms", lambda seconds: {"ms_p50": 1e3 * seconds[0]})
    rows, said = rows_of(case)
    assert not said and calls == 3 * ["fastpref"] + 3 * ["trl"]  # one at a time on a GPU
    ours, theirs = rows["fastpref"], rows["trl"]
    assert (ours["num_tokens"], ours["num_computed_tokens"]) == (16, 12)
    assert (theirs["num_tokens"], theirs["num_computed_tokens"]) == (16, 20)
    for row, share in ((ours, True), (theirs, False)):
        need = step_cost.flop(lengths[4:], case.sizes(), share=share, live_reference=True)
        seconds = row["ms_p50"] / 1e3
        assert row["mfu"] == pytest.approx(need / seconds / 989e12)
        assert row["tokens_per_second"] == pytest.approx(16 / seconds)


@pytest.mark.parametrize("wrong", [{"loss": 0.71}, {"logps": -10.1}, {"loss": float("nan")}])
def test_no_row_of_a_run_that_computed_something_else(runs, wrong):
    told, _ = runs
    case = dataclasses.replace(CASE, providers=("fastpref", "trl", "trl_sdpa"))
    told |= {"fastpref": log(case), "trl": log(case, **wrong), "trl_sdpa": log(case)}
    rows, said = rows_of(case)
    assert rows.keys() == {"fastpref", "trl_sdpa"}
    assert len(said) == 1 and said[0][1] == "trl" and "computes something else" in said[0][0]
    told["trl_sdpa"] = log(case, **wrong)
    rows, said = rows_of(case)
    assert not rows and [name for _, name in said] == ["trl", "trl_sdpa", "fastpref"]


def test_other_tokens_are_another_computation(runs):
    told, _ = runs
    told |= {"fastpref": log(CASE), "trl": log(dataclasses.replace(CASE, steps=4))[1:]}
    rows, said = rows_of(CASE)
    assert not rows and "tokens after each step" in said[0][0]


def test_a_peer_that_fails_says_why_and_ours_goes_on(runs):
    told, _ = runs
    told["fastpref"] = log(CASE)
    rows, said = rows_of(CASE)
    assert rows.keys() == {"fastpref"}
    assert said == [
        (
            f"skipped: dpo_step, {CASE}: trl: RuntimeError: "
            "ModuleNotFoundError: No module named 'trl'",
            "trl",
        )
    ]


def test_processes_end_to_end():
    """TRL where it is installed; where it is not, the reason of its own process."""
    case = dataclasses.replace(CASE, checkpointing=True, precomputed=True, budget=100, **PROMPTS)
    rows, said = rows_of(case)
    assert rows["fastpref"]["peak_above_model_mib"] > 0
    if importlib.util.find_spec("trl") is None:
        assert "ModuleNotFoundError: No module named 'trl'" in said[0][0]
    else:
        assert not said and rows["trl"]["grad_norm_difference"] < 1e-3


def test_a_run_that_does_not_answer_is_ended(monkeypatch, tmp_path):
    monkeypatch.setattr(dpo_step, "LONGEST", 0.2)
    asleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    start = dpo_step.subprocess.Popen
    monkeypatch.setattr(dpo_step.subprocess, "Popen", lambda _, **options: start(asleep, **options))
    with pytest.raises(RuntimeError, match=r"trl ended with -9, or after 0\.2 s was ended"):
        dpo_step.Run("trl", tmp_path)


@pytest.mark.slow
def test_losses_equal_trls(tmp_path, monkeypatch):
    """Ten steps at a rate that moves them, under its own attention and the unpadded one."""
    pytest.importorskip("trl")
    case = dataclasses.replace(CASE, layers=2, hidden=64, vocab=2000, pairs=4, steps=10)
    case.prepare(tmp_path)
    unpadded_attention.register(per_sequence)
    monkeypatch.setattr(unpadded_attention, "register", lambda: None)
    rows = json.loads((tmp_path / "rows.json").read_text())
    tokenizer = dpo_step.AutoTokenizer.from_pretrained(tmp_path)
    logs, steps = {}, []
    for name in ("fastpref", "trl", "trl_rows_dropped", "trl_varlen"):
        given = case.model(tokenizer), tokenizer, rows, tmp_path / name, steps.append
        logs[name] = dpo_step.PROVIDERS[name](case.setup(), *given)
    assert steps == 4 * list(range(1, 11))
    ours = logs.pop("fastpref")
    losses = [row["loss"] for row in ours]
    assert max(losses) - min(losses) > 0.01
    for theirs in logs.values():
        found = bench_dpo_step.differences(ours, theirs)
        assert found["loss_difference"] < 1e-4 and found["logps_difference"] < 1e-5
