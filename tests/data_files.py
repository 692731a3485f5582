"""Hypothesis strategies: data sets on disk, sound and broken, and how they are to be read."""

import gzip
import io
import json
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from fastpref.models.tiny import CHAT_TEMPLATE

TEXTS = [
    "Why?",
    " Because.",
    "\n\nHuman: a\n\nAssistant: b",
    "مرحبا بك",
    "👩‍👩‍👧 e\u0301",
    "a\x00b\x1b[31m",
    "\ufeffa\u2028b\r\n",
    "long" * 500,
    "<|end|>",
    "a <|turn|>user",
    "{{ x }}{% generation %}",
    '"\\u12',
]
TEMPLATES = [
    CHAT_TEMPLATE,
    "{{ tools | tojson if tools else '' }}{{ style }}{% for m in messages %}"
    "{{ '<|turn|>' ~ m.role ~ '\n' ~ m.content ~ '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}",
]
texts = st.sampled_from(TEXTS) | st.text(max_size=9).map("w{}".format)
words = st.lists(st.tuples(texts, texts, texts), min_size=1, max_size=4)


def message(role, content):
    return {"role": role, "content": content}


def user(text):
    return [message("user", text)]


def reply(text):
    return [message("assistant", text)]


PAIRS = [
    lambda p, a, b: {"prompt": p, "chosen": a, "rejected": b},
    lambda p, a, b: {"chosen": f"{p}\n\nAssistant: {a}", "rejected": f"{p}\n\nAssistant: {b}"},
    lambda p, a, b: {"prompt": user(p), "chosen": reply(a), "rejected": reply(b)},
    lambda p, a, b: {"chosen": user(p) + reply(a), "rejected": user(p) + reply(b)},
    lambda p, a, b: {"prompt": p, "chosen": user(p) + reply(a), "rejected": user(p) + reply(b)},
    lambda p, a, b: {
        "prompt": [message("system", b), *user(p)],
        "chosen": reply(a) + user(p) + reply(b),
        "rejected": reply([{"type": "text", "text": b}]),
    },
]
SINGLES = [
    lambda p, a, b: {"prompt": p, "completion": a},
    lambda p, a, b: {"prompt": user(p), "completion": reply(a) + user(b)},
    lambda p, a, b: {"messages": user(p) + reply(a) + user(b) + reply(p)},
    lambda p, a, b: {"text": p + a},
]
UNPAIRED = [
    lambda p, a, b: {"prompt": p, "completion": a, "label": len(b) % 2 == 0},
    lambda p, a, b: {"prompt": user(p), "completion": reply(a), "label": len(b) % 2},
    lambda p, a, b: {"completion": user(p) + reply(a) + user(b), "label": True},
]
RANKINGS = [
    lambda p, a, b: {"prompt": p, "completions": [a, b, a], "scores": [len(a), 0.5, -1]},
    lambda p, a, b: {"prompt": user(p), "completions": [reply(a), reply(b)], "scores": [-0.5, 2]},
    lambda p, a, b: {
        "prompt": p,
        "completions": [user(p) + reply(text) for text in (a, b, a + b, b)],
        "scores": [1.0, 3.0, 3.0, 0.0],
    },
]
LAYOUTS = {
    "sft": [*PAIRS, *SINGLES],
    "preference": PAIRS,
    "unpaired": [*PAIRS, *UNPAIRED, *UNPAIRED],
    "ranking": [*PAIRS, *RANKINGS, *RANKINGS],
}
TOOL = {"type": "function", "function": {"name": "add", "default": None}}
OTHER_COLUMNS = [
    {},
    {"margin": 0.5, "good": True},
    {"id": "x", "score": 3, "note": None},
    {"tools": [TOOL], "chat_template_kwargs": {"style": "short", "other": None}},
    {"tools": json.dumps([TOOL]), "row": 7, "ref_logp": "x"},
]

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
trees = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)
TEXT_COLUMNS = ["prompt", "chosen", "rejected", "completion", "messages", "text"]
COLUMNS = [*TEXT_COLUMNS, "label", "completions", "scores"]
NO_TEXT = [
    *(None, 3, True, float("nan"), 10**400, "", " \n", "\ud800", [], {}, [[]], [{}], ["a"], [None]),
    *({"role": "user"}, user("a"), reply(""), reply(None), reply(["a"]), reply("\udfff")),
    *([message(3, "a")], [message("", "a")], [message("critic", "a")], [{"content": "a"}]),
    *(reply([{"type": "image"}]), [*reply("a"), *reply("b")], [*user("a"), *user("b")]),
]
NO_OPTION = [
    *({"tools": bad} for bad in (3, "null", "[", "a", {"a": 1}, ["a"], [TOOL, None])),
    *({"tools": json.dumps([{**TOOL, "a": bad}])} for bad in ("\ud800", 10**400, float("nan"))),
    *({"chat_template_kwargs": bad} for bad in (3, "{}", [], {"style": "\ud800"}, {"\ud800": 1})),
    *({"chat_template_kwargs": {name: 1}} for name in ("messages", "documents", "tokenize")),
    *({"margin": bad} for bad in (None, "", float("inf"), 1e300, -1e39, 10**400, [1])),
]
NO_RATING = [
    *({"label": bad} for bad in (None, 2, -1, 0.5, 1.0, float("nan"), 10**400, "yes", [True])),
    *({"scores": bad} for bad in (None, 3, [], [1], [1, 2, 3, 4, 5], "ab", [[1], [2]])),
    *({"scores": [1, bad]} for bad in (None, "2", float("inf"), float("nan"), 1e300, 10**400, 1)),
    *({"scores": [2, 2, 2], "score": 3}, {"scores": [1, 1, 1, float("nan")]}),
    *({"completions": bad} for bad in (["a"], ["a", "a"], ["a", ""], ["a", 3], ["a", reply("b")])),
    *({"completions": bad} for bad in (reply("a"), [reply("a"), user("b")], [reply("a"), []])),
]
LINES = [
    *(b"{", b'{"prompt": "a"', b"[1]", b"3", b"null", b'"\xff"', b"\xef\xbb\xbf", b"\x00", b","),
    *(b'{"chosen": "a", "chosen": "b"}', b'{"text": "a\x01"}', b"[" * 10**5, b"9" * 5000),
    *(b'{"margin": NaN, "text": "a"}', b'{"text": "a"} {"text": "b"}', b'{"a":' * 2000, b"\r"),
]


@st.composite
def broken_row(draw, row):
    """The row with one fault, or what looks like one."""
    column, other = draw(st.sampled_from(sorted(row))), draw(st.sampled_from(COLUMNS))
    how = draw(
        st.sampled_from(
            [*["set", "option", "rating"] * 2, "add", "move", "copy", "tree", "replace"]
        )
    )
    rest = {name: value for name, value in row.items() if name != column}
    return {
        "set": {**row, column: draw(st.sampled_from(NO_TEXT))},
        "add": {**row, other: draw(st.sampled_from(NO_TEXT))},
        "option": {**row, **draw(st.sampled_from(NO_OPTION))},
        "rating": {**row, **draw(st.sampled_from(NO_RATING))},
        "move": {**rest, other: row[column]},
        "copy": {**row, other: row[column]},
        "tree": {**row, column: draw(trees)} if how == "tree" else None,
        "replace": draw(trees) if how == "replace" else None,
    }[how]


def invalid_text(n):
    """Text of which the last row is no UTF-8."""
    raw = pa.array([*[b"ok"] * (n - 1), b"\xff"])
    return pa.Array.from_buffers(pa.string(), n, raw.buffers())


def repeated(value, kind):
    return lambda n: pa.array([value] * n, kind)


ODD_COLUMNS = [
    invalid_text,
    repeated(2**62, pa.timestamp("us")),
    repeated(1, pa.timestamp("us", "Mars/Base")),
    repeated(2**30, pa.date32()),
    repeated(1.5, pa.float16()),
    repeated([("a", 1)], pa.map_(pa.string(), pa.int64())),
    repeated(b"\xff", pa.binary()),
    repeated("a", pa.dictionary(pa.int8(), pa.string())),
    repeated(None, pa.null()),
    lambda n: pa.StructArray.from_arrays([pa.array(range(n))] * 2, names=["a", "a"]),
]


def as_arrow(values):
    """The values as they are; as JSON where their types differ or parquet has none for them."""
    try:
        made = pa.array(values)
        if "struct<>" not in str(made.type):
            return made
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        pass
    return pa.array([json.dumps(value) for value in values])


@st.composite
def parquet(draw, rows, odd):
    rows = [row for row in rows if isinstance(row, dict)]
    names = dict.fromkeys(name for row in rows for name in row if name.isprintable())
    table = {name: as_arrow([row.get(name) for row in rows]) for name in names}
    if rows and odd:
        name = draw(st.sampled_from([*COLUMNS, "x"]))
        table[name] = draw(st.sampled_from(ODD_COLUMNS))(len(rows))
    stream, size = io.BytesIO(), draw(st.integers(1, 3))
    pq.write_table(pa.table(table), stream, row_group_size=size, compression="none")
    return stream.getvalue()


@st.composite
def json_text(draw, rows, array, odd):
    plain = draw(st.booleans())
    lines = [
        json.dumps(row, ensure_ascii=plain, indent=1 if array and plain else None) for row in rows
    ]
    lines = [line.encode("utf-8", "surrogatepass") for line in lines]
    if odd:
        lines.insert(draw(st.integers(0, len(lines))), draw(st.sampled_from(LINES)))
    end = draw(st.sampled_from([b"\n", b"\n", b"\r\n", b"\n\n", b" \n\t"]))
    start = draw(st.sampled_from([b"", b"", b"", b"\xef\xbb\xbf"]))
    if array:
        return start + b"[" + end + (b"," + end).join(lines) + end + b"]"
    return start + end.join(lines) + draw(st.sampled_from([b"", end]))


@st.composite
def broken_bytes(draw, raw):
    at = draw(st.integers(0, len(raw)))
    how = draw(st.sampled_from(["cut", "flip", "flip", "put", "add", "recode"]))
    if how == "cut":
        return raw[:at]
    if how == "flip":
        bit = 1 << draw(st.integers(0, 7))
        return raw[:at] + bytes(byte ^ bit for byte in raw[at : at + 1]) + raw[at + 1 :]
    if how == "recode":
        utf16 = raw.decode("utf-8", "replace").encode("utf-16")
        return draw(st.sampled_from([b"", b"\n \n", gzip.compress(raw, 1), raw + raw, utf16]))
    more = draw(st.sampled_from([b"\0", b"\xff", b"\n", b"\r", b"\xef\xbb\xbf", b"{", b"]", b'"']))
    return raw[:at] + more + raw[at:] if how == "put" else raw + more


SUFFIXES = [".jsonl", ".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet", ".parquet"]
FAULTS = [*["none"] * 5, "row", "row", "row", "line or column", "bytes", "bytes on disk"]


@st.composite
def data_file(draw, layouts):
    """A file's suffix and bytes, with at most one fault."""
    suffix, fault = draw(st.sampled_from(SUFFIXES)), draw(st.sampled_from(FAULTS))
    if draw(st.integers(0, 9)):
        layouts = [draw(st.sampled_from(layouts))]
    more = draw(st.sampled_from([{}, *OTHER_COLUMNS]))
    rows = []
    for prompt, one, two in draw(words):
        layout = draw(st.sampled_from(layouts))
        rows.append({**layout(prompt, one + "1", two + "2"), **more})
    rows *= draw(st.sampled_from([*[1] * 30, 101]))  # of 101, one without a use is dropped
    if fault == "row":
        n = draw(st.integers(0, len(rows) - 1))
        rows[n] = draw(broken_row(rows[n]))
    odd = fault == "line or column"
    if suffix == ".parquet":
        inner = draw(parquet(rows, odd))
    else:
        inner = draw(json_text(rows, ".jsonl" not in suffix and draw(st.booleans()), odd))
    if fault == "bytes":
        inner = draw(broken_bytes(inner))
    raw = gzip.compress(inner, 1) if suffix.endswith(".gz") else inner
    return suffix, draw(broken_bytes(raw)) if fault == "bytes on disk" else raw


class Case(NamedTuple):
    """A data set and how it is to be read."""

    files: dict[str, bytes]  # by name; with a folder in the name where the data set is one
    kind: str
    template: str | None
    options: dict[str, object]


@st.composite
def cases(draw):
    kind = draw(st.sampled_from(sorted(LAYOUTS)))
    layouts = LAYOUTS[kind]
    if draw(st.integers(0, 5)):
        suffix, raw = draw(data_file(layouts))
        files = {f"a{suffix}": raw}
    else:
        made = draw(st.lists(data_file(layouts), min_size=1, max_size=3))
        files = {f"part {n}/ü{suffix}": raw for n, (suffix, raw) in enumerate(made)}
    options = {
        "skip_bad_rows": draw(st.booleans()),
        "max_length": draw(st.sampled_from([1024, 1024, 1024, None, 64, 8, 3, 2])),
        "truncation_mode": draw(st.sampled_from(["keep_start", "keep_end"])),
        "turn_marker": draw(st.sampled_from(["\n\nAssistant:", "\n\nAssistant:", "w"])),
        "max_tokens_per_micro_batch": draw(st.sampled_from([*[None] * 15, 50])),
    }
    template = draw(st.sampled_from([*TEMPLATES * 5, None]))
    return Case(files, kind, template, options)
