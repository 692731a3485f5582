"""linear_logp against plain torch in fp64: values, gradients, shapes, errors, compilation."""

import pytest
import torch
import torch._dynamo.testing
import torch._inductor.config
from compare import assert_no_worse, assert_same, least_workspace
from torch.library import opcheck

import fastpref.kernels.linear_logp as module
import fastpref.kernels.linear_logp_loops as loops
import fastpref.kernels.linear_logp_plan as planning
import fastpref.kernels.product as products
from fastpref.kernels.linear_logp import _op, linear_logp, linear_logp_ref, linear_logp_stats

DEV = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def make(N=9, H=24, V=203, M=None, dtype=torch.float32, bias=False, scale=0.5, seed=0):
    gen = torch.Generator().manual_seed(seed)
    inputs = {
        "hidden": torch.randn(N, H, generator=gen),
        "weight": scale * torch.randn(V, H, generator=gen),
        "bias": torch.randn(V, generator=gen) if bias else None,
    }
    inputs = {k: None if v is None else v.to(DEV, dtype) for k, v in inputs.items()}
    count = N if M is None else M
    inputs["rows"] = None if M is None else torch.randint(N, (M,), generator=gen).to(DEV)
    target = torch.randint(V, (count,), generator=gen)
    target[1::4] = -100
    inputs["target"] = target.to(DEV)
    return inputs


def run(fn, inputs, dtype=None, frozen=False, entropy=True, **options):
    """logp, every statistic and every gradient of a random combination of logp and entropy."""
    x = {k: v for k, v in inputs.items() if v is not None}
    for k in ("hidden", "weight", "bias"):
        if k in x:
            x[k] = x[k].detach().to(dtype or x[k].dtype, copy=True)
            x[k].requires_grad_(k == "hidden" or not frozen)
    stats = fn(**x, **options)
    gen = torch.Generator().manual_seed(7)
    g, h = (torch.randn(stats.logp.shape, generator=gen).to(DEV) for _ in range(2))
    loss = (stats.logp * g).sum()
    if entropy:
        loss = loss + (stats.entropy * h).sum()
    loss.backward()
    out = {k: v.detach() for k, v in stats._asdict().items() if k != "is_top1"}
    leaves = ("hidden", "weight", "bias")
    return out | {f"d{k}": x[k].grad for k in leaves if k in x and x[k].grad is not None}


WIDE = torch.float64
OPTIONS = {
    "plain": {},
    "bent": {"temperature": 0.7, "logit_scale": 1.5, "softcap": 4.0},
    "scaled": {"temperature": 1.3, "logit_scale": 0.25},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("entropy", [False, True], ids=["logp", "entropy"])
@pytest.mark.parametrize("workspace", [None, "least"])
def test_no_worse_than_torch(dtype, options, frozen, entropy, workspace, monkeypatch):
    """Slabs of 64 columns, all of them kept, or none."""
    monkeypatch.setattr(planning, "MAX_SLAB", 64)
    for bias, M in ((False, None), (True, 13)):
        inputs = make(M=M, dtype=dtype, bias=bias)
        cut = {}
        if workspace == "least":
            cut = {
                "workspace": least_workspace(
                    run, linear_logp_stats, inputs, None, frozen, entropy, **options
                )
            }
        ours = run(linear_logp_stats, inputs, None, frozen, entropy, **cut, **options)
        truth = run(linear_logp_ref, inputs, torch.float64, frozen, entropy, **options)
        if dtype == torch.float64:
            torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-13)
        else:
            torchs = run(linear_logp_ref, inputs, None, frozen, entropy, **options)
            assert_no_worse(ours, torchs, truth)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "recomputed"])
def test_a_saturated_cap(frozen, kept):
    """Products of 7 to 9 under a cap of 3: what is left of 1 - tanh^2 is the gradient."""
    options = {"softcap": 3.0}
    inputs = make(1, 1, 3)
    inputs["hidden"].data.fill_(1.0)
    inputs["weight"].data.copy_(torch.tensor([[9.0], [8.0], [7.0]]))
    inputs["target"].zero_()
    cut = {}
    if not kept:
        least = least_workspace(run, linear_logp_stats, inputs, None, frozen, **options)
        cut = {"workspace": least}
    sides = [run(linear_logp_ref, inputs, d, frozen, **options) for d in (None, torch.float64)]
    assert_no_worse(run(linear_logp_stats, inputs, None, frozen, **cut, **options), *sides)


@pytest.fixture
def as_on_cuda(monkeypatch, backend):
    """CPU tensors, cut and multiplied as CUDA tensors are: half-precision operands, wide sums."""
    if backend != "triton":
        pytest.skip("CUDA tensors go to Triton")

    def product(a, b, *, out, accumulate=False):
        assert a.dtype == b.dtype and out.dtype in (a.dtype, torch.float32)
        found = a.float() @ b.float() + (out if accumulate else 0)
        return out.copy_(found)

    monkeypatch.setattr(loops, "product", product)
    for part in (products, planning):
        monkeypatch.setattr(part, "upcasts", lambda dtype, device: False)
    real = module.Case
    monkeypatch.setattr(module, "Case", lambda dtype, _, *a, **k: real(dtype, "cuda", *a, **k))


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("entropy", [False, True], ids=["logp", "entropy"])
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "recomputed"])
def test_cut_as_on_cuda(dtype, frozen, entropy, kept):
    for M, options in ((None, {}), (13, OPTIONS["bent"])):
        inputs = make(M=M, dtype=dtype, bias=M is not None)
        cut = (
            {}
            if kept
            else {
                "workspace": least_workspace(
                    run, linear_logp_stats, inputs, None, frozen, entropy, **options
                )
            }
        )
        ours = run(linear_logp_stats, inputs, None, frozen, entropy, **cut, **options)
        sides = [run(linear_logp_ref, inputs, d, frozen, entropy, **options) for d in (None, WIDE)]
        assert_no_worse(ours, *sides)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize(("N", "H", "V"), [(1, 1, 1), (7, 3, 2), (2, 8, 9001)])
def test_sizes_of_one_odd_and_past_one_slab(N, H, V, frozen):
    inputs = make(N, H, V)
    if N == 1:
        inputs["target"].fill_(V - 1)
    sides = [run(linear_logp_ref, inputs, dtype, frozen) for dtype in (None, torch.float64)]
    assert_no_worse(run(linear_logp_stats, inputs, None, frozen), *sides)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_more_rows_than_a_tile(frozen):
    inputs = make(1500, 5, 67, bias=True)
    assert (inputs["target"] != -100).sum() > 1024
    sides = [run(linear_logp_ref, inputs, dtype, frozen) for dtype in (None, torch.float64)]
    assert_no_worse(run(linear_logp_stats, inputs, None, frozen), *sides)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_a_certain_token_keeps_its_gradient(frozen):
    """1 - p is 6e-4: nothing is left of it in a bf16 probability, which is 1."""
    weight = torch.zeros(80, 4, device=DEV, dtype=torch.bfloat16)
    weight[70, 0] = 11.75
    inputs = {"hidden": torch.eye(4, device=DEV, dtype=torch.bfloat16)[:1], "weight": weight}
    inputs |= {"target": torch.tensor([70], device=DEV)}
    got = run(linear_logp_stats, inputs, None, frozen, entropy=False)
    want = run(linear_logp_ref, inputs, torch.float64, frozen, entropy=False)
    assert 1e-3 < abs(want["dhidden"][0, 0]) < 2e-2
    for name in ("logp", "dhidden"):
        torch.testing.assert_close(got[name].double(), want[name], rtol=2**-8, atol=0)


def test_bf16_logits_are_not_rounded():
    inputs = make(64, 64, 4000, dtype=torch.bfloat16, scale=1.0)
    inputs["target"] = inputs["target"].clamp(min=0)
    z = inputs["hidden"].double() @ inputs["weight"].double().T
    assert z.abs().max() > 30
    got = linear_logp(inputs["hidden"], inputs["weight"], inputs["target"])
    want = z.log_softmax(-1).gather(1, inputs["target"][:, None])[:, 0]
    assert (got - want).abs().max() < (1e-4 if DEV == "cpu" else 1e-3)


def test_statistics_by_hand():
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0]], device=DEV)
    weight = torch.tensor([[0.0, 2.0], [0.0, 2.0], [3.0**0.5, 2.0], [0.0, 2.0]], device=DEV).log1p()
    target = torch.tensor([2, -100], device=DEV)
    stats = linear_logp_stats(hidden, weight, target)
    e = 1 + 3**0.5  # probabilities 1, 1, e, 1 over 3 + e
    total = 3 + e
    probs = torch.tensor([1 / total, 1 / total, e / total, 1 / total], dtype=torch.float64)
    logp = probs.log()
    want = {
        "logp": logp[2],
        "entropy": -(probs * logp).sum(),
        "mean_logit": torch.tensor(e).log() / 4,
        "log_sum_sq_probs": (probs**2).sum().log(),
    }
    for name, value in want.items():
        got = getattr(stats, name)
        assert got.dtype == torch.float32 and got[1] == 0
        torch.testing.assert_close(got[0].cpu(), value.float(), rtol=1e-6, atol=1e-6)
    assert stats.is_top1.tolist() == [True, False]
    ignored = torch.tensor([-100, -100], device=DEV)
    top = linear_logp_stats(hidden, weight.abs() * 0, ignored, rows=ignored * 0).is_top1
    assert top.tolist() == [False, False]  # though no logit is larger
    some = linear_logp_stats(hidden, weight, target, outputs=("is_top1",))
    assert some.entropy is None and some.mean_logit is None and some.log_sum_sq_probs is None
    assert linear_logp_stats(hidden, weight, target.abs() % 2).is_top1[0].item() is False


def test_mean_logit_is_hidden_times_the_mean_weight():
    x = make(30, 16, 700, dtype=torch.float64)
    got = linear_logp_stats(x["hidden"], x["weight"], x["target"].clamp(min=0), logit_scale=2.0)
    want = 2 * x["hidden"] @ x["weight"].mean(0)
    torch.testing.assert_close(got.mean_logit, want)


def test_a_slab_of_minus_inf_and_no_entropy():
    inputs = make(3, 8, 300, bias=True)
    inputs["bias"][:256] = -float("inf")
    inputs["target"] = torch.tensor([260, 299, -100], device=DEV)
    cut = least_workspace(linear_logp_stats, **inputs)
    got = linear_logp_stats(**inputs, outputs=(), workspace=cut).logp
    want = linear_logp_ref(
        **{
            k: v if v is None else v.double() if v.is_floating_point() else v
            for k, v in inputs.items()
        }
    ).logp
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


def test_a_bias_of_any_stride():
    inputs = make(5, 8, 70)
    del inputs["bias"]
    for bias in (torch.randn(140, device=DEV)[::2], torch.ones(1, device=DEV).expand(70)):
        want = linear_logp(**inputs, bias=bias.contiguous())
        assert torch.equal(linear_logp(**inputs, bias=bias), want)


@pytest.mark.parametrize("softcap", [None, 6.0])
@pytest.mark.parametrize("outputs", [(), ("entropy",)])
def test_what_diverged_is_nan(softcap, outputs):
    inputs = make(4, 8, 300)
    inputs["target"] = inputs["target"].clamp(min=0)
    inputs["hidden"][1] = float("nan")
    inputs["weight"][7] = float("nan")
    stats = linear_logp_stats(**inputs, outputs=outputs, softcap=softcap)
    assert stats.logp.isnan().all() and (stats.entropy is None or stats.entropy.isnan().all())
    clean = make(4, 8, 300) | {"hidden": inputs["hidden"], "target": inputs["target"]}
    stats = linear_logp_stats(**clean, outputs=outputs, softcap=softcap)
    assert stats.logp.isnan().tolist() == [False, True, False, False]


def test_columns_of_minus_inf():
    inputs = make(5, 8, 3000, bias=True)
    inputs["bias"][:2500] = -float("inf")  # the first slabs hold nothing else
    inputs["target"] = torch.tensor([2600, 2999, -100, 2500, 2700], device=DEV)
    for cut in ({}, {"workspace": 1_000_000}):
        got = run(linear_logp_stats, inputs, **cut)
        live = inputs | {k: inputs[k][2500:] for k in ("weight", "bias")}
        live["target"] = torch.where(inputs["target"] < 0, -100, inputs["target"] - 2500)
        want = run(linear_logp_ref, live, torch.float64)
        for name in ("logp", "entropy", "dhidden"):
            torch.testing.assert_close(got[name].double(), want[name], rtol=1e-4, atol=1e-5)
        assert not got["dweight"][:2500].any()


def test_leading_dimensions_and_strides():
    x = make(24, 16, 100)
    hidden, weight, target = x["hidden"].view(2, 3, 4, 16), x["weight"], x["target"].view(2, 3, 4)
    flat = linear_logp(x["hidden"], weight, x["target"])
    assert_same({"": linear_logp(hidden, weight, target)}, {"": flat.view(2, 3, 4)})
    grads = []
    for cut in (lambda x: x[:, 1:, :-1], lambda x: x[:, 1:, :-1].contiguous()):
        leaf = hidden.detach().clone().requires_grad_()
        linear_logp(cut(leaf), weight, target[:, 1:, :-1]).sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)
    torch.testing.assert_close(
        linear_logp(hidden, weight.T.contiguous().T, target), flat.view(2, 3, 4)
    )
    torch.testing.assert_close(linear_logp(x["hidden"].T.contiguous().T, weight, x["target"]), flat)
    one = linear_logp(x["hidden"][0], weight, x["target"][0])
    torch.testing.assert_close(one, flat[0])


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_ignored_rows_may_hold_nan_with_rows(frozen):
    inputs = make(N=9, M=12)
    clean = run(linear_logp_stats, inputs, frozen=frozen)
    only_ignored = set(range(9)) - set(inputs["rows"][inputs["target"] != -100].tolist())
    inputs["target"][inputs["rows"] == 0] = -100
    clean = run(linear_logp_stats, inputs, frozen=frozen)
    inputs["hidden"][[0, *only_ignored]] = float("nan")
    dirty = run(linear_logp_stats, inputs, frozen=frozen)
    for name in ("logp", "dhidden", *([] if frozen else ["dweight"])):
        torch.testing.assert_close(dirty[name], clean[name])


def test_ignored_rows_are_never_read():
    inputs = make(12, 16, 100)
    ignored = inputs["target"] == -100
    clean = run(linear_logp_stats, inputs)
    inputs["hidden"][ignored] = float("nan")
    got = run(linear_logp_stats, inputs)
    assert_same(got, clean)
    for name in ("logp", "entropy", "mean_logit", "log_sum_sq_probs"):
        assert not got[name][ignored].any()
    assert not got["dhidden"][ignored].any()


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_nothing_to_score(frozen):
    for inputs in (make(0), make(5, M=0), make(4) | {"target": torch.full((4,), -100, device=DEV)}):
        out = run(linear_logp_stats, inputs, None, frozen)
        assert not out["dhidden"].any() and out["dhidden"].shape == inputs["hidden"].shape
        assert frozen or not out["dweight"].any()
        assert not out["logp"].any() and out["logp"].shape == inputs["target"].shape


def test_repeated_rows_are_the_same_in_every_run():
    inputs = make(6, 64, 500, M=60, dtype=torch.bfloat16)
    first = run(linear_logp_stats, inputs)
    for _ in range(2):
        assert_same(run(linear_logp_stats, inputs), first)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_gradcheck(options):
    x = make(4, 3, 70, M=6, dtype=torch.float64, bias=True)
    leaves = [x[k].requires_grad_() for k in ("hidden", "weight", "bias")]

    def fn(hidden, weight, bias):
        chosen = {"target": x["target"], "rows": x["rows"], "outputs": ("entropy",)}
        return linear_logp_stats(hidden, weight, bias=bias, **chosen, **options)[:2]

    assert torch.autograd.gradcheck(fn, leaves)
    leaves[1].requires_grad_(False)
    assert torch.autograd.gradcheck(lambda h: fn(h, leaves[1], leaves[2].detach()), leaves[:1])


def test_products_ignore_the_global_precision(monkeypatch):
    inputs = make(64, 64, 400)
    want = run(linear_logp_stats, inputs)
    before = torch.get_float32_matmul_precision()
    matmul = torch.backends.cuda.matmul
    reductions = matmul.allow_bf16_reduced_precision_reduction, True
    torch.set_float32_matmul_precision("medium")
    matmul.allow_bf16_reduced_precision_reduction = False, False
    seen = []
    real = loops.product

    def product(*args, **options):
        seen.append((matmul.allow_fp16_reduced_precision_reduction, matmul.fp32_precision))
        return real(*args, **options)

    monkeypatch.setattr(loops, "product", product)
    try:
        assert_same(run(linear_logp_stats, inputs), want)
        assert set(seen) == {(False, "ieee")}
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch._C._get_cublas_allow_bf16_reduced_precision_reduction() == (False, False)
    finally:
        torch.set_float32_matmul_precision(before)
        matmul.allow_bf16_reduced_precision_reduction = reductions


@pytest.mark.parametrize(
    ("grads", "softcap", "rows"),
    [
        ([True, True, True], 3.0, True),
        ([True, True, False], None, False),
        ([True, False, False], 3.0, True),
        ([False, False, False], None, False),
    ],
)
def test_op_registration(grads, softcap, rows):
    x = make(7, 8, 70, M=9 if rows else None, bias=True)
    for wanted, name in zip(grads, ("hidden", "weight", "bias"), strict=True):
        x[name].requires_grad_(wanted)
    tensors = (x["hidden"], x["weight"], x["target"], x["bias"], x["rows"], None)
    for entropy in {False, grads[0]}:
        options = ("entropy is_top1", [*grads, entropy], None, 0, 0.0, "")
        opcheck(_op, (*tensors, 0.7, 1.5, softcap, *options))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("rows", [False, True], ids=["padded", "rows"])
def test_one_compiled_graph_serves_every_length(rows):
    torch._dynamo.reset()

    def loss(hidden, weight, target, rows):
        return linear_logp(hidden, weight, target, rows=rows, workspace=1_200_000).sum()

    # "aot_eager" traces both graphs and keeps the fakes' sizes; lowering is not what is tested
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for M in (5, 64, 1030):  # all slabs kept, some, none
        x = make(40 if rows else M, 16, 600, M=M if rows else None)
        for name in ("target", "rows") if rows else ("target", "hidden"):
            torch._dynamo.mark_dynamic(x[name], 0)
        grads = []
        for fn in (compiled, loss):
            leaves = [x[k].detach().requires_grad_() for k in ("hidden", "weight")]
            if not rows:
                torch._dynamo.mark_dynamic(leaves[0], 0)
            value = fn(*leaves, x["target"], x["rows"])
            grads.append([value.detach(), *torch.autograd.grad(value, leaves)])
        torch.testing.assert_close(*grads)
    assert counter.frame_count == 1


@pytest.mark.parametrize("strided", [False, True])
def test_compiled_ignored_rows_may_hold_nan(strided):
    torch._dynamo.reset()
    inputs = make(6, 8, 100)
    inputs["hidden"][inputs["target"] == -100] = float("nan")
    hidden = inputs["hidden"].T.contiguous().T if strided else inputs["hidden"]
    leaves = [hidden.requires_grad_(), inputs["weight"].requires_grad_()]
    fn = torch.compile(lambda h, w: linear_logp(h, w, inputs["target"]).sum(), backend="aot_eager")
    got, want = (
        torch.autograd.grad(f(*leaves), leaves) for f in (fn, fn._torchdynamo_orig_callable)
    )
    torch.testing.assert_close(got, want)
    assert all(x.isfinite().all() for x in got)


@torch._inductor.config.patch(force_disable_caches=True)  # its keys leave our fakes out
def test_compiles_through_inductor():
    torch._dynamo.reset()
    x = make(12, 16, 100)
    hidden, weight = x["hidden"].requires_grad_(), x["weight"].requires_grad_()
    fn = torch.compile(lambda h, w: linear_logp(h * 2, w, x["target"]).sum(), fullgraph=True)
    got = torch.autograd.grad(fn(hidden, weight), (hidden, weight))
    value = linear_logp(hidden * 2, weight, x["target"]).sum()
    torch.testing.assert_close(got, torch.autograd.grad(value, (hidden, weight)))


H, W, Y = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.long)


@pytest.mark.parametrize(
    ("args", "options", "error"),
    [
        ((H, W, Y[:2]), {}, ValueError),
        ((H, W[:, :3], Y), {}, ValueError),
        ((H, W[0], Y), {}, ValueError),
        ((H[None], W, Y), {"rows": Y}, ValueError),
        ((H, W, Y), {"rows": Y[:2]}, ValueError),
        ((H, W, Y), {"bias": torch.zeros(4)}, ValueError),
        ((H, torch.zeros(9, 8)[::2, ::2], Y), {}, ValueError),
        ((H, W, Y), {"temperature": 0.0}, ValueError),
        ((H, W, Y), {"logit_scale": float("inf")}, ValueError),
        ((H, W, Y), {"softcap": -1.0}, ValueError),
        ((H, W, Y), {"outputs": ("entropie",)}, ValueError),
        ((H, W, Y), {"outputs": "entropy"}, ValueError),
        ((H, W, Y), {"workspace": 1000}, ValueError),
        ((H, W, Y + 5), {}, ValueError),
        ((H, W, Y - 1), {}, ValueError),
        ((H, W, Y), {"rows": Y + 3}, ValueError),
        ((H, W.to("meta"), Y), {}, ValueError),
        ((H.bfloat16(), W, Y), {}, TypeError),
        ((H.int(), W.int(), Y), {}, TypeError),
        ((H, W, Y.int()), {}, TypeError),
    ],
)
def test_rejects(args, options, error):
    with pytest.raises(error, match=r"need .*got"):
        linear_logp_stats(*args, **options)
