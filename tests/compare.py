"""The one tolerance rule: no worse than twice plain torch in the same dtype, plus one ulp.

And what else tests of kernels ask of results.
"""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def assert_no_worse(ours: dict[str, Tensor], torchs: dict[str, Tensor], truth: dict[str, Tensor]):
    """Largest error against the fp64 truth; the ulp is that of the output's dtype and size."""
    assert ours.keys() == torchs.keys() == truth.keys()
    for name, want in truth.items():
        assert ours[name].shape == want.shape, name
        if not want.numel():
            continue
        err, base = ((t[name].double() - want).abs().max() for t in (ours, torchs))
        ulp = torch.finfo(ours[name].dtype).eps * want.abs().max()
        assert err <= 2 * base + ulp, f"{name}: {err:.1e}, torch {base:.1e}, ulp {ulp:.1e}"


def assert_same(ours: dict[str, Tensor], other: dict[str, Tensor]):
    """Bit for bit, NaN equal to NaN."""
    assert ours.keys() == other.keys()
    for name, want in other.items():
        torch.testing.assert_close(ours[name], want, rtol=0, atol=0, equal_nan=True, msg=name)


def ulps(ours: Tensor, truth: Tensor) -> float:
    """Largest distance in units in the last place of ``ours``' dtype at the truth's own size."""
    eps = torch.finfo(ours.dtype).eps
    exponent = torch.floor(torch.log2(truth.abs().clamp(min=torch.finfo(ours.dtype).tiny)))
    return float(((ours.double() - truth).abs() / (eps * torch.exp2(exponent))).max())


def least_workspace(fn, *args, **options) -> int:
    """The fewest bytes with which ``fn`` works, as it says itself."""
    with pytest.raises(ValueError, match=r"need a workspace of \d+ bytes, got 1") as error:
        fn(*args, workspace=1, **options)
    return int(str(error.value).split(" bytes")[0].split()[-1])


def memory_of(
    step: Callable[[], object], left: int, before: Callable[[], None] = lambda: None
) -> tuple[int, int]:
    """Peak and largest single allocation in bytes of a step that leaves ``left`` bytes."""
    before()
    step()
    for _ in range(20):
        before()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
            kept = step()
        events = prof.profiler.kineto_results.events()
        sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
        del kept
        if sizes and sum(sizes) == left:  # now and then the profiler loses some or all events
            return max(itertools.accumulate(sizes)), max(sizes)
    raise AssertionError(f"no profile balances: {sum(sizes)} bytes are left, not {left}")
