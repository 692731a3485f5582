"""Pairwise losses: published values on one fixture, gradients, and what each type refuses."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref import dpo_loss
from fastpref.losses.pairs import F_DIVERGENCES, loss_inputs, uses_reference
from fastpref.losses.preference import LOSSES

F64 = torch.float64
LOGPS = (-4.0, -7.0, -5.0, -6.5)  # chosen, rejected, and under the reference
LENGTHS = {"chosen_lengths": torch.tensor([4]), "rejected_lengths": torch.tensor([5])}
KLS = {"chosen_kl": torch.tensor([1.2], dtype=F64), "rejected_kl": torch.tensor([2.0], dtype=F64)}
GAP = {"margin": torch.tensor([0.5], dtype=F64)}
# a coin of log-odds 0.15 against one of 0.5, by their probabilities
HEADS = [1 / (1 + math.exp(-x)) for x in (0.15, 0.5)]


def coin_kl(p, q):
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def pairs(*values, dtype=F64):
    return [torch.tensor([v], dtype=dtype) for v in values]


def fixture(loss_type, dtype=F64):
    return pairs(*(LOGPS if uses_reference(loss_type) else LOGPS[:2]), dtype=dtype)


VALUES = [
    ("sigmoid", {}, 0.620957),
    ("sigmoid", {"label_smoothing": 0.1}, 0.635957),
    ("sigmoid", {"margin": torch.tensor([0.05])}, math.log1p(math.exp(-0.1))),
    ("sigmoid", {"f_divergence_type": "forward_kl"}, 0.631154),
    ("sigmoid", {"f_divergence_type": "js_divergence"}, 0.660652),
    ("sigmoid", {"f_divergence_type": "alpha_divergence"}, 0.627691),
    ("robust", {"label_smoothing": 0.1}, 0.602207),
    ("ipo", LENGTHS, 21.6225),
    ("ipo_sum", {}, 12.25),
    ("hinge", {}, 0.85),
    ("hinge", {"margin": torch.tensor([0.25])}, 1.1),
    ("hinge", {"beta": 2.0}, 0.0),
    ("slic", {"slic_lambda": 0.0}, 0.0),
    ("slic", {"slic_delta": 4.0, "slic_lambda": 0.0}, 1.0),
    ("slic", {}, 0.4),
    ("exo_pair", {}, 2.505517),
    ("nca_pair", {}, 1.350825),
    ("bco_pair", {}, math.log1p(math.exp(-0.1)) + math.log1p(math.exp(-0.05))),
    ("bco_pair_delta", {"delta": 0.02}, 1.312707),
    # the mean of the two rewards, 0.1 and -0.05
    ("bco_pair_delta", {}, 2 * math.log1p(math.exp(-0.075))),
    ("sppo_hard", {}, 36.25),
    ("sppo", {"win_rate": torch.tensor([0.8], dtype=F64)}, 10.25),
    ("sft", LENGTHS, 1.0),
    ("sft", {**LENGTHS, "mean_chosen_length": 8.0}, 0.5),
    ("unlikelihood", {"unlikelihood_alpha": 0.5}, 0.5),
    ("discopop", {}, 0.849338),
    ("apo_zero", {}, 0.962523),
    ("apo_down", {}, 0.987549),
    ("sigmoid_norm", {"beta": 5.0, **LENGTHS}, 0.160224),
    ("rdpo", LENGTHS, 0.644397),
    ("alpha_dpo", {"beta": 2.5, "gap_mean": 0.3, "gap_std": 0.1, **LENGTHS}, 1.136871),
    ("modpo", GAP, 1.103186),
    ("rpo", LENGTHS, 1.620957),
    ("rpo", {"chosen_nll": torch.tensor([1.0])}, 1.620957),
    ("rpo_sq", GAP, 0.1225),
    ("rpo_bwd_kl", GAP, coin_kl(*HEADS[::-1])),  # of the rewards from the policy
    ("rpo_fwd_kl", GAP, coin_kl(*HEADS)),
    ("simpo", {"beta": 2.0, **LENGTHS}, 0.554355),
    ("cpo", LENGTHS, 1.554355),
    ("orpo", LENGTHS, 1.044623),
    ("tdpo", KLS, 0.658760),
    ("tdpo2", KLS, 0.639659),
]


@pytest.mark.parametrize(("loss_type", "options", "want"), VALUES)
def test_value(loss_type, options, want):
    options = {"loss_type": loss_type, **options}
    out = dpo_loss(*fixture(loss_type), **options)
    torch.testing.assert_close(out.losses, torch.tensor([want], dtype=F64), rtol=0, atol=1e-6)
    twice = dpo_loss(*fixture(loss_type), weight=torch.tensor([2.0]), **options)
    torch.testing.assert_close(twice.losses, 2 * out.losses)
    low = dpo_loss(*fixture(loss_type, torch.bfloat16), **options).losses
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, torch.tensor([want]), rtol=0.02, atol=0.02)


def test_every_type_has_a_value():
    assert {name for name, *_ in VALUES} | {"aot", "aot_unpaired", "aot_global"} == set(LOSSES)


@pytest.mark.parametrize(
    ("loss_type", "want"), [("aot", 0.649608), ("aot_global", 0.649608), ("aot_unpaired", 0.649359)]
)
def test_sorted_values(loss_type, want):
    inputs = ((-4.0, -3.0), (-7.0, -3.5), (-5.0, -3.0), (-6.5, -3.2))
    inputs = [torch.tensor(x, dtype=F64) for x in inputs]
    losses = dpo_loss(*inputs, loss_type=loss_type).losses
    assert losses.mean().item() == pytest.approx(want, abs=1e-6)
    other = [x.flip(0) for x in inputs[:2]]  # pairs in another order: the same ranks
    swapped = dpo_loss(*other, *(x.flip(0) for x in inputs[2:]), loss_type=loss_type).losses
    assert torch.equal(swapped, losses)
    smooth = dpo_loss(*inputs, loss_type=loss_type, label_smoothing=0.1).losses
    assert (smooth > losses).all()


def test_gradient_and_detached_rewards():
    logps = [x.requires_grad_() for x in pairs(*LOGPS[:2])]
    out = dpo_loss(*logps, *pairs(*LOGPS[2:]))
    out.losses.sum().backward()
    assert logps[0].grad.item() == pytest.approx(-0.046257, abs=1e-6)
    assert logps[1].grad.item() == pytest.approx(0.046257, abs=1e-6)
    assert not out.chosen_rewards.requires_grad and not out.rejected_rewards.requires_grad


@pytest.mark.parametrize(
    ("loss_type", "want"),
    [("sigmoid", (0.1, -0.05)), ("cpo", (-0.4, -0.7)), ("simpo", (-0.1, -0.14))],
)
def test_rewards(loss_type, want):
    """Log-ratios, log-probs without a reference, their means where the loss averages."""
    out = dpo_loss(*fixture(loss_type), loss_type=loss_type, **LENGTHS)
    assert torch.cat(out[1:]).tolist() == pytest.approx(want)


def test_an_untrained_policy_and_no_reference():
    logps = pairs(*LOGPS[:2], dtype=torch.float32)
    assert dpo_loss(*logps, *logps).losses.item() == pytest.approx(math.log(2))
    for name in ("sigmoid", "aot"):
        free = dpo_loss(*logps, loss_type=name)
        zeros = dpo_loss(*logps, *pairs(0.0, 0.0, dtype=torch.float32), loss_type=name)
        assert free.losses == zeros.losses and free.chosen_rewards.item() == pytest.approx(-0.4)
    lengths = {k: torch.zeros(1) for k in LENGTHS}
    assert dpo_loss(*pairs(0.0, 0.0), loss_type="ipo", **lengths).losses.item() == 25.0


def test_a_list_of_types_is_their_weighted_sum():
    want = 0.620957 * 0.8 + 0.2 * 1.350825 + 1.0
    smooth = {"label_smoothing": 0.1, "loss_type": ["sigmoid", "sft"], **LENGTHS}  # of the pair
    assert dpo_loss(*pairs(*LOGPS), **smooth).losses.item() == pytest.approx(1.635957, abs=1e-6)
    types = ["sigmoid", "nca_pair", "sft"]
    out = dpo_loss(*pairs(*LOGPS), loss_type=types, loss_weights=[0.8, 0.2, 1.0], **LENGTHS)
    assert out.losses.item() == pytest.approx(want, abs=1e-6)


def inputs_of(loss_type, count, seed):
    """Every tensor that a type reads, far from its kinks, and its numbers."""
    gen = torch.Generator().manual_seed(seed)
    wanted = loss_inputs(loss_type)
    x = [
        (-2 * torch.rand(count, generator=gen, dtype=F64) - 1).requires_grad_()
        for _ in range(4 if uses_reference(loss_type) else 2)
    ]
    options = {k: torch.randint(1, 9, (count,), generator=gen) for k in LENGTHS}
    for name in ("margin", "win_rate", "chosen_kl", "rejected_kl"):
        if name in wanted:
            options[name] = torch.rand(count, generator=gen, dtype=F64)
    if "label_smoothing" in wanted:
        options["label_smoothing"] = 0.2
    return x, options


@pytest.mark.parametrize("loss_type", LOSSES)
def test_gradcheck(loss_type):
    x, options = inputs_of(loss_type, 7, seed=0)
    kls = [options.pop(k).requires_grad_() for k in ("chosen_kl", "rejected_kl") if k in options]
    detached = {"bco_pair_delta": {"delta": 0.1}, "alpha_dpo": {"gap_mean": 0.1, "gap_std": 0.3}}
    options |= detached.get(loss_type, {})  # what is a constant to the gradient moves the value
    if loss_type == "tdpo2":
        kls[0].requires_grad_(False)
    if LOSSES[loss_type].couples != "sort":
        options["weight"] = torch.rand(7, dtype=F64)

    def fn(*x):
        given = dict(zip(("chosen_kl", "rejected_kl"), x[4:], strict=False))
        return dpo_loss(*x[:4], loss_type=loss_type, beta=0.7, **options, **given).losses

    if loss_type == "alpha_dpo":  # its gap is detached: only what is not may be compared
        x[2:] = [t.detach() for t in x[2:]]
        options |= {"alpha_dpo_alpha": 0.0}
    assert torch.autograd.gradcheck(fn, (*x, *kls))


def test_what_is_detached():
    x, options = inputs_of("tdpo2", 3, seed=1)
    kls = {k: options.pop(k).requires_grad_() for k in ("chosen_kl", "rejected_kl")}
    dpo_loss(*x, loss_type="tdpo2", **options, **kls).losses.sum().backward()
    assert kls["chosen_kl"].grad is None and (kls["rejected_kl"].grad > 0).all()
    for name in ("bco_pair_delta", "alpha_dpo"):
        x, options = inputs_of(name, 3, seed=1)
        facts = {"bco_pair_delta": {"delta": None}, "alpha_dpo": {"gap_mean": None}}[name]
        free = torch.autograd.grad(dpo_loss(*x, loss_type=name, **options).losses.sum(), x[:2])
        ratios = [(x[i] - x[i + 2]).detach() for i in (0, 1)]
        if name == "bco_pair_delta":
            facts = {"delta": 0.1 * torch.cat(ratios).mean()}
        else:
            gap = ratios[0] / options["chosen_lengths"] - ratios[1] / options["rejected_lengths"]
            facts = {"gap_mean": gap.mean(), "gap_std": gap.std(correction=0)}
        told = dpo_loss(*x, loss_type=name, **options, **facts).losses.sum()
        for a, b in zip(free, torch.autograd.grad(told, x[:2]), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("loss_type", LOSSES)
@settings(deadline=None, max_examples=30)
@given(
    count=st.integers(1, 9),
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([0.0, 1.0, 30.0, 1000.0]),
    divergence=st.sampled_from(F_DIVERGENCES),
)
def test_any_pairs(loss_type, count, seed, scale, divergence):
    """fp32 against fp64 on log-probs from equal to far apart; finite values, finite gradients."""
    x, options = inputs_of(loss_type, count, seed)
    if "chosen_scores" in loss_inputs(loss_type):
        options["f_divergence_type"] = divergence
    x = [(scale * t.detach()).requires_grad_() for t in x]
    low = [t.detach().float().requires_grad_() for t in x]
    exact = dpo_loss(*(t.double() for t in low), loss_type=loss_type, **options)
    out = dpo_loss(*low, loss_type=loss_type, **options)
    assert not exact.losses.isnan().any()
    if exact.losses.abs().max() > 1e30:
        return  # the definition itself leaves fp32
    torch.testing.assert_close(out.losses.double(), exact.losses, rtol=2e-4, atol=2e-5)
    grads = torch.autograd.grad(out.losses.sum(), low[:2], allow_unused=True)
    assert all(g is None or torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_torch_compile(loss_type):
    torch.compiler.reset()  # a graph for each type is more than one function may have
    x, options = inputs_of(loss_type, 5, seed=3)
    compiled = torch.compile(dpo_loss, fullgraph=True, backend="aot_eager")
    out = compiled(*x, loss_type=loss_type, **options)
    want = dpo_loss(*x, loss_type=loss_type, **options)
    for a, b in zip(out, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("loss_type", LOSSES)
def test_cuda_equals_the_cpu(loss_type):
    x, options = inputs_of(loss_type, 9, seed=2)
    here = dpo_loss(*x, loss_type=loss_type, **options)
    moved = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    there = [t.detach().cuda().requires_grad_() for t in x]
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = dpo_loss(*there, loss_type=loss_type, **moved)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(out.losses.cpu(), here.losses)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_type": "sigmoidd"}, "sigmoid, robust, .*; got 'sigmoidd', nearest 'sigmoid'"),
        ({"loss_type": "ipo"}, "'ipo' needs chosen_lengths and rejected_lengths, got None"),
        ({"loss_type": "rpo"}, "'rpo' needs chosen_nll or chosen_lengths, got None"),
        ({"loss_type": "modpo"}, "'modpo' needs margin, got None"),
        ({"loss_type": "sppo"}, "'sppo' needs win_rate, got None"),
        ({"loss_type": "tdpo"}, "'tdpo' needs chosen_kl and rejected_kl, got None"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "'hinge' has no label_smoothing, got"),
        ({"loss_type": "ipo", "margin": torch.ones(1), **LENGTHS}, "'ipo' has no margin, got"),
        ({"loss_type": "ipo", "weights": 1.0, **LENGTHS}, "'ipo' has no weights, got"),
        (
            {"loss_type": ["sigmoid", "ipo_sum"], "label_smoothing": 0.1},
            "'ipo_sum' has no label_sm",
        ),
        ({"simpo_gamma": 1.0}, "'sigmoid' has no simpo_gamma, got"),
        ({"loss_type": "rdpo", "gamma": 1.0, **LENGTHS}, r"no gamma, .*own options: rdpo_alpha\)"),
        ({"loss_type": "simpo", **LENGTHS}, "'simpo' has no reference, got its log-probs"),
        ({"loss_type": "aot", "weight": torch.ones(1)}, "'aot' sorts pairs and has no weight"),
        ({"loss_type": "exo_pair", "label_smoothing": 0.0}, "above 0 .*'exo_pair'.* got 0.0"),
        ({"loss_type": []}, r"need loss types and a weight for each, got \[\]"),
        ({"loss_weights": [1.0, 2.0]}, r"a weight for each, got \['sigmoid'\] and \[1.0, 2.0\]"),
        ({"f_divergence_type": "kl"}, "need f_divergence_type in reverse_kl, .*; got 'kl'"),
        (
            {"loss_type": "nca_pair", "f_divergence_type": "forward_kl"},
            "'nca_pair' has no f_divergence_type, got 'forward_kl'",
        ),
        ({"beta": 0.0}, "need beta > 0 .*got 0.0"),
        ({"label_smoothing": 0.5}, "label_smoothing in .*got 0.1 and 0.5"),
        ({"ref_rejected_logps": None}, "got ref_chosen_logps alone"),
        ({"rejected_logps": torch.zeros(2)}, r"need rejected_logps \(P,\) = \(1,\), got \(2,\)"),
        ({"margin": torch.ones(1, 1)}, r"need margin \(P,\), got \(1, 1\)"),
        ({"chosen_logps": torch.zeros(())}, r"need chosen_logps \(P,\), got \(\)"),
        ({"chosen_scores": torch.ones(1)}, "need no chosen_scores, which is made here"),
        ({"simpo_gamma": None}, "need no simpo_gamma, which is made here or means nothing"),
        ({"loss_type": "discopop", "discopop_tau": 0.0}, "need discopop_tau > 0, got 0.0"),
    ],
)
def test_refuses(change, message):
    names = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    with pytest.raises(ValueError, match=message):
        dpo_loss(**dict(zip(names, pairs(*LOGPS), strict=True)) | change)


def test_refuses_what_is_no_tensor():
    with pytest.raises(TypeError, match="need a tensor for rejected_logps, got list"):
        dpo_loss(torch.zeros(1), [0.0])
    with pytest.raises(TypeError, match="need a tensor for win_rate, got float"):
        dpo_loss(*pairs(*LOGPS), loss_type="sppo", win_rate=0.5)


def test_a_smoothing_of_zero_asks_for_nothing():
    assert dpo_loss(*pairs(*LOGPS), loss_type="hinge", label_smoothing=0.0).losses.item() == 0.85


def test_refuses_integers():
    with pytest.raises(TypeError, match=r"need floating-point rejected_logps, got torch\.int64"):
        dpo_loss(torch.zeros(1), torch.zeros(1).long())
