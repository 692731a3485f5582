"""Packed attention against a dense mask written out from the definition."""

import copy
import types

import pytest
import torch
import varlen
from torch import nn

from fastpref.data.packing import pack
from fastpref.data.tokenize import Group
from fastpref.models import attention_backends
from fastpref.models.attention import ModelError, attention
from fastpref.models.attention_backends import (
    KERNELS,
    Choice,
    Needs,
    choose,
    sdpa_per_segment,
)
from fastpref.models.model import LogpModel

RELEASES = {
    "sdpa": sdpa_per_segment,
    "flash 2": attention_backends._flash(varlen.flash_2),
    "flash 3": attention_backends._flash(varlen.flash_3),
    "flash 4": attention_backends._flash(varlen.flash_4),
    "torch 2.11": attention_backends._torch_varlen(varlen.torch_2_11),
    "torch 2.12": attention_backends._torch_varlen(varlen.torch_2_12),
}
WITHOUT_CAP = ("torch 2.11", "torch 2.12")


def dense(q, k, v, segments, scaling, window, softcap):
    """(H, T, D) fp64, query by query: its keys are its own sequence up to itself."""
    k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
    out = torch.zeros(*q.shape[:2], v.shape[-1], dtype=q.dtype)
    for q0, q1, k0, k1 in segments.bounds:
        for i in range(q0, q1):
            keys = segments.k_index[k0 : k1 - (q1 - 1 - i)]
            keys = keys if window is None else keys[-window:]
            scores = torch.einsum("hd,hkd->hk", q[:, i], k[:, keys]) * scaling
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            out[:, i] = torch.einsum("hk,hkd->hd", scores.softmax(-1), v[:, keys])
    return out


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 1, 4, 5000])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("release", RELEASES)
def test_equals_the_definition(groups, release, key_heads, window, softcap):
    if softcap is not None and release in WITHOUT_CAP:
        pytest.skip("no cap")
    segments = pack(groups(1, 2, 4, 3)).segments
    T, gen = int(segments.cu_q[-1]), torch.Generator().manual_seed(0)
    shapes = [(4, T, 8), (key_heads, T, 8), (key_heads, T, 8)]
    ours = [torch.randn(s, generator=gen, dtype=torch.float64, requires_grad=True) for s in shapes]
    want = [x.detach().clone().requires_grad_() for x in ours]
    got, _ = attention(
        nn.Module(),
        *(x[None] for x in ours),
        None,
        scaling=0.3,
        sliding_window=window,
        softcap=softcap,
        segments=segments,
        backend=RELEASES[release],
    )
    truth = dense(*want, segments, 0.3, window, softcap)
    torch.testing.assert_close(got[0].transpose(0, 1), truth)
    grad = torch.randn(truth.shape, generator=gen, dtype=torch.float64)
    truth.backward(grad)
    got[0].transpose(0, 1).backward(grad)
    for a, b in zip(ours, want, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_default_scale_is_that_of_the_head_size(groups):
    segments = pack(groups(2, 3)).segments
    T = int(segments.cu_q[-1])
    q, k, v = torch.randn(3, 2, T, 8, dtype=torch.float64)
    for cap in (None, 2.0):
        got, _ = attention(
            nn.Module(), q[None], k[None], v[None], None, softcap=cap, segments=segments
        )
        want = dense(q, k, v, segments, 8**-0.5, None, cap)
        torch.testing.assert_close(got[0].transpose(0, 1), want)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"s_aux": torch.ones(2)}, "got s_aux from Module of layer 5"),
        ({"head_mask": torch.ones(2), "position_bias": 1.0}, "got head_mask, position_bias from"),
        ({"is_causal": False}, "causal attention, got is_causal=False"),
        ({"attention_mask": torch.ones(1, 1, 3, 3)}, r"mask of shape \(1, 1, 3, 3\)"),
        ({"segments": None}, r"LogpModel.*plain\(\)"),
        ({"query": torch.ones(2, 2, 3, 4)}, "one packed row of tokens, got a batch of 2"),
    ],
)
def test_refuses_what_it_does_not_understand(groups, arguments, message):
    module = nn.Module()
    module.layer_idx = 5
    T = int((segments := pack(groups(1)).segments).cu_q[-1])
    x = torch.ones(1, 2, T, 4)
    known = {"query": x, "key": x, "value": x, "attention_mask": None, "segments": segments}
    harmless = {"position_ids": torch.ones(T), "use_cache": False, "output_attentions": False}
    attention(module, **known, **harmless, dropout=0.5, is_causal=None, sinks=None)
    with pytest.raises(ModelError, match=message):
        attention(module, **(known | arguments))


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, None), (None, 0.7), (3, 0.7)])
def test_pieces_of_long_segments(groups, monkeypatch, window, softcap):
    """What needs a mask goes in runs of queries; here of two."""
    monkeypatch.setattr(attention_backends, "_MASKED", 2)
    segments = pack(groups(2, 3, longest=7)).segments
    q, k, v = torch.randn(3, 2, int(segments.cu_q[-1]), 8, dtype=torch.float64)
    got, _ = attention(
        nn.Module(),
        *(x[None] for x in (q, k, v)),
        None,
        sliding_window=window,
        softcap=softcap,
        segments=segments,
    )
    truth = dense(q, k, v, segments, 8**-0.5, window, softcap)
    torch.testing.assert_close(got[0].transpose(0, 1), truth)


MODELS = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 4},
    "gemma": {},
    "gemma2": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4},
}


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("architecture", MODELS)
def test_models_are_the_same_with_every_kernel(tiny, groups, monkeypatch, architecture, release):
    """Hidden states and the gradients of all weights, against SDPA."""
    if architecture == "gemma2" and release in WITHOUT_CAP:
        pytest.skip("no cap")
    batch = pack(groups(2, 3, 1))
    plain = tiny(architecture, layers=2, **MODELS[architecture]).double()
    found = {}
    for name in ("sdpa", release):
        choice = Choice(name, RELEASES[name], "")
        monkeypatch.setattr("fastpref.models.model.choose", lambda *_, choice=choice: choice)
        model = LogpModel(copy.deepcopy(plain))
        hidden = model.hidden(batch)
        hidden.square().mean().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found[name] = hidden, grads
    (want, want_grads), (got, got_grads) = found["sdpa"], found[release]
    torch.testing.assert_close(got, want)
    assert got_grads.keys() == want_grads.keys() and len(got_grads) > 5
    for name, gradient in want_grads.items():
        torch.testing.assert_close(got_grads[name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2"])
def test_kernels_get_one_dtype_under_autocast(tiny, groups, monkeypatch, architecture):
    """Over fp32 weights rotations and norms of heads leave fp32 queries beside bf16 values."""
    seen = []

    def backend(query, key, value, segments, **options):
        seen.append({query.dtype, key.dtype, value.dtype})
        return sdpa_per_segment(query, key, value, segments, **options)

    choice = Choice("varlen", backend, "")
    monkeypatch.setattr("fastpref.models.model.choose", lambda *_: choice)
    model = LogpModel(tiny(architecture))
    with torch.autocast("cpu", torch.bfloat16):
        model.hidden(pack(groups(2, 3)))
    assert seen == [{torch.bfloat16}] * 2
    model.hidden(pack(groups(2, 3)))
    assert seen[2:] == [{torch.float32}] * 2


def test_the_choice_is_for_the_dtype_that_runs(tiny, monkeypatch):
    """Autocast's, not the weights': torch's kernel would be passed over on CUDA by default."""
    asked = []
    choice = Choice("varlen", sdpa_per_segment, "")
    monkeypatch.setattr("fastpref.models.model.choose", lambda n, _: asked.append(n) or choice)
    model, cpu = LogpModel(tiny("llama")), torch.device("cpu")
    for _ in range(2):  # once for each
        with torch.autocast("cpu", torch.bfloat16):
            model.attention(cpu)
        model.attention(cpu)
    assert [n.dtype for n in asked] == [torch.bfloat16, torch.float32]


def test_a_window_that_sees_all_is_none():
    segments = pack([Group([1, 2, 3], ([4], [5]), (None, None), 0, {})]).segments
    sizes = [attention_backends._window_sizes(w, segments) for w in (None, 3, 4, 5)]
    assert sizes == [(-1, 0), (2, 0), (-1, 0), (-1, 0)]


def needs(**changed):
    plain = Needs("Tiny", torch.device("cuda"), torch.bfloat16, 64, 64, None, None)
    return plain._replace(**changed)


@pytest.fixture
def installed(monkeypatch):
    """A GPU of some capability, with the packages that are named."""

    def install(capability, *packages):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        known = {
            "flash_attn": ("flash_attn_varlen_func", varlen.flash_2),
            "flash_attn_interface": ("flash_attn_varlen_func", varlen.flash_3),
            "flash_attn.cute": ("flash_attn_varlen_func", varlen.flash_4),
            "torch.nn.attention.varlen": ("varlen_attn", varlen.torch_2_12),
        }

        def import_module(name):
            if name not in packages:
                raise ModuleNotFoundError(f"No module named {name!r}")
            return types.SimpleNamespace(**dict([known[name]]))

        stand_in = types.SimpleNamespace(import_module=import_module)
        monkeypatch.setattr(attention_backends, "importlib", stand_in)

    return install


TORCH = "torch.nn.attention.varlen"
ALL = ("flash_attn", "flash_attn_interface", "flash_attn.cute", TORCH)


@pytest.mark.parametrize(
    ("capability", "packages", "changed", "name"),
    [
        ((9, 0), ALL, {}, "flash_attention_3"),
        ((10, 0), ALL, {}, "flash_attention_4"),
        ((8, 0), ALL, {}, "flash_attention_2"),
        ((9, 0), ("flash_attn", TORCH), {}, "flash_attention_2"),
        ((9, 0), (TORCH,), {}, "varlen"),
        ((9, 0), (TORCH,), {"window": 9}, "varlen"),
        ((9, 0), (TORCH,), {"softcap": 50.0}, "sdpa"),
        ((9, 0), ("flash_attn", TORCH), {"softcap": 50.0}, "flash_attention_2"),
        ((9, 0), ("flash_attn", TORCH), {"head_size": 192, "value_size": 128}, "sdpa"),
        ((9, 0), ALL, {"head_size": 192, "value_size": 128}, "flash_attention_3"),
        ((9, 0), ALL, {"head_size": 36}, "sdpa"),
        ((9, 0), ALL, {"head_size": 512, "value_size": 512}, "sdpa"),
        ((7, 5), ALL, {}, "sdpa"),
        ((9, 0), ALL, {"dtype": torch.float32}, "sdpa"),
        ((9, 0), ALL, {"dtype": torch.float16}, "flash_attention_3"),
        ((9, 0), ALL, {"device": torch.device("cpu")}, "sdpa"),
    ],
)
def test_the_fastest_that_can_is_chosen(installed, capability, packages, changed, name):
    installed(capability, *packages)
    assert choose(needs(**changed)).name == name


def test_the_choice_says_why(installed):
    installed((9, 0), TORCH)
    line = str(choose(needs()))
    assert line.startswith("varlen (flash_attention_3: cannot be imported: No module")
    line = str(choose(needs(dtype=torch.float32)))
    assert line == (
        "sdpa (segment by segment; flash_attention_3, flash_attention_4, flash_attention_2, varlen:"
        " needs bfloat16 or float16, not float32)"
    )


@pytest.mark.parametrize("name", KERNELS)
def test_what_was_asked_for_runs_or_is_refused(installed, name):
    installed((9, 0), *ALL)
    assert choose(needs(), name).name == name
    with pytest.raises(ValueError, match=f"can run Tiny, got {name}, which needs bfloat16"):
        choose(needs(dtype=torch.float32), name)
    assert choose(needs(), "sdpa").backend is sdpa_per_segment
    with pytest.raises(ValueError, match=r"need attn_implementation of .*, got 'eager'"):
        choose(needs(), "eager")


def test_the_model_is_named_that_a_kernel_cannot_run(tiny, groups, installed):
    installed((9, 0), TORCH)
    model = LogpModel(tiny("gemma2").bfloat16(), attn_implementation="varlen")
    with pytest.raises(ModelError, match="Gemma2ForCausalLM, got varlen, which needs CUDA"):
        model(pack(groups(2)))
    with pytest.raises(ModelError, match="Gemma2ForCausalLM, got varlen, which has no softcap"):
        model.attention(torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral", "gemma"])
def test_varlen_on_a_gpu(tiny, groups, architecture):
    """bf16, GQA and windows: torch's kernel against SDPA in fp64."""
    plain = tiny(architecture, hidden=128, head_dim=32, **MODELS[architecture]).cuda()
    batch = pack(groups(2, 3, 4, 1, longest=90, prompt=60)).to("cuda")
    truth, *found = (
        LogpModel(copy.deepcopy(plain).to(dtype), attn_implementation=name)
        for name, dtype in (
            ("sdpa", torch.float64),
            ("sdpa", torch.bfloat16),
            ("varlen", torch.bfloat16),
        )
    )
    want = truth.hidden(batch)
    want.square().mean().backward()
    errors = []
    for model in found:
        hidden = model.hidden(batch)
        hidden.square().mean().backward()
        pairs = [(hidden, want)]
        pairs += zip(
            (p.grad for p in model.model.get_decoder().parameters()),
            (p.grad for p in truth.model.get_decoder().parameters()),
            strict=True,
        )
        errors.append(max(float((a.double() - b).norm() / b.norm()) for a, b in pairs))
    assert errors[1] <= 2 * errors[0] + 1e-3
