"""On the CPU every op is tested three times: in C++, in plain torch, in interpreted Triton."""

import pytest
import torch

BACKENDS = [None] if torch.cuda.is_available() else ["cpp", "torch", "triton"]


@pytest.fixture(autouse=True, params=BACKENDS)
def backend(request, monkeypatch):
    if request.param:
        monkeypatch.setenv("FASTPREF_BACKEND", request.param)
    return request.param


@pytest.fixture
def quick(backend):
    """For tests of hundreds of rows, of which the interpreter takes one at a time."""
    if backend == "triton":
        pytest.skip("minutes in the interpreter")
