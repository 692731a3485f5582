"""The row functions of csrc/ for CPU tensors, compiled when they are first needed and then cached.

FASTPREF_BACKEND=torch leaves them out, FASTPREF_BACKEND=cpp stops where they cannot be had; without
it plain torch stands in, with one warning.
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

SOURCE = Path(__file__).resolve().parent.parent / "csrc" / "logp_rows.cpp"
_VECTORS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}


def backend() -> str | None:
    """FASTPREF_BACKEND, None where it is not set; ValueError for a name that is none."""
    name = os.environ.get("FASTPREF_BACKEND") or None
    if name not in (None, "torch", "cpp"):
        raise ValueError(f"need FASTPREF_BACKEND torch or cpp, got {name!r}")
    return name


def has_native(device_type: str) -> bool:
    """Whether the C++ row functions run on tensors of this device."""
    name = backend()
    return device_type == "cpu" and _loaded(name)


@functools.cache
def _loaded(name: str | None) -> bool:
    if name == "torch":
        return False
    try:
        torch.ops.load_library(compiled())
    except (OSError, RuntimeError) as error:
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


def command(out: Path) -> list[str]:
    """The compiler's call that writes ``out``; RuntimeError without a compiler."""
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
        *(f"-I{torch_folder / 'include'}", str(SOURCE), "-o", str(out)),
        *(f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"),
    ]


def compiled() -> Path:
    """The library, from the cache if it is there."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastpref"
    key = "\n".join([SOURCE.read_text(), torch.__version__, *command(Path("logp_rows.so"))])
    library = folder / f"logp_rows-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # renamed when it is whole: two processes may compile at once, one may be killed
        with tempfile.TemporaryDirectory(dir=folder) as partial:
            out = Path(partial) / library.name
            # in a session of its own: Ctrl-C is for the run, which saves
            done = subprocess.run(
                command(out), capture_output=True, text=True, start_new_session=True
            )
            if done.returncode:
                error = done.stderr.strip()[-2000:]
                raise RuntimeError(f"{done.args[0]} ended with {done.returncode}:\n{error}")
            with out.open("rb") as file:
                os.fsync(file.fileno())  # half a library would kill the process that loads it
            out.replace(library)
    return library
