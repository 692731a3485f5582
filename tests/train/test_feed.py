"""Micro-batches made ahead of time: in order, on another thread, errors and all."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch

from fastpref.data.tokenize import Group
from fastpref.methods.dpo import DPO
from fastpref.train.feed import Feed
from fastpref.train.metrics import Throughput

GROUPS = [Group([1, 2], ([3], [4, 5]), (None, None), row, {}) for row in range(4)]
CPU = torch.device("cpu")


@pytest.fixture
def feed():
    feed = Feed(DPO(), CPU, filler=GROUPS[3])
    yield feed
    feed.close()


def test_in_order_and_one_ahead(feed, monkeypatch):
    made = []
    plain = feed.make

    def make(groups):
        made.append((groups[0].row, threading.current_thread().name))
        return plain(groups)

    monkeypatch.setattr(feed, "make", make)
    parts = feed.ahead([[group] for group in GROUPS])
    assert next(parts).groups == GROUPS[:1]
    feed.soon(lambda: None).result()  # what was asked for is made by now
    assert [row for row, _ in made] == [0, 1]
    assert [part.batch.extras["row"].item() for part in parts] == [1, 2, 3]
    assert {name.split("_")[0] for _, name in made} == {"packing"}


def test_a_step_is_made_while_another_thread_computes(feed):
    begun, end = threading.Event(), threading.Event()

    def make():
        begun.set()
        end.wait(10)
        return feed.make(GROUPS[:2])

    coming = feed.soon(make)
    assert begun.wait(10) and not coming.done()
    end.set()
    assert coming.result().batch.groups.tolist() == [0, 2, 4]


def test_errors_reach_who_takes_the_batch(feed):
    bad = Group([], ([3], [4]), (None, None), 7, {})
    parts = feed.ahead([GROUPS[:1], [bad]])
    assert next(parts).groups == GROUPS[:1]
    with pytest.raises(ValueError, match="row 7"):
        next(parts)


def test_nothing_to_do_is_a_filler(feed):
    part = feed.make([])
    assert part.groups == [] and part.batch.extras["row"].tolist() == [3]
    assert part.trained is part.batch


def test_pinned_for_a_gpu_alone(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x)
    for device, count in (("cpu", 0), ("cuda", 10)):
        feed = Feed(DPO(), torch.device(device))
        batch = feed.make(GROUPS[:2]).batch
        feed.close()
        assert len(pinned) == count
    tensors = [batch.input_ids, batch.rows, batch.segments.cu_k, batch.extras["row"]]
    assert {id(x) for x in tensors} <= {id(x) for x in pinned}


def test_close_drops_what_is_not_begun():
    feed = Feed(DPO(), CPU)
    began = threading.Event()
    feed.soon(lambda: (began.set(), time.sleep(0.2)))
    began.wait(10)
    late = feed.soon(lambda: feed.make(GROUPS))
    feed.close()
    assert late.cancelled()


def test_throughput_by_hand(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    work = Throughput(SimpleNamespace(device=torch.device("cuda"), world_size=2))
    for _ in range(2):
        work.count(tokens=600, computed=400, flops=4 * 989e12)
        work.seconds += 5.0
    assert work.read() == {
        "tokens_per_second": 120.0,
        "computed_tokens_per_second": 80.0,
        "tflops_per_second": pytest.approx(0.4 * 989),
        "mfu": pytest.approx(0.4),
    }
    work.count(1, 1, 1e12)
    work.seconds += 1.0
    assert work.read()["tokens_per_second"] == 1.0
    cpu = Throughput(SimpleNamespace(device=CPU, world_size=1))
    cpu.count(1, 1, 1e12)
    cpu.seconds = 1.0
    assert "mfu" not in cpu.read()
