"""A DPO step against TRL's DPOTrainer: same model, rows, order and options, in the same run.

``OMP_NUM_THREADS=2 pytest bench/bench_dpo_step.py --out bench/results`` on an idle machine. Losses
are compared step by step: no row is written of a run that computed something else.
"""

import pytest

from bench.dpo_step import PROVIDERS, Case, Run, prepare
from bench.harness import times_ms, write

SMALL = Case(layers=2, hidden=64, vocab=2000, pairs=4, steps=10, learning_rate=1e-3)
CASE = Case(layers=4, hidden=256, vocab=32_000, pairs=8, steps=11, learning_rate=1e-6)
# how many times faster than each peer, and the share of its peak memory
TARGETS = {"trl": (15, 0.25), "trl_rows_dropped": (4, 0.5)}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("case")
    return folder, prepare(CASE, folder)


@pytest.fixture(scope="module")
def finished():
    """Row and log of each provider that has been measured."""
    return {}


def differences(ours, theirs):
    """Largest distances over all steps, of losses in nats, of gradient norms by their size."""
    both = list(zip(ours, theirs, strict=True))
    assert [a["num_tokens"] for a, _ in both] == [b["num_tokens"] for _, b in both]
    return {
        "loss_difference": max(abs(a["loss"] - b["loss"]) for a, b in both),
        "grad_norm_difference": max(abs(a["grad_norm"] / b["grad_norm"] - 1) for a, b in both),
    }


def test_losses_equal_trls(tmp_path, capsys):
    """Ten steps at a rate that moves them: both differ by fp32 rounding, summed in other orders."""
    prepare(SMALL, tmp_path)
    logs = {name: Run(name, tmp_path).finish()["log"] for name in PROVIDERS}
    losses = [row["loss"] for row in logs["fastpref"]]
    assert max(losses) - min(losses) > 0.01
    for name in TARGETS:
        found = differences(logs["fastpref"], logs[name])
        with capsys.disabled():
            print(f"\n{SMALL}: {name} {found}")
        assert found["loss_difference"] < 1e-4


@pytest.mark.parametrize("provider", PROVIDERS)
def test_dpo_step(benchmark, prepared, finished, out, provider, capsys):
    folder, data = prepared
    run = Run(provider, folder)
    benchmark.pedantic(run, rounds=CASE.steps - 1)
    seconds = benchmark.stats.stats.data
    end = run.finish()
    tokens = end["log"][-1]["num_tokens"] - end["log"][0]["num_tokens"]
    row = {
        "op": "dpo_step",
        "provider": provider,
        "case": str(CASE),
        "data": data,
        **times_ms(seconds),
        "tokens_per_second": tokens / sum(seconds),
        **end["memory"],
    }
    if "fastpref" in finished:
        row |= differences(finished["fastpref"][1], end["log"])
    finished[provider] = row, end["log"]
    assert provider == "fastpref" or row.get("loss_difference", 1) < 1e-4, "not the same losses"
    with capsys.disabled():
        write(row | end["facts"], out)


@pytest.mark.parametrize("peer", TARGETS)
def test_targets(finished, peer, capsys):
    if not {"fastpref", peer} <= finished.keys():
        pytest.skip("needs fastpref and its peer measured in this run")
    ours, theirs = finished["fastpref"][0], finished[peer][0]
    faster = theirs["ms_p50"] / ours["ms_p50"]
    memory = ours["peak_mib"] / theirs["peak_mib"]
    with capsys.disabled():
        print(f"\n{faster:.1f} times faster than {peer}, {memory:.2f} of its peak memory")
    least, most = TARGETS[peer]
    assert faster >= least and memory <= most
