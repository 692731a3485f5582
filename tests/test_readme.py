"""The README's Python runs as it stands, and it has exactly two set-up commands."""

import pathlib
import re

import pytest

from fastpref.data.synthetic import reviews
from fastpref.models.tiny import save_tiny

TEXT = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.S)


def test_two_set_up_commands():
    section = TEXT.split("## Set up")[1].split("\n## ")[0]
    commands = re.findall(r"```bash\n(.*?)```", section, re.S)
    assert len(commands) == 2 and all(c.count("\n") == 1 for c in commands)
    assert commands[0].rstrip().endswith("fastpref quickstart")
    assert commands[1].rstrip().endswith("pytest")


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_blocks_run(block, tmp_path, monkeypatch):
    save_tiny(tmp_path / "runs" / "sft", [r.completion for r in reviews(20, 0)], vocab_size=300)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
