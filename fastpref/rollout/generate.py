"""Completions sampled from a model through transformers' generate, batched by length."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from fastpref.data.chat import stop_token_ids
from fastpref.data.tokenize import Tokens
from fastpref.models.model import LogpModel


@dataclass(frozen=True)
class SamplingParams:
    """How to sample; the defaults draw from the model's own distribution."""

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature <= 0 or self.top_k < 0:
            raise ValueError(
                "need max_new_tokens >= 1, temperature > 0 and top_k >= 0, got "
                f"{self.max_new_tokens}, {self.temperature} and {self.top_k}"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"need top_p in (0, 1], got {self.top_p}")


@dataclass(frozen=True)
class Completion:
    """Sampled token ids; a finished one ends with its stop token."""

    tokens: list[int]
    finished: bool


@torch.no_grad()
def generate(
    model: LogpModel,
    tokenizer: Any,
    prompts: Sequence[Tokens],
    n: int,
    params: SamplingParams,
    *,
    seed: int,
    batch_size: int = 256,
) -> list[list[Completion]]:
    """``n`` completions of each prompt.

    Args:
        model: the policy.
        tokenizer: for its stop tokens.
        prompts: token ids of each prompt, none empty.
        n: completions per prompt.
        params: temperature and limits.
        seed: the same seed, prompts and batch size give the same completions.
        batch_size: sequences that are generated at once.

    Returns:
        For each prompt its n completions, in the order of the prompts.
    """
    stops = sorted(stop_token_ids(tokenizer, model.model.generation_config))
    # equal lengths lie together, so that little is padded
    order = sorted(
        (i for i in range(len(prompts)) for _ in range(n)), key=lambda i: len(prompts[i])
    )
    out: list[list[Completion]] = [[] for _ in prompts]
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), drawing(model):
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            sampled = sample(model, [prompts[i] for i in part], stops, params, device)
            for i, tokens in zip(part, sampled, strict=True):
                out[i].append(cut(tokens, stops))
    return out


@contextmanager
def drawing(model: LogpModel) -> Iterator[None]:
    """The model as an ordinary one in evaluation mode, without the sampling habits of its own
    generation config (a repetition penalty, a top-p), which would make it another policy."""
    training, habits = model.training, model.model.generation_config
    model.eval()
    try:
        with model.plain():
            model.model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
            yield
    finally:
        model.model.generation_config = habits
        model.train(training)


def sample(
    model: LogpModel,
    prompts: Sequence[Tokens],
    stops: list[int],
    params: SamplingParams,
    device: torch.device,
) -> list[list[int]]:
    """One batch, padded on the left: the new tokens of each row, padding included."""
    width = max(len(prompt) for prompt in prompts)
    pad = stops[0]
    rows = [[*[pad] * (width - len(prompt)), *prompt] for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    decoder: Any = model.model  # generate is a mixin that nn.Module's typing hides
    tokens = decoder.generate(
        torch.tensor(rows, device=device),
        attention_mask=torch.tensor(mask, device=device),
        do_sample=True,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        max_new_tokens=params.max_new_tokens,
        eos_token_id=stops,
        pad_token_id=pad,
        use_cache=True,
    )
    new: list[list[int]] = tokens[:, width:].tolist()
    return new


def cut(tokens: list[int], stops: list[int]) -> Completion:
    """The tokens up to their first stop token, which stays."""
    for i, token in enumerate(tokens):
        if token in stops:
            return Completion(tokens[: i + 1], True)
    return Completion(tokens, False)
