"""Tokens and flop of training steps on pairs, from token counts (prompt, chosen, rejected).

Flop count what a step needs, not what it does: 2 for a weight of the trunk and a token that passes
it, 2 for a weight of the head and a scored token, and in attention 4 for a query that sees a key
and an entry of a head, in each forward. Weights that are trained cost as much again for their
gradient, and so do the inputs of all; attention costs twice its forward. Recomputation, padding,
embeddings, norms, adapters and the optimizer are not counted.
"""

from dataclasses import dataclass

PEAK_FLOPS = 989e12  # an H100's and an H200's, dense bf16


@dataclass(frozen=True)
class Work:
    """``tokens`` pass the trunk, ``scored`` the head, ``visible`` counts queries times keys."""

    tokens: int
    scored: int
    visible: int


def triangle(n):
    return n * (n + 1) // 2


def shared(lengths):
    """A prompt once for both of its completions."""
    return Work(
        sum(map(sum, lengths)),
        sum(c + r for _, c, r in lengths),
        sum(triangle(p) + c * p + triangle(c) + r * p + triangle(r) for p, c, r in lengths),
    )


def unshared(lengths):
    """Each completion after a prompt of its own, without padding: the original pairs."""
    return Work(
        sum(2 * p + c + r for p, c, r in lengths),
        sum(c + r for _, c, r in lengths),
        sum(triangle(p + c) + triangle(p + r) for p, c, r in lengths),
    )


def padded_tokens(lengths, micro_batch):
    """Of the original pairs, as long as the longest sequence in each so many pairs."""
    parts = (lengths[i : i + micro_batch] for i in range(0, len(lengths), micro_batch))
    return sum(2 * len(part) * max(p + max(c, r) for p, c, r in part) for part in parts)


def flop(work, sizes, *, live_reference, frozen=False):
    """Of training on the work.

    Args:
        sizes: a Llama's config by transformers' names.
        live_reference: whether a reference's forward belongs to the step.
        frozen: whether the weights have no gradients, as under adapters.
    """
    hidden, layers, dim = sizes["hidden_size"], sizes["num_hidden_layers"], sizes["head_dim"]
    queries, keys = (dim * sizes[f"num_{name}_heads"] for name in ("attention", "key_value"))
    layer = hidden * (2 * queries + 2 * keys + 3 * sizes["intermediate_size"])
    products = 2 * (layers * layer * work.tokens + hidden * sizes["vocab_size"] * work.scored)
    attention = 4 * layers * queries * work.visible
    passes = (2 if frozen else 3) + live_reference
    return passes * products + (3 + live_reference) * attention
