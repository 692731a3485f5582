"""The page as text: what it says, that nothing breaks out of it, and that it needs nothing else."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import pytest

from fastpref.report.page import MINUS, NOTHING, number, write_report
from fastpref.report.read import ReportError

SHALOM = "\u05e9\u05dc\u05d5\u05dd"
ROOT = Path(__file__).parents[2]
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Elements, texts and tables of a page whose every element is closed in order."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.texts, self.open = [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
            self.texts.append([tuple(self.open), ""])

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts.append([tuple(self.open), data])

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


def table(path, about):
    """{row: [cell, ...]} of the table that is about something."""
    text = path.read_text(encoding="utf-8")
    body = text.split(f'aria-label="{about}"')[1].split("</table>")[0]
    rows = re.findall(r'<th scope="row">(.*?)(?: <small>.*?)?</th>(.*?)</tr>', body)
    return {name: re.findall("<td>(.*?)</td>", cells) for name, cells in rows}


def test_the_headline(make_run, tmp_path):
    sft = [{"step": 1, "loss": 3.0}, {"step": 7, "loss": None, "peak_memory_gib": 1234.5}]
    slow = [
        {"step": s, "tokens_per_second": t, "peak_memory_gib": 3.0 / s}
        for s, t in ((1, 1), (2, 9), (3, 2))
    ]
    runs = [make_run("dpo"), make_run("sft", sft), make_run("slow", slow)]
    found = table(write_report(runs, tmp_path / "page.html"), "Where each run stood at its end")
    assert found == {
        "Steps": ["40", "7", "3"],
        "Accuracy, evaluation": ["0.6200", NOTHING, NOTHING],
        "Margin, evaluation": ["0.6400", NOTHING, NOTHING],
        "Loss, evaluation": ["0.6260", NOTHING, NOTHING],
        "Loss, training": ["0.6100", "not finite", NOTHING],
        "Speed, median": ["20,021", NOTHING, "2"],
        "Memory, peak": ["7.500", "1,234", "3"],
    }


def test_training_stands_in_where_nothing_was_evaluated(make_run, tmp_path):
    rows = [{"step": 5, "rewards/accuracies": 0.25, "rewards/margins": -0.5}]
    path = write_report([make_run("run", rows)], tmp_path / "page.html")
    found = table(path, "Where each run stood at its end")
    assert found["Accuracy, training"] == ["0.2500"]
    assert found["Margin, training"] == [f"{MINUS}0.5000"]


def test_the_configuration_tells_what_differs(make_run, tmp_path):
    runs = [make_run("a", config={"lr": 1e-4}), make_run("b", config={"beta": 0.5, "lr": 1e-4})]
    (make_run("old") / "run.yaml").unlink()
    path = write_report([*runs, tmp_path / "old"], tmp_path / "page.html")
    found = table(path, "Keys in which the runs differ")
    assert found == {"output_dir": ["runs/a", "runs/b", NOTHING], "beta": ["0.1", "0.5", NOTHING]}
    assert "old left no run.yaml" in path.read_text(encoding="utf-8")
    assert table(path, "All keys")["loss_type"] == ["sigmoid", "sigmoid", NOTHING]


def test_the_last_value_of_every_metric(make_run, tmp_path):
    path = write_report([make_run("run")], tmp_path / "page.html")
    found = table(path, "The last value of every metric")
    assert found["eval_rewards/margins"] == ["0.6400"] and found["num_tokens"] == ["40,000"]


def test_a_quickstart(make_quickstart, tmp_path):
    path = write_report([make_quickstart(shuffle_preferences=True)], tmp_path / "page.html")
    text = path.read_text(encoding="utf-8")
    assert f"Gold reward from {MINUS}0.100 to 0.300: a gain of 0.400 ± 0.050" in text
    assert "this is the control" in text
    found = table(path, "Where each run stood at its end")
    assert found["Gold reward before"] == [f"{MINUS}0.100 ± 0.020", f"{MINUS}0.080 ± 0.020"]
    assert found["KL to the SFT model"] == ["4.000 ± 0.500", "5.000 ± 0.500"]
    assert "was dull ." in text and "was a joy ." in text


def test_error_bars_are_one_standard_error_to_either_side(make_quickstart, tmp_path):
    path = write_report([make_quickstart()], tmp_path / "page.html")
    svg = path.read_text(encoding="utf-8").split("<svg role=")[1]
    for style, kl in ((0, 4.0), (1, 5.0)):
        found = re.findall(rf'd="M (.*?) L (.*?) " clip[^>]*var\(--line-{style}\)', svg)
        ways = [[float(x) for end in ends for x in end.split()] for ends in found]
        join, before, sideways, after = ways  # x and y of both ends
        wide, high = (join[2] - join[0]) / kl, (join[1] - join[3]) / 0.4  # pixels a nat, a reward
        assert before == pytest.approx(
            [join[0], join[1] + 0.02 * high, join[0], join[1] - 0.02 * high], abs=0.02
        )
        assert after == pytest.approx(
            [join[2], join[3] + 0.04 * high, join[2], join[3] - 0.04 * high], abs=0.02
        )
        assert sideways == pytest.approx(
            [join[2] - 0.5 * wide, join[3], join[2] + 0.5 * wide, join[3]], abs=0.02
        )


def test_what_all_runs_said_stands_there_once(make_run, tmp_path):
    def samples(end):
        said = {0: "the same", 9: end}
        return [{"step": s, "row": 0, "prompt": "p", "completion": t} for s, t in said.items()]

    runs = [make_run(name, samples=samples(end)) for name, end in (("a", "X1"), ("b", "X2"))]
    text = write_report(runs, tmp_path / "page.html").read_text(encoding="utf-8")
    said = re.findall(r'<h4>(.*?)</h4><p class="text" dir="auto">(.*?)</p>', text)
    assert said == [
        ("before · step 0", "the same"),
        ("a: after · step 9", "X1"),
        ("b: after · step 9", "X2"),
    ]


def test_many_samples_unfold(hostile, tmp_path):
    text = write_report([hostile], tmp_path / "page.html").read_text(encoding="utf-8")
    shown, more = text.split("<summary>2 more</summary>")
    assert shown.count("<article>") == 4 and more.count("<article>") == 2


def test_hostile_text_stays_text(hostile, make_run, tmp_path):
    page = Page(write_report([hostile, make_run("other")], tmp_path / "page.html"))
    assert not page.all("script") and not page.all("img") and not page.all("iframe")
    for _, attrs in page.elements:
        assert not any(name.startswith("on") for name in attrs)
    text = "".join(data for _, data in page.texts)
    assert (
        "<script>alert(1)</script><img src=x onerror=alert(2)> & \"quotes\" 'n' {{ 7 * 7 }}" in text
    )
    assert "\u2400\u241b[31m \\ud800 end" in text  # pictures of control characters, an escape
    assert "\u202eturned\u2028and split" in text and SHALOM in text


def test_the_page_needs_nothing_else(hostile, make_quickstart, tmp_path):
    path = write_report([hostile, make_quickstart()], tmp_path / "page.html")
    assert "://" not in path.read_text(encoding="utf-8")
    page = Page(path)
    assert page.all("link") == [{"rel": "icon", "href": "data:,"}]  # or a browser asks for one
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids)) > 20
    for tag, attrs in page.elements:
        assert "src" not in attrs
        for name in ("href", "xlink:href"):
            if name in attrs and tag != "link":
                assert attrs[name].removeprefix("#") in ids
        clip = re.fullmatch(r"url\(#(.*)\)", attrs.get("clip-path", "url(#)"))
        assert clip[1] in [*ids, ""]


def test_every_colour_is_the_pages(hostile, make_quickstart, tmp_path):
    text = write_report([hostile, make_quickstart()], tmp_path / "page.html").read_text()
    style, body = text.split("</style>")
    used = set(re.findall(r"var\((--[\w-]+)\)", body))
    light, dark = re.findall(r":root \{(.*?)\}", style, re.S)
    for colours in (light, dark):
        assert used <= set(re.findall(r"(--[\w-]+):", colours))
    assert not re.findall(r"(?:fill|stroke)(?:=\"|: *)(?!none|var|currentColor)#?\w+", body)


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def test_contrast():
    """What WCAG asks: 4.5 of text, 3 of lines, against what lies behind them."""
    source = (ROOT / "fastpref" / "report" / "page.html").read_text()
    for colours in re.findall(r":root \{(.*?)\}", source, re.S):
        values = {name: luminance(c) for name, c in re.findall(r"--([\w-]+): (#\w{6})", colours)}

        def contrast(name, behind, values=values):
            low, high = sorted((values[name], values[behind]))
            return (high + 0.05) / (low + 0.05)

        for name in ("text", "soft"):
            assert min(contrast(name, "page"), contrast(name, "panel")) >= 4.5
        lines = [name for name in values if name.startswith("line-")]
        assert len(lines) == 6 and min(contrast(name, "page") for name in lines) >= 3


def test_the_same_runs_give_the_same_bytes(hostile, make_quickstart, tmp_path):
    runs = [hostile, make_quickstart()]
    first = write_report(runs, tmp_path / "1.html").read_bytes()
    with matplotlib.rc_context({"xtick.labelsize": 30, "axes.xmargin": 0.4}):  # a user's own style
        assert write_report(runs, tmp_path / "2.html").read_bytes() == first
    code = (
        "import sys, pathlib; from fastpref.report.page import write_report\n"
        "*runs, page = map(pathlib.Path, sys.argv[1:]); write_report(runs, page)\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, runs), str(tmp_path / "3.html")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"
    assert (tmp_path / "3.html").read_bytes() == first


def test_an_old_run_gives_a_page(make_run, tmp_path):
    folder = make_run("old", [{"step": 1, "loss": 1.0}])
    (folder / "run.yaml").unlink()
    text = write_report([folder], tmp_path / "new" / "page.html").read_text()
    assert text.count("<figure>") == 1


def test_an_output_that_cannot_be_written(make_run, tmp_path):
    with pytest.raises(ReportError, match=f"cannot write {tmp_path}"):
        write_report([make_run("run")], tmp_path)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, NOTHING),
        (float("nan"), "not finite"),
        (0.0, "0"),
        (-0.0, "0"),
        (-12.5, f"{MINUS}12.50"),
        (1e-7, f"1.000e{MINUS}07"),
        (12345.6, "12,346"),
    ],
)
def test_numbers(value, text):
    assert number(value) == text
