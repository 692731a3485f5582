"""The routers' load-balancing loss: transformers' own, and one of a step however it is cut."""

import copy

import pytest
import torch

from fastpref.data.packing import pack
from fastpref.models.attention import ModelError
from fastpref.models.model import LogpModel
from fastpref.models.router import (
    RouterLoad,
    balancing_loss,
    recorded_load,
    router_coefficient,
    whole_load,
)

LOCAL = {"num_local_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
NAMED = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = [
    ("ernie4_5_moe", NAMED),
    ("flex_olmo", NAMED),
    ("granitemoe", LOCAL),
    ("jamba", NAMED | {"attn_layer_offset": 1, "attn_layer_period": 2}),
    ("minimax", LOCAL | {"layer_types": ["linear_attention", "full_attention"]}),
    ("mixtral", LOCAL),
    ("olmoe", NAMED),
    ("phimoe", LOCAL | {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0}),
    ("qwen2_moe", NAMED | {"shared_expert_intermediate_size": 16}),
    ("qwen3_moe", NAMED),
]


def load_of(model, groups):
    with recorded_load(model, True) as loads:
        model(pack(groups, share=model.shares_prompts))
    return loads[0]


def own_loss(load):
    return balancing_loss(load, load)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_worked_out_by_hand():
    """Three tokens, two experts, one choice each: two for the first, one for the second."""
    load = RouterLoad(torch.tensor([2.0, 1.0]), torch.tensor([1.8, 1.2]), torch.tensor(3.0))
    assert own_loss(load).item() == pytest.approx(2 * (2 * 1.8 + 1 * 1.2) / 9)
    half = RouterLoad(torch.tensor([1.0, 0.0]), torch.tensor([0.7, 0.3]), torch.tensor(1.0))
    assert balancing_loss(half, load).item() == pytest.approx(2 * (2 * 0.7 + 1 * 0.3) / 9)
    even = RouterLoad(torch.full((4,), 2.0), torch.full((4,), 2.0), torch.tensor(8.0))
    assert own_loss(even).item() == 1.0


@pytest.mark.parametrize(("architecture", "options"), ROUTED, ids=[name for name, _ in ROUTED])
def test_is_the_models_own(tiny, groups, architecture, options):
    plain = tiny(architecture, **options)
    model = LogpModel(copy.deepcopy(plain))
    (group,) = groups(1)
    ids = torch.tensor([group.prompt + group.completions[0]])
    out = plain(input_ids=ids, output_router_logits=True, use_cache=False)
    if not out.router_logits:
        pytest.skip("this release of transformers returns none of this model")
    theirs = out.aux_loss
    ours = own_loss(load_of(model, [group]))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    want, got = gradients(plain, theirs), gradients(model.model, ours)
    assert want.keys() <= got.keys()
    scale = max(g.abs().max() for g in want.values())
    assert scale > 1e-4
    for name, g in want.items():
        torch.testing.assert_close(got[name], g, rtol=1e-4, atol=1e-5 * float(scale), msg=name)


@pytest.mark.parametrize("architecture", ["mixtral", "jamba"])
def test_every_token_counts_once_and_padding_never(tiny, groups, architecture):
    """A part per group: together they are the loss of the row, of the tokens that are there."""
    plain = tiny(architecture, **dict(ROUTED)[architecture]).double()
    plain.set_experts_implementation("eager")  # the grouped product knows no fp64
    model = LogpModel(plain)
    batch = groups(2, 3, 1)
    whole, parts = load_of(model, batch), [load_of(model, [group]) for group in batch]
    share = model.shares_prompts
    layers = 2 if architecture == "mixtral" else 1
    assert whole.rows == layers * len(pack(batch, share=share).input_ids)
    assert whole.chosen.sum() == 2 * whole.rows
    torch.testing.assert_close(whole.probability.sum(), whole.rows)
    known = whole_load(parts, lambda values: values)
    total = sum(balancing_loss(part, known) for part in parts)
    torch.testing.assert_close(total, own_loss(whole))
    # two ranks of the same tokens
    twice = whole_load(parts, lambda values: 2 * values)
    torch.testing.assert_close(2 * sum(balancing_loss(p, twice) for p in parts), own_loss(whole))


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe", "minimax"])
def test_gradient_checkpointing(tiny, groups, architecture):
    seen = []
    for checkpointing in (False, True):
        model = LogpModel(tiny(architecture, **dict(ROUTED)[architecture]))
        if checkpointing:
            model.checkpoint_layers()
        model.train()
        load = load_of(model, groups(2, 3))
        seen.append((load.chosen, gradients(model, own_loss(load))))
    assert torch.equal(seen[0][0], seen[1][0])
    assert seen[0][1].keys() == seen[1][1].keys()
    assert any("gate" in name or "router" in name for name in seen[0][1])
    for name, gradient in seen[0][1].items():
        torch.testing.assert_close(seen[1][1][name], gradient, msg=name)


def test_only_the_next_forward_of_the_policy_is_recorded(tiny, groups):
    model = LogpModel(tiny("mixtral", **LOCAL))
    batch = pack(groups(2))
    with recorded_load(model, True) as loads:
        model(batch)
        with torch.no_grad():
            model(batch)  # a reference that is the policy with its adapters off
    assert len(loads) == 1 and loads[0].probability.requires_grad
    with recorded_load(model, False) as loads:
        model(batch)
    model(batch)
    assert loads == []


def test_the_coefficient(tiny):
    mixture = tiny("mixtral", **LOCAL, router_aux_loss_coef=0.25)
    assert router_coefficient(mixture, None) == 0.25  # as TRL has it: the config's own
    assert router_coefficient(mixture, 0.5) == 0.5 and router_coefficient(mixture, 0.0) == 0.0
    dense = tiny()
    assert router_coefficient(dense, None) == router_coefficient(dense, 0.0) == 0.0
    with pytest.raises(ModelError, match=r"router_aux_loss_coef 0.01, got LlamaForCausalLM"):
        router_coefficient(dense, 0.01)
    silent = tiny("glm4_moe", n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1)
    with pytest.raises(ModelError, match="got Glm4MoeForCausalLM"):
        router_coefficient(silent, 0.01)


def test_routers_that_cannot_be_read(tiny, groups):
    dense = LogpModel(tiny())
    with pytest.raises(ModelError, match=r"router_logits .* got none from LlamaForCausalLM"):
        load_of(dense, groups(1))
    model = LogpModel(tiny("mixtral", **LOCAL))
    model.model.num_experts = 7
    with pytest.raises(ModelError, match=r"of 7 experts .*, 5.* from MixtralForCausalLM"):
        load_of(model, groups(1))
