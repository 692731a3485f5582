"""A packed, prefix-shared batch equals the padded, unshared batch of plain transformers."""

import copy
import itertools

import pytest
import torch
import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastpref.data.packing import pack
from fastpref.models.attention_backends import Choice
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


def assert_equals_padded(plain, batch):
    """Log-probs, a loss of them and every gradient."""
    ours = LogpModel(copy.deepcopy(plain))
    want = padded_logps(plain, batch)
    got = ours(pack(batch, share=ours.shares_prompts)).logp
    assert_rounding(got, want)
    loss = loss_of(want)
    assert_rounding(loss_of(got), loss)
    loss.backward()
    loss_of(got).backward()
    truth = {name: g for name, g in gradients(plain).items() if g is not None}
    found = {name: g for name, g in gradients(ours.model).items() if g is not None}
    assert truth.keys() == found.keys()
    largest = max(float(g.abs().max()) for g in truth.values())
    for name, gradient in found.items():
        if truth[name].abs().max() < 1e-5 * largest:  # a key's bias: its true gradient is 0
            assert gradient.abs().max() < 1e-5 * largest, name
        else:
            assert_rounding(gradient, truth[name], ulps=256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("architecture", "counts"), CASES, ids=str)
def test_logps_loss_and_gradients(tiny, groups, architecture, counts, tie, dtype):
    if architecture == "gemma2" and dtype == torch.float64:
        pytest.skip("transformers' own padded rows are NaN")
    batch = groups(*counts, partial=counts == (1, 2, 4))
    window = {} if counts != (1, 2, 4) else {"sliding_window": 4}
    plain = tiny(architecture, tie=tie, **window).to(dtype)
    if architecture == "gemma2":  # transformers 5.17 lets SDPA drop the cap
        plain.set_attn_implementation("eager")
    assert_equals_padded(plain, batch)


EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("mixtral", EXPERTS | {"num_local_experts": 4}),
        ("qwen3_moe", EXPERTS | {"num_experts": 4}),
        ("bamba", MAMBA | {"attn_layer_indices": [1], "mamba_chunk_size": 4}),
        ("jamba", EXPERTS | {"num_experts": 4, "attn_layer_offset": 1, "attn_layer_period": 2}),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}),
        ("mamba", {}),
        ("recurrent_gemma", {"layers": 3}),
    ],
)
def test_experts_and_recurrent_layers(tiny, groups, architecture, options):
    assert_equals_padded(tiny(architecture, **options), groups(1, 3, 2, partial=True))


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
            model.checkpoint_layers()
        calls = []
        mlp = model.model.model.layers[0].mlp
        mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        model.train()
        loss_of(model(batch).logp).backward()
        assert len(calls) == 1 + checkpointing  # run again in the backward
        seen.append(gradients(model.model))
    for name, gradient in seen[0].items():
        assert torch.equal(gradient, seen[1][name]), name


@torch.library.custom_op("fastpref_tests::varlen", mutates_args=())
def varlen_op(
    q: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    scale: float,
) -> torch.Tensor:
    """No attention, but as opaque as a kernel's, with every token in every result."""
    assert (max_q, max_k) == varlen.longest(cu_q, cu_k)
    return scale * q + v.mean()


varlen_op.register_fake(lambda q, *others: torch.empty_like(q))


def keep(ctx, inputs, output):
    ctx.shape, ctx.scale = inputs[1].shape, inputs[-1]


def backward(ctx, grad):
    into_v = (grad.sum() / ctx.shape.numel()).expand(ctx.shape)
    return ctx.scale * grad, into_v, None, None, None, None, None


varlen_op.register_autograd(backward, setup_context=keep)


def opaque_attention(query, key, value, segments, *, scaling, window, softcap):
    """A kernel as torch.compile sees one: lengths go in as integers."""
    lengths = segments.cu_q, segments.cu_k, segments.max_q, segments.max_k
    return varlen_op(query, value + key, *lengths, scaling)


@pytest.mark.parametrize(
    ("kernel", "checkpointing"), [("sdpa", False), ("varlen", False), ("varlen", True)]
)
def test_compiled_layers(tiny, groups, monkeypatch, kernel, checkpointing):
    """Equal results, and after two batches no compilation whatever the lengths."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    plain_compile = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda m, **k: plain_compile(m, backend=backend, **k)
    )
    model = LogpModel(tiny(layers=3))
    if kernel == "varlen":
        choice = Choice("varlen", opaque_attention, "")
        monkeypatch.setattr("fastpref.models.model.choose", lambda *_: choice)
    if checkpointing:
        model.checkpoint_layers()
    model.train()
    counts = [(2, 3), (1, 4, 2), (3,), (2, 2, 2, 2), (5, 1), (1, 3)]
    batches = [pack(groups(*c, longest=7 + len(c))) for c in counts]
    want = [model.hidden(batch) for batch in batches]
    torch.compiler.reset()
    model.compile_layers()
    seen = []
    for batch, hidden in zip(batches, want, strict=True):
        got = model.hidden(batch)
        torch.testing.assert_close(got, hidden)
        got.square().sum().backward()
        seen.append(len(graphs))
    assert 0 < seen[1] == seen[-1], seen
    torch.compiler.reset()
