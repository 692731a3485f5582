"""Reward against KL: where a policy stands relative to the model it came from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastpref.data.packing import pack, split_groups
from fastpref.data.tokenize import Group, Tokens
from fastpref.logps import sequence_logp
from fastpref.models.model import LogpModel
from fastpref.rollout.generate import Completion, SamplingParams, generate


@dataclass(frozen=True)
class Standing:
    """Means over sampled completions, each with its standard error over prompts."""

    reward: float
    reward_se: float
    kl: float
    """Sequence KL to the reference in nats: the mean of log policy - log reference over samples
    from the policy at temperature 1 (arXiv:2305.18290, section 6.1)."""
    kl_se: float
    texts: list[str]
    """The first completion of each prompt."""


def standing(
    policy: LogpModel,
    reference: LogpModel,
    tokenizer: Any,
    prompts: Sequence[Tokens],
    reward: Callable[[str], float],
    *,
    n: int,
    max_new_tokens: int,
    seed: int,
) -> Standing:
    """Sample from the policy and place it: mean reward, and KL to the reference.

    Args:
        policy: what is judged.
        reference: what it is held against; the policy itself gives a KL of 0.
        tokenizer: turns completions into the text that is rewarded.
        prompts: token ids, none empty.
        reward: the completion's text in, its reward out.
        n: completions per prompt.
        max_new_tokens: longest completion.
        seed: of the sampling.
    """
    params = SamplingParams(max_new_tokens=max_new_tokens)
    sampled = generate(policy, tokenizer, prompts, n, params, seed=seed)
    texts = [[text_of(tokenizer, c) for c in row] for row in sampled]
    rewards = torch.tensor([reward(text) for row in texts for text in row], dtype=torch.float64)
    groups = [
        Group(prompt, tuple(c.tokens for c in row), (None,) * len(row), i, {})
        for i, (prompt, row) in enumerate(zip(prompts, sampled, strict=True))
    ]
    gap = completion_logps(policy, groups) - completion_logps(reference, groups)
    return Standing(
        *mean_and_error(rewards.view(-1, n).mean(1)),
        *mean_and_error(gap.double().view(-1, n).mean(1)),
        [row[0] for row in texts],
    )


@torch.no_grad()
def completion_logps(model: LogpModel, groups: Sequence[Group]) -> torch.Tensor:
    """(B,) log-prob of every completion, in nats, on the CPU."""
    device = next(model.parameters()).device
    parts = []
    for part in split_groups(groups, max_groups=64):
        batch = pack(part, share=model.shares_prompts).to(device)
        parts.append(sequence_logp(model(batch).logp, cu_seqlens=batch.completions).cpu())
    return torch.cat(parts)


def text_of(tokenizer: Any, completion: Completion) -> str:
    text: str = tokenizer.decode(completion.tokens, skip_special_tokens=True)
    return text


def mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    """Mean and its standard error over independent values."""
    return float(values.mean()), float(values.std() / len(values) ** 0.5)
