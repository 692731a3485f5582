"""What the Triton kernels become on a GPU, read without one; and the bound that this sets.

``python -m bench.machine_code [--sm 80 90 100] [--json]`` compiles every kernel as the ops launch
it and reads registers, spills, load widths and instructions off the machine code. Bytes and flop
an element are counted by hand: what a launch reads and writes of its slab. Branches that few
blocks take are counted too. Static: says nothing of caches or time.
"""

import argparse
import collections
import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastpref.kernels import gae, logp_rows_triton, ppo_policy, ppo_value, sequences, whiten
from fastpref.kernels.logits import Transform

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int64: "i64",
    torch.bool: "i1",
    torch.float64: "fp64",
}
# one H200: bytes a second as measured for a copy; lanes a second of 132 SMs at 1.755 GHz
BYTES, LANES, EXPONENTIALS = 4.3e12, 132 * 128 * 1.755e9, 132 * 16 * 1.755e9
BF16, FP32 = torch.bfloat16, torch.float32
R = 16  # rows: a launch's code does not depend on them
WIDTH = logp_rows_triton.MAX_SLAB
B, T = 512, 4096
KERNELS = (
    *((logp_rows_triton, f"_{name}_rows") for name in ("stream", "slab", "finish", "gradient")),
    *((gae, "_gae"), (whiten, "_whiten"), (ppo_policy, "_policy"), (ppo_value, "_value")),
    (sequences, "_fold"),
)


def slab(dtype, columns=WIDTH):
    return torch.empty(R, -(-columns // 64) * 64, dtype=dtype)[:, :columns]


def logits(V, dtype=BF16):
    return torch.empty(R, V, dtype=dtype)


def forward(raw, transform=Transform(), outputs=(), **written):  # noqa: B008 an immutable tuple
    options = {"exps": None, "weighted": None, "slopes": False, "shift": None} | written
    state, target = torch.empty(8, R), torch.zeros(R, dtype=torch.int64)
    logp_rows_triton.slab_rows(raw, WIDTH, target, state, transform, outputs, **options)


def stream(logits, outputs=()):
    state, target = torch.empty(8, R), torch.zeros(R, dtype=torch.int64)
    logp_rows_triton.stream_rows(logits, target, state, 1.0, outputs)


def gradient(source, out, entropy=False, transform=Transform(), **options):  # noqa: B008
    values, target = torch.empty(6 if entropy else 4, R), torch.zeros(R, dtype=torch.int64)
    logp_rows_triton.gradient_rows(source, 0, target, values, out, transform, **options)


def finish():
    out = {"is_top1": torch.empty(R, dtype=torch.bool)}
    names = ("logp", "max", "log_total", "entropy", "mean_logit", "log_sum_sq_probs")
    out |= {name: torch.empty(R) for name in names}
    logp_rows_triton.finish_rows(torch.empty(8, R), torch.zeros(R, dtype=torch.int64), 128_256, out)


def tokens(packed=False, dtype=FP32):
    return torch.empty(B * T, dtype=dtype) if packed else torch.empty(B, T, dtype=dtype)


def offsets(packed):
    return torch.arange(0, B * T + 1, T) if packed else None


def advantages(packed=False, masked=True, shaped=False, estimator="k1"):
    x = tokens(packed)
    mask = tokens(packed, torch.bool) if masked else None
    shape = (x, x, torch.empty(B)) if shaped else (None, None, None)
    end = (1.0, 0.95, 0.05, estimator)
    inputs = (None if shaped else x, x, *shape, mask, offsets(packed), None)
    gae._in_triton(gae._Inputs(*inputs, *end))


def whitened():
    moments = torch.empty(3, dtype=torch.float64)
    whiten._in_triton(tokens(), tokens(dtype=torch.bool), moments, False, 1e-8)


def policy(form="clip", bundle=False, packed=False, sequences=False):
    x, mask = tokens(packed), tokens(packed, torch.bool)
    more = (x, x, x) if bundle else (None, None, None)
    bounds = (0.2, 0.2, float("inf"), 1.0)
    inputs = (x, x, x, mask, offsets(packed), *more)
    coefs = (0.1, 0.1, "k3", sequences, sequences, True, bundle)
    options = (form, sequences, *bounds, *coefs)
    ppo_policy._in_triton(ppo_policy._Inputs(*inputs, *options))


def value():
    x, mask = tokens(), tokens(dtype=torch.bool)
    options = (None, 0.2, False, False, True)
    ppo_value._in_triton(ppo_value._Inputs(x, x, x, mask, *options))


def fold():
    sequences.fold(torch.empty(1024, sequences.SUMS))


BENT = Transform(1.5, 30.0, torch.empty(WIDTH))
ALL = ("entropy", "is_top1", "mean_logit", "log_sum_sq_probs")
SHIFT = torch.empty(R)
# name: launch; bytes an element; flop, of which a maximum, a conversion and an exponential are one
CASES = {
    "forward, no gradient": (lambda: forward(slab(FP32)), 4, 6),
    "forward, kept": (lambda: forward(slab(FP32), exps=slab(BF16), shift=SHIFT), 6, 7),
    "forward, kept, odd V": (
        lambda: forward(slab(FP32, 5377), exps=slab(BF16, 5377), shift=SHIFT),
        6,
        7,
    ),
    "forward, kept, all statistics": (
        lambda: forward(slab(FP32), outputs=ALL, exps=slab(BF16), shift=SHIFT),
        6,
        14,
    ),
    "forward, kept, all statistics, softcap": (
        lambda: forward(slab(FP32), BENT, ALL, exps=slab(BF16), shift=SHIFT),
        6,
        38,
    ),
    "forward, frozen": (lambda: forward(slab(FP32), exps=slab(BF16), slopes=True), 6, 7),
    "forward, frozen, entropy, softcap": (
        lambda: forward(slab(FP32), BENT, ALL, exps=slab(BF16), weighted=slab(BF16), slopes=True),
        8,
        44,
    ),
    "forward, frozen, fp32": (lambda: forward(slab(FP32), exps=slab(FP32), slopes=True), 8, 6),
    "backward, kept": (lambda: gradient(slab(BF16), slab(BF16), shift=SHIFT), 4, 3),
    "backward, kept, fp16": (
        lambda: gradient(slab(torch.float16), slab(torch.float16), shift=SHIFT),
        4,
        3,
    ),
    "backward, recomputed": (lambda: gradient(slab(FP32), slab(BF16)), 6, 14),
    "backward, recomputed, entropy, softcap": (
        lambda: gradient(slab(FP32), slab(BF16), True, BENT),
        6,
        46,
    ),
    "backward, fp32": (lambda: gradient(slab(FP32), slab(FP32)), 8, 13),
    "logits": (lambda: stream(logits(128_256)), 2, 6),
    "logits, odd V": (lambda: stream(logits(50_257)), 2, 6),
    "logits, all statistics": (lambda: stream(logits(128_256), ALL), 2, 12),
    "logits, fp32": (lambda: stream(logits(128_256, FP32)), 4, 5),
    "logits, backward": (
        lambda: gradient(logits(128_256), logits(128_256), slab=False),
        4,
        15,
    ),
    "logits, backward, odd V": (
        lambda: gradient(logits(50_257), logits(50_257), slab=False),
        4,
        15,
    ),
    "logits, backward, odd V, from other words": (
        lambda: gradient(logits(50_258)[:, :-1], logits(50_257), slab=False),
        4,
        15,
    ),
    "finish": (finish, 0, 0),
    "gae": (lambda: advantages(masked=False), 16, 10),
    "gae, mask": (advantages, 17, 10),
    "gae, mask, packed": (lambda: advantages(packed=True), 17, 10),
    "advantages, KL k1, mask": (lambda: advantages(shaped=True), 21, 20),
    "advantages, KL k3, mask": (lambda: advantages(shaped=True, estimator="k3"), 21, 40),
    "whiten": (whitened, 9, 2),
    "policy": (policy, 17, 40),
    "policy, KL, entropy, importance": (lambda: policy(bundle=True), 33, 60),
    "policy, a sequence's ratio": (lambda: policy(sequences=True), 17, 45),
    "policy, a sequence's ratio, packed": (lambda: policy(sequences=True, packed=True), 17, 45),
    "policy, cispo": (lambda: policy("cispo"), 17, 35),
    "policy, apa": (lambda: policy("apa", bundle=True), 33, 50),
    "policy, awr": (lambda: policy("awr"), 17, 35),
    "value": (value, 17, 20),
    "fold": (fold, 0, 0),
}


class Recorder:
    """Stands in for a kernel: keeps the arguments of its one launch."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, **options):
        names = self.kernel.arg_names
        self.options = {k: v for k, v in options.items() if k not in names}
        self.values = dict(zip(names, args, strict=False))
        self.values |= {k: v for k, v in options.items() if k in names}

    def compile(self, capability):
        """As Triton's own launcher specialises the values that came."""
        signature, constants, attrs = {}, {}, {}
        for i, parameter in enumerate(self.kernel.params):
            name, value = parameter.name, self.values[parameter.name]
            kind, divisible = described(value)
            specialises = not parameter.do_not_specialize
            one = kind == "i32" and value == 1 and specialises
            if parameter.is_constexpr or value is None or one:
                signature[name], constants[(i,)] = "constexpr", value
                continue
            signature[name] = kind
            aligned = not parameter.do_not_specialize_on_alignment
            if divisible and specialises and aligned:
                attrs[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attrs)
        return triton.compile(source, GPUTarget("cuda", capability, 32), self.options)


def described(value):
    """Triton's name of a runtime value's type, and whether it is divisible by 16."""
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}", value.data_ptr() % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    if isinstance(value, int):
        return ("i32" if -(2**31) <= value < 2**31 else "i64"), value % 16 == 0
    return "constexpr", False


def compiled(launch, capability):
    """The first kernel of a launch, compiled."""
    real = {(module, name): getattr(module, name) for module, name in KERNELS}
    recorders = {key: Recorder(kernel) for key, kernel in real.items()}
    try:
        for (module, name), recorder in recorders.items():
            setattr(module, name, recorder)
        launch()
    finally:
        for (module, name), kernel in real.items():
            setattr(module, name, kernel)
    recorder = next(r for r in recorders.values() if hasattr(r, "values"))
    return recorder, recorder.compile(capability)


def instructions(sass):
    """(address, name, operands) of each instruction."""
    line = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)([^;]*);", re.M)
    found = [(int(address, 16), name, rest) for address, name, rest in line.findall(sass)]
    return [row for row in found if row[1] != "NOP"]


def loop(code):
    """The longest stretch that a branch leads back over; all where there is none."""
    ends = [
        (int(m[1], 16), at)
        for at, name, rest in code
        if name == "BRA" and (m := re.search(r"0x([0-9a-f]+)", rest))
    ]
    start, end = max(ends, key=lambda x: x[1] - x[0], default=(0, 0))
    body = [row for row in code if start <= row[0] <= end]
    return body if start < end else code


def width(name):
    """Bytes that a thread moves with a load or a store."""
    found = re.search(r"\.[US]?(8|16|64|128)\b", name)
    return int(found[1]) // 8 if found else 4


def measure(case, capability):
    """A row of the table."""
    launch, bytes_moved, flop = CASES[case]
    recorder, kernel = compiled(launch, capability)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.check_output([CUOBJDUMP, flag, file.name], text=True)
            for flag in ("--dump-resource-usage", "--dump-sass")
        )
    found = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    code = instructions(sass)
    named = re.compile(r"(LDG|STG|LDL|STL|MUFU|HGMMA|HMMA|ATOM|RED)\b")
    counts = collections.Counter(name for _, name, _ in code if named.match(name))
    row = {
        "case": case,
        "kernel": recorder.kernel.__name__,
        "sm": capability,
        "registers": int(found["REG"]),
        "stack_bytes": int(found["STACK"]),
        "instructions": dict(counts),
    }
    block = recorder.values.get("BLOCK_V", recorder.values.get("BLOCK_T"))
    if block is None:
        return row
    elements = block / (32 * recorder.options["num_warps"])  # of one thread and one pass
    body = loop(code)
    steps = len(body) / elements
    exps = sum(name.startswith("MUFU") for _, name, _ in body) / elements
    moved = sum(width(name) for _, name, _ in body if name.startswith(("LDG", "STG"))) / elements
    picoseconds = {
        "memory": bytes_moved / BYTES,
        "instructions": steps / LANES,
        "exponentials": exps / EXPONENTIALS,
    }
    bound = max(picoseconds, key=picoseconds.get)
    return row | {
        "warps": recorder.options["num_warps"],
        "bytes_per_element": bytes_moved,
        "flop_per_element": flop,
        "loop_bytes_per_element": moved,
        "instructions_per_element": round(steps, 1),
        "h200_ps_per_element": {k: round(1e12 * v, 2) for k, v in picoseconds.items()},
        "h200_bound": bound,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sm", type=int, nargs="+", default=[90])
    parser.add_argument("--json", action="store_true", help="whole rows, a line each")
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("compiles kernels, which TRITON_INTERPRET takes over: unset it")
    if not args.json:
        print(
            "| case | sm | registers | spills | bytes | flop | instructions | "
            "ps on an H200: memory / instructions / exponentials | bound |"
        )
        print("|---|---|---|---|---|---|---|---|---|")
    for capability in args.sm:
        for case in CASES:
            row = measure(case, capability)
            if args.json:
                print(json.dumps(row), flush=True)
            elif "h200_bound" in row:
                times = row["h200_ps_per_element"]
                print(
                    f"| {case} | {capability} | {row['registers']} | {row['stack_bytes']} | "
                    f"{row['bytes_per_element']} | {row['flop_per_element']} | "
                    f"{row['instructions_per_element']} | "
                    f"{' / '.join(map(str, times.values()))} | {row['h200_bound']} |"
                )


if __name__ == "__main__":
    main()
