"""The promises of linear_logp that are not numbers: products, bytes, roundings, nothing mutated."""

import pytest
import torch
from compare import assert_same, least_workspace, memory_of

import fastpref.kernels.linear_logp_loops as loops
from fastpref.kernels.linear_logp import linear_logp, linear_logp_stats

pytestmark = pytest.mark.usefixtures("quick")

M, H, V = 96, 64, 6000
LOGITS = M * V * 4  # bytes of fp32 logits
KEPT_ALL = 8 << 20  # a workspace that keeps every slab


def leaves(dtype=torch.float32, frozen=False, N=M):
    gen = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=gen).to(dtype).requires_grad_()
    weight = (0.2 * torch.randn(V, H, generator=gen)).to(dtype).requires_grad_(not frozen)
    return hidden, weight, torch.randint(V, (M,), generator=gen)


@pytest.fixture
def passes(monkeypatch):
    """How many times M x H x V the products so far amount to."""
    count = [0]
    real = loops.product

    def product(a, b, **options):
        count[0] += a.shape[0] * a.shape[1] * b.shape[1]
        return real(a, b, **options)

    monkeypatch.setattr(loops, "product", product)
    return lambda: count[0] / (M * H * V)


def test_passes_of_a_trained_weight(passes):
    hidden, weight, y = leaves()
    need = least_workspace(linear_logp_stats, hidden, weight, y, outputs=())
    linear_logp(hidden, weight, y, workspace=KEPT_ALL).sum().backward()
    assert passes() == 3
    linear_logp(hidden, weight, y, workspace=need).sum().backward()
    assert passes() == 3 + 4
    linear_logp(hidden, weight, y, workspace=need + LOGITS).sum().backward()
    assert 3.3 < passes() - 7 < 3.7


def test_passes_without_a_trained_weight(passes):
    hidden, weight, y = leaves(frozen=True)
    linear_logp(hidden, weight, y).sum().backward()
    assert passes() == 2
    linear_logp_stats(hidden, weight, y, outputs=("entropy",)).entropy.sum().backward()
    assert passes() == 2 + 3
    options = {"outputs": ("entropy",), "entropy_grad": False}
    stats = linear_logp_stats(hidden, weight, y, **options)
    assert not stats.entropy.requires_grad
    stats.logp.sum().backward()
    assert passes() == 5 + 2
    linear_logp(hidden.detach(), weight, y)
    with torch.no_grad():
        linear_logp(*leaves())
    assert passes() == 7 + 2
    hidden, weight, y = leaves()
    linear_logp(hidden.detach(), weight, y).sum().backward()
    assert passes() == 9 + 2


def test_ignored_rows_cost_nothing(passes):
    hidden, weight, y = leaves()
    y[M // 2 :] = -100
    linear_logp(hidden, weight, y).sum().backward()
    assert passes() == 1.5


def memory(step, *leaves):
    """Of a step that leaves nothing but gradients."""

    def fresh():
        for x in leaves:
            x.grad = None

    def drop_result():
        step()

    left = sum(x.nbytes for x in leaves if x.requires_grad)
    return memory_of(drop_result, left, before=fresh)


@pytest.mark.parametrize("kept", [0.0, 0.5, 1.1], ids=["recomputed", "half", "kept"])
@pytest.mark.parametrize(
    ("dtype", "frozen", "gathers", "options"),
    [
        (torch.float32, False, False, {}),
        (torch.float32, False, True, {"softcap": 5.0}),
        (torch.bfloat16, False, False, {}),
        (torch.bfloat16, False, True, {"outputs": ("entropy",)}),
        (torch.bfloat16, True, True, {"outputs": ("entropy",), "softcap": 5.0}),
        (torch.float32, True, False, {"outputs": ("mean_logit",)}),
    ],
)
def test_bytes_stay_within_the_workspace(dtype, frozen, gathers, options, kept):
    hidden, weight, y = leaves(dtype, frozen, N=M // 3 if gathers else M)
    options = {"outputs": ()} | options
    if gathers:
        options["rows"] = torch.arange(M) % (M // 3)
    else:
        y[::7] = -100
    workspace = least_workspace(linear_logp_stats, hidden, weight, y, **options) + int(
        kept * LOGITS * dtype.itemsize / 4
    )

    def step():
        stats = linear_logp_stats(hidden, weight, y, workspace=workspace, **options)
        loss = stats.logp.sum()
        if stats.entropy is not None:
            loss = loss + stats.entropy.sum()
        loss.backward()

    peak, largest = memory(step, hidden, weight)
    returned = sum(x.nbytes for x in (hidden, weight) if x.requires_grad)
    assert peak - returned <= workspace
    assert peak > 0.3 * (workspace - 70_000)  # the measure sees what is allocated
    if kept == 0:
        assert largest < LOGITS / 2 or largest == weight.nbytes
    if kept == 0 and frozen:
        assert peak < LOGITS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_grad_and_strided_bytes(dtype):
    base, weight, y = leaves(dtype, N=20 * M)
    with torch.no_grad():
        hidden, target = base.view(20, M, H)[:, :-1], y[:-1].expand(20, -1).clone()
        target[1, 5:] = -100
        need = least_workspace(linear_logp_stats, hidden, weight, target, outputs=())
        peak, largest = memory(lambda: linear_logp(hidden, weight, target, workspace=need))
    copied = (target != -100).sum().item() * H * dtype.itemsize
    assert copied < peak <= need < copied + 2e6
    assert largest <= max(copied, LOGITS / 2)


def test_dw_is_rounded_once():
    """bf16 sums over 3,000 rows would be off by many ulp; one rounding is off by half of one."""
    gen = torch.Generator().manual_seed(0)
    hidden = (1 + torch.rand(3000, 16, generator=gen)).bfloat16().requires_grad_()
    weight = torch.randn(64, 16, generator=gen).bfloat16().requires_grad_()
    target = torch.randint(8, (3000,), generator=gen)
    for workspace in (
        KEPT_ALL,
        least_workspace(linear_logp_stats, hidden, weight, target, outputs=()),
    ):
        weight.grad = None
        linear_logp(hidden, weight, target, workspace=workspace).sum().backward()
        x, w = hidden.detach().double(), weight.detach().double()
        p = (x @ w.T).softmax(-1)
        want = (torch.nn.functional.one_hot(target, 64) - p).T @ x
        off = (weight.grad.double() - want).abs() / want.abs().clamp(min=1.0)
        assert off.max() < (2**-8 if workspace != KEPT_ALL else 2**-7)  # kept: p itself in bf16


def test_nothing_saved_is_changed_and_backwards_repeat():
    hidden, weight, y = leaves()
    before = hidden.detach().clone(), weight.detach().clone()
    logp = linear_logp(hidden, weight, y, workspace=KEPT_ALL)
    first = torch.autograd.grad(logp.sum(), (hidden, weight), retain_graph=True)
    second = torch.autograd.grad((2 * logp).sum(), (hidden, weight))
    for one, two in zip(first, second, strict=True):
        assert torch.equal(2 * one, two)
    assert_same({"h": hidden.detach(), "w": weight.detach()}, dict(zip("hw", before, strict=True)))
    with pytest.raises(RuntimeError, match="second time"):
        logp.sum().backward()


def test_kept_slabs_are_freed_by_the_backward_and_skip_saving_hooks():
    hidden, weight, y = leaves()
    packed = []

    def pack(x):
        packed.append(x.nbytes)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        logp = linear_logp(hidden, weight, y, workspace=KEPT_ALL)
    assert max(packed) == weight.nbytes < LOGITS
    node = logp.grad_fn.next_functions[0][0]
    assert node.kept[0].nbytes >= LOGITS
    logp.sum().backward()
    assert node.kept is None


@pytest.mark.gpu
@pytest.mark.parametrize("workspace", [256 << 20, 1 << 30])
def test_real_sizes_on_cuda(workspace):
    """bf16 at a Llama's vocabulary: accurate to 1e-3 nats, within the workspace, the same twice."""
    gen = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(2048, 1024, generator=gen, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(128_256, 1024, generator=gen, device="cuda") / 8).bfloat16()
    weight.requires_grad_()
    target = torch.randint(len(weight), (2048,), generator=gen, device="cuda")
    rows = torch.arange(2048, device="cuda")

    def step():
        hidden.grad = weight.grad = None
        logp = linear_logp(hidden, weight, target, rows=rows, workspace=workspace)
        logp.sum().backward()
        return {"logp": logp.detach(), "dhidden": hidden.grad, "dweight": weight.grad}

    first = step()
    hidden.grad = weight.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    again = step()
    used = torch.cuda.max_memory_allocated() - before
    assert used <= workspace + hidden.nbytes + weight.nbytes
    assert_same(first, again)
    some = slice(0, 64)
    logits = hidden.detach()[some].double() @ weight.detach().double().t()
    truth = logits.log_softmax(-1).gather(1, target[some, None])[:, 0]
    assert (first["logp"][some] - truth).abs().max() < 1e-3
