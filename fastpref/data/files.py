"""Files, folders and hub ids to rows, each with where it came from."""

import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

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


class DataError(ValueError):
    """A fault of the data, not of the code; the message starts with where it was found."""


Sourced: TypeAlias = Iterator[tuple[str, Any]]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        key = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {key!r} stands twice in one object")
    return row


_decoder = json.JSONDecoder(object_pairs_hook=_object)


def _read_lines(stream: Iterable[bytes], name: str) -> Sourced:
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


def _read_array(raw: bytes, name: str) -> Sourced:
    """The elements of one JSON array, each with the line it starts on."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1  # of the bytes after a BOM
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


def _python_rows(batch: Any) -> list[Any]:
    """The rows of an Arrow batch; in the place of one that Python cannot hold, its error."""
    try:
        rows: list[Any] = batch.to_pylist()
    except Exception as error:  # Arrow's conversions share no base class
        if len(batch) < 2:
            return [error] * len(batch)
        half = len(batch) // 2
        rows = _python_rows(batch[:half]) + _python_rows(batch[half:])
    return rows


def _read_parquet(path: Path, name: str) -> Sourced:
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            columns, total = file.schema_arrow.names, file.metadata.num_rows
            if len(set(columns)) != len(columns):
                raise DataError(f"{name}: need each column once, got {', '.join(columns)}")
            for batch in file.iter_batches(1024):
                for row in _python_rows(batch):
                    source = f"{name}[{number}]"
                    if isinstance(row, Exception):
                        got = f"{type(row).__name__}: {row}"
                        row = DataError(f"{source}: need a row that Python can hold, got {got}")
                    yield source, row
                    number += 1
            if number != total:
                raise DataError(f"{name}: need the {total} rows of its footer, got {number}")
    except DataError:
        raise
    except Exception as error:  # Arrow's readers and extension types share no base class
        raise DataError(f"{name}[{number}]: need a readable parquet file, got {error}") from error


def _read_file(path: Path, name: str) -> Sourced:
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


def _read_local(path: Path, name: str, split: str) -> Sourced:
    if not path.is_dir():
        if not path.name.endswith(SUFFIXES):
            raise DataError(f"{name}: need one of {', '.join(SUFFIXES)}, got {path.name}")
        splits = {"train", _named_split(Path(path.name)) or "train"}
        if split not in splits:
            found = " or ".join(sorted(splits))
            raise DataError(f"{name}: need the split {split!r}, got one file, read as {found}")
        return _read_file(path, path.name)
    # a link that leads nowhere stands for a file that is missed
    paths = (p for p in path.rglob("*") if p.is_file() or p.is_symlink())
    files = sorted(p for p in paths if p.name.endswith(SUFFIXES))
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


def _read_hub(name: str, config_name: str | None, split: str) -> Sourced:
    tried = f"no file or folder of this name here, then the hub (split {split!r})"
    try:
        import datasets  # type: ignore[import-untyped]

        rows = datasets.load_dataset(name, config_name, split=split)
    except Exception as error:  # datasets, the hub and its http client share no base class
        got = f"{type(error).__name__}: {error}"
        raise DataError(f"{name}: need a data set, tried {tried}, got {got}") from error
    return numbered(rows, name)


def numbered(rows: Iterable[Any], name: str) -> Sourced:
    """Rows given from Python, with their numbers from 0."""
    if isinstance(rows, Mapping):  # a DatasetDict
        raise DataError(f"{name}: need the rows of one split, got a mapping of {', '.join(rows)}")
    python = getattr(rows, "with_format", None)  # a Dataset set to tensors gives them row by row
    return ((f"{name}[{n}]", row) for n, row in enumerate(python(None) if python else rows))


def read_rows(name: str | Path, config_name: str | None, split: str) -> Sourced:
    """The rows of one split of a file, a folder or a hub data set.

    Args:
        name: a path, or a hub id (owner/name).
        config_name: the hub data set's configuration.
        split: train, validation or test; for the hub whatever `datasets` takes.

    Returns:
        (source, row) pairs; a row that cannot be read is its DataError, one that loses the rest of
        the file raises it.
    """
    if not str(name):
        raise DataError("need a path or a hub id, got an empty name")
    label = str(name)
    try:
        path = Path(name).expanduser()
        local = path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a home that nobody has
        raise DataError(f"{label!r}: need a path or a hub id, got {error}") from error
    if local:
        return _read_local(path, label, split)
    if isinstance(name, Path) or label.endswith(SUFFIXES):
        raise DataError(f"{label}: need a file or a folder, got no such path")
    if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", label, re.ASCII):
        return _read_hub(label, config_name, split)
    raise DataError(f"{label}: need an existing path or a hub id (owner/name), got neither")
