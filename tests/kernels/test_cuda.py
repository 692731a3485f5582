"""What only a GPU can show: no host syncs, CUDA graphs, more than 2**31 logits, many tokens."""

import pytest
import torch

from fastpref import (
    gae,
    linear_kl,
    linear_logp,
    linear_logp_stats,
    logp_from_logits,
    logp_stats_from_logits,
    ppo_advantages,
    ppo_policy_loss,
    ppo_value_loss,
    whiten,
)

pytestmark = pytest.mark.gpu


def leaves(M=300, H=128, V=5000, dtype=torch.bfloat16):
    gen = torch.Generator("cuda").manual_seed(0)
    options = {"generator": gen, "device": "cuda"}
    hidden = torch.randn(M, H, **options).to(dtype).requires_grad_()
    weight = torch.randn(V, H, **options).to(dtype).requires_grad_()
    target = torch.randint(V, (M,), **options)
    return hidden, weight, target, torch.arange(M, device="cuda")


def from_hidden(frozen):
    hidden, weight, target, rows = leaves()
    weight.requires_grad_(not frozen)
    wanted = [hidden] if frozen else [hidden, weight]

    def step():
        stats = linear_logp_stats(hidden, weight, target, rows=rows)
        loss = stats.logp.sum() + stats.entropy.sum()
        return [stats.logp.detach(), *torch.autograd.grad(loss, wanted)]

    return step, hidden


def from_logits(inplace):
    hidden, weight, target, _ = leaves()
    logits = (hidden @ weight.t()).detach().requires_grad_()

    def step():
        x = logits * 1
        stats = logp_stats_from_logits(x, target, inplace_backward=inplace)
        return [stats.logp.detach(), *torch.autograd.grad(stats.logp.sum(), logits)]

    return step, logits


def ppo(packed):
    """Shaped rewards, advantages, whitening, both losses and their gradients."""
    B, T = 37, 1001
    gen = torch.Generator("cuda").manual_seed(0)
    x, ref, values = (torch.randn(B, T, generator=gen, device="cuda") for _ in range(3))
    mask = torch.rand(B, T, generator=gen, device="cuda") < 0.8
    cu = torch.arange(0, B * T + 1, T, device="cuda") if packed else None
    x, ref, values, mask = ((y.flatten() if packed else y) for y in (x, ref, values, mask))
    scores = torch.ones(B, device="cuda")
    logp = x.clone().requires_grad_()
    where = {"mask": mask, "cu_seqlens": cu}

    def step():
        old = logp.detach()
        made = ppo_advantages(scores=scores, logp=old, ref_logp=ref, values=values, **where)
        white = whiten(made.advantages, made.moments, mask=mask)
        policy = ppo_policy_loss(
            logp=logp, old_logp=x, advantages=white, ref_logp=ref, kl_coef=0.1, **where,
            loss_agg_mode="seq-mean-token-mean" if packed else "token-mean",
        )  # fmt: skip
        critic = ppo_value_loss(values=logp, old_values=values, returns=made.returns, **where)
        (grad,) = torch.autograd.grad(policy.loss + critic.loss, logp)
        return [policy.loss.detach(), grad, *policy.metrics.values(), *critic.metrics.values()]

    return step, logp


STEPS = {
    "trained": lambda: from_hidden(False),
    "frozen": lambda: from_hidden(True),
    "logits": lambda: from_logits(False),
    "logits in place": lambda: from_logits(True),
    "ppo": lambda: ppo(False),
    "ppo, packed": lambda: ppo(True),
}


@pytest.mark.parametrize("make", STEPS.values(), ids=STEPS.keys())
def test_live_rows_cost_no_sync_and_fit_a_cuda_graph(make):
    step, source = make()
    want = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(*both) for both in zip(again, want, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    with torch.no_grad():
        source.mul_(0.5)
    graph.replay()
    want = step()
    assert all(torch.equal(*both) for both in zip(got, want, strict=True))


def test_more_than_two_to_the_31_logits():
    N, V = 17_000, 128_257
    logits = torch.empty(N, V, dtype=torch.bfloat16, device="cuda")
    logits.normal_(generator=torch.Generator("cuda").manual_seed(0))
    target = torch.randint(V, (N,), device="cuda")
    last = logits[-3:].double().log_softmax(-1)
    want = last.gather(1, target[-3:, None])[:, 0]
    leaf = logits.requires_grad_()
    logp = logp_from_logits(leaf * 1, target, inplace_backward=True)
    assert (logp[-3:] - want).abs().max() < 1e-4
    (grad,) = torch.autograd.grad(logp.sum(), leaf)
    one_hot = torch.nn.functional.one_hot(target[-3:], V)
    assert (grad[-3:].double() - (one_hot - last.exp())).abs().max() < 2**-8


def test_many_tokens():
    """A sequence of many blocks, many sequences, and more tokens than programs take at once."""
    gen = torch.Generator("cuda").manual_seed(0)
    for shape in ((2, 100_003), (5000, 7)):
        rewards, values = (torch.randn(shape, generator=gen, device="cuda") for _ in range(2))
        found = gae(rewards=rewards, values=values, gamma=0.999)
        want = gae(rewards=rewards.double(), values=values.double(), gamma=0.999)
        for ours, truth in zip(found, want, strict=True):
            assert (ours - truth).abs().max() < 1e-5 * truth.abs().max()
    logp = (0.1 * torch.randn(1, 1 << 25, generator=gen, device="cuda")).requires_grad_()
    advantages = torch.randn(logp.shape, generator=gen, device="cuda")
    found = ppo_policy_loss(logp=logp, old_logp=0 * logp.detach(), advantages=advantages)
    (grad,) = torch.autograd.grad(found.loss, logp)
    ratio = logp.detach().double().exp()
    free = -ratio * advantages
    want = torch.maximum(free, -ratio.clamp(0.8, 1.2) * advantages)
    assert (found.loss - want.sum()).abs() < 1e-5 * want.abs().sum()
    assert (grad - free.where(want == free, 0.0)).abs().max() < 1e-5
    assert (found.metrics["ratio"] - ratio.sum()).abs() < 1e-5 * ratio.sum()


def test_log_probs_without_bf16_noise():
    """|logit| up to 30: at most twice the error of a product that was never rounded."""
    hidden, weight, target, rows = leaves(M=512, H=1024, V=20_000)
    weight = (weight.detach() * 6 / 32).bfloat16()
    truth = hidden.detach().double() @ weight.double().t()
    assert 20 < truth.abs().max() < 60
    wide = torch.mm(hidden.detach(), weight.t(), out_dtype=torch.float32)
    logps = [z.log_softmax(-1).gather(1, target[:, None])[:, 0] for z in (truth, wide)]
    with torch.no_grad():
        ours = linear_logp(hidden, weight, target, rows=rows)
    error = (ours - logps[0]).abs().max()
    assert error < 1e-3
    assert error <= 2 * (logps[1] - logps[0]).abs().max() + 4e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kl_from_a_reference(dtype):
    """Against fp64 on the same inputs; gradients as a share of their norm."""
    hidden, weight, _, _ = leaves(dtype=dtype)
    gen = torch.Generator("cuda").manual_seed(1)
    ref = [
        (x + 0.1 * torch.randn(x.shape, generator=gen, device="cuda")).to(dtype).detach()
        for x in (hidden, weight)
    ]
    kl = linear_kl(hidden, weight, *ref)
    grads = torch.autograd.grad(kl.sum(), (hidden, weight))
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logp, ref_logp = ((x @ w.t()).log_softmax(-1) for x, w in (wide, [x.double() for x in ref]))
    want = (ref_logp.exp() * (ref_logp - logp)).sum(-1)
    assert (kl - want).abs().max() < 1e-4
    for got, exact in zip(grads, torch.autograd.grad(want.sum(), wide), strict=True):
        assert (got - exact).norm() < (1e-5 if dtype == torch.float32 else 1e-2) * exact.norm()
