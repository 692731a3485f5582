"""Which of a prompt's scored samples to learn from."""

import math
from collections.abc import Sequence
from itertools import permutations


def pairs_by_gap(
    scores: Sequence[float], *, temperature: float, threshold: float
) -> list[tuple[int, int]]:
    """Every pair of samples of which one is better by enough: s((r_w - r_l) / t) > threshold.

    Args:
        scores: rewards r of the k samples of one prompt, finite.
        temperature: t, in units of the scores; positive.
        threshold: in [0.5, 1): below, two samples could be a pair in both orders.

    Returns:
        (better, worse) indices into scores, sorted.

    Raises:
        ValueError: a range differs from the above.

    Source: RS-DPO, Khaki et al. 2024, arXiv:2402.10038, algorithm 1.
    """
    if not 0 < temperature < math.inf or not 0.5 <= threshold < 1:
        got = f"{temperature} and {threshold}"
        raise ValueError(f"need temperature > 0 and threshold in [0.5, 1), got {got}")
    if not all(map(math.isfinite, scores)):
        raise ValueError(f"need finite scores, got {list(scores)}")

    def is_enough(gap: float) -> bool:
        return gap > 0 and 1 / (1 + math.exp(-gap / temperature)) > threshold

    pairs = permutations(range(len(scores)), 2)
    return [(better, worse) for better, worse in pairs if is_enough(scores[better] - scores[worse])]
