"""Best-of-n sampling in closed form: the yardstick that a trained policy is held against."""

import math


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1) / n: the KL of the best of n samples to one sample, in nats.

    An upper bound, which is reached as the chance vanishes that two samples score alike.

    Args:
        n: samples, at least 1.

    Raises:
        ValueError: n is below 1.

    Source: Stiennon et al. 2020, arXiv:2009.01325, appendix G.3; that it is a bound, Beirami et al.
    2024, arXiv:2401.01879.
    """
    _check(n)
    return math.log(n) - (n - 1) / n


def best_of_n_win_rate(n: int) -> float:
    """n / (n + 1): how often the best of n samples scores above one further sample.

    An upper bound in the same way, where a tie is half a win.

    Args:
        n: samples, at least 1.

    Raises:
        ValueError: n is below 1.

    Source: Beirami et al. 2024, arXiv:2401.01879.
    """
    _check(n)
    return n / (n + 1)


def _check(n: int) -> None:
    if not n >= 1:
        raise ValueError(f"need n >= 1, got {n}")
