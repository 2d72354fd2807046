"""Volumes as workers get them: the same bytes in the same order from memory, disk, object store or a stream."""

import dataclasses

import h5py
import numpy as np
import pytest
import ray
import torch
from rich.console import Console
from small_cohort import write_small_cohort

from core.errors import UserError
from core.volumes.cohort.moments import pooled_statistics, volume_moments
from core.volumes.images.preprocess import fit_intensity_statistics
from distributed.batches import hold as data
from distributed.batches import resident
from distributed.batches.hold import batches, choose_mode, hold, read_ahead
from distributed.batches.in_process import Direct, InMemory, bytes_of_a_volume
from distributed.batches.plan import Plan
from distributed.batches.resident import Resident
from distributed.batches.streaming import Streaming
from distributed.slots.cluster import connect, fit_slots

ROWS = np.array([7, 0, 23, 7])
CPU = torch.device("cpu")
PLAN = Plan(np.arange(24), 5, seed=1, epochs=range(1, 4))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_small_cohort(tmp_path_factory.mktemp("cohort") / "small")


def moments_of(cohort):
    return InMemory.of(cohort).moments(np.arange(len(cohort)))


def test_in_memory_and_direct_give_the_rows_asked_in_order(cohort):
    expected = cohort.read(ROWS)
    for volumes in (InMemory.of(cohort), Direct(cohort.address, moments_of(cohort))):
        np.testing.assert_array_equal(np.asarray(volumes.read(ROWS), dtype=np.float32), expected)
        into = np.empty((4, *cohort.volume_shape), np.float16)
        assert volumes.read(ROWS, out=into) is into
        np.testing.assert_array_equal(into.astype(np.float32), expected)


def test_batches_are_read_one_ahead_and_are_whole_when_they_are_given(cohort):
    volumes = Direct(cohort.address, moments_of(cohort))
    given = [
        (batch.volumes.clone(), rows)
        for batch, rows in zip(batches(volumes, PLAN, CPU), PLAN.batches(), strict=True)
    ]
    assert len(given) == 3 * 5
    for batch, rows in given:
        assert batch.dtype == torch.float16
        np.testing.assert_array_equal(batch.float().numpy(), cohort.read(rows))


def test_reading_ahead_passes_errors_on_and_stops_when_it_is_closed(cohort):
    read = []

    class Failing(InMemory):
        def read(self, rows, out=None, boxes=None):
            read.append(len(rows))
            if len(read) == 4:
                raise UserError("damaged volume: shard x")
            return super().read(rows, out, boxes)

    volumes = Failing(InMemory.of(cohort).volumes, np.ones((24, 1), np.float32))
    with pytest.raises(UserError, match="damaged volume: shard x"):
        list(read_ahead(volumes, PLAN.parts(), CPU))
    read.clear()
    reading = read_ahead(volumes, PLAN.parts(), CPU)
    next(reading)
    reading.close()
    assert len(read) == 2  # the one given, and the one ahead


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_statistics_of_any_fold_are_those_of_its_voxels(offset):
    generator = np.random.default_rng(0)
    volumes = [generator.normal(offset, 1 + row, (2, 5, 6, 7)).astype(np.float32) for row in range(9)]
    for volume in volumes:
        volume[:, generator.random((5, 6, 7)) < 0.5] = 0
    volumes[4][1] = 0  # a channel without a single voxel
    moments = np.stack([volume_moments(volume) for volume in volumes])
    for fold in ([0, 1, 2], [8, 4, 3], list(range(9))):
        pooled = pooled_statistics(moments[fold])
        for channel in range(2):
            voxels = np.concatenate([volumes[row][channel].ravel() for row in fold]).astype(np.float64)
            voxels = voxels[voxels != 0]
            assert pooled.mean[channel] == pytest.approx(voxels.mean(), rel=1e-12)
            assert pooled.sd[channel] == pytest.approx(voxels.std(), rel=1e-10)
        again = fit_intensity_statistics(volumes[row] for row in fold)
        np.testing.assert_allclose(pooled, again, rtol=1e-12)


def test_moments_of_whole_numbers_with_a_factor_are_those_of_the_real_values():
    stored = np.random.default_rng(0).integers(-300, 300, (2, 4, 4, 4)).astype(np.int16)
    scale = np.array([0.25, 3.0], np.float32)
    real = stored * scale[:, None, None, None]
    np.testing.assert_allclose(volume_moments(stored, scale), volume_moments(real), rtol=1e-12)


@pytest.mark.parametrize("volumes", [np.zeros((0, 1, 3)), np.array([[[5.0, 2.0, 0.0]]])])
def test_statistics_without_a_spread_are_refused(volumes):
    with pytest.raises(UserError, match="differ in every channel"):
        pooled_statistics(volumes)


def test_the_way_to_read_is_chosen_by_size_place_and_compression(cohort):
    size = 24 * 12**3 * 2
    packed = dataclasses.replace(
        cohort, description=cohort.description.model_copy(update={"compression": "gzip"})
    )
    remote = dataclasses.replace(cohort, location="s3://bucket/cohort")
    assert [choose_mode(each, size) for each in (cohort, packed, remote)] == ["resident"] * 3
    assert [choose_mode(each, size - 1) for each in (cohort, packed, remote)] == [
        "direct",
        "streaming",
        "streaming",
    ]


@pytest.mark.slow
def test_a_resident_cohort_in_other_processes_and_what_fits(cohort, tmp_path, monkeypatch):
    expected = cohort.read(ROWS)
    with connect(None, Console(quiet=True)):
        monkeypatch.setattr(resident, "BLOCK_BYTES", 5 * bytes_of_a_volume(cohort))
        held = Resident.of(cohort)
        assert len(held.references) == 5  # 24 rows in blocks of 5
        np.testing.assert_array_equal(held.read(ROWS).astype(np.float32), expected)
        assert not held._block(0).flags.owndata  # mapped, not copied
        elsewhere = ray.get(ray.remote(lambda volumes: volumes.read(ROWS)).remote(held))
        np.testing.assert_array_equal(elsewhere.astype(np.float32), expected)
        np.testing.assert_array_equal(held.moments(ROWS), InMemory.of(cohort).moments(ROWS))

        assert isinstance(hold(cohort), Resident)
        assert type(hold(cohort, "direct")) is Direct
        streaming = hold(cohort, "streaming")
        assert isinstance(streaming, Streaming)
        np.testing.assert_array_equal(streaming.known, held.known)
        monkeypatch.setattr(data, "OBJECT_STORE_SHARE", 1e-9)
        assert type(hold(cohort)) is Direct
        with pytest.raises(UserError, match="does not fit"):
            hold(cohort, "resident")

        damaged = write_small_cohort(tmp_path / "damaged")
        with h5py.File(next((damaged.folder / "shards").glob("*.h5")), "r+") as shard:
            shard["volumes"][3, 0, 6, 6, 6] += 1
        for mode in ("streaming", "direct"):
            with pytest.raises(UserError, match="sub-003"):
                hold(damaged, mode)
        with pytest.raises(UserError, match="sub-003"):
            Resident.of(damaged)

        cpus = int(ray.cluster_resources()["CPU"])
        with pytest.raises(UserError, match=f"at most {cpus} do"):
            fit_slots(slots=cpus + 1, workers=1, gpus_per_worker=None, trials=9)
        with pytest.raises(UserError, match="NCCL needs a whole GPU"):
            fit_slots(slots=1, workers=2, gpus_per_worker=0.5, trials=9)
        assert fit_slots(slots=None, workers=1, gpus_per_worker=None, trials=1)[1] == 1


def test_an_address_where_no_cluster_is():
    with (
        pytest.raises(UserError, match="no Ray cluster at"),
        connect("127.0.0.1:1", Console(quiet=True)),
    ):
        pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_a_gpu_are_those_of_the_disk(cohort):
    volumes = Direct(cohort.address, moments_of(cohort))
    device = torch.device("cuda")
    for batch, rows in zip(batches(volumes, PLAN, device), PLAN.batches(), strict=True):
        assert batch.volumes.device.type == "cuda"
        np.testing.assert_array_equal(batch.volumes.float().cpu().numpy(), cohort.read(rows))
