"""Sequence log-probs: masked rows, packed segments, and straight from hidden states."""

import pytest
import torch
import torch._inductor.config

from fastpref import dpo_loss, linear_sequence_logp, sequence_logp

LOGP = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, float("nan"), float("-inf")], [-7.0, -8.0, -9.0]])
MASK = torch.tensor([[1, 0, 1], [1, 0, 0], [0, 0, 0]])


def test_by_hand():
    assert sequence_logp(LOGP, mask=MASK).tolist() == [-4.0, -4.0, 0.0]
    assert sequence_logp(LOGP, mask=MASK.bool(), mean=True).tolist() == [-2.0, -4.0, 0.0]
    assert sequence_logp(LOGP[:1]).tolist() == [-6.0]
    assert sequence_logp(LOGP[:, :0], mean=True).tolist() == [0.0, 0.0, 0.0]
    packed = torch.tensor([-1.0, -2.0, -4.0, -8.0])
    for dtype in (torch.int32, torch.int64):
        cu = torch.tensor([0, 0, 3, 3, 4, 4], dtype=dtype)
        assert sequence_logp(packed, cu_seqlens=cu).tolist() == [0.0, -7.0, 0.0, -8.0, 0.0]
    mask = torch.tensor([True, False, True, False])
    got = sequence_logp(packed, cu_seqlens=cu, mask=mask, mean=True)
    assert got.tolist() == [0.0, -2.5, 0.0, 0.0, 0.0]
    assert sequence_logp(packed[:0], cu_seqlens=torch.tensor([0])).shape == (0,)


def test_long_packed_sums_are_rounded_once():
    gen = torch.Generator().manual_seed(0)
    logp = -3 * torch.rand(40_000, generator=gen)
    cu = torch.tensor([0, 39_000, 40_000])
    want = torch.stack([logp[:39_000].double().sum(), logp[39_000:].double().sum()])
    assert torch.equal(sequence_logp(logp, cu_seqlens=cu), want.float())
    assert sequence_logp(logp.bfloat16(), cu_seqlens=cu).dtype == torch.float32


def test_gradcheck():
    gen = torch.Generator().manual_seed(0)
    packed = torch.randn(6, dtype=torch.float64, generator=gen, requires_grad=True)
    cu, mask = torch.tensor([0, 2, 2, 6]), torch.tensor([1, 1, 0, 1, 1, 1])
    for mean in (False, True):
        options = {"mask": mask, "mean": mean}
        assert torch.autograd.gradcheck(
            lambda x, o=options: sequence_logp(x, cu_seqlens=cu, **o), packed
        )
        options["mask"] = mask.view(2, 3)
        assert torch.autograd.gradcheck(
            lambda x, o=options: sequence_logp(x.view(2, 3), **o), packed
        )


def reference(hidden, weight, labels, lengths, mean):
    """Each sequence on its own: position t scored by the hidden state of t - 1."""
    out = []
    for x, y in zip(hidden.split(lengths), labels.split(lengths), strict=True):
        logp = (x[:-1] @ weight.T).log_softmax(-1)
        keep = y[1:] != -100
        got = logp[keep].gather(1, y[1:][keep][:, None]).sum() if len(y) else logp.sum()
        out.append(got / max(int(keep.sum()), 1) if mean else got)
    return torch.stack(out)


@pytest.mark.parametrize("mean", [False, True])
def test_from_hidden_states(mean):
    gen = torch.Generator().manual_seed(0)
    hidden = torch.randn(12, 5, dtype=torch.float64, generator=gen)
    weight = torch.randn(30, 5, dtype=torch.float64, generator=gen)
    labels = torch.randint(30, (12,), generator=gen)
    labels[[0, 1, 6, 9]] = -100
    want = reference(hidden, weight, labels, [4, 4, 4], mean)
    padded = hidden.view(3, 4, 5), weight, labels.view(3, 4)
    torch.testing.assert_close(linear_sequence_logp(*padded, mean=mean), want)
    moved = labels.view(3, 4).roll(-1, 1)
    moved[:, -1] = -100
    got = linear_sequence_logp(*padded[:2], moved, shift=False, mean=mean)
    torch.testing.assert_close(got, want)
    lengths = [0, 5, 0, 1, 6, 0]
    cu = torch.tensor([0, *lengths]).cumsum(0)
    got = linear_sequence_logp(hidden, weight, labels, cu_seqlens=cu, mean=mean)
    torch.testing.assert_close(got, reference(hidden, weight, labels, lengths, mean))
    assert got[0] == got[2] == got[3] == got[5] == 0
    warm = linear_sequence_logp(*padded, temperature=2.0)
    torch.testing.assert_close(warm, reference(hidden / 2, weight, labels, [4, 4, 4], False))


@torch._inductor.config.patch(force_disable_caches=True)  # its keys leave our fakes out
def test_a_dpo_step_compiles_without_a_graph_break():
    gen = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 6, 8, generator=gen, requires_grad=True)
    weight = torch.randn(40, 8, generator=gen, requires_grad=True)
    labels = torch.randint(40, (4, 6), generator=gen)

    def loss(hidden, weight):
        chosen, rejected = linear_sequence_logp(hidden, weight, labels).chunk(2)
        cu = torch.tensor([0, 1, 2])
        return dpo_loss(sequence_logp(chosen, cu_seqlens=cu), rejected).losses.sum()

    compiled = torch.compile(loss, fullgraph=True)
    got = torch.autograd.grad(compiled(hidden, weight), (hidden, weight))
    torch.testing.assert_close(got, torch.autograd.grad(loss(hidden, weight), (hidden, weight)))


PACKED, CU = torch.zeros(4), torch.tensor([0, 4])


@pytest.mark.parametrize(
    ("logp", "options", "error"),
    [
        (PACKED, {}, ValueError),
        (LOGP, {"cu_seqlens": CU}, ValueError),
        (LOGP, {"mask": MASK[:2]}, ValueError),
        (PACKED, {"cu_seqlens": torch.tensor([0, 3])}, ValueError),
        (PACKED, {"cu_seqlens": torch.tensor([1, 4])}, ValueError),
        (PACKED, {"cu_seqlens": torch.tensor([0, 3, 2, 4])}, ValueError),
        (PACKED, {"cu_seqlens": CU[None]}, ValueError),
        (PACKED, {"cu_seqlens": CU.float()}, TypeError),
        (LOGP.int(), {}, TypeError),
        (LOGP, {"mask": MASK.float()}, TypeError),
    ],
)
def test_rejects(logp, options, error):
    with pytest.raises(error, match=r"need .*got"):
        sequence_logp(logp, **options)


def test_linear_sequence_logp_rejects():
    hidden, weight, labels = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 3).long()
    for args, options in (
        ((hidden, weight, labels[:, 1:]), {}),
        ((hidden[0], weight, labels[0]), {}),
        ((hidden, weight, labels), {"cu_seqlens": CU}),
        ((hidden, weight, labels), {"rows": labels}),
    ):
        with pytest.raises(ValueError, match=r"need .*got"):
            linear_sequence_logp(*args, **options)
    with pytest.raises(TypeError, match="unexpected keyword"):
        linear_sequence_logp(hidden, weight, labels, temprature=2.0)
