"""Which implementation of the row functions runs: Triton on CUDA, C++ on the CPU, else torch.

FASTPREF_BACKEND=torch|cpp|triton forces one, and stops where that cannot be had. The C++ of csrc/
is compiled when it is first needed and then cached; where that fails plain torch stands in, with
one warning. fp64 on CUDA, which is for checks of gradients, always runs in torch.
"""

import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
import triton

FOLDER = Path(__file__).resolve().parent.parent / "csrc"
_VECTORS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}


def choose(device_type: str, dtype: torch.dtype, source: str = "logp_rows") -> str:
    """ "torch", "cpp" or "triton" for tensors of this device and dtype.

    ``source`` names the file of csrc/ that holds the C++ of the one who asks.

    ValueError: FASTPREF_BACKEND names none, or one that has nothing for this device.
    """
    name = os.environ.get("FASTPREF_BACKEND") or None
    if name not in (None, "torch", "cpp", "triton"):
        raise ValueError(f"need FASTPREF_BACKEND torch, cpp or triton, got {name!r}")
    if name == "cpp" and device_type != "cpu":
        raise ValueError(f"need tensors on the CPU for FASTPREF_BACKEND=cpp, got {device_type}")
    if name == "triton" and device_type != "cuda" and not triton.knobs.runtime.interpret:
        raise ValueError(
            "need CUDA tensors (or TRITON_INTERPRET=1, for tests) for FASTPREF_BACKEND=triton, got "
            f"{device_type}"
        )
    if name == "triton" or (name is None and device_type == "cuda"):
        return "torch" if dtype == torch.float64 else "triton"
    return "cpp" if device_type == "cpu" and _loaded(name, source) else "torch"


@functools.cache
def _loaded(name: str | None, source: str) -> bool:
    if name == "torch":
        return False
    try:
        torch.ops.load_library(compiled(source))
    except (OSError, RuntimeError, ValueError) as error:
        if name == "cpp":
            raise RuntimeError(f"FASTPREF_BACKEND=cpp: {error}") from error
        warnings.warn(
            f"plain torch stands in for fastpref's C++ on the CPU, which is slower: {error} (CXX "
            "names a compiler, XDG_CACHE_HOME a folder that can be written; FASTPREF_BACKEND=torch "
            "ends this warning)",
            stacklevel=2,
        )
        return False
    return True


def command(source: Path, out: Path) -> list[str]:
    """The compiler's call that makes ``out`` of a source; RuntimeError without a compiler."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise RuntimeError("need a C++ compiler (c++ or g++ on the path, or CXX), got none")
    torch_folder = Path(torch.__file__).parent
    level = torch.backends.cpu.get_cpu_capability()
    flags = _VECTORS.get(level, [])
    if flags:
        flags = [*flags, f"-DCPU_CAPABILITY={level}", f"-DCPU_CAPABILITY_{level}"]
    return [
        *(*shlex.split(compiler), "-O3", "-std=c++20", "-shared", "-fPIC", "-fopenmp", *flags),
        *(f"-I{torch_folder / 'include'}", str(source), "-o", str(out)),
        *(f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"),
    ]


def compiled(source: str = "logp_rows") -> Path:
    """The library of a file of csrc/, from the cache if it is there."""
    code = FOLDER / f"{source}.cpp"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastpref"
    key = "\n".join([code.read_text(), torch.__version__, *command(code, Path("library.so"))])
    library = folder / f"{source}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # renamed when it is whole: two processes may compile at once, one may be killed
        with tempfile.TemporaryDirectory(dir=folder) as partial:
            out = Path(partial) / library.name
            # in a session of its own: Ctrl-C is for the run, which saves
            done = subprocess.run(
                command(code, out), capture_output=True, text=True, start_new_session=True
            )
            if done.returncode:
                error = done.stderr.strip()[-2000:]
                raise RuntimeError(f"{done.args[0]} ended with {done.returncode}:\n{error}")
            with out.open("rb") as file:
                os.fsync(file.fileno())  # half a library would kill the process that loads it
            out.replace(library)
    return library
