"""What benchmarks share: the facts of a run, the spread of its times, rows in a file."""

import datetime
import json
import os
import statistics
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def facts():
    """Where and with what this process runs."""
    names = ("torch", "triton", "transformers", "trl")
    return {
        "device": f"{cpu_name()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        **{name: version(name) for name in names},
        "commit": git("rev-parse", "--short", "HEAD"),
        # rows that were appended a moment ago change no measured code
        "dirty": bool(git("status", "--porcelain", "--", ".", ":!bench/results")),
        "utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def cpu_name():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(": ")[1] for line in lines if line.startswith("model name"))


def git(*args):
    command = ["git", "--no-optional-locks", *args]  # a look, beside which others may commit
    return subprocess.check_output(command, cwd=ROOT, text=True).strip()


def memory_mib():
    """Resident memory of this process now and at its peak.

    The kernel's VmHWM, since ru_maxrss starts at what the parent held when it forked.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = dict(line.split(":", 1) for line in lines)
    return tuple(int(sizes[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))


def times_ms(seconds):
    """The quantiles that a row holds."""
    low, *_, high = statistics.quantiles(seconds, n=5, method="inclusive")
    quantiles = {"p20": low, "p50": statistics.median(seconds), "p80": high}
    return {"rounds": len(seconds), **{f"ms_{name}": 1e3 * t for name, t in quantiles.items()}}


def write(row, folder):
    """Print a row and append it to the file of this kind of machine, if a folder is given."""
    line = json.dumps(row)
    print(line)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"cpu-{os.cpu_count()}-cores.jsonl").open("a") as file:
            file.write(line + "\n")
