"""Preference and instruction data, from files or the hub, in one shape: rows -> Examples.

Columns are TRL's. kind="preference": `chosen` + `rejected`, with `prompt` or with the prompt
implicit in both. kind="sft": the first of `messages`, `prompt` + `completion`, `text`, and
preference columns (trained on `chosen`) that a row has. Text is a string or a list of
{role, content} messages; a string `prompt` may stand beside message lists, as in UltraFeedback.
`tools` and `chat_template_kwargs` go to the chat template, other numbers to `Example.extras`.
"""

import gzip
import io
import json
import logging
import math
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

Message: TypeAlias = dict[str, Any]
Text: TypeAlias = str | list[Message]
Kind: TypeAlias = Literal["sft", "preference"]

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
# the words by which `datasets` knows a split in a file's name
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "dev": "validation",
    "val": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
_TEXT_COLUMNS = ("prompt", "chosen", "rejected", "completion", "messages", "text")
_OPTION_COLUMNS = ("tools", "chat_template_kwargs")
_NEEDED = {
    "preference": "chosen and rejected (prompt beside them, or implicit in both)",
    "sft": "messages, prompt and completion, text, or chosen and rejected",
}
_logger = logging.getLogger(__name__)


class DataError(ValueError):
    """A fault of the data, not of the code; the message starts with where it was found."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row: a prompt and its completions, (chosen, rejected) or one.

    Strings or message lists, prompt and completions alike. A list prompt has at least one message
    and each list completion at least one assistant message; no completion is blank.
    """

    prompt: Text
    completions: tuple[Text, ...]
    row: int  # 0-based row number in the data set, dropped rows counted
    source: str  # "train.jsonl.gz:17" (1-based line) or "name[17]" (0-based row)
    extras: dict[str, float] = field(default_factory=dict)
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] | None = None


# --- readers: (source, row or what is wrong with it); a fault that loses the rest of a file raises

_Sourced: TypeAlias = Iterator[tuple[str, Any]]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        key = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {key!r} stands twice in one object")
    return row


_decoder = json.JSONDecoder(object_pairs_hook=_object)


def _read_lines(stream: Iterable[bytes], name: str) -> _Sourced:
    for number, raw in enumerate(stream, 1):
        source = f"{name}:{number}"
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if not line:
                continue
            yield source, _decoder.decode(line)
        except UnicodeDecodeError as error:
            yield source, DataError(f"{source}: need UTF-8, got {error}")
        except RecursionError:
            yield source, DataError(f"{source}: need JSON, got one nested too deeply to read")
        except ValueError as error:
            yield source, DataError(f"{source}: need one JSON object on the line, got {error}")


def _read_array(raw: bytes, name: str) -> _Sourced:
    """The elements of one JSON array, each with the line it starts on."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{name}:{line}: need UTF-8, got {error}") from error
    space = re.compile(r"[ \t\r\n]*")

    def skip(pos: int) -> int:
        return space.match(text, pos).end()  # type: ignore[union-attr]  # matches the empty string

    pos, line, counted = skip(text.index("[") + 1), 1, 0
    while text[pos : pos + 1] != "]":
        line, counted = line + text.count("\n", counted, pos), pos
        source = f"{name}:{line}"
        try:
            row, pos = _decoder.raw_decode(text, pos)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{source}: need an array of JSON objects, got {error}") from error
        yield source, row
        pos = skip(pos)
        if text[pos : pos + 1] == ",":
            pos = skip(pos + 1)
            if text[pos : pos + 1] == "]":
                raise DataError(f"{source}: need a row after , in the array, got ]")
        elif text[pos : pos + 1] != "]":
            raise DataError(f"{source}: need , or ] after this row, got {text[pos : pos + 20]!r}")
    rest = text[pos + 1 :].strip()
    if rest:
        raise DataError(f"{name}: need nothing after the array, got {rest[:20]!r}")


def _read_parquet(path: Path, name: str) -> _Sourced:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if len(set(columns)) != len(columns):
                raise DataError(f"{name}: need each column once, got {', '.join(columns)}")
            for batch in file.iter_batches(1024):
                for row in batch.to_pylist():
                    yield f"{name}[{number}]", row
                    number += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError, OverflowError, MemoryError) as error:
        raise DataError(f"{name}[{number}]: need a readable parquet file, got {error}") from error


def _read_file(path: Path, name: str) -> _Sourced:
    if path.name.endswith(".parquet"):
        yield from _read_parquet(path, name)
        return
    try:
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as stream:
            if path.name.endswith((".json", ".json.gz")):
                raw = stream.read()
                array = raw.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
                lines = io.BytesIO(raw)
                yield from _read_array(raw, name) if array else _read_lines(lines, name)
            else:
                yield from _read_lines(stream, name)
    except (OSError, EOFError, zlib.error) as error:
        what = "a whole gzip file" if path.name.endswith(".gz") else "a readable file"
        raise DataError(f"{name}: need {what}, got {type(error).__name__}: {error}") from error


def _named_split(relative: Path) -> str | None:
    """The split that a file's own name, or the nearest folder's, says."""
    for part in reversed(relative.parts):
        words = re.split(r"[^a-z]+", part.lower())
        found = {SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS}
        if len(found) == 1:
            return found.pop()
    return None


def _read_local(path: Path, name: str, split: str) -> _Sourced:
    if not path.is_dir():
        if not path.name.endswith(SUFFIXES):
            raise DataError(f"{name}: need one of {', '.join(SUFFIXES)}, got {path.name}")
        splits = {"train", _named_split(Path(path.name)) or "train"}
        if split not in splits:
            found = " or ".join(sorted(splits))
            raise DataError(f"{name}: need the split {split!r}, got one file, read as {found}")
        return _read_file(path, path.name)
    files = sorted(p for p in path.rglob("*") if p.name.endswith(SUFFIXES) and p.is_file())
    if not files:
        found = ", ".join(sorted(p.name for p in path.iterdir())[:10]) or "an empty folder"
        raise DataError(f"{name}: need {', '.join(SUFFIXES)} files in the folder, got {found}")
    named = [(_named_split(p.relative_to(path)), p) for p in files]
    if not any(said for said, _ in named):
        named = [("train", p) for p in files]
    chosen = [p for said, p in named if said == split]
    if not chosen:
        found = ", ".join(f"{p.relative_to(path)} ({said or 'no split'})" for said, p in named[:10])
        raise DataError(f"{name}: need a file of the split {split!r}, got {found}")
    return (row for p in chosen for row in _read_file(p, p.relative_to(path).as_posix()))


def _read_hub(name: str, config_name: str | None, split: str) -> _Sourced:
    tried = f"no file or folder of this name here, then the hub (split {split!r})"
    try:
        import datasets  # type: ignore[import-untyped]

        rows = datasets.load_dataset(name, config_name, split=split)
    except Exception as error:  # datasets, the hub and its http client share no base class
        got = f"{type(error).__name__}: {error}"
        raise DataError(f"{name}: need a data set, tried {tried}, got {got}") from error
    return _numbered(rows, name)


def _numbered(rows: Iterable[Any], name: str) -> _Sourced:
    if isinstance(rows, Mapping):  # a DatasetDict
        raise DataError(f"{name}: need the rows of one split, got a mapping of {', '.join(rows)}")
    python = getattr(rows, "with_format", None)  # a Dataset set to tensors gives them row by row
    return ((f"{name}[{n}]", row) for n, row in enumerate(python(None) if python else rows))


# --- one row -> one Example


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


def _text(row: Mapping[str, Any], column: str, source: str) -> Text:
    value = _clean(row[column], source, column)
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
    return value


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
    """How many leading messages form the prompt: shared by a pair, before the reply in one list."""
    if len(lists) == 1:
        roles = [message["role"] for message in lists[0]]
        return roles.index("assistant") if "assistant" in roles else 0
    most = min(map(len, lists)) - 1
    return next((n for n in range(most) if lists[0][n] != lists[1][n]), most)


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
    have = {column for column in _TEXT_COLUMNS if row.get(column) is not None}
    prompt = "prompt" if "prompt" in have else None
    if kind == "sft":
        if "messages" in have:
            return None, ("messages",)
        if {"prompt", "completion"} <= have:
            return prompt, ("completion",)
        if "text" in have:
            return None, ("text",)
    if {"chosen", "rejected"} <= have:
        return prompt, ("chosen", "rejected")
    got = ", ".join(f"{k} (empty)" if row[k] is None else str(k) for k in row) or "none"
    raise DataError(f"{source}: need the columns {_NEEDED[kind]}, got {got}")


def _options(row: Mapping[str, Any], source: str) -> tuple[list[Any] | None, dict[str, Any] | None]:
    tools = _clean(row.get("tools"), source, "tools")
    if isinstance(tools, str):  # as TRL stores them, since parquet wants one schema for all rows
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise DataError(f"{source}: tools: need JSON, got {error}") from error
    kwargs = _clean(row.get("chat_template_kwargs"), source, "chat_template_kwargs")
    if not isinstance(tools, list | None):
        raise DataError(f"{source}: tools: need a list, got {type(tools).__name__}")
    if not isinstance(kwargs, dict | None):
        got = type(kwargs).__name__
        raise DataError(f"{source}: chat_template_kwargs: need an object, got {got}")
    return tools or None, kwargs or None


def _number(value: Any) -> float | None:
    if not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _example(row: Any, kind: Kind, source: str, number: int, turn_marker: str) -> Example | str:
    """The row's Example, or the name of the reason for which it is dropped."""
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, Mapping):
        raise DataError(f"{source}: need an object with named columns, got {type(row).__name__}")
    prompt_column, columns = _columns(row, kind, source)
    prompt = None if prompt_column is None else _text(row, prompt_column, source)
    texts = [_text(row, column, source) for column in columns]
    if len(texts) == 2 and texts[0] == texts[1]:
        return "identical_pairs"
    strings = [text for text in texts if isinstance(text, str)]
    lists = [text for text in texts if isinstance(text, list)]
    completions: list[Text]
    if strings and (lists or isinstance(prompt, list)):
        names = (prompt_column, *columns) if prompt_column else columns
        got = ", ".join(f"{name}: {type(row[name]).__name__}" for name in names)
        raise DataError(f"{source}: need strings or message lists for all, got {got}")
    if lists:
        prompt, cut = _split_messages(prompt, lists, source)
        completions = [*cut]
        for column, messages in zip(columns, cut, strict=True):
            roles = [message["role"] for message in messages]
            if "assistant" not in roles:
                got = ", ".join(roles)
                raise DataError(f"{source}: {column}: need an assistant message, got {got}")
    elif prompt is None and len(strings) == 2:
        prompt, pair = _implicit_strings(strings[0], strings[1], turn_marker)
        completions = [*pair]
    else:
        prompt, completions = prompt or "", [*strings]
    if kind == "sft":
        completions = completions[:1]
    if any(_blank(completion) for completion in completions):
        return "empty_completions"
    known = {*_TEXT_COLUMNS, *_OPTION_COLUMNS, "row"}  # "row" is the batch's own
    numbers = {str(k): _number(v) for k, v in row.items() if k not in known}
    extras = {k: v for k, v in numbers.items() if v is not None}
    tools, template_kwargs = _options(row, source)
    return Example(prompt, tuple(completions), number, source, extras, tools, template_kwargs)


def _same_extras(examples: list[Example], name: str) -> list[Example]:
    """Only the numbers that every example has: a batch is one tensor per name."""
    common = set(examples[0].extras).intersection(*(e.extras for e in examples))
    partial = {k: e.source for e in reversed(examples) for k in e.extras if k not in common}
    if not partial:
        return examples
    lacking = ", ".join(sorted(partial))
    warnings.warn(
        f"{name}: columns left out because some rows have no finite number there: {lacking}",
        stacklevel=4,
    )
    return [
        Example(
            e.prompt,
            e.completions,
            e.row,
            e.source,
            {k: v for k, v in e.extras.items() if k in common},
            e.tools,
            e.template_kwargs,
        )
        for e in examples
    ]


def _collect(
    rows: _Sourced, kind: Kind, name: str, turn_marker: str, skip_bad_rows: bool, max_dropped: float
) -> tuple[list[Example], dict[str, int]]:
    counts = {"bad_rows": 0, "empty_completions": 0, "identical_pairs": 0, "sft_on_chosen": 0}
    examples: list[Example] = []
    dropped: list[str] = []
    first_bad: DataError | None = None
    number = -1
    for number, (source, row) in enumerate(rows):
        try:
            made = _example(row, kind, source, number, turn_marker)
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
        if kind == "sft" and _columns(row, kind, source)[1][0] == "chosen":
            counts["sft_on_chosen"] += 1
        examples.append(made)
    total = number + 1
    if total == 0:
        raise DataError(f"{name}: need at least one row, got none")
    what = f"{counts['empty_completions']} empty completions, {counts['identical_pairs']} identical"
    first = ", ".join(dropped[:5])
    if len(dropped) > max_dropped * total:
        limit = f"need at most {max_dropped:.3g} of the rows without anything to learn"
        got = f"{len(dropped)} of {total} ({what} pairs; first: {first})"
        raise DataError(f"{name}: {limit}, got {got}")
    if not examples:
        raise DataError(f"{name}: need one good row, got {total} bad ones; the first: {first_bad}")
    if first_bad:
        warnings.warn(f"{counts['bad_rows']} bad rows skipped; first: {first_bad}", stacklevel=3)
    if dropped:
        _logger.info("%s: dropped %s pairs of %d rows (first: %s)", name, what, total, first)
    if counts["sft_on_chosen"]:
        kept = counts["sft_on_chosen"]
        _logger.info("%s: %d preference rows, trained on their chosen completion", name, kept)
    return _same_extras(examples, name), counts


def _check(kind: Kind, turn_marker: str) -> None:
    if kind not in get_args(Kind):
        raise ValueError(f"need kind sft or preference, got {kind!r}")
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
    message lists it is the shared leading messages, at least one left to each completion.

    Args:
        name: a .json (array or lines), .jsonl, .json.gz, .jsonl.gz or .parquet file, a folder of
            such files, or a hub id.
        kind: "sft" or "preference"; which columns are needed.
        split: train, validation or test; for the hub whatever `datasets` takes.
        config_name: the hub data set's configuration.
        turn_marker: what starts a reply in strings with an implicit prompt.
        skip_bad_rows: count malformed rows instead of stopping at the first.
        max_dropped: the share of rows with a blank completion or an identical pair above which the
            run stops, in [0, 1].

    Returns:
        The examples in file order, and counts: bad_rows, empty_completions and identical_pairs were
        dropped; sft_on_chosen of the kept came from preference rows.

    Raises:
        DataError: names the file and line (or row) and what was needed there.
        ValueError: a bad `kind` or `turn_marker`.
    """
    _check(kind, turn_marker)
    path, label = Path(name).expanduser(), str(name)
    try:
        local = path.exists()
    except (OSError, ValueError) as error:
        raise DataError(f"{label!r}: need a path or a hub id, got {error}") from error
    if local:
        rows = _read_local(path, label, split)
    elif isinstance(name, Path) or label.endswith(SUFFIXES):
        raise DataError(f"{label}: need a file or a folder, got no such path")
    elif re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", label, re.ASCII):
        rows = _read_hub(label, config_name, split)
    else:
        raise DataError(f"{label}: need an existing path or a hub id (owner/name), got neither")
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
    rows_here = _numbered(rows, name)
    return _collect(rows_here, kind, name, turn_marker, skip_bad_rows, max_dropped)
