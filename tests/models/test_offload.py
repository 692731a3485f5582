"""What waits on the host, and that nothing comes of it but less memory on the device."""

import pytest
import torch

from fastpref.data.packing import pack
from fastpref.models import offload
from fastpref.models.model import LogpModel


@pytest.fixture
def copies(monkeypatch):
    """Shapes of what was copied to the host; on a CPU only that can be seen."""
    shapes = []

    def spy(saved, **options):
        if "pin_memory" in options:
            shapes.append(tuple(saved.shape))
        return empty_like(saved, **options)

    empty_like = torch.empty_like
    monkeypatch.setattr(offload.torch, "empty_like", spy)
    monkeypatch.setattr(offload, "LEAST", 1000)
    return shapes


def gradients(model, batch):
    model.zero_grad()
    logp = model(batch).logp
    logp.square().sum().backward()
    return [p.grad if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_gradients_are_the_same(tiny, groups, copies, checkpointing, frozen, architecture):
    model = LogpModel(tiny(architecture, layers=3)).train()
    if frozen:
        model.model.model.embed_tokens.requires_grad_(False)
        model.model.model.layers[0].requires_grad_(False)
    if checkpointing:
        model.checkpoint_layers()
    batch = pack(groups(2, 3, 2))
    want = gradients(model, batch)
    assert not copies
    model.offload_activations = True
    got = gradients(model, batch)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(got, want, strict=True))
    tokens = len(batch.input_ids)
    weights = {tuple(p.shape) for p in model.parameters() if p.ndim == 2}
    assert copies and not any(s in weights or s[::-1] in weights for s in copies)
    assert (set(copies) == {(1, tokens, 32)}) == checkpointing


def test_under_checkpointing_a_layer_more_is_its_input_more(tiny, groups, copies):
    counts = []
    for layers in (2, 3):
        model = LogpModel(tiny(layers=layers)).train()
        model.checkpoint_layers()
        model.offload_activations = True
        gradients(model, pack(groups(2, 3, 2)))
        counts.append(len(copies))
        copies.clear()
    assert counts[1] == counts[0] + 1


def test_what_is_small_stays(tiny, groups, copies, monkeypatch):
    model, batch = LogpModel(tiny()), pack(groups(2))
    model.offload_activations = True
    tokens = len(batch.input_ids)
    monkeypatch.setattr(offload, "LEAST", tokens * 32 * 4 + 1)  # above a hidden state in fp32
    gradients(model, batch)
    assert copies and (1, tokens, 32) not in copies


def test_nothing_is_copied_without_gradients(tiny, groups, copies):
    model = LogpModel(tiny())
    model.offload_activations = True
    with torch.no_grad():
        model(pack(groups(2)))
    assert not copies


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
def test_peak_memory_falls(tiny, groups, checkpointing):
    model = LogpModel(tiny(hidden=256, layers=12)).cuda().train()
    if checkpointing:
        model.checkpoint_layers()
    batch = pack(groups(*[4] * 8, prompt=400, longest=400)).to("cuda")
    peaks, found = [], []
    for on in (False, False, True):
        model.offload_activations = on
        torch.cuda.reset_peak_memory_stats()
        found.append(gradients(model, batch))
        peaks.append(torch.cuda.max_memory_allocated())
    saved = 11 * len(batch.input_ids) * 256 * 4  # but for the layer that is at work
    assert peaks[2] < peaks[1] - saved // 2
    for a, b in zip(found[1], found[2], strict=True):
        torch.testing.assert_close(a, b)
