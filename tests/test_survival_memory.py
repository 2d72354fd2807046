"""Memory that runs out: of the machine in one trial, of the object store by somebody else. Real Ray."""

import math
import os
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
import small_cohort
from of_age import assign
from process_helpers import ROOT
from ray import tune
from small_cohort import SMALL, write_small_cohort

from core.config import merge, resolve
from core.evaluation.splits import make_splits
from distributed.batches.hold import hold
from distributed.batches.in_process import InMemory
from distributed.batches.resident import Resident
from distributed.slots.cluster import QUIET
from distributed.slots.slot import Slot, WorkerGroup, Workers, pack
from distributed.training.subjects import Subjects
from distributed.training.trial import Runner, make_runner
from search_spaces import published

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(900)]
STORE = 80_000_000
HEADROOM = 2.5e9
"""Bytes above what the machine uses now, at which Ray ends the largest worker."""


@pytest.fixture
def local_ray(monkeypatch, request):
    """A Ray of this test alone, with a small object store, and a low limit to memory where a test says so."""
    memory = psutil.virtual_memory()
    if memory.available < 3 * HEADROOM:
        pytest.skip("too little memory is free for running out of it in safety")
    limit = (memory.total - memory.available + HEADROOM) / memory.total
    more = {"RAY_memory_usage_threshold": f"{limit:.3f}", "RAY_memory_monitor_refresh_ms": "100"}
    wanted = {**QUIET, "PYTHONPATH": f"{Path(__file__).parent}:{ROOT}", "OMP_NUM_THREADS": "1"}
    for name, value in (wanted | (more if getattr(request, "param", None) else {})).items():
        monkeypatch.setenv(name, value)
    ray.init(
        address="local", num_cpus=1, object_store_memory=STORE, include_dashboard=False, log_to_driver=False
    )
    yield limit
    ray.shutdown()


def make_glutton(folder):
    """A runner whose trial `glutton` takes memory until it is ended, at most twice what is allowed."""

    def run(assignment):
        with Path(folder, assignment["name"]).open("a") as log:
            log.write(f"{os.getpid()}\n")
        if assignment["name"] == "glutton":
            taken = []
            while sum(map(len, taken)) < 2 * HEADROOM:
                taken.append(np.ones(2**26, np.uint8))
                time.sleep(0.02)
            time.sleep(20)
        return {"value": 1.0, "epochs": 1, "finished": True, "done": True}

    return run


@pytest.mark.parametrize("local_ray", [True], indirect=True)
def test_a_trial_that_takes_all_memory_is_ended_a_few_times_then_fails_and_the_next_is_served(
    local_ray, tmp_path
):
    trainable = tune.with_parameters(
        Slot,
        workers=Workers(),
        runner=pack(make_glutton, folder=str(tmp_path)),
        storage=str(tmp_path),
    )
    slot = trainable({"assignment": {"name": "glutton", "folder": str(tmp_path / "glutton-files")}})
    try:
        answer = slot.train()
        attempts = (tmp_path / "glutton").read_text().split()
        assert answer["done"]
        assert math.isnan(answer["value"])
        assert "memory" in answer["failed"], answer["failed"]
        assert 2 <= len(set(attempts)) == len(attempts) <= 6  # each in a fresh worker, and not for ever
        slot.reset({"assignment": {"name": "modest", "folder": str(tmp_path / "modest-files")}})
        assert slot.train()["value"] == 1.0
    finally:
        slot.stop()


def test_an_object_store_that_others_have_filled_costs_time_and_no_trial(local_ray, tmp_path, monkeypatch):
    monkeypatch.setattr(small_cohort, "SIDE", 48)
    cohort = write_small_cohort(tmp_path / "cohort", subjects=24)
    splits = make_splits(cohort.manifest, folds=2)
    settings = resolve(merge(published("brain_age"), SMALL | {"training.epochs": 1})).model_dump(mode="json")
    cells = [{"fold": 0, "seed": 0}]
    alone = Runner(Subjects.of(cohort, splits, InMemory.of(cohort)))
    expected = alone(assign(tmp_path / "alone", settings, cells))

    fillers = [ray.put(np.zeros(STORE // 8, np.uint8)) for _ in range(8)]
    held = [ray.get(filler) for filler in fillers]  # mapped: they can be neither evicted nor spilled
    volumes = hold(cohort)
    assert isinstance(volumes, Resident)
    runner = pack(make_runner, subjects=Subjects.of(cohort, splits, volumes))
    group = WorkerGroup(Workers(), runner, str(tmp_path / "tune"))
    group.start()
    try:
        answer = group.run(assign(tmp_path / "crowded", settings, cells))
    finally:
        group.stop()
    assert answer["finished"]
    assert answer["value"] == pytest.approx(expected["value"], rel=1e-6)
    assert sum(map(len, held)) > 0.9 * STORE
