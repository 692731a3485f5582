"""Where rows go: nowhere unless a folder is named, so that a trial leaves no trace."""

from pathlib import Path

import pytest


def pytest_addoption(parser):
    parser.addoption("--out", type=Path, help="folder whose JSONL files take the rows")


@pytest.fixture(scope="session")
def out(request):
    return request.config.getoption("--out")
