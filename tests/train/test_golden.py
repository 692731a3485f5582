"""30 steps of SFT and of DPO equal TRL's own, step by step: golden/make.py recorded them."""

import json
from pathlib import Path

import pytest
from train.golden.make import hash_ids, inputs, weight_sums

from fastpref.data.formats import to_examples
from fastpref.data.tokenize import tokenize
from fastpref.train.run import dpo, sft

# ten times what fp32 rounding does: weights that differ in their last bit move a loss by about 1e-6
# and any curve by no more than 5e-6 of its size or 5e-6, and nothing grows over the 30 steps
CLOSE = {"rel": 5e-5, "abs": 5e-5}


def token_ids(method, rows, tokenizer):
    kind = {"sft": "sft", "dpo": "preference"}[method]
    groups, _ = tokenize(to_examples(rows, kind)[0], tokenizer)
    return [[[*ids] for ids in (g.prompt, *g.completions)] for g in groups]


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_30_steps_equal_trls(tmp_path, method):
    golden = json.loads((Path(__file__).parent / "golden" / f"{method}.json").read_text())
    rows, model, tokenizer = inputs(method)
    ids = hash_ids(token_ids(method, rows, tokenizer))
    assert ids == golden["token_ids"], "the inputs differ, not the training: other token ids"
    for name, sums in weight_sums(model).items():
        same = pytest.approx(golden["weights"][name], rel=1e-6, abs=1e-6)
        assert sums == same, f"the inputs differ, not the training: other weights in {name}"

    train = {"sft": sft, "dpo": dpo}[method]
    train({"output_dir": str(tmp_path), **golden["options"]}, model, rows, tokenizer=tokenizer)
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for name, curve in golden["curve"].items():
        assert [row[name] for row in logged] == pytest.approx(curve, **CLOSE), name
