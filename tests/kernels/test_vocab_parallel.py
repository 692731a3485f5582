"""A weight cut over two processes: values, gradients and errors are those of the whole weight.

Run as a script it is one of the processes: RANK FOLDER BACKEND.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastpref import linear_logp_stats

M, H, V, CUT = 11, 16, 203, 75  # unequal shards
CASES = {
    "trained": {},
    "recomputed": {"workspace": 120_000},
    "bent": {"softcap": 3.0, "temperature": 0.7, "logit_scale": 1.5},
    "bias": {"bias": True},
    "frozen": {"frozen": True},
    "frozen, bent": {"frozen": True, "softcap": 3.0},
    "rows": {"rows": True},
    "weight alone": {"detached": True},
    "bf16": {"dtype": torch.bfloat16},
    "skip_below": {"skip_below": 2**-6},
}


def outcome(shard, group, *, frozen=False, detached=False, rows=False, bias=False, **options):
    """Every output and gradient; of weight and bias those of the columns in ``shard``."""
    dtype = options.pop("dtype", torch.float32)
    gen = torch.Generator().manual_seed(0)
    hidden = torch.randn(M, H, generator=gen).to(dtype).requires_grad_(not detached)
    weight = torch.randn(V, H, generator=gen).to(dtype)[shard].clone().requires_grad_(not frozen)
    b = torch.randn(V, generator=gen).to(dtype)[shard].clone()
    target = torch.randint(V, (M,), generator=gen)
    target[:4] = torch.tensor([-100, CUT - 1, CUT, V - 1])
    index = torch.randint(M, (M,), generator=gen)
    g, h = torch.randn(2, M, generator=gen)
    if bias:
        options["bias"] = b.requires_grad_(not frozen)
    if rows:
        options["rows"] = index
    lost = torch.zeros(2)
    stats = linear_logp_stats(hidden, weight, target, group=group, skip_stats=lost, **options)
    ((stats.logp * g).sum() + (stats.entropy * h).sum()).backward()
    out = {k: v.detach() for k, v in stats._asdict().items()} | {"skip_stats": lost}
    leaves = {"hidden": hidden, "weight": weight, "bias": b}
    return out | {f"d{k}": x.grad for k, x in leaves.items() if x.grad is not None}


def refused(weight, group):
    with pytest.raises(ValueError, match=rf"need targets in \[0, {V}\) or -100, got {V}"):
        linear_logp_stats(torch.zeros(1, H), weight, torch.tensor([V]), group=group)


def main(rank, folder):
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    group = torch.distributed.group.WORLD
    shard = (slice(0, CUT), slice(CUT, V))[rank]
    found = {name: outcome(shard, group, **case) for name, case in CASES.items()}
    refused(torch.zeros(V, H)[shard], group)
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.dist
def test_two_ranks_equal_one(tmp_path, backend):
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__]
    ranks = [subprocess.Popen([*command, str(rank), tmp_path], env=env) for rank in range(2)]
    try:
        assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, case in CASES.items():
        want = outcome(slice(0, V), None, **case)
        for key, value in want.items():
            got = first[name][key]
            if key in ("dweight", "dbias"):
                got = torch.cat([got, second[name][key]])
            else:
                assert torch.equal(got, second[name][key]), (name, key)
            eps = torch.finfo(value.dtype if value.is_floating_point() else torch.float32).eps
            close = {"rtol": 4 * eps, "atol": 20 * eps}
            torch.testing.assert_close(
                got, value, **close, msg=lambda m, at=(name, key): f"{at}: {m}"
            )


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
