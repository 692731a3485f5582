"""Log-probs, losses and gradients beside other libraries', each where it is installed.

In fp32 the same numbers but for rounding. In bf16 the peers round more than we do: there ours are
no worse than theirs against the fp64 truth, and what they round stands beside the test.
"""

import pytest
import torch
from compare import assert_no_worse

from fastpref import dpo_loss, linear_sequence_logp
from fastpref.kernels.linear_logp import linear_logp_ref, linear_logp_stats
from fastpref.kernels.logp_from_logits import (
    logp_from_logits,
    logp_stats_from_logits,
    stats_from_logits_ref,
)

DEV = "cuda" if torch.cuda.is_available() else "cpu"
HALF_AND_SINGLE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def make(*lead, H=16, V=301, dtype=torch.float32):
    gen = torch.Generator().manual_seed(0)
    hidden = torch.randn(*lead, H, generator=gen)
    weight, bias = 0.5 * torch.randn(V, H, generator=gen), torch.randn(V, generator=gen)
    target = torch.randint(V, lead, generator=gen)
    target.view(-1)[1::4] = -100
    return tuple(x.to(DEV, dtype) for x in (hidden, weight, bias)), target.to(DEV)


def run(fn, leaves, dtype=None):
    """What ``fn`` returns by name, and the gradients of a random combination of all that have one.

    Log-probs of ``fn`` may be rounded: the combination is drawn in fp32.
    """
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in leaves]
    out = fn(*leaves)
    gen = torch.Generator().manual_seed(7)
    scored = [x for x in out.values() if x.requires_grad]
    grads = [torch.randn(x.shape, generator=gen).to(x) for x in scored]
    d = torch.autograd.grad(scored, leaves, grads)
    return {k: x.detach() for k, x in out.items()} | {f"d{i}": x for i, x in enumerate(d)}


def assert_same_numbers(ours, theirs):
    """Within 16 ulp of the largest value: both sum the same products, each in its own order."""
    assert ours.keys() == theirs.keys()
    for name, want in theirs.items():
        assert ours[name].shape == want.shape and ours[name].dtype == want.dtype, name
        error, size = (ours[name] - want).abs().max(), want.abs().max()
        assert error <= 16 * torch.finfo(want.dtype).eps * size, f"{name}: {error / size:.1e}"


def logits_and_labels(dtype):
    (logits, _, _), target = make(3, 7, H=301, dtype=dtype)
    return [3 * logits], target


@HALF_AND_SINGLE
@pytest.mark.parametrize("temperature", [1.0, 0.5])  # a power of 2: TRL rounds tempered logits
def test_trl_selective_log_softmax(dtype, temperature):
    trl = pytest.importorskip("trl.trainer.utils")
    leaves, target = logits_and_labels(dtype)
    # TRL gathers at ignored labels, which have to be indices
    label, mask = target.clamp(min=0), target != -100

    def theirs(x):
        call = trl.selective_log_softmax_and_entropy
        logp, entropy = call(x, label, temperature=temperature, row_mask=mask)
        assert torch.equal(
            logp, trl.selective_log_softmax(x, label, temperature=temperature, row_mask=mask)
        )
        return {"logp": logp, "entropy": entropy}

    def ours(x, fn=logp_stats_from_logits):
        stats = fn(x, target, temperature=temperature)
        return {"logp": stats.logp, "entropy": stats.entropy}

    got, peer = run(ours, leaves), run(theirs, leaves)
    if dtype == torch.float32:
        assert_same_numbers(got, peer)
        return
    # TRL takes all from torch's bf16 log-softmax: it rounds the sum, its logarithm and the result
    torch.testing.assert_close(got["logp"], peer["logp"].float(), rtol=2**-8, atol=2**-6)
    truth = run(lambda x: ours(x, stats_from_logits_ref), leaves, torch.float64)
    assert_no_worse(got, peer, truth)


@HALF_AND_SINGLE
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_trl_fused_head(dtype, softcap):
    trl = pytest.importorskip("trl.kernels")
    leaves, target = make(33, dtype=dtype)
    keep = target != -100  # TRL's caller leaves ignored rows out
    options = {"temperature": 0.7, "logit_scale": 1.5, "softcap": softcap}

    def theirs(hidden, weight, bias):
        names = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
        args = target[keep], 0.7, 64, softcap, 1.5, names
        stats = trl.ChunkedLogProbFunction.apply(hidden[keep], weight, bias, *args)
        return dict(zip(("logp", "entropy", "log_sum_sq_probs", "mean_logit"), stats, strict=False))

    def ours(hidden, weight, bias, fn=linear_logp_stats):
        stats = fn(hidden, weight, target, bias=bias, **options)._asdict()
        del stats["is_top1"]
        return {k: stats[k][keep] for k in ("logp", "entropy", "log_sum_sq_probs", "mean_logit")}

    got, peer = run(ours, leaves), run(theirs, leaves)
    if dtype == torch.float32:
        assert_same_numbers(got, peer)
    else:  # TRL rounds the logits, and their gradient
        assert_no_worse(got, peer, run(lambda *x: ours(*x, linear_logp_ref), leaves, torch.float64))


def test_trl_top1_of_ties():
    trl = pytest.importorskip("trl.kernels")
    hidden, weight = torch.ones(3, 1, device=DEV), torch.tensor([[1.0], [2], [2]], device=DEV)
    target = torch.arange(3, device=DEV)
    ours = linear_logp_stats(hidden, weight, target).is_top1
    theirs = trl.ChunkedLogProbFunction.apply(hidden, weight, None, target, 1.0, 64)[-1]
    # TRL counts the first of equal maxima, ours every one: no logit is larger
    assert ours.tolist() == [False, True, True] and theirs.tolist() == [False, True, False]


@pytest.mark.parametrize("reference", [False, True], ids=["free", "reference"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_liger_dpo(reference, loss_type, bias):
    liger = pytest.importorskip("liger_kernel.chunked_loss")
    (hidden, weight, b), labels = make(6, 9)
    labels[4, :] = -100  # a completion without a token counts 0 on both sides
    leaves = [0.3 * hidden, weight, b][: 3 if bias else 2]
    ref = [x + 0.1 * x.sin() for x in leaves]
    # Liger takes labels that are moved already
    loss = liger.LigerFusedLinearDPOLoss(
        beta=0.3, loss_type=loss_type, use_ref_model=reference, compiled=False
    )

    def theirs(hidden, weight, bias=None):
        args = [ref[0][:, :-1], *ref[1:]] if reference else []
        value, found = loss(weight, hidden[:, :-1], labels[:, 1:], bias, *args)
        return {"loss": value} | {"logp": torch.cat(found[:2]).detach()}

    def ours(hidden, weight, bias=None):
        logp = linear_sequence_logp(hidden, weight, labels, bias=bias)
        refs = []
        if reference:
            options = {"bias": ref[2] if len(ref) == 3 else None}
            refs = linear_sequence_logp(*ref[:2], labels, **options).chunk(2)
        out = dpo_loss(*logp.chunk(2), *refs, beta=0.3, loss_type=loss_type)
        return {"loss": out.losses.mean(), "logp": logp.detach()}

    assert_same_numbers(run(ours, leaves), run(theirs, leaves))


@pytest.fixture
def eager():
    """The lines that cut-cross-entropy compiles, as they are: no compiler is tested here."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.mark.usefixtures("eager")
@HALF_AND_SINGLE
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("shift", [False, True])
def test_cut_cross_entropy(dtype, softcap, shift):
    cce = pytest.importorskip("cut_cross_entropy")
    leaves, labels = make(3, 9, dtype=dtype)

    def theirs(hidden, weight, bias):
        # without a bias of its own: it multiplies a column of ones
        hidden = torch.cat([hidden, torch.ones_like(hidden[..., :1])], -1)
        weight = torch.cat([weight, bias[:, None]], 1)
        options = {"softcap": softcap, "shift": shift, "impl": "torch_compile"}
        nll = cce.linear_cross_entropy(hidden, weight, labels, reduction="none", **options)
        mean = cce.linear_cross_entropy(hidden, weight, labels, **options).detach()
        return {"logp": -nll.sum(1), "mean": -mean}

    def ours(hidden, weight, bias):
        options = {"bias": bias, "softcap": softcap, "shift": shift}
        logp = linear_sequence_logp(hidden, weight, labels, **options)
        count = (labels[:, int(shift) :] != -100).sum()
        return {"logp": logp, "mean": logp.detach().sum() / count}

    got, peer = run(ours, leaves), run(theirs, leaves)
    if dtype == torch.float32:
        assert_same_numbers(got, peer)
    else:  # the peer rounds the logits, and their gradient
        assert_no_worse(got, peer, run(ours, leaves, torch.float64))


@pytest.mark.usefixtures("eager")
def test_cut_cross_entropy_rounds_bf16_logits():
    """All that keeps its bf16 log-probs from ours: on logits that are rounded both agree."""
    cce = pytest.importorskip("cut_cross_entropy")
    (hidden, weight, _), labels = make(33, dtype=torch.bfloat16)
    nll = cce.linear_cross_entropy(hidden, weight, labels, reduction="none", impl="torch_compile")
    rounded = logp_from_logits(hidden @ weight.T, labels)
    assert_same_numbers({"logp": rounded}, {"logp": -nll})
    truth = linear_logp_ref(hidden.double(), weight.double(), labels).logp
    ours = linear_logp_stats(hidden, weight, labels, outputs=()).logp
    assert (rounded - truth).abs().max() > 100 * (ours - truth).abs().max()
