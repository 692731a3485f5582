"""LogpHead and LogpModel: what they read from a config, keep of a model and refuse."""

import contextlib
import copy
import inspect
import logging

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fastpref.data.packing import pack
from fastpref.models.attention import ModelError
from fastpref.models.head import _LOGIT_SCALE, LogpHead, logit_scale
from fastpref.models.model import LogpModel


def test_the_head_is_a_linear_layer_and_more():
    torch.manual_seed(0)
    old = nn.Linear(8, 11).double()
    head = LogpHead(old, scale=0.5, softcap=3.0)
    assert head.weight is old.weight and head.bias is old.bias
    x, rows = torch.randn(5, 8, dtype=torch.float64), torch.tensor([4, 0, 4])
    assert torch.equal(head(x), old(x))
    target = torch.tensor([10, 3, 0])
    stats = head(x, target, rows=rows, temperature=2.0, outputs=("entropy",))
    want = (3 * torch.tanh(old(x)[rows] * 0.5 / 3) / 2).log_softmax(-1)
    torch.testing.assert_close(stats.logp, want.gather(1, target[:, None])[:, 0])
    torch.testing.assert_close(stats.entropy, -(want.exp() * want).sum(1))
    assert stats.is_top1 is None


@pytest.mark.parametrize("low", [False, True], ids=["fp32", "autocast"])
def test_the_kl_of_two_heads(low):
    """Scale, cap and biases included; autocast multiplies in bf16, as in the log-probs."""
    gen = torch.Generator().manual_seed(0)
    heads = [LogpHead(nn.Linear(8, 30, bias=True), scale=1.5, softcap=4.0) for _ in range(2)]
    heads[1].requires_grad_(False)
    hidden = [torch.randn(5, 8, generator=gen) for _ in heads]
    rows = torch.tensor([0, 3, 3, 4])
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        kl = heads[0].kl(hidden[0], hidden[1], heads[1], rows=rows)
    logps = []
    for head, x in zip(heads, hidden, strict=True):
        z = 1.5 * torch.nn.functional.linear(x.double(), head.weight.double(), head.bias.double())
        logps.append((4 * torch.tanh(z / 4)).log_softmax(-1)[rows])
    want = (logps[1].exp() * (logps[1] - logps[0])).sum(-1).float()
    assert want.min() > 0.01
    torch.testing.assert_close(kl, want, rtol=0.03 if low else 1e-5, atol=1e-2 if low else 1e-6)


@pytest.mark.parametrize("tie", [False, True])
def test_parameters_and_ties_are_kept(tiny, tie):
    plain = tiny(tie=tie)
    before = dict(plain.named_parameters())
    model = LogpModel(plain)
    assert type(plain.lm_head) is LogpHead
    after = dict(plain.named_parameters())
    assert before.keys() == after.keys()
    assert all(p is after[name] for name, p in before.items())
    assert (plain.lm_head.weight is plain.get_input_embeddings().weight) == tie
    twin = copy.deepcopy(model)
    assert (twin.model.lm_head.weight is twin.model.get_input_embeddings().weight) == tie
    again = LogpModel(plain)
    assert again.model.lm_head is model.model.lm_head


def test_scales_are_those_of_transformers():
    """Every architecture whose forward uses one of the names stands in the table."""
    used = set()
    for (
        model_type,
        name,
    ) in transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        with contextlib.suppress(AttributeError, OSError, TypeError, ImportError):
            source = inspect.getsource(getattr(transformers, name).forward)
            if any(attribute in source for attribute, _ in _LOGIT_SCALE.values()) or any(
                f"self.{word}" in source for word in ("logit_scale", "logits_scaling")
            ):
                used.add(model_type)
    assert {"granite", "cohere", "falcon_h1"} <= used
    assert used <= _LOGIT_SCALE.keys() | {"cohere_compass"}


def test_scale_values():
    for model_type, key, value, want in [
        ("granite", "logits_scaling", 8.0, 0.125),
        ("cohere", "logit_scale", 0.25, 0.25),
        ("falcon_h1", "lm_head_multiplier", 0.75, 0.75),
        ("llama", "logit_scale", 0.25, 1.0),
    ]:
        config = AutoConfig.for_model(model_type)
        setattr(config, key, value)
        assert logit_scale(config) == want, model_type


def test_dropout_is_off(groups, caplog):
    config = AutoConfig.for_model(
        "gpt2", n_embd=32, n_layer=2, n_head=4, vocab_size=300, bos_token_id=None, eos_token_id=None
    )
    assert config.attn_pdrop > 0 and config.resid_pdrop > 0
    with caplog.at_level(logging.WARNING):
        model = LogpModel(AutoModelForCausalLM.from_config(config))
    assert "dropout is off" in caplog.text and "GPT2LMHeadModel" in caplog.text
    batch = pack(groups(2, 2))
    want = model.eval()(batch).logp
    assert torch.equal(model.train()(batch).logp, want)
    assert model.model.transformer.h[0].training  # gradient checkpointing asks for it


def test_plain_is_an_ordinary_model(tiny, groups):
    untouched = tiny("gemma2", sliding_window=4)
    untouched.set_attn_implementation("eager")  # some versions choose SDPA, which drops the cap
    model = LogpModel(copy.deepcopy(untouched))
    batch = pack(groups(2))
    ids = batch.input_ids[None]
    before = model(batch).logp
    with model.plain() as plain:
        assert plain is model.model
        assert torch.equal(plain(ids).logits, untouched(ids).logits)
        new = plain.generate(ids, max_new_tokens=4, do_sample=False)
        assert torch.equal(new, untouched.generate(ids, max_new_tokens=4, do_sample=False))
        with pytest.raises(ModelError, match=r"outside plain\(\)"):
            model(batch)
    assert torch.equal(model(batch).logp, before)
    with pytest.raises(ModelError, match="need segments, got none"):
        model.model(ids)
    with pytest.raises(KeyError), model.plain():
        raise KeyError
    assert torch.equal(model(batch).logp, before)  # also after an error inside


def test_plain_of_a_model_wrapped_twice(tiny, groups):
    model = LogpModel(LogpModel(tiny()).model)
    ids = pack(groups(2)).input_ids[None]
    with model.plain() as plain:
        assert torch.equal(plain(ids).logits, tiny()(ids).logits)


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("bloom", {}, "AttentionInterface, got BloomForCausalLM that stays with 'eager'"),
        ("llama4_text", {}, "whole sequences, got Llama4ForCausalLM with chunked attention"),
    ],
)
def test_refuses_models(tiny, architecture, options, message):
    with pytest.raises(ModelError, match=message):
        LogpModel(tiny(architecture, **options))


def test_refuses_other_heads_and_kinds(tiny):
    model = tiny()
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ModelError, match=r"head is an nn.Linear, got .* with Sequential"):
        LogpModel(model)
    model = tiny()
    model.config.is_encoder_decoder = True
    with pytest.raises(ModelError, match="decoder-only"):
        LogpModel(model)
    model = tiny()
    model.config.vision_config = AutoConfig.for_model("siglip_vision_model")
    with pytest.raises(ModelError, match="of text alone, got LlamaForCausalLM with"):
        LogpModel(model)


def test_layers_that_keep_arguments_to_themselves(tiny, groups):
    model = LogpModel(tiny("stablelm"))
    with pytest.raises(ModelError, match="do not hand keyword arguments on"):
        model(pack(groups(2)))
