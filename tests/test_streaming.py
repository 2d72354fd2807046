"""Streams: the plan's batches by Ray Data, where slots hold every CPU, trials are stopped and shards are damaged."""

import json
import os
import threading
import time

import numpy as np
import pytest
import ray
import torch
from of_age import assign
from ray._private.internal_api import memory_summary
from small_cohort import SIDE, SMALL, write_small_cohort

from core.config import merge, resolve
from core.errors import UserError
from core.evaluation.splits import make_splits
from core.volumes.cohort.reader import Cohort
from distributed.batches import resident, streaming
from distributed.batches.hold import batches
from distributed.batches.in_process import Direct, InMemory, bytes_of_a_volume
from distributed.batches.plan import Plan
from distributed.batches.resident import Resident
from distributed.batches.streaming import Streaming
from distributed.training.subjects import Subjects
from distributed.training.trial import Runner
from search_spaces import published

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CPU = torch.device("cpu")
CELLS = [{"fold": 0, "seed": 0}, {"fold": 1, "seed": 0}]


@pytest.fixture(scope="module")
def cohorts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cohorts")
    made = {storage: write_small_cohort(folder / storage, storage=storage) for storage in ("hdf5", "parquet")}
    return made | {
        "zstd": write_small_cohort(folder / "zstd", compression="zstd")
    }  # read by two tasks at a time


@pytest.fixture(scope="module", autouse=True)
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.path.dirname(__file__))
        ray.init(
            address="local",
            num_cpus=1,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=200 * 2**20,
        )
        try:
            yield
            assert wait_until(lambda: not threads("iter_threaded"))  # a closed stream's last call of Ray
        finally:
            ray.shutdown()


@pytest.fixture(autouse=True)
def small_reads(cohorts, monkeypatch):
    """Some ten volumes to a read, so that an epoch takes several."""
    monkeypatch.setattr(streaming, "READ_BYTES", 10 * bytes_of_a_volume(cohorts["hdf5"]))


def moments_of(cohort):
    return InMemory.of(cohort).moments(np.arange(len(cohort)))


def streamed(cohort):
    return Streaming(cohort.address, moments_of(cohort))


def threads(name):
    return [thread.name for thread in threading.enumerate() if name in thread.name]


def executors():
    return threads("StreamingExecutor")


def shared_memory():
    """MiB in this Ray's object store, as its own summary words it; other Rays may run on this machine."""
    summary = memory_summary(ray.get_runtime_context().gcs_address, stats_only=True)
    return summary.split("Plasma memory usage ")[1].split(" MiB")[0]


def wait_until(condition, seconds=20):
    deadline = time.time() + seconds
    while not condition() and time.time() < deadline:
        time.sleep(0.1)
    return condition()


@ray.remote(num_cpus=1)
class Slot:
    """Holds every CPU there is, as slots do, and trains on a stream."""

    def take(self, volumes, plan):
        return [batch.volumes.numpy().copy() for batch in batches(volumes, plan, CPU)]


@pytest.mark.parametrize("storage", ["hdf5", "parquet", "zstd"])
def test_a_stream_flows_in_a_slot_that_holds_every_cpu_and_keeps_the_plans_order(cohorts, storage):
    cohort = cohorts[storage]
    slot = Slot.remote()
    whole = Plan(np.arange(3, 24), 5, seed=1, epochs=range(2, 5))
    given = ray.get(slot.take.remote(streamed(cohort), whole), timeout=120)
    assert ray.available_resources().get("CPU", 0) == 0
    expected = [cohort.read(rows) for rows in whole.batches()]
    assert [len(batch) for batch in given] == [len(batch) for batch in expected]
    for batch, volumes in zip(given, expected, strict=True):
        assert batch.dtype == np.float16
        np.testing.assert_array_equal(batch.astype(np.float32), volumes)

    halves = [Plan(whole.rows, 5, 1, whole.epochs, rank, 2) for rank in (0, 1)]
    parts = [ray.get(slot.take.remote(streamed(cohort), half), timeout=120) for half in halves]
    for batch, first, second in zip(given, *parts, strict=True):
        np.testing.assert_array_equal(np.concatenate([first, second]), batch)
    ray.kill(slot)


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("is_cut", [False, True])
def test_maps_and_boxes_are_the_same_from_every_source(tmp_path, monkeypatch, compression, is_cut):
    names = ("dseg", "lesion")
    cohort = write_small_cohort(tmp_path / "cohort", compression=compression, maps=names)
    having = np.flatnonzero(cohort.has_map("dseg"))
    assert len(having) == 16
    cut = slices if is_cut else None
    plan = Plan(having, 5, seed=1, epochs=range(1, 4), cut=cut)
    monkeypatch.setattr(resident, "BLOCK_BYTES", 5 * bytes_of_a_volume(cohort))
    sources = [
        InMemory.of(cohort, names), Direct(cohort.address, moments_of(cohort)), Resident.of(cohort, names),
        streamed(cohort),
    ]  # fmt: skip
    assert len(sources[2].maps["lesion"].blocks) == 4  # of 16 maps, five each; none for scans without one
    given = [[copied(batch) for batch in batches(each, plan, CPU, names)] for each in sources]
    expected = list(plan.batches())
    for several in given:
        assert len(several) == len(expected) == 3 * 3
    for at, rows in enumerate(expected):
        whole = {"": cohort.read_stored(rows)} | {
            name: cohort.read_map(name, rows)[:, None] for name in names
        }
        if is_cut:
            boxes = slices(rows, at // 3 + 1)
            whole = {
                name: np.stack(
                    [each[..., *box] for each, of_row in zip(array, boxes, strict=True) for box in of_row]
                )
                for name, array in whole.items()
            }
        for several in given:
            np.testing.assert_array_equal(several[at][""], whole[""])
            for name in names:
                np.testing.assert_array_equal(several[at][name], whole[name][:, 0])
    without = int(np.flatnonzero(~cohort.has_map("dseg"))[0])
    for source in sources:
        with pytest.raises(
            UserError, match=rf"(sub-{without:03d}|row {without} of the cohort) has no map 'dseg'"
        ):
            source.read_map("dseg", np.array([having[0], without]))


def test_a_stream_passes_on_that_a_scan_has_no_map(tmp_path):
    cohort = write_small_cohort(tmp_path / "cohort", maps=("dseg",))
    with pytest.raises(UserError, match=r"sub-\d+ has no map 'dseg'"):
        list(batches(streamed(cohort), Plan(np.arange(24), 4, 0, range(1, 3)), CPU, ("dseg",)))


def slices(rows, number):
    """Two slices of every scan, others in every pass."""
    return [[box_at((row + number) % SIDE), box_at((row * 5 + number) % SIDE)] for row in rows.tolist()]


def box_at(place):
    return (slice(0, SIDE), slice(place, place + 1), slice(2, SIDE))


def copied(batch):
    return {"": batch.volumes.numpy().copy()} | {
        name: each.numpy().copy() for name, each in batch.maps.items()
    }


def test_a_stream_that_is_closed_early_leaves_no_execution_and_no_object(cohorts):
    before = shared_memory()
    stream = batches(streamed(cohorts["hdf5"]), Plan(np.arange(24), 4, 0, range(1, 10_000)), CPU)
    kept = next(stream).volumes.clone()
    assert executors()
    stream.close()
    assert wait_until(lambda: not executors()), executors()
    assert torch.isfinite(kept.float()).all()
    assert wait_until(lambda: shared_memory() == before), (before, shared_memory())


def test_what_a_stream_holds_is_bounded_however_long_it_waits(cohorts):
    cohort = cohorts["hdf5"]
    stream = batches(streamed(cohort), Plan(np.arange(24), 4, 0, range(1, 5_000)), CPU)
    next(stream)
    time.sleep(5)  # a long evaluation
    held = float(shared_memory()) * 2**20
    stream.close()
    assert held < 2 * streaming.READS_AHEAD * streaming.READ_BYTES


def history_of(volumes, cohort, folder, stop_after=None):
    splits = make_splits(cohort.manifest, folds=2)
    chosen = resolve(merge(published("brain_age"), SMALL | {"training.epochs": 3})).model_dump(mode="json")
    assignment, answer, asked = assign(folder, chosen, CELLS), {"done": False}, 0
    runner = Runner(Subjects.of(cohort, splits, volumes))
    while not answer["done"]:
        if asked == stop_after:  # as if the worker had died
            runner = Runner(Subjects.of(cohort, splits, volumes))
        answer = runner(assignment)
        asked += 1
    rows = json.loads((folder / "progress.json").read_text())["history"]
    return [(row["fold"], row["epoch"], row["loss"], str(row["mae"])) for row in rows]


def test_a_trial_on_a_stream_ends_with_the_numbers_of_one_in_memory_also_when_it_was_interrupted(
    cohorts, tmp_path
):
    cohort = cohorts["parquet"]
    expected = history_of(InMemory.of(cohort), cohort, tmp_path / "memory")
    assert history_of(streamed(cohort), cohort, tmp_path / "stream") == expected
    assert history_of(streamed(cohort), cohort, tmp_path / "parts", stop_after=2) == expected
    assert wait_until(lambda: not executors()), executors()


@pytest.mark.parametrize("storage", ["hdf5", "parquet"])
def test_a_shard_damaged_while_training_fails_the_trial_in_one_line_that_names_it(tmp_path, storage):
    cohort = write_small_cohort(tmp_path / "cohort", storage=storage)
    volumes = streamed(cohort)
    splits = make_splits(cohort.manifest, folds=2)
    row = int(splits.training(0)[0])
    shard = cohort.folder / "shards" / cohort.manifest["shard"].iloc[row]
    content = bytearray(shard.read_bytes())
    content[int(cohort.manifest["offset"].iloc[row]) + 1000] ^= 1
    shard.write_bytes(content)
    streaming.opened.cache_clear()
    plan = Plan(splits.training(0), 4, 0, range(1, 3))
    with pytest.raises(UserError, match=f"shard .*{shard.name}, row {row}, subject sub-{row:03d}"):
        list(batches(volumes, plan, CPU))
    settings = resolve(merge(published("brain_age"), SMALL)).model_dump(mode="json")
    runner = Runner(Subjects.of(Cohort.open(cohort.folder), splits, volumes))
    answer = runner(assign(tmp_path / "0000", settings, CELLS))
    assert answer["done"]
    assert f"row {row}, subject sub-{row:03d}" in answer["failed"]
    assert "\n" not in answer["failed"]
    assert wait_until(lambda: not executors()), executors()
