"""No test reaches for the network, and none waits for threads that another process holds up."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is decorated


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """``-m gpu`` takes the tests that need a GPU and, where there is one, all that run on it."""
    for item in items:
        if torch.cuda.is_available() and item.path.parent.name == "kernels":
            item.add_marker(pytest.mark.gpu)
        if not torch.cuda.is_available() and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
