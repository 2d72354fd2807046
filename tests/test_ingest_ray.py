from __future__ import annotations

import numpy as np
import psutil
import pytest
import ray
from test_ingest import SETTINGS, contents, study_of_several_shards

from core.errors import UserError
from core.volumes.ingest.cohort import ingest
from core.volumes.sources import list_scans
from distributed.commands import on_ray as parallel
from distributed.commands.on_ray import at_a_time, in_parallel, task_bytes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module", autouse=True)
def ray_of_two_cores():
    others = psutil.Process().children(recursive=True)  # such as the helper of an earlier test's processes
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20,
        log_to_driver=False, logging_level="ERROR",
    )  # fmt: skip
    started = set(psutil.Process().children(recursive=True)) - set(others)
    yield
    ray.shutdown()
    _, alive = psutil.wait_procs(started, timeout=240)
    assert not alive


def test_in_parallel_gives_the_same_bytes_and_tells_of_every_shard(tmp_path, capfd):
    listing = list_scans(study_of_several_shards(tmp_path / "study"), kind="bids")
    alone = ingest(listing, tmp_path / "alone" / "c", SETTINGS)
    steps = []
    together = ingest(
        listing,
        tmp_path / "together" / "c",
        SETTINGS,
        run=in_parallel,
        on_progress=lambda *step: steps.append(step),
    )
    assert contents(tmp_path / "together" / "c") == contents(tmp_path / "alone" / "c")
    assert together.rejects == alone.rejects
    assert len(together.rejects) == 2
    assert len(steps) == 3
    assert steps[-1][:2] == (10, 10)
    assert capfd.readouterr() == ("", "")


def test_an_error_of_a_task_is_one_line_and_the_rest_can_go_on(tmp_path, capfd):
    listing = list_scans(study_of_several_shards(tmp_path / "study"), kind="bids")
    with pytest.raises(UserError, match=r"^\S*study: sub-0[56]: .*") as caught:
        ingest(listing, tmp_path / "c", SETTINGS, strict=True, run=in_parallel)
    assert "\n" not in str(caught.value)
    assert "Traceback" not in "".join(capfd.readouterr())
    assert len(ingest(listing, tmp_path / "c", SETTINGS, run=in_parallel).cohort) == 8


def test_memory_bounds_how_many_run_at_once(tmp_path, monkeypatch):
    listing = list_scans(study_of_several_shards(tmp_path / "study"), kind="bids")
    sizes = []

    def run(tasks):
        sizes.append(task_bytes(tasks))
        return in_parallel(tasks)

    ingest(listing, tmp_path / "c", SETTINGS, run=run)
    assert 500 * 2**20 < sizes[0] < 510 * 2**20
    available = min(node["Resources"]["memory"] for node in ray.nodes())
    assert at_a_time(int(available * 0.3), 100) == 2  # two cores
    assert at_a_time(int(available * 0.6), 100) == 1
    assert at_a_time(int(available * 0.3), 1) == 1
    with pytest.raises(UserError, match=r"preparing one of these scans takes about .* GiB, but no machine"):
        at_a_time(int(available * 1.1), 100)
    monkeypatch.setattr(parallel, "PROCESS_BYTES", int(available * 0.6))
    assert len(ingest(listing, tmp_path / "d", SETTINGS, run=in_parallel).cohort) == 8


def test_every_voxel_is_the_one_that_this_process_makes(tmp_path):
    """Threads and libraries of a worker must not show in the voxels."""
    listing = list_scans(study_of_several_shards(tmp_path / "study"), kind="bids")
    settings = SETTINGS.model_copy(update={"spacing": 3.0, "shape": (50, 60, 50)})
    alone = ingest(listing, tmp_path / "alone", settings, dtype="float32").cohort
    together = ingest(listing, tmp_path / "together", settings, dtype="float32", run=in_parallel).cohort
    np.testing.assert_array_equal(alone.read(range(8)), together.read(range(8)))
