"""linear_kl against plain torch in fp64: values, gradients, bytes, errors, compilation."""

import itertools
import math

import pytest
import torch
import torch._dynamo.testing
from compare import assert_no_worse, assert_same, least_workspace, memory_of
from torch.library import opcheck

import fastpref.kernels.linear_kl as module
from fastpref import linear_kl
from fastpref.kernels.linear_kl import _op, linear_kl_ref

DEV = "cuda" if torch.cuda.is_available() else "cpu"
WIDE = torch.float64
DTYPES = [torch.float32, torch.bfloat16, torch.float16, WIDE]
LEAVES = ("hidden", "weight", "bias")


@pytest.fixture(autouse=True)
def backend():
    """One implementation: once is enough."""


def make(N=9, H=24, V=203, M=None, dtype=torch.float32, bias=False, ref_H=17, seed=0):
    gen = torch.Generator().manual_seed(seed)
    inputs = {
        "hidden": torch.randn(N, H, generator=gen),
        "weight": 0.5 * torch.randn(V, H, generator=gen),
        "ref_hidden": torch.randn(N, ref_H, generator=gen),
        "ref_weight": 0.5 * torch.randn(V, ref_H, generator=gen),
    }
    if bias:
        inputs |= {k: torch.randn(V, generator=gen) for k in ("bias", "ref_bias")}
    inputs = {k: v.to(DEV, dtype) for k, v in inputs.items()}
    if M is not None:
        inputs["rows"] = torch.randint(N, (M,), generator=gen).to(DEV)
    return inputs


def run(fn, inputs, dtype=None, trains=LEAVES, **options):
    """The KL, and the gradients of a random combination."""
    x = {k: v.to(dtype or v.dtype) if k != "rows" else v for k, v in inputs.items()}
    for k in set(trains) & x.keys():
        x[k] = x[k].detach().clone().requires_grad_()
    kl = fn(**x, **options)
    upstream = torch.randn(kl.shape, generator=torch.Generator().manual_seed(7)).to(DEV)
    (kl * upstream).sum().backward()
    return {"kl": kl.detach()} | {f"d{k}": x[k].grad for k in LEAVES if k in x and k in trains}


OPTIONS = {
    "plain": {},
    "bent": {"temperature": 0.7, "logit_scale": 1.5, "softcap": 6.0},
    "scaled": {"temperature": 1.3, "logit_scale": 0.25},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("least", [False, True], ids=["one slab", "four slabs"])
@pytest.mark.parametrize("rows", [4, 1024], ids=["tiles", "one tile"])
def test_no_worse_than_torch(dtype, options, least, rows, monkeypatch):
    monkeypatch.setattr(module, "_ROWS", rows)
    for bias, M in ((False, None), (True, 13)):
        inputs = make(M=M, dtype=dtype, bias=bias)
        cut = {"workspace": least_workspace(run, linear_kl, inputs, **options)} if least else {}
        ours = run(linear_kl, inputs, **cut, **options)
        truth = run(linear_kl_ref, inputs, WIDE, **options)
        assert ours["kl"].dtype == torch.promote_types(dtype, torch.float32)
        if dtype == WIDE:
            torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-13)
        else:
            assert_no_worse(ours, run(linear_kl_ref, inputs, **options), truth)


@pytest.mark.parametrize("trains", [("hidden",), ("weight",), ("bias",), ("hidden", "bias")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_what_is_trained(dtype, trains):
    inputs = make(M=13, dtype=dtype, bias=True)
    sides = [run(linear_kl_ref, inputs, d, trains) for d in (None, WIDE)]
    assert_no_worse(run(linear_kl, inputs, None, trains), *sides)


@pytest.mark.parametrize(("N", "H", "V", "ref_H"), [(1, 1, 1, 1), (7, 3, 2, 5), (1100, 5, 3001, 4)])
def test_sizes_of_one_odd_and_past_one_tile(N, H, V, ref_H):
    inputs = make(N, H, V, ref_H=ref_H)
    sides = [run(linear_kl_ref, inputs, dtype) for dtype in (None, WIDE)]
    assert_no_worse(run(linear_kl, inputs), *sides)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [None, 5], ids=["flat", "rows"])
def test_no_rows(dtype, rows):
    inputs = make(0 if rows is None else rows, M=rows and 0, dtype=dtype, bias=True)
    got = run(linear_kl, inputs)
    assert got.pop("kl").shape == (0,)
    assert {k: v.shape for k, v in got.items()} == {f"d{k}": inputs[k].shape for k in LEAVES}
    assert not any(d.any() for d in got.values())


def test_by_hand():
    """Two columns: q = (3/4, 1/4), p = (1/2, 1/2), and the slope p - q of the KL in z."""
    hidden = torch.ones(1, 1, device=DEV, requires_grad=True)
    weight = torch.full((2, 1), 5.0, device=DEV, requires_grad=True)
    ref_weight = torch.tensor([[math.log(3.0)], [0.0]], device=DEV)
    kl = linear_kl(hidden, weight, hidden.detach(), ref_weight)
    want = 0.75 * math.log(3 / 2) + 0.25 * math.log(1 / 2)
    assert kl.item() == pytest.approx(want, abs=1e-7)
    kl.sum().backward()
    assert weight.grad.flatten().tolist() == pytest.approx([-0.25, 0.25], abs=1e-6)
    assert hidden.grad.item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_models(dtype, options):
    inputs = make(64, 32, 2000, dtype=dtype, bias=True)
    inputs |= {f"ref_{k}": inputs[k].clone() for k in LEAVES}
    got = run(linear_kl, inputs, **options)
    assert got["kl"].abs().max() < 1e-5
    assert all(got[f"d{k}"].abs().max() < 1e-5 for k in LEAVES)


def test_nearly_equal_models_keep_a_small_divergence():
    """Logits of up to 30, and a KL of 1e-5 nats: differences of log-probs would lose a tenth."""
    gen = torch.Generator().manual_seed(0)
    weight = (torch.randn(5000, 64, generator=gen) * 4.5 / 8).to(DEV)
    ref_hidden = torch.randn(200, 64, generator=gen).to(DEV)
    hidden = ref_hidden + 1e-3 * torch.randn(200, 64, generator=gen).to(DEV)
    got = linear_kl(hidden, weight, ref_hidden, weight)
    want = linear_kl_ref(*(x.double() for x in (hidden, weight, ref_hidden, weight)))
    assert (hidden @ weight.T).abs().max() > 15 and 1e-6 < want.mean() < 1e-4
    assert (got - want).abs().max() < 1e-6


def test_a_shift_of_all_logits_changes_nothing():
    """What is carried over slabs is relative to maxima: logits of 3,000 would round to 1e-4."""
    x = make(20, 8, 900, bias=True) | {"ref_hidden": torch.zeros(20, 17, device=DEV)}
    x |= {"hidden": torch.zeros(20, 8, device=DEV)}
    x["bias"], x["ref_bias"] = ((8 * x[k]).round() / 8 for k in ("bias", "ref_bias"))
    want = linear_kl(**x)
    need = least_workspace(linear_kl, **x)
    for shift, name in itertools.product((-3000.0, 3000.0), ("bias", "ref_bias")):
        got = linear_kl(**x | {name: x[name] + shift}, workspace=need)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_logits_that_rise_or_fall_from_slab_to_slab():
    x = make(6, 8, 640, dtype=torch.float32, bias=True)
    slope = torch.linspace(-200, 200, 640, device=DEV)
    need = least_workspace(linear_kl, **x)
    for a, b in itertools.product((1, -1, 0), (1, -1)):
        inputs = x | {"bias": x["bias"] + a * slope, "ref_bias": x["ref_bias"] + b * slope}
        sides = [run(linear_kl_ref, inputs, dtype) for dtype in (None, WIDE)]
        assert_no_worse(run(linear_kl, inputs, workspace=need + 20_000), *sides)


@pytest.mark.parametrize("hidden", [slice(0, 150), slice(50, 203)], ids=["first", "last"])
def test_columns_of_minus_inf_in_both_count_nothing(hidden):
    """Whole slabs of 64 columns among them."""
    inputs = make(5, bias=True)
    live = [i for i in range(203) if i not in range(203)[hidden]]
    kept = inputs | {k: inputs[k][live] for k in ("weight", "ref_weight", "bias", "ref_bias")}
    for name in ("bias", "ref_bias"):
        inputs[name] = inputs[name].clone()
        inputs[name][hidden] = -math.inf
    need = least_workspace(run, linear_kl, inputs)
    got = run(linear_kl, inputs, workspace=need)
    for name in ("dweight", "dbias"):
        assert not got[name][hidden].any()
        got[name] = got[name][live]
    assert_no_worse(got, run(linear_kl_ref, kept), run(linear_kl_ref, kept, WIDE))


def test_columns_of_minus_inf_in_one():
    for workspace in (None, 200_000):
        inputs = make(5, bias=True)
        inputs["ref_bias"][70:140] = -math.inf  # the reference never says them
        sides = [run(linear_kl_ref, inputs, dtype) for dtype in (None, WIDE)]
        assert_no_worse(run(linear_kl, inputs, workspace=workspace), *sides)
        inputs = make(5, bias=True)
        inputs["bias"][:70] = -math.inf  # the policy never could
        assert (linear_kl(**inputs, workspace=workspace) == math.inf).all()


def test_what_diverged_is_nan():
    for name in ("hidden", "ref_hidden"):
        inputs = make(4, V=300)
        inputs[name][1] = math.nan
        assert linear_kl(**inputs).isnan().tolist() == [False, True, False, False]
    for name in ("weight", "ref_weight"):
        inputs = make(4, V=300)
        inputs[name][7] = math.nan
        assert linear_kl(**inputs).isnan().all()


def test_leading_dimensions_and_strides():
    x = make(24)
    want = run(linear_kl, x)
    shaped = x | {k: x[k].view(2, 3, 4, -1) for k in ("hidden", "ref_hidden")}
    got = linear_kl(**shaped)
    assert torch.equal(got, want["kl"].view(2, 3, 4))
    x["hidden"], x["weight"] = (x[k].T.contiguous().T for k in ("hidden", "weight"))
    x["ref_hidden"] = torch.stack([x["ref_hidden"]] * 2, 1)[:, 1]
    torch.testing.assert_close(run(linear_kl, x), want)
    x["rows"] = torch.arange(24, device=DEV)
    torch.testing.assert_close(run(linear_kl, x), want)
    one = linear_kl(x["hidden"][0], x["weight"], x["ref_hidden"][0], x["ref_weight"])
    assert one.shape == () and abs(one - want["kl"][0]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_the_same_twice(dtype):
    """Copies of a row are added in a fixed order."""
    inputs = make(5, M=2000, dtype=dtype)
    assert_same(run(linear_kl, inputs), run(linear_kl, inputs))


def test_nothing_is_mutated_and_no_grad():
    inputs = make(M=13, bias=True)
    before = {k: v.clone() for k, v in inputs.items()}
    run(linear_kl, inputs)
    assert_same(inputs, before)
    leaf = inputs | {"hidden": inputs["hidden"].clone().requires_grad_()}
    with torch.no_grad():
        assert not linear_kl(**leaf).requires_grad


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_gradcheck(options):
    x = make(4, 3, 70, M=6, dtype=WIDE, bias=True)

    def fn(hidden, weight, bias):
        return linear_kl(**x | {"hidden": hidden, "weight": weight, "bias": bias}, **options)

    assert torch.autograd.gradcheck(fn, [x[k].clone().requires_grad_() for k in LEAVES])


@pytest.mark.parametrize("rows", [None, 9], ids=["flat", "rows"])
@pytest.mark.parametrize("grads", [[1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 0]], ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_op_registration(grads, rows, softcap):
    x = make(7, 8, 70, M=rows, bias=True)
    grads = [bool(wanted) for wanted in grads]
    for wanted, name in zip(grads, LEAVES, strict=True):
        x[name].requires_grad_(wanted)
    names = ("hidden", "weight", "ref_hidden", "ref_weight", "bias", "ref_bias", "rows")
    opcheck(_op, (*map(x.get, names), 1.5, softcap, 0.7, grads, None, 0))


@pytest.mark.parametrize("rows", [False, True], ids=["padded", "rows"])
def test_one_compiled_graph_serves_every_length(rows):
    torch._dynamo.reset()

    def loss(hidden, weight, ref_hidden, ref_weight, rows):
        return linear_kl(hidden, weight, ref_hidden, ref_weight, rows=rows).sum()

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for M in (5, 64, 1030):
        x = make(40 if rows else M, 16, 600, M=M if rows else None)
        for name in ("rows",) if rows else ("ref_hidden",):
            torch._dynamo.mark_dynamic(x[name], 0)
        grads = []
        for fn in (compiled, loss):
            leaves = [x[k].detach().requires_grad_() for k in ("hidden", "weight")]
            if not rows:
                torch._dynamo.mark_dynamic(leaves[0], 0)
            value = fn(*leaves, x["ref_hidden"], x["ref_weight"], x.get("rows"))
            grads.append([value.detach(), *torch.autograd.grad(value, leaves)])
        torch.testing.assert_close(*grads)
    assert counter.frame_count == 1


@pytest.mark.skipif(DEV == "cuda", reason="the profiler counts the allocations of the CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, WIDE], ids=str)
@pytest.mark.parametrize("more", [0, 1_000_000], ids=["least", "more"])
@pytest.mark.parametrize("case", ["trained", "rows", "bent", "frozen", "strided"])
def test_bytes_stay_within_the_workspace(dtype, more, case, monkeypatch):
    monkeypatch.setattr(module, "_SLACK", 4096)  # which would hide what is not counted
    M, H, V = 200, 160, 9000
    x = make(M // 2 if case == "rows" else M, H, V, dtype=dtype, ref_H=96, bias=case == "bent")
    options = {"softcap": 5.0} if case == "bent" else {}
    if case == "rows":
        options["rows"] = torch.arange(M) % (M // 2)
    if case == "strided":
        x["hidden"] = x["hidden"].T.contiguous().T
    names = ("hidden",) if case == "frozen" else [k for k in LEAVES if k in x]
    leaves = [x[k].requires_grad_() for k in names]
    workspace = least_workspace(linear_kl, **x, **options) + more

    def step():
        return torch.autograd.grad(linear_kl(**x, workspace=workspace, **options).sum(), leaves)

    left = sum(leaf.nbytes for leaf in leaves)
    peak, largest = memory_of(step, left)
    logits = M * V * torch.promote_types(dtype, torch.float32).itemsize
    assert peak - left <= workspace < logits
    assert peak > 0.3 * (workspace - 70_000)  # the measure sees what is allocated
    assert largest < logits / 4 or largest == x["weight"].nbytes


def test_dw_is_rounded_once():
    """bf16 sums over 3,000 rows, three tiles, would be off by many ulp."""
    gen = torch.Generator().manual_seed(0)
    hidden = (1 + torch.rand(3000, 16, generator=gen)).bfloat16().to(DEV)
    weight, ref = (torch.randn(64, 16, generator=gen).bfloat16().to(DEV) for _ in range(2))
    weight.requires_grad_()
    linear_kl(hidden, weight, hidden, ref).sum().backward()
    x, w, r = (t.detach().double() for t in (hidden, weight, ref))
    want = ((x @ w.T).softmax(-1) - (x @ r.T).softmax(-1)).T @ x
    off = (weight.grad.double() - want).abs() / want.abs().clamp(min=1.0)
    assert off.max() < (2**-8 if DEV == "cpu" else 2**-7)


def test_products_ignore_the_global_precision(monkeypatch):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    seen = []
    real = module.product

    def product(*args, **options):
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        return real(*args, **options)

    monkeypatch.setattr(module, "product", product)
    try:
        run(linear_kl, make())
        assert seen == ["ieee"] * 6  # two forward, two again, two for gradients
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


H, W, Y = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.long)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"hidden": H[:2]}, ValueError),
        ({"hidden": H[None], "ref_hidden": H[None], "rows": Y}, ValueError),
        ({"hidden": H[0, 0], "ref_hidden": H[0, 0]}, ValueError),
        ({"rows": Y[None]}, ValueError),
        ({"weight": W[:, :3]}, ValueError),
        ({"weight": W[0]}, ValueError),
        ({"ref_weight": W[:, :3]}, ValueError),
        ({"ref_weight": W[:4]}, ValueError),
        ({"hidden": H[:, :0], "weight": W[:, :0]}, ValueError),
        ({"bias": torch.zeros(4)}, ValueError),
        ({"ref_bias": torch.zeros(5, 1)}, ValueError),
        ({"weight": torch.zeros(10, 8)[::2, ::2]}, ValueError),
        ({"ref_weight": torch.zeros(10, 8)[::2, ::2]}, ValueError),
        ({"temperature": 0.0}, ValueError),
        ({"logit_scale": math.inf}, ValueError),
        ({"softcap": -1.0}, ValueError),
        ({"workspace": 1000}, ValueError),
        ({"rows": Y + 3}, ValueError),
        ({"rows": Y - 1}, ValueError),
        ({"weight": W.to("meta")}, ValueError),
        ({"ref_hidden": H.to("meta")}, ValueError),
        ({"rows": Y.to("meta")}, ValueError),
        ({"ref_weight": W.clone().requires_grad_()}, ValueError),
        ({"ref_hidden": H.clone().requires_grad_()}, ValueError),
        ({"ref_bias": W[:, 0].clone().requires_grad_()}, ValueError),
        ({"hidden": H.bfloat16()}, TypeError),
        ({"ref_bias": torch.zeros(5, dtype=WIDE)}, TypeError),
        ({k: x.int() for k, x in zip(("hidden", "ref_hidden"), (H, H), strict=True)}, TypeError),
        ({"rows": Y.int()}, TypeError),
    ],
)
def test_rejects(change, error):
    right = {"hidden": H, "weight": W, "ref_hidden": H, "ref_weight": W}
    assert linear_kl(**right).tolist() == [0.0] * 3
    with pytest.raises(error, match=r"need .*got"):
        linear_kl(**right | change)


def test_a_reference_that_trains_is_told_to_detach():
    with pytest.raises(ValueError, match=r"ref_hidden .* detach"):
        linear_kl(H, W, H.clone().requires_grad_(), W)
