"""Time every op beside its peers: ``python -m bench.run --seconds N --out DIR``.

Ceilings first, then the cases of all ops, the most important of each first. An op's tests run
before it is timed; where they fail it is not, and the exit code is 1. Rows are appended case by
case, so a run that is cut has written whole rows; no work starts once the seconds are used up.
"""

import argparse
import importlib
import itertools
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench.harness import ROOT, facts, write
from bench.measure import is_ours, measure
from bench.table import markdown

OPS = (
    *("dpo_step", "linear_logp", "logp_from_logits", "linear_kl"),
    *("preference", "gae", "ppo_policy", "packing"),
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TESTS = ROOT / "tests"
OTHERS = {
    "linear_logp": ("active_columns", "vocab_parallel", "cuda"),
    "logp_from_logits": ("cuda",),
    "linear_kl": ("cuda",),
    "packing": ("micro_batches",),
    "gae": ("cuda", "ppo_peers"),
    "ppo_policy": ("cuda", "ppo_value", "ppo_peers"),
}


def is_correct(op, device):
    """Whether the correctness tests of an op do, on this device, in a process of their own."""
    names = (op, *OTHERS.get(op, ()))
    files = sorted(str(file) for name in names for file in TESTS.rglob(f"test_{name}*.py"))
    if not files:  # pytest would run all tests there are
        print(f"no tests of {op} in {TESTS}")
        return False
    # the interpreter takes minutes for what is not timed here
    marks = ["-m", "gpu"] if device == "cuda" else ["-k", "not triton"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", "-q", "-x", *files, *marks]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}).returncode == 0


def cases_of(ops, device):
    """The ceilings, then the first case of each op, the second of each, and so on."""
    yield from importlib.import_module("bench.bench_ceilings").cases(device)
    lists = [importlib.import_module(f"bench.bench_{op}").cases(device) for op in ops]
    for cases in itertools.zip_longest(*lists):
        yield from filter(None, cases)


def run(ops, device, seconds, out):
    """Measure for ``seconds``; the rows, and what failed: ops by their tests, providers of ours."""
    deadline = time.monotonic() + seconds
    about, rows, failed, tested = facts(device), [], [], {"ceilings": True}

    def say(reason, name):
        print(reason, flush=True)
        if is_ours(name):
            failed.append(reason)

    for case in cases_of(ops, device):
        if time.monotonic() < deadline and case.op not in tested:
            tested[case.op] = is_correct(case.op, device)
            if not tested[case.op]:
                say(f"not timed: {case.op}: its tests do not pass", "fastpref")
        if time.monotonic() >= deadline:
            print(f"not timed: {case.op}, {case}: the {seconds:g} seconds are used up")
        elif tested[case.op]:
            for row in measure(case, say):
                rows.append(row | about)
                write(rows[-1], out)
    return rows, failed


def main(argv=None):
    parser = argparse.ArgumentParser(prog="bench.run", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, required=True, help="start no work after these")
    parser.add_argument("--out", type=Path, required=True, help="folder whose JSONL takes the rows")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=DEVICE)
    parser.add_argument("--only", nargs="+", default=OPS, metavar="OP", help=", ".join(OPS))
    args = parser.parse_args(argv)
    unknown = sorted(set(args.only) - set(OPS))
    if unknown:
        parser.error(f"--only needs ops of {', '.join(OPS)}, got {', '.join(unknown)}")
    if not 0 < args.seconds < math.inf:
        parser.error(f"--seconds needs a positive number, got {args.seconds:g}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device, torch sees none")
    rows, failed = run(list(dict.fromkeys(args.only)), args.device, args.seconds, args.out)
    print(markdown(rows), *failed, sep="\n")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
