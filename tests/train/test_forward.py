"""Every loss as a step: what a token budget, a second rank or a resume may not change."""

import contextlib
import copy
import dataclasses
import itertools
import math
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref.data.formats import to_examples
from fastpref.data.packing import pack
from fastpref.data.tokenize import Group, tokenize
from fastpref.data.unpaired import add_mismatched
from fastpref.losses.preference import LOSSES
from fastpref.losses.ranking import RANKING_LOSSES
from fastpref.models.model import LogpModel
from fastpref.models.tiny import tiny_model
from fastpref.train.engine import TorchEngine
from fastpref.train.feed import Feed
from fastpref.train.forward import Forward
from fastpref.train.metrics import MetricSums
from fastpref.train.optimizer import OptimizerSpec
from fastpref.train.preference_config import DPOConfig, KTOConfig
from fastpref.train.run import kto_method, preference_method

UNPAIRED = ("kto", "bco", "apo_zero_unpaired")
TYPES = [*LOSSES, *RANKING_LOSSES, *UNPAIRED]
COUPLED = [*(name for name, loss in LOSSES.items() if loss.couples), "kto", "bco"]
SPLIT = [1, 3, 2]  # groups in each micro-batch
SEED = 5


def method_of(loss_type, **options):
    if loss_type in UNPAIRED:
        return kto_method(KTOConfig(loss_type=loss_type, beta=0.3, **options))
    if loss_type in ("sigmoid", "hinge"):
        options = {"loss_columns": ["margin"], **options}
    return preference_method(DPOConfig(loss_type=loss_type, beta=0.3, **options))


def groups_of(method, rows, tokenizer):
    examples, _ = to_examples(rows, method.kind)
    if method.mismatches:
        examples = add_mismatched(examples)
    groups = tokenize(examples, tokenizer)[0][:6]
    if getattr(method, "loss_types", ("",))[0].startswith("aot"):  # in another order than lengths
        return [
            dataclasses.replace(g, extras={**g.extras, "ref_logp": (-40.0 * (5 * i % 6), -100.0)})
            for i, g in enumerate(groups)
        ]
    return groups


def rows_of(kind, pairs):
    if kind == "ranking":
        return [
            {
                "prompt": a["prompt"],
                "completions": [a["chosen"], a["rejected"], b["chosen"]],
                "scores": [2, 1, i % 3],
            }
            for i, (a, b) in enumerate(itertools.pairwise(pairs))
        ]
    numbers = [{"margin": i / 7, "win_rate": 0.6 + i / 30} for i in range(len(pairs))]
    return [{**pair, **more} for pair, more in zip(pairs, numbers, strict=True)]


def build(method, model):
    """A policy that has left its reference, to where KTO's z is above 0."""
    torch.manual_seed(SEED)
    policy = LogpModel(model)
    reference = policy.frozen_copy()
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.1 * torch.randn_like(p))
    engine = TorchEngine(policy, torch.device("cpu"))
    return Forward(engine, method, reference if method.needs_reference else None)


def take_step(forward, groups, sizes):
    """(gradients, sum of losses, means of the metrics) of one step, cut into ``sizes``."""
    forward.engine.model.zero_grad()
    parts = [[*part] for part in torch.tensor(range(len(groups))).split(sizes)]
    parts = [[groups[i] for i in part] for part in parts]
    known = forward.method.known(groups)
    feed = Feed(forward.method, torch.device("cpu"), filler=groups[0])
    parts = [feed.make(part) for part in parts]
    total, sums = 0.0, {}
    for part in forward.step(parts, known, 1.0):
        part.loss.backward()
        total += part.value.item()
        for name, (x, count) in part.metrics.items():
            old = sums.get(name, (0.0, 0.0))
            sums[name] = old[0] + x.item(), old[1] + count.item()
    grads = {n: p.grad.clone() for n, p in forward.engine.model.named_parameters()}
    return grads, total, {name: x / count for name, (x, count) in sums.items() if count}


def assert_same(left, right):
    scale = max(g.abs().max().item() for g in left[0].values())
    assert scale > 0
    for name, g in left[0].items():
        torch.testing.assert_close(g, right[0][name], rtol=1e-4, atol=2e-6 * scale, msg=name)
    assert left[1] == pytest.approx(right[1], rel=1e-5)
    assert left[2] == pytest.approx(right[2], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("loss_type", TYPES)
def test_two_token_budgets_give_equal_gradients(loss_type, new_model, tokenizer, pairs):
    method = method_of(loss_type)
    groups = groups_of(method, rows_of(method.kind, pairs[:8]), tokenizer)
    whole, split = (take_step(build(method, new_model()), groups, sizes) for sizes in (6, SPLIT))
    assert_same(whole, split)
    assert set(whole[2]) | {"rewards/margins"} >= set(method.metric_names)
    if loss_type in COUPLED:  # or the budgets would agree without any coupling
        alone = [take_step(build(method, new_model()), [group], 1)[1] for group in groups]
        assert sum(alone) != pytest.approx(whole[1], rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"ld_alpha": 0.5},
        {"ld_alpha": 0.5, "loss_type": "rpo"},
        {"use_weighting": True},
        {"loss_type": ["sigmoid", "bco_pair_delta", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"f_divergence_type": "js_divergence"},
    ],
    ids=str,
)
def test_options_too(options, new_model, tokenizer, pairs):
    method = preference_method(DPOConfig(**options))
    groups = groups_of(method, rows_of(method.kind, pairs[:8]), tokenizer)
    plain = take_step(build(preference_method(DPOConfig()), new_model()), groups, 6)
    whole, split = (take_step(build(method, new_model()), groups, sizes) for sizes in (6, SPLIT))
    assert_same(whole, split)
    assert whole[1] != pytest.approx(plain[1], rel=1e-3)


@pytest.mark.parametrize("loss_type", ["sigmoid", "simpo", "kto", "aot"])
def test_an_empty_micro_batch_changes_nothing(loss_type, new_model, tokenizer, pairs):
    """It keeps step with ranks that have more to do: its backward runs, and adds 0."""
    method = method_of(loss_type)
    groups = groups_of(method, rows_of(method.kind, pairs[:8]), tokenizer)
    runs = []
    for sizes in (SPLIT, [1, 0, 3, 2]):
        forward = build(method, new_model())
        calls = []
        weight = forward.engine.model.model.get_input_embeddings().weight
        weight.register_hook(lambda grad, calls=calls: calls.append(1))
        runs.append(take_step(forward, groups, sizes))
        assert len(calls) == len(sizes)
    assert_same(*runs)
    for name, gradient in runs[0][0].items():
        assert torch.equal(gradient, runs[1][0][name]), name


class TwoRanks(TorchEngine):
    """One rank of two, with the collectives that a step asks for."""

    def __init__(self, model, rank):
        super().__init__(model, torch.device("cpu"))
        self.rank, self.world_size = rank, 2

    def all_gather(self, rows):
        found = [None, None]
        dist.all_gather_object(found, rows)
        return torch.cat(found), len(found[0]) * self.rank


def one_rank(rank, file, todo, results):
    store = dist.FileStore(file, 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(0, 60))
    for name, model, groups in todo:
        forward = build(method_of(name), copy.deepcopy(model))  # it came in shared memory
        forward.engine = TwoRanks(forward.engine.model, rank)
        mine = groups[rank::2] if rank else groups[::2]
        step = take_step(forward, mine, [1, 1, len(mine) - 2])  # the last of rank 1 is empty
        grads = step[0]
        for g in grads.values():
            dist.all_reduce(g)
        total = torch.tensor(step[1])
        dist.all_reduce(total)
        if rank == 0:
            results.put((name, {n: g.numpy() for n, g in grads.items()}, total.item(), step[2]))
    dist.destroy_process_group()


def test_two_ranks_equal_one_on_the_joint_batch(tmp_path, new_model, tokenizer, pairs):
    """Five groups: three for rank 0, two for rank 1."""
    todo, want = [], {}
    for name in COUPLED:
        method = method_of(name)
        groups = groups_of(method, rows_of(method.kind, pairs[:8]), tokenizer)[:5]
        # the ranks take every other one: the joint batch in their order, for what moves with it
        todo.append((name, new_model(), groups))
        want[name] = take_step(build(method, new_model()), groups[::2] + groups[1::2], 5)
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    processes = mp.spawn(one_rank, (str(tmp_path / "store"), todo, results), nprocs=2, join=False)
    found = {}
    while len(found) < len(COUPLED):
        if results.empty():
            assert not processes.join(timeout=1) or not results.empty() or len(found) == len(todo)
            continue
        name, grads, total, metrics = results.get()
        found[name] = {n: torch.from_numpy(g) for n, g in grads.items()}, total, metrics
    while not processes.join(timeout=60):
        pass
    for name in COUPLED:
        of_losses = {k: v for k, v in want[name][2].items() if k in found[name][2]}
        coupled = {k for k in of_losses if k.startswith(("rewards", "logps", "kl"))}
        assert coupled
        one = want[name][0], want[name][1], {k: want[name][2][k] for k in coupled}
        assert_same(one, (*found[name][:2], {k: found[name][2][k] for k in coupled}))


@pytest.mark.parametrize("loss_type", ["bco_pair_delta", "alpha_dpo", "bco"])
def test_statistics_move_from_step_to_step(loss_type, new_model, tokenizer, pairs):
    method = method_of(loss_type)
    rows = rows_of(method.kind, pairs[:8])
    forward = build(method, new_model())
    groups = groups_of(method, rows, tokenizer)
    seen = []
    for part in (groups[:2], groups[2:]):
        scored = forward.score(pack(part)).values
        before = forward.moving
        _, total, _ = take_step(forward, part, len(part))
        seen.append((scored, before, forward.moving))
    told, own = (method.loss(scored, facts)[0].item() for facts in (forward.moving, {}))
    assert total == pytest.approx(told) and total != pytest.approx(own, rel=1e-4)
    parts = Feed(method, torch.device("cpu")).ahead([groups[2:4], groups[4:]])
    evaluated = list(forward.evaluate(parts, {}, 4.0, lambda: None))
    assert sum(part.value for part in evaluated).item() == pytest.approx(told)
    if "delta" in forward.moving:  # the mean of every reward so far
        rewards = []
        for values, *_ in seen:
            sides = ("chosen_", "rejected_") if "chosen_logps" in values else ("",)
            for side in sides:
                rewards.append(0.3 * (values[f"{side}logps"] - values[f"ref_{side}logps"]).detach())
        assert forward.moving["delta"].item() == pytest.approx(torch.cat(rewards).mean().item())
        assert forward.moving["delta_seen"].item() == len(torch.cat(rewards))
        return
    gaps = []
    for values, *_ in seen:
        ratios = [values[f"{s}_logps"] - values[f"ref_{s}_logps"] for s in ("chosen", "rejected")]
        gaps.append(ratios[0] / values["chosen_lengths"] - ratios[1] / values["rejected_lengths"])
    both = torch.cat(gaps).detach().double()
    shares = torch.tensor([0.9 / 1.9 / 2] * 2 + [1 / 1.9 / 4] * 4)  # a step weighs 0.9 of the next
    mean = (shares * both).sum()
    assert forward.moving["gap_mean"].item() == pytest.approx(mean.item())
    std = (shares * (both - mean) ** 2).sum().sqrt()
    assert forward.moving["gap_std"].item() == pytest.approx(std.item())


def test_tail_tokens_count_less(new_model, tokenizer, pairs):
    """LD-DPO from the tokens' log-probs, by hand; a reference is scored by the same rule."""
    method = method_of("robust", ld_alpha=0.25)
    group = groups_of(method, pairs[:1], tokenizer)[0]
    forward = build(method, new_model())
    values = forward.score(pack([group])).values
    model = forward.engine.model
    shorter = min(map(len, group.completions))
    for tokens, side in zip(group.completions, ("chosen", "rejected"), strict=True):
        ids = torch.tensor([group.prompt + tokens])
        for lm, prefix in ((model, ""), (forward.reference, "ref_")):
            with lm.plain() as plain, torch.no_grad():
                logp = plain(ids).logits[0, :-1].log_softmax(-1)
            each = logp.gather(1, ids[0, 1:, None])[-len(tokens) :, 0]
            want = each[:shorter].sum() + 0.25 * each[shorter:].sum()
            torch.testing.assert_close(
                values[f"{prefix}{side}_logps"][0], want, rtol=1e-5, atol=1e-4
            )


def test_the_kl_of_whole_distributions(new_model, tokenizer, pairs):
    """TDPO's K, from the logits of separate, unpacked sequences."""
    method = method_of("tdpo")
    group = groups_of(method, pairs[:1], tokenizer)[0]
    forward = build(method, new_model())
    values = forward.score(pack([group])).values
    for tokens, side in zip(group.completions, ("chosen", "rejected"), strict=True):
        ids, logps = torch.tensor([group.prompt + tokens]), []
        for lm in (forward.engine.model, forward.reference):
            with lm.plain() as plain, torch.no_grad():
                logits = plain(ids).logits[0].double()
            logps.append(logits.log_softmax(-1)[len(group.prompt) - 1 : -1])
        want = (logps[1].exp() * (logps[1] - logps[0])).sum()
        assert values[f"{side}_kl"].item() == pytest.approx(want.item(), rel=1e-4)
        assert math.isfinite(want) and want > 1e-3


def test_pairs_are_weighed_by_their_likelihood(new_model, tokenizer, pairs):
    """WPO: the mean token's likelihood, over that of the policy's own draws, of both sides."""
    method = method_of("robust", use_weighting=True)
    group = groups_of(method, pairs[:1], tokenizer)[0]
    forward = build(method, new_model())
    got = forward.score(pack([group])).values["weight"]
    want = 1.0
    for tokens in group.completions:
        ids = torch.tensor([group.prompt + tokens])
        with forward.engine.model.plain() as plain, torch.no_grad():
            logp = plain(ids).logits[0].log_softmax(-1)[len(group.prompt) - 1 : -1]
        own = logp.gather(1, ids[0, len(group.prompt) :, None])[:, 0]
        want *= (own - logp.mul(2).logsumexp(-1)).mean().exp().item()
    assert got.item() == pytest.approx(want, rel=1e-4) and not got.requires_grad
    heavy = dataclasses.replace(group, extras={"weight": 3.0})
    forward.method = dataclasses.replace(method, columns=("weight",))
    assert forward.score(pack([heavy])).values["weight"].item() == pytest.approx(3 * want, rel=1e-4)


@pytest.mark.parametrize("loss_type", ["simpo", "cpo", "orpo", "slic", "sft", "unlikelihood"])
def test_what_needs_no_reference_has_none(loss_type):
    method = method_of(loss_type)
    assert not method.needs_reference
    both = dataclasses.replace(method, loss_types=("sigmoid", loss_type))
    assert both.needs_reference


@settings(deadline=None, max_examples=12)
@given(data=st.data())
def test_any_lengths_and_masks(data, tokenizer, small):
    """The mean over scored tokens alone, and each pair's averages, from separate sequences."""
    lengths = st.lists(st.tuples(*[st.integers(1, 9)] * 3), min_size=1, max_size=4)
    groups, chosen = [], []
    for row, (n, *sizes) in enumerate(data.draw(lengths)):
        token = st.integers(5, 300)
        prompt, *texts = (data.draw(st.lists(token, min_size=k, max_size=k)) for k in (n, *sizes))
        masks = [data.draw(st.lists(st.booleans(), min_size=k, max_size=k)) for k in sizes]
        masks = [mask if any(mask) else None for mask in masks]  # None: all are scored
        groups.append(Group(prompt, tuple(texts), tuple(masks), row, {}))
        with small.plain() as plain, torch.no_grad():
            logp = plain(torch.tensor([prompt + texts[0]])).logits[0].log_softmax(-1)
        each = logp[n - 1 : -1].gather(1, torch.tensor(texts[0])[:, None])[:, 0]
        chosen.append(each[torch.tensor(masks[0])] if masks[0] else each)
    method = method_of("sft")
    forward = Forward(TorchEngine(small, torch.device("cpu")), method)
    _, total, _ = take_step(forward, groups, 1)
    assert total / len(groups) == pytest.approx(-torch.cat(chosen).mean().item(), rel=1e-4)
    means = dataclasses.replace(method, loss_types=("simpo",))
    values = forward.score(pack(groups)).values
    loss, _ = means.loss(values, {})
    rejected = values["rejected_logps"] / values["rejected_lengths"]
    gaps = torch.stack([x.mean() for x in chosen]) - rejected
    want = -torch.nn.functional.logsigmoid(0.3 * gaps - 0.5).sum()
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def small(tokenizer):
    return LogpModel(tiny_model(tokenizer, hidden=16, layers=1, heads=2, kv_heads=2, seed=3))


def test_a_split_step_scores_its_reference_once(new_model, tokenizer, pairs, monkeypatch):
    method = method_of("bco_pair_delta")
    forward, calls = build(method, new_model()), []
    real = type(forward.reference).forward

    def spy(self, *args, **options):
        calls.append(self is forward.reference)
        return real(self, *args, **options)

    monkeypatch.setattr(type(forward.reference), "forward", spy)
    take_step(forward, groups_of(method, pairs[:8], tokenizer), SPLIT)
    assert calls.count(True) == len(SPLIT) and calls.count(False) == 2 * len(SPLIT)


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "simpo", "tdpo", "kto", "plackett_luce"])
def test_no_micro_step_asks_for_a_value(name, pairs, tokenizer, monkeypatch):
    """Tensors without data: whatever would wait for a device to know a number raises."""
    method = method_of(name)
    groups = groups_of(method, rows_of(method.kind, pairs[:8]), tokenizer)
    feed = Feed(method, torch.device("cpu"))
    parts = [feed.make(groups[:2]), feed.make(groups[2:])]
    known = method.known(groups)
    forward = build(method, tiny_model(tokenizer, hidden=32, layers=2))
    forward.engine.device = torch.device("meta")
    for model in filter(None, (forward.engine.model, forward.reference)):
        model.to("meta")
    monkeypatch.setattr(forward.engine, "autocast", contextlib.nullcontext)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    sums = MetricSums()
    for part in forward.step(parts, known, 6.0):
        part.loss.backward()
        sums.add(part.metrics)
    assert forward.engine.model.model.get_input_embeddings().weight.grad.is_meta
    with pytest.raises(RuntimeError, match="meta"):  # as it would have in the step
        part.value.item()


@pytest.mark.gpu
def test_no_micro_step_waits_for_a_gpu(pairs, tokenizer):
    """bf16 weights with fp32 masters, a live reference, torch's varlen attention."""
    method = method_of("sigmoid")
    groups = groups_of(method, rows_of(method.kind, pairs[:8]), tokenizer)
    model = tiny_model(tokenizer, hidden=128, layers=2).bfloat16()
    policy = LogpModel(model.cuda())
    engine = TorchEngine(policy, torch.device("cuda"))
    engine.prepare(OptimizerSpec(learning_rate=1e-3, total_steps=9))
    forward = Forward(engine, method, policy.frozen_copy())
    feed = Feed(method, engine.device)
    parts = [feed.make(groups[:2]), feed.make(groups[2:])]
    sums = MetricSums()
    for mode in ("default", "error"):  # kernels are compiled in the first
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for part in forward.step(parts, method.known(groups), 6.0):
                engine.backward(part.loss, 6.0, last=False)
                sums.add(part.metrics)
                value = part.value
            engine.step(value)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert policy.attention(engine.device).name == "varlen"
