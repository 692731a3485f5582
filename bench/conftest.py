"""``pytest bench/ --benchmark-only``: cases and their providers; rows go nowhere."""

import functools

import pytest
import torch

from bench.measure import ROUNDS, Provider, check, is_ours, load
from bench.run import DEVICE


def pytest_configure(config):
    config.addinivalue_line("python_files", "bench_*.py")


def pytest_generate_tests(metafunc):
    if "timed" in metafunc.fixturenames:
        cases = metafunc.module.cases(DEVICE)
        pairs = [(case, name) for case in cases for name in (case.ceiling, *case.providers())]
        ids = [f"{case}-{name}" for case, name in pairs]
        metafunc.parametrize(("case", "provider"), pairs, ids=ids)


loaded = functools.lru_cache(maxsize=1)(load)


@pytest.fixture
def timed(case, provider, benchmark, monkeypatch):
    """Time a provider of a case, or skip one that cannot run here, with its reason."""

    def time():
        monkeypatch.setenv("FASTPREF_BACKEND", "")  # providers set it: this puts it back
        inputs, errors = loaded(case)
        if provider == case.ceiling:
            ready, found = Provider(case.top(inputs)), {}
        else:
            try:
                ready, found = check(provider, case.providers()[provider], inputs, errors, DEVICE)
            except Exception as error:  # a peer may fail in any way of its own
                if is_ours(provider):
                    raise
                pytest.skip(f"{type(error).__name__}: {error}")
        benchmark.extra_info.update(found)

        def call():
            result = ready.call()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            return result

        benchmark.pedantic(call, setup=ready.before, rounds=ROUNDS[DEVICE], warmup_rounds=1)

    return time
