"""A DPO step against TRL's DPOTrainer: same model, rows, order and options, in the same run.

``OMP_NUM_THREADS=2 pytest bench/bench_dpo_step.py --out bench/results`` on an idle machine. Losses
are compared step by step: no row is written of a run that computed something else.
"""

import time

import pytest

from bench.dpo_step import PROVIDERS, Case, Run, prepare
from bench.harness import times_ms, write

pytest.importorskip("trl")
SMALL = Case(layers=2, hidden=64, vocab=2000, pairs=4, steps=10, learning_rate=1e-3)
CASE = Case(layers=4, hidden=256, vocab=32_000, pairs=8, steps=11, learning_rate=1e-6)
# how many times faster than each peer, and the share of its peak memory
TARGETS = {"trl": (15, 0.25), "trl_rows_dropped": (4, 0.5)}


def differences(ours, theirs):
    """Largest distances over all steps, of losses in nats, of gradient norms by their size."""
    both = list(zip(ours, theirs, strict=True))
    assert [a["num_tokens"] for a, _ in both] == [b["num_tokens"] for _, b in both]
    return {
        "loss_difference": max(abs(a["loss"] - b["loss"]) for a, b in both),
        "grad_norm_difference": max(abs(a["grad_norm"] / b["grad_norm"] - 1) for a, b in both),
    }


@pytest.mark.slow
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


@pytest.mark.slow
def test_dpo_step(benchmark, tmp_path, out, capsys):
    """Step by step in turn: a machine's slow minutes are slow for all."""
    data = prepare(CASE, tmp_path)
    runs = {name: Run(name, tmp_path) for name in PROVIDERS}
    seconds = {name: [] for name in TARGETS}

    def peers():
        for name, times in seconds.items():
            began = time.perf_counter()
            runs[name]()
            times.append(time.perf_counter() - began)

    benchmark.pedantic(runs["fastpref"], setup=peers, rounds=CASE.steps - 1)
    seconds["fastpref"] = benchmark.stats.stats.data
    ends = {name: run.finish() for name, run in runs.items()}
    ours = ends["fastpref"]["log"]
    rows = {}
    for name, end in ends.items():
        tokens = end["log"][-1]["num_tokens"] - end["log"][0]["num_tokens"]
        rows[name] = {
            "op": "dpo_step",
            "provider": name,
            "case": str(CASE),
            "data": data,
            **times_ms(seconds[name]),
            "tokens_per_second": tokens / sum(seconds[name]),
            **end["memory"],
        }
        if name in TARGETS:
            rows[name] |= differences(ours, end["log"])
            assert rows[name]["loss_difference"] < 1e-4
    with capsys.disabled():
        for name, row in rows.items():
            write(row | ends[name]["facts"], out)
        missed = [name for name in TARGETS if not reached(name, rows)]
    assert not missed


def reached(peer, rows):
    """Whether the targets against a peer are; says by how much."""
    faster = rows[peer]["ms_p50"] / rows["fastpref"]["ms_p50"]
    memory = rows["fastpref"]["peak_mib"] / rows[peer]["peak_mib"]
    least, most = TARGETS[peer]
    print(
        f"{faster:.1f} times faster than {peer} (target {least}), {memory:.2f} of its peak memory "
        f"(target {most})"
    )
    return faster >= least and memory <= most
