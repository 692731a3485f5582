"""Times the providers of a case on the same inputs, in turn: slow minutes are slow for all.

A case is an object with ``op``, ``device``, ``cost``, ``ceiling`` (its name), ``work`` and ``unit``
of one ceiling call, and ``load() -> inputs``, ``top(inputs) -> call``, ``providers() -> {name:
make}`` with ``make(inputs) -> Provider``, ``errors(inputs) -> (result -> {name: error})``.
A case with ``rows(say)`` times itself.
"""

import contextlib
import ctypes
import gc
import os
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from bench.harness import memory_mib, times_ms

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BACKENDS = {"cpu": "cpp", "cuda": "triton"}
ROUNDS = {"cpu": 7, "cuda": 30}
PEAKS = {"cpu": 3, "cuda": 1}  # the kernel counts resident pages to a few MiB
LARGEST_ERROR = 0.5  # nats, or a share of a gradient's norm: past rounding, it is another function
_FLUSH = 2 << 30  # bytes: past any L2 cache, and half a millisecond for the host to get ahead


def nothing():
    pass


@dataclass(frozen=True)
class Provider:
    """``call`` is timed, ``before`` each call is not; ``cost`` is the least work, in ceilings."""

    call: Callable[[], object]
    before: Callable[[], None] = nothing
    cost: float | None = None  # the case's


def insist(backend):
    """Calls that follow run on this backend or fail."""

    def before():
        os.environ["FASTPREF_BACKEND"] = backend

    return before


def measure(case, say):
    """Rows of a case, its ceiling's first, then of each provider that runs.

    ``say(reason, name)`` hears of those that do not.
    """
    if hasattr(case, "rows"):
        return case.rows(say)
    rows = []
    with mock.patch.dict(os.environ), reason_said(case, "fastpref and its peers", say):
        inputs, errors = load(case)
        ready = {case.ceiling: (Provider(case.top(inputs), cost=1.0), {})}
        for name, make in case.providers().items():
            with reason_said(case, name, say):
                ready[name] = check(name, make, inputs, errors, case.device)
        del errors  # and the truth with them
        seconds = time_in_turn(case, ready, say)
        top = times_ms(seconds[case.ceiling])["ms_p50"]
        rows = [row(case, name, *ready[name], taken, top) for name, taken in seconds.items()]
    return rows


def load(case):
    """Inputs, and how wrong a result is on them."""
    torch.compiler.reset()  # another case's shapes would make this one's dynamic
    inputs = case.load()
    return inputs, case.errors(inputs)


def is_ours(name):
    return name.startswith("fastpref")


@contextlib.contextmanager
def reason_said(case, name, say):
    """A peer may fail in any way of its own: the others go on, and its reason is said."""
    try:
        yield
    except Exception as error:
        if is_ours(name):
            traceback.print_exc()
        first = (str(error).strip() or repr(error)).splitlines()[0]
        say(f"skipped: {case.op}, {case}: {name}: {type(error).__name__}: {first[:300]}", name)


def check(name, make, inputs, errors, device):
    """The provider of a name, right and warm, and what its row says beside times."""
    provider = make(inputs)
    provider.before()
    with poisoned() if is_ours(name) else contextlib.nullcontext():
        found = errors(provider.call())
    for what, error in found.items():
        if not error < LARGEST_ERROR:
            raise ArithmeticError(f"computes something else: {what} is {error:.3g}")
    return provider, {"peak_mib": peak_mib(provider, device), **found}


@contextlib.contextmanager
def poisoned():
    """Memory that nobody wrote reads as NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def peak_mib(provider, device):
    """The most memory that a call takes above what is there before it, its results included."""
    peak_of = device_peak if device == "cuda" else host_peak
    peaks = []
    for _ in range(PEAKS[device]):
        provider.before()
        gc.collect()
        peaks.append(peak_of(provider.call))
    return statistics.median(peaks)


def host_peak(call):
    ctypes.CDLL(None).malloc_trim(0)  # what malloc keeps for later would be taken again unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak is the present again
    base, _ = memory_mib()
    call()
    return memory_mib()[1] - base


def device_peak(call):
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - base) / 2**20


def time_in_turn(case, ready, say):
    """Seconds of every round by provider; one that fails on the way is left out."""
    on_device = case.device == "cuda" and not getattr(case, "wall", False)
    clock = device_clock() if on_device else host_clock
    taken = {name: [] for name in ready}
    for turn in range(-1, ROUNDS[case.device]):  # the first warms up
        for name in list(taken):
            times = taken.pop(name)
            with reason_said(case, name, say):
                time_of = clock(ready[name][0])
                taken[name] = times + [time_of] * (turn >= 0)
    return {name: [seconds() for seconds in times] for name, times in taken.items()}


def host_clock(provider):
    provider.before()
    began = time.perf_counter()
    provider.call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return lambda: seconds


def device_clock():
    """Events around a call, read once all is done; a flush of the L2 cache hides the host."""
    cache = torch.empty(_FLUSH, dtype=torch.int8, device="cuda")

    def clock(provider):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        provider.before()
        cache.zero_()
        began.record()
        provider.call()
        ended.record()

        def seconds():
            ended.synchronize()
            return began.elapsed_time(ended) / 1e3

        return seconds

    return clock


def row(case, name, provider, found, seconds, top):
    cost = case.cost if provider.cost is None else provider.cost
    times = times_ms(seconds)
    return {
        "op": case.op,
        "provider": name,
        "case": str(case),
        **times,
        case.unit: 1e3 * cost * case.work / times["ms_p50"],
        "floor_ms": cost * top,
        "floor_multiple": times["ms_p50"] / (cost * top),
        **found,
    }
