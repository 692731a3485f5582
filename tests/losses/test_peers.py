"""Our losses beside TRL's trainers on the same token log-probs: values, gradients and metrics.

TRL's own methods run on a stub of their trainer, whose model answers with the drawn statistics.
"""

import re
from collections import defaultdict
from types import MethodType, SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch.nn.functional import pad

from fastpref import dpo_loss, sequence_logp
from fastpref.kernels.logp_from_logits import TokenStats
from fastpref.losses.pairs import F_DIVERGENCES
from fastpref.methods.dpo import DPO
from fastpref.methods.kto import KTO

pytest.importorskip("trl", minversion="1.16")
trl_dpo = pytest.importorskip("trl.trainer.dpo_trainer")
trl_kto = pytest.importorskip("trl.trainer.kto_trainer")
trl_cpo = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
trl_orpo = pytest.importorskip("trl.experimental.orpo.orpo_trainer")

# scored tokens; the two of a pair one after the other
LENGTHS = torch.tensor([4, 2, 1, 6, 7, 5, 3, 3, 5, 8, 2, 1, 6, 9])
EPS = torch.finfo(torch.float32).eps
SORTING = ["aot", "aot_unpaired"]
SMOOTH = {"label_smoothing": 0.1}
DIVERGENT = ["sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"]
NAMES = [*DIVERGENT, "sft", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down"]
NAMES += SORTING
VARIANTS = {  # TRL's "sigmoid" ignores label_smoothing: ours has it
    "exo_pair": [{"label_smoothing": 1e-3}, SMOOTH],
    "discopop": [{}, {"discopop_tau": 0.5}],
    **{name: [{}, SMOOTH] for name in ("robust", *SORTING)},
}
TYPES = [(name, options) for name in NAMES for options in VARIANTS.get(name, [{}])]
DIVERGENCES = [
    {"f_divergence_type": "forward_kl"},
    {"f_divergence_type": "js_divergence"},
    {"f_divergence_type": "alpha_divergence"},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.5},
]


class Drawn(NamedTuple):
    stats: TokenStats  # (M,) each
    mask: torch.Tensor  # (B, T) which positions are scored
    ref_logp: torch.Tensor  # (B,)
    offsets: torch.Tensor  # (B+1,)

    def sums(self):
        return sequence_logp(self.stats.logp, cu_seqlens=self.offsets)


def draw():
    gen = torch.Generator().manual_seed(0)
    start, place = torch.arange(len(LENGTHS)) % 3, torch.arange(14)
    gap = (torch.arange(len(LENGTHS)) % 4 == 0) & (LENGTHS > 1)  # inside: a turn of the user's
    end = start + LENGTHS + gap
    mask = (place >= start[:, None]) & (place < end[:, None])
    mask &= ~(gap[:, None] & (place == start[:, None] + 1))
    M = int(mask.sum())
    logp, entropy, squares = (-torch.rand(3, M, generator=gen) * 3).unbind()
    stats = TokenStats(
        logp=logp.requires_grad_(),
        entropy=-entropy,
        is_top1=torch.rand(M, generator=gen) < 0.5,
        mean_logit=torch.randn(M, generator=gen),
        log_sum_sq_probs=squares,
    )
    offsets = pad(LENGTHS.cumsum(0), (1, 0))
    noise = 2 * torch.randn(len(LENGTHS), generator=gen)
    return Drawn(stats, mask, sequence_logp(logp.detach(), cu_seqlens=offsets) + noise, offsets)


def split(x):
    """Rows of first completions, rows of second ones."""
    return x[0::2], x[1::2]


def fused_outputs(drawn):
    """What TRL's head gives: padded rows of first completions and of second, 0 where unscored."""
    names = {"log_probs": "logp", "mean_logits": "mean_logit"}
    names |= {name: name for name in ("entropy", "is_top1", "log_sum_sq_probs")}
    values = {theirs: getattr(drawn.stats, ours) for theirs, ours in names.items()}
    zeros = {k: x.new_zeros(drawn.mask.shape) for k, x in values.items()}
    rows = {k: x.masked_scatter(drawn.mask, values[k]) for k, x in zeros.items()}
    return [{k: x[side::2] for k, x in rows.items()} for side in (0, 1)]


def inputs_of(mask, prefix=""):
    tokens = pad(mask, (1, 0)).long()  # a position's statistics are of the token after it
    names = ("input_ids", "attention_mask", "completion_mask")
    return {prefix + name: tokens.clone() for name in names}


def stub(args, *names, **more):
    device = torch.device("cpu")
    accelerator = {name: lambda x: x for name in ("gather", "gather_for_metrics")}
    return SimpleNamespace(
        **{name: getattr(args, name) for name in names},
        args=args,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device=device, **accelerator),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **more,
    )


def config(cls, **options):
    return cls(output_dir="unused", use_cpu=True, bf16=False, report_to="none", **options)


def their_dpo(drawn, loss_type, **options):
    """TRL's loss and metrics; options not given are its own defaults."""
    args = config(trl_dpo.DPOConfig, loss_type=loss_type, **options)
    names = ("beta", "label_smoothing", "ld_alpha", "use_weighting")
    names += ("f_divergence_type", "f_alpha_divergence_coef")
    weights = args.loss_weights or [1.0] * len(args.loss_type)
    trainer = stub(args, *names, loss_types=args.loss_type, loss_weights=weights)
    chosen, rejected = fused_outputs(drawn)
    outputs = SimpleNamespace(**{k: torch.cat([chosen[k], rejected[k]]) for k in chosen})
    inputs = inputs_of(torch.cat(split(drawn.mask)))
    inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = split(drawn.ref_logp)
    loss = trl_dpo.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    return loss, {k: x[0] for k, x in trainer._metrics["train"].items()}


def run(method, drawn, count, **extras):
    """Our loss and metrics: the forward of a method, and the mean over what it counts."""

    def model(batch, outputs):
        return TokenStats(logp, **{name: getattr(drawn.stats, name) for name in outputs})

    logp, extras = drawn.stats.logp, {"ref_logp": drawn.ref_logp, **extras}
    batch = SimpleNamespace(completions=drawn.offsets, target=logp, extras=extras)
    scored = method.score(model, batch, None)
    total, metrics = method.loss(scored.values, {})
    metrics = {k: (x / n).item() for k, (x, n) in {**metrics, **scored.metrics}.items()}
    return total / count, metrics | method.derived(metrics)


def our_dpo(drawn, loss_type, discopop_tau=None, **options):
    types = (loss_type,) if isinstance(loss_type, str) else tuple(loss_type)
    own = {} if discopop_tau is None else {"discopop_tau": discopop_tau}
    return run(DPO(loss_types=types, options=own, **options), drawn, len(drawn.ref_logp) // 2)


def assert_same(drawn, ours, theirs):
    """Equal but for rounding, and so are the gradients in the token log-probs, which are not 0."""
    (grad,) = torch.autograd.grad(ours, drawn.stats.logp)
    (want,) = torch.autograd.grad(theirs, drawn.stats.logp)
    assert want.any()
    for got, wanted in ((ours, theirs), (grad, want)):
        error, size = (got - wanted).abs().max(), wanted.abs().max()
        assert error <= 32 * EPS * size, f"{got}, TRL {wanted}, error {error / size:.1e}"


def check_dpo(loss_type, **options):
    if loss_type == "exo_pair":
        options = SMOOTH | options
    drawn = draw()
    ours, _ = our_dpo(drawn, loss_type, **options)
    theirs, _ = their_dpo(drawn, loss_type, **options)
    assert_same(drawn, ours, theirs)
    if not options.keys() & {"use_weighting", "ld_alpha"}:
        refs = () if loss_type == "sft" else split(drawn.ref_logp)
        torch.testing.assert_close(of_sums(drawn, loss_type, *refs, **options).mean(), ours)


def of_sums(drawn, loss_type, *refs, **options):
    """dpo_loss itself, without a forward."""
    chosen, rejected = split(LENGTHS)
    options |= {"chosen_lengths": chosen, "rejected_lengths": rejected}
    return dpo_loss(*split(drawn.sums()), *refs, loss_type=loss_type, **options).losses


def metadata(cls, name):
    return cls.__dataclass_fields__[name].metadata


def test_these_are_all_types():
    with pytest.raises(ValueError, match="Should be one of") as error:
        their_dpo(draw(), "unknown")
    known = re.findall(r"'(\w+)'", str(error.value).split("Should be")[1])
    assert sorted(NAMES) == sorted(known)
    divergences = metadata(trl_dpo.DPOConfig, "f_divergence_type")["help"]
    assert sorted([*DIVERGENT, "sft"]) == sorted(re.findall(r"`'(\w+)'`", divergences))
    assert sorted(F_DIVERGENCES) == sorted(re.findall(r"`(\w+)`", divergences))
    unpaired = metadata(trl_kto.KTOConfig, "loss_type")["choices"]
    assert sorted(unpaired) == ["apo_zero_unpaired", "kto"]


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize(("loss_type", "options"), TYPES)
def test_pairs(loss_type, options, beta):
    check_dpo(loss_type, beta=beta, **options)


@pytest.mark.parametrize("options", DIVERGENCES, ids=lambda x: "-".join(map(str, x.values())))
@pytest.mark.parametrize("loss_type", [*DIVERGENT, ["hinge", "sft"]], ids=str)
def test_divergences(loss_type, options):
    check_dpo(loss_type, **options)


SUMS = [["sigmoid", "sft"], ["apo_zero", "ipo"], ["sigmoid", "bco_pair", "sft"]]


@pytest.mark.parametrize("loss_type", SUMS, ids="+".join)
def test_sums_of_types(loss_type):
    check_dpo(loss_type)
    check_dpo(loss_type, loss_weights=[0.8, 0.3, 1.5][: len(loss_type)])


# TRL refuses what sorts, and cannot weigh "sft": it multiplies an expanded tensor in place
@pytest.mark.parametrize("loss_type", [x for x in NAMES if x not in ("sft", *SORTING)])
def test_weighting(loss_type):
    if loss_type != "hinge":
        return check_dpo(loss_type, use_weighting=True)
    # TRL has no gradient: it multiplies the relu's output in place
    values = [of(draw(), loss_type, use_weighting=True)[0].detach() for of in (our_dpo, their_dpo)]
    torch.testing.assert_close(*values)


@pytest.mark.parametrize("ld_alpha", [0.0, 0.4])
@pytest.mark.parametrize("loss_type", NAMES)
def test_tail_weights(loss_type, ld_alpha):
    check_dpo(loss_type, ld_alpha=ld_alpha)


def test_metrics_of_pairs():
    drawn = draw()
    (_, ours), (_, theirs) = (of(drawn, "sigmoid", ld_alpha=0.4) for of in (our_dpo, their_dpo))
    assert ours == pytest.approx({name: theirs[name] for name in DPO.metric_names}, rel=1e-5)


def their_kto(drawn, labels, **options):
    """Of groups of a completion and one of another prompt, the latter read for "kto" alone."""
    args = config(trl_kto.KTOConfig, **options)
    own, other = fused_outputs(drawn)
    answers = iter([other, own] if args.loss_type == "kto" else [own])
    names = ("beta", "loss_type", "desirable_weight", "undesirable_weight")
    trainer = stub(args, *names, calculate_KL=args.loss_type == "kto")
    trainer._compute_kl_logps = MethodType(trl_kto.KTOTrainer._compute_kl_logps, trainer)
    masks, refs = split(drawn.mask), split(drawn.ref_logp)
    inputs = inputs_of(masks[0]) | inputs_of(masks[1], "KL_")
    inputs |= {"label": labels, "ref_logps": refs[0], "ref_KL_logps": refs[1]}

    def model(**_):
        return SimpleNamespace(**next(answers))

    loss = trl_kto.KTOTrainer._compute_loss(trainer, model, inputs, False)
    return loss, {k: x[0] for k, x in trainer._metrics["train"].items()}


def first_ones(drawn):
    """Without the second completions of groups."""
    first = (torch.arange(len(LENGTHS)) % 2 == 0).repeat_interleave(LENGTHS)
    stats = TokenStats(*(x[first] for x in drawn.stats))
    offsets = pad(LENGTHS[0::2].cumsum(0), (1, 0))
    return Drawn(stats, drawn.mask[0::2], drawn.ref_logp[0::2], offsets)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.3, 0.6)])
@pytest.mark.parametrize("kl", [-3.0, 3.0])
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_unpaired(loss_type, kl, weights):
    drawn, labels = draw(), torch.arange(len(LENGTHS) // 2) % 3 == 0
    drawn.ref_logp[1::2] = drawn.sums().detach()[1::2] - kl
    options = dict(zip(("desirable_weight", "undesirable_weight"), weights, strict=True))
    theirs, wanted = their_kto(drawn, labels, loss_type=loss_type, **options)
    method = KTO(loss_type=loss_type, **options)
    seen = drawn if method.mismatches else first_ones(drawn)
    ours, metrics = run(method, seen, len(labels), label=labels)
    assert_same(drawn, ours, theirs)
    assert wanted["kl"] == pytest.approx(max(kl, 0.0) if method.mismatches else 0.0)
    common = metrics.keys() & wanted.keys()
    assert metrics.keys() - common == {"rewards/accuracies", "mean_token_accuracy"}
    want = {name: wanted[name] for name in common}
    assert {name: metrics[name] for name in common} == pytest.approx(want, rel=1e-5)


CPO = [  # TRL's type, whether it averages, ours and its options
    ("sigmoid", False, "cpo", {"cpo_alpha": 0.0}),
    ("sigmoid", False, "cpo", {"cpo_alpha": 0.0, **SMOOTH}),
    ("simpo", True, "simpo", {}),
    ("simpo", True, "simpo", {"simpo_gamma": 1.4, **SMOOTH}),
    ("hinge", False, "hinge", {}),
    ("ipo", True, "ipo", {}),
]


@pytest.mark.parametrize(("loss_type", "averages", "name", "options"), CPO)
def test_cpo(loss_type, averages, name, options):
    """The term of the ranks alone: CPO's likelihood is added outside."""
    drawn, options = draw(), {"beta": 0.3, **options}
    args = config(trl_cpo.CPOConfig, loss_type=loss_type, **options)
    trainer = stub(args, "beta", "alpha", "loss_type", "simpo_gamma", "label_smoothing")
    logps = drawn.sums() / LENGTHS if averages else drawn.sums()
    theirs, *_ = trl_cpo.CPOTrainer.cpo_loss(trainer, *split(logps))
    ours = of_sums(drawn, name, **options)
    assert_same(drawn, ours.mean(), theirs.mean())


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_orpo(beta):
    """The odds ratio alone: TRL's likelihood is of the prompt as well."""
    drawn = draw()
    trainer = stub(config(trl_orpo.ORPOConfig, beta=beta), "beta")
    theirs, *_ = trl_orpo.ORPOTrainer.odds_ratio_loss(trainer, *split(drawn.sums() / LENGTHS))
    likelihood = -(drawn.sums() / LENGTHS)[0::2]
    ours = of_sums(drawn, "orpo", beta=beta) - likelihood
    assert_same(drawn, ours.mean(), -theirs.mean())
