"""Examples -> token ids: a prompt that its completions share, and which tokens are scored.

Strings: the prompt is what the tokenizer makes of it as configured (BOS kept, an end mark that the
tokenizer appends removed); a completion is the rest of the joint text's tokens where those begin
with the prompt's, otherwise it is tokenised apart and counted; EOS follows unless it is there.
Message lists: the chat template's own text and nothing more, no EOS on top, without the white space
that templates put after the stop token. Only assistant tokens are scored.
"""

import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, TypeAlias, get_args

from transformers import PreTrainedTokenizerBase

from fastpref.data.chat import ChatTemplate, Text, stop_token_ids
from fastpref.data.files import DataError
from fastpref.data.formats import Example

TruncationMode: TypeAlias = Literal["keep_start", "keep_end"]
# examples that are encoded in one call
_AT_ONCE = 4096
# one of several kinds of character: whatever a completion starts with, one of them does not merge
_ANCHORS = ("\n", "a", "1", ":")


# array("i") where tokenize makes them: 4 bytes a token, where a list takes 36
Tokens: TypeAlias = Sequence[int]


@dataclass(frozen=True, slots=True)
class Group:
    """Token ids of one prompt and its completions; every sequence has at least one token."""

    prompt: Tokens
    completions: tuple[Tokens, ...]
    scored: tuple[list[bool] | None, ...]  # per completion: which tokens are scored; None = all
    row: int
    extras: dict[str, float | tuple[float, ...]]  # one per group, or one per completion


@dataclass(slots=True)
class _Ids:
    prompt: list[int]
    ids: list[int] = field(default_factory=list)
    scored: list[bool] = field(default_factory=list)
    apart: bool = False  # tokenised apart from what stands before it


class _Encoder:
    """A tokenizer's batch call, without what it puts around a text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        bare, full = self("a", special=False), self("a", special=True)
        starts = [i for i in range(len(full)) if full[i : i + len(bare)] == bare]
        if not bare or not starts:
            raise ValueError(f"need a tokenizer that keeps the text 'a', got ids {bare} and {full}")
        self._n_suffix = len(full) - starts[0] - len(bare)
        # a dummy prefix: SentencePiece turns "a" at the start of a text into " a"
        self._dummy = self("\na", special=False) != self("\n", special=False) + bare

    def __call__(self, text: str, *, special: bool) -> list[int]:
        return self.batch([text], special=special, keep_end=True)[0]

    def batch(
        self, texts: Sequence[str], *, special: bool, keep_end: bool = False
    ) -> list[list[int]]:
        """Ids of each text, with the tokenizer's start marks if `special`, never its end marks."""
        unique = list(dict.fromkeys(texts))
        if not unique:
            return []
        out: list[list[int]] = self._tokenizer(
            unique,
            add_special_tokens=special,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        if special and not keep_end and self._n_suffix:
            out = [ids[: -self._n_suffix] for ids in out]
        at = dict(zip(unique, out, strict=True))
        return [at[text] for text in texts]

    def apart(self, text: str, source: str) -> list[int]:
        """Ids of a text that follows another, without special tokens or a dummy prefix."""
        if not self._dummy:
            return self(text, special=False)
        for anchor in _ANCHORS:
            head, both = self(anchor, special=False), self(anchor + text, special=False)
            if both[: len(head)] == head:
                return both[len(head) :]
        raise DataError(f"{source}: need a text that can follow another, got {text[:40]!r}")


def _encode(encoder: _Encoder, texts: list[Text], sources: list[str], special: bool) -> list[_Ids]:
    """Tokens of each text, boundary by boundary: joint where that keeps all ids before it."""
    prompts = encoder.batch([t.prompt for t in texts], special=special)
    out = [_Ids(list(ids)) for ids in prompts]
    so_far = [t.prompt for t in texts]
    for step in range(max((len(t.segments) for t in texts), default=0)):
        live = [i for i, t in enumerate(texts) if step < len(t.segments)]
        for i in live:
            so_far[i] += texts[i].segments[step][0]
        joint = encoder.batch([so_far[i] for i in live], special=special)
        for i, ids in zip(live, joint, strict=True):
            text, scored = texts[i].segments[step]
            one = out[i]
            before = one.prompt + one.ids
            if ids[: len(before)] == before:
                new = ids[len(before) :]
            else:
                one.apart = True
                new = encoder.apart(text, sources[i])
            one.ids += new
            one.scored += [scored] * len(new)
    return out


# --- truncation


def _truncate_prompt(prompt: list[int], keep: int, bos: int | None) -> list[int]:
    """The last `keep` tokens, a leading BOS counted among them."""
    if len(prompt) <= keep:
        return prompt
    if prompt[0] == bos and keep > 1:
        return [prompt[0], *prompt[len(prompt) - keep + 1 :]]
    return prompt[len(prompt) - keep :]


def _fit(
    prompt: list[int],
    completions: list[_Ids],
    max_length: int,
    mode: TruncationMode,
    bos: int | None,
    own: int | None,
) -> tuple[list[int], int]:
    """Cut a group to `max_length`; how many completions were cut. The prompt makes room for the
    first `own` completions (None: all); others take the room that is there.
    """
    longest = max(len(c.ids) for c in completions[:own])
    if mode == "keep_start":
        keep = max(max_length - longest, max_length // 2)
    else:
        keep = max(max_length - longest, 1)
    prompt = _truncate_prompt(prompt, keep, bos)
    room = max_length - len(prompt)
    cut = [c for c in completions if len(c.ids) > room]
    for c in cut:
        place = slice(0, room) if mode == "keep_start" else slice(len(c.ids) - room, None)
        c.ids, c.scored = c.ids[place], c.scored[place]
    return prompt, len(cut)


# --- the public function


def _start(prompt: list[int], completions: list[_Ids], bos: int | None, source: str) -> list[int]:
    """A prompt of at least one token: BOS, else the completions' shared first token."""
    if prompt:
        return prompt
    if bos is not None:
        return [bos]
    first = {c.ids[0] for c in completions}
    if len(first) > 1 or any(len(c.ids) < 2 for c in completions):
        got = "an empty prompt and no first token that the completions share"
        raise DataError(f"{source}: need a prompt, or a tokenizer with a BOS token, got {got}")
    for c in completions:
        c.ids, c.scored = c.ids[1:], c.scored[1:]
    return [first.pop()]


def _encode_strings(
    encoder: _Encoder, examples: list[Example], eos: int | None
) -> list[list[_Ids]]:
    texts = [Text(str(e.prompt), [(str(c), True)]) for e in examples for c in e.completions]
    sources = [e.source for e in examples for _ in e.completions]
    if texts and eos is None:
        raise ValueError("need a tokenizer with an EOS token to end strings, got none")
    flat = _encode(encoder, texts, sources, True)
    for one in flat:
        if eos is not None and one.ids[-1:] != [eos]:
            one.ids.append(eos)
            one.scored.append(True)
    return _regroup(flat, examples)


def _encode_chats(
    encoder: _Encoder, examples: list[Example], make_template: Callable[[], ChatTemplate]
) -> list[list[_Ids]]:
    texts: list[Text] = []
    sources = [e.source for e in examples for _ in e.completions]
    template = make_template() if examples else None
    for e in examples:
        assert template is not None
        try:
            texts += template.texts(e)
        except DataError:
            raise
        except Exception as error:  # a template may raise anything: jinja's errors, Python's
            got = f"{type(error).__name__}: {error}"
            need = "messages that the chat template takes"
            raise DataError(f"{e.source}: need {need}, got {got}") from error
    return _regroup(_encode(encoder, texts, sources, False), examples)


def _in_turn(
    examples: list[Example], encode: Callable[[list[Example]], list[list[_Ids]]]
) -> Iterator[list[_Ids]]:
    """What ``encode`` makes of some examples after the other, so that few lie there as lists."""
    for start in range(0, len(examples), _AT_ONCE):
        yield from encode(examples[start : start + _AT_ONCE])


def _regroup(flat: list[_Ids], examples: list[Example]) -> list[list[_Ids]]:
    each = iter(flat)
    return [[next(each) for _ in e.completions] for e in examples]


def tokenize(
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = 1024,
    truncation_mode: TruncationMode = "keep_start",
    generation_config: Any = None,
    own: int | None = None,
) -> tuple[list[Group], dict[str, int]]:
    """Token ids of each example, cut to `max_length`.

    Strings. The prompt's ids are `tokenizer(prompt)`; a completion's are the rest of
    `tokenizer(prompt + completion)` where that begins with the prompt's ids, otherwise those of the
    completion by itself, without special tokens or SentencePiece's dummy space. EOS is appended
    unless it is there. An empty prompt becomes BOS; for a tokenizer without one, the completion's
    first token is the prompt and is not scored.

    Message lists. The prompt is the template's text of the prompt messages and its generation
    prompt; a completion is what the template yields after it, up to the last assistant turn's stop
    token: special tokens and white space after it (white space after the last special token where
    none is known to stop) are the template's and are not scored, and what follows the last scored
    token is left out. Scored is what {% generation %} marks
    enclose, in a template without them each assistant turn, found as the text by which the template
    extends the turns before it. A template that rewrites earlier turns is refused. Completions that
    start with another role follow the prompt without a generation prompt.

    Truncation. prompt + completion has at most `max_length` tokens for every completion.
    keep_start: a prompt keeps its last max(max_length - longest completion, max_length // 2)
    tokens, a leading BOS counted among them, then completions lose their end (and so their EOS).
    keep_end: a prompt keeps its last max(max_length - longest completion, 1) tokens, then
    completions lose their start. The prompt stays shared. Afterwards a group is dropped if all of
    its completions (of two or more) have the same tokens or if one has no scored token.

    Args:
        examples: rows of `load_examples` or `to_examples`.
        tokenizer: any transformers tokenizer.
        max_length: tokens, at least 2; None for no limit.
        truncation_mode: "keep_start" or "keep_end".
        own: completions of an example, the first ones, that decide how its prompt is cut and
            whether it is dropped; None: all.
        generation_config: whose EOS ids end a reply, beside the tokenizer's.

    Returns:
        Groups in the order of the examples, and counts: truncated_prompts (groups),
        truncated_completions, boundary_differs (completions tokenised apart), dropped_identical and
        dropped_empty (groups).

    Raises:
        DataError: a row that the template refuses or rewrites, or nothing left to learn from.
        ValueError: a bad option, or a tokenizer without EOS or without the chat template needed.
    """
    if truncation_mode not in get_args(TruncationMode):
        raise ValueError(f"need truncation_mode keep_start or keep_end, got {truncation_mode!r}")
    if max_length is not None and max_length < 2:
        raise ValueError(f"need max_length of at least 2 (a prompt and a reply), got {max_length}")
    examples = list(examples)
    encoder = _Encoder(tokenizer)
    bos = tokenizer.bos_token_id

    @cache
    def template() -> ChatTemplate:
        if not tokenizer.chat_template:
            raise ValueError("need a tokenizer with a chat template for message lists, got none")
        stops = stop_token_ids(tokenizer, generation_config)
        return ChatTemplate(tokenizer, stops)

    strings = [e for e in examples if isinstance(e.prompt, str)]
    chats = [e for e in examples if not isinstance(e.prompt, str)]
    end = tokenizer.eos_token_id
    of_strings = _in_turn(strings, lambda part: _encode_strings(encoder, part, end))
    of_chats = _in_turn(chats, lambda part: _encode_chats(encoder, part, template))
    names = ("truncated_prompts", "truncated_completions", "boundary_differs")
    counts = dict.fromkeys((*names, "dropped_identical", "dropped_empty"), 0)
    groups, first_apart = [], ""
    for e in examples:
        completions = next(of_strings if isinstance(e.prompt, str) else of_chats)
        apart = sum(c.apart for c in completions)
        counts["boundary_differs"] += apart
        first_apart = first_apart or (e.source if apart else "")
        if not all(any(c.scored) for c in completions[:own]):
            counts["dropped_empty"] += 1
            continue
        prompt = _start(completions[0].prompt, completions, bos, e.source)
        whole = len(prompt)
        if max_length is not None:
            prompt, cut = _fit(prompt, completions, max_length, truncation_mode, bos, own)
            counts["truncated_completions"] += cut
            counts["truncated_prompts"] += len(prompt) < whole
        kept = completions[:own]
        if not all(any(c.scored) for c in kept):
            counts["dropped_empty"] += 1
        elif len(kept) > 1 and all(c.ids == kept[0].ids for c in kept):
            counts["dropped_identical"] += 1
        else:
            scored = tuple(None if all(c.scored) else c.scored for c in completions)
            ids = tuple(array("i", c.ids) for c in completions)
            groups.append(Group(array("i", prompt), ids, scored, e.row, {**e.extras}))
    if counts["boundary_differs"]:
        total = sum(len(e.completions) for e in examples)
        warnings.warn(
            f"{counts['boundary_differs']} of {total} completions were tokenised apart from what"
            f" stands before them, whose last tokens would change (first: {first_apart}); to avoid"
            " it, end prompts on a token boundary, for instance without trailing white space",
            stacklevel=2,
        )
    if examples and not groups:
        gone = f"{counts['dropped_empty']} empty, {counts['dropped_identical']} identical"
        need = f"{examples[0].source}: need something to learn from"
        raise DataError(f"{need}, got {len(examples)} groups all dropped ({gone})")
    return groups, counts
