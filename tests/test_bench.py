"""The benchmark harness: whole rows, reasons for what is missing, nothing timed that is wrong."""

import dataclasses
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # bench/ is no part of the package; last: kernels/ is no package at all

from bench import (  # noqa: E402
    bench_gae,
    bench_linear_logp,
    bench_logp_from_logits,
    bench_ppo_policy,
    harness,
    measure,
    run,
    table,
)
from bench.bench_logp_from_logits import PASSES  # noqa: E402
from bench.measure import Provider  # noqa: E402

FACTS = {
    *("machine", "device", "threads", "torch", "triton", "cuda", "transformers", "trl"),
    *("liger_kernel", "cut_cross_entropy", "commit", "dirty", "sources", "utc"),
}
TIMES = {"rounds", "ms_p20", "ms_p50", "ms_p80", "floor_ms", "floor_multiple"}
WHOLE = {"op", "provider", "case", "gb_per_s"} | TIMES | FACTS


@dataclasses.dataclass(frozen=True)
class Toy:
    """Doubles a vector, as fast as it can be copied."""

    name: str = "toy"
    doubles: tuple[tuple[str, Callable], ...] = (("torch", lambda x: 2 * x),)
    prepare: Callable = lambda: None

    op = "toy"
    device = "cpu"
    cost = 2.0
    ceiling = "copy"
    unit = "gb_per_s"
    work = 8e-6

    def __str__(self):
        return self.name

    def load(self):
        self.prepare()
        return torch.arange(1000.0)

    def top(self, x):
        return x.clone

    def errors(self, x):
        return lambda result: {"logp_error": float((result - 2 * x).abs().max())}

    def providers(self):
        return {name: lambda x, fn=fn: Provider(lambda: fn(x)) for name, fn in self.doubles}


def missing(x):
    raise ImportError("no module named 'peer'\nand a second line")


def fails_on_call(number):
    calls = []

    def fn(x):
        calls.append(1)
        if len(calls) == number:
            raise MemoryError("it asks for more")
        return 2 * x

    return fn


def measured(case):
    said = []
    return measure.measure(case, lambda reason, name: said.append(reason)), said


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """``bench.run`` over given toys; returns its code and the rows in its file."""

    def call(*toys, test=None, start=run.main):
        nothing, op = (SimpleNamespace(cases=lambda device, c=c: c) for c in ([], toys))
        monkeypatch.setitem(sys.modules, "bench.bench_ceilings", nothing)
        monkeypatch.setitem(sys.modules, "bench.bench_toy", op)
        monkeypatch.setattr(run, "OPS", ("toy",))
        if test is None:
            monkeypatch.setattr(run, "is_correct", lambda op, device: True)
        else:
            monkeypatch.setattr(run, "TESTS", tmp_path)
            (tmp_path / "test_toy.py").write_text(test)
        argv = ["--seconds", "60", "--out", str(tmp_path), "--device", "cpu", "--only", "toy"]
        code = start(argv)
        return code, [json.loads(line) for line in lines(tmp_path)]

    return call


def lines(folder):
    file = folder / f"{harness.machine('cpu')}.jsonl"
    return file.read_text().splitlines() if file.exists() else []


def test_a_row_has_all_fields(bench):
    code, (ceiling, row) = bench(Toy())
    assert code == 0
    assert ceiling.keys() == WHOLE
    assert row.keys() == WHOLE | {"peak_mib", "logp_error"}
    assert (ceiling["provider"], row["provider"]) == ("copy", "torch")
    assert ceiling["floor_multiple"] == 1
    assert row["rounds"] == measure.ROUNDS["cpu"]
    assert row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
    assert row["floor_ms"] == 2 * ceiling["ms_p50"]
    assert row["floor_multiple"] * row["floor_ms"] == pytest.approx(row["ms_p50"])
    assert row["gb_per_s"] * row["ms_p50"] / 1e3 == pytest.approx(2 * Toy.work)
    assert row["threads"] == torch.get_num_threads()
    assert row["torch"] == torch.__version__


def test_a_provider_that_fails_says_why_and_the_others_go_on(bench, capsys):
    peers = (("absent", missing), ("late", fails_on_call(7)), ("torch", lambda x: 2 * x))
    code, rows = bench(Toy(doubles=peers))
    said = capsys.readouterr().out
    assert [row["provider"] for row in rows] == ["copy", "torch"]
    assert "skipped: toy, toy: absent: ImportError: no module named 'peer'\n" in said
    assert "skipped: toy, toy: late: MemoryError: it asks for more\n" in said
    assert code == 0


def test_another_function_is_not_timed():
    peers = (("triples", lambda x: 3 * x), ("nan", lambda x: x * float("nan")))
    rows, said = measured(Toy(doubles=peers))
    assert [row["provider"] for row in rows] == ["copy"]
    assert "triples: ArithmeticError: computes something else: logp_error is 999" in said[0]
    assert "nan: ArithmeticError" in said[1]


def test_our_own_failure_is_in_the_exit_code(bench, capsys):
    code, rows = bench(Toy(doubles=(("fastpref", missing), ("torch", lambda x: 2 * x))))
    assert code == 1
    assert [row["provider"] for row in rows] == ["copy", "torch"]
    assert "in missing" in capsys.readouterr().err  # a traceback, of ours


def test_a_case_that_cannot_be_built_does_not_stop_the_next(bench):
    code, rows = bench(Toy("large", prepare=lambda: missing(None)), Toy("small"))
    assert code == 1
    assert {row["case"] for row in rows} == {"small"}


def test_memory_that_we_leave_unwritten_is_seen():
    def lazy(x):
        out = torch.empty(len(x) + 1)[:-1]
        out[:-1] = 2 * x[:-1]
        return out

    _, said = measured(Toy(doubles=(("fastpref", lazy),)))
    assert len(said) == 1 and "logp_error is nan" in said[0]
    assert not torch.are_deterministic_algorithms_enabled()


def test_failing_tests_stop_their_op(bench, capsys):
    code, rows = bench(Toy(), test="def test(): assert False")
    assert (code, rows) == (1, [])
    assert "not timed: toy: its tests do not pass" in capsys.readouterr().out


def test_passing_tests_let_their_op_be_timed(bench):
    code, rows = bench(Toy(), test="def test(): pass")
    assert (code, len(rows)) == (0, 2)


def test_an_op_without_tests_is_not_timed(bench, monkeypatch, capsys):
    monkeypatch.setattr(Toy, "op", "toy2")
    code, rows = bench(Toy(), test="def test(): pass")
    assert (code, rows) == (1, [])
    assert "no tests of toy2" in capsys.readouterr().out


def test_no_work_starts_once_the_seconds_are_used_up(bench, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: now[0]))
    code, rows = bench(Toy("first", prepare=lambda: now.__setitem__(0, 60.0)), Toy("second"))
    assert {row["case"] for row in rows} == {"first"}
    assert "not timed: toy, second: the 60 seconds are used up" in capsys.readouterr().out
    assert code == 0


def test_a_run_that_is_killed_leaves_whole_rows(bench):
    def killed(argv):
        child = multiprocessing.get_context("fork").Process(target=run.main, args=(argv,))
        child.start()
        child.join()
        return child.exitcode

    dies = Toy("second", prepare=lambda: os.kill(os.getpid(), signal.SIGKILL))
    code, rows = bench(Toy("first"), dies, start=killed)
    assert code == -signal.SIGKILL
    assert [row["case"] for row in rows] == ["first", "first"]
    assert all(row.keys() >= WHOLE for row in rows)


def test_each_call_has_its_backend_and_the_old_one_is_put_back(monkeypatch):
    monkeypatch.setenv("FASTPREF_BACKEND", "old")
    seen = {"fastpref": [], "fastpref_torch": []}

    def make(name):
        def call(x):
            seen[name].append(os.environ["FASTPREF_BACKEND"])
            return 2 * x

        return lambda x: Provider(lambda: call(x), measure.insist(f"of {name}"))

    monkeypatch.setattr(Toy, "providers", lambda self: {name: make(name) for name in seen})
    rows, _ = measured(Toy())
    assert [row["provider"] for row in rows] == ["copy", *seen]
    assert all(set(backends) == {f"of {name}"} for name, backends in seen.items())
    assert os.environ["FASTPREF_BACKEND"] == "old"


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--only", "linear_logp", "linear_log"], "got linear_log\n"),
        (["--seconds", "0"], "--seconds needs a positive number, got 0\n"),
        (["--seconds", "nan"], "--seconds needs a positive number, got nan\n"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        pytest.param(
            ["--device", "cuda"],
            "--device cuda needs a CUDA device, torch sees none\n",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_wrong_options_are_refused(argv, reason, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(["--seconds", "1", "--out", str(tmp_path), *argv])
    assert stop.value.code == 2
    assert reason in capsys.readouterr().err
    assert not lines(tmp_path)


PEAKS = """
import torch
from bench.measure import Provider, peak_mib

mib = 2**18  # fp32

def call():
    first = torch.ones(48 * mib)
    second = first + 1
    del first
    return second + 1

def small():
    return torch.ones(20 * mib)

for _ in range(3):  # what malloc then holds back is to be counted all the same
    small()
print(peak_mib(Provider(call), "cpu"), peak_mib(Provider(small), "cpu"))
"""


def test_peak_memory_is_what_a_call_takes():
    """In a process of its own: a training run tells malloc to keep what is freed."""
    env = os.environ | {"PYTHONPATH": str(harness.ROOT)}
    done = subprocess.run([sys.executable, "-c", PEAKS], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    large, small = map(float, done.stdout.split())
    assert large == pytest.approx(96, abs=3)
    assert small == pytest.approx(20, abs=3)


def test_facts_without_git_or_a_package(monkeypatch, tmp_path, capsys):
    assert harness.version_of("no-such-package") is None
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    found = harness.facts()
    assert found.keys() == FACTS
    assert found["commit"] is None and found["dirty"] is None
    assert "rows will lack what git rev-parse says" in capsys.readouterr().err


def test_each_kind_of_machine_has_its_file(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert harness.facts("cuda")["machine"] == "nvidia-h100-80gb-hbm3"


CASES = [
    bench_linear_logp.Case("no gradient", "cpu", "bf16", 64, 16, 300, cost=1),
    *(
        bench_linear_logp.Case(name, "cpu", "fp32", 64, 16, 300, cost=3, live=0.5, **options)
        for name, options in {
            "trained": {"trains": ("hidden", "weight"), "workspaces": ((4, 3),)},
            "frozen": {"trains": ("hidden",)},
            "dpo": {"trains": ("hidden", "weight"), "dpo": True},
        }.items()
    ),
    *(
        bench_logp_from_logits.Case(name, "cpu", dtype, 20, 300)
        for name, dtype in zip(PASSES, ("bf16", "fp32", "fp32"), strict=True)
    ),
    *(bench_gae.Case(name, "cpu", 4, 130) for name in bench_gae.BYTES),
    *(bench_ppo_policy.Case(name, "cpu", 4, 130, True) for name in bench_ppo_policy.INPUTS),
    bench_ppo_policy.FromHidden("cpu", "fp32", 4, 16, 16, 300),
]
EXACT_FROM_BF16 = {("linear_logp", "torch_fp32_product"), ("logp_from_logits", "torch")}
COMPILED = {  # these take long
    *("torch_compile", "torch_compile_scan", "cut_cross_entropy"),
    *("liger_dpo", "liger_grpo", "liger_grpo_whole"),
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_providers_of_a_case_compute_the_same(case, monkeypatch):
    monkeypatch.setenv("FASTPREF_BACKEND", "")
    inputs = case.load()
    errors = case.errors(inputs)
    right = []
    for name in case.providers().keys() - COMPILED:
        try:
            _, found = measure.check(name, case.providers()[name], inputs, errors, "cpu")
        except (ImportError, RuntimeError):
            if measure.is_ours(name):
                raise
            continue
        found.pop("peak_mib")
        rounded = "bf16" in str(case) and not measure.is_ours(name)
        rounded = rounded and (case.op, name) not in EXACT_FROM_BF16
        assert found and max(found.values()) < (0.3 if rounded else 1e-4), name
        right.append(name)
    assert len([name for name in right if measure.is_ours(name)]) >= 2
    assert {"torch", "torch_loop"} & set(right)


def test_the_loss_and_the_live_rows_of_a_case():
    case = dataclasses.replace(CASES[3], live=0.25)
    target = case.load().target.view(8, 8)  # four chosen, then four rejected
    assert (target[:, :6] == -100).all() and (target[:, 6:] >= 0).all()
    logp = torch.tensor([-1.0, -3.0]).repeat_interleave(32) * (target.flatten() != -100)
    assert float(case.loss(logp, target)) == pytest.approx(math.log(1 + math.exp(-0.1 * 2)))
    assert float(CASES[1].loss(logp, target)) == -4 * 2 * (1 + 3)


def test_the_least_bytes_of_tokens():
    tokens = {case.name: case for case in CASES if hasattr(case, "B") and hasattr(case, "name")}
    policy, bundle, value = (tokens[name] for name in bench_ppo_policy.INPUTS)
    one_gradient = 4 + 8  # written, then scaled
    assert policy.cost * 8 == value.cost * 8 == 3 * 4 + 1 + one_gradient
    assert bundle.cost * 8 == 6 * 4 + 1 + 2 * one_gradient
    packed = tokens["packed"]
    flat = packed.load().flat
    assert packed.cost * packed.work == pytest.approx(16e-9 * len(flat["values"]))
    assert len(flat["values"]) == flat["cu_seqlens"][-1] < packed.B * packed.T


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_measuring_on_a_gpu(case, monkeypatch):
    monkeypatch.setitem(measure.ROUNDS, "cuda", 3)
    changes = {"device": "cuda"} | ({"dtype": "bf16"} if hasattr(case, "dtype") else {})
    rows, said = measured(dataclasses.replace(case, **changes))
    ours = [row for row in rows if measure.is_ours(row["provider"])]
    assert len(ours) >= 2 and not [reason for reason in said if "fastpref" in reason]
    assert all(row["peak_mib"] > 0 and row["floor_ms"] > 0 for row in ours)


def row(**changes):
    times = {"ms_p20": 1.0, "ms_p50": 2.0, "ms_p80": 3.0}
    where = {"machine": "cpu-2-cores", "device": "a CPU", "threads": 2, "torch": "2", "triton": "3"}
    base = {"op": "toy", "provider": "torch", "case": "toy", "commit": "abc", "dirty": True}
    return {**base, **times, **where, "utc": "2026-01-02T00:00:00+00:00", **changes}


def tables(rows, folder, *argv):
    for kind in {row["machine"] for row in rows}:
        text = "".join(json.dumps(row) + "\n" for row in rows if row["machine"] == kind)
        (folder / f"{kind}.jsonl").write_text(text)
    table.main(["--results", str(folder), *argv])


def test_the_table_takes_the_newest_row_of_each(tmp_path, capsys):
    older, later = "2026-01-01T00:00:00+00:00", "2026-01-03T00:00:00+00:00"
    rows = [
        row(ms_p50=11.0),
        row(ms_p50=12.0, utc=older),
        row(provider="ours", ms_p50=13.0, peak_mib=1234.5, floor_multiple=1.5),
        row(case="other", ms_p50=14.0),
        row(provider="ours", ms_p50=15.0, utc=later),
        row(machine="nvidia-h200", ms_p50=16.0),
        row(ms_p50=17.0),  # as new as the first: the last counts
        row(case="other", ms_p50=18.0, utc=older),
    ]
    tables(rows, tmp_path)
    shown = capsys.readouterr().out
    assert [f"{ms} (1 to 3)" in shown for ms in range(11, 19)] == [0, 0, 0, 1, 1, 1, 1, 0]
    assert "| toy | torch | 17 (1 to 3) | abc+ |\n|  | ours | 15 (1 to 3) | abc+ |" in shown
    tables(rows, tmp_path, "--device", "nvidia")
    shown = capsys.readouterr().out
    assert "toy on nvidia-h200" in shown and "cpu-2-cores" not in shown


def test_the_table_names_what_it_does_not_know(tmp_path, capsys):
    with pytest.raises(SystemExit):
        tables([row()], tmp_path, "--device", "tpu")
    assert f"no rows of tpu in {tmp_path}, which has cpu-2-cores" in capsys.readouterr().err
    with (tmp_path / "cpu-2-cores.jsonl").open("a") as file:
        file.write('{"op": "toy", ')
    table.main(["--results", str(tmp_path)])  # a kill in the middle of a line costs that line
    shown = capsys.readouterr()
    assert "cpu-2-cores.jsonl, line 2 is no row" in shown.err
    assert "toy on cpu-2-cores" in shown.out


def test_committed_rows_make_tables(capsys):
    table.main([])
    assert "### dpo_step on cpu-2-cores" in capsys.readouterr().out


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [row(floor_ms=1.0), row(provider="ours"), row(case="other"), row(op="op2")]
    tables(rows, tmp_path, "--plot", str(tmp_path / "plots"))
    drawn = sorted(file.name for file in (tmp_path / "plots").iterdir())
    assert drawn == ["cpu-2-cores-op2.svg", "cpu-2-cores-toy.svg"]


def test_pytest_benchmark_finds_every_case():
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "bench/", "--benchmark-only", "--collect-only"]
    outer = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**outer, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    found = [line for line in done.stdout.splitlines() if "::test_" in line]
    for module in (bench_linear_logp, bench_logp_from_logits, bench_gae, bench_ppo_policy):
        for case in module.cases(run.DEVICE):
            for name in (case.ceiling, *case.providers()):
                assert any(f"[{case}-{name}]" in line for line in found)
