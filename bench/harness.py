"""What benchmarks share: the facts of a run, the spread of its times, rows in a file."""

import datetime
import hashlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PACKAGES = ("torch", "triton", "transformers", "trl", "liger_kernel", "cut_cross_entropy")


def facts(device="cpu"):
    """Where and with what this process runs; None for what is not there."""
    status = git("status", "--porcelain", "--", ".", ":!bench/results")
    return {
        "machine": machine(device),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        **{name: version_of(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "commit": git("rev-parse", "--short", "HEAD"),
        # rows that were appended a moment ago change no measured code
        "dirty": None if status is None else bool(status),
        "sources": sources(),
        "utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def machine(device):
    """The kind of machine, which names the file of its rows."""
    if device == "cpu":
        return f"cpu-{os.cpu_count()}-cores"
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower())


def device_name(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{cpu_name()}, {os.cpu_count()} cores"


def cpu_name():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.split(": ")[1] for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def version_of(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git(*args):
    """What git answers, or None, which it says, where there is no git or no checkout."""
    command = ["git", "--no-optional-locks", *args]  # a look, beside which others may commit
    try:
        answer = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        print(f"rows will lack what git {args[0]} says: {error}", file=sys.stderr)
        return None
    return answer.stdout.strip()


def sources():
    """A digest of the measured code: it names it where no commit can."""
    digest = hashlib.sha256()
    for folder in ("kernels", "csrc"):
        for file in sorted((ROOT / folder).glob("*.*")):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:12]


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
    """Print a row and append it to the file of its kind of machine, if a folder is given."""
    line = json.dumps(row)
    print(line, flush=True)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{row['machine']}.jsonl"
        torn = file.exists() and not file.read_bytes().endswith(b"\n")
        with file.open("a") as rows:
            rows.write("\n" * torn + line + "\n")
