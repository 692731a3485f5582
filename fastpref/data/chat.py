"""Chat templates: message lists -> text, cut into what is scored and what is not."""

import re
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from fastpref.data.files import DataError
from fastpref.data.formats import Example, Message

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, generation_config: Any = None) -> set[int]:
    """The tokens that end a reply: the generation config's EOS ids and the tokenizer's own."""
    ids = getattr(generation_config, "eos_token_id", None)
    stops = set(ids) if isinstance(ids, list | tuple | set) else {ids}
    return {int(i) for i in stops | {tokenizer.eos_token_id} if i is not None}


@dataclass(slots=True)
class Text:
    """A completion in text: after the prompt come segments, each scored or not."""

    prompt: str
    segments: list[tuple[str, bool]]


class ChatTemplate:
    """A tokenizer's chat template and how its replies end."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: set[int]):
        self._tokenizer = tokenizer
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._marks = {
            str(tokenizer.convert_ids_to_tokens(i)): i in stops for i in sorted(special | stops)
        }

    def _render(self, example: Example, messages: list[Message], reply_next: bool) -> str:
        kwargs = example.template_kwargs or {}
        text = self._tokenizer.apply_chat_template(
            messages,
            tools=example.tools,
            tokenize=False,
            add_generation_prompt=reply_next,
            **kwargs,
        )
        return str(text)

    def _marked(self, example: Example, messages: list[Message]) -> list[tuple[int, int]] | None:
        """Where the template's {% generation %} marks stand, None for a template without."""
        template = self._tokenizer.get_chat_template(None, example.tools)
        if not _GENERATION_MARK.search(template):
            return None
        kwargs = example.template_kwargs or {}
        rendered: Any = render_jinja_template(  # (texts, spans), whatever its annotation says
            conversations=[messages],
            tools=example.tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **{**self._tokenizer.special_tokens_map, **kwargs},
        )
        return [(start, end) for start, end in rendered[1][0]]

    def _turns(
        self, example: Example, completion: list[Message], prompt: str, full: str, reply_next: bool
    ) -> list[tuple[int, int]]:
        """Each assistant turn's place in `full`, by what the template adds turn after turn."""
        assert isinstance(example.prompt, list)
        spans = []
        for n, message in enumerate(completion):
            if message["role"] != "assistant":
                continue
            before = example.prompt + completion[:n]
            start = self._render(example, before, True) if n or not reply_next else prompt
            last = n == len(completion) - 1
            end = full if last else self._render(example, [*before, message], False)
            end = end[: len(start) + self._turn_end(end[len(start) :])]
            for text in (start, end):
                if not full.startswith(text):
                    raise _refusal(example, len(before), text, full)
            spans.append((len(start), len(end)))
        return spans

    def _turn_end(self, turn: str) -> int:
        """Length up to the first stop token of the special tokens and white space that end a turn.

        Up to the last special token where none of them is a known stop token; all of the turn where
        it does not end in special tokens.
        """
        rest = turn.rstrip()
        end = None
        while mark := next((m for m in self._marks if rest.endswith(m)), None):
            if self._marks[mark] or end is None:
                end = len(rest)
            rest = rest[: -len(mark)].rstrip()
        return len(turn) if end is None else end

    def texts(self, example: Example) -> list[Text]:
        """The prompt and the segments of each completion of a row of message lists."""
        assert isinstance(example.prompt, list)
        lists = [c for c in example.completions if isinstance(c, list)]
        reply_next = all(messages[0]["role"] == "assistant" for messages in lists)
        prompt = self._render(example, example.prompt, reply_next)
        out = []
        for completion in lists:
            full = self._render(example, example.prompt + completion, False)
            if not full.startswith(prompt):
                raise _refusal(example, len(example.prompt), prompt, full)
            spans = self._marked(example, example.prompt + completion)
            if spans is None:
                spans = self._turns(example, completion, prompt, full, reply_next)
            segments, at = [], len(prompt)
            for start, end in spans:
                start = max(start, at)
                end = start + self._turn_end(full[start:end])
                if start > at:
                    segments.append((full[at:start], False))
                if end > start:
                    segments.append((full[start:end], True))
                    at = end
                else:
                    at = start
            out.append(Text(prompt, segments))
        return out


def _refusal(example: Example, turn: int, need: str, full: str) -> DataError:
    """The error of a template whose text of the first turns, `need`, does not start `full`."""
    same = next((i for i, (a, b) in enumerate(zip(need, full, strict=False)) if a != b), len(full))
    if turn == len(example.prompt):
        cure = "set chat_template_kwargs (as enable_thinking), or give the reply what it leaves out"
    else:
        cure = "use a template with {% generation %} marks, or rows with one reply after the prompt"
    return DataError(
        f"{example.source}: turn {turn}: need a chat template that leaves its text as it is when"
        f" turns follow, got {full[same : same + 40]!r} where it had {need[same : same + 40]!r};"
        f" {cure}"
    )
