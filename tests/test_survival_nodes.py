"""Two nodes, of which one goes and another comes during a sweep; one trial on both."""

import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import ray
import small_cohort
import torch
from of_age import assign
from optuna.trial import TrialState
from process_helpers import ROOT, command, end_marked, environment, finished_trials, study_of, wait_until
from ray import train
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console
from small_cohort import SMALL, write_small_cohort
from test_survival import each_epoch_once

from core.config import merge, resolve
from core.evaluation.splits import make_splits
from distributed.batches.hold import hold
from distributed.slots.cluster import connect, fit_slots
from distributed.slots.slot import WorkerGroup, pack
from distributed.training.subjects import Subjects
from distributed.training.trial import make_runner
from search_spaces import published

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(900)]
SIZE = {"num_cpus": 1, "object_store_memory": 80_000_000}


@pytest.fixture
def cluster(monkeypatch):
    """A head with a made-up GPU and another node, one CPU each."""
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{ROOT}")  # workers import this module by name
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cluster = Cluster(initialize_head=True, head_node_args=SIZE | {"num_gpus": 1, "include_dashboard": False})
    cluster.other = cluster.add_node(**SIZE)
    yield cluster
    if ray.is_initialized():
        ray.shutdown()
    cluster.shutdown()


def test_a_node_goes_and_another_comes_and_no_trial_is_lost(cluster, tmp_path):
    write_small_cohort(tmp_path / "cohort", subjects=24)
    folder, mark = tmp_path / "run", f"nodes-{os.getpid()}"
    words = command(
        "sweep", "cohort", "--trials", 8, "--folds", 2, "--slots", 2, "--scheduler", "none", "--out", "run",
        "--gpus-per-worker", 0, "--set", "training.epochs=4", "--address", cluster.address,
    )  # fmt: skip
    # a Ray that an earlier test began in this process may have turned tokens on
    tokens = {name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH")}
    with (tmp_path / "log").open("w") as log:
        sweep = subprocess.Popen(words, cwd=tmp_path, env=environment(mark, **tokens), stdout=log, stderr=log)
    try:
        assert wait_until(lambda: len(finished_trials(folder)) >= 2, 400), (tmp_path / "log").read_text()[
            -3000:
        ]
        cluster.remove_node(cluster.other, allow_graceful=False)
        at_loss = len(finished_trials(folder))
        assert wait_until(lambda: len(finished_trials(folder)) >= at_loss + 2, 300)  # the other slot goes on
        cluster.add_node(**SIZE)
        sweep.wait(timeout=500)
    finally:
        sweep.send_signal(signal.SIGKILL)
        left = end_marked(mark)
    assert sweep.returncode == 0, (tmp_path / "log").read_text()[-3000:]
    assert [trial.state for trial in study_of(folder).get_trials()] == [TrialState.COMPLETE] * 8
    each_epoch_once(folder, 8, 2, 4)
    assert not left


def make_witness(folder):
    """A runner that says where it runs, and adds up its rank with those of its companions."""

    def run(assignment):
        rank = train.get_context().get_world_rank()
        total = torch.tensor([float(rank + 1)])
        if train.get_context().get_world_size() > 1:
            torch.distributed.all_reduce(total)
        where = {
            "node": ray.get_runtime_context().get_node_id(),
            "gpus": ray.get_gpu_ids(),
            "total": total.item(),
        }
        Path(folder, f"{assignment['name']}-{rank}").write_text(repr(where))
        return {"value": 0.0, "done": True}

    return run


def said(folder, name):
    return eval((folder / name).read_text())


def test_one_trial_trains_on_two_nodes(cluster, tmp_path):
    cohort = write_small_cohort(tmp_path / "cohort", subjects=24)
    with connect(cluster.address, Console(quiet=True)):
        both, slots = fit_slots(1, 2, 0, trials=4)
        assert (both.count, both.cpus, slots) == (2, 1, 1)
        group = WorkerGroup(both, pack(make_witness, folder=str(tmp_path)), str(tmp_path / "tune"))
        group.start()
        group.run({"name": "both"})
        group.stop()
        ranks = [said(tmp_path, f"both-{rank}") for rank in (0, 1)]
        assert ranks[0]["node"] != ranks[1]["node"]
        assert [rank["total"] for rank in ranks] == [3.0, 3.0]

        subjects = Subjects.of(cohort, make_splits(cohort.manifest, folds=2), hold(cohort))
        group = WorkerGroup(both, pack(make_runner, subjects=subjects), str(tmp_path / "tune"))
        group.start()
        settings = resolve(merge(published("brain_age"), SMALL)).model_dump(mode="json")
        answers = [group.run(assign(tmp_path / "0000", settings, [{"fold": 0, "seed": 0}])) for _ in range(2)]
        group.stop()
        assert [answer["finished"] for answer in answers] == [False, True]
        assert np.isfinite([answer["loss"] for answer in answers]).all()


@ray.remote(num_cpus=0)
def _read(volumes, rows):
    return volumes.read(rows)


def test_a_cohort_whose_node_is_gone_is_read_again_though_slots_hold_every_cpu(
    cluster, tmp_path, monkeypatch
):
    monkeypatch.setattr(small_cohort, "SIDE", 48)  # blocks below 100 kB would lie with the driver
    cohort = write_small_cohort(tmp_path / "cohort", subjects=24)
    with connect(cluster.address, Console(quiet=True)):
        held = ray.util.placement_group([{"CPU": 1, "GPU": 0.1}])  # as slots hold the head, which has the GPU
        assert held.wait(20)
        volumes = hold(cohort)  # so all blocks are read on the other node
        head = cluster.head_node.node_id
        cluster.remove_node(cluster.other, allow_graceful=False)
        rows = np.arange(len(cohort))
        there = NodeAffinitySchedulingStrategy(head, soft=False)
        read = ray.get(_read.options(scheduling_strategy=there).remote(volumes, rows), timeout=60)
        np.testing.assert_array_equal(np.asarray(read, np.float32), cohort.read(rows))
