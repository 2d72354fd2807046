"""Slots on clusters of unlike nodes, and on one that grows: Ray's own test cluster, GPUs made up."""

import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from rich.console import Console
from small_cohort import write_small_cohort

from core.errors import UserError
from distributed.run.code import code_version
from distributed.run.folder import create_run
from distributed.slots.cluster import check_shared, connect, fit_slots

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
MEMORY = 80_000_000
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def cluster():
    """A head of 3 CPUs and no GPU, a worker of 2 CPUs and 1 GPU."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 3,
            "num_gpus": 0,
            "object_store_memory": MEMORY,
            "include_dashboard": False,
        },
    )
    cluster.add_node(num_cpus=2, num_gpus=1, object_store_memory=MEMORY)
    try:
        with connect(cluster.address, Console(quiet=True)):
            yield cluster
    finally:
        cluster.shutdown()


def test_a_worker_is_no_larger_than_the_node_it_must_fit_on(cluster):
    # (CPUs, GPUs) of a worker by hand; of 5 CPUs together no node has more than 3, the one with the GPU has 2
    cases = {
        (1, 1, None): (2, 1),  # the GPU node's CPUs, not the head's
        (1, 1, 0): (3, 0),  # on the head
        (2, 1, 0): (2, 0),  # one on each
        (4, 1, 0): (1, 0),  # three on the head, one beside; two of 2 CPUs would fit only twice
        (1, 2, 0): (2, 0),  # two workers of one slot, one on each node
        (2, 1, 0.5): (1, 0.5),  # both on the GPU node
    }
    for (slots, workers, gpus), (cpus, gpus_each) in cases.items():
        planned, count = fit_slots(slots, workers, gpus, trials=9)
        assert (count, planned.count, planned.cpus, planned.gpus) == (slots, workers, cpus, gpus_each)
    assert fit_slots(None, 1, 0, trials=9)[1] == 5
    assert fit_slots(None, 1, None, trials=9)[1] == 1
    with pytest.raises(UserError, match="at most 1 do"):
        fit_slots(2, 1, 1, trials=9)


def test_what_is_planned_can_be_scheduled(cluster):
    for slots, workers, gpus in ((1, 1, None), (2, 1, 0), (1, 2, 0), (2, 1, 0.5)):
        planned, _ = fit_slots(slots, workers, gpus, trials=9)
        group = ray.util.placement_group([{"CPU": planned.cpus, "GPU": planned.gpus}] * (slots * workers))
        assert group.wait(20), (slots, workers, gpus)
        ray.util.remove_placement_group(group)


def test_a_folder_that_another_node_does_not_see_is_refused(cluster, tmp_path):
    check_shared(tmp_path)  # both nodes are this machine
    with pytest.raises(UserError, match=r"does not see .*nowhere"):
        check_shared(tmp_path / "nowhere")


def test_nodes_that_come_with_the_work_are_awaited(cluster, monkeypatch):
    with pytest.raises(UserError, match="at most 1 do"):
        fit_slots(2, 1, 1, trials=9)
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "40")

    with ThreadPoolExecutor() as pool:  # Ray's test cluster adds nodes from the main thread only
        planning = pool.submit(fit_slots, 2, 1, 1, trials=9)
        time.sleep(3)
        assert not planning.done()
        cluster.add_node(num_cpus=2, num_gpus=1, object_store_memory=MEMORY)  # as the autoscaler would
        planned, slots = planning.result(timeout=60)
    assert (slots, planned.cpus, planned.gpus) == (2, 2, 1)
    deadline = time.time() + 20
    while ray.available_resources().get("GPU") != 2:  # nothing stays reserved; Ray frees it by and by
        assert time.time() < deadline, ray.available_resources()
        time.sleep(0.2)


def test_addresses_and_folders_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(UserError, match="ray job submit"), connect("ray://head:10001", Console(quiet=True)):
        pass
    with (
        pytest.raises(UserError, match=r"no Ray cluster at 127.0.0.1:1: "),
        connect("127.0.0.1:1", Console(quiet=True)),
    ):
        pass
    job = tmp_path / "working_dir_files" / "_ray_pkg_0123" / "runs" / "demo"
    with pytest.raises(UserError, match="deleted with its Ray job"):
        create_run(job, "sweep", {}, {}, write_small_cohort(tmp_path / "cohort", subjects=4))
    assert not job.exists()


def test_a_copy_without_git_still_says_which_sources_it_runs(tmp_path):
    here = code_version().sources
    copied = tmp_path / "copy"
    for package in ("core", "distributed", "search_spaces"):
        shutil.copytree(ROOT / package, copied / package)
    asking = [
        sys.executable,
        "-c",
        "from distributed.run.code import code_version as v; print(v().sources)",
    ]

    def asked():
        return subprocess.run(asking, cwd=copied, capture_output=True, text=True, check=True).stdout.strip()

    assert asked() == here
    (copied / "core" / "errors.py").open("a").write("# changed\n")
    assert asked() != here
