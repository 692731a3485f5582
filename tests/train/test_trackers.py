"""What a run reports is read back from each tracker's own files."""

import json
import math
import os
import runpy
import sqlite3
import struct
import sys
from pathlib import Path

import pytest

from fastpref.cli import parse
from fastpref.train import trackers as module
from fastpref.train.config import TRACKERS, ConfigError, check_keys, tracker_names
from fastpref.train.preference_config import DPOConfig
from fastpref.train.run import dpo
from fastpref.train.trackers import grouped, library, trackers

SAMPLES = [
    {"step": 2, "row": 0, "prompt": "2 + 2 =", "completion": " 4 *and* `5`"},
    {"step": 2, "row": 1, "prompt": "two\nlines", "completion": ""},
]


@pytest.fixture(scope="module")
def trackio_folder(tmp_path_factory):
    """Trackio reads its folder once, when it is imported."""
    folder = tmp_path_factory.mktemp("trackio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(folder))
        import trackio.utils

        assert folder == trackio.utils.TRACKIO_DIR
        yield folder


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path, trackio_folder):
    for name in os.environ:
        if name.startswith(("WANDB_", "TRACKIO_", "TENSORBOARD_")) and name != "TRACKIO_DIR":
            monkeypatch.delenv(name)
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb_files"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.fixture
def config(tmp_path):
    """Each test has a project of its own, since all share trackio's folder."""
    return DPOConfig(output_dir=str(tmp_path / "my-run"), project=tmp_path.name, beta=0.25)


@pytest.fixture(params=TRACKERS)
def name(request):
    return request.param


def train_line(step, **values):
    return {"step": step, "epoch": step / 8, "rewards/margins": step / 4, **values}


def eval_line(step):
    return {"step": step, "epoch": step / 8, "eval_loss": step / 2, "eval_rewards/margins": 1.5}


def start(name, config, step=0):
    run = Path(config.output_dir)
    run.mkdir(exist_ok=True)
    (tracker,) = trackers(DPOConfig(report_to=name))
    tracker.on_start(config, run, step)
    return tracker


def end(tracker, error=None):
    """As the loop ends, while the error that ended it passes by."""
    try:
        if error is not None:
            raise error
    except BaseException:
        tracker.on_end()
    else:
        tracker.on_end()


def tensorboard_read(config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(Path(config.output_dir) / "runs"), {"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def wandb_records(path):
    """The records of a .wandb file: protobufs in LevelDB's log format."""
    from wandb.proto import wandb_internal_pb2 as proto

    blob, at, parts = path.read_bytes(), 7, []
    while at < len(blob):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", blob, at + 4)
        parts.append(blob[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # whole, or the last of several parts
            record = proto.Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


def wandb_runs(config):
    """The records of each time that the run was begun."""
    import wandb

    wandb.teardown()  # finish() comes back before its service has written the last records
    paths = (Path(config.output_dir) / "wandb").glob("offline-run-*/*.wandb")
    return [list(wandb_records(path)) for path in paths]


def wandb_rows(records):
    for record in records:
        if record.HasField("history"):
            items = record.history.item
            yield {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}


def run_of(records):
    return next(record.run for record in records if record.HasField("run"))


def trackio_runs(project):
    import trackio

    return list(trackio.Api().runs(project))


def trackio_rows(run):
    from trackio.sqlite_storage import SQLiteStorage

    return SQLiteStorage.get_logs(run.project, run.name, run_id=run.id)


def number(value):
    """wandb's JSON has names for what JSON cannot say."""
    return float(value.lower()) if isinstance(value, str) else value


def points(name, config):
    """Everything that a tracker holds: (step, value) by name, in the order of the steps."""
    if name == "tensorboard":
        events = tensorboard_read(config)
        tags = events.Tags()["scalars"]
        return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}
    if name == "wandb":
        rows = [row for records in wandb_runs(config) for row in wandb_rows(records)]
    else:
        rows = [row for run in trackio_runs(config.project) for row in trackio_rows(run)]
    found = {}
    for row in sorted(rows, key=lambda row: row["train/global_step"]):
        for key, value in row.items():
            if "/" in key and not key.startswith(("train/global_step", "eval/samples")):
                found.setdefault(key, []).append((row["train/global_step"], number(value)))
    return found


def test_names_are_grouped_as_transformers_does():
    from transformers.integrations.integration_utils import rewrite_logs

    row = {"loss": 1.0, "rewards/margins": 2.0, "eval_rewards/margins": 3.0, "eval_runtime": 4.0}
    assert grouped({"step": 7, **row}) == rewrite_logs(row)


def test_lines_arrive_with_their_steps(name, config):
    tracker = start(name, config)
    tracker.on_log(1, train_line(1, loss=0.5))
    tracker.on_log(2, train_line(2, loss=math.nan, grad_norm=math.inf))
    tracker.on_log(2, eval_line(2))
    tracker.on_log(3, train_line(3, loss=-math.inf))
    end(tracker)
    found = points(name, config)
    assert found["train/rewards/margins"] == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert found["eval/rewards/margins"] == [(2, 1.5)] and found["eval/loss"] == [(2, 1.0)]
    (first, (step, nan), last) = found["train/loss"]
    assert first == (1, 0.5) and last == (3, -math.inf)
    assert step == 2 and math.isnan(nan)
    assert found["train/grad_norm"] == [(2, math.inf)]
    assert "train/step" not in found


def cut_off(name, config):
    """A run that is interrupted in the evaluation of step 4; its checkpoint is of step 2."""
    tracker = start(name, config)
    for step in (1, 2, 3, 4):
        tracker.on_log(step, train_line(step))
        if step == 2:
            tracker.on_samples(step, SAMPLES)
            tracker.on_log(step, eval_line(step))
    end(tracker, KeyboardInterrupt())


def go_on(name, config):
    tracker = start(name, config, step=2)
    for step in (3, 4, 5):
        tracker.on_log(step, train_line(step))
        if step == 4:
            tracker.on_samples(step, SAMPLES)
            tracker.on_log(step, eval_line(step))
    end(tracker)


@pytest.mark.parametrize("name", ["tensorboard", "trackio"])
def test_a_resumed_run_goes_on_without_points_twice(name, config, capsys):
    cut_off(name, config)
    capsys.readouterr()
    go_on(name, config)
    assert name == "tensorboard" or "Resumed existing run: my-run" in capsys.readouterr().out
    found = points(name, config)
    assert found["train/rewards/margins"] == [(step, step / 4) for step in (1, 2, 3, 4, 5)]
    assert found["eval/loss"] == [(2, 1.0), (4, 2.0)]


def test_a_resumed_run_keeps_wandbs_id_and_sends_what_the_server_lacks(config, monkeypatch):
    import wandb

    cut_off("wandb", config)
    (first,) = wandb_runs(config)
    last = max(row["_step"] for row in wandb_rows(first))
    # offline no server says how far a run has got
    monkeypatch.setattr(wandb.Run, "starting_step", last + 1)
    go_on("wandb", config)
    assert {run_of(records).run_id for records in wandb_runs(config)} == {run_of(first).run_id}
    found = points("wandb", config)
    assert found["train/rewards/margins"] == [(step, step / 4) for step in (1, 2, 3, 4, 5)]
    assert found["eval/loss"] == [(2, 1.0), (4, 2.0)]


def test_a_line_is_there_while_the_run_goes_on(config):
    writer, service = start("tensorboard", config), start("wandb", config)
    for tracker in (writer, service):
        tracker.on_log(1, train_line(1))
    assert points("tensorboard", config)["train/epoch"] == [(1, 1 / 8)]
    assert service.run.step == service.place("train", 1) + 1  # no longer waiting for more of it
    end(writer)
    end(service)


def test_wandb_plots_over_the_steps_of_the_training(config):
    end(start("wandb", config))
    (records,) = wandb_runs(config)
    metrics = [record.metric for record in records if record.HasField("metric")]
    assert ("*", "train/global_step") in [(m.glob_name, m.step_metric) for m in metrics]


@pytest.mark.parametrize("own", [None, 7.0])
def test_wandb_does_not_hold_up_the_end_for_ever(own, config, monkeypatch):
    import wandb

    wandb.teardown()  # its settings are read once
    if own:
        monkeypatch.setenv("WANDB_FINISH_TIMEOUT", str(own))
    tracker = start("wandb", config)
    assert tracker.run.settings.finish_timeout == (own or module.FINISH_SECONDS)
    end(tracker)
    wandb.teardown()


def test_wandb_steps_only_grow(config):
    """It drops what does not, without an error."""
    cut_off("wandb", config)
    (records,) = wandb_runs(config)
    rows = list(wandb_rows(records))
    steps = [row["_step"] for row in rows]
    assert steps == sorted(set(steps))
    assert [row["train/global_step"] for row in rows] == [1, 2, 2, 2, 3, 4]


def test_a_line_that_was_lost_in_a_crash_is_sent_again(config):
    from trackio.sqlite_storage import SQLiteStorage

    cut_off("trackio", config)
    with sqlite3.connect(SQLiteStorage.get_project_db_path(config.project)) as database:
        assert database.execute("DELETE FROM metrics WHERE step = 4").rowcount == 1
    go_on("trackio", config)
    (run,) = trackio_runs(config.project)
    train = [row["step"] for row in trackio_rows(run) if "train/rewards/margins" in row]
    assert train == [1, 2, 3, 4, 5]


def test_a_run_that_starts_anew_is_not_mixed_with_what_was_there(name, config):
    for value in (1.0, 2.0):
        tracker = start(name, config)
        tracker.on_log(0, {"step": 0, "loss": value})
        end(tracker)
    if name == "tensorboard":
        assert points(name, config)["train/loss"] == [(0, 2.0)]
    elif name == "wandb":
        assert len({run_of(records).run_id for records in wandb_runs(config)}) == 2
    else:
        rows = [trackio_rows(run) for run in trackio_runs(config.project)]
        assert sorted(row["train/loss"] for (row,) in rows) == [1.0, 2.0]


def test_trackio_goes_on_with_its_own_run_though_a_later_one_has_its_name(config, tmp_path):
    mine = start("trackio", config)
    mine.on_log(1, train_line(1))
    end(mine)
    namesake = DPOConfig(output_dir=str(tmp_path / "other"), project=config.project)
    namesake.run_name = "my-run"
    other = start("trackio", namesake)
    other.on_log(1, train_line(1))
    end(other)
    mine = start("trackio", config, step=1)
    mine.on_log(2, train_line(2))
    end(mine)
    steps = {run.id: [r["step"] for r in trackio_rows(run)] for run in trackio_runs(config.project)}
    assert steps == {mine.run.id: [1, 2], other.run.id: [1]}


def test_the_configuration_is_there(name, config):
    tracker = start(name, config)
    if name == "trackio":  # it stores nothing of a run without a line
        tracker.on_log(1, train_line(1))
    end(tracker)
    if name == "tensorboard":
        (event,) = tensorboard_read(config).Tensors("args/text_summary")
        held = json.loads(event.tensor_proto.string_val[0])
    elif name == "wandb":
        (records,) = wandb_runs(config)
        updates = [u for r in records if r.HasField("config") for u in r.config.update]
        held = {update.key: json.loads(update.value_json) for update in updates}
    else:
        held = trackio_runs(config.project)[0].config
    assert held["beta"] == config.beta and held["output_dir"] == config.output_dir
    assert held["eval_steps"] is None and held["report_to"] == "none"


def test_samples_are_readable(name, config):
    tracker = start(name, config)
    tracker.on_samples(1, [])
    tracker.on_samples(2, SAMPLES)
    end(tracker)
    if name == "tensorboard":
        (event,) = tensorboard_read(config).Tensors("eval/samples/text_summary")
        text = event.tensor_proto.string_val[0].decode()
        assert event.step == 2 and "\n\n    two\n    lines\n\n" in text
        assert "\n\n     4 *and* `5`\n\n" in text  # indented: markdown leaves it alone
    elif name == "wandb":
        (row,) = (row for records in wandb_runs(config) for row in wandb_rows(records))
        assert row["train/global_step"] == 2
        (path,) = (Path(config.output_dir) / "wandb").glob("offline-run-*/files/**/*.table.json")
        table = json.loads(path.read_text())
        assert table["columns"] == list(SAMPLES[0])
        assert table["data"] == [list(sample.values()) for sample in SAMPLES]
    else:
        (row,) = trackio_rows(trackio_runs(config.project)[0])
        assert row["step"] == 2 and row["eval/samples"]["_value"] == SAMPLES


@pytest.mark.parametrize(
    ("options", "environment", "project", "run_name"),
    [
        ({"project": "chosen", "run_name": "named"}, {"WANDB_PROJECT": "p"}, "chosen", "named"),
        ({}, {"WANDB_PROJECT": "p", "WANDB_NAME": "n"}, "p", "n"),
        ({}, {}, "fastpref", "my-run"),
    ],
)
def test_wandb_project_and_name(options, environment, project, run_name, tmp_path, monkeypatch):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    config = DPOConfig(output_dir=str(tmp_path / "my-run"), **options)
    end(start("wandb", config))
    (records,) = wandb_runs(config)
    assert run_of(records).project == project and run_of(records).display_name == run_name


@pytest.mark.parametrize("project", [None, "chosen"])
@pytest.mark.parametrize("run_name", [None, "named"])
def test_trackio_project_and_name(project, run_name, tmp_path):
    config = DPOConfig(output_dir=str(tmp_path / tmp_path.name), project=project)
    config.run_name = run_name and f"{run_name}-{tmp_path.name}"
    tracker = start("trackio", config)
    tracker.on_log(1, train_line(1))
    end(tracker)
    expected = config.run_name or tmp_path.name
    assert expected in [run.name for run in trackio_runs(project or "fastpref")]


def test_tensorboard_writes_where_its_variable_says(config, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "elsewhere"))
    end(start("tensorboard", config))
    assert list((tmp_path / "elsewhere").glob("events.*"))
    assert not (Path(config.output_dir) / "runs").exists()
    _, (note,) = check_keys(DPOConfig, {"logging_dir": "logs"})
    assert "output_dir/runs" in note and "TENSORBOARD_LOGGING_DIR" in note


@pytest.mark.parametrize(
    ("error", "code"),
    [(None, 0), (KeyboardInterrupt(), 255), (ArithmeticError("nan"), 1), (SystemExit(0), 0)],
)
def test_wandb_is_told_how_the_run_ended(error, code, config):
    tracker = start("wandb", config)
    end(tracker, error)
    (records,) = wandb_runs(config)
    assert [r.exit.exit_code for r in records if r.HasField("exit")] == [code]


def test_an_error_that_the_caller_handles_is_not_the_runs(config):
    try:
        raise ValueError("of the caller")
    except ValueError:
        end(start("wandb", config))
    (records,) = wandb_runs(config)
    assert [r.exit.exit_code for r in records if r.HasField("exit")] == [0]


def test_the_callers_own_wandb_run_is_used_and_left_open(config, monkeypatch):
    import wandb

    monkeypatch.setattr(wandb.Run, "starting_step", 9)  # as if the caller had resumed it
    run_folder = Path(config.output_dir)
    run_folder.mkdir()
    with wandb.init(dir=str(run_folder), project="callers") as run:
        for step in range(9):  # it has come further than the steps of the training
            run.log({"callers/own": step})
        tracker = start("wandb", config)
        tracker.on_log(1, train_line(1))
        end(tracker)
        assert wandb.run is run
        run.log({"callers/own": 9})
    (records,) = wandb_runs(config)
    assert run_of(records).project == "callers"
    rows = list(wandb_rows(records))
    assert [row.get("callers/own") for row in rows] == [*range(9), None, 9]
    assert rows[9]["train/rewards/margins"] == 0.25 and rows[9]["train/global_step"] == 1


def test_a_tracker_that_fails_is_told_once_and_the_run_goes_on(config, capsys):
    tracker = start("tensorboard", config)
    tracker.on_log(1, train_line(1))
    tracker.on_log(2, {"step": 2, "loss": "no number"})
    tracker.on_log(3, train_line(3))
    tracker.on_samples(3, SAMPLES)
    end(tracker)
    (line,) = capsys.readouterr().err.splitlines()
    assert "report_to tensorboard" in line and "at step 2" in line and "goes on" in line
    assert points("tensorboard", config)["train/epoch"] == [(1, 1 / 8)]


def test_a_failed_wandb_run_is_closed_for_the_next(config, capsys):
    import wandb

    tracker = start("wandb", config)
    tracker.on_samples(1, [{"row": object()}])
    end(tracker)
    assert capsys.readouterr().err.count("report_to wandb") == 1
    assert wandb.run is None


def test_a_tracker_that_cannot_start_stops_a_fresh_run_alone(config, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"report_to tensorboard: .*file"):
        start("tensorboard", config)
    tracker = start("tensorboard", config, step=3)
    tracker.on_log(4, train_line(4))
    end(tracker)
    (line,) = capsys.readouterr().err.splitlines()
    assert "at step 3; the run goes on without it" in line


def test_a_tracker_that_never_began_ends_silently(name, capsys):
    (tracker,) = trackers(DPOConfig(report_to=name))
    tracker.on_end()
    assert "report_to" not in capsys.readouterr().err


def test_wandb_wants_its_user_before_any_work(monkeypatch, tmp_path):
    import wandb

    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    try:
        with pytest.raises(ConfigError, match=r"report_to wandb needs a login.*WANDB_MODE=offline"):
            trackers(DPOConfig(report_to="wandb"))
    finally:
        wandb.teardown()


def test_a_missing_library_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    message = f"report_to {name} needs the package {name}: pip install {name}"
    with pytest.raises(ConfigError, match=message):
        trackers(DPOConfig(report_to=[name]))


def test_a_folder_of_the_librarys_name_is_no_library(monkeypatch, tmp_path):
    (tmp_path / "left_by_a_run").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"pip install wandb .*left_by_a_run.* holds no code"):
        library("left_by_a_run", "wandb")


def test_no_library_is_imported_unasked(name, monkeypatch):
    for other in set(TRACKERS) - {name}:
        monkeypatch.setitem(sys.modules, other, None)
    runpy.run_path(module.__file__)
    assert trackers(DPOConfig()) == []
    assert [tracker.name for tracker in trackers(DPOConfig(report_to=name))] == [name]


def test_report_to():
    assert set(module.TRACKERS) == set(TRACKERS)
    assert tracker_names("none") == tracker_names(["none"]) == tracker_names([]) == []
    assert tracker_names(["wandb", "trackio", "wandb"]) == ["wandb", "trackio"]
    given = parse("dpo", DPOConfig, ["--report_to", "tensorboard", "wandb"])
    assert given.report_to == ["tensorboard", "wandb"]
    with pytest.raises(ConfigError, match=r"unknown report_to 'tensorbord'.*'tensorboard'"):
        DPOConfig(report_to=["wandb", "tensorbord"])
    for wrong in ("all", ["all"], ["none", "wandb"]):
        with pytest.raises(ConfigError, match="need report_to: none, or some of tensorboard"):
            DPOConfig(report_to=wrong)


def test_a_whole_run_is_in_every_tracker(config, new_model, tokenizer, pairs):
    config.max_steps, config.logging_steps, config.eval_steps = 4, 1, 2
    config.eval_samples, config.max_new_tokens, config.save_strategy = 2, 4, "no"
    config.use_cpu, config.gradient_checkpointing = True, False
    config.report_to = list(TRACKERS)
    dpo(config, new_model(), pairs[:8], pairs[8:12], tokenizer=tokenizer)
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    expected = {}
    for row in map(json.loads, lines):
        for key, value in grouped(row).items():
            expected.setdefault(key, []).append((row["step"], pytest.approx(value, rel=1e-6)))
    assert {"train/loss", "eval/rewards/accuracies"} <= expected.keys()
    for name in TRACKERS:
        assert points(name, config) == expected, name
