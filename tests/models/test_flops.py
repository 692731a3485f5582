"""Counted operations against torch's own count of the products that really run."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastpref.data.packing import pack
from fastpref.data.tokenize import Group
from fastpref.models.flops import Flops, _visible, flops_of, peak_flops
from fastpref.models.model import LogpModel, head_of, trunk_of

GROUP = Group([1, 2, 3], ([4, 5], [6]), (None, None), 0, {})


def counted(model):
    return flops_of(trunk_of(model.model), head_of(model.model), model.model.config)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "mixtral", "qwen3_moe"])
def test_weights_of_the_trunk(tiny, architecture, frozen):
    """Experts in pairs, so that what torch's grouped products pad does not count."""
    experts = {"num_experts_per_tok": 2} if architecture in ("mixtral", "qwen3_moe") else {}
    experts |= {"experts_implementation": "eager"} if experts else {}
    model = LogpModel(tiny(architecture, **experts))
    if frozen:
        model.requires_grad_(False)
        for p in model.model.get_input_embeddings().parameters():
            p.requires_grad_(True)  # so that every product has a gradient for its input
    batch = pack([GROUP])
    counter = FlopCounterMode(display=False)
    with counter:
        model.hidden(batch).sum().backward()
    products = {"mm", "addmm"}  # a cap's attention is of bmm
    want = sum(
        count
        for op, count in counter.get_flop_counts()["Global"].items()
        if str(op).split(".")[-1] in products
    )
    flops = counted(model)
    without = Flops(
        *(flops.token, 0.0, 0.0, 0.0, None), trained_token=flops.trained_token, trained_target=0.0
    )
    assert without.step(GROUP) == pytest.approx(want, rel=0.02)
    assert (flops.trained_token == 0) == frozen


def test_by_hand(tiny):
    """One layer of 2 heads of 16."""
    model = LogpModel(tiny("llama", layers=1, heads=2, kv_heads=1))
    flops = counted(model)
    attention = 2 * 32 * 32 + 2 * 32 * 16
    mlp = 3 * 32 * model.model.config.intermediate_size
    assert flops.token == flops.trained_token == 2 * (attention + mlp)
    assert flops.target == flops.trained_target == 2 * 32 * 300
    assert flops.pair == 4 * 2 * 16 and flops.near_pair == 0
    # [1 2 3 | 4 5] is 15 pairs, [6] sees 4
    assert flops.forward(GROUP) == 6 * flops.token + 3 * flops.target + 19 * flops.pair
    assert flops.step(GROUP) == 3 * flops.forward(GROUP)
    alone = 9 * flops.token + 3 * flops.target + (15 + 10) * flops.pair
    assert flops.forward(GROUP, share=False) == alone
    assert flops.step(GROUP, share=False) == 3 * alone


def test_windows():
    for start, stop, window in [(0, 9, 4), (2, 9, 4), (5, 9, 4), (0, 3, 4), (0, 4, 1)]:
        seen = sum(min(i + 1, window) for i in range(start, stop))
        assert _visible(start, stop, window) == seen


def test_windowed_layers(tiny):
    """Of Gemma2's two layers one has a window."""
    flops = counted(LogpModel(tiny("gemma2", layers=2, sliding_window=2)))
    assert flops.near_pair == flops.pair > 0 and flops.window == 2
    scored = 6 * flops.token + 3 * flops.target
    # in a window of 2 all but the first see two
    assert flops.forward(GROUP) == scored + 19 * flops.pair + 11 * flops.near_pair


def test_peaks():
    assert peak_flops("NVIDIA H100 80GB HBM3") == peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("cpu") is None
    assert torch.finfo(torch.float64).max > peak_flops("NVIDIA B200") > 2e15
