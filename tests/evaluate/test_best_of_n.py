"""Best-of-n in closed form, against distributions small enough to write down."""

import math

import pytest

from fastpref.evaluate.best_of_n import best_of_n_kl, best_of_n_win_rate


def exact(probs, n):
    """(KL, win rate) of the best of n draws from outcomes in rising order; a tie is half a win."""
    kl = win = below = 0.0
    for p in probs:
        best = (below + p) ** n - below**n
        kl += best * math.log(best / p)
        win += best * (below + p / 2)
        below += p
    return kl, win


def test_best_of_16():
    assert best_of_n_kl(16) == pytest.approx(1.835089, abs=1e-6)
    assert best_of_n_win_rate(16) == pytest.approx(16 / 17)


def test_best_of_1_is_the_policy():
    assert best_of_n_kl(1) == 0 and best_of_n_win_rate(1) == 0.5


@pytest.mark.parametrize("n", [2, 3, 16, 64])
def test_the_bounds_hold_and_are_reached_without_ties(n):
    kl, win = exact([0.5, 0.3, 0.2], n)
    assert kl < best_of_n_kl(n) and win < best_of_n_win_rate(n)
    many = 20_000
    kl, win = exact([1 / many] * many, n)
    assert kl == pytest.approx(best_of_n_kl(n), rel=1e-3)
    assert win == pytest.approx(best_of_n_win_rate(n), rel=1e-3)


@pytest.mark.parametrize("n", [0, -3, math.nan])
@pytest.mark.parametrize("function", [best_of_n_kl, best_of_n_win_rate])
def test_refuses(function, n):
    with pytest.raises(ValueError, match=f"need n >= 1, got {n}"):
        function(n)
