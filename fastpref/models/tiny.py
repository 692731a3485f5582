"""Tiny models and tokenizers made on the spot: for tests, recipes and the quickstart."""

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fastpref.data.formats import Example, load_examples
from fastpref.models.attention import ModelError

PAD, EOS = "<|pad|>", "<|end|>"
TURN = "<|turn|>"

# one turn: <|turn|>role, a line break, the content, <|end|> and a line break
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|turn|>' + message['role'] + '\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|end|>' -}}{%- endgeneration -%}"
    "{%- else -%}"
    "{{- message['content'] + '<|end|>' -}}"
    "{%- endif -%}"
    "{{- '\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|turn|>assistant\n' -}}{%- endif -%}"
)


def tiny_tokenizer(
    texts: Iterable[str], vocab_size: int = 2048, *, chat_template: str | None = None
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on texts: any text goes in and comes back unchanged.

    Args:
        texts: what to learn merges from; may be empty (bytes alone).
        vocab_size: most tokens, special ones included; at least 259 (256 bytes, pad, eos, turn).
        chat_template: a jinja template, for instance CHAT_TEMPLATE; None for none.

    Returns:
        A tokenizer with pad and eos tokens, which adds neither by itself; no bos, no unk.
    """
    specials = [PAD, EOS, TURN]
    alphabet = sorted(ByteLevel.alphabet())
    least = len(alphabet) + len(specials)
    if vocab_size < least:
        raise ValueError(f"need vocab_size of at least {least}, got {vocab_size}")
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    make: Any = PreTrainedTokenizerFast
    wrapped: PreTrainedTokenizerFast = make(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=[TURN],
        clean_up_tokenization_spaces=False,
        chat_template=chat_template,
    )
    return wrapped


def tiny_model(
    vocabulary: PreTrainedTokenizerBase | int,
    architecture: str = "llama",
    *,
    hidden: int = 128,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    tie: bool = False,
    max_positions: int = 2048,
    seed: int = 0,
    **overrides: Any,
) -> PreTrainedModel:
    """A causal language model with random weights; fp32, on the CPU, in eval mode.

    Args:
        vocabulary: a tokenizer (its size and special tokens are taken) or a number of tokens.
        architecture: a transformers model type: llama, qwen2, qwen3, mistral, gemma2, ...
        tie: whether embedding and head share their weight.
        seed: of the weights; the global random state is left as it was.
        overrides: any other key of the architecture's config.
    """
    special: dict[str, int | None] = {"bos_token_id": None, "eos_token_id": None}
    if isinstance(vocabulary, int):
        vocab_size = vocabulary
        special["pad_token_id"] = None
    else:
        vocab_size = len(vocabulary)
        special["eos_token_id"] = vocabulary.eos_token_id
        special["pad_token_id"] = vocabulary.pad_token_id
    keys: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": (8 * hidden // 3 + 15) // 16 * 16,  # grouped products want 16 bytes
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": tie,
        "head_dim": hidden // heads,
        **special,
    }
    known = AutoConfig.for_model(architecture)
    keys = {
        name: value
        for name, value in keys.items()
        if hasattr(known, name) and not isinstance(getattr(type(known), name, None), property)
    }
    config = AutoConfig.for_model(architecture, **(keys | overrides))
    make: Any = AutoModelForCausalLM.from_config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = make(config, dtype=torch.float32)
    model.train(False)
    return model


def save_tiny(
    folder: str | Path,
    texts: Iterable[str],
    *,
    vocab_size: int = 2048,
    chat_template: str | None = None,
    architecture: str = "llama",
    **options: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Make a tokenizer and a model and write both with save_pretrained.

    Args:
        options: of tiny_model: hidden, layers, heads, kv_heads, tie, seed, ...

    Returns:
        The model and the tokenizer, as written.
    """
    tokenizer = tiny_tokenizer(texts, vocab_size, chat_template=chat_template)
    model = tiny_model(tokenizer, architecture, **options)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


@dataclass(kw_only=True)
class TinyConfig:
    """A small random model whose tokenizer is trained on a data file."""

    dataset_name: str
    """Local file or folder, or a hub id, whose text trains the tokenizer."""
    output_dir: str
    """Folder that receives model and tokenizer."""
    vocab_size: int = 2048
    """Most tokens."""
    architecture: str = "llama"
    """A model type of transformers: llama, qwen2, qwen3, mistral, gemma2, granite, cohere, ..."""
    hidden_size: int = 128
    """Width."""
    num_hidden_layers: int = 4
    """Depth."""
    num_attention_heads: int = 4
    """Attention heads."""
    num_key_value_heads: int = 2
    """Key and value heads."""
    tie_word_embeddings: bool = False
    """One matrix for the embedding and the head."""
    seed: int = 0
    """Seed of the weights."""


def make_tiny(config: TinyConfig) -> None:
    """Write the model that the config describes; chat rows bring a chat template along."""
    folder = Path(config.output_dir)
    if folder.exists() and any(folder.iterdir()):
        raise ModelError(f"need an empty or new output_dir, got {folder} with files in it")
    examples, _ = load_examples(config.dataset_name, "sft")
    chat = isinstance(examples[0].prompt, list)
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if config.architecture not in known:
        near = difflib.get_close_matches(config.architecture, known, n=1)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        raise ModelError(
            f"need a causal language model type of transformers, got {config.architecture!r}{hint}"
        )
    texts = (text for example in examples for text in texts_of(example))
    template = CHAT_TEMPLATE if chat else None
    tokenizer = tiny_tokenizer(texts, config.vocab_size, chat_template=template)
    model = tiny_model(
        tokenizer,
        config.architecture,
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        tie=config.tie_word_embeddings,
        seed=config.seed,
        vocab_size=(len(tokenizer) + 63) // 64 * 64,  # room for what a loader adds (Qwen2's)
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(
        f"{folder}: {config.architecture} of {model.num_parameters():,} parameters, "
        f"{len(tokenizer)} tokens"
    )


def texts_of(example: Example) -> Iterator[str]:
    """Every text of a row: strings as they are, messages by their content."""
    for part in (example.prompt, *example.completions):
        if isinstance(part, str):
            yield part
        else:
            yield from (m["content"] for m in part if isinstance(m.get("content"), str))
