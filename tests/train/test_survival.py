"""Runs that are killed, stopped, starved of disk or damaged: nothing lost, nothing different."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import runs
import torch

from fastpref.data.files import DataError
from fastpref.models.tiny import save_tiny
from fastpref.train import checkpoint, guard, reference
from fastpref.train.callbacks import Callback
from fastpref.train.checkpoint import CheckpointError
from fastpref.train.engine import TorchEngine
from fastpref.train.guard import DivergedError, Stopped
from fastpref.train.metrics import MetricSums
from fastpref.train.optimizer import OptimizerSpec
from fastpref.train.run import dpo

MOMENTS = int(os.environ.get("FASTPREF_KILLS", "20"))
# of ten kills: where; the fill of the reference has its own share, since nothing is saved yet
WHERE = (*["fill"] * 2, *["step"] * 3, *["evaluation"] * 2, *["save"] * 2, "final save")


@pytest.fixture(scope="session")
def model(tmp_path_factory, pairs):
    folder = tmp_path_factory.mktemp("model")
    texts = [p["prompt"] + p[side] for p in pairs for side in ("chosen", "rejected")]
    save_tiny(folder, texts, vocab_size=300, hidden=32, layers=2, heads=4, kv_heads=2)
    return folder


@pytest.fixture(scope="session")
def files(tmp_path_factory, pairs):
    folder = tmp_path_factory.mktemp("data")
    for name, rows in (("train", pairs), ("held", pairs[:6])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def options(model, files):
    def make(folder, **more):
        return {
            "model_name_or_path": str(model),
            "dataset_name": str(files / "train.jsonl"),
            "eval_dataset_name": str(files / "held.jsonl"),
            "output_dir": str(folder),
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 2,
            "max_steps": 9,
            "learning_rate": 1e-3,
            "logging_steps": 2,
            "eval_steps": 3,
            "eval_on_start": True,
            "eval_samples": 2,
            "max_new_tokens": 6,
            "save_steps": 2,
            "save_total_limit": 2,
            "precompute_ref_log_probs": True,
            "gradient_checkpointing": False,
            "lr_scheduler_type": "cosine",
            "resume": "auto",
            "use_cpu": True,
            "report": False,
        } | more

    return make


@pytest.fixture(scope="session")
def whole(tmp_path_factory, model, files):
    """An undisturbed run for each kind, made once."""
    made = {}

    def get(options, four=False):
        if four not in made:
            folder = tmp_path_factory.mktemp("whole")
            made[four] = folder, runs.durations(options(folder), four=four)
        return made[four]

    return get


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("four", [False, True], ids=["pairs", "k=4"])
def test_a_killed_run_ends_as_if_nothing_had_happened(tmp_path, options, whole, four):
    """Half of the moments for each kind; a run that was too fast for its killer tries again."""
    undisturbed, durations = whole(options, four)
    rng = random.Random(17 + four)
    table = {}
    for number in range(MOMENTS // 2):
        phase = WHERE[number % len(WHERE)]
        config = options(tmp_path / f"{number}")
        hit = False
        while not hit:
            turn = rng.randrange(len(durations[phase])) + 1
            hit = runs.kill(
                config, phase, turn, rng.random() * max(durations[phase]) * 0.9, four=four
            )
            if not hit:  # it has ended: once more in a new folder
                config = options(Path(config["output_dir"] + "x"))
        while rng.random() < 0.3:  # and again before it ends
            runs.kill(config, "step", 1 + rng.randrange(3), 0.01 * rng.random(), four=four)
        code = runs.finish(config, four=four)
        lost = [] if code == 0 else [f"exit code {code}"]
        found = lost or runs.differences(undisturbed, config["output_dir"])
        moments, different = table.get(phase, (0, []))
        table[phase] = moments + 1, different + found
    print("\nphase, moments, differences", *table.items(), sep="\n")
    assert not [found for _, different in table.values() for found in different]


@pytest.mark.dist
@pytest.mark.parametrize("phase", ["fill", "step", "evaluation", "save"])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_saves_and_exits_with_0(tmp_path, options, whole, name, phase):
    undisturbed, durations = whole(options)
    config, log = options(tmp_path / "run"), tmp_path / "log"
    with runs.Run(config, log=log) as child:
        assert child.until(phase, len(durations[phase]) // 2 + 1)
        child.signal(getattr(signal, name))
        assert child.end() == 0
    said = log.read_text()
    assert f"{name}: saving at the next step, then stopping" in said
    assert not (tmp_path / "run" / "config.json").exists()
    found = [checkpoint.step_of(path) for path in checkpoint.complete(tmp_path / "run")]
    rows = runs.rows_of(tmp_path / "run" / "metrics.jsonl") if phase != "fill" else []
    assert bool(found) == (phase != "fill") and all(row["step"] <= found[-1] for row in rows)
    assert runs.finish(config, log=log) == 0
    assert not runs.differences(undisturbed, tmp_path / "run")


class Signal(Callback):
    """A signal after a step."""

    def __init__(self, at, number=signal.SIGTERM):
        self.at, self.number = at, number

    def on_step(self, step, engine):
        if step == self.at:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("only_model", [False, True])
def test_a_stop_where_a_save_was_due_is_not_written_again(tmp_path, options, only_model, capfd):
    """Step 6 evaluates and saves: the stop has saved all of it, what is left is its evaluation."""
    config = options(tmp_path / "run", max_steps=6, save_only_model=only_model)
    whole = options(tmp_path / "whole", max_steps=6)
    dpo(whole)
    with pytest.raises(Stopped, match="after step 6, saved in"):
        dpo(config, callbacks=[Signal(6)])
    assert "stopped by SIGTERM after step 6" in capfd.readouterr().err
    kept = tmp_path / "run" / "checkpoint-6"
    before = (kept / "state.pt").stat().st_ino, checkpoint.read_state(kept).evaluated
    dpo(config)
    assert before == ((kept / "state.pt").stat().st_ino, 3)
    assert checkpoint.read_state(kept).evaluated == 6 and checkpoint.damage(kept) is None
    assert not runs.differences(tmp_path / "whole", tmp_path / "run")


def test_a_replaced_checkpoint_comes_back(tmp_path):
    for name in (".checkpoint-4.old", ".checkpoint-2.old", "checkpoint-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / checkpoint.STATE).write_text(name)
    checkpoint.restore(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert (tmp_path / "checkpoint-2" / checkpoint.STATE).read_text() == "checkpoint-2"


def test_a_signal_that_comes_too_late_stops_what_comes_next(tmp_path, options, monkeypatch, capfd):
    publish = checkpoint.publish

    def late(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        publish(*args)

    monkeypatch.setattr(checkpoint, "publish", late)
    with pytest.raises(Stopped, match="stopped by SIGTERM after the last step") as stop:
        dpo(options(tmp_path / "run", max_steps=1))
    assert stop.value.finished and str(stop.value) in capfd.readouterr().err
    assert (tmp_path / "run" / "config.json").exists()


class Interrupt(Callback):
    """Ctrl-C, twice, within one step."""

    def __init__(self):
        self.reached = 0

    def on_step(self, step, engine):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            self.reached += 1


def test_ctrl_c_twice_stops_at_once(tmp_path, options, capfd):
    before, twice = signal.getsignal(signal.SIGINT), Interrupt()
    with pytest.raises(KeyboardInterrupt):
        dpo(options(tmp_path), callbacks=[twice])
    assert twice.reached == 1 and not checkpoint.complete(tmp_path)
    assert "Ctrl-C again stops at once" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


@contextlib.contextmanager
def command_at_work(config):
    """``fastpref dpo`` in a process that has logged its first step."""
    args = [x for key, value in config.items() for x in (f"--{key}", str(value))]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "fastpref.cli", "dpo", *args]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as child:
        for line in child.stderr:
            if line.startswith("DPO "):
                break
        try:
            yield child
        finally:
            child.kill()


@pytest.mark.dist
@pytest.mark.parametrize("stop", [False, True])
def test_a_reader_of_the_log_that_is_gone_ends_nothing(tmp_path, options, whole, stop):
    undisturbed, _ = whole(options)
    config = options(tmp_path / "run")
    del config["resume"]
    if stop:  # in the midst of many steps, with one behind it
        config |= {"max_steps": 100_000, "eval_on_start": False}
    with command_at_work(config) as child:
        child.stderr.close()
        if stop:
            child.send_signal(signal.SIGINT)
        assert child.wait(runs.LIMIT) == 0
    assert stop or not runs.differences(undisturbed, tmp_path / "run")
    assert checkpoint.complete(tmp_path / "run")


@pytest.mark.dist
def test_the_command_prints_how_to_go_on(tmp_path, options):
    config = options(tmp_path / "run", max_steps=100_000, eval_strategy="no", eval_samples=0)
    del config["resume"], config["eval_steps"], config["eval_on_start"]
    with command_at_work(config) as child:
        child.terminate()
        said = child.stderr.read()
    assert child.returncode == 0, said
    before, last = said.splitlines()[-2:]
    assert before.startswith("stopped by SIGTERM after step") and last.endswith("--resume auto")
    assert f"go on with: fastpref dpo --model_name_or_path {config['model_name_or_path']}" in last


def test_a_second_run_in_a_folder_is_refused(tmp_path, options):
    folder = tmp_path / "run"
    with guard.only_writer(folder):
        with pytest.raises(CheckpointError, match=f"a second one: process {os.getpid()} on"):
            dpo(options(folder))
        assert [p.name for p in folder.iterdir()] == [guard.LOCK]
    assert not folder.exists()
    with pytest.raises(DataError):
        dpo(options(folder, dataset_name=str(tmp_path / "none.jsonl")))
    assert not folder.exists()


def test_a_wait_for_a_lock_can_be_ended(tmp_path, capfd):
    def stop():
        raise Stopped("now")

    path = tmp_path / "lock"
    with guard.locked(path), pytest.raises(Stopped), guard.locked(path, while_waiting=stop):
        pass
    assert f"waiting for process {os.getpid()} on" in capfd.readouterr().err
    assert not path.exists()


DAMAGE = {
    "a truncated file": lambda f: os.truncate(f / "state.pt", 100),
    "a flipped bit": lambda f: flip(f / "model.safetensors"),
    "a file that is gone": lambda f: (f / "tokenizer.json").unlink(),
    "an empty state": lambda f: (f / checkpoint.STATE).write_text(""),
    "another state": lambda f: edit(f / checkpoint.STATE, '"num_tokens": ', '"num_tokens": 1'),
}


def edit(path, old, new):
    path.write_text(path.read_text().replace(old, new))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.dist
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, options, whole, damage):
    undisturbed, _ = whole(options)
    config, log = options(tmp_path / "run"), tmp_path / "log"
    runs.kill(config, "step", 8, 0)
    older, newest = checkpoint.complete(tmp_path / "run")
    DAMAGE[damage](newest)
    with pytest.raises(CheckpointError, match=f"{newest} is damaged"):
        dpo(config | {"resume": str(newest)})
    assert runs.finish(config, log=log) == 0
    assert f"{newest} is damaged" in log.read_text() and f"from {older.name}" in log.read_text()
    assert not runs.differences(undisturbed, tmp_path / "run")
    for path in checkpoint.complete(tmp_path / "run"):
        DAMAGE[damage](path)
    with pytest.raises(CheckpointError, match="need a checkpoint to go on from, or none"):
        dpo(config)


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


class FillDisk(Callback):
    """Leave no room from a step on."""

    def __init__(self, ballast, at):
        self.ballast, self.at = ballast, at

    def on_step(self, step, engine):
        if step == self.at:
            with self.ballast.open("wb", buffering=0) as file:
                while True:
                    try:
                        file.write(bytes(4096))
                    except OSError:
                        return


@pytest.mark.dist
@pytest.mark.parametrize("at", [3, 4, 9])  # then a save, a log line and a save, the last save fail
def test_a_full_disk_costs_nothing_that_was_saved(small_disk, options, whole, at):
    undisturbed, _ = whole(options)
    ballast = small_disk / "ballast"
    config = options(small_disk / "run")
    with pytest.raises(CheckpointError, match="No space left on device"):
        dpo(config, callbacks=[FillDisk(ballast, at)])
    kept = [checkpoint.step_of(p) for p in checkpoint.complete(small_disk / "run")]
    assert kept and kept[-1] == (at - 1) // 2 * 2
    assert checkpoint.damage(checkpoint.path_of(small_disk / "run", kept[-1])) is None
    ballast.unlink()
    assert runs.finish(config) == 0
    assert not runs.differences(undisturbed, small_disk / "run")


def test_a_full_disk_under_the_cache_is_named(small_disk, tmp_path, options):
    FillDisk(small_disk / "ballast", 0).on_step(0, None)
    with pytest.raises(CheckpointError, match=f"could not write reference .* to {small_disk}"):
        dpo(options(tmp_path / "run", reference_cache=str(small_disk)))


def test_room_is_checked_before_the_first_step(small_disk, options):
    with pytest.raises(CheckpointError, match=r"need .* MiB in .* for 9 checkpoints of .* free"):
        dpo(options(small_disk / "run", save_steps=1, save_total_limit=None))
    assert not (small_disk / "run" / "metrics.jsonl").exists()


class Keep(Callback):
    """The weights after each step."""

    def __init__(self):
        self.weights = []

    def on_step(self, step, engine):
        weights = engine.model.model.state_dict()
        self.weights.append({name: weight.clone() for name, weight in weights.items()})


def bad_at(step, kind):
    """A loss that goes wrong in the step's second micro-batch."""
    calls = []

    def loss(chosen, rejected, ref_chosen, ref_rejected):
        calls.append(1)
        losses = -torch.nn.functional.logsigmoid(chosen - rejected)
        if len(calls) == 2 * step:
            zero = chosen - chosen.detach()
            losses = losses + (torch.sqrt(zero) if kind == "gradient norm" else zero / zero)
        return losses

    return loss


@pytest.mark.parametrize("kind", ["loss", "gradient norm"])
def test_a_number_that_is_none_stops_before_the_weights_change(
    tmp_path, tokenizer, new_model, pairs, options, kind
):
    config = options(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=3)
    config |= {"train_sampling_strategy": "sequential", "eval_strategy": "no", "eval_samples": 0}
    config |= {"eval_on_start": False}
    keep, model = Keep(), new_model()
    with pytest.raises(DivergedError, match=rf"the {kind} is nan at step 2, over the") as stopped:
        dpo(config, model, pairs, tokenizer=tokenizer, loss_fn=bad_at(2, kind), callbacks=[keep])
    rows = json.loads("[" + re.search(r"rows ([\d, ]+) ", str(stopped.value))[1] + "]")
    whole = range(6, 12)  # of which a micro-batch holds three
    assert set(rows) <= {*whole} and len(rows) == (3 if kind == "loss" else 6)
    assert list(rows) == sorted(rows)
    assert len(keep.weights) == 1
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, keep.weights[0][name]), name
    written = (
        (tmp_path / "metrics.jsonl").read_text() if (tmp_path / "metrics.jsonl").exists() else ""
    )
    assert "NaN" not in written and not checkpoint.complete(tmp_path)


def test_an_engine_that_saw_nan_changes_nothing_any_more(new_model):
    """Where nobody looks for some steps, as on a GPU between two log lines."""
    engine = TorchEngine(torch.nn.Linear(3, 2), torch.device("cpu"))
    engine.prepare(OptimizerSpec(learning_rate=0.1, total_steps=9, weight_decay=0.1))
    weights = []
    for loss in (1.0, float("nan"), 1.0):
        engine.backward(engine.model(torch.ones(3)).sum(), 1, last=True)
        engine.step(torch.tensor(loss))
        weights.append(engine.model.weight.detach().clone())
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])


def test_changed_data_is_named(tmp_path, options, files):
    config = options(tmp_path / "run", max_steps=2)
    dpo(config)
    own = tmp_path / "train.jsonl"
    own.write_text("".join((files / "train.jsonl").read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(CheckpointError, match=r"training data '24 groups, .* now '23 groups"):
        dpo(config | {"dataset_name": str(own)})


@pytest.fixture
def best(tmp_path, options):
    """A run of four steps that keeps its best model, stopped after the third."""
    config = options(tmp_path / "run", max_steps=4, eval_steps=1, save_steps=1)
    config |= {"load_best_model_at_end": True, "save_total_limit": None}
    with pytest.raises(Stopped):
        dpo(config, callbacks=[Signal(3)])
    return config


def test_a_best_that_is_damaged_is_not_published(best):
    class Damage(Callback):
        def on_save(self, step, folder):
            if step == 4:
                flip(folder.parent / "checkpoint-4" / "model.safetensors")

    with pytest.raises(CheckpointError, match=r"checkpoint-4 is damaged.*CRC-32"):
        dpo(best, callbacks=[Damage()])  # the loss falls: the last is the best
    assert not Path(best["output_dir"], "config.json").exists()
    shutil.rmtree(Path(best["output_dir"], "checkpoint-4"))
    dpo(best)


@pytest.mark.parametrize("changed", ["data", "metric"])
def test_a_best_by_another_measure_is_not_compared(best, files, changed, capfd):
    more = {"eval_dataset_name": str(files / "train.jsonl")}
    named = "the evaluation data was 6 groups, .*, is 24 groups"
    if changed == "metric":
        more = {"metric_for_best_model": "logps/chosen"}
        named = "metric_for_best_model was loss, lower is better, is logps/chosen, higher"
    recipe = Path(best["output_dir"], "run.yaml").read_text()
    with pytest.raises(CheckpointError, match=named):
        dpo(best | more)
    assert Path(best["output_dir"], "run.yaml").read_text() == recipe
    dpo(best | more | {"load_best_model_at_end": False})
    assert re.search(f"step 2 no longer counts as the best: {named}", capfd.readouterr().err)


def test_another_runs_checkpoint_starts_in_a_new_folder_only(tmp_path, options):
    dpo(options(tmp_path / "one", max_steps=3, lr_scheduler_type="constant"))
    config = options(tmp_path / "two", max_steps=3, lr_scheduler_type="constant")
    dpo(config)
    lines = (tmp_path / "two" / "metrics.jsonl").read_text()
    older = {"resume": str(tmp_path / "one" / "checkpoint-2")}
    with pytest.raises(CheckpointError, match="two holds a run already: give another output_dir"):
        dpo(config | older)
    assert (tmp_path / "two" / "metrics.jsonl").read_text() == lines
    assert dpo(config | older | {"output_dir": str(tmp_path / "three")}).steps == 3


def test_another_runs_checkpoint_whose_evaluation_is_due(tmp_path, options):
    with pytest.raises(Stopped):
        dpo(options(tmp_path / "one", max_steps=6), callbacks=[Signal(6)])
    older = {"resume": str(tmp_path / "one" / "checkpoint-6")}
    dpo(options(tmp_path / "two", max_steps=6, **older))
    assert checkpoint.damage(tmp_path / "two" / "checkpoint-6") is None


def test_metrics_that_are_gone_are_missed(tmp_path, options, capfd):
    config = options(tmp_path, max_steps=4)
    with pytest.raises(Stopped):
        dpo(config, callbacks=[Signal(3)])
    (tmp_path / "metrics.jsonl").unlink()
    dpo(config)
    assert "metrics.jsonl holds 0 of the 2 lines" in capfd.readouterr().err


def test_files_are_as_readable_as_their_folder(tmp_path, options):
    dpo(options(tmp_path, max_steps=2))
    for path in ("model.safetensors", "checkpoint-2/model.safetensors", "reference_logps"):
        for file in (tmp_path / path, *(tmp_path / path).glob("*.safetensors")):
            mode = (tmp_path / "metrics.jsonl").stat().st_mode
            assert file.is_dir() or file.stat().st_mode == mode, file


def test_every_callback_ends(tmp_path, options):
    ended = []

    class End(Callback):
        def on_end(self):
            ended.append(self)
            raise RuntimeError("a tracker's server is gone")

    with pytest.raises(RuntimeError):
        dpo(options(tmp_path, max_steps=1), callbacks=[End(), End()])
    assert len(ended) == 2


def test_sums_come_back_as_they_were():
    whole, parts = MetricSums(), MetricSums()
    for number in (1 / 3, 1 / 7):
        values = {"loss": (torch.tensor(number, dtype=torch.float64), torch.tensor(3.0))}
        whole.add(values)
        parts.add(values)
        again = MetricSums()
        again.load(json.loads(json.dumps(parts.state())))
        parts = again
    assert parts.state() == whole.state()


def test_model_only_checkpoints_are_small_and_start_no_run(tmp_path, options):
    config = options(tmp_path / "run", save_only_model=True, max_steps=4)
    dpo(config)
    (newest,) = (tmp_path / "run").glob("checkpoint-4")
    assert not (newest / "state.pt").exists() and (newest / "model.safetensors").exists()
    with pytest.raises(CheckpointError, match="checkpoint-4 holds the model alone"):
        dpo(config)
    dpo(options(tmp_path / "next", model_name_or_path=str(newest), max_steps=1))


def test_a_stop_saves_all_even_where_only_models_are_kept(tmp_path, options):
    config = options(tmp_path / "run", save_only_model=True)
    with runs.Run(config) as child:
        assert child.until("step", 5)
        child.signal(signal.SIGTERM)
        assert child.end() == 0
    last = checkpoint.complete(tmp_path / "run")[-1]
    assert (last / "state.pt").exists()
    runs.kill(config, "step", 4, 0)
    assert runs.finish(config) == 0


class Count:
    """How often the reference was asked; ``limit`` ends the fill."""

    def __init__(self, limit=None):
        self.limit, self.calls, self.score = limit, 0, reference.score

    def __call__(self, *args):
        if self.calls == self.limit:
            raise KeyboardInterrupt
        self.calls += 1
        return self.score(*args)


def test_an_interrupted_fill_goes_on_and_is_shared(tmp_path, options, monkeypatch):
    cache = tmp_path / "cache"
    config = options(tmp_path / "a", reference_cache=str(cache), max_steps=2)
    counts = [Count(limit=5), Count(limit=4), Count()]
    for count in counts[:2]:
        monkeypatch.setattr(reference, "score", count)
        with pytest.raises(KeyboardInterrupt):
            dpo(config)
        (partial,) = cache.glob("*.partial")
        with partial.open("ab") as file:
            file.write(b"torn")
    monkeypatch.setattr(reference, "score", counts[2])
    dpo(config)
    assert sum(count.calls for count in counts) == 12 + 3  # 24 and 6 pairs, two a batch
    third = Count()
    monkeypatch.setattr(reference, "score", third)
    dpo(config | {"output_dir": str(tmp_path / "b")})
    dpo(options(tmp_path / "c", reference_cache=str(cache), max_steps=2, max_length=1000))
    assert third.calls == 0  # another limit that cut nothing: the same tokens
    assert not runs.differences(tmp_path / "a", tmp_path / "b")
    assert sorted(p.suffix for p in cache.iterdir()) == [".safetensors"] * 2
    dpo(options(tmp_path / "d", reference_cache=str(cache), max_steps=2, max_length=20))
    assert third.calls == 12 + 3


def test_a_damaged_cache_is_refused_by_name(tmp_path, options):
    config = options(tmp_path / "a", reference_cache=str(tmp_path / "cache"), max_steps=1)
    dpo(config)
    for path in (tmp_path / "cache").iterdir():
        flip(path)
        with pytest.raises(CheckpointError, match=r"\.safetensors.*delete it"):
            dpo(config)
        path.unlink()
        dpo(config)


def test_scores_that_are_no_numbers_are_refused(tmp_path, options, monkeypatch):
    monkeypatch.setattr(reference, "score", lambda *args: torch.full((4,), float("nan")))
    with pytest.raises(DivergedError, match="reference's log-probs of the rows 0, 1 are not"):
        dpo(options(tmp_path))
