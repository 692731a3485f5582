"""Every file format and column layout to Examples, and every data fault to its file and line."""

import gzip
import json
import os
import pathlib
import warnings

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastpref.data.files import DataError
from fastpref.data.formats import Example, load_examples, to_examples
from fastpref.data.unpaired import add_mismatched

PAIR = {"prompt": "Why?", "chosen": " Because.", "rejected": " No."}
USER, YES, NO = (
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes"},
    {"role": "assistant", "content": "No"},
)
SYSTEM = {"role": "system", "content": "Be kind"}


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def one(row, kind="preference"):
    (example,), _ = to_examples([row], kind)
    return example


def fault(row, kind="preference"):
    with pytest.raises(DataError) as caught:
        to_examples([row], kind, name="data")
    return str(caught.value)


# --- files


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".json.gz"])
def test_json_lines(tmp_path, suffix):
    path = write(tmp_path / f"rows{suffix}", [PAIR, {**PAIR, "chosen": "é"}])
    examples, counts = load_examples(str(path), "preference")
    assert examples == [
        Example("Why?", (" Because.", " No."), 0, f"rows{suffix}:1"),
        Example("Why?", ("é", " No."), 1, f"rows{suffix}:2"),
    ]
    assert not any(counts.values())


def test_byte_order_mark(tmp_path):
    (tmp_path / "a.jsonl").write_text("\ufeff" + json.dumps(PAIR))
    assert len(load_examples(tmp_path / "a.jsonl", "preference")[0]) == 1


def test_json_array_knows_its_lines(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("\ufeff" + json.dumps([PAIR, PAIR, {**PAIR, "chosen": 3}], indent=1))
    with pytest.raises(DataError, match=r"^rows.json:12: chosen: need text or .*, got int"):
        load_examples(path, "preference")
    path.write_text(json.dumps([PAIR, PAIR], indent=1))
    assert [e.source for e in load_examples(path, "preference")[0]] == [
        "rows.json:2",
        "rows.json:7",
    ]


def test_parquet_leaves_absent_fields_out(tmp_path):
    call = [{"name": "add", "arguments": "{}"}]
    asks = {"role": "assistant", "content": None, "tool_calls": call}
    rows = [
        {"messages": [USER, asks, {"role": "tool", "content": "4"}, YES], "score": 0.5},
        {"messages": [SYSTEM, USER, YES], "score": 2},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    examples, _ = load_examples(tmp_path / "a.parquet", "sft")
    without = {"role": "assistant", "tool_calls": call}
    assert examples == [
        Example(
            [USER],
            ([without, {"role": "tool", "content": "4"}, YES],),
            0,
            "a.parquet[0]",
            {"score": 0.5},
        ),
        Example([SYSTEM, USER], ([YES],), 1, "a.parquet[1]", {"score": 2.0}),
    ]


def test_folder_by_split(tmp_path):
    for name in (
        "b-train-00001.jsonl",
        "b-train-00000.jsonl.gz",
        "train/val.jsonl",
        "my_eval.json",
        "train-or-test.json",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, [{**PAIR, "chosen": name}])
    (tmp_path / "README.md").write_text("no data")
    found = {
        split: [(e.source, e.row) for e in load_examples(tmp_path, "preference", split=split)[0]]
        for split in ("train", "validation", "test")
    }
    assert found == {
        "train": [("b-train-00000.jsonl.gz:1", 0), ("b-train-00001.jsonl:1", 1)],
        "validation": [("train/val.jsonl:1", 0)],
        "test": [("my_eval.json:1", 0)],
    }
    (tmp_path / "my_eval.json").unlink()
    with pytest.raises(DataError, match=r"split 'test', got .*train/val.jsonl \(validation\)"):
        load_examples(tmp_path, "preference", split="test")


def test_files_without_a_split_are_train(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path / name, [PAIR])
    assert len(load_examples(tmp_path, "preference")[0]) == 2
    assert len(load_examples(tmp_path / "a.jsonl", "preference")[0]) == 1
    with pytest.raises(DataError, match="need the split 'test', got one file, read as train"):
        load_examples(tmp_path / "a.jsonl", "preference", split="test")
    both = write(tmp_path / "x-eval.jsonl", [PAIR])
    for split in ("train", "test"):
        assert len(load_examples(both, "preference", split=split)[0]) == 1


def test_a_link_that_leads_nowhere_is_not_passed_over(tmp_path):
    write(tmp_path / "a.jsonl", [PAIR])
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(DataError, match=r"^b.jsonl: need a readable file, got FileNotFoundError"):
        load_examples(tmp_path, "preference")


def test_names_that_are_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.csv").write_text("x")
    for name, message in [
        (tmp_path / "empty", "got an empty folder"),
        (tmp_path / "a.csv", "got a.csv"),
        (tmp_path / "none.jsonl", "got no such path"),
        ("none.jsonl", "got no such path"),
        ("no such/data set", "need an existing path or a hub id"),
        ("./nowhere", "need an existing path or a hub id"),
        ("a\0b", "need an existing path or a hub id"),
        ("a" * 5000, "need (a path or a hub id|a data set)"),
        ("~nobody-of-this-name/a.jsonl", "^'~nobody-of-this-name/a.jsonl': need a path"),
    ]:
        with pytest.raises(DataError, match=message):
            load_examples(name, "sft")


def test_hub(monkeypatch):
    def load_dataset(*args, **kwargs):
        assert (args, kwargs) == (("someone/pairs", "small"), {"split": "train[:2]"})
        return datasets.Dataset.from_list([PAIR, PAIR]).with_format("torch")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    arguments = ("someone/pairs", "preference")
    examples, _ = load_examples(*arguments, split="train[:2]", config_name="small")
    assert [e.source for e in examples] == ["someone/pairs[0]", "someone/pairs[1]"]

    def offline(*args, **kwargs):
        raise ConnectionError("the hub is out of reach")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"^someone/pairs: .*no file or folder .*out of reach"):
        load_examples("someone/pairs", "preference")


def test_dataset_dict_is_named():
    rows = datasets.DatasetDict(train=datasets.Dataset.from_list([PAIR]))
    with pytest.raises(DataError, match="rows of one split, got a mapping of train"):
        to_examples(rows, "preference")


# --- faults of files


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "need one JSON object on the line, got Expecting property name"),
        (b"[1]", "need an object with named columns, got list"),
        (b'{"chosen": "\xff"}', "need UTF-8"),
        (b"[" * 200_000, "nested too deeply"),
        (b"9" * 5000, "need one JSON object"),
        (b'{"chosen": "a", "chosen": "b", "rejected": "c"}', "'chosen' stands twice"),
        (b'{"prompt": "a", "completion": "b"}', "chosen and rejected .* got prompt, completion"),
        (b'{"chosen": "\\ud800", "rejected": "b"}', "chosen: need text, got .*surrogates"),
    ],
    ids=range(8),
)
def test_bad_line_is_named_or_skipped(tmp_path, line, message):
    path = write(tmp_path / "rows.jsonl", [PAIR, PAIR])
    path.write_bytes(path.read_bytes() + b"\n" + line + b"\n" + json.dumps(PAIR).encode())
    with pytest.raises(DataError, match=rf"^rows.jsonl:4: .*{message}"):
        load_examples(path, "preference")
    with pytest.warns(UserWarning, match=r"^1 bad rows skipped; first: rows.jsonl:4: "):
        examples, counts = load_examples(path, "preference", skip_bad_rows=True)
    assert [(e.row, e.source) for e in examples] == [
        (0, "rows.jsonl:1"),
        (1, "rows.jsonl:2"),
        (3, "rows.jsonl:5"),
    ]
    assert counts["bad_rows"] == 1


def test_broken_files_stop_the_run(tmp_path):
    def stops(name, raw, message):
        (tmp_path / name).write_bytes(raw)
        for skip in (False, True):
            with pytest.raises(DataError, match=message):
                load_examples(tmp_path / name, "preference", skip_bad_rows=skip)

    whole = write(tmp_path / "whole.jsonl.gz", [PAIR] * 50).read_bytes()
    stops("cut.jsonl.gz", whole[:-20], r"^cut.jsonl.gz: need a whole gzip file, got EOFError")
    stops("plain.jsonl.gz", b"{}", "need a whole gzip file, got BadGzipFile")
    stops("flip.jsonl.gz", whole[:10] + b"\xff" * 20, "need a whole gzip file")
    stops(
        "cut.json", b"[\n" + json.dumps(PAIR).encode() + b',\n{"pro', r"^cut.json:3: need an array"
    )
    stops("more.json", json.dumps([PAIR]).encode() + b"{}", "need nothing after the array")
    stops("comma.json", json.dumps([PAIR]).encode()[:-1] + b"{}]", r"^comma.json:1: need , or \]")
    stops(
        "last.json", json.dumps([PAIR]).encode()[:-1] + b",]", r"^last.json:1: need a row after ,"
    )
    stops("bad.json", b'[\n"\xff"]', r"^bad.json:2: need UTF-8")
    stops("bom.json", b'\xef\xbb\xbf[\n"\xff"]', r"^bom.json:2: need UTF-8")
    stops("bad.parquet", b"PAR1 no", r"^bad.parquet\[0\]: need a readable parquet file")
    stops("empty.jsonl", b"\n", r"empty.jsonl: need at least one row, got none")
    twice = pa.table([["a"], ["b"]], names=["chosen", "chosen"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(DataError, match="each column once, got chosen, chosen"):
        load_examples(tmp_path / "twice.parquet", "preference")


def test_a_parquet_row_that_python_cannot_hold_is_named_or_skipped(tmp_path):
    texts = pa.array([b" a", b" b", b"\xff", b" d"])
    chosen = pa.Array.from_buffers(pa.string(), 4, texts.buffers())
    pq.write_table(pa.table({"chosen": chosen, "rejected": [" c"] * 4}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"^a.parquet\[2\]: .* got UnicodeDecodeError"):
        load_examples(tmp_path / "a.parquet", "preference")
    with pytest.warns(UserWarning, match=r"^1 bad rows skipped; first: a.parquet\[2\]: "):
        examples, _ = load_examples(tmp_path / "a.parquet", "preference", skip_bad_rows=True)
    assert [(e.row, e.completions[0]) for e in examples] == [(0, " a"), (1, " b"), (3, " d")]
    twice = pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    pq.write_table(pa.table({"chosen": ["a"], "tools": twice}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"^b.parquet\[0\]: .* got ValueError: .*duplicate field"):
        load_examples(tmp_path / "b.parquet", "preference")


def test_rows_that_a_parquet_file_lost(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([PAIR] * 50), path)
    raw, count = path.read_bytes(), b"\x16" + bytes([2 * 50])  # thrift's mark of an i64, zigzag 50
    at = raw.rindex(count)  # the row group's; the whole file's stands before it
    path.write_bytes(raw[:at] + b"\x16" + bytes([2 * 40]) + raw[at + 2 :])
    assert pq.ParquetFile(path).metadata.row_group(0).num_rows == 40
    with pytest.raises(DataError, match=r"^a.parquet: need the 50 rows of its footer, got 40"):
        load_examples(path, "preference", skip_bad_rows=True)


# --- columns


def test_implicit_prompt_in_strings():
    def cut(chosen, rejected):
        example = one({"chosen": chosen, "rejected": rejected})
        assert (
            example.prompt + example.completions[0],
            example.prompt + example.completions[1],
        ) == (
            chosen,
            rejected,
        )
        return example.prompt

    ask = "\n\nHuman: a\n\nAssistant:"
    assert cut(ask + " I am", ask + " I was") == ask
    assert cut(ask + " b\n\nHuman: c\n\nAssistant: d", ask + " b\n\nHuman: e") == ask
    assert cut("One two three", "One two thrift") == "One two"  # not "One two thr"
    assert cut("One\n\n two", "One\n\n three") == "One"
    assert cut("abc", "abd") == ""
    assert cut("One two", "One two three") == "One"  # something is left to both
    # a marker that only one of them has whole
    assert cut("\n\nAssistant: x", "\n\nAssistants x") == ""
    (example,), _ = to_examples(
        [{"chosen": "a #b", "rejected": "a #c"}], "preference", turn_marker="#"
    )
    assert example.prompt == "a #"


def test_implicit_prompt_in_messages():
    again = {"role": "user", "content": "Why"}
    example = one({"chosen": [USER, YES, again, YES], "rejected": [USER, YES, again, NO]})
    assert (example.prompt, example.completions) == ([USER, YES, again], ([YES], [NO]))
    example = one({"chosen": [USER, YES], "rejected": [USER, YES, again, NO]})
    assert (example.prompt, example.completions) == ([USER], ([YES], [YES, again, NO]))
    assert "need a shared message before the reply, got user and system first" in fault(
        {"chosen": [USER, YES], "rejected": [SYSTEM, USER, NO]}
    )
    assert "got assistant and assistant first" in fault({"chosen": [YES], "rejected": [NO]})


def test_string_prompt_beside_messages():
    inside = {"prompt": "Hi", "chosen": [USER, YES], "rejected": [USER, NO]}
    apart = {"prompt": "Hi", "chosen": [YES], "rejected": [NO]}
    explicit = {"prompt": [USER], "chosen": [YES], "rejected": [NO]}
    repeated = {"prompt": [USER], "chosen": [USER, YES], "rejected": [USER, NO]}
    for row in (inside, apart, explicit, repeated):
        example = one(row)
        assert (example.prompt, example.completions) == ([USER], ([YES], [NO]))
    assert "got prompt 'Bye' beside 'Hi'" in fault({**inside, "prompt": "Bye"})
    assert "got prompt: list, chosen: str, rejected: str" in fault({**PAIR, "prompt": [USER]})


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"messages": [SYSTEM, USER, YES, USER, NO]}, [SYSTEM, USER], [YES, USER, NO]),
        ({"messages": [USER, YES], **PAIR}, [USER], [YES]),  # as in UltraFeedback's files
        ({"messages": None, **PAIR}, "Why?", " Because."),
        ({"prompt": "a", "completion": " b", "text": "c"}, "a", " b"),
        ({"prompt": [USER], "completion": [YES]}, [USER], [YES]),
        ({"prompt": "Hi", "completion": [YES]}, [USER], [YES]),
        ({"text": "c"}, "", "c"),
        (PAIR, "Why?", " Because."),
        ({"chosen": "a b", "rejected": "a"}, "", "a b"),
        ({**PAIR, "rejected": ""}, "Why?", " Because."),  # what is not read may be empty
    ],
    ids=range(10),
)
def test_sft_columns(row, prompt, completion):
    (example,), counts = to_examples([row], "sft")
    assert (example.prompt, example.completions) == (prompt, (completion,))
    preference = "chosen" in row and not row.get("messages")
    assert counts["sft_on_chosen"] == preference


def test_options_and_extras():
    tool = {"type": "function", "function": {"name": "add"}}
    row = {
        **PAIR,
        "margin": 2,
        "score_chosen": 0.5,
        "good": True,
        "id": "x",
        "row": 7,
        "tools": json.dumps([tool]),
        "chat_template_kwargs": {"enable_thinking": False, "other": None},
    }
    example = one(row)
    assert example.extras == {"margin": 2.0, "score_chosen": 0.5, "good": 1.0}
    assert example.tools == [tool]
    assert example.template_kwargs == {"enable_thinking": False}
    assert "tools: need JSON" in fault({**row, "tools": "add"})
    assert "tools: need text, got" in fault({**row, "tools": '[{"name": "\\ud800"}]'})
    assert "tools: need a list, got dict" in fault({**row, "tools": tool})
    assert "chat_template_kwargs: need an object" in fault({**row, "chat_template_kwargs": [1]})


def test_extras_that_some_rows_lack_are_left_out():
    rows = [{**PAIR, "a": 1, "b": 2}, {**PAIR, "a": 3, "b": None}, {**PAIR, "a": 4, "c": 10**400}]
    rows = [{**row, "d": number} for row, number in zip(rows, (1, float("nan"), 1), strict=True)]
    rows = [{**row, "e": number} for row, number in zip(rows, (1, -1e39, 1), strict=True)]
    with pytest.warns(UserWarning, match=r"no finite fp32 number there: b, d, e$"):
        examples, _ = to_examples(rows, "preference")
    assert [e.extras for e in examples] == [{"a": 1.0}, {"a": 3.0}, {"a": 4.0}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": []}, "chosen: need text or a list of messages, got an empty list"),
        ({"chosen": {"role": "user"}}, "chosen: need text or a list of messages, got dict"),
        ({"chosen": None}, r"got prompt, chosen (empty), rejected"),
        ({"chosen": ["a"]}, "chosen[0]: need a message {role, content}, got str"),
        ({"chosen": [{"from": "gpt", "value": "a"}]}, "got role None among from, value"),
        (
            {"chosen": [{**YES, "content": 3}]},
            "content: need text or a list of text parts, got int",
        ),
        ({"chosen": [{**YES, "content": [{"type": "image"}]}]}, "text parts, got image"),
        ({"chosen": [YES], "rejected": [USER]}, "chosen and rejected"),
        ({"prompt": [USER], "chosen": [YES], "rejected": [USER]}, "assistant message, got user"),
        ({"chosen": [{**YES, "tool_calls": {3: 4}}]}, "need text for keys, got 3"),
        ({"prompt": 3}, "prompt: need text or a list of messages, got int"),
    ],
    ids=range(11),
)
def test_bad_rows(change, message):
    got = fault({**PAIR, **change})
    assert got.startswith("data[0]: ")
    if change.get("rejected") != [USER] or "prompt" in change:
        assert message in got


def test_a_row_nested_too_deeply():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert "nested too deeply" in fault({**PAIR, "tools": deep})


def test_nothing_to_learn_from():
    blank = {"role": "assistant", "content": " "}
    empty = [
        {**PAIR, "chosen": " \n"},
        {**PAIR, "rejected": ""},
        {"prompt": [USER], "chosen": [YES], "rejected": [blank]},
        {"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a\n\nAssistant: b"},
    ]
    same = [{**PAIR, "rejected": PAIR["chosen"]}, {"chosen": [USER, YES], "rejected": [USER, YES]}]
    good = [PAIR] * 594
    examples, counts = to_examples([*empty, *same, *good], "preference")
    assert (len(examples), examples[0].row) == (594, 6)
    assert (counts["empty_completions"], counts["identical_pairs"]) == (4, 2)
    limit = r"need at most 0.01 of the rows .*, got 6 of 599 \(4 empty.*, 2 identical.*rows\[0\], "
    with pytest.raises(DataError, match=limit):
        to_examples([*empty, *same, *good[1:]], "preference")
    assert len(to_examples([*empty, PAIR], "preference", max_dropped=0.8)[0]) == 1
    calls = {**blank, "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    assert one({"prompt": [USER], "chosen": [calls], "rejected": [NO]}).completions[0] == [calls]
    with pytest.raises(
        DataError, match=r"need one good row, got 3 bad ones; the first: rows\[0\]: "
    ):
        to_examples([{"a": 1}] * 3, "preference", skip_bad_rows=True)


def test_options_are_checked():
    with pytest.raises(ValueError, match=r"need kind sft or .* or ranking, got 'dpo'"):
        to_examples([PAIR], "dpo")
    with pytest.raises(ValueError, match="turn_marker"):
        to_examples([PAIR], "sft", turn_marker="")


# --- labels and scores

GOOD = {"prompt": "Why?", "completion": " Because.", "label": True}
BAD = {"prompt": "Why?", "completion": " No.", "label": False}
RANKING = {"prompt": "Why?", "completions": [" a", " b", " c"], "scores": [0.5, 2.0, -1.0]}
TWO = {"prompt": [USER], "completions": [[YES], [NO]], "scores": [1, 3]}


def read_all_ways(folder, rows, kind):
    """What lines, parquet and Python give: alike but for the sources, which are left out."""
    names = dict.fromkeys(name for row in rows for name in row)
    table = pa.table({name: [row.get(name) for row in rows] for name in names})
    pq.write_table(table, folder / "a.parquet")
    ways = [
        load_examples(write(folder / "a.jsonl", rows), kind),
        load_examples(folder / "a.parquet", kind),
        to_examples(rows, kind),
        to_examples(datasets.Dataset(table), kind),
    ]
    sources = ("a.jsonl:{}", "a.parquet[{}]", "rows[{}]", "rows[{}]")
    for (examples, _), source in zip(ways, sources, strict=True):
        first = 1 if "jsonl" in source else 0
        assert [e.source for e in examples] == [source.format(e.row + first) for e in examples]
    plain = [
        ([(e.prompt, e.completions, e.row, e.extras) for e in examples], counts)
        for examples, counts in ways
    ]
    assert plain[1:] == plain[:-1]
    return plain[0]


def test_unpaired_rows(tmp_path):
    found, counts = read_all_ways(tmp_path, [GOOD, BAD], "unpaired")
    assert found == [
        ("Why?", (" Because.",), 0, {"label": 1.0}),
        ("Why?", (" No.",), 1, {"label": 0.0}),
    ]
    assert not any(counts.values())
    rows = [
        {"prompt": [USER], "completion": [YES], "label": 1},
        {"prompt": None, "completion": [SYSTEM, USER, NO, USER, YES], "label": 0},
    ]
    found, _ = read_all_ways(tmp_path, rows, "unpaired")
    assert found == [
        ([USER], ([YES],), 0, {"label": 1.0}),
        ([SYSTEM, USER], ([NO, USER, YES],), 1, {"label": 0.0}),
    ]
    example = one({"prompt": "Hi", "completion": [YES], "label": np.bool_(True)}, "unpaired")
    assert (example.prompt, example.completions) == ([USER], ([YES],))
    assert example.extras == {"label": 1.0}


def test_a_pair_makes_two_unpaired_rows(tmp_path, caplog):
    caplog.set_level("INFO")
    pair = {**PAIR, "margin": 0.5}
    rows = [pair, {**GOOD, "margin": 2.0}, {"chosen": "a b", "rejected": "a c", "margin": 3.0}]
    found, counts = read_all_ways(tmp_path, rows, "unpaired")
    assert found == [
        ("Why?", (" Because.",), 0, {"margin": 0.5, "label": 1.0}),
        ("Why?", (" No.",), 0, {"margin": 0.5, "label": 0.0}),
        ("Why?", (" Because.",), 1, {"margin": 2.0, "label": 1.0}),
        ("a", (" b",), 2, {"margin": 3.0, "label": 1.0}),
        ("a", (" c",), 2, {"margin": 3.0, "label": 0.0}),
    ]
    assert {name: n for name, n in counts.items() if n} == {"unpaired_from_pairs": 2}
    assert "rows: 2 preference rows, each as two, chosen with label 1 and" in caplog.text
    chats = [{"chosen": [USER, YES], "rejected": [USER, NO], "tools": json.dumps([{"name": "x"}])}]
    good, bad = to_examples(chats, "unpaired")[0]
    assert (good.prompt, good.completions, bad.completions) == ([USER], ([YES],), ([NO],))
    assert good.tools == bad.tools == [{"name": "x"}]
    # of a pair either both are kept or none
    spoilt = [{**PAIR, "rejected": " "}, {**PAIR, "rejected": PAIR["chosen"]}]
    examples, counts = to_examples([*spoilt, BAD], "unpaired", max_dropped=1.0)
    assert [e.row for e in examples] == [2]
    assert (counts["empty_completions"], counts["identical_pairs"]) == (1, 1)
    assert counts["unpaired_from_pairs"] == 0


def test_rankings(tmp_path):
    tie = {"prompt": "Why?", "completions": [" d", " e", " d"], "scores": [1, 1, 0], "score": 4}
    found, counts = read_all_ways(tmp_path, [RANKING, tie], "ranking")
    assert found == [
        ("Why?", (" a", " b", " c"), 0, {"score": (0.5, 2.0, -1.0)}),
        ("Why?", (" d", " e", " d"), 1, {"score": (1.0, 1.0, 0.0)}),
    ]
    assert not any(counts.values())
    mixed = [
        {**TWO, "chosen": None, "rejected": None},
        {"chosen": [USER, YES], "rejected": [USER, NO]},
    ]
    found, counts = read_all_ways(tmp_path, mixed, "ranking")
    assert found == [
        ([USER], ([YES], [NO]), 0, {"score": (1.0, 3.0)}),
        ([USER], ([YES], [NO]), 1, {"score": (1.0, 0.0)}),
    ]
    assert not any(counts.values())
    whole = {"prompt": "Hi", "completions": [[USER, YES], [USER, NO], [USER, YES, USER, YES]]}
    example = one({**whole, "scores": (np.float32(0.5), 2, True)}, "ranking")
    assert (example.prompt, example.completions) == ([USER], ([YES], [NO], [YES, USER, YES]))
    assert example.extras == {"score": (0.5, 2.0, 1.0)}
    last = {**whole, "completions": [[USER, YES], [USER, YES], [SYSTEM, USER, YES]]}
    assert "got user and user and system first" in fault({**last, "scores": [1, 2, 3]}, "ranking")


def test_ratings_are_no_plain_numbers():
    columns = {"label": 1, "score": 2, "completions": 4, "margin": 5}
    ranking = {"score": (1.0, 0.0), "margin": 5.0}
    assert one({**PAIR, **columns}, "ranking").extras == ranking
    good, _ = to_examples([{**PAIR, **columns}], "unpaired")[0]
    assert good.extras == {"label": 1.0, "margin": 5.0}
    for kind in ("sft", "preference"):
        assert one({**PAIR, **columns}, kind).extras == columns


def test_rankings_with_nothing_to_learn():
    tied = [{**RANKING, "scores": [3, 3.0, 3]}, {**RANKING, "scores": [0.0, -0.0, 1e-300]}]
    empty = [{**RANKING, "completions": [" a", " ", " c"]}]
    same = [{**PAIR, "rejected": PAIR["chosen"]}]
    good = [RANKING] * 396
    examples, counts = to_examples([*tied, *empty, *same, *good], "ranking")
    assert (len(examples), examples[0].row) == (396, 4)
    dropped = {"tied_rankings": 2, "empty_completions": 1, "identical_pairs": 1}
    assert {name: n for name, n in counts.items() if n} == dropped
    got = (
        r"got 4 of 399 \(1 empty completions, 1 identical pairs, 2 tied rankings; first: rows\[0\]"
    )
    with pytest.raises(DataError, match=got):
        to_examples([*tied, *empty, *same, *good[1:]], "ranking")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"label": None},
            "(or implicit in messages), completion and label, or chosen and rejected",
        ),
        ({"label": None}, "got prompt, completion, label (empty)"),
        ({"prompt": None}, "got prompt (empty), completion, label"),
        ({"label": 2}, "label: need true or false, or 1 or 0, got 2"),
        ({"label": 0.5}, "got 0.5"),
        ({"label": float("nan")}, "got nan"),
        ({"label": 10**5000}, "got int"),
        ({"label": "true"}, "got str"),
        ({"label": [True]}, "got list"),
        ({"completion": 3}, "completion: need text or a list of messages, got int"),
        ({"completion": [YES]}, "need a message before the reply, got assistant first"),
        ({"prompt": [USER]}, "got prompt: list, completion: str"),
    ],
    ids=range(12),
)
def test_bad_unpaired_rows(change, message):
    row = {**GOOD, **change}
    if change == {"completion": [YES]}:
        del row["prompt"]
    got = fault(row, "unpaired")
    assert got.startswith("data[0]: ") and message in got


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"scores": None},
            "need the columns prompt, completions and scores, or chosen and rejected",
        ),
        ({"prompt": None}, "got prompt (empty), completions, scores"),
        ({"completions": "abc"}, "completions: need a list of at least 2, got str"),
        ({"completions": [" a"], "scores": [1]}, "completions: need a list of at least 2, got 1"),
        (
            {"completions": [" a", 3, " c"]},
            "completions[1]: need text or a list of messages, got int",
        ),
        (
            {"completions": [USER, YES, NO]},
            "completions[0]: need text or a list of messages, got dict",
        ),
        (
            {"completions": [" a", [YES], " c"]},
            "got prompt: str, completions[0]: str, completions[1]: list, completions[2]: str",
        ),
        (
            {"prompt": [USER], "completions": [[YES], [USER], [NO]]},
            "completions[1]: need an assistant message, got user",
        ),
        ({"scores": [1, 2]}, "scores: need 3, one for each completion, got 2"),
        ({"scores": [1, 2, 3, 4]}, "scores: need 3, one for each completion, got 4"),
        ({"scores": 3}, "scores: need 3, one for each completion, got int"),
        ({"scores": [1, float("nan"), 2]}, "scores[1]: need a finite fp32 number, got nan"),
        ({"scores": [1, 2, np.float64("-inf")]}, "scores[2]: need a finite fp32 number, got -inf"),
        ({"scores": [1e39, 2, 3]}, "scores[0]: need a finite fp32 number, got 1e+39"),
        ({"scores": [1, 10**5000, 3]}, "scores[1]: need a finite fp32 number, got int"),
        ({"scores": [1, None, 3]}, "scores[1]: need a finite fp32 number, got NoneType"),
        ({"scores": [1, "2", 3]}, "scores[1]: need a finite fp32 number, got str"),
    ],
    ids=range(17),
)
def test_bad_rankings(change, message):
    got = fault({**RANKING, **change}, "ranking")
    assert got.startswith("data[0]: ") and message in got


# --- mismatched completions


def singles(*pairs):
    return [Example(p, (c,), n, f"data:{n + 1}", {"label": 1.0}) for n, (p, c) in enumerate(pairs)]


def mismatched(*pairs):
    """The completion that each (prompt, completion) gets beside its own."""
    examples = singles(*pairs)
    made = add_mismatched(examples)
    assert [e.completions[0] for e in made] == [e.completions[0] for e in examples]
    rest = [(e.prompt, e.row, e.source, e.extras) for e in made]
    assert rest == [(e.prompt, e.row, e.source, e.extras) for e in examples]
    return [e.completions[1] for e in made]


def test_mismatched_completions():
    def of(text):  # "pa qb": the completion a of prompt p, then b of q
        return "".join(mismatched(*[tuple(pair) for pair in text.split()]))

    assert of("pa qb rc") == "cab"  # the first looks to the end
    assert of("pa qb rb") == "baa"  # the last passes over an equal completion
    assert of("pa pb qc qd") == "ddbb"  # no answer of the same prompt
    assert of("pa qb pb") == "baa"  # nothing fits the last: another answer of its prompt
    assert of("pa pb pb") == "baa"  # one prompt alone
    assert of("wz ra qa pc pb pa") == "azzaaz"  # the last passes over all but the first
    assert add_mismatched([]) == []


def test_mismatched_completions_have_the_same_form():
    again = {"content": "Hi", "role": "user"}  # the same message, its fields in another order
    pairs = [("p", "a"), ([USER], [YES]), ("q", "b"), ([SYSTEM, USER], [NO]), ([again], [NO])]
    assert mismatched(*pairs) == ["b", [NO], "a", [YES], [YES]]


def test_no_mismatched_completion():
    for pairs, source in [
        ([("p", "a")], "data:1"),
        ([("p", "a"), ("q", "a")], "data:1"),
        ([("p", "a"), ([USER], [YES]), ("q", "b")], "data:2"),
    ]:
        with pytest.raises(DataError, match=rf"^{source}: need completions that differ"):
            add_mismatched(singles(*pairs))
    with pytest.raises(
        ValueError, match=r"^rows\[0\]: need examples of one completion, got one of 2"
    ):
        add_mismatched([one(PAIR)])


@given(st.lists(st.tuples(st.sampled_from("pqrs"), st.sampled_from("abcd")), max_size=12))
@settings(max_examples=500, deadline=None)
def test_mismatched_completions_by_trying_all(pairs):
    def nearest(i):
        earlier = [pairs[i - step] for step in range(1, len(pairs))]
        differing = [(p, c) for p, c in earlier if c != pairs[i][1]]
        return next((c for p, c in differing if p != pairs[i][0]), differing and differing[0][1])

    want = [nearest(i) for i in range(len(pairs))]
    if all(want):
        assert mismatched(*pairs) == want
    else:
        with pytest.raises(DataError, match="need completions that differ"):
            mismatched(*pairs)


class Counted(str):
    """Text that counts how often it is compared."""

    __slots__ = ()
    __hash__ = None
    times = 0

    def __eq__(self, other):
        Counted.times += 1
        return str.__eq__(self, other)

    def __ne__(self, other):
        return not self == other


@pytest.mark.parametrize(
    "run", ["p a", "p a q b", "p a p b", "p a q a", "p{0} c{0}", "p c{0}", "p{0} a"]
)
def test_mismatching_is_linear_whatever_repeats(run):
    def comparisons(n):
        Counted.times = 0
        words = ["p", "z", "z", "b", *(w.format(i) for i in range(n) for w in run.split())]
        words = [*map(Counted, words)]
        add_mismatched(singles(*zip(words[::2], words[1::2], strict=True)))
        return Counted.times

    assert comparisons(60) < 2.5 * comparisons(30)


# --- whatever a file holds, a fault of it is a DataError

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
message = st.fixed_dictionaries(
    {}, optional={"role": st.sampled_from(["user", "assistant"]) | scalars, "content": scalars}
)
nested = st.recursive(
    scalars | st.lists(message, max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
names = ["prompt", "chosen", "rejected", "completion", "messages", "text", "tools", "x"]
names += ["label", "completions", "scores"]
kinds = st.sampled_from(["sft", "preference", "unpaired", "ranking"])
rows_of_anything = st.lists(
    st.dictionaries(st.sampled_from([*names, "chat_template_kwargs"]), nested, max_size=5)
    | scalars,
    max_size=4,
)
file_names = st.sampled_from(["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz", "a.parquet"])
quick = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def only_data_errors(path, kind, skip):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            examples, _ = load_examples(path, kind, skip_bad_rows=skip, max_dropped=1.0)
        except DataError as error:
            if path.name in str(error):
                return
            raise AssertionError("an error that does not name its file") from error
    assert examples
    for e in examples:
        n = len(e.completions)
        assert n == (1 if kind in ("sft", "unpaired") else 2) or (kind == "ranking" and n > 2)
        assert isinstance(e.prompt, list) == all(isinstance(c, list) for c in e.completions)


@quick
@given(rows_of_anything, file_names, kinds, st.booleans())
def test_any_rows(tmp_path, rows, name, kind, skip):
    path = tmp_path / name
    if name.endswith(".parquet"):
        try:
            pq.write_table(pa.Table.from_pylist([r for r in rows if isinstance(r, dict)]), path)
        except (pa.ArrowException, OverflowError, UnicodeEncodeError, TypeError, AttributeError):
            return  # not what a parquet file can hold
    else:
        array = name.startswith("a.json") and not name.startswith("a.jsonl")
        text = json.dumps(rows) if array else "\n".join(map(json.dumps, rows))
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    only_data_errors(path, kind, skip)


@quick
@given(
    st.binary(max_size=60), st.sampled_from([b"", b"[", b'{"chosen":']), file_names, st.booleans()
)
def test_any_bytes(tmp_path, raw, start, name, zipped):
    path = tmp_path / name
    path.write_bytes(gzip.compress(start + raw) if zipped else start + raw)
    only_data_errors(path, "preference", True)


# --- real files


@pytest.fixture(scope="module")
def real():
    if not os.environ.get("FASTPREF_DATA"):
        pytest.skip("FASTPREF_DATA names no folder of real data")
    return pathlib.Path(os.environ["FASTPREF_DATA"])


def test_harmless(real):
    path = real / "hh-rlhf" / "harmless-base-train.jsonl.gz"
    raw = [json.loads(line) for line in gzip.open(path, "rt")]
    examples, counts = load_examples(path, "preference")
    assert (len(raw), len(examples)) == (2000, 1996)
    assert (counts["empty_completions"], counts["identical_pairs"]) == (4, 0)
    marker, whole = "\n\nAssistant:", 0
    for e in examples:
        both = (raw[e.row]["chosen"], raw[e.row]["rejected"])
        assert tuple(e.prompt + c for c in e.completions) == both
        assert e.prompt.endswith(marker) and not e.prompt[:-1].endswith(" ")
        assert all(not c[0].isalnum() for c in e.completions)  # no word is cut
        whole += all(text.rfind(marker) + len(marker) == len(e.prompt) for text in both)
    assert whole == 1992
    sft, counts = load_examples(real / "hh-rlhf", "sft", split="test")
    assert (len(sft), counts["sft_on_chosen"]) == (312, 312)


def test_gsm8k(real):
    examples, counts = load_examples(real / "gsm8k" / "preference_pairs.jsonl.gz", "preference")
    assert len(examples) == 966 and not any(counts.values())
    with pytest.raises(DataError, match=r"^train.jsonl.gz:1: .*got question, answer"):
        load_examples(real / "gsm8k", "sft")
