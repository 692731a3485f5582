"""Sums of metrics, and the files of a run's lines."""

import contextlib
import json
import math
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from fastpref.methods.base import Metrics
from fastpref.models.flops import peak_flops
from fastpref.train.checkpoint import replace_text, sync
from fastpref.train.console import tell
from fastpref.train.engine import Engine


class MetricSums:
    """Sums and counts on the device; one reduction over ranks and one sync per reading."""

    def __init__(self) -> None:
        self.sums: Metrics = {}

    def add(self, metrics: Metrics) -> None:
        for name, parts in metrics.items():
            total, count = (part.float() for part in parts)  # as a state brings them back
            old = self.sums.get(name)
            self.sums[name] = (total, count) if old is None else (old[0] + total, old[1] + count)

    def state(self) -> dict[str, list[float]]:
        """The sums as they stand; JSON keeps their doubles exactly."""
        return {name: [float(x) for x in parts] for name, parts in self.sums.items()}

    def load(self, state: dict[str, list[float]]) -> None:
        """Go on from a state; what comes next is added on its own device."""
        self.sums = {
            name: (torch.tensor(total), torch.tensor(count))
            for name, (total, count) in state.items()
        }

    def read(self, engine: Engine) -> dict[str, float]:
        """Global means by name; starts the sums anew."""
        if not self.sums:
            return {}
        names = sorted(self.sums)
        flat = torch.stack([part.double() for name in names for part in self.sums[name]])
        pairs = engine.all_reduce_sum(flat).view(-1, 2).tolist()
        self.sums = {}
        return {
            name: total / count for name, (total, count) in zip(names, pairs, strict=True) if count
        }


class Throughput:
    """Steps' work by the seconds they took, since the last reading."""

    def __init__(self, engine: Engine) -> None:
        name = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else ""
        self.peak = peak_flops(name)
        self.ranks = engine.world_size
        self.start()

    def start(self) -> None:
        self.seconds = self.flops = 0.0
        self.tokens = self.computed = 0

    def count(self, tokens: int, computed: int, flops: float) -> None:
        """Add what all ranks do in a step."""
        self.tokens += tokens
        self.computed += computed
        self.flops += flops

    def read(self) -> dict[str, float]:
        """Tokens a second of all ranks; flop a second of one, and its share of the most."""
        each = self.flops / self.seconds / self.ranks
        rates = {
            "tokens_per_second": self.tokens / self.seconds,
            "computed_tokens_per_second": self.computed / self.seconds,
            "tflops_per_second": each / 1e12,
        }
        self.start()
        return rates if self.peak is None else rates | {"mfu": each / self.peak}


class JsonLines:
    """A file of one object a line, in the order of the steps."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        """Lines that this run has written."""

    def keep(self, count: int) -> None:
        """Drop the lines after the first ``count``, which a resumed run writes again."""
        kept = self.rows()[:count]
        if len(kept) < count:
            tell(
                f"{self.path} holds {len(kept)} of the {count} lines that the checkpoint knows: "
                "steps will be missing in it"
            )
        self.count = len(kept)
        if self.path.exists():
            replace_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def sync(self) -> None:
        """Have the lines on the disk before a checkpoint counts on them."""
        if self.path.exists():
            sync(self.path)

    def rows(self) -> list[dict[str, Any]]:
        """Every whole line; the last one of a killed run may be torn."""
        rows = []
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
        return rows

    def last(self) -> dict[str, float]:
        """The last value of every name."""
        return {name: value for row in self.rows() for name, value in row.items()}

    def write(self, row: dict[str, Any]) -> None:
        """Add a line; a number that is not finite becomes null, since JSON has no word for it."""
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in row.items()
        }
        with self.path.open("a") as file:
            file.write(json.dumps(finite) + "\n")
        self.count += 1


def peak_memory(device: torch.device) -> float:
    """The most memory that was in use so far, in GiB: the GPU's, else the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):  # ru_maxrss starts at what the parent held when it forked
            return int(line.split()[1]) / 2**20  # from KiB
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
