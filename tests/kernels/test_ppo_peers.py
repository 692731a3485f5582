"""The PPO ops beside verl's and OpenRLHF's own code, and beside plain Python.

VERL_SOURCE and OPENRLHF_SOURCE name folders that hold a checkout each (compared at b178a3c and
3c3be62): their files are run, with stubs for what they import and these functions do not need.
The loops take floats, one token after the other, and find gradients by central differences.
"""

import importlib
import math
import os
import random
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fastpref.kernels.gae import gae, ppo_advantages
from fastpref.kernels.ppo_value import ppo_value_loss
from fastpref.kernels.sequences import AGGREGATIONS
from fastpref.kernels.whiten import token_moments, whiten
from fastpref.losses.advantage import group_advantages
from fastpref.losses.policy import POLICY_LOSSES, ppo_policy_loss

DEV = "cuda" if torch.cuda.is_available() else "cpu"
NORM = "seq-mean-token-sum-norm"
ESTIMATORS = ("k1", "k2", "k3")


# checkouts
class Anything:
    """An instance of what was not loaded: takes every argument, keeps the named ones."""

    def __init__(self, *args, **fields):
        self.__dict__.update(fields)


class Stub(ModuleType):
    """Holds a class of any name; of a package the files beside it can be imported."""

    def __init__(self, name, folder):
        super().__init__(name)
        self.__path__ = [str(folder.joinpath(*name.split(".")))]

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        found = sys.modules.get(f"{self.__name__}.{name}") or type(name, (Anything,), {})
        setattr(self, name, found)
        return found


def load(variable, stubs, *names):
    """Modules of the checkout that an environment variable names; sys.modules stays as it was."""
    package = names[0].split(".")[0]
    folder = Path(os.environ.get(variable, ""))
    if variable not in os.environ or not (folder / package).is_dir():
        pytest.skip(f"need {variable}, a folder with {package}/; got {os.environ.get(variable)!r}")
    roots = {name.split(".")[0] for name in stubs}

    def take_out():
        return {k: sys.modules.pop(k) for k in list(sys.modules) if k.split(".")[0] in roots}

    before = take_out()
    sys.modules.update({name: Stub(name, folder) for name in stubs})
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        take_out()
        sys.modules.update(before)


@pytest.fixture(scope="module")
def verl():
    stubs = ("omegaconf", "tensordict", "transformers", "verl", "verl.utils", "verl.trainer")
    stubs += ("verl.trainer.ppo", "verl.trainer.config", "verl.workers", "verl.workers.config")
    return load("VERL_SOURCE", stubs, "verl.trainer.ppo.core_algos")[0]


@pytest.fixture(scope="module")
def openrlhf():
    """Its losses, its utils and its experience maker in one namespace."""
    stubs = ["ray", "deepspeed", "openrlhf"]
    stubs += [f"openrlhf.{name}" for name in ("models", "utils", "trainer", "trainer.ray")]
    stubs += [f"openrlhf.utils.{name}" for name in ("logging_utils", "seqlen_balancing")]
    stubs += ["openrlhf.trainer.ray.launcher", "openrlhf.trainer.ppo_utils"]
    stubs += [f"openrlhf.trainer.ppo_utils.{name}" for name in ("experience", "length_penalty")]
    names = ("models.loss", "models.utils", "trainer.ppo_utils.experience_maker")
    modules = load("OPENRLHF_SOURCE", stubs, *(f"openrlhf.{name}" for name in names))
    return SimpleNamespace(**{k: v for module in modules for k, v in vars(module).items()})


# beside checkouts
@pytest.fixture
def dtype(backend):
    return torch.float64 if backend in ("cpp", "torch") else torch.float32


def draw(dtype, *, gaps=True, far=False):
    """(B, T) of each kind; a sequence is full, one has a token, one none."""
    gen = torch.Generator().manual_seed(0)
    lengths = torch.tensor([13, 5, 1, 0, 8, 13, 2])

    def normal(scale=1.0, shape=(7, 13)):
        return scale * torch.randn(shape, generator=gen, dtype=torch.float64)

    mask = torch.arange(13) < lengths[:, None]
    if gaps:
        mask &= (torch.rand(7, 13, generator=gen) > 0.3) | (lengths[:, None] == 1)
    logp = -normal().abs()
    spread = 15.0 if far else 0.4
    x = {
        "logp": logp,
        "old_logp": logp + normal(spread),
        "ref_logp": logp + normal(spread),
        "advantages": normal(),
        "is_weight": normal().exp().clamp(max=2),
        "entropy": normal().abs(),
        "values": normal(),
        "old_values": normal(0.3),
        "returns": normal(),
        "scores": normal(shape=(7,)),
    }
    x["old_values"] += x["values"]
    x = {k: v.to(DEV, dtype) for k, v in x.items()}
    flags = mask.to(DEV)
    return SimpleNamespace(**x, mask=flags, counts=flags.to(dtype))


def only(x, *names):
    return {name: getattr(x, name) for name in names}


def assert_close(ours, theirs, dtype=None):
    """To the 1e-8 that peers add to denominators, or to rounding; both in each other's order."""
    assert ours.keys() == theirs.keys()
    for name, want in theirs.items():
        got, want = torch.as_tensor(ours[name]).cpu(), torch.as_tensor(want).cpu()
        close = 1e-7 if (dtype or got.dtype) == torch.float64 else 1e-5
        torch.testing.assert_close(
            got.double(), want.double(), rtol=close, atol=close, msg=lambda m, n=name: f"{n}: {m}"
        )


def with_gradient(fn, leaf):
    """Loss, its gradient in ``leaf`` and the metrics of ``fn``, which returns (loss, metrics)."""
    leaf = leaf.clone().requires_grad_()
    loss, metrics = fn(leaf)
    (grad,) = torch.autograd.grad(loss, leaf)
    return {"loss": loss.detach(), "gradient": grad} | metrics


def our_policy(x, counted, mean=True, **options):
    """As with_gradient; ``counted`` names what is compared and which of our metrics it adds up.

    verl divides the last aggregation by T alone, not by B: our sum is that.
    """
    options = only(x, "old_logp", "advantages", "mask") | options

    def ours(logp):
        out = ppo_policy_loss(logp=logp, **options)
        metrics = {k: sum(out.metrics[n] for n in names) for k, names in counted.items()}
        tokens = out.metrics["tokens"]
        loss = out.loss / out.count if mean else out.loss
        return loss, {k: v / tokens for k, v in metrics.items()}

    return with_gradient(ours, x.logp)


VERL_METRICS = {
    "actor/pg_clipfrac": ("clipfrac_low", "clipfrac_high"),
    "actor/pg_clipfrac_lower": ("clipfrac_dual",),
    "actor/ppo_kl": ("ppo_kl",),
}
VERL_LOSSES = [(name, mode) for name in ("vanilla", "cispo") for mode in AGGREGATIONS]
# whatever it is told, verl's gspo aggregates by sequences
VERL_LOSSES += [("gspo", "seq-mean-token-mean")]


def verl_policy(verl, name, x, mode, weights=None, low=0.2, high=0.28, c=3.0, extra=None):
    config = verl.ActorConfig(
        clip_ratio=9.0,  # the two beside it take its place
        clip_ratio_low=low,
        clip_ratio_high=high,
        get={"clip_ratio_c": c}.get,
        global_batch_info={},
    )

    def theirs(logp):
        args = (x.old_logp, logp, x.advantages, x.counts, mode, config, weights)
        loss, metrics = verl.get_policy_loss_fn(name)(*args)
        return loss + (extra(logp) if extra else 0.0), metrics

    return with_gradient(theirs, x.logp)


@pytest.mark.parametrize(("name", "mode"), VERL_LOSSES)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "importance"])
def test_verl_policy(verl, dtype, name, mode, weighted):
    x = draw(dtype)
    weights = x.is_weight if weighted else None
    low, high = (0.05, 0.1) if name == "gspo" else (0.2, 0.28)
    theirs = verl_policy(verl, name, x, mode, weights, low, high)
    options = {"clip_low": low, "clip_high": high, "is_weight": weights, "loss_agg_mode": mode}
    if name == "vanilla":
        options["dual_clip"] = 3.0  # verl's default; ours is none
    loss_type = {"vanilla": "ppo"}.get(name, name)
    ours = our_policy(x, VERL_METRICS, mode != NORM, loss_type=loss_type, **options)
    assert_close(ours, theirs)
    assert 0 < theirs["actor/pg_clipfrac"] < 1


@pytest.mark.parametrize("name", ["vanilla", "cispo"])
def test_verl_policy_far_from_the_old_one(verl, dtype, name):
    """verl clamps log-ratios of tokens to 20 as we do; those of gspo's sequences to 10."""
    x = draw(dtype, far=True)
    assert ((x.logp - x.old_logp).abs() > 20)[x.mask].any()
    theirs = verl_policy(verl, name, x, "token-mean", low=0.2, high=0.28)
    options = {"dual_clip": 3.0} if name == "vanilla" else {}
    loss_type = {"vanilla": "ppo"}.get(name, name)
    ours = our_policy(x, VERL_METRICS, loss_type=loss_type, clip_high=0.28, **options)
    assert_close(ours, theirs)
    assert name == "cispo" or theirs["actor/pg_clipfrac_lower"] > 0


@pytest.mark.parametrize("estimator", [*ESTIMATORS, "k3+"])
@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_verl_kl_and_entropy_beside_the_policy(verl, dtype, estimator, mode):
    """verl documents k3+, the value of k3 with the gradient of k2, and then raises for it."""
    x = draw(dtype)

    def kl_penalty(logp):
        if estimator != "k3+":
            return verl.kl_penalty(logp, x.ref_logp, estimator)
        value, bent = (verl.kl_penalty(logp, x.ref_logp, name) for name in ("k3", "k2"))
        return value.detach() + bent - bent.detach()

    def extra(logp):
        terms = (kl_penalty(logp), x.entropy)
        kl, entropy = (verl.agg_loss(y, x.counts, mode) for y in terms)
        return 0.3 * kl - 0.05 * entropy

    theirs = verl_policy(verl, "vanilla", x, mode, extra=extra)
    kl = kl_penalty(x.logp)
    theirs["kl"] = (kl * x.counts).sum() / x.counts.sum()
    ours = our_policy(
        x,
        VERL_METRICS | {"kl": ("kl",)},
        mode != NORM,
        clip_high=0.28,
        dual_clip=3.0,
        kl_coef=0.3,
        kl_estimator=estimator,
        entropy_coef=0.05,
        loss_agg_mode=mode,
        **only(x, "ref_logp", "entropy"),
    )
    assert_close(ours, theirs)


def kl_of_tokens(x, estimator):
    """Without a future an advantage is the reward."""
    inputs = only(x, "logp", "ref_logp")
    out = ppo_advantages(
        scores=None, values=None, kl_coef=1.0, kl_estimator=estimator, gamma=0.0, **inputs
    )
    return -out.advantages


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("far", [False, True], ids=["near", "far"])
def test_kl_of_tokens(verl, openrlhf, dtype, estimator, far):
    """verl caps k3 at 10, OpenRLHF, which works in fp32, any estimate at +-10."""
    x = draw(dtype, far=far)
    ours = kl_of_tokens(x, estimator)
    capped = ours.clamp(max=10) if estimator == "k3" else ours
    assert_close({"kl": capped}, {"kl": verl.kl_penalty(x.logp, x.ref_logp, estimator)})
    theirs = openrlhf.compute_approx_kl(x.logp, x.ref_logp, estimator)
    assert_close({"kl": ours.clamp(-10, 10)}, {"kl": theirs}, torch.float32)
    assert ((ours.abs() > 10).any()) == far


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_verl_value(verl, dtype, mode):
    x = draw(dtype)

    def theirs(values):
        args = (values, x.returns, x.old_values, x.counts, 0.2, mode)
        loss, clipped = verl.compute_value_loss(*args)
        return loss, {"clipfrac": clipped}

    def ours(values):
        inputs = only(x, "returns", "old_values", "mask")
        out = ppo_value_loss(values=values, loss_agg_mode=mode, **inputs)
        metrics = {"clipfrac": out.metrics["clipfrac"] / out.metrics["tokens"]}
        return out.loss / (1 if mode == NORM else out.count), metrics

    assert_close(with_gradient(ours, x.values), with_gradient(theirs, x.values))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_verl_gae_of_shaped_rewards(verl, dtype, estimator):
    """Whitened by Bessel's variance, over masks with gaps; verl's returns go on where masked."""
    x = draw(dtype)
    rewards = -0.1 * verl.kl_penalty(x.logp, x.ref_logp, estimator)
    row = x.mask.any(1).nonzero()[:, 0]
    last = torch.stack([x.mask[b].nonzero()[-1, 0] for b in row])
    rewards[row, last] += x.scores[row]
    advantages, returns = verl.compute_gae_advantage_return(rewards, x.values, x.counts, 0.97, 0.9)
    inputs = only(x, "scores", "logp", "ref_logp", "values", "mask")
    ours = ppo_advantages(**inputs, kl_coef=0.1, kl_estimator=estimator, gamma=0.97, lam=0.9)
    white = whiten(ours.advantages, ours.moments, mask=x.mask, unbiased=True)
    assert_close(
        {"advantages": white, "returns": ours.returns},
        {"advantages": advantages * x.mask, "returns": returns * x.mask},
    )
    plain = gae(rewards=rewards, values=x.values, mask=x.mask, gamma=0.97, lam=0.9)
    assert_close(dict(enumerate(plain)), dict(enumerate(ours[:2])))


def test_verl_reinforce_plus_plus(verl, dtype):
    """Whitened returns-to-go; without gaps, at which verl starts anew and we go on."""
    x = draw(dtype, gaps=False)
    rewards = 0.0 * x.logp
    row = x.mask.any(1).nonzero()[:, 0]
    rewards[row, x.mask.sum(1)[row] - 1] = x.scores[row]
    rewards = verl.compute_rewards(rewards, x.logp, x.ref_logp, 0.1) * x.mask
    advantages, returns = verl.compute_reinforce_plus_plus_outcome_advantage(
        rewards, x.counts, config=SimpleNamespace(gamma=0.97)
    )
    inputs = only(x, "scores", "logp", "ref_logp", "mask")
    ours = ppo_advantages(**inputs, values=None, kl_coef=0.1, gamma=0.97)
    white = whiten(
        ours.advantages, token_moments(ours.advantages, mask=x.mask), mask=x.mask, unbiased=True
    )
    assert_close(
        {"advantages": white, "returns": ours.returns},
        {"advantages": advantages, "returns": returns * x.mask},
    )


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo", "rloo_vectorized"])
def test_verl_groups(verl, dtype, estimator):
    """Of one completion verl takes the score itself (its rloo_vectorized 0), we 0."""
    scores = draw(dtype).scores
    groups, alone = torch.tensor([0, 2, 3, 7], device=DEV), 2
    rewards, mask = scores.cpu()[:, None].clone(), torch.ones(7, 1)
    fn = verl.get_adv_estimator_fn({"dr_grpo": "grpo"}.get(estimator, estimator))
    options = {"epsilon": 1e-4}  # ours; verl's own is 1e-6
    if estimator == "dr_grpo":
        options["norm_adv_by_std_in_grpo"] = False
    index = torch.tensor([0, 0, 1, 2, 2, 2, 2]).numpy()
    theirs = fn(rewards, mask.to(rewards.dtype), index, **options)[0][:, 0]
    ours = group_advantages(scores, groups, estimator=estimator.removesuffix("_vectorized")).cpu()
    if estimator != "rloo_vectorized":
        score = scores[alone].item() / (1 + 1e-4 if estimator == "grpo" else 1)
        assert theirs[alone].item() == pytest.approx(score)
        theirs[alone] = 0.0
    assert_close({"advantages": ours}, {"advantages": theirs})


OPENRLHF_METRICS = {"clipped": ("clipfrac_low", "clipfrac_high"), "ppo_kl": ("ppo_kl",)}


@pytest.mark.parametrize("token_level", [True, False], ids=["tokens", "sequences"])
@pytest.mark.parametrize("options", [{}, {"dual_clip": 1.05}, {"tis": True}], ids=str)
@pytest.mark.parametrize("loss_type", ["ppo", "gspo"])
def test_openrlhf_policy(openrlhf, dtype, loss_type, token_level, options):
    """gspo by an advantage a sequence: of tokens that have their own OpenRLHF's ratio, whose
    gradient spreads over the sequence, is not GSPO-token, which we and verl have."""
    x = draw(dtype)
    low, high = (0.01, 0.02) if loss_type == "gspo" else (0.2, 0.28)
    bounds = (low, high, options.get("dual_clip"))
    tis = "tis" in options and loss_type == "ppo"
    if loss_type == "gspo":
        x.advantages = -x.scores
    loss_fn = openrlhf.PolicyLoss(*bounds, token_level, loss_type, tis, [0.5, 2.0])
    each = x.advantages if loss_type == "ppo" else x.advantages[:, None].expand_as(x.logp)

    def theirs(logp):
        loss, clipped, kl, _ = loss_fn(logp, x.old_logp, each, x.counts, x.ref_logp)
        return loss, {"clipped": clipped, "ppo_kl": kl}

    by_token = token_level and loss_type == "ppo"  # its gspo is always by sequence
    ours = {
        "clip_low": low,
        "clip_high": high,
        "dual_clip": bounds[2],
        "loss_type": loss_type,
        "loss_agg_mode": "token-mean" if by_token else "seq-mean-token-mean",
    }
    if tis:
        ours["is_weight"] = (x.old_logp - x.ref_logp).exp().clamp(0.5, 2.0)
    got = our_policy(x, OPENRLHF_METRICS, **ours)
    assert_close(got, with_gradient(theirs, x.logp))
    assert got["clipped"] > 0


def test_openrlhf_policy_far_from_the_old_one(openrlhf, dtype):
    """It clamps the ratio as we do, but not its ppo_kl."""
    x = draw(dtype, far=True)
    loss_fn = openrlhf.PolicyLoss(dual_clip=3.0)

    def theirs(logp):
        loss, clipped, _, _ = loss_fn(logp, x.old_logp, x.advantages, x.counts)
        return loss, {"clipped": clipped}

    ours = our_policy(x, {"clipped": OPENRLHF_METRICS["clipped"]}, dual_clip=3.0)
    assert_close(ours, with_gradient(theirs, x.logp))


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("clip", [0.2, None])
def test_openrlhf_value(openrlhf, dtype, clip, mode):
    x = draw(dtype)
    loss_fn = openrlhf.ValueLoss(clip, mode == "token-mean")
    old = x.old_values if clip else None

    def theirs(values):
        return loss_fn(values, old, x.returns, x.counts), {}

    def ours(values):
        inputs = {"returns": x.returns, "old_values": old, "mask": x.mask, "clip": clip}
        return ppo_value_loss(
            values=values, loss_agg_mode=mode, reduction="mean", **inputs
        ).loss, {}

    assert_close(with_gradient(ours, x.values), with_gradient(theirs, x.values))


@pytest.mark.parametrize("critic", [True, False], ids=["gae", "reinforce"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_openrlhf_advantages(openrlhf, dtype, estimator, critic):
    """From scores and log-probs to whitened advantages, by the variance over n.

    It counts masked tokens as steps of value 0: gaps are for returns-to-go without discount.
    """
    x = draw(dtype, gaps=not critic)
    gamma = 0.97 if critic else 1.0
    name = "gae" if critic else "reinforce"
    kl = openrlhf.compute_approx_kl(x.logp, x.ref_logp, estimator).to(dtype)
    advantage = SimpleNamespace(estimator=name, gamma=gamma, lambd=0.9, no_std_norm=False)
    args = SimpleNamespace(
        algo=SimpleNamespace(advantage=advantage),
        reward=SimpleNamespace(clip_range=None),
        rollout=SimpleNamespace(n_samples_per_prompt=1),
    )
    maker = object.__new__(openrlhf.RemoteExperienceMaker)
    maker.strategy, maker.advantage_estimator = SimpleNamespace(args=args), name
    maker.kl_ctl = SimpleNamespace(value=0.1)
    rollout = SimpleNamespace(
        **{"index": list(range(7)), "rewards": x.scores, "values": x.values, "kl": kl},
        **{"action_mask": x.mask, "info": {}},
    )
    (theirs,) = maker.compute_advantages_and_returns([rollout])
    inputs = only(x, "scores", "logp", "ref_logp", "mask") | {"kl_estimator": estimator}
    inputs["values"] = x.values if critic else None
    ours = ppo_advantages(**inputs, kl_coef=0.1, gamma=gamma, lam=0.9)
    white = whiten(ours.advantages, ours.moments, mask=x.mask)
    assert_close(
        {"advantages": white, "returns": ours.returns},
        {"advantages": theirs.advantages * x.mask, "returns": theirs.returns * x.mask},
        torch.float32,
    )


def test_openrlhf_cumulative_returns(openrlhf, dtype):
    x = draw(dtype, gaps=False)
    maker = openrlhf.RemoteExperienceMaker
    reward = openrlhf.compute_reward(x.scores, 0.1, x.logp - x.ref_logp, x.mask)
    theirs = maker.get_cumulative_returns(None, reward, x.mask, 0.9)
    inputs = only(x, "scores", "logp", "ref_logp", "mask")
    ours = ppo_advantages(**inputs, values=None, kl_coef=0.1, gamma=0.9)
    assert_close({"returns": ours.returns}, {"returns": theirs * x.mask})
    advantages, returns = maker.get_advantages_and_returns(None, x.values, reward, x.mask, 0.9, 0.8)
    ours = ppo_advantages(**inputs, values=x.values, kl_coef=0.1, gamma=0.9, lam=0.8)
    theirs = {"advantages": advantages * x.mask, "returns": returns * x.mask}
    assert_close({"advantages": ours.advantages, "returns": ours.returns}, theirs)


# beside plain Python
def check(example, backend, strategies, count):
    """As many drawn examples; few in the interpreter, which takes milliseconds a sequence."""
    phases = tuple(Phase)
    if backend == "triton":
        count, phases = max(1, count // 7), (Phase.generate,)
    drawn = settings(deadline=None, derandomize=True, max_examples=count, phases=phases)
    drawn(given(**strategies)(example))()


MASKS = st.lists(st.lists(st.booleans(), max_size=9), max_size=5)
SHARES = st.sampled_from([0.0, 0.5, 0.95, 1.0])
SEEDS = st.integers(0, 2**32)
FLAG = st.booleans()


def numbers(rng, masks, low, high):
    """A number a token, of so few bits that fp32 holds it and its differences."""
    return [[rng.randint(low << 10, high << 10) / 1024 for _ in mask] for mask in masks]


def lay(rows, masks, packed, dtype=torch.float64):
    """(T,) or (B, longest + 2); NaN wherever a token does not count."""
    width = 0 if packed else max(map(len, masks), default=0) + 2
    flat = []
    for row, mask in zip(rows, masks, strict=True):
        flat += [x if keep else math.nan for x, keep in zip(row, mask, strict=True)]
        flat += [math.nan] * (width - len(row))
    shape = (-1,) if packed else (len(masks), width)
    return torch.tensor(flat, dtype=dtype, device=DEV).reshape(shape)


def place(masks, packed):
    """Where tokens are and count, as the ops are told."""
    found = {"mask": lay([[0.0] * len(mask) for mask in masks], masks, packed).isfinite()}
    if packed:
        ends = [sum(map(len, masks[:b])) for b in range(len(masks) + 1)]
        found["cu_seqlens"] = torch.tensor(ends, device=DEV)
    return found


def dtypes(backend):
    return [torch.float64, torch.float32] if backend in ("cpp", "torch") else [torch.float32]


def assert_tokens(got, rows, masks, packed, close):
    """Also exactly 0 where nothing counts."""
    want = lay(rows, masks, packed).nan_to_num(0.0)
    torch.testing.assert_close(got.double(), want, rtol=close, atol=close)
    assert got[~place(masks, packed)["mask"]].eq(0).all()


def loop_kl(d, estimator):
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d * d / 2
    d = min(max(d, -20.0), 20.0)
    return math.expm1(-d) + d


def loop_advantages(mask, rewards, values, end, gamma, lam):
    """sum_l (gamma lambda)^l delta_{t+l}, over the tokens that count."""
    at = [t for t, keep in enumerate(mask) if keep]
    after = [values[t] for t in at[1:]] + [end]
    delta = [rewards[t] + gamma * v - values[t] for t, v in zip(at, after, strict=False)]
    out = [0.0] * len(mask)
    for i, t in enumerate(at):
        out[t] = math.fsum((gamma * lam) ** (j - i) * delta[j] for j in range(i, len(at)))
    return out


def gae_as_loops(backend, masks, seed, gamma, lam, bootstrapped):
    rng = random.Random(seed)
    rewards, values = (numbers(rng, masks, -2, 2) for _ in range(2))
    ends = [rng.randint(-999, 999) / 512 * bootstrapped for _ in masks]
    rows = zip(masks, rewards, values, ends, strict=True)
    want = [loop_advantages(*row, gamma, lam) for row in rows]
    sums = [[a + v for a, v in zip(*row, strict=True)] for row in zip(want, values, strict=True)]
    for dtype in dtypes(backend):
        for packed in (False, True):
            inputs = {"rewards": rewards, "values": values}
            inputs = {k: lay(v, masks, packed, dtype) for k, v in inputs.items()}
            end = torch.tensor(ends, dtype=dtype, device=DEV) if bootstrapped else None
            where = place(masks, packed)
            found = gae(**inputs, **where, gamma=gamma, lam=lam, bootstrap=end)
            close = 1e-12 if dtype == torch.float64 else 1e-5
            for got, rows in zip(found, (want, sums), strict=True):
                assert got.dtype == dtype
                assert_tokens(got, rows, masks, packed, close)


def test_gae_as_loops(backend):
    def example(**drawn):
        gae_as_loops(backend, **drawn)

    drawn = {"masks": MASKS, "seed": SEEDS, "gamma": SHARES, "lam": SHARES, "bootstrapped": FLAG}
    check(example, backend, drawn, 30)


def test_gae_past_a_block(backend):
    masks = [[t % 5 != 3 for t in range(length)] for length in (1100, 3, 1025)]
    gae_as_loops(backend, masks, 0, 0.97, 0.95, True)


def whitened_by_loop(rows, masks, unbiased):
    both = [zip(row, mask, strict=True) for row, mask in zip(rows, masks, strict=True)]
    x = [a for row in both for a, keep in row if keep]
    mean = math.fsum(x) / max(len(x), 1)
    over = max(len(x) - unbiased, 1)
    deviation = math.sqrt(math.fsum((a - mean) ** 2 for a in x) / over + 1e-8)
    return [[(a - mean) / deviation for a in row] for row in rows]


def shaped_by_loop(masks, x, scores, ends, options):
    """Advantages, returns, moments and metrics; an input that is None is 0."""
    totals = dict.fromkeys(("tokens", "sequences", "kl", "scores", "non_score_reward"), 0.0)
    advantages, returns = [], []
    for b, mask in enumerate(masks):
        zero = [0.0] * len(mask)
        rewards, values = (zero if x[k] is None else x[k][b] for k in ("rewards", "values"))
        rewards = list(rewards)
        for t in (t for t, keep in enumerate(mask) if keep):
            d = x["logp"][b][t] - x["ref_logp"][b][t]
            penalty = options["kl_coef"] * loop_kl(d, options["kl_estimator"])
            rewards[t] -= penalty
            totals["kl"] += d
            totals["non_score_reward"] -= penalty
            totals["tokens"] += 1
        if any(mask):
            totals["sequences"] += 1
            last = max(t for t, keep in enumerate(mask) if keep)
            rewards[last] += scores[b] if scores else 0.0
            totals["scores"] += scores[b] if scores else 0.0
        lam = 1.0 if x["values"] is None else options["lam"]
        found = loop_advantages(mask, rewards, values, ends[b], options["gamma"], lam)
        advantages.append(found)
        returns.append([a + v for a, v in zip(found, values, strict=True)])
    totals["rlhf_reward"] = totals["scores"] + totals["non_score_reward"]
    counted = [a for row in advantages for a in row]  # 0 where masked
    moments = [totals["tokens"], math.fsum(counted), math.fsum(a * a for a in counted)]
    return advantages, returns, moments, totals


def advantages_as_loops(backend, masks, seed, has, gamma, lam, kl_estimator):
    rng = random.Random(seed)
    x = {"logp": numbers(rng, masks, -4, 0)}
    x["ref_logp"] = [
        [a + b for a, b in zip(*rows, strict=True)]
        for rows in zip(x["logp"], numbers(rng, masks, -1, 1), strict=True)
    ]
    for name in ("rewards", "values"):
        x[name] = numbers(rng, masks, -2, 2) if name in has else None
    scores = [rng.randint(-3, 3) / 2 for _ in masks] if "scores" in has else None
    ends = [rng.randint(-3, 3) / 4 * ("bootstrap" in has) for _ in masks]
    options = {"kl_coef": 0.25, "kl_estimator": kl_estimator, "gamma": gamma, "lam": lam}
    advantages, returns, moments, totals = shaped_by_loop(masks, x, scores, ends, options)
    for dtype in dtypes(backend):
        for packed in (False, True):
            close = 1e-10 if dtype == torch.float64 else 2e-5
            inputs = {k: None if v is None else lay(v, masks, packed, dtype) for k, v in x.items()}
            each = {"scores": scores, "bootstrap": ends if "bootstrap" in has else None}
            each = {k: v for k, v in each.items() if v is not None}
            inputs |= {"scores": None}
            inputs |= {k: torch.tensor(v, dtype=dtype, device=DEV) for k, v in each.items()}
            where = place(masks, packed)
            out = ppo_advantages(**inputs, **where, **options)
            assert_tokens(out.advantages, advantages, masks, packed, close)
            assert_tokens(out.returns, returns, masks, packed, close)
            assert out.moments.tolist() == pytest.approx(moments, rel=close, abs=close)
            assert {k: v.item() for k, v in out.metrics.items()} == pytest.approx(
                totals, rel=close, abs=close
            )
            for unbiased in (False, True):
                white = whiten(out.advantages, out.moments, mask=where["mask"], unbiased=unbiased)
                want = whitened_by_loop(advantages, masks, unbiased)
                # equal but for rounding, advantages are divided by 1e-4
                assert_tokens(white, want, masks, packed, 1e-6 if close < 1e-9 else 1e-3)


@pytest.mark.parametrize("kl_estimator", ESTIMATORS)
def test_ppo_advantages_as_loops(backend, kl_estimator):
    def example(**drawn):
        advantages_as_loops(backend, kl_estimator=kl_estimator, **drawn)

    names = st.sampled_from(["scores", "rewards", "values", "bootstrap"])
    drawn = {"masks": MASKS, "seed": SEEDS, "has": st.frozensets(names)}
    check(example, backend, drawn | {"gamma": SHARES, "lam": SHARES}, 20)


# form, bounds, temperature, aggregation
DEFAULTS = {
    "ppo": ("clip", 0.2, 0.2, 1.0, "token-mean"),
    "dapo": ("clip", 0.2, 0.28, 1.0, "token-mean"),
    "grpo": ("clip", 0.2, 0.2, 1.0, "seq-mean-token-mean"),
    "dr_grpo": ("clip", 0.2, 0.2, 1.0, NORM),
    "gspo": ("clip", 3e-4, 4e-4, 1.0, "seq-mean-token-mean"),
    "cispo": ("cispo", 0.2, 0.2, 1.0, "token-mean"),
    "espo": ("clip", math.inf, math.inf, 1.0, "token-mean"),
    "apa": ("apa", 0.2, 0.2, 0.1, "token-mean"),
    "awr": ("awr", 0.2, 0.2, 2.0, "token-mean"),
}


def bounded(x, low, high):
    return min(max(x, low), high)


def slope_of(fn, x):
    """Central difference; the inputs of few bits stay clear of kinks by more than the step."""
    return (fn(x + 1e-6) - fn(x - 1e-6)) / 2e-6


def loop_surrogate(form, x, still, log_ratio, token, low, high, dual, temperature):
    """Of a log-prob x that moves; what has no gradient is taken where it stands ``still``."""
    A = token["advantages"]
    if form == "apa":
        return (x - token["ref_logp"] - A / temperature) ** 2
    if form == "awr":
        return -math.exp(A / temperature) * x
    if form == "cispo":
        return -bounded(math.exp(bounded(log_ratio, -20, 20)), 1 - low, 1 + high) * A * x
    ratio = math.exp(bounded(log_ratio + x - still, -20, 20))
    loss = max(-ratio * A, -bounded(ratio, 1 - low, 1 + high) * A)
    return min(loss, -dual * A) if A < 0 else loss


def loop_token(form, token, log_ratio, low, high, dual, temperature, options):
    """Loss, slope in logp, and statistics of a token."""
    still, weight = token["logp"], token.get("is_weight", 1.0)

    def surrogate(x):
        bounds = (low, high, dual, temperature)
        return loop_surrogate(form, x, still, log_ratio, token, *bounds)

    loss, slope = weight * surrogate(still), weight * slope_of(surrogate, still)
    ratio = math.exp(bounded(log_ratio, -20, 20))
    apart = bounded(still - token.get("old_logp", still), -20, 20)
    A = token["advantages"]
    small, large = ratio < 1 - low, ratio > 1 + high
    clip = form == "clip"
    found = {
        "tokens": 1,
        "ratio": ratio,
        "ratio_deviation": abs(ratio - 1),
        "clipfrac_low": small and (form == "cispo" or (clip and A < 0)),
        "clipfrac_high": large and (form == "cispo" or (clip and A > 0)),
        "clipfrac_dual": clip and A < 0 and ratio > dual,
        "ppo_kl": -apart,
        "approx_kl": apart**2 / 2,
    }
    if "ref_logp" in token:
        name, ref = options["kl_estimator"], token["ref_logp"]
        found["kl"] = loop_kl(still - ref, name[:2])
        bent = "k2" if name == "k3+" else name
        loss += options["kl_coef"] * found["kl"]
        slope += options["kl_coef"] * slope_of(lambda x: loop_kl(x - ref, bent), still)
    if "entropy" in token:
        found["entropy"] = token["entropy"]
        loss -= options["entropy_coef"] * token["entropy"]
    return loss, slope, found


def policy_by_loop(loss_type, masks, x, mode, length, options):
    """Loss, what it is over, the sum of sizes, slopes, slopes in the entropy, metrics."""
    form, low, high, temperature, _ = DEFAULTS[loss_type]
    low, high = options.get("clip_low", low), options.get("clip_high", high)
    temperature, dual = options.get("temperature", temperature), options.get("dual_clip", math.inf)
    total = size = 0.0
    slopes, entropies = ([[0.0] * len(mask) for mask in masks] for _ in range(2))
    sums, largest = {}, 0.0
    for b, mask in enumerate(masks):
        at = [t for t, keep in enumerate(mask) if keep]
        tokens = {t: {k: v[b][t] for k, v in x.items()} for t in at}
        ratios = {t: tokens[t]["logp"] - y.get("old_logp", y["logp"]) for t, y in tokens.items()}
        if loss_type == "gspo" and at:
            ratios = dict.fromkeys(at, math.fsum(ratios.values()) / len(at))
        share = {NORM: 1 / length, "seq-mean-token-mean": 1 / max(len(at), 1)}.get(mode, 1.0)
        for t in at:
            args = (form, tokens[t], ratios[t], low, high, dual, temperature, options)
            loss, slope, found = loop_token(*args)
            total, size = total + share * loss, size + share * abs(loss)
            slopes[b][t], entropies[b][t] = share * slope, -share * options["entropy_coef"]
            sums = {k: sums.get(k, 0) + v for k, v in found.items()}
            largest = max(largest, found["ratio"])
    full = sum(map(any, masks))
    count = {"token-mean": sum(map(sum, masks)), NORM: len(masks)}.get(mode, full)
    return total, count, size, slopes, entropies, sums | {"ratio_max": largest}


@st.composite
def policy_options(draw, loss_type):
    form = DEFAULTS[loss_type][0]
    options = {"kl_coef": 0.0, "kl_estimator": draw(st.sampled_from([*ESTIMATORS, "k3+"]))}
    inputs = draw(st.frozensets(st.sampled_from(["old_logp", "ref_logp", "entropy", "is_weight"])))
    inputs |= {"ref_logp"} if form == "apa" else frozenset()
    options["kl_coef"] = 0.5 if "ref_logp" in inputs and draw(FLAG) else 0.0
    options["entropy_coef"] = 0.125 if "entropy" in inputs else 0.0
    if form in ("apa", "awr"):
        options |= draw(st.sampled_from([{}, {"temperature": 0.75}]))
    else:
        options |= draw(st.sampled_from([{}, {"clip_low": 0.1}, {"clip_high": 0.5}]))
    if form == "clip":
        options |= draw(st.sampled_from([{}, {"dual_clip": 1.5}]))
    return inputs, options


def policy_inputs(rng, masks, names, far, per_sequence):
    """Far: half of the log-ratios past the clamp, none near it."""
    x = {"logp": numbers(rng, masks, -4, 0), "advantages": numbers(rng, masks, -2, 2)}
    if per_sequence:
        x["advantages"] = [row[:1] * len(row) for row in x["advantages"]]
    for name in sorted(names):
        x[name] = numbers(rng, masks, 0 if name == "entropy" else -1, 1)
        if name == "is_weight":
            x[name] = [[1 + v / 2 for v in row] for row in x[name]]
        if name.endswith("_logp"):
            away = [[rng.choice([0, 25, -25]) * far for _ in mask] for mask in masks]
            rows = zip(x["logp"], x[name], away, strict=True)
            x[name] = [[sum(three) for three in zip(*row, strict=True)] for row in rows]
    return x


def our_loss(x, masks, packed, dtype, per_sequence, options):
    """The output, and gradients of its loss in logp and in the entropy."""
    inputs = {name: lay(rows, masks, packed, dtype) for name, rows in x.items()}
    if per_sequence:
        first = [row[0] if row else math.nan for row in x["advantages"]]
        inputs["advantages"] = torch.tensor(first, dtype=dtype, device=DEV)
    leaves = [inputs[name].requires_grad_() for name in ("logp", "entropy") if name in inputs]
    out = ppo_policy_loss(**inputs, **place(masks, packed), **options)
    return out, torch.autograd.grad(out.loss, leaves)


def policy_as_loops(backend, loss_type, masks, seed, drawn, far, per_sequence, mean, mode, packed):
    names, options = drawn
    x = policy_inputs(random.Random(seed), masks, names, far, per_sequence)
    tokens, length = sum(map(len, masks)), max(map(len, masks), default=0) + 2  # T of the padded
    told = options | {"loss_type": loss_type, "reduction": "mean" if mean else "sum"}
    told |= {"loss_agg_mode": mode} if mode else {}
    mode = mode or DEFAULTS[loss_type][-1]
    told |= {"max_length": length} if mode == NORM and packed else {}
    each = per_sequence and not (packed and tokens == len(masks))
    args = (loss_type, masks, x, mode, length, options)
    total, count, size, slopes, entropies, sums = policy_by_loop(*args)
    over, over_tokens = (max(n, 1) if mean else 1 for n in (count, sum(map(sum, masks))))
    whole = ("tokens", "ratio_max")
    metrics = {k: v if k in whole else v / over_tokens for k, v in sums.items()}
    for dtype in dtypes(backend):
        out, grads = our_loss(x, masks, packed, dtype, each, told)
        close = 1e-12 if dtype == torch.float64 else 1e-5
        assert out.count.item() == count
        assert abs(out.loss.item() - total / over) <= close * size / over
        got = {k: v.item() for k, v in out.metrics.items()}
        assert got == pytest.approx(dict.fromkeys(got, 0.0) | metrics, rel=close, abs=close)
        for grad, rows in zip(grads, (slopes, entropies), strict=False):
            rows = [[v / over for v in row] for row in rows]
            assert_tokens(grad, rows, masks, packed, max(close, 1e-7))


@pytest.mark.parametrize("loss_type", POLICY_LOSSES)
def test_policy_losses_as_loops(backend, loss_type):
    def example(**drawn):
        policy_as_loops(backend, loss_type, **drawn)

    names = ("far", "per_sequence", "mean", "packed")
    drawn = {"masks": MASKS, "seed": SEEDS, "drawn": policy_options(loss_type)}
    drawn["mode"] = st.sampled_from([None, *AGGREGATIONS])
    check(example, backend, drawn | dict.fromkeys(names, FLAG), 56)


@pytest.mark.parametrize("kl_estimator", [*ESTIMATORS, "k3+"])
def test_kl_far_from_the_reference_as_loops(backend, kl_estimator):
    drawn = {"ref_logp"}, {"kl_coef": 0.5, "kl_estimator": kl_estimator, "entropy_coef": 0.0}
    masks = [[True] * 9, [False, True]]
    policy_as_loops(backend, "ppo", masks, 0, drawn, True, False, False, None, True)
