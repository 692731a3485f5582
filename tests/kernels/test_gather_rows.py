"""gather_rows and sum_rows: each the adjoint of the other, in a fixed order, rounded once."""

import pytest
import torch
from torch.library import opcheck

from fastpref.kernels.gather_rows import _gather, _sum, gather_rows, gather_rows_ref, sum_rows

DEV = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 2, 3)])
def test_against_plain_indexing_in_fp64(shape, dtype):
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=gen).to(DEV, dtype).requires_grad_()
    index = torch.tensor([3, 0, 3, 3, 1, 0], device=DEV)
    g = torch.randn(6, *shape[1:], generator=gen).to(DEV, dtype)
    y = gather_rows(x, index)
    y.backward(g)
    wide = x.detach().double().requires_grad_()
    gather_rows_ref(wide, index).backward(g.double())
    assert torch.equal(y, x[index])
    # one rounding of an fp32 or fp64 sum
    assert torch.equal(x.grad, wide.grad.to(dtype)) or dtype == torch.float32
    torch.testing.assert_close(x.grad, wide.grad.to(dtype))


def test_many_copies_in_bf16_are_summed_in_fp32_and_the_same_every_time():
    x = torch.zeros(3, 8, device=DEV, dtype=torch.bfloat16, requires_grad=True)
    index = torch.arange(3000, device=DEV) % 2
    g = torch.rand(3000, 8, generator=torch.Generator().manual_seed(0)).to(DEV, torch.bfloat16)
    grads = [torch.autograd.grad(gather_rows(x, index), x, g)[0] for _ in range(4)]
    want = torch.zeros(3, 8, dtype=torch.float64, device=DEV).index_add_(0, index, g.double())
    assert all(torch.equal(grad, grads[0]) for grad in grads)
    assert ((grads[0].double() - want).abs() <= 2**-8 * want).all()
    assert not grads[0][2].any()


def test_gradgradcheck_and_registration():
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([1, 3, 1, 1, 0])
    for fn, leaf in ((lambda a: gather_rows(a, index), x), (lambda a: sum_rows(a, index, 4), y)):
        assert torch.autograd.gradcheck(fn, leaf)
        assert torch.autograd.gradgradcheck(fn, leaf)
    opcheck(_gather, (x, index))
    opcheck(_sum, (y, index, 4))


@pytest.mark.parametrize(
    ("x", "index", "error"),
    [
        (torch.zeros(3, 2), torch.zeros(1, 1, dtype=torch.long), ValueError),
        (torch.zeros(()), torch.zeros(1, dtype=torch.long), ValueError),
        (torch.zeros(3, 2), torch.tensor([3]), ValueError),
        (torch.zeros(3, 2), torch.tensor([-1]), ValueError),
        (torch.zeros(3, 2), torch.tensor([0], dtype=torch.int32), TypeError),
        (torch.zeros(3, 2).int(), torch.tensor([0]), TypeError),
    ],
)
def test_rejects(x, index, error):
    with pytest.raises(error, match=r"need .*got"):
        gather_rows(x, index)
    with pytest.raises(ValueError, match=r"need one index per row, got"):
        sum_rows(torch.zeros(3, 2), torch.tensor([0]), 4)
