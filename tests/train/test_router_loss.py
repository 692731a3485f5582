"""The routers' loss as a part of a step: what a token budget or a second rank may not change."""

import copy
from contextlib import contextmanager

import pytest
import torch

from fastpref.data.formats import to_examples
from fastpref.data.packing import pack
from fastpref.data.tokenize import tokenize
from fastpref.data.unpaired import add_mismatched
from fastpref.models.attention import ModelError
from fastpref.models.model import LogpModel
from fastpref.models.router import balancing_loss, recorded_load
from fastpref.train.engine import TorchEngine
from fastpref.train.feed import Feed
from fastpref.train.forward import Forward
from fastpref.train.preference_config import DPOConfig, KTOConfig
from fastpref.train.run import dpo, kto_method, preference_method

COEF = 0.7
COUNT = 5
EXPERTS = {"architecture": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
METHODS = {
    "sigmoid": lambda: preference_method(DPOConfig(beta=0.3)),
    "aot_unpaired": lambda: preference_method(DPOConfig(beta=0.3, loss_type="aot_unpaired")),
    "kto": lambda: kto_method(KTOConfig(beta=0.3)),
}


def forward_of(method, model, coef=COEF):
    torch.manual_seed(5)
    plain = model.double()
    plain.set_experts_implementation("eager")  # the grouped product knows no fp64
    policy = LogpModel(plain)
    reference = policy.frozen_copy()
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.1 * torch.randn_like(p))
    engine = TorchEngine(policy, torch.device("cpu"))
    return Forward(engine, method, reference, router_coef=coef)


def groups_of(method, pairs, tokenizer):
    examples, _ = to_examples(pairs[:8], method.kind)
    if method.mismatches:
        examples = add_mismatched(examples)
    return tokenize(examples, tokenizer)[0][:COUNT]


def made(forward, parts):
    feed = Feed(forward.method, torch.device("cpu"), filler=parts[0][0])
    return [feed.make(part) for part in parts]


def gradients_of(forward, parts):
    """(gradients, mean loss, aux_loss, forwards) of one step."""
    model = forward.engine.model
    calls = []
    hook = model.model.model.register_forward_hook(lambda *_: calls.append(1))
    model.zero_grad()
    known = forward.method.known([group for part in parts for group in part])
    total, aux = 0.0, torch.zeros(2)
    for part in forward.step(made(forward, parts), known, COUNT):
        (part.loss / COUNT).backward()
        total += part.value.item() / COUNT
        aux += torch.stack(part.metrics.get("aux_loss", (aux[0] * 0, aux[0] * 0))).cpu()
    hook.remove()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    return grads, total, aux.tolist(), len(calls)


def assert_same(left, right):
    scale = max(g.abs().max().item() for g in left[0].values())
    assert scale > 0
    for name, g in left[0].items():
        torch.testing.assert_close(right[0][name], g, rtol=1e-4, atol=1e-6 * scale, msg=name)
    assert right[1] == pytest.approx(left[1], rel=1e-6)
    assert right[2] == pytest.approx(left[2], rel=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_two_token_budgets_give_equal_gradients(name, new_model, tokenizer, pairs):
    method = METHODS[name]()
    groups = groups_of(method, pairs, tokenizer)
    whole = gradients_of(forward_of(method, new_model(**EXPERTS)), [groups])
    split = gradients_of(
        forward_of(method, new_model(**EXPERTS)), [groups[:1], groups[1:4], groups[4:]]
    )
    assert_same(whole, split)
    filled = [groups[:1], groups[1:4], groups[4:], []]  # a rank that only keeps step
    assert_same(whole, gradients_of(forward_of(method, new_model(**EXPERTS)), filled))
    assert whole[2][1] == pytest.approx(1.0)  # a mean over steps counts this one once
    assert (whole[3], split[3]) == (1, 6)  # no second pass where one forward holds the step
    off = gradients_of(forward_of(method, new_model(**EXPERTS), coef=0.0), [groups])
    assert off[2] == [0.0, 0.0]
    assert whole[1] - off[1] == pytest.approx(COEF * whole[2][0])  # undivided by the count


def test_its_gradient_is_that_of_the_loss_of_the_step(new_model, tokenizer, pairs):
    """The whole step's gradient less the one without routers' loss."""
    method = METHODS["sigmoid"]()
    groups = groups_of(method, pairs, tokenizer)
    split = [groups[:2], groups[2:]]
    on, off = (
        gradients_of(forward_of(method, new_model(**EXPERTS), coef), split)[0]
        for coef in (COEF, 0.0)
    )
    forward = forward_of(method, new_model(**EXPERTS))
    model = forward.engine.model
    with recorded_load(model, True) as loads:
        model(pack(groups))
    (COEF * balancing_loss(loads[0], loads[0])).backward()
    router = "model.model.layers.0.mlp.gate.weight"
    scale = max(g.abs().max().item() for g in on.values())  # logps are fp32
    assert model.get_parameter(router).grad.abs().max() > 1e-3 * scale
    for name, p in model.named_parameters():
        want = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(
            on[name] - off[name], want, rtol=1e-4, atol=1e-6 * scale, msg=name
        )


class RankOfTwo(TorchEngine):
    """One rank of two: what it reduces is kept, and added to what the other reduced before."""

    world_size = 2
    other = 0.0

    def all_reduce_sum(self, values):
        self.mine = values
        return values + self.other


def test_two_ranks_equal_one(new_model, tokenizer, pairs):
    method = METHODS["sigmoid"]()
    groups = groups_of(method, pairs, tokenizer)
    whole = gradients_of(forward_of(method, new_model(**EXPERTS)), [groups])
    forwards = [forward_of(method, new_model(**EXPERTS)) for _ in range(2)]
    parts = [[groups[:2]], [groups[2:3], groups[3:]]]
    for forward, own in zip(forwards, parts, strict=True):
        forward.engine = RankOfTwo(forward.engine.model, torch.device("cpu"))
        forward.load_of_step(made(forward, own))
    for forward, other in zip(forwards, forwards[::-1], strict=True):
        forward.engine.other = other.engine.mine.clone()
    a, b = (gradients_of(f, own) for f, own in zip(forwards, parts, strict=True))
    joint = {name: g + b[0][name] for name, g in a[0].items()}
    aux = [x + y for x, y in zip(a[2], b[2], strict=True)]
    assert_same(whole, (joint, a[1] + b[1], aux))


@pytest.mark.parametrize("name", METHODS)
def test_evaluation_pools_its_batches(name, new_model, tokenizer, pairs):
    method = METHODS[name]()
    groups = groups_of(method, pairs, tokenizer)
    seen = []
    for parts in ([groups], [groups[:2], groups[2:]]):
        forward = forward_of(method, new_model(**EXPERTS))
        known = method.known(groups)
        found = list(forward.evaluate(made(forward, parts), known, COUNT, lambda: None))
        aux = [part.metrics["aux_loss"] for part in found if "aux_loss" in part.metrics]
        assert len(aux) == 1 and aux[0][1] == 1
        seen.append((sum(part.value.item() for part in found) / COUNT, aux[0][0].item()))
    assert seen[0] == pytest.approx(seen[1])
    train = gradients_of(forward_of(method, new_model(**EXPERTS)), [groups])
    assert seen[0] == pytest.approx((train[1], train[2][0]))


@contextmanager
def no_routers_asked(model):
    """The reference's trunk must not be asked for its routers."""

    def refuse(_, args, kwargs):
        assert "output_router_logits" not in kwargs

    hook = model.model.model.register_forward_pre_hook(refuse, with_kwargs=True)
    yield
    hook.remove()


def test_the_reference_has_no_routers_loss(new_model, tokenizer, pairs):
    method = METHODS["sigmoid"]()
    groups = groups_of(method, pairs, tokenizer)
    forward = forward_of(method, new_model(**EXPERTS))
    with no_routers_asked(forward.reference):
        gradients_of(forward, [groups[:2], groups[2:]])
    assert forward.engine.model.router_loads is None


def test_a_run_logs_it_and_a_dense_model_is_refused(new_model, tokenizer, pairs, tmp_path):
    config = {
        **{"output_dir": str(tmp_path / "run"), "max_steps": 2, "logging_steps": 1},
        **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "use_cpu": True},
        **{"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no", "report": False},
    }
    options = {"train_dataset": pairs[:8], "eval_dataset": pairs[8:12], "tokenizer": tokenizer}
    model = new_model(**EXPERTS, router_aux_loss_coef=0.5)
    found = dpo(config, copy.deepcopy(model), **options).metrics
    # two choices a token; DPO's loss starts at log 2
    assert 1.9 < found["aux_loss"] < 4 and 1.9 < found["eval_aux_loss"] < 4
    assert found["loss"] == pytest.approx(0.693 + 0.5 * found["aux_loss"], rel=0.02)
    config["output_dir"] = str(tmp_path / "off")
    found = dpo(config | {"router_aux_loss_coef": 0.0}, model, **options).metrics
    assert "aux_loss" not in found and found["loss"] == pytest.approx(0.693, rel=0.02)
    config["output_dir"] = str(tmp_path / "dense")
    with pytest.raises(ModelError, match=r"router_aux_loss_coef 0.1, got LlamaForCausalLM"):
        dpo(config | {"router_aux_loss_coef": 0.1}, new_model(), **options)


@pytest.mark.parametrize("precompute", [False, True], ids=["beside", "precomputed"])
def test_a_run_with_recurrent_layers(new_model, tokenizer, pairs, tmp_path, precompute):
    model = new_model(architecture="lfm2", layer_types=["conv", "full_attention"])
    config = {
        **{"output_dir": str(tmp_path), "max_steps": 2, "logging_steps": 1, "use_cpu": True},
        **{"per_device_train_batch_size": 3, "save_strategy": "no", "report": False},
        **{"precompute_ref_log_probs": precompute},
    }
    found = dpo(config, model, pairs[:6], tokenizer=tokenizer)
    assert not found.model.shares_prompts
    assert found.metrics["loss"] == pytest.approx(0.693, abs=0.01)
