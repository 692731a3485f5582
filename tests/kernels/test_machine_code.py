"""The Triton kernels as machine code: nothing spills, everything moves 16 bytes at a time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# sm_80, sm_90, sm_100: A100, H100 and H200, B200
ARCHITECTURES = ["80", "90", "100"]


@pytest.fixture(autouse=True)
def backend():
    """Once, not for each backend."""


@pytest.fixture(scope="module")
def rows():
    # in a process of its own: what the interpreter takes over cannot be compiled
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.machine_code", "--json", "--sm", *ARCHITECTURES]
    env |= {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_compiles_for_every_architecture(rows):
    kernels = {(row["kernel"], row["sm"]) for row in rows}
    names = {"_stream_rows", "_slab_rows", "_finish_rows", "_gradient_rows"}
    names |= {"_gae", "_whiten", "_policy", "_value", "_fold"}
    assert kernels == {(name, int(sm)) for name in names for sm in ARCHITECTURES}


def test_nothing_spills_and_nothing_is_added_in_any_order(rows):
    for row in rows:
        assert row["stack_bytes"] == 0, row
        assert not [
            x for x in row["instructions"] if x.startswith(("LDL", "STL", "ATOM", "RED"))
        ], row


def count(row, kind, narrow):
    widths = {x: n for x, n in row["instructions"].items() if x.startswith(kind)}
    return sum(n for x, n in widths.items() if ("U16" in x) == narrow and (narrow or "128" in x))


def test_rows_move_sixteen_bytes_at_a_time(rows):
    for row in rows:
        if not row["kernel"].endswith("_rows") or row["kernel"] == "_finish_rows":
            continue
        assert count(row, "LDG", False) >= 2, row
        assert count(row, "LDG", True) <= 1, row  # the label's logit
        writes = (
            row["kernel"] == "_gradient_rows" or "kept" in row["case"] or "frozen" in row["case"]
        )
        if writes and "other words" not in row["case"]:
            assert count(row, "STG", False) >= 2, row
        if "odd V" not in row["case"]:  # elsewhere the words at a row's ends are shared
            assert count(row, "STG", True) == 0, row


# tokens of 16 bytes that a thread reads and writes in a pass: of the inputs and outputs of fp32
TOKENS = {"_gae": (2, 2), "_policy": (3, 1), "_value": (3, 1), "_whiten": (1, 1)}


def test_tokens_move_sixteen_bytes_at_a_time(rows):
    for row in rows:
        if row["kernel"] in TOKENS:
            loads, stores = TOKENS[row["kernel"]]
            assert count(row, "LDG", False) >= loads, row
            assert count(row, "STG", False) >= stores, row


def test_each_token_is_moved_once(rows):
    """The bytes counted by hand are those of the loop's loads and stores."""
    found = [row for row in rows if row["kernel"] in ("_policy", "_value") and row["sm"] < 100]
    for row in found:  # on sm_100 the longest stretch is more than the loop
        if "packed" not in row["case"]:  # there words at a span's ends are written apart
            assert row["loop_bytes_per_element"] == row["bytes_per_element"], row
    assert len(found) > 10
