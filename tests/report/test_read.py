"""What the folders of runs and quickstarts say, and what is refused."""

import json
import math

import pytest

from fastpref.report.read import Quickstart, ReportError, Sample, read, read_curves


def test_curves(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "loss": 3, "note": "words", "flag": true}\n'
        '{"step": 2, "loss": null, "eval_loss": NaN}\n\n'
        '{"step": 4, "loss": 5.5}\n'
        '{"step": 3, "loss": 1}\n'
        '{"step": 4, "loss": 0.5}\n'
        '{"step": 5, "loss": 0.'
    )
    curves = read_curves(path)
    assert curves.keys() == {"loss", "eval_loss"}
    assert [step for step, _ in curves["loss"]] == [1, 2, 3, 4]
    values = [value for _, value in curves["loss"]]
    assert values[0] == 3 and math.isnan(values[1]) and values[2:] == [1, 0.5]


@pytest.mark.parametrize("line", ['{"step": 1, "lo', "[1]", '{"loss": 1}', '{"step": "one"}'])
def test_a_bad_line_is_named(make_run, line):
    folder = make_run("run")
    (folder / "metrics.jsonl").write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
    with pytest.raises(ReportError, match=r"metrics\.jsonl:2: need"):
        read([folder])


def test_samples_of_the_first_and_the_last_step(make_run):
    steps = (20, 0, 40)
    rows = [{"step": s, "row": 0, "prompt": "p", "completion": f"at\u2028{s}"} for s in steps]
    rows += [{"step": 20, "row": 1, "prompt": "q", "completion": "once"}]
    folder = make_run("run", samples=rows)
    text = (folder / "samples.jsonl").read_text().replace("\\u2028", "\u2028")
    (folder / "samples.jsonl").write_text(text)  # as a writer that escapes nothing leaves it
    (run,) = read([folder])
    assert run.samples == (
        Sample("p", (("before · step 0", "at\u20280"), ("after · step 40", "at\u202840"))),
        Sample("q", (("sampled · step 20", "once"),)),
    )


def test_the_best_step_is_where_the_run_ended(make_run):
    """Newest by number: 9 comes after 10 among names."""
    folder = make_run("run", config={"load_best_model_at_end": True})
    for step, best in ((20, 10), (30, 30), (40, 30), (9, 9)):
        (folder / f"checkpoint-{step}").mkdir()
        state = folder / f"checkpoint-{step}" / "trainer_state.json"
        state.write_text(json.dumps({"step": step, "best_step": best}))
    (run,) = read([folder])
    assert run.best_step == 30
    assert run.at_end("eval_loss") == dict(run.curves["eval_loss"])[30] != run.last("eval_loss")
    (last,) = read([make_run("last")])
    assert last.best_step is None and last.at_end("eval_loss") == last.last("eval_loss")


def test_a_sample_without_text_is_refused(make_run):
    folder = make_run("run", samples=[{"step": 1, "row": 0, "prompt": "p"}])
    with pytest.raises(ReportError, match=r"samples\.jsonl: need a prompt and a completion"):
        read([folder])


def test_names(make_run):
    folders = [
        make_run("a/dpo"),
        make_run("b/dpo"),
        make_run("c", config={"run_name": "mine"}),
        make_run("d", config={"run_name": "mine"}),
        make_run("e"),
    ]
    assert [run.name for run in read(folders)] == ["a/dpo", "b/dpo", "c", "d", "e"]
    assert read(folders[2:3])[0].name == "mine"


def test_seeds_of_two_quickstarts_are_told_apart(make_quickstart):
    told, control = read([make_quickstart("told"), make_quickstart("control")])
    assert [run.name for run in told.runs] == ["told/seed-0", "told/seed-1"]
    assert [run.name for run in control.runs] == ["control/seed-0", "control/seed-1"]


def test_quickstart(make_quickstart):
    (found,) = read([make_quickstart(seeds=2, shuffle_preferences=True)])
    assert isinstance(found, Quickstart) and found.shuffled and found.summary["gain"] == 0.4
    assert [run.name for run in found.runs] == ["seed-0", "seed-1"]
    assert [run.outcome.kl for run in found.runs] == [4.0, 5.0]
    assert found.runs[1].last("loss") == pytest.approx(0.69 - 0.002 * 10)
    assert found.runs[0].samples[0].completions[1] == ("after", " was a joy .")
    assert found.runs[1].samples == ()


@pytest.mark.parametrize(
    ("rows", "config", "name"),
    [
        ([{"step": 1, "loss": 2.0}], {}, ""),
        (None, {"loss_type": "ipo"}, "ipo"),
        (None, {"loss_type": ["sigmoid", "sft"]}, "sigmoid + sft"),
    ],
)
def test_losses_that_can_be_compared_share_a_name(make_run, rows, config, name):
    assert read([make_run("run", rows, config)])[0].loss_name == name


def test_refused(make_run, make_quickstart, tmp_path):
    good = make_run("good")
    for folder, message in (
        (tmp_path / "none", r"none: need a run's folder .*metrics\.jsonl.*got no such folder"),
        (good / "run.yaml", "got a file"),
        (make_quickstart() / "seed-0", "got dpo$"),
        (make_run("empty", []), r"need metrics, got none in .*empty.metrics\.jsonl"),
    ):
        with pytest.raises(ReportError, match=message):
            read([good, folder])
    with pytest.raises(ReportError, match=r"each run once, got .*good twice"):
        read([good, tmp_path / "good" / ".." / "good"])
    with pytest.raises(ReportError, match="at least one run, got none"):
        read([])


@pytest.mark.parametrize("text", ["- 1\n", "a: [\n"])
def test_a_configuration_that_is_none(make_run, text):
    folder = make_run("run")
    (folder / "run.yaml").write_text(text)
    with pytest.raises(ReportError, match=r"run\.yaml"):
        read([folder])


@pytest.mark.parametrize("summary", ["{", "[]", '{"runs": []}', '{"runs": [{"seed": 0}]}'])
def test_a_summary_that_is_none(make_quickstart, summary):
    folder = make_quickstart()
    (folder / "summary.json").write_text(summary)
    with pytest.raises(ReportError, match="quickstart"):
        read([folder])


def test_a_quickstart_without_seeds(make_quickstart):
    folder = make_quickstart()
    summary = json.loads((folder / "summary.json").read_text()) | {"runs": []}
    (folder / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(ReportError, match="at least one seed"):
        read([folder])
