"""The log-prob ops on drawn shapes, masks and layouts: the rule, repeats, symmetries."""

import dataclasses
from functools import partial
from itertools import combinations

import pytest
import torch
import torch._dynamo.testing
from compare import assert_same
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

import fastpref.kernels.logp_from_logits as logits_module
from fastpref.kernels.linear_logp import linear_logp, linear_logp_ref, linear_logp_stats
from fastpref.kernels.logp_from_logits import (
    STATS,
    logp_from_logits,
    logp_stats_from_logits,
    stats_from_logits_ref,
)

DEV = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LEAVES = ("hidden", "weight", "bias")
SUBSETS = [some for size in range(4) for some in combinations(LEAVES, size)]


@dataclasses.dataclass(frozen=True)
class Case:
    lead: tuple[int, ...]  # of hidden or logits; of the target too where there are no rows
    layout: str
    V: int
    dtype: torch.dtype
    ignored: float  # probability
    outputs: frozenset[str]
    wanted: tuple[str, ...]
    options: dict[str, float | None]
    seed: int
    H: int = 0  # 0 for the ops on logits
    M: int | None = None  # with rows
    bias: bool = False
    turned_weight: bool = False
    room: float | None = None  # for kept slabs, 1 for about all; None: the default workspace

    def inputs(self) -> dict[str, Tensor]:
        """Of the case's dtype, on the CPU and contiguous."""
        gen = torch.Generator().manual_seed(self.seed)
        x = {"logits": (*self.lead, self.V)}
        if self.H:
            x = {"hidden": (*self.lead, self.H), "weight": (self.V, self.H)}
        if self.bias:
            x["bias"] = (self.V,)
        x = {k: torch.randn(shape, generator=gen) for k, shape in x.items()}
        if self.H:
            x["weight"] /= self.H**0.5
        x = {k: v.to(self.dtype) for k, v in x.items()}
        shape = self.lead
        if self.M is not None:
            shape = (self.M,)
            x["rows"] = torch.randint(self.lead[0], shape, generator=gen)
        target = torch.randint(self.V, shape, generator=gen)
        x["target"] = target.masked_fill(torch.rand(shape, generator=gen) < self.ignored, -100)
        return x


lengths = st.one_of(st.integers(1, 9), st.integers(63, 66), st.integers(1, 400))
short = st.integers(0, 5)
leads = st.one_of(
    st.tuples(st.integers(0, 40)),
    st.tuples(short, short),
    st.tuples(),
    st.tuples(short, short, short),
)
shared = {
    "V": lengths,
    "dtype": st.sampled_from(DTYPES),
    "ignored": st.sampled_from([0.0, 0.3, 0.3, 0.3, 1.0]),
    "outputs": st.frozensets(st.sampled_from(STATS)),
    "seed": st.integers(0, 2**16),
}
temperatures = st.sampled_from([1.0, 0.7, 2.0])
logits_cases = st.builds(
    Case,
    lead=leads,
    layout=st.sampled_from(["plain", "cut"]),
    wanted=st.just(("logits",)),
    options=st.fixed_dictionaries({"temperature": temperatures}),
    **shared,
)
linear_options = {
    "temperature": temperatures,
    "logit_scale": st.sampled_from([1.0, 1.5]),
    # well above the logits: where tanh saturates, 1 - tanh**2 is what rounding leaves of it
    "softcap": st.sampled_from([None, 3.0, 8.0, 30.0]),
}


@st.composite
def linear_cases(draw):
    gathers, rooms = draw(st.booleans()), [0.0, 0.7, None]
    common = {name: draw(strategy) for name, strategy in shared.items()}
    return Case(
        lead=(draw(st.integers(1, 12)),) if gathers else draw(leads),
        layout=draw(st.sampled_from(["cut", "plain"] if gathers else ["cut", "plain", "turned"])),
        wanted=(),
        options=draw(st.fixed_dictionaries(linear_options)),
        H=draw(st.integers(1, 24)),
        M=draw(st.integers(0, 40)) if gathers else None,
        bias=draw(st.booleans()),
        turned_weight=draw(st.booleans()),
        room=draw(st.sampled_from(rooms)),
        **common,
    )


def small(case: Case) -> Case:
    M = None if case.M is None else min(case.M, 3)
    lead = tuple(min(n, 3 if i == 0 else 1) for i, n in enumerate(case.lead))
    return dataclasses.replace(case, lead=lead, M=M, V=min(case.V, 100))


def check_drawn(check, cases, backend, start, count):
    """``check`` as many drawn cases, others from another ``start``.

    In the interpreter, which takes milliseconds a row and slab, they are few and small as drawn.
    """
    phases = tuple(Phase)
    if backend == "triton":
        cases, count, phases = cases.map(small), count // 20, (Phase.generate,)
    drawn = settings(deadline=None, derandomize=True, max_examples=count, phases=phases)
    drawn(seed(start)(given(cases)(check)))()


def lay(x: Tensor, layout: str) -> Tensor:
    """The same values under other strides, NaN between them."""
    if layout == "turned" and x.ndim > 1:
        return x.mT.contiguous().mT
    if layout == "cut" and x.ndim:
        wide = x.new_full([size + 2 for size in x.shape], float("nan"))
        x = wide[tuple(slice(1, -1) for _ in x.shape)].copy_(x)
    return x


def run(fn, case: Case, inputs, **options) -> dict[str, Tensor]:
    """What was asked for, and the wanted gradients of a random combination of it."""
    layouts = {"hidden": case.layout, "logits": case.layout}
    layouts["weight"] = "turned" if case.turned_weight else "plain"
    x = {k: lay(v.to(DEV, copy=True), layouts.get(k, "plain")) for k, v in inputs.items()}
    for name in case.wanted:
        x[name].requires_grad_()
    stats = fn(**x, **case.options, **options)._asdict()
    out = {k: v for k, v in stats.items() if k in {"logp", *case.outputs}}
    if case.wanted:
        gen = torch.Generator().manual_seed(7)
        scored = [out[k] for k in ("logp", "entropy") if k in out]
        weights = [torch.randn(s.shape, generator=gen).to(s) for s in scored]
        grads = torch.autograd.grad(scored, [x[k] for k in case.wanted], weights)
        out |= {f"d{k}": grad for k, grad in zip(case.wanted, grads, strict=True)}
    return {k: v.detach() for k, v in out.items()}


def assert_within_the_rule(ours: dict[str, Tensor], ref, case: Case):
    """The rule of compare.py with a floor, since torch's error on one tiny case is luck.

    Torch's is the largest of its own and of what three moves of the inputs by up to 16 ulp of fp32
    do to the truth: about as often a logit is rounded on its way through product, scale, bias, cap,
    temperature and maximum, and back from its log-prob. Values in nats are differences of logits,
    which are 4 or so: their ulp is that of 4 at least.
    """
    inputs = case.inputs()
    gen = torch.Generator().manual_seed(1)
    wide = torch.promote_types(case.dtype, torch.float32)
    # in fp64 the truth is rounded as well
    ulps = (64 if wide == torch.float64 else 16) * torch.finfo(wide).eps

    def moved(by):
        x = {k: v.double() for k, v in inputs.items() if v.is_floating_point()}
        to = {k: 2 * torch.rand(v.shape, generator=gen).double() - 1 for k, v in x.items()}
        return run(ref, case, inputs | {k: v * (1 + by * to[k]) for k, v in x.items()})

    truth, others = moved(0), [run(ref, case, inputs), *(moved(ulps) for _ in range(3))]
    assert ours.keys() == truth.keys()
    for name, want in truth.items():
        assert ours[name].shape == want.shape, name
        if name == "is_top1":
            assert torch.equal(ours[name], want)
        elif want.numel():
            error, *bases = ((x[name].double() - want).abs().max() for x in (ours, *others))
            size = want.abs().max().clamp(min=0.0 if name[0] == "d" else 4.0)
            limit = 2 * max(bases) + torch.finfo(ours[name].dtype).eps * size
            assert error <= limit, f"{name}: {error:.1e}, allowed {limit:.1e}"


def least(call) -> int:
    """The workspace in bytes below which ``call`` refuses to run."""
    with pytest.raises(ValueError, match="need a workspace of") as error:
        call(workspace=1)
    return int(str(error.value).split(" bytes")[0].split()[-1])


def workspace(case: Case, inputs, outputs) -> int | None:
    if case.room is None:
        return None
    need = least(partial(run, linear_logp_stats, case, inputs, outputs=outputs))
    return need + int(case.room * inputs["target"].numel() * case.V * case.dtype.itemsize)


@pytest.mark.parametrize("wanted", SUBSETS, ids="-".join)
def test_linear_logp(backend, wanted):
    def check(case):
        case = dataclasses.replace(case, wanted=wanted, bias=case.bias or "bias" in wanted)
        inputs, outputs = case.inputs(), tuple(sorted(case.outputs))
        options = {"outputs": outputs, "workspace": workspace(case, inputs, outputs)}
        ours = run(linear_logp_stats, case, inputs, **options)
        assert_within_the_rule(ours, linear_logp_ref, case)

        live = inputs["target"] != -100
        unread = ~live
        if case.M is not None:
            unread = torch.ones(case.lead, dtype=torch.bool)
            unread[inputs["rows"][live]] = False
        inputs["hidden"][unread] = float("nan")
        assert_same(run(linear_logp_stats, case, inputs, **options), ours)
        for name in {"logp", *case.outputs}:
            assert not ours[name].cpu()[~live].any()
        if "hidden" in wanted:
            assert not ours["dhidden"].cpu()[unread].any()

    check_drawn(check, linear_cases(), backend, f"{wanted}", 120)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("wanted", [("hidden",), LEAVES], ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_rows_than_a_tile(wanted, dtype):
    options = {"temperature": 0.7, "logit_scale": 1.5, "softcap": 30.0}
    case = Case((9,), "plain", 70, dtype, 0.3, STATS, wanted, options, 0, 5, 3000, True, room=0.0)
    inputs = case.inputs()
    limit = {"workspace": workspace(case, inputs, STATS)}
    assert_within_the_rule(run(linear_logp_stats, case, inputs, **limit), linear_logp_ref, case)


def test_symmetries_of_linear_logp(backend):
    def check(case):
        changes = {"dtype": torch.float32, "bias": True, "wanted": LEAVES, "outputs": STATS}
        case = dataclasses.replace(case, **changes, room=0.0)
        inputs = case.inputs()
        options = {"workspace": workspace(case, inputs, STATS)}
        want = run(linear_logp_stats, case, inputs, **options)
        order = torch.randperm(case.V, generator=torch.Generator().manual_seed(case.seed))
        back, target = order.argsort(), inputs["target"]
        turned = {"weight": inputs["weight"][order], "bias": inputs["bias"][order]}
        turned["target"] = torch.where(target < 0, target, back[target.clamp(min=0)])
        got = run(linear_logp_stats, case, inputs | turned, **options)
        got |= {name: got[name][back] for name in ("dweight", "dbias")}
        assert_close(got, want)
        if case.options["softcap"] is None:
            got = run(linear_logp_stats, case, inputs | {"bias": inputs["bias"] + 3}, **options)
            moved = 3 * case.options["logit_scale"] / case.options["temperature"]
            got["mean_logit"] -= moved * (target != -100).to(DEV)
            assert_close(got, want)

    check_drawn(check, linear_cases(), backend, "", 90)


@pytest.mark.parametrize("tile", [1 << 19, 100])
@pytest.mark.parametrize("inplace", [False, True])
def test_logp_from_logits(backend, monkeypatch, tile, inplace):
    monkeypatch.setattr(logits_module, "_TILE", tile)

    def check(case):
        inputs = case.inputs()
        options = {"outputs": tuple(sorted(case.outputs)), "inplace_backward": inplace}
        ours = run(logp_stats_from_logits, case, inputs, **options)
        assert_within_the_rule(ours, stats_from_logits_ref, case)
        ignored = inputs["target"] == -100
        inputs["logits"][ignored] = float("nan")
        assert_same(run(logp_stats_from_logits, case, inputs, **options), ours)
        for name in {"logp", "dlogits", *case.outputs}:
            assert not ours[name].cpu()[ignored].any()

    check_drawn(check, logits_cases, backend, f"{tile} {inplace}", 60)


def assert_close(got, want, rtol=2e-5, atol=2e-5):
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol, check_dtype=False)


def lattice(V):
    """Hidden states, weight and labels whose logits are exact in fp32, and their fp64 logits."""
    gen = torch.Generator().manual_seed(0)
    hidden = torch.randint(-3, 4, (5, 6), generator=gen).float().to(DEV)
    weight = torch.randint(-8, 9, (V, 6), generator=gen).to(DEV) / 8
    target = torch.randint(V, (5,), generator=gen).to(DEV)
    return hidden, weight, target, hidden.double() @ weight.double().T


@pytest.mark.parametrize("V", [1, 65, 127, 300])
def test_no_column_past_the_last_counts(V):
    """All logits are near -4096: one phantom zero would take all the probability."""
    hidden, weight, target, z = lattice(V)
    truth = stats_from_logits_ref(z.requires_grad_(), target)
    (dz,) = torch.autograd.grad(truth.logp.sum() + truth.entropy.sum(), z)
    far = (z.detach() - 4096).float().requires_grad_()
    bias = torch.full((V,), -4096.0, device=DEV, requires_grad=True)
    call = partial(linear_logp_stats, hidden, weight, target, bias=bias)
    stats = [logp_stats_from_logits(far, target), call(), call(workspace=least(call))]
    for got, leaf in zip(stats, (far, bias, bias), strict=True):
        (grad,) = torch.autograd.grad(got.logp.sum() + got.entropy.sum(), leaf)
        assert_close(grad, dz if leaf is far else dz.sum(0))
        assert torch.equal(got.is_top1, truth.is_top1)
        assert_close(got.mean_logit + 4096, truth.mean_logit, atol=4e-3)
        for name in ("logp", "entropy", "log_sum_sq_probs"):
            assert_close(getattr(got, name), getattr(truth, name))


def test_logits_past_the_largest_fp16():
    hidden, weight, target, _ = lattice(90)
    hidden[:, 0], weight[:, 0] = 256, 512  # each logit past 131072: exact in fp32, inf in fp16
    leaves = [x.half().requires_grad_() for x in (hidden, weight)]
    assert not (leaves[0] @ leaves[1].T).isfinite().any()
    wide = [x.detach().double().requires_grad_() for x in leaves]
    want = linear_logp_ref(*wide, target).logp
    for frozen in (False, True):
        leaves[1].requires_grad_(not frozen)
        got = linear_logp(*leaves, target)
        assert_close(got, want)
        grads = torch.autograd.grad(got.sum(), leaves[: 2 - frozen])
        exact = torch.autograd.grad(want.sum(), wide[: 2 - frozen], retain_graph=True)
        # 512 in all of a column cancels in dhidden and leaves what probabilities were rounded by
        assert_close(grads[0][:, 1:], exact[0][:, 1:], rtol=2**-7, atol=2**-7)
        if not frozen:
            assert_close(grads[1], exact[1], rtol=2**-7, atol=2**-7)
    cold = torch.tensor([[40000.0, 40032, 39968]], dtype=torch.half, device=DEV)
    logp = logp_from_logits(cold, torch.tensor([2], device=DEV), temperature=0.5)
    assert logp.item() == -128


def test_tied_weight():
    """One weight embeds and scores: its gradient is the sum of both ways."""
    _, weight, target, _ = lattice(90)

    def gradient(weight, fn):
        leaf = weight.clone().requires_grad_()
        hidden = leaf[[0, 3, 3, 89, 7]].tanh()
        stats = fn(hidden, leaf, target)
        (stats.logp.sum() + stats.entropy.sum()).backward()
        return leaf.grad

    want = gradient(weight.double(), linear_logp_ref)
    assert_close(gradient(weight, linear_logp_stats), want)
    part = gradient(weight.double(), lambda h, w, y: linear_logp_ref(h, w.detach(), y))
    assert not torch.allclose(part, want, atol=0.1)


@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 1), ()])
def test_a_result_used_twice_and_its_graph_kept(wanted):
    hidden, weight, target, z = lattice(90)
    ops, inputs = (linear_logp_stats, linear_logp_ref), (hidden, weight)
    leaves = [inputs[i] for i in wanted]
    if not wanted:
        ops, inputs = (logp_stats_from_logits, stats_from_logits_ref), (z.float(),)
        leaves = list(inputs)
    for leaf in leaves:
        leaf.requires_grad_()
    both = [op(*inputs, target) for op in ops]
    for loss in (
        lambda s: s.logp.sum() + (s.logp**2).sum() + (s.entropy * s.logp).sum(),
        lambda s: s.logp.exp().sum(),
        lambda s: s.entropy.sum(),
        lambda s: s.logp.sum() + ops[0](*inputs, target).logp.sum(),
    ):
        found = [torch.autograd.grad(loss(s), leaves, retain_graph=True) for s in both]
        for got, want in zip(*found, strict=True):
            assert_close(got, want)


def test_logits_in_one_compiled_graph_of_any_length():
    torch._dynamo.reset()

    def loss(logits, target):
        stats = logp_stats_from_logits(logits * 2, target, outputs=("entropy",))
        return stats.logp.sum() + stats.entropy.sum()

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    gen = torch.Generator().manual_seed(0)
    for N in (5, 64, 33):
        logits = torch.randn(N, 70, generator=gen).to(DEV).requires_grad_()
        target = torch.randint(70, (N,), generator=gen).to(DEV)
        target[::3] = -100
        for x in (logits, target):
            torch._dynamo.mark_dynamic(x, 0)
        values = [fn(logits, target) for fn in (compiled, loss)]
        assert torch.equal(*values)
        assert torch.equal(*(torch.autograd.grad(value, logits)[0] for value in values))
    assert counter.frame_count == 1
