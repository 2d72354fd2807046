"""Volumes as workers get them: the same bytes whether held in memory, in the object store or on disk."""

import h5py
import numpy as np
import pytest
import ray
from rich.console import Console
from small_cohort import write_small_cohort

from core.errors import UserError
from distributed import data
from distributed.cluster import connect, plan_slots
from distributed.data import InMemory, OnDisk, Resident, hold

ROWS = np.array([7, 0, 23, 7])


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_small_cohort(tmp_path_factory.mktemp("cohort") / "small")


def test_in_memory_and_on_disk_give_the_rows_asked_in_order(cohort):
    expected = cohort.read(ROWS)
    for volumes in (InMemory.of(cohort), OnDisk(str(cohort.folder))):
        np.testing.assert_array_equal(np.asarray(volumes.read(ROWS), dtype=np.float32), expected)


@pytest.mark.slow
def test_a_resident_cohort_in_other_processes_and_what_fits(cohort, tmp_path, monkeypatch):
    expected = cohort.read(ROWS)
    with connect(None, Console(quiet=True)):
        monkeypatch.setattr(data, "BLOCK_BYTES", 5 * data._bytes_of_a_volume(cohort))
        resident = Resident.of(cohort)
        assert len(resident.references) == 5  # 24 rows in blocks of 5
        np.testing.assert_array_equal(resident.read(ROWS).astype(np.float32), expected)
        assert not resident._block(0).flags.owndata  # mapped, not copied
        elsewhere = ray.get(ray.remote(lambda volumes: volumes.read(ROWS)).remote(resident))
        np.testing.assert_array_equal(elsewhere.astype(np.float32), expected)

        assert isinstance(hold(cohort), Resident)
        monkeypatch.setattr(data, "OBJECT_STORE_SHARE", 1e-9)
        assert isinstance(hold(cohort), OnDisk)

        damaged = write_small_cohort(tmp_path / "damaged")
        with h5py.File(next((damaged.folder / "shards").glob("*.h5")), "r+") as shard:
            shard["volumes"][3, 0, 6, 6, 6] += 1
        with pytest.raises(UserError, match="sub-003"):
            Resident.of(damaged)

        cpus = int(ray.cluster_resources()["CPU"])
        with pytest.raises(UserError, match=f"at most {cpus} do"):
            plan_slots(slots=cpus + 1, workers=1, gpus_per_worker=None, trials=9)
        with pytest.raises(UserError, match="NCCL needs a whole GPU"):
            plan_slots(slots=1, workers=2, gpus_per_worker=0.5, trials=9)
        assert plan_slots(slots=None, workers=1, gpus_per_worker=None, trials=1)[1] == 1


def test_an_address_where_no_cluster_is():
    with (
        pytest.raises(UserError, match="no Ray cluster at"),
        connect("127.0.0.1:1", Console(quiet=True)),
    ):
        pass
