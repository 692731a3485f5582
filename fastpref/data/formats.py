"""Preference and instruction data, from files or the hub, in one shape: rows -> Examples.

Columns are TRL's. kind="preference": `chosen` + `rejected`, with `prompt` or with the prompt
implicit in both. kind="sft": the first of `messages`, `prompt` + `completion`, `text`, and
preference columns (trained on `chosen`) that a row has. kind="unpaired": `prompt` + `completion` +
`label`, the prompt beside or implicit in messages. kind="ranking": `prompt` + `completions` +
`scores`, a list of texts and a number for each. Both take preference columns where a row lacks
their own. Text is a string or a list of {role, content} messages; a string `prompt` may stand
beside message lists, as in UltraFeedback. `tools` and `chat_template_kwargs` go to the chat
template, other numbers to `Example.extras`.
"""

import json
import logging
import numbers
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from fastpref.data.files import DataError, Sourced, numbered, read_rows

Message: TypeAlias = dict[str, Any]
Text: TypeAlias = str | list[Message]
Kind: TypeAlias = Literal["sft", "preference", "unpaired", "ranking"]

_PAIR = ("chosen", "rejected")
_TEXT_COLUMNS = ("prompt", *_PAIR, "completion", "messages", "text")
_RATED_COLUMNS = ("label", "score", "scores", "completions")
_OPTION_COLUMNS = ("tools", "chat_template_kwargs")
_NEEDED = {
    "preference": "chosen and rejected (prompt beside them, or implicit in both)",
    "sft": "messages, prompt and completion, text, or chosen and rejected",
    "unpaired": "prompt (or implicit in messages), completion and label, or chosen and rejected",
    "ranking": "prompt, completions and scores, or chosen and rejected",
}
# where preference rows are not the kind's own: how they are counted, what becomes of them
_FROM_PAIRS = {
    "sft": ("sft_on_chosen", "trained on their chosen completion"),
    "unpaired": ("unpaired_from_pairs", "each as two, chosen with label 1 and rejected with 0"),
}
_MOST = float(np.finfo(np.float32).max)
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Example:
    """One row: a prompt and its completions, (chosen, rejected), one, or those of a ranking.

    Strings or message lists, prompt and completions alike. A list prompt has at least one message
    and each list completion at least one assistant message; no completion is blank.
    """

    prompt: Text
    completions: tuple[Text, ...]
    row: int  # 0-based row number in the data set, dropped rows counted; a split pair's is shared
    source: str  # "train.jsonl.gz:17" (1-based line) or "name[17]" (0-based row)
    extras: dict[str, float | tuple[float, ...]] = field(default_factory=dict)  # or per completion
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] | None = None


def _clean(value: Any, source: str, column: str) -> Any:
    """Nested text with absent fields (None in parquet) left out and its text checked."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{source}: {column}: need text, got {error}") from error
    elif isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise DataError(f"{source}: {column}: need text for keys, got {key!r}")
            _clean(key, source, column)
        return {k: _clean(v, source, column) for k, v in value.items() if v is not None}
    elif isinstance(value, list | tuple):
        return [_clean(v, source, column) for v in value]
    return value


def _text(value: Any, source: str, column: str) -> Text:
    value = _clean(value, source, column)
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        got = "an empty list" if value == [] else type(value).__name__
        raise DataError(f"{source}: {column}: need text or a list of messages, got {got}")
    for number, message in enumerate(value):
        at = f"{source}: {column}[{number}]"
        if not isinstance(message, dict):
            raise DataError(f"{at}: need a message {{role, content}}, got {type(message).__name__}")
        role, content = message.get("role"), message.get("content", "")
        if not isinstance(role, str) or not role:
            keys = ", ".join(message) or "none"
            raise DataError(f"{at}: need a message with a role, got role {role!r} among {keys}")
        parts = content if isinstance(content, list) else [] if isinstance(content, str) else [0]
        for part in parts:
            if not (isinstance(part, dict) and isinstance(part.get("text"), str)):
                got = type(part).__name__ if isinstance(content, list) else type(content).__name__
                got = str(part.get("type", got)) if isinstance(part, dict) else got
                raise DataError(f"{at}: content: need text or a list of text parts, got {got}")
    # text templates join strings, so parts of text become one
    return [m | {"content": _content(m)} if "content" in m else m for m in value]


def _implicit_strings(chosen: str, rejected: str, turn_marker: str) -> tuple[str, tuple[str, str]]:
    low, high = 0, min(len(chosen), len(rejected))
    while low < high:  # the longest shared prefix, by halving
        middle = (low + high + 1) // 2
        if chosen[low:middle] == rejected[low:middle]:
            low = middle
        else:
            high = middle - 1
    cut = chosen.rfind(turn_marker, 0, low)
    if cut >= 0:
        cut += len(turn_marker)
    else:  # before the last white space: tokenizers join a space to the word after it
        spaces = list(re.finditer(r"\s+", chosen[:low]))
        cut = spaces[-1].start() if spaces else 0
    return chosen[:cut], (chosen[cut:], rejected[cut:])


def _shared_messages(lists: list[list[Message]]) -> int:
    """How many leading messages form the prompt: shared by all, before the reply in one list."""
    if len(lists) == 1:
        roles = [message["role"] for message in lists[0]]
        return roles.index("assistant") if "assistant" in roles else 0
    most = min(map(len, lists)) - 1
    return next((n for n in range(most) if any(m[n] != lists[0][n] for m in lists)), most)


def _content(message: Message) -> str:
    content = message.get("content", "")
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _split_messages(
    prompt: Text | None, lists: list[list[Message]], source: str
) -> tuple[list[Message], list[list[Message]]]:
    if isinstance(prompt, list):
        n = len(prompt)
        repeated = all(messages[:n] == prompt and len(messages) > n for messages in lists)
        return prompt, [messages[n:] for messages in lists] if repeated else lists
    if prompt is not None and all(messages[0]["role"] == "assistant" for messages in lists):
        return [{"role": "user", "content": prompt}], lists
    n = _shared_messages(lists)
    if not n:
        need = "a shared message" if len(lists) > 1 else "a message"
        got = " and ".join(messages[0]["role"] for messages in lists)
        raise DataError(f"{source}: need {need} before the reply, got {got} first")
    shared = lists[0][:n]
    if prompt is not None and all(prompt.strip() not in _content(m) for m in shared):
        got = f"prompt {prompt[:40]!r} beside {_content(shared[-1])[:40]!r}"
        raise DataError(f"{source}: need the prompt's text among the shared messages, got {got}")
    return shared, [messages[n:] for messages in lists]


def _blank(completion: Text) -> bool:
    if isinstance(completion, str):
        return not completion.strip()
    replies = [message for message in completion if message["role"] == "assistant"]
    more = any(v for m in replies for k, v in m.items() if k not in ("role", "content"))
    return not more and not any(_content(message).strip() for message in replies)


def _columns(row: Mapping[str, Any], kind: Kind, source: str) -> tuple[str | None, tuple[str, ...]]:
    """The prompt's column and the completions', by what the row holds."""
    known = (*_TEXT_COLUMNS, *_RATED_COLUMNS)
    have = {column for column in known if row.get(column) is not None}
    prompt = "prompt" if "prompt" in have else None
    if kind == "sft":
        if "messages" in have:
            return None, ("messages",)
        if {"prompt", "completion"} <= have:
            return prompt, ("completion",)
        if "text" in have:
            return None, ("text",)
    elif kind == "unpaired" and {"completion", "label"} <= have:
        if prompt or not isinstance(row["completion"], str):
            return prompt, ("completion",)
    elif kind == "ranking" and {"prompt", "completions", "scores"} <= have:
        return prompt, ("completions",)
    if {*_PAIR} <= have:
        return prompt, _PAIR
    got = ", ".join(f"{k} (empty)" if row[k] is None else str(k) for k in row) or "none"
    raise DataError(f"{source}: need the columns {_NEEDED[kind]}, got {got}")


def _options(row: Mapping[str, Any], source: str) -> tuple[list[Any] | None, dict[str, Any] | None]:
    tools = _clean(row.get("tools"), source, "tools")
    if isinstance(tools, str):  # as TRL stores them, since parquet wants one schema for all rows
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise DataError(f"{source}: tools: need JSON, got {error}") from error
        _clean(tools, source, "tools")  # JSON's escapes may spell what is no text
    kwargs = _clean(row.get("chat_template_kwargs"), source, "chat_template_kwargs")
    if not isinstance(tools, list | None):
        raise DataError(f"{source}: tools: need a list, got {type(tools).__name__}")
    if not isinstance(kwargs, dict | None):
        got = type(kwargs).__name__
        raise DataError(f"{source}: chat_template_kwargs: need an object, got {got}")
    return tools or None, kwargs or None


def _number(value: Any) -> float | None:
    """A number that is finite in fp32, in which a batch holds it."""
    if not isinstance(value, numbers.Real):  # numpy's are, too
        return None
    return float(value) if abs(value) <= _MOST else None  # type: ignore[operator]


def _shown(value: Any) -> str:
    """What an error says it got: a number as it is, unless it has too many digits to print."""
    number = isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**64)
    return repr(value) if number else type(value).__name__


def _python(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _listed(value: Any, source: str) -> dict[str, Any]:
    """The completions of a ranking by the names that errors give them."""
    if not isinstance(value, list | tuple) or len(value) < 2:
        got = len(value) if isinstance(value, list | tuple) else type(value).__name__
        raise DataError(f"{source}: completions: need a list of at least 2, got {got}")
    return {f"completions[{n}]": one for n, one in enumerate(value)}


def _ratings(row: Mapping[str, Any], column: str, count: int, source: str) -> tuple[float, ...]:
    """How good each completion is: 1 or 0, or the scores of a ranking."""
    if column in _PAIR:
        return 1.0, 0.0
    if column == "completion":
        label = _python(row["label"])
        if not isinstance(label, int | float) or label not in (0, 1):
            need = "need true or false, or 1 or 0"
            raise DataError(f"{source}: label: {need}, got {_shown(label)}")
        return (float(label),)
    scores = row["scores"]
    if not isinstance(scores, list | tuple) or len(scores) != count:
        got = len(scores) if isinstance(scores, list | tuple) else type(scores).__name__
        raise DataError(f"{source}: scores: need {count}, one for each completion, got {got}")
    scores = [_python(score) for score in scores]
    numbers = [_number(score) for score in scores]
    if None in numbers:
        n = numbers.index(None)
        need = f"scores[{n}]: need a finite fp32 number"
        raise DataError(f"{source}: {need}, got {_shown(scores[n])}")
    return tuple(number for number in numbers if number is not None)


def _split(
    prompt: Text | None,
    texts: dict[str, Text],
    given: dict[str, Any],
    source: str,
    turn_marker: str,
) -> tuple[Text, list[Text]]:
    """The prompt, given or implicit, and what is left of each text after it."""
    strings = [text for text in texts.values() if isinstance(text, str)]
    lists = [text for text in texts.values() if isinstance(text, list)]
    if strings and (lists or isinstance(prompt, list)):
        got = ", ".join(f"{name}: {type(value).__name__}" for name, value in given.items())
        raise DataError(f"{source}: need strings or message lists for all, got {got}")
    if lists:
        prompt, cut = _split_messages(prompt, lists, source)
        for name, messages in zip(texts, cut, strict=True):
            roles = [message["role"] for message in messages]
            if "assistant" not in roles:
                got = ", ".join(roles)
                raise DataError(f"{source}: {name}: need an assistant message, got {got}")
        return prompt, [*cut]
    if prompt is None and len(strings) == 2:
        prompt, pair = _implicit_strings(strings[0], strings[1], turn_marker)
        return prompt, [*pair]
    return prompt or "", [*strings]


def _row_examples(
    row: Any, kind: Kind, source: str, number: int, turn_marker: str
) -> list[Example] | str:
    """The row's Examples, or the name of the reason for which it is dropped."""
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, Mapping):
        raise DataError(f"{source}: need an object with named columns, got {type(row).__name__}")
    prompt_column, columns = _columns(row, kind, source)
    ranking = columns == ("completions",)
    given = _listed(row["completions"], source) if ranking else {k: row[k] for k in columns}
    prompt = None if prompt_column is None else _text(row[prompt_column], source, prompt_column)
    texts = {name: _text(value, source, name) for name, value in given.items()}
    rated = kind in ("unpaired", "ranking")
    ratings = _ratings(row, columns[0], len(texts), source) if rated else ()
    if columns == _PAIR and texts["chosen"] == texts["rejected"]:
        return "identical_pairs"
    given = {prompt_column: row[prompt_column], **given} if prompt_column else given
    prompt, completions = _split(prompt, texts, given, source, turn_marker)
    if kind == "sft":
        completions = completions[:1]
    if any(_blank(completion) for completion in completions):
        return "empty_completions"
    if kind == "ranking" and len({np.float32(score) for score in ratings}) == 1:
        return "tied_rankings"
    known = {*_TEXT_COLUMNS, *_OPTION_COLUMNS, "row", "ref_logp"}  # the last two are the batch's
    known.update(_RATED_COLUMNS if rated else ())
    numbers = {str(k): _number(v) for k, v in row.items() if k not in known}
    extras: dict[str, float | tuple[float, ...]]
    extras = {k: v for k, v in numbers.items() if v is not None}
    if kind == "ranking":
        extras["score"] = ratings
    tools, template_kwargs = _options(row, source)
    example = Example(prompt, tuple(completions), number, source, extras, tools, template_kwargs)
    if kind != "unpaired":
        return [example]
    labels = zip(completions, ratings, strict=True)
    return [replace(example, completions=(c,), extras={**extras, "label": x}) for c, x in labels]


def _same_extras(examples: list[Example], name: str) -> list[Example]:
    """Only the numbers that every example has: a batch is one tensor per name."""
    common = set(examples[0].extras).intersection(*(e.extras for e in examples))
    partial = {k: e.source for e in reversed(examples) for k in e.extras if k not in common}
    if not partial:
        return examples
    lacking = ", ".join(sorted(partial))
    warnings.warn(
        f"{name}: columns left out because some rows have no finite fp32 number there: {lacking}",
        stacklevel=4,
    )
    return [replace(e, extras={k: v for k, v in e.extras.items() if k in common}) for e in examples]


def _collect(
    rows: Sourced, kind: Kind, name: str, turn_marker: str, skip_bad_rows: bool, max_dropped: float
) -> tuple[list[Example], dict[str, int]]:
    names = ("bad_rows", "empty_completions", "identical_pairs", "tied_rankings")
    counts = dict.fromkeys((*names, *(count for count, _ in _FROM_PAIRS.values())), 0)
    from_pairs, pairs_became = _FROM_PAIRS.get(kind, (None, ""))
    examples: list[Example] = []
    dropped: list[str] = []
    first_bad: DataError | None = None
    number = -1
    for number, (source, row) in enumerate(rows):
        try:
            made = _row_examples(row, kind, source, number, turn_marker)
        except (DataError, RecursionError) as error:
            bad = error if isinstance(error, DataError) else None
            bad = bad or DataError(f"{source}: need a row of text, got one nested too deeply")
            if not skip_bad_rows:
                raise bad from error.__cause__
            counts["bad_rows"] += 1
            first_bad = first_bad or bad
            continue
        if isinstance(made, str):
            counts[made] += 1
            dropped.append(source)
            continue
        if from_pairs and _columns(row, kind, source)[1] == _PAIR:
            counts[from_pairs] += 1
        examples += made
    total = number + 1
    if total == 0:
        raise DataError(f"{name}: need at least one row, got none")
    what = f"{counts['empty_completions']} empty completions"
    what += f", {counts['identical_pairs']} identical pairs"
    what += f", {counts['tied_rankings']} tied rankings" if kind == "ranking" else ""
    first = ", ".join(dropped[:5])
    if len(dropped) > max_dropped * total:
        limit = f"need at most {max_dropped:.3g} of the rows without anything to learn"
        got = f"{len(dropped)} of {total} ({what}; first: {first})"
        raise DataError(f"{name}: {limit}, got {got}")
    if not examples:
        raise DataError(f"{name}: need one good row, got {total} bad ones; the first: {first_bad}")
    if first_bad:
        warnings.warn(f"{counts['bad_rows']} bad rows skipped; first: {first_bad}", stacklevel=3)
    if dropped:
        _logger.info("%s: dropped %s of %d rows (first: %s)", name, what, total, first)
    if from_pairs and counts[from_pairs]:
        _logger.info("%s: %d preference rows, %s", name, counts[from_pairs], pairs_became)
    return _same_extras(examples, name), counts


def _check(kind: Kind, turn_marker: str) -> None:
    if kind not in get_args(Kind):
        raise ValueError(f"need kind {' or '.join(get_args(Kind))}, got {kind!r}")
    if not turn_marker:
        raise ValueError("need a turn_marker of at least one character, got an empty one")


def load_examples(
    name: str | Path,
    kind: Kind,
    *,
    split: str = "train",
    config_name: str | None = None,
    turn_marker: str = "\n\nAssistant:",
    skip_bad_rows: bool = False,
    max_dropped: float = 0.01,
) -> tuple[list[Example], dict[str, int]]:
    """Examples from a local file or folder, or from the hub.

    A folder's files belong to the split that their names say (train, validation, test, or a synonym
    that `datasets` knows), all to train where no name says one. One file is train, and also the
    split in its name. An implicit prompt in strings ends after the last turn marker that both
    completions share, otherwise before their last shared white space, otherwise it is empty; in
    message lists it is the shared leading messages, at least one left to each completion; in one
    list, the messages before the first reply.

    An unpaired row has label 1 or 0 in `extras["label"]`; a preference row becomes two of them,
    chosen first, that share row and source. A ranking has its completions in the order given, and
    in `extras["score"]` a number for each, where higher is better and equal is a tie; a preference
    row is a ranking of two with scores 1 and 0.

    Args:
        name: a .json (array or lines), .jsonl, .json.gz, .jsonl.gz or .parquet file, a folder of
            such files, or a hub id.
        kind: "sft", "preference", "unpaired" or "ranking"; which columns are needed.
        split: train, validation or test; for the hub whatever `datasets` takes.
        config_name: the hub data set's configuration.
        turn_marker: what starts a reply in strings with an implicit prompt.
        skip_bad_rows: count malformed rows instead of stopping at the first.
        max_dropped: the share of rows with a blank completion, an identical pair or (in fp32) equal
            scores alone above which the run stops, in [0, 1].

    Returns:
        The examples in file order, and counts of rows: bad_rows, empty_completions, identical_pairs
        and tied_rankings were dropped; sft_on_chosen and unpaired_from_pairs of the kept are
        preference rows.

    Raises:
        DataError: names the file and line (or row) and what was needed there.
        ValueError: a bad `kind` or `turn_marker`.
    """
    _check(kind, turn_marker)
    rows, label = read_rows(name, config_name, split), str(name)
    return _collect(rows, kind, label, turn_marker, skip_bad_rows, max_dropped)


def to_examples(
    rows: Iterable[Mapping[str, Any]],
    kind: Kind,
    *,
    name: str = "rows",
    turn_marker: str = "\n\nAssistant:",
    skip_bad_rows: bool = False,
    max_dropped: float = 0.01,
) -> tuple[list[Example], dict[str, int]]:
    """Examples from rows given from Python: a `datasets.Dataset` of one split, or dicts.

    As `load_examples`; `name[17]` is the source of the row numbered 17 from 0.
    """
    _check(kind, turn_marker)
    rows_here = numbered(rows, name)
    return _collect(rows_here, kind, name, turn_marker, skip_bad_rows, max_dropped)
