"""Which row functions run: the C++ is compiled once, and nothing falls back silently."""

import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from fastpref.kernels import backend as module
from fastpref.kernels.logp_from_logits import logp_from_logits

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def backend(monkeypatch):
    """As it is without any choice, and with nothing compiled."""
    monkeypatch.delenv("FASTPREF_BACKEND", raising=False)
    module._loaded.cache_clear()
    yield
    module._loaded.cache_clear()


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fastpref"


BROKEN = {
    "no compiler": {"CXX": "", "PATH": ""},
    "a compiler that fails": {"CXX": "false"},
    "a compiler that is not there": {"CXX": "/no/such/compiler"},
}


@pytest.mark.parametrize("broken", BROKEN)
def test_torch_stands_in_with_one_warning(empty_cache, monkeypatch, broken):
    for name, value in BROKEN[broken].items():
        monkeypatch.setenv(name, value)
    with pytest.warns(UserWarning, match="plain torch stands in for fastpref's C.. on the CPU"):
        first = logp_from_logits(torch.zeros(2, 4), torch.tensor([1, 2]))
    assert first.tolist() == pytest.approx([-math.log(4)] * 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logp_from_logits(torch.zeros(2, 4), torch.tensor([1, 2]))
    monkeypatch.setenv("FASTPREF_BACKEND", "cpp")
    with pytest.raises(RuntimeError, match="FASTPREF_BACKEND=cpp: "):
        logp_from_logits(torch.zeros(2, 4), torch.tensor([1, 2]))


def test_what_was_compiled_is_used_again(empty_cache, monkeypatch):
    calls = []
    run = subprocess.run

    def counted(*args, **kwargs):
        calls.append(args)
        return run(*args, **kwargs)

    monkeypatch.setattr(subprocess, "run", counted)
    first = module.compiled()
    assert module.compiled() == first
    assert len(calls) == 1
    assert [path.suffix for path in empty_cache.iterdir()] == [".so"]
    monkeypatch.setattr(torch, "__version__", "another")
    assert module.compiled() != first
    assert len(calls) == 2


def test_names_of_backends(monkeypatch):
    monkeypatch.setenv("FASTPREF_BACKEND", "tritn")
    with pytest.raises(ValueError, match="need FASTPREF_BACKEND torch, cpp or triton, got 'tritn'"):
        logp_from_logits(torch.zeros(2, 4), torch.tensor([1, 2]))


def test_plain_torch_needs_no_compiler(tmp_path):
    code = (
        "import torch as t, fastpref as f; f.logp_from_logits(t.zeros(1, 4), t.ones(1, dtype=int))"
    )
    env = {
        **os.environ,
        "FASTPREF_BACKEND": "torch",
        "XDG_CACHE_HOME": str(tmp_path),
        "CXX": "false",
    }
    env |= {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], env=env, capture_output=True)
    assert done.returncode == 0 and not list(tmp_path.iterdir()), done.stderr
