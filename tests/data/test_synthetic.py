"""The made corpus and its gold reward."""

import pytest

from fastpref.data.synthetic import gold_reward, reviews


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("the plot was brilliant", 1.0),
        ("the plot was dull", -1.0),
        ("the plot is not dull", 1.0),
        ("the plot is never brilliant , a warm score", 0.0),
        ("the plot was dull , I found the cast sharp , a clever ending .", 1 / 3),
        ("the plot went on", 0.0),
        ("", 0.0),
    ],
)
def test_gold_reward_by_hand(text, reward):
    assert gold_reward(text) == pytest.approx(reward)


def test_reviews_are_mixed_and_repeat_under_a_seed():
    corpus = reviews(2000, seed=4)
    rewards = [gold_reward(r.completion) for r in corpus]
    assert abs(sum(rewards) / len(rewards)) < 0.1
    assert sum(abs(r) < 1 for r in rewards) > 500  # most reviewers are of two minds
    assert corpus == reviews(2000, seed=4) != reviews(2000, seed=5)
    assert all(r.completion[0] == " " and r.prompt[-1] != " " for r in corpus)
