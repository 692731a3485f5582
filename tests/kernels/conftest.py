"""On the CPU every op is tested twice: with its C++ row functions and in plain torch."""

import pytest
import torch

BACKENDS = [None] if torch.cuda.is_available() else ["cpp", "torch"]


@pytest.fixture(autouse=True, params=BACKENDS)
def backend(request, monkeypatch):
    if request.param:
        monkeypatch.setenv("FASTPREF_BACKEND", request.param)
    return request.param
