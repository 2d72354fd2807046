"""Slots under fire: what a killed worker, mailbox or slot costs. Real Ray, real SIGKILL."""

import math
import os
import signal
from pathlib import Path

import pytest
import ray
from ray import tune
from rich.console import Console

from distributed.slots.cluster import connect
from distributed.slots.slot import Slot, WorkerGroup, Workers, pack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def make_counter(folder):
    """A runner whose trials count their epochs in a file, and do as their assignment says."""

    def run(assignment):
        path = f"{folder}/{assignment['name']}"
        with open(path, "a") as log:
            log.write(f"{os.getpid()}\n")
        with open(path) as log:
            epochs = len(log.readlines())
        if assignment.get("kill_at") == epochs:
            os.kill(os.getpid(), signal.SIGKILL)
        if assignment.get("raise"):
            raise ValueError("no such luck")
        return {"value": float(epochs), "epochs": epochs, "finished": epochs >= 3, "done": epochs >= 3}

    return run


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # workers import this module by name
        with connect(None, Console(quiet=True)):
            yield


@pytest.fixture
def group(cluster, tmp_path):
    started = WorkerGroup(Workers(), pack(make_counter, folder=str(tmp_path)), str(tmp_path / "tune"))
    started.start()
    yield started
    started.stop()


def test_a_killed_worker_comes_back_and_is_given_the_same_order(group, tmp_path):
    assert group.run({"name": "a"})["epochs"] == 1
    answer = group.run(
        {"name": "b", "kill_at": 1}
    )  # dies in its first epoch, does it again after the restart
    assert answer["epochs"] == 2
    assert group.run({"name": "b"})["epochs"] == 3
    workers = (tmp_path / "b").read_text().split()
    assert len(set(workers)) == 2
    assert (tmp_path / "a").read_text().split() == [workers[0]]  # one worker served both trials before that


def test_two_slots_where_one_fits_take_turns(cluster, tmp_path):
    """Each holds all CPUs as long as it has a trial, and gives them up when it has none."""
    trainable = tune.with_parameters(
        Slot,
        workers=Workers(cpus=ray.cluster_resources()["CPU"]),
        runner=pack(make_counter, folder=str(tmp_path)),
        storage=str(tmp_path),
    )
    slot = ray.remote(num_cpus=0)(trainable)
    first = slot.remote({"assignment": {"name": "a", "folder": str(tmp_path / "a-files")}})
    assert ray.get(first.train.remote(), timeout=100)["epochs"] == 1
    second = slot.remote({"assignment": {"name": "b", "folder": str(tmp_path / "b-files")}})
    assert ray.get(second.train.remote(), timeout=100)["epochs"] == 1
    assert ray.get(first.train.remote(), timeout=100)["epochs"] == 2
    ray.get([first.stop.remote(), second.stop.remote()], timeout=100)


def test_a_slot_answers_for_a_trial_that_always_kills_it_and_serves_the_next(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "distributed.slots.slot.WORKER_RESTARTS", 0
    )  # each takes seconds; another test has one
    trainable = tune.with_parameters(
        Slot,
        workers=Workers(),
        runner=pack(make_counter, folder=str(tmp_path)),
        storage=str(tmp_path),
    )
    slot = trainable({"assignment": {"name": "bad", "folder": str(tmp_path / "bad-files"), "raise": True}})
    try:
        answer = slot.train()
        assert answer["done"]
        assert math.isnan(answer["value"])
        assert "no such luck" in answer["failed"]
        slot.reset({"assignment": {"name": "good", "folder": str(tmp_path / "good-files")}})
        assert slot.train()["epochs"] == 1
        ray.kill(slot.group.mailbox)
        slot.reset({"assignment": {"name": "after", "folder": str(tmp_path / "after-files")}})
        assert slot.train()["epochs"] == 1
    finally:
        slot.stop()
