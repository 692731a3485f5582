"""Tokens and flop of training steps on pairs, from token counts (prompt, chosen, rejected).

Flop count what a step needs, as fastpref.models.flops has it: neither recomputation nor padding.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastpref.data.packing import num_tokens
from fastpref.data.tokenize import Group
from fastpref.models.flops import flops_of


def groups_of(lengths):
    return [Group(range(p), (range(c), range(r)), (None, None), 0, {}) for p, c, r in lengths]


def tokens(lengths, *, share):
    """That pass the trunk; ``share``: a prompt once for both of its completions."""
    return sum(num_tokens(group, share=share) for group in groups_of(lengths))


def padded_tokens(lengths, micro_batch):
    """Of the original pairs, as long as the longest sequence in each so many pairs."""
    parts = (lengths[i : i + micro_batch] for i in range(0, len(lengths), micro_batch))
    return sum(2 * len(part) * max(p + max(c, r) for p, c, r in part) for part in parts)


def flop(lengths, sizes, *, share, live_reference, frozen=False):
    """Of training on the pairs.

    Args:
        sizes: a Llama's config by transformers' names.
        share: whether a prompt is computed once for both of its completions.
        live_reference: whether a reference's forward belongs to the step.
        frozen: whether the weights have no gradients, as under adapters.
    """
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes)).requires_grad_(not frozen)
    flops = flops_of(model.model, model.lm_head, model.config)
    groups = groups_of(lengths)
    steps = sum(flops.step(group, share=share) for group in groups)
    return steps + live_reference * sum(flops.forward(group, share=share) for group in groups)
