"""A made corpus of film reviews with a gold reward that a program computes.

The control experiment of the DPO paper (arXiv:2305.18290, section 6.1) needs a corpus of mixed
sentiment and a reward that is known exactly: here templates write the reviews, and the reward
reads their opinion words.
"""

import random
import re
from dataclasses import dataclass

POSITIVE = (
    "brilliant charming clever delightful excellent funny gentle graceful great honest inspired "
    "lovely memorable moving perfect rich sharp splendid tender warm"
).split()
NEGATIVE = (
    "awful boring careless clumsy cold confused dreadful dull empty flat hollow lazy messy "
    "painful pointless shallow slow stale tedious weak"
).split()
NEGATIONS = ("not", "hardly", "never")
THINGS = (
    "acting camera cast dialogue director editing ending humour lead music opening pace plot "
    "scenery score script second half sound story title"
).split()
OPENINGS = (
    "I watched this film last night and",
    "We saw the movie at a small cinema ;",
    "My sister chose this one , and",
    "It runs for two hours :",
    "After the first ten minutes",
    "Nobody told me what to expect ;",
    "The poster promised a lot , and",
    "For a rainy evening",
)
FORMS = (
    "the {thing} was {word}",
    "the {thing} felt {degree} {word}",
    "I found the {thing} {word}",
    "the {thing} is {negation} {word}",
    "a {degree} {word} {thing}",
    "there is a {word} {thing}",
)
DEGREES = ("quite", "rather", "really", "truly", "very")


@dataclass(frozen=True)
class Review:
    """The words a reader is given, and how the review goes on."""

    prompt: str
    completion: str


def reviews(count: int, seed: int) -> list[Review]:
    """``count`` reviews of two to five opinions; their mean gold reward is near 0."""
    rng = random.Random(seed)
    return [review(rng) for _ in range(count)]


def review(rng: random.Random) -> Review:
    mood = rng.betavariate(2, 2)  # a reviewer leans one way but is rarely of one mind
    clauses = [clause(rng, mood) for _ in range(rng.randint(2, 5))]
    # the prompt ends inside the first clause, so what follows is a continuation, not a reply
    words = clauses[0].split()
    cut = rng.randint(1, 2)
    prompt = f"{rng.choice(OPENINGS)} {' '.join(words[:cut])}"
    rest = " , ".join([" ".join(words[cut:]), *clauses[1:]])
    return Review(prompt, f" {rest} .")


def clause(rng: random.Random, mood: float) -> str:
    form = rng.choice(FORMS)
    positive = rng.random() < mood
    if "{negation}" in form:
        positive = not positive  # the word is turned round by what stands before it
    return form.format(
        thing=rng.choice(THINGS),
        word=rng.choice(POSITIVE if positive else NEGATIVE),
        degree=rng.choice(DEGREES),
        negation=rng.choice(NEGATIONS),
    )


def gold_reward(text: str) -> float:
    """Mean opinion of a text in [-1, 1]: each opinion word counts 1 or -1, turned round by a
    negation right before it; 0 where there is none."""
    words = re.findall(r"\w+", text)
    scores = []
    for before, word in zip(["", *words], words, strict=False):
        if word in POSITIVE or word in NEGATIVE:
            sign = 1 if word in POSITIVE else -1
            scores.append(-sign if before in NEGATIONS else sign)
    return sum(scores) / len(scores) if scores else 0.0
