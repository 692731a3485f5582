"""Half weights train as fp32 ones do: masters, 8-bit moments, and both on the disk."""

import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from fastpref.models import offload
from fastpref.models.model import LogpModel
from fastpref.train import run
from fastpref.train.build import build_engine
from fastpref.train.callbacks import Callback
from fastpref.train.checkpoint import CheckpointError
from fastpref.train.config import ConfigError
from fastpref.train.engine import TorchEngine
from fastpref.train.optimizer import Optimizer, OptimizerSpec
from fastpref.train.preference_config import DPOConfig
from fastpref.train.run import dpo, sft

CPU = torch.device("cpu")
SPEC = {"learning_rate": 1e-2, "total_steps": 9, "schedule": "constant", "weight_decay": 0.1}


def layers(dtype=torch.bfloat16):
    torch.manual_seed(0)
    wide = torch.nn.Sequential(torch.nn.Linear(96, 96), torch.nn.Tanh(), torch.nn.Linear(96, 3))
    return wide.to(dtype)


def inputs(count=4):
    return torch.randn(count, 5, 96, generator=torch.Generator().manual_seed(1)).bfloat16()


def loss_of(model, x):
    return model(x).float().square().sum()


def half_gradients(model, x, count):
    return torch.autograd.grad(loss_of(model, x) / count, [*model.parameters()])


def engine_of(model, **more):
    engine = TorchEngine(model, CPU)
    engine.prepare(OptimizerSpec(**(SPEC | more)))
    return engine


def options(folder, **more):
    base = {"output_dir": str(folder), "max_steps": 4, "learning_rate": 1e-3, "logging_steps": 1}
    base |= {"save_strategy": "no", "report": False, "use_cpu": True, "disable_tqdm": True}
    return base | more


def test_gradients_of_micro_batches_add_up_in_fp32():
    """To the bit: they are the half gradients of each micro-batch, summed as fp32 numbers."""
    model = layers()
    engine = engine_of(model)
    want = [torch.zeros(p.shape) for p in model.parameters()]
    for x in inputs():
        for total, g in zip(want, half_gradients(model, x, 7), strict=True):
            assert g.dtype == torch.bfloat16
            total += g
        engine.backward(loss_of(model, x), 7, last=False)
        assert all(p.grad is None for p in model.parameters())
    for p, total in zip(model.parameters(), want, strict=True):
        master = engine.optimizer.masters[p]
        assert master.dtype == torch.float32 and torch.equal(master.grad, total)
        assert not torch.equal(total, total.bfloat16().float())


def test_steps_equal_a_plain_adamw_on_fp32_copies():
    """Three clipped steps of two micro-batches; the norm is that of the fp32 gradients."""
    model, plain = layers(), layers()
    engine = engine_of(model, max_grad_norm=0.5, epsilon=1e-6)
    copies = [p.detach().float() for p in plain.parameters()]
    groups = [
        {"params": [c for c in copies if c.ndim >= 2], "weight_decay": 0.1},
        {"params": [c for c in copies if c.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=1e-2, eps=1e-6, fused=True)
    for _ in range(3):
        for c in copies:
            c.grad = torch.zeros_like(c)
        for x in inputs(2):
            engine.backward(loss_of(model, x), 2, last=False)
            for c, g in zip(copies, half_gradients(plain, x, 2), strict=True):
                c.grad += g
        exact = torch.cat([c.grad.flatten() for c in copies]).double().norm()
        torch.nn.utils.clip_grad_norm_(copies, 0.5)
        adamw.step()
        norm, rate = engine.step(torch.zeros(()))
        assert norm.item() == pytest.approx(exact.item(), rel=1e-6) and norm > 0.5 and rate == 1e-2
        for p, q, c in zip(model.parameters(), plain.parameters(), copies, strict=True):
            q.data.copy_(c)
            assert torch.equal(engine.optimizer.masters[p], c) and torch.equal(p, q)


def test_fp32_and_frozen_weights_have_no_master():
    model = layers()
    model[0].requires_grad_(False)
    model[2].weight.data = model[2].weight.data.float()
    optimizer = Optimizer(model, OptimizerSpec(**SPEC))
    assert [*optimizer.masters] == [model[2].bias]
    assert optimizer.weights[0] is model[2].weight
    off = Optimizer(model, OptimizerSpec(**SPEC, fp32_master_weights=False))
    assert not off.masters and off.weights[1] is model[2].bias


def test_nothing_is_left_on_a_model_after_its_run(tmp_path, tokenizer, new_model, pairs):
    model = new_model(tie=True).bfloat16()
    for name in ("sft", "dpo"):
        train = {"sft": sft, "dpo": dpo}[name]
        result = train(options(tmp_path / name, max_steps=1), model, pairs, tokenizer=tokenizer)
    with result.model.plain() as plain:
        plain(torch.tensor([[3, 4, 5]])).logits.float().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


class Keep(Callback):
    """The numbers that the optimizer steps on, after each step."""

    def on_step(self, step, engine):
        weights = engine.optimizer.weights
        self.weights = torch.cat([w.detach().float().flatten() for w in weights])


def test_small_steps_are_not_lost(tmp_path, tokenizer, new_model, pairs):
    """Twenty steps at 1e-6 from the same bf16 weights: as fp32, with masters, without them."""
    start = new_model().bfloat16()
    begin = torch.cat([p.detach().float().flatten() for p in start.parameters()])
    moved = {}
    for name, dtype, masters in (
        ("fp32", torch.float32, True),
        ("masters", torch.bfloat16, True),
        ("none", torch.bfloat16, False),
    ):
        model, keep = new_model().bfloat16().to(dtype), Keep()
        config = options(tmp_path / name, max_steps=20, learning_rate=1e-6, logging_steps=20)
        config |= {"lr_scheduler_type": "constant", "fp32_master_weights": masters}
        config |= {"per_device_train_batch_size": 2}
        dpo(config, model, pairs, tokenizer=tokenizer, callbacks=[keep])
        moved[name] = keep.weights - begin
    norm = moved["fp32"].norm()
    assert (moved["masters"] - moved["fp32"]).norm() < 0.1 * norm
    assert (moved["none"] - moved["fp32"]).norm() > 0.9 * norm


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_8bit"])
def test_a_bf16_run_goes_on_bit_for_bit(tmp_path, tokenizer, new_model, pairs, optim):
    if optim == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    config = options(tmp_path / "whole", save_strategy="steps", save_steps=2, optim=optim)
    new = {"hidden": 64, "tie": True}  # its MLPs are large enough for 8 bits
    dpo(config, new_model(**new).bfloat16(), pairs, tokenizer=tokenizer)
    again = config | {"output_dir": str(tmp_path / "again")}
    again |= {"resume": str(tmp_path / "whole/checkpoint-2")}
    dpo(again, new_model(**new).bfloat16(), pairs, tokenizer=tokenizer)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again"))
    assert all(x.dtype == torch.bfloat16 and torch.equal(x, two[name]) for name, x in one.items())
    states = [
        torch.load(tmp_path / name / "checkpoint-4/state.pt")["masters"]
        for name in ("whole", "again")
    ]
    assert len(states[0]) == len(one)
    for a, b in zip(*states, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)
    changed = again | {"output_dir": str(tmp_path / "other"), "fp32_master_weights": False}
    with pytest.raises(CheckpointError, match="fp32_master_weights True, now False"):
        dpo(changed, new_model(**new).bfloat16(), pairs, tokenizer=tokenizer)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
@pytest.mark.parametrize("masters", [True, False])
def test_sizes_are_those_of_the_file(tmp_path, new_model, optim, masters):
    if optim == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    engine = engine_of(
        LogpModel(new_model(hidden=128, vocab_size=3000).bfloat16()),
        optim=optim,
        fp32_master_weights=masters,
    )
    for weight in engine.optimizer.weights:
        weight.grad = torch.ones_like(weight)
    engine.step(torch.zeros(()))
    engine.save_state(tmp_path)
    told, file = engine.sizes()[1], (tmp_path / "state.pt").stat().st_size
    assert told == pytest.approx(file, rel=0.02)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_bnb_8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_stay_from_the_first_nan_on(optim, dtype):
    if optim == "adamw_bnb_8bit":
        pytest.importorskip("bitsandbytes")
    model, weights = layers(dtype), []
    engine = engine_of(model, optim=optim)
    for loss in (1.0, float("nan"), 1.0):
        engine.backward(loss_of(model, inputs()[0].to(dtype)), 1, last=True)
        engine.step(torch.tensor(loss))
        weights.append([p.detach().clone() for p in model.parameters()])
    for before, after in zip(layers(dtype).parameters(), weights[0], strict=True):
        assert not torch.equal(before, after)
    for first, *later in zip(*weights, strict=True):
        assert all(torch.equal(first, x) for x in later)


def test_8_bit_moments_follow_those_of_32(tmp_path, tokenizer, new_model, pairs):
    pytest.importorskip("bitsandbytes")
    kept, moved = {}, {}
    for optim in ("adamw_torch", "adamw_8bit"):
        kept[optim] = Keep()
        model = new_model(hidden=64)
        begin = torch.cat([p.detach().flatten() for p in model.parameters()])
        config = options(tmp_path / optim, optim=optim)
        dpo(config, model, pairs, tokenizer=tokenizer, callbacks=[kept[optim]])
        moved[optim] = kept[optim].weights - begin
    far = (moved["adamw_8bit"] - moved["adamw_torch"]).norm() / moved["adamw_torch"].norm()
    assert 0 < far < 0.3


def test_what_bitsandbytes_is_called_with(monkeypatch, new_model):
    """Its paged optimizer needs CUDA: here the calls alone."""
    calls, overrides = [], []
    manager = SimpleNamespace(pid2config={}, override_config=lambda *args: overrides.append(args))

    class AdamW(torch.optim.AdamW):
        def __init__(self, groups, *, optim_bits, is_paged, **options):
            calls.append((optim_bits, is_paged, options))
            super().__init__(groups, **options)

    stand_in = SimpleNamespace(
        AdamW=AdamW, GlobalOptimManager=SimpleNamespace(get_instance=lambda: manager)
    )
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", stand_in)
    model = new_model().bfloat16()
    for optim in ("paged_adamw_8bit", "adamw_8bit"):
        optimizer = Optimizer(model, OptimizerSpec(**SPEC, optim=optim))
        master = optimizer.masters[model.get_input_embeddings().weight]
        assert overrides.pop()[0] is master and not overrides
    common = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8}
    assert calls == [(8, True, common), (8, False, common)]


def test_what_cannot_run_is_refused_before_anything_is_read(tmp_path, monkeypatch, new_model):
    def refused(message, model=None, **more):
        with pytest.raises(ConfigError, match=message):
            dpo(options(tmp_path, **more), model or new_model(), [], tokenizer=object())

    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    refused("need bitsandbytes for optim 'adamw_8bit'.*pip install", optim="adamw_8bit")
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", SimpleNamespace())
    refused("need a CUDA device for optim 'paged_adamw_8bit', got cpu", optim="paged_adamw_8bit")
    refused("need a CUDA device for activation_offloading, got cpu", activation_offloading=True)
    refused("need a CUDA device for use_liger_kernel, got cpu", use_liger_kernel=True)
    with pytest.raises(ConfigError, match=r"got 21 in float16 \(model"):
        build_engine(DPOConfig(**options(tmp_path)), new_model().half())


def test_a_run_that_offloads_ends_with_the_same_weights(
    tmp_path, monkeypatch, tokenizer, new_model, pairs
):
    monkeypatch.setattr(run, "check_device", lambda *_: None)  # it would refuse a CPU
    monkeypatch.setattr(offload, "LEAST", 1)
    ends = []
    for on in (False, True):
        config = options(tmp_path / str(on), max_steps=2, activation_offloading=on)
        config |= {"gradient_checkpointing": True}
        result = dpo(config, new_model(), pairs, tokenizer=tokenizer)
        assert result.model.offload_activations == on
        ends.append(result.model.model.state_dict())
    assert all(torch.equal(x, ends[1][name]) for name, x in ends[0].items())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_step_waits_for_the_device(dtype):
    model = layers(dtype)
    engine = TorchEngine(model, torch.device("cuda"))
    engine.prepare(OptimizerSpec(**SPEC))
    x, loss = inputs()[0].to("cuda", dtype), torch.zeros((), device="cuda")
    for mode in ("default", "error"):  # the first step makes the moments
        torch.cuda.set_sync_debug_mode(mode)
        try:
            engine.backward(loss_of(model, x), 2, last=True)
            engine.step(loss)
        finally:
            torch.cuda.set_sync_debug_mode("default")
