"""Preference pairs to train on: harmless ones or made ones about as long; ones of long prompts."""

import itertools
import os
from pathlib import Path

import numpy as np

from fastpref.data.formats import load_examples, to_examples
from fastpref.data.synthetic import reviews
from fastpref.data.tokenize import tokenize


def pairs(count):
    """Harmless pairs where FASTPREF_DATA names a folder that has them, else made ones.

    Prompts are explicit: where they are not, TRL ends them inside a word that both replies share.
    """
    file = Path(os.environ.get("FASTPREF_DATA", ".")) / "hh-rlhf" / "harmless-base-train.jsonl.gz"
    if file.exists():
        examples = load_examples(str(file), "preference")[0][:count]
        triples = [(e.prompt, *e.completions) for e in examples]
    else:  # about as long: four reviews, then one or two more
        texts = iter(f"{r.prompt}{r.completion}" for r in reviews(7 * count, seed=0))
        take = [(" ".join(next(texts) for _ in range(n)) for n in (4, 1, 2)) for _ in range(count)]
        triples = [(prompt, f" {a}", f" {b}") for prompt, a, b in take]
    return ("harmless" if file.exists() else "synthetic"), rows_of(triples)


def rows_of(triples):
    return [dict(zip(("prompt", "chosen", "rejected"), t, strict=True)) for t in triples]


def texts_of(rows):
    return [row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected")]


def long_pairs(count, source, tokenizer, prompt, completion):
    """Pairs cut out of the texts of ``source``, in turn from its start and over again.

    Args:
        prompt, completion: the least and the most tokens, evenly drawn; a token more or less where
            a cut parts a word.
    """
    ids = itertools.chain.from_iterable(tokenizer(texts_of(source))["input_ids"])
    stream = itertools.cycle(list(ids))
    rng = np.random.default_rng(0)

    def text(least, most):
        size = int(rng.integers(least, most + 1))
        return tokenizer.decode(list(itertools.islice(stream, size))).strip()

    return rows_of(
        (text(*prompt), f" {text(*completion)}", f" {text(*completion)}") for _ in range(count)
    )


def grouped(rows, tokenizer, per_step):
    """The rows of whole steps and their token counts (prompt, chosen, rejected), EOS counted.

    Within a step the short come first: micro-batches of padded sequences waste least so.
    """
    groups, dropped = tokenize(to_examples(rows, "preference")[0], tokenizer, max_length=None)
    if len(groups) < len(rows):
        raise ValueError(f"need pairs that are all trained on, got {dropped}")
    lengths = [(len(g.prompt), *map(len, g.completions)) for g in groups]
    sizes = [prompt + max(completions) for prompt, *completions in lengths]
    order = sorted(range(len(rows)), key=lambda i: (i // per_step, sizes[i]))
    return [rows[i] for i in order], [lengths[i] for i in order]
