"""Whole data files through the trainer's reader: each ends in groups, or in what is wrong where.

The same 2,000 files every time; FASTPREF_FUZZ_FILES=10000 makes as many others instead, which
pytest's --hypothesis-seed repeats.
"""

import contextlib
import gzip
import io
import json
import os
import re
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import TEMPLATES, TEXTS, cases
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fastpref.data.files import DataError
from fastpref.data.formats import load_examples
from fastpref.data.packing import num_tokens, pack, split_groups
from fastpref.data.unpaired import add_mismatched
from fastpref.methods.dpo import DPO
from fastpref.methods.kto import KTO
from fastpref.methods.ranking import Ranking
from fastpref.methods.sft import SFT
from fastpref.models.tiny import tiny_tokenizer
from fastpref.train.config import ConfigError, SFTConfig
from fastpref.train.groups import Reader

FILES = int(os.environ.get("FASTPREF_FUZZ_FILES", "0"))
fuzz = settings(
    max_examples=FILES or 2000,
    derandomize=not FILES,
    database=None,
    deadline=None,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
TOKENIZERS = {t: tiny_tokenizer(TEXTS, 400, chat_template=t) for t in [*TEMPLATES, None]}
METHODS = {m.kind: m for m in (SFT(), DPO(), KTO(loss_type="bco"), Ranking())}
# the faults of a file as a whole; the first two name the rows themselves, further on
WHOLE_FILE = re.compile(
    r"need (at most 0.01 of the rows|one good row|at least one row|nothing after the array"
    r"|a whole gzip file|each column once|the \d+ rows of its footer)"
)


def read(reader, path):
    """The reader's groups and the line in which it says what it dropped."""
    reader = replace(reader, config=replace(reader.config, dataset_name=str(path)))
    with contextlib.redirect_stderr(io.StringIO()) as said:
        return reader.groups("train", None), said.getvalue()


def is_array(name, text):
    return ".jsonl" not in name and text.lstrip().startswith("[")


def rows_in(name, raw):
    """How many rows a file holds, by a reading of our own."""
    if name.endswith(".parquet"):
        return pq.read_metadata(io.BytesIO(raw)).num_rows
    text = (gzip.decompress(raw) if name.endswith(".gz") else raw).decode("utf-8-sig", "replace")
    if is_array(name, text):
        return len(json.loads(text))
    return sum(bool(line.strip()) for line in text.split("\n"))


def row_alone(name, raw, number):
    """A file with the named row alone; None where it cannot be cut out."""
    if name.endswith(".parquet"):
        with contextlib.suppress(pa.ArrowException, OSError, UnicodeDecodeError):
            stream, table = io.BytesIO(), pq.ParquetFile(io.BytesIO(raw)).read()
            pq.write_table(table.slice(number, 1), stream)
            return stream.getvalue()
    elif not name.endswith(".gz") and not is_array(name, raw.decode("utf-8-sig", "replace")):
        return b"\n" + raw.split(b"\n")[number - 1]  # not first, where a BOM may stand
    return None


def check_ratings(group, kind):
    """How many completions a group of each kind has, and what it says of them."""
    n, label, score = (len(group.completions), *map(group.extras.get, ("label", "score")))
    if kind == "ranking":
        assert len(score) == n >= 2 and max(score) > min(score)
    else:
        assert n == (2 if kind == "preference" else 1)
    if kind == "unpaired":
        assert label in (0.0, 1.0) and score is None


def check_groups(groups, said, n_rows, reader):
    match = re.match(r"train: (\d+) groups of (\d+) rows(.*)", said)
    assert match and int(match[1]) == len(groups), said
    counts = {name: int(n) for name, n in re.findall(r", (\w+) (\d+)", match[3])}
    split = counts.get("unpaired_from_pairs", 0)
    assert int(match[2]) == n_rows, said
    dropped = ["bad_rows", "empty_completions", "identical_pairs", "tied_rankings"]
    dropped += ["dropped_identical", "dropped_empty"]
    assert len(groups) + sum(counts.get(name, 0) for name in dropped) == n_rows + split, said
    rows = [group.row for group in groups]
    twice = len(rows) - len(set(rows))
    assert groups and rows == sorted(rows) and rows[-1] < n_rows and twice <= split
    for group in groups:
        check_ratings(group, reader.method.kind)
        for ids, scored in zip(group.completions, group.scored, strict=True):
            assert group.prompt and ids
            assert len(group.prompt) + len(ids) <= (reader.config.max_length or float("inf"))
            assert scored is None or (any(scored) and len(scored) == len(ids))
    for part in split_groups(groups, max_groups=2):
        batch = pack(part)
        assert len(batch.input_ids) == sum(map(num_tokens, part))
        assert len(batch.groups) == len(part) + 1
        assert all(values.isfinite().all() for values in batch.extras.values())


def check_mismatched(reader, path):
    """Every example gets another completion, unless those of one form are all alike."""
    reader = replace(reader, config=replace(reader.config, dataset_name=str(path)))
    examples, _ = reader.examples("train", None)
    with contextlib.suppress(DataError):
        made = add_mismatched(examples)
        assert [e.completions[0] for e in made] == [e.completions[0] for e in examples]
        for e in made:
            own, other = e.completions
            assert own != other and type(own) is type(other)
        return
    forms = [[e.completions[0] for e in examples if isinstance(e.prompt, f)] for f in (str, list)]
    assert any(form and all(c == form[0] for c in form) for form in forms)


def check_refusal(error, path, files, reader):
    """The message opens with the file, and with the line or row if one is at fault."""
    match = re.match(r"(.+?)(?::(\d+)|\[(\d+)\])?: (.*)", str(error), re.DOTALL)
    assert match, error
    name, line, row, message = match.groups()
    if line is None and row is None:
        assert name in (*files, str(path)) and WHOLE_FILE.match(message), error
        return
    assert name in files and (row is not None) == name.endswith(".parquet"), error
    raw = row_alone(name, files[name], int(line or row))
    if raw is not None:
        alone = path.parent / f"alone{'.parquet' if row else '.jsonl'}"
        alone.write_bytes(raw)
        with pytest.raises((DataError, ConfigError)):
            read(reader, alone)


def check_config(message, case):
    """The tokenizer has no chat template, or a row is over the budget."""
    budget = case.options["max_tokens_per_micro_batch"]
    need = rf"train: row \d+: need max_tokens_per_micro_batch of at least \d+, .* got {budget}"
    if case.template is None and not (budget and message.startswith("train: row")):
        need = "train: need a tokenizer with a chat template"
    assert re.match(need, message), message


def how_it_ends(case, folder):
    files, options = case.files, case.options
    reader = Reader(SFTConfig(**options), METHODS[case.kind], TOKENIZERS[case.template], None)
    for name, raw in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)
    path = folder if len(path.relative_to(folder).parts) > 1 else path
    try:
        groups, said = read(reader, path)
    except DataError as error:
        check_refusal(error, path, files, reader)
        return "refused"
    except ConfigError as error:
        check_config(str(error), case)
        return "refused"
    check_groups(groups, said, sum(rows_in(*file) for file in files.items()), reader)
    if case.kind == "unpaired":
        check_mismatched(reader, path)
    return "accepted"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_file_ends_in_groups_or_says_what_is_wrong_where(tmp_path):
    ends = Counter()

    @fuzz
    @given(cases())
    def each(case):
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            ends[how_it_ends(case, Path(folder) / "data")] += 1

    each()
    assert min(ends["accepted"], ends["refused"]) >= ends.total() / 3, ends


GOOD = b'{"prompt": "Why?", "chosen": " a", "rejected": " b"}'
BAD = [b'"\xff"', b"{", b"3", b'{"chosen": "a"}', GOOD.replace(b" a", b"\\ud800"), b"[" * 10**5]


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz"]),
    start=st.sampled_from([b"", b"\xef\xbb\xbf"]),
    end=st.sampled_from([b"\n", b"\r\n", b"\n \n"]),
    before=st.integers(0, 3),
    after=st.integers(0, 2),
    bad=st.sampled_from(BAD),
)
def test_the_line_at_fault_is_the_one_named(tmp_path, name, start, end, before, after, bad):
    rows = [GOOD] * before + [bad] + [GOOD] * after
    array = ".jsonl" not in name
    raw = b"[" + end + (b"," + end).join(rows) + end + b"]" if array else end.join(rows)
    raw = start + raw
    (tmp_path / name).write_bytes(gzip.compress(raw, 1) if name.endswith(".gz") else raw)
    line = end.count(b"\n") * (before + array) + 1
    with pytest.raises(DataError, match=rf"^{name}:{line}: need|^{name}:{line}: chosen: need text"):
        load_examples(tmp_path / name, "preference")
