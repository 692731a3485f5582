"""Advantages and token rewards: values worked by hand, a plain loop, what is refused."""

import itertools
import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref.losses.advantage import (
    ADVANTAGES,
    adaptive_kl_coef,
    group_advantages,
    token_rewards,
)

F64 = torch.float64
SCORES = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=F64)
ONE_GROUP = torch.tensor([0, 4])


def by_loop(scores, estimator):
    """The definitions, on a list."""
    if len(scores) == 1:
        return [0.0]
    if estimator == "rloo":
        total, others = math.fsum(scores), len(scores) - 1
        return [x - (total - x) / others for x in scores]
    by = statistics.stdev(scores) + 1e-4 if estimator == "grpo" and scores else 1.0
    return [(x - statistics.fmean(scores)) / by for x in scores]


# advantages
@pytest.mark.parametrize(
    ("estimator", "want"), [("grpo", 0.865875), ("dr_grpo", 0.5), ("rloo", 0.666667)]
)
def test_group_advantages_by_hand(estimator, want):
    got = group_advantages(SCORES, ONE_GROUP, estimator=estimator)
    assert got.tolist() == pytest.approx([want, -want, -want, want], abs=1e-6)


def test_the_default_is_grpo():
    assert group_advantages(SCORES, ONE_GROUP)[0].item() == pytest.approx(0.865875, abs=1e-6)


def test_answers_that_are_right_or_wrong():
    want = group_advantages(SCORES.float(), ONE_GROUP)
    for scores in (SCORES.bool(), SCORES.long()):
        assert torch.equal(group_advantages(scores, ONE_GROUP), want)


NUMBERS = st.floats(-1e3, 1e3, width=16)
BATCHES = st.lists(st.lists(NUMBERS, max_size=6), min_size=1, max_size=6)


@settings(deadline=None, max_examples=150)
@given(
    batch=BATCHES,
    estimator=st.sampled_from(list(ADVANTAGES)),
    dtype=st.sampled_from([torch.float32, F64, torch.bfloat16, torch.float16]),
    offsets=st.sampled_from([torch.int32, torch.int64]),
)
def test_any_groups_as_a_plain_loop_has_them(batch, estimator, dtype, offsets):
    ends = [sum(map(len, batch[:i])) for i in range(len(batch) + 1)]
    scores = torch.tensor([x for group in batch for x in group], dtype=dtype)
    groups = torch.tensor(ends, dtype=offsets)
    got = group_advantages(scores, groups, estimator=estimator)
    assert got.dtype == (F64 if dtype == F64 else torch.float32)
    rounded = [scores[a:b].tolist() for a, b in itertools.pairwise(ends)]
    want = [x for group in rounded for x in by_loop(group, estimator)]
    close = 1e-9 if dtype == F64 else 1e-6
    assert got.tolist() == pytest.approx(want, rel=close, abs=close)


@pytest.mark.parametrize("estimator", ADVANTAGES)
def test_equal_scores_and_groups_of_one_give_exactly_zero(estimator):
    scores = torch.tensor([0.1, 0.1, 0.1, 7.3, -1e30], dtype=F64)
    groups = torch.tensor([0, 3, 3, 4, 5])
    assert group_advantages(scores, groups, estimator=estimator).tolist() == [0.0] * 5


@pytest.mark.parametrize("estimator", ADVANTAGES)
def test_fp32_is_rounded_once(estimator):
    scores = 1000 + torch.randn(999, generator=torch.Generator().manual_seed(0))
    groups = torch.tensor([0, 700, 702, 999])
    got = group_advantages(scores, groups, estimator=estimator)
    wide = group_advantages(scores.double(), groups, estimator=estimator)
    assert torch.equal(got, wide.float())


def test_no_completion():
    for ends in ([0], [0, 0, 0]):
        assert group_advantages(torch.empty(0), torch.tensor(ends)).shape == (0,)


def test_advantages_and_token_rewards_are_detached():
    x = SCORES.clone().requires_grad_()
    assert not group_advantages(x, ONE_GROUP).requires_grad
    assert not token_rewards(x, x * 2, beta=0.1).requires_grad


@pytest.mark.parametrize("estimator", ADVANTAGES)
def test_no_value_is_read_on_the_host(estimator):
    """A meta tensor has none to read."""
    groups = torch.empty(3, dtype=torch.int32, device="meta")
    got = group_advantages(torch.empty(4, device="meta"), groups, estimator=estimator)
    assert got.device.type == "meta" and got.shape == (4,)


@pytest.mark.parametrize("estimator", ADVANTAGES)
def test_torch_compile(estimator):
    torch.compiler.reset()
    compiled = torch.compile(group_advantages, fullgraph=True, backend="aot_eager")
    groups = torch.tensor([0, 1, 4])
    got = compiled(SCORES, groups, estimator=estimator)
    torch.testing.assert_close(got, group_advantages(SCORES, groups, estimator=estimator))


@pytest.mark.gpu
@pytest.mark.parametrize("estimator", ADVANTAGES)
def test_cuda_equals_the_cpu_without_a_sync(estimator):
    scores = torch.randn(3000, generator=torch.Generator().manual_seed(1))
    groups = torch.tensor([0, 2500, 2500, 2501, 3000], dtype=torch.int32)
    there, ends = scores.cuda(), groups.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = [group_advantages(there, ends, estimator=estimator) for _ in range(4)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(x, got[0]) for x in got)
    here = group_advantages(scores, groups, estimator=estimator)
    torch.testing.assert_close(got[0].cpu(), here)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"estimator": "gae"}, ValueError, "need estimator in grpo, dr_grpo, rloo; got 'gae'"),
        ({"scores": torch.ones(2, 2)}, ValueError, r"need scores \(B,\), got \(2, 2\)"),
        ({"scores": SCORES / 0}, ValueError, r"need finite scores, got \[inf, nan, nan, inf\]"),
        ({"scores": SCORES.log()}, ValueError, r"need finite scores, got \[0.0, -inf"),
        ({"groups": torch.tensor([0.0, 4.0])}, TypeError, "need int32 or int64 groups, got"),
        ({"groups": torch.tensor([0, 3])}, ValueError, r"groups rising from 0 to 4, got \[0, 3\]"),
        ({"groups": torch.tensor([0, 5, 4])}, ValueError, r"rising from 0 to 4, got \[0, 5, 4\]"),
        ({"groups": torch.tensor([[0, 4]])}, ValueError, r"need groups \(B\+1,\), got \(1, 2\)"),
    ],
)
def test_group_advantages_refuses(change, error, message):
    with pytest.raises(error, match=message):
        group_advantages(**{"scores": SCORES, "groups": ONE_GROUP, **change})


# rewards of tokens
def test_token_rewards_and_the_first_value_sum_to_the_reward_of_a_tree():
    """Two tokens of two choices each: the soft-optimal policy, by backward induction."""
    beta = 0.5
    ref = torch.tensor([0.6, 0.4], dtype=F64).log()  # of the first token
    ref_next = torch.tensor([[0.5, 0.5], [0.3, 0.7]], dtype=F64).log()  # (first, second)
    rewards = torch.tensor([[1.0, 0.0], [0.5, 2.0]], dtype=F64)

    q_next = rewards + beta * ref_next
    v_next = beta * (q_next / beta).logsumexp(1)
    q = beta * ref + v_next
    v = beta * (q / beta).logsumexp(0)
    assert v.item() == pytest.approx(1.448795, abs=1e-6)
    assert v_next.tolist() == pytest.approx([0.716890, 1.832219], abs=1e-6)

    policy, policy_next = (q - v) / beta, (q_next - v_next[:, None]) / beta
    logp = torch.stack((policy[:, None].expand(2, 2), policy_next), -1)  # (first, second, token)
    ref_logp = torch.stack((ref[:, None].expand(2, 2), ref_next), -1)
    total = v + token_rewards(logp, ref_logp, beta=beta).sum(-1)
    torch.testing.assert_close(total, rewards, rtol=0, atol=1e-9)


def test_token_rewards_of_rto_are_clipped():
    ratios = torch.tensor([0.4, -0.9, 2.0, -2.0], dtype=F64)
    ref = torch.tensor([-1.0, -2.0, -3.0, -1.0], dtype=F64)
    got = token_rewards(ref + ratios, ref, beta=0.05, clip=0.05)
    assert got.tolist() == pytest.approx([0.02, -0.045, 0.05, -0.05])
    free = token_rewards(ref + ratios, ref, beta=0.05)
    assert free.tolist() == pytest.approx([0.02, -0.045, 0.1, -0.1])


@pytest.mark.parametrize(
    ("dtype", "want"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (F64, F64)]
)
def test_token_rewards_are_subtracted_in_at_least_fp32(dtype, want):
    logp = torch.tensor([[-100.0], [0.25]], dtype=dtype)
    ref = torch.tensor([[-0.0625], [-128.0]], dtype=dtype)
    got = token_rewards(logp, ref, beta=0.5)
    assert got.dtype == want and got.tolist() == [[-49.96875], [64.125]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ref_logp": torch.ones(1)}, ValueError, r"need ref_logp \(4,\), got \(1,\)"),
        ({"logp": torch.ones(4).int()}, TypeError, "need floating-point logp, got torch.int32"),
        ({"ref_logp": torch.ones(4).int()}, TypeError, "need floating-point ref_logp, got"),
        ({"beta": 0.0}, ValueError, "need beta > 0 and clip > 0 or None, got 0.0 and None"),
        ({"beta": math.nan}, ValueError, "need beta > 0 .*got nan and None"),
        ({"clip": 0.0}, ValueError, "need beta > 0 and clip > 0 or None, got 0.1 and 0.0"),
    ],
)
def test_token_rewards_refuses(change, error, message):
    with pytest.raises(error, match=message):
        token_rewards(**{"logp": SCORES, "ref_logp": SCORES, "beta": 0.1, **change})


# the coefficient of the KL penalty
@pytest.mark.parametrize(
    ("kl", "want"),
    [
        (9.0, 0.050512),  # 1 + 0.2 * 0.0512
        (6.6, 0.05 * (1 + 0.1 * 0.0512)),
        (6.0, 0.05),
        (0.0, 0.05 * (1 - 0.2 * 0.0512)),
        (math.inf, 0.050512),
    ],
)
def test_adaptive_kl_coef_by_hand(kl, want):
    assert adaptive_kl_coef(0.05, kl, num_samples=512) == pytest.approx(want, rel=1e-12)


def test_adaptive_kl_coef_with_a_target_and_a_horizon():
    got = adaptive_kl_coef(2.0, 3.3, target=3.0, num_samples=100, horizon=1000)
    assert got == pytest.approx(2.0 * 1.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": 0.0}, "need target > 0 and horizon > 0, got 0.0 and 10000"),
        ({"horizon": -1.0}, "need target > 0 and horizon > 0, got 6.0 and -1.0"),
        ({"num_samples": 50_000}, r"need num_samples in \[0, 5 \* 10000\), got 50000"),
        ({"num_samples": -1}, r"need num_samples in \[0, 5 \* 10000\), got -1"),
        ({"kl": math.nan}, "need numbers for coef and kl, got 0.05 and nan"),
        ({"coef": math.nan}, "need numbers for coef and kl, got nan and 9.0"),
    ],
)
def test_adaptive_kl_coef_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        adaptive_kl_coef(**{"coef": 0.05, "kl": 9.0, "num_samples": 512, **change})
