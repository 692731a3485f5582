"""Adapters on a model: frozen everything else, the base when they are off, peft's files."""

import copy
import shutil

import peft
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import fastpref.kernels.linear_logp_loops as loops
from fastpref.data.packing import pack
from fastpref.models.adapters import (
    AdapterOff,
    add_adapters,
    base_state,
    load_adapters,
    save_adapters,
    unadapted,
)
from fastpref.models.attention import ModelError
from fastpref.models.load import check_agreement, load_model
from fastpref.models.model import LogpModel
from fastpref.models.quantize import Quantization, in_int8
from fastpref.train.reference import hash_weights

CPU = torch.device("cpu")
LORA = {"r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]}


def moved(model, seed=0):
    """Adapters that do something, as after some steps."""
    gen = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=gen).to(p.dtype)
    return model


def adapted(model, **lora):
    torch.manual_seed(0)
    return LogpModel(model, adapters=add_adapters(model, LORA | lora))


def logps(model, groups):
    return model(pack(groups)).logp


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"target_modules": "all-linear", "use_rslora": True},
        {"use_dora": True, "init_lora_weights": "gaussian"},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.*v_proj": 3}},
        {"modules_to_save": ["norm"], "layers_to_transform": [1]},
        {"target_modules": ["embed_tokens", "o_proj"]},
        {"init_lora_weights": False},
    ],
    ids=str,
)
def test_off_is_the_model_as_it_came(tiny, groups, lora):
    base = tiny(tie_word_embeddings=False)
    want = logps(LogpModel(copy.deepcopy(base)), groups(2, 3)).detach()
    before = hash_weights(LogpModel(copy.deepcopy(base)))
    model = moved(adapted(base, **lora))
    off = unadapted(model)
    assert torch.equal(logps(off, groups(2, 3)), want)
    assert (logps(model, groups(2, 3)) - want).abs().max() > 1e-3
    assert hash_weights(model) == hash_weights(off) == before
    check_agreement(model, groups(3)[0])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n or "modules_to_save" in n for n in trained)


def test_off_is_no_second_model(tiny, groups, monkeypatch):
    plain, model = LogpModel(tiny()), moved(adapted(tiny()))
    assert unadapted(plain) is plain
    monkeypatch.setattr(copy, "deepcopy", None)
    off = unadapted(model)
    assert isinstance(off, AdapterOff) and off.model is model.model
    both = {p.data_ptr(): p.nbytes for m in (model, off) for p in m.parameters()}
    adapters = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert sum(both.values()) == sum(p.nbytes for p in plain.parameters()) + adapters


def test_off_ends_when_its_forward_does(tiny, groups):
    model = moved(adapted(tiny()))
    want = logps(model, groups(2)).detach()
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(AttributeError):
        unadapted(model)(None)
    assert torch.equal(logps(model, groups(2)), want)
    assert [p.requires_grad for p in model.parameters()] == flags
    off = unadapted(model)
    with off.plain() as plain, torch.no_grad():
        ids = torch.tensor([[5, 6, 7]])
        inside = plain(ids).logits
    with model.plain() as plain, torch.no_grad():
        assert not torch.equal(inside, plain(ids).logits)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_reference_pass_before_the_backward_changes_no_gradient(tiny, groups, checkpointing):
    """As losses do that read both distributions: both forwards, then the policy's backward."""
    batch = pack(groups(2, 2))
    grads = []
    for twin in (LogpModel(tiny()).requires_grad_(False), None):  # the first has its own modules
        model = moved(adapted(tiny())).train()
        if checkpointing:
            model.checkpoint_layers()
        twin = twin or unadapted(model)
        stats, ref_logp, kl = model.against(twin, batch)
        assert not ref_logp.requires_grad
        (stats.logp.sum() + kl.sum()).backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert all(g is not None and g.abs().sum() > 0 for g in grads[0].values())
    for name, g in grads[0].items():
        assert torch.equal(g, grads[1][name]), name


def test_a_frozen_head_takes_two_passes(tiny, groups, monkeypatch):
    model = moved(adapted(tiny(tie_word_embeddings=False)))
    batch, count, real = pack(groups(2, 2)), [0], loops.product

    def product(a, b, **options):
        count[0] += a.shape[0] * a.shape[1] * b.shape[1]
        return real(a, b, **options)

    monkeypatch.setattr(loops, "product", product)
    head = model.model.get_output_embeddings()
    one = len(batch.rows) * head.in_features * head.out_features
    model(batch).logp.sum().backward()
    assert count[0] == 2 * one and head.weight.grad is None
    head.weight.requires_grad_()
    model(batch).logp.sum().backward()
    assert count[0] == (2 + 3) * one


@pytest.mark.parametrize(
    ("lora", "tie", "message"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, False, "lm_head in target_modules"),
        ({"modules_to_save": ["lm_head"]}, False, "lm_head in modules_to_save"),
        ({"target_modules": ["embed_tokens"]}, True, "embed_tokens in target_modules.*the head's"),
        ({"modules_to_save": ["embed_tokens"]}, True, "embed_tokens in modules_to_save"),
        ({"target_parameters": ["lm_head.weight"]}, False, "lm_head in target_parameters"),
        ({"target_modules": ["q_prj", "v_proj"]}, False, "target_modules, got 'q_prj'.*q_proj"),
        ({"target_modules": "nothing.*"}, False, "lora entries that fit LlamaForCausalLM"),
        ({"modules_to_save": ["nrom"]}, False, "modules_to_save, got 'nrom'"),
        ({"rank_pattern": {"k_proj": 2}}, False, "rank_pattern, got 'k_proj'"),
    ],
    ids=str,
)
def test_refusals_name_the_key(tiny, lora, tie, message):
    with pytest.raises(ModelError, match=message):
        add_adapters(tiny(tie_word_embeddings=tie), LORA | lora)


def test_adapters_are_fp32_over_a_half_base(tiny, groups):
    model = adapted(tiny().to(torch.bfloat16))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    check_agreement(model, groups(3)[0])
    assert torch.equal(logps(model, groups(2)), logps(unadapted(model), groups(2)))


@pytest.mark.parametrize("lora", [{}, {"use_dora": True, "modules_to_save": ["norm"]}], ids=str)
def test_peft_reads_what_is_saved(tiny, groups, tmp_path, lora):
    tiny().save_pretrained(tmp_path / "base")
    base = load_model(str(tmp_path / "base"))
    model = moved(adapted(base, **lora))
    (tmp_path / "made").mkdir()
    save_adapters(model.adapters, tmp_path / "made")
    names = {path.name for path in (tmp_path / "made").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= names
    ids = torch.tensor([[5, 6, 7, 8]])
    with model.plain() as plain, torch.no_grad():
        want = plain(ids).logits
    bare = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(bare, tmp_path / "made")
    # transformers 5.23 alone drops DoRA's magnitudes
    reader = peft.AutoPeftModelForCausalLM if lora else AutoModelForCausalLM
    whole = reader.from_pretrained(tmp_path / "made")
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, want)
        torch.testing.assert_close(whole(ids).logits, want)

    fresh = adapted(load_model(str(tmp_path / "base")), **lora)
    load_adapters(fresh.adapters, tmp_path / "made")
    for name, value in model.model.state_dict().items():
        assert torch.equal(value, fresh.model.state_dict()[name]), name
    path = tmp_path / "made" / "adapter_model.safetensors"
    saved = load_file(path)
    saved.pop(sorted(saved)[0])
    save_file(saved, path)
    with pytest.raises(ValueError, match=r"adapters of this run .* got others: base_model"):
        load_adapters(fresh.adapters, tmp_path / "made")
    path.unlink()
    with pytest.raises(ValueError, match="adapters of this run"):
        load_adapters(fresh.adapters, tmp_path / "made")


def test_adapters_are_no_model_to_start_from(tiny, tmp_path):
    tiny().save_pretrained(tmp_path / "base")
    model = adapted(load_model(str(tmp_path / "base")))
    save_adapters(model.adapters, tmp_path / "made")
    with pytest.raises(ModelError, match=r"merge them .*merge_and_unload\(\)"):
        load_model(str(tmp_path / "made"))
    shutil.copy(tmp_path / "base" / "config.json", tmp_path / "made")
    with pytest.raises(ModelError, match=r"need weights .*adapters alone: merge them"):
        load_model(str(tmp_path / "made"))
    shutil.copy(tmp_path / "base" / "model.safetensors", tmp_path / "made")
    with pytest.raises(ModelError, match="got one with adapters: merge them"):
        load_model(str(tmp_path / "made"))


def test_base_state_keeps_names_of_a_model_without_adapters(tiny):
    plain = LogpModel(tiny())
    plain.model.lora_like = torch.nn.Parameter(torch.zeros(1))
    assert "lora_like" in base_state(plain)


@pytest.mark.parametrize(
    "how", [("nf4",), ("fp4",), ("nf4", True), ("nf4", False, "bfloat16")], ids=str
)
def test_four_bits(tiny, groups, tmp_path, how):
    """On the CPU too: every mode computes the same, and gradients reach the first layer."""
    tiny(tie_word_embeddings=False, hidden=64).save_pretrained(tmp_path)
    made = load_model(str(tmp_path), quantization=Quantization(4, *how), device=CPU)
    layers = [m for m in made.modules() if isinstance(m, Linear4bit)]
    assert len(layers) == 7 * 2 and made.lm_head.weight.dtype == torch.float32
    model = moved(adapted(made))
    key = hash_weights(model)
    check_agreement(model, groups(3)[0])
    for training in (False, True):
        model.train(training).zero_grad()
        model(pack(groups(2, 2))).logp.sum().backward()
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(g is not None and g.abs().sum() > 0 for g in grads)
    assert hash_weights(model) == key == hash_weights(unadapted(model))
    other = layers[0].weight
    other.data = (other.data.view(torch.uint8) ^ 1).view(other.dtype)
    assert hash_weights(model) != key


def test_four_bits_are_those_of_a_dequantised_model(tiny, groups, tmp_path):
    """Log-probs and adapters' gradients of the same model with its weights written out."""
    tiny(tie_word_embeddings=False, hidden=64).save_pretrained(tmp_path)
    made = load_model(str(tmp_path), quantization=Quantization(4), device=CPU)
    written = load_model(str(tmp_path))
    for name, module in made.named_modules():
        if isinstance(module, Linear4bit):
            weight = dequantize_4bit(module.weight, module.weight.quant_state)
            written.get_submodule(name).weight.data = weight.float()
    results = []
    for one in (made, written):
        torch.manual_seed(0)
        model = moved(adapted(one)).train()
        logp = logps(model, groups(2, 2))
        logp.sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        results.append((logp.detach(), grads))
    torch.testing.assert_close(results[0], results[1])


def test_eight_bits_are_asked_of_bitsandbytes(tiny, tmp_path):
    """Recorded: no layer of theirs computes the same in every mode without CUDA."""
    tiny(hidden=64).save_pretrained(tmp_path)
    made = load_model(str(tmp_path), quantization=Quantization(8), device=CPU)
    assert in_int8(made) and not in_int8(tiny()) and made.lm_head.weight.is_floating_point()
    assert len(hash_weights(adapted(made))) == 64
    options = Quantization(8).options(tiny().config, "bfloat16", CPU)
    assert options["quantization_config"].load_in_8bit and options["device_map"] == {"": CPU}
    four = Quantization(4, "fp4", True, "bfloat16").options(tiny().config, "auto", CPU)
    made = four["quantization_config"]
    assert (made.bnb_4bit_quant_type, made.bnb_4bit_use_double_quant) == ("fp4", True)
    assert made.bnb_4bit_compute_dtype == torch.float32
    assert made.bnb_4bit_quant_storage == torch.bfloat16
