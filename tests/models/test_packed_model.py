"""A packed, prefix-shared batch equals the padded, unshared batch of plain transformers."""

import copy
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastpref.data.packing import pack
from fastpref.models.model import LogpModel


def padded_logps(model, groups):
    """Scored log-probs of each completion from logits of one padded batch, a prompt per row."""
    sequences = [(g, c, f) for g in groups for c, f in zip(g.completions, g.scored, strict=True)]
    longest = max(len(g.prompt) + len(c) for g, c, _ in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for b, (g, c, _) in enumerate(sequences):
        ids[b, : len(g.prompt) + len(c)] = torch.tensor(g.prompt + c)
        mask[b, : len(g.prompt) + len(c)] = 1
    logp = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.log_softmax(-1)
    out = []
    for b, (g, c, flags) in enumerate(sequences):
        at = [i for i in range(len(c)) if flags is None or flags[i]]
        rows = torch.tensor([len(g.prompt) - 1 + i for i in at], dtype=torch.long)
        out.append(logp[b, rows, torch.tensor([c[i] for i in at], dtype=torch.long)])
    return torch.cat(out)


def loss_of(logp):
    """Any smooth coupling with a gradient of its own for each token."""
    weights = torch.linspace(-1, 2, len(logp), dtype=logp.dtype)
    return (weights * logp).sum() + logp.square().mean()


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def assert_rounding(got, want, ulps=64):
    eps = torch.finfo(torch.float32).eps  # transformers' norms and rotations stay in fp32
    gap, size = (got - want).abs().max(), want.abs().max()
    assert gap <= ulps * eps * size, f"{gap:.1e} of {size:.1e}"


CASES = [
    *itertools.product(["llama", "qwen2", "qwen3"], [(1, 1), (2, 2), (4,), (1, 2, 4)]),
    *itertools.product(["mistral", "gemma", "gemma2", "gemma3_text"], [(1, 2, 4)]),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("architecture", "counts"), CASES, ids=str)
def test_logps_loss_and_gradients(tiny, groups, architecture, counts, tie, dtype):
    if architecture == "gemma2" and dtype == torch.float64:
        pytest.skip("transformers' own padded rows are NaN")
    batch = groups(*counts, partial=counts == (1, 2, 4))
    window = {} if counts != (1, 2, 4) else {"sliding_window": 4}
    plain = tiny(architecture, tie=tie, **window).to(dtype)
    ours = LogpModel(copy.deepcopy(plain))
    want = padded_logps(plain, batch)
    got = ours(pack(batch)).logp
    assert_rounding(got, want)
    loss = loss_of(want)
    assert_rounding(loss_of(got), loss)
    loss.backward()
    loss_of(got).backward()
    truth = gradients(plain)
    assert truth.keys() == gradients(ours.model).keys()
    largest = max(float(g.abs().max()) for g in truth.values())
    for name, gradient in gradients(ours.model).items():
        if truth[name].abs().max() < 1e-5 * largest:  # a key's bias: its true gradient is 0
            assert gradient.abs().max() < 1e-5 * largest, name
        else:
            assert_rounding(gradient, truth[name], ulps=256)


class Sizes(TorchDispatchMode):
    """The largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return out


@pytest.mark.parametrize(
    "architecture", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "cohere2"]
)
def test_nothing_of_size_tokens_squared(tiny, groups, architecture):
    window = {} if architecture in ("llama", "qwen2", "qwen3") else {"sliding_window": 8}
    model = LogpModel(tiny(architecture, layers=2, **window))
    batch = pack(groups(*[2] * 32, prompt=30, longest=30))
    T = len(batch.input_ids)
    with torch.no_grad(), Sizes() as sizes:
        model.hidden(batch)
    assert 32 * T <= sizes.largest < T * T / 4


def test_gradient_checkpointing(tiny, groups):
    batch = pack(groups(2, 3))
    seen = []
    for checkpointing in (False, True):
        model = LogpModel(tiny())
        if checkpointing:
            model.model.gradient_checkpointing_enable()
        calls = []
        mlp = model.model.model.layers[0].mlp
        mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        model.train()
        loss_of(model(batch).logp).backward()
        assert len(calls) == 1 + checkpointing  # run again in the backward
        seen.append(gradients(model.model))
    for name, gradient in seen[0].items():
        assert torch.equal(gradient, seen[1][name]), name


def test_compiled_trunk(tiny, groups):
    model = LogpModel(tiny(layers=1))
    batches = [pack(groups(2, 3)), pack(groups(1, 4, 2)), pack(groups(3))]
    want = [model.hidden(batch) for batch in batches]
    trunk = model.model.get_decoder()
    torch.compiler.reset()
    trunk.compile(backend="eager", dynamic=True)
    for batch, hidden in zip(batches, want, strict=True):
        torch.testing.assert_close(model.hidden(batch), hidden)
    torch.compiler.reset()
