"""Which lines go into which figure, and what becomes of long ones."""

import math
import random
import statistics

import pytest

from fastpref.report.plots import (
    LEARNING,
    LONG,
    MACHINE,
    POINTS,
    figures,
    loss_figures,
    smoothed,
    thinned,
)
from fastpref.report.read import read

SIDES = ["Implicit rewards", "Log-probs"]


def test_one_run_shows_chosen_and_rejected_in_one_figure(make_run):
    drawn = {f.title: f for f in figures(LEARNING, read([make_run("run")]))}
    for title in SIDES:
        assert [line.label for line in drawn[title].lines] == ["chosen", "rejected"]
    assert [line.label for line in drawn["Reward margin"].lines] == [""]
    line = drawn["Reward margin"].lines[0]
    assert len(line.training) == 20 and len(line.evaluation) == 4
    assert line.evaluation[-1] == (40, pytest.approx(0.02 * 40 * 0.8))


def test_several_runs_get_a_figure_for_each_metric(make_run):
    drawn = {f.title: f for f in figures(LEARNING, read([make_run("a"), make_run("b")]))}
    assert not drawn.keys() & set(SIDES)
    for title in (f"{side}, {which}" for side in SIDES for which in ("chosen", "rejected")):
        assert [(line.label, line.style) for line in drawn[title].lines] == [("a", 0), ("b", 1)]


def test_a_run_keeps_its_colour_where_others_lack_the_metric(make_run):
    old = [{"step": 1, "loss": 0.6, "rewards/margins": 0.1}]
    drawn = {f.title: f for f in figures(MACHINE, read([make_run("old", old), make_run("new")]))}
    assert [(line.label, line.style) for line in drawn["Memory"].lines] == [("new", 1)]


def test_different_losses_share_no_figure(make_run):
    text = [{"step": 1, "loss": 3.0, "eval_loss": 3.1}]
    runs = read(
        [
            make_run("sft", text),
            make_run("a"),
            make_run("b"),
            make_run("c", None, {"loss_type": "ipo"}),
        ]
    )
    drawn = {f.title: [line.label for line in f.lines] for f in loss_figures(runs)}
    starts = [f.title for f in loss_figures(runs) if "ln 2" in f.caption]
    assert starts == ["Loss, sigmoid"]
    assert drawn == {"Loss, SFT": ["sft"], "Loss, sigmoid": ["a", "b"], "Loss, ipo": ["c"]}
    assert [(f.title, f.unit) for f in loss_figures(runs[:1])] == [("Loss", "nats per token")]


def test_what_is_never_finite_has_no_figure(make_run):
    rows = [{"step": s, "loss": 1.0, "grad_norm": None} for s in (1, 2)]
    assert figures(MACHINE, read([make_run("run", rows)])) == []


def test_thinning_keeps_ends_extremes_and_gaps():
    rng = random.Random(0)
    curve = [(step, rng.random()) for step in range(50_000)]
    curve[12_345] = (12_345, 7.0)
    curve[23_456] = (23_456, -7.0)
    curve[34_567] = (34_567, math.nan)
    kept = thinned(curve)
    assert len(kept) < POINTS + 10
    steps = [step for step, _ in kept]
    assert steps == sorted(steps) and {0, 12_345, 23_456, 34_567, 49_999} <= set(steps)
    assert set(kept) <= set(curve)
    assert thinned(curve[:POINTS]) == curve[:POINTS]


def test_smoothing():
    curve = [(step, float(step)) for step in range(LONG)]
    half = LONG // 60
    assert smoothed(curve[:-1], statistics.fmean) == []
    found = smoothed(curve, statistics.fmean)
    assert found[0] == (0, half / 2) and found[100] == (100, 100.0)
    curve[100] = (100, 1e6)
    curve[50] = (50, math.nan)
    found = smoothed(curve, statistics.median)
    assert found[100][1] < 110 and math.isnan(found[50][1]) and math.isfinite(found[51][1])
