from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from core.errors import UserError
from core.volumes.cohort import shards
from core.volumes.cohort.describe import describe
from core.volumes.cohort.reader import Cohort
from core.volumes.cohort.writer import CohortWriter

SHAPE = (3, 4, 5)


def volume(number: int, channels: int = 1) -> np.ndarray:
    voxels = np.random.default_rng(number).normal(size=(channels, *SHAPE)).astype(np.float32)
    voxels[:, 0] = 0
    return voxels


def writer(folder: Path, **settings) -> CohortWriter:
    defaults = {
        "name": "tiny", "channels": ["T1w"], "shape": SHAPE, "spacing": 4.0, "affine": np.diag([4, 4, 4, 1]),
        "preprocessing": {"spacing": 4.0}, "source": "a test", "volumes_per_shard": 3,
    }  # fmt: skip
    return CohortWriter(folder, **{**defaults, **settings})


def write(folder: Path, count: int = 8, **settings) -> Cohort:
    with writer(folder, **settings) as cohort:
        for number in range(count):
            cohort.add(volume(number), subject=f"sub-{number:02d}", age=20.0 + number, sex="F", site="A")
    return Cohort.open(folder)


def shard_and_offset(cohort: Cohort, row: int) -> tuple[Path, int]:
    """The file of a row and where in it the row's bytes begin, as HDF5 itself says."""
    path = cohort.folder / "shards" / cohort.manifest["shard"][row]
    with h5py.File(path) as file:
        chunk = file["volumes"].id.get_chunk_info_by_coord(
            (int(cohort.manifest["position"][row]), 0, 0, 0, 0)
        )
    return path, chunk.byte_offset


def test_volumes_come_back_in_the_order_asked(tmp_path):
    cohort = write(tmp_path / "c")
    rows = [7, 0, 3, 3, 5, 1]  # over all three shards, with a repeat
    expected = np.stack([volume(row).astype(np.float16).astype(np.float32) for row in rows])
    read = cohort.read(rows)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, expected)
    np.testing.assert_array_equal(cohort.read(np.array(rows), verify=False), expected)
    assert cohort.read([]).shape == (0, 1, *SHAPE)


def test_large_volumes_survive_conversion_in_pieces(tmp_path):
    large = np.random.default_rng(0).normal(size=(1, 41, 43, 47)).astype(np.float32)  # several pieces
    with writer(tmp_path / "c", shape=large.shape[1:]) as cohort:
        cohort.add(large, subject="a", age=30)
    np.testing.assert_array_equal(Cohort.open(tmp_path / "c").read([0])[0], large.astype(np.float16))


def test_float32_keeps_every_bit_and_several_channels(tmp_path):
    with writer(tmp_path / "c", channels=["T1w", "stiffness"], dtype="float32") as cohort:
        cohort.add(volume(1, channels=2) * 1e6, subject="a", age=30)
    np.testing.assert_array_equal(Cohort.open(tmp_path / "c").read([0])[0], volume(1, channels=2) * 1e6)


def test_manifest_and_description(tmp_path):
    with writer(tmp_path / "c", synthetic=True, volumes_per_shard=2) as cohort:
        for number in range(3):
            cohort.add(volume(number), subject=f"s{number}", age=number + 1, handedness="left", volume=1.5)
    opened = Cohort.open(tmp_path / "c")
    assert len(opened) == 3
    assert opened.manifest["shard"].tolist() == ["00000.h5", "00000.h5", "00001.h5"]
    assert opened.manifest["position"].tolist() == [0, 1, 0]
    assert opened.manifest["sex"].tolist() == ["", "", ""]
    assert opened.manifest["handedness"].tolist() == ["left"] * 3
    assert opened.manifest.index.name == "row"
    assert opened.description.synthetic
    assert opened.description.shape == SHAPE
    assert np.array_equal(opened.description.affine, np.diag([4, 4, 4, 1]))


def test_equal_cohorts_have_equal_bytes(tmp_path):
    files = [
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (write(tmp_path / name).folder for name in ("a", "b"))
    ]
    assert files[0] == files[1]
    assert len(files[0]) == 5


def test_hash_changes_with_whatever_training_sees(tmp_path):
    def hash_of(folder: str, age: float = 30, number: int = 1, **settings) -> str:
        with writer(tmp_path / folder, **settings) as cohort:
            cohort.add(volume(number), subject="a", age=age)
        return Cohort.open(tmp_path / folder).description.hash

    first = hash_of("a")
    assert hash_of("b", name="other name") == first
    others = {hash_of("c", age=31), hash_of("d", number=2), hash_of("e", preprocessing={"spacing": 2.0})}
    assert len(others | {first}) == 4


@pytest.mark.parametrize("byte", [0, 1, 57, 119])
def test_a_flipped_byte_is_found_and_named(tmp_path, byte):
    cohort = write(tmp_path / "c")
    path, offset = shard_and_offset(cohort, row=4)
    content = bytearray(path.read_bytes())
    content[offset + byte] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"shard .*00001\.h5, row 4, subject sub-04.*checksum"):
        cohort.read([1, 4])
    np.testing.assert_array_equal(cohort.read([3, 5]), np.stack([volume(3), volume(5)]).astype(np.float16))


@pytest.mark.parametrize("keep", [0, 100, 900, 2200])
def test_a_truncated_shard_is_named(tmp_path, keep):
    cohort = write(tmp_path / "c")
    path, _ = shard_and_offset(cohort, row=6)
    assert path.stat().st_size > keep
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"00002\.h5, row 6, subject sub-06"):
        cohort.read([0, 6])


def test_a_missing_shard_is_named(tmp_path):
    cohort = write(tmp_path / "c")
    (cohort.folder / "shards" / "00000.h5").unlink()
    with pytest.raises(UserError, match=r"00000\.h5, row 2, subject sub-02: the file is missing"):
        cohort.read([2])


@pytest.mark.parametrize("rows", [[8], [-1], [0, 99]])
def test_rows_that_do_not_exist(tmp_path, rows):
    with pytest.raises(UserError, match=rf"rows 0 to 7, but row {rows[-1]}"):
        write(tmp_path / "c").read(rows)


def test_open_says_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match="is not a cohort"):
        Cohort.open(tmp_path / "nowhere")
    (tmp_path / "half" / "shards").mkdir(parents=True)
    with pytest.raises(UserError, match="incomplete"):
        Cohort.open(tmp_path / "half")
    folder = write(tmp_path / "c").folder
    text = (folder / "cohort.json").read_text()
    (folder / "cohort.json").write_text(json.dumps({**json.loads(text), "format": 99, "new": 1}))
    with pytest.raises(UserError, match=r"format 99.*update"):
        Cohort.open(folder)
    for damaged in (text[:40], "[1]", text.replace('"spacing": 4.0', '"spacing": "wide"')):
        (folder / "cohort.json").write_text(damaged)
        with pytest.raises(UserError, match="damaged"):
            Cohort.open(folder)
    (folder / "cohort.json").write_text(text)
    (folder / "manifest.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(UserError, match="manifest"):
        Cohort.open(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"volume": volume(1)[0]}, r"sub-01: volume must have shape \(1, 3, 4, 5\), got \(3, 4, 5\)"),
        ({"volume": np.full((1, *SHAPE), np.nan, np.float32)}, "sub-01: 60 voxels are NaN"),
        ({"volume": np.full((1, *SHAPE), -7e4, np.float32)}, "sub-01: 70000 is above 65504.*float32"),
        ({"age": float("inf")}, "sub-01 has age inf"),
        ({"subject": "sub-00"}, "sub-00 was added twice"),
        ({"checksum": "1"}, "columns of the manifest"),
    ],
)
def test_volumes_that_are_refused_leave_no_cohort_behind(tmp_path, change, message):
    arguments = {"volume": volume(1), "subject": "sub-01", "age": 30.0, **change}
    refused = arguments.pop("volume")

    def write_both() -> None:
        with writer(tmp_path / "c", volumes_per_shard=1) as cohort:
            cohort.add(volume(0), subject="sub-00", age=20)
            cohort.add(refused, **arguments)

    with pytest.raises(UserError, match=message):
        write_both()
    assert not (tmp_path / "c").exists()


def test_an_empty_cohort_is_refused(tmp_path):
    with pytest.raises(UserError, match="no volume was added"), writer(tmp_path / "c"):
        pass


def test_the_writer_never_touches_what_is_not_its_own(tmp_path):
    folder = write(tmp_path / "c").folder
    with pytest.raises(UserError, match="already holds a complete cohort"), writer(folder):
        pass
    assert len(Cohort.open(folder)) == 8
    thesis = tmp_path / "other" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("five years of work")
    with pytest.raises(UserError, match=r"holds other files, such as thesis\.txt"), writer(thesis.parent):
        pass
    with pytest.raises(UserError, match=r"cannot write to .*thesis"), writer(thesis / "c"):
        pass
    assert thesis.read_text() == "five years of work"


def in_a_fork(target: Callable[..., None], *arguments) -> int | None:
    """Exit code of `target` in a process of its own."""
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    process.join(60)
    return process.exitcode


def write_until_killed(folder: Path) -> None:
    cohort = writer(folder).__enter__()
    for number in range(4):
        cohort.add(volume(number), subject=str(number), age=30)
    with shards.replacing(folder / "manifest.parquet") as temporary:
        temporary.write_text("half")
        os._exit(9)


def test_a_killed_writer_leaves_an_incomplete_cohort_that_the_next_one_replaces(tmp_path):
    assert in_a_fork(write_until_killed, tmp_path / "c") == 9
    with pytest.raises(UserError, match="incomplete"):
        Cohort.open(tmp_path / "c")
    assert len(write(tmp_path / "c", count=2)) == 2
    assert sorted(path.name for path in (tmp_path / "c").rglob("*")) == [
        "00000.h5", "cohort.json", "manifest.parquet", "shards",
    ]  # fmt: skip


def write_to_a_full_disk(folder: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # writes beyond 1000 bytes of a file fail
    with pytest.raises(UserError, match=rf"^cannot write to {folder}: .*; choose another output folder$"):
        write(folder)
    os._exit(7)  # reached only if that was the error, and HDF5 did not take the process down


def test_a_full_disk_is_one_clear_line(tmp_path):
    assert in_a_fork(write_to_a_full_disk, tmp_path / "c") == 7
    assert not (tmp_path / "c").exists()


def read_rows(cohort: Cohort, rows: list[int], queue) -> None:
    queue.put(cohort.read(rows))


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_reading_in_another_process(tmp_path, method):
    large = np.ones((1, 60, 60, 60), np.float32)
    with writer(tmp_path / "c", shape=large.shape[1:]) as cohort:
        for number in range(4):
            cohort.add(large * number, subject=str(number), age=30)
    opened = Cohort.open(tmp_path / "c")
    opened.read([0])
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.ones(10_000_000).half().float()  # starts torch's threads, which do not survive a fork
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=read_rows, args=(opened, [3, 1], queue))
    process.start()
    try:
        read = queue.get(timeout=60)
    finally:
        process.kill()
        torch.set_num_threads(threads)
    np.testing.assert_array_equal(read, np.stack([large * 3, large]))


def test_a_cohort_can_be_pickled(tmp_path):
    cohort = write(tmp_path / "c")
    cohort.read([0])
    again = pickle.loads(pickle.dumps(cohort))
    np.testing.assert_array_equal(again.read([5]), cohort.read([5]))


def test_describe_against_hand_calculation(tmp_path):
    with writer(tmp_path / "c") as cohort:
        for number, (age, sex, site) in enumerate([(20, "F", "A"), (30, "M", "B"), (70, "", "B")]):
            voxels = np.zeros((1, *SHAPE), np.float32)
            voxels.flat[: 10 * (number + 1)] = np.tile([1, 3], 5 * (number + 1))
            cohort.add(voxels, subject=str(number), age=age, sex=sex, site=site)
    facts = describe(Cohort.open(tmp_path / "c"))
    assert facts["subjects"] == 3
    assert (facts["age_mean"], facts["age_median"], facts["age_min"], facts["age_max"]) == (40, 30, 20, 70)
    assert facts["age_sd"] == pytest.approx(700**0.5)
    assert facts["median_age_mae"] == pytest.approx(50 / 3)
    assert facts["sites"] == {"B": 2, "A": 1}
    assert facts["sexes"] == {"F": 1, "M": 1, "unknown": 1}
    assert facts["intensity_mean"] == {"T1w": 2.0}
    assert facts["intensity_sd"] == {"T1w": 1.0}
    assert facts["brain_volume_ml_mean"] == pytest.approx(20 * 64 / 1000)
    assert facts["brain_volume_age_r"] == pytest.approx(25 / 700**0.5)  # cov 250, SDs 10 and sqrt(700)
    assert facts["bytes_on_disk"] > 3 * 60 * 2
