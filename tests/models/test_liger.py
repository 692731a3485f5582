"""liger-kernel on a model: what is asked of it, what it lacks, and the same log-probs after it."""

import importlib
import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch

from fastpref.data.packing import pack
from fastpref.models.attention import ModelError
from fastpref.models.liger import apply_liger
from fastpref.models.load import unchanged
from fastpref.models.model import LogpModel
from fastpref.models.tiny import tiny_model
from fastpref.train import run
from fastpref.train.run import dpo

MODULE = "liger_kernel.transformers.monkey_patch"
installed = pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed"
)


@pytest.fixture
def calls(monkeypatch):
    """Calls of a liger-kernel that knows two architectures and changes nothing."""
    seen = []

    def llama(
        rope=True,
        cross_entropy=False,
        fused_linear_cross_entropy=True,
        rms_norm=True,
        swiglu=True,
        model=None,
    ):
        seen.append({**locals()})
        seen[-1].pop("seen")

    def nemotron(fused_linear_cross_entropy=True, model=None):
        seen.append({"model": model, "fused_linear_cross_entropy": fused_linear_cross_entropy})

    known = {"llama": llama, "nemotron": nemotron}
    module = SimpleNamespace(MODEL_TYPE_TO_APPLY_LIGER_FN=known)
    monkeypatch.setitem(sys.modules, MODULE, module)
    return seen


@pytest.mark.parametrize(
    ("kernels", "off"),
    [
        (None, ()),
        ({"rope": False, "swiglu": True}, ("rope",)),
        ({"fused_linear_cross_entropy": False, "rms_norm": False}, ("rms_norm",)),
    ],
)
def test_kernels_are_asked_for_and_losses_never(tiny, calls, kernels, off):
    model = tiny()
    apply_liger(model, kernels)
    (call,) = calls
    assert call.pop("model") is model
    assert not call.pop("cross_entropy") and not call.pop("fused_linear_cross_entropy")
    assert call == {name: name not in off for name in ("rope", "rms_norm", "swiglu")}


def test_only_what_an_architecture_has_is_passed(tiny, calls):
    model = tiny()
    model.config.model_type = "nemotron"
    apply_liger(model)
    assert calls == [{"model": model, "fused_linear_cross_entropy": False}]


def test_refusals(tiny, calls, monkeypatch):
    with pytest.raises(ModelError, match=r"got Qwen2ForCausalLM \(qwen2\); known: llama, nemotron"):
        apply_liger(tiny("qwen2"))
    for kernels in ({"geglu": True}, {"fused_linear_cross_entropy": True}):
        need = rf"rope, rms_norm, swiglu for llama, got {next(iter(kernels))}"
        with pytest.raises(ModelError, match=need):
            apply_liger(tiny(), kernels)
    assert not calls
    monkeypatch.setitem(sys.modules, MODULE, None)
    with pytest.raises(ModelError, match=r"pip install 'fastpref\[liger\]'"):
        apply_liger(tiny())


def test_a_change_that_moves_log_probs_is_refused(tiny, groups):
    model, group = LogpModel(tiny()), groups(2)[0]
    with unchanged(model, group, "nothing"):
        pass
    with pytest.raises(ModelError, match="LlamaForCausalLM unchanged by a wrong norm, got a diff"):
        with unchanged(model, group, "a wrong norm"):
            model.model.model.norm.forward = lambda x: x


def test_a_run_has_them_in_policy_and_reference(tmp_path, calls, monkeypatch):
    """They are there when the reference is copied from the policy; the call itself is recorded."""
    from fastpref.data.synthetic import reviews
    from fastpref.models.tiny import tiny_tokenizer

    order, copied = [], LogpModel.frozen_copy

    def frozen_copy(policy):
        order.append(len(calls))
        return copied(policy)

    monkeypatch.setattr(LogpModel, "frozen_copy", frozen_copy)
    monkeypatch.setattr(run, "check_device", lambda *_: None)  # it would refuse a CPU
    texts = reviews(4, seed=5)
    pairs = [{"prompt": "The film", "chosen": texts[0].completion, "rejected": texts[1].completion}]
    tokenizer = tiny_tokenizer([r.completion for r in texts], vocab_size=300)
    config = {"output_dir": str(tmp_path), "max_steps": 1, "report": False, "save_strategy": "no"}
    config |= {"use_liger_kernel": True, "liger_kernel_config": {"swiglu": False}, "use_cpu": True}
    model = tiny_model(tokenizer, hidden=32, layers=1)
    dpo(config, model, pairs, tokenizer=tokenizer)
    assert order == [1] and calls[0]["model"] is model and not calls[0]["swiglu"]


def put_back(monkeypatch, architecture):
    """At the test's end, what liger-kernel sets for all models of the architecture."""
    module = importlib.import_module(f"transformers.models.{architecture}.modeling_{architecture}")
    for name, value in [*vars(module).items()]:
        if callable(value):
            monkeypatch.setattr(module, name, value)


def gradients(model, batch):
    model.zero_grad()
    logp = model(batch).logp
    logp.sum().backward()
    return logp.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_liger_changes_nothing(model, groups, kernels, device):
    batch = pack(groups).to(device)
    logp, plain = gradients(model, batch)
    apply_liger(model.model, kernels)
    assert model.model.model.layers[0].mlp.forward.__func__.__module__.startswith("liger")
    for changed in (model, model.frozen_copy().requires_grad_()):
        got, found = gradients(changed, batch)
        torch.testing.assert_close(got, logp, rtol=1e-4, atol=1e-4)
        for name, want in plain.items():
            torch.testing.assert_close(found[name], want, rtol=1e-3, atol=1e-3)


@installed
@pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton's interpreter")
def test_rope_and_mlp_in_the_interpreter(tiny, groups, monkeypatch):
    """Not the norm: its kernel takes a None that the interpreter cannot pass."""
    from triton.runtime import interpreter

    class Scalar(float):  # compiled kernels may call .to on a float argument
        def to(self, dtype):
            return self

    convert = interpreter._implicit_cvt
    monkeypatch.setattr(
        interpreter,
        "_implicit_cvt",
        lambda x: Scalar(x) if isinstance(x, float) else convert(x),
    )
    put_back(monkeypatch, "llama")
    model = LogpModel(tiny())
    assert_liger_changes_nothing(model, groups(2, 3), {"rms_norm": False}, "cpu")


@installed
@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral", "gemma2"])
def test_all_kernels_on_cuda(tiny, groups, monkeypatch, architecture):
    put_back(monkeypatch, architecture)
    model = LogpModel(tiny(architecture)).cuda()
    assert_liger_changes_nothing(model, groups(2, 3), None, "cuda")
