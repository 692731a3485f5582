"""Metadata is in pyproject.toml; this file only knows how to build the C++ ops in csrc/.

FASTPREF_BUILD_CSRC=1 builds them into the wheel and stops if it cannot; without it nothing is
compiled, and neither torch nor a compiler nor the network is needed.
"""

import os
from pathlib import Path

from setuptools import setup

SOURCES = sorted(str(path) for path in Path("csrc").glob("*.cpp"))


def csrc() -> dict:
    """The setup() arguments that build csrc/, empty unless it is asked for."""
    if os.environ.get("FASTPREF_BUILD_CSRC", "0") in ("", "0"):
        return {}
    if not SOURCES:
        raise SystemExit("FASTPREF_BUILD_CSRC=1 needs sources in csrc/*.cpp, got none")
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        raise SystemExit(
            "FASTPREF_BUILD_CSRC=1 needs torch while building: install it first and pass "
            f"--no-build-isolation to pip ({error})"
        ) from error
    flags = ["-O3", "-fopenmp", "-std=c++20"]
    extension = CppExtension("fastpref._C", SOURCES, extra_compile_args=flags)
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


setup(**csrc())
