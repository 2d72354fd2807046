from __future__ import annotations

import zlib
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from core.errors import UserError
from core.volumes.cohort.reader import Cohort
from core.volumes.cohort.shards import COMPRESSIONS, checksum
from core.volumes.cohort.stored import decode, encode, encode_label
from core.volumes.cohort.writer import CohortWriter

SHAPE = (7, 6, 5)
KINDS = [(storage, compression) for storage, kinds in COMPRESSIONS.items() for compression in kinds]


def volume(number: int, channels: int = 2) -> np.ndarray:
    voxels = np.random.default_rng(number).normal(size=(channels, *SHAPE)).astype(np.float32)
    voxels[:, :2] = 0
    return voxels


def label(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 9, SHAPE)


def write(folder: Path, count: int = 7, **options) -> Cohort:
    options = {"dtype": "float16", "maps": ["label"], **options}
    writer = CohortWriter(
        folder, name="tiny", channels=["T1w", "FLAIR"], shape=SHAPE, spacing=4.0, affine=np.eye(4),
        volumes_per_shard=3, **options,
    )  # fmt: skip
    with writer:
        for number in range(count):
            maps = {"label": label(number)} if options["maps"] else {}
            writer.add(volume(number), subject=f"sub-{number}", age=20 + number, maps=maps)
    return Cohort.open(folder)


@pytest.mark.parametrize(("storage", "compression"), KINDS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "int16"])
def test_what_is_written_is_read_in_every_format(tmp_path, storage, compression, dtype):
    cohort = write(tmp_path / "c", storage=storage, compression=compression, dtype=dtype)
    rows = [6, 0, 4, 4, 2]
    stored = cohort.read_stored(rows)
    assert stored.dtype == dtype
    scales = cohort.scales(rows)
    np.testing.assert_array_equal(
        cohort.read(rows), stored.astype(np.float32) * scales[:, :, None, None, None]
    )
    expected = np.stack([volume(row) for row in rows])
    tolerance = {"float16": 2e-3, "float32": 0, "int16": np.abs(expected).max() / 32767}[dtype]
    np.testing.assert_allclose(cohort.read(rows), expected, atol=tolerance, rtol=0)
    np.testing.assert_array_equal(cohort.read(rows) == 0, expected == 0)
    labels = cohort.read_map("label", rows)
    assert labels.dtype == np.int16
    np.testing.assert_array_equal(labels, np.stack([label(row) for row in rows]))


@pytest.mark.parametrize(("storage", "compression"), KINDS)
def test_equal_input_gives_equal_bytes(tmp_path, storage, compression):
    once, again = (
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (
            write(tmp_path / name, storage=storage, compression=compression).folder for name in ("a", "b")
        )
    )
    assert once == again
    assert len(once) == 5


def test_formats_hold_the_same_cohort(tmp_path):
    cohorts = [write(tmp_path / f"{kind}", storage=kind[0], compression=kind[1]) for kind in KINDS]
    assert len({cohort.description.hash for cohort in cohorts}) == 1
    assert len({tuple(cohort.manifest["checksum"]) for cohort in cohorts}) == 1


def test_shards_are_plain_files_of_their_format(tmp_path):
    """What other tools see, without any of our code: h5py and pyarrow alone."""
    hdf5 = write(tmp_path / "hdf5").folder / "shards" / "00001.h5"
    parquet = write(tmp_path / "parquet", storage="parquet").folder / "shards" / "00001.parquet"
    expected = np.stack([volume(number) for number in (3, 4, 5)]).astype(np.float16)
    with h5py.File(hdf5) as file:
        assert file["volumes"].chunks == (1, 2, *SHAPE)
        np.testing.assert_array_equal(file["volumes"][:], expected)
        np.testing.assert_array_equal(file["map_label"][:], np.stack([label(number) for number in (3, 4, 5)]))
    table = pq.read_table(parquet).combine_chunks()
    assert table.schema.field("volumes").type == pa.fixed_shape_tensor(pa.float16(), (2, *SHAPE))
    np.testing.assert_array_equal(table["volumes"].chunk(0).to_numpy_ndarray(), expected)
    assert pq.ParquetFile(parquet).num_row_groups == 3


@pytest.mark.parametrize("storage", ["hdf5", "parquet"])
def test_large_volumes_lie_in_one_piece(tmp_path, storage):
    """Larger than any page or chunk that a library would choose by itself."""
    large = np.random.default_rng(0).normal(size=(1, 128, 128, 130)).astype(np.float32)
    writer = CohortWriter(
        tmp_path / "c", name="large", channels=["T1w"], shape=large.shape[1:], spacing=1.0, affine=np.eye(4),
        dtype="float32", storage=storage,
    )  # fmt: skip
    with writer:
        writer.add(large, subject="a", age=30)
        writer.add(large[:, ::-1], subject="b", age=30)
    np.testing.assert_array_equal(Cohort.open(tmp_path / "c").read([1, 0]), np.stack([large[:, ::-1], large]))


def test_unknown_formats_and_compressions(tmp_path):
    with pytest.raises(
        UserError, match=r"parquet shards cannot be compressed by 'blosc'; known: none, gzip, zstd"
    ):
        write(tmp_path / "c", storage="parquet", compression="blosc")
    with pytest.raises(UserError, match=r"unknown format 'parket'; did you mean 'parquet'"):
        write(tmp_path / "c", storage="parket")
    with pytest.raises(UserError, match="has no maps 'label'"):
        write(tmp_path / "d", maps=[]).read_map("label", [0])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((2, 2, 2), int), r"sub-0: map 'label' must have shape \(7, 6, 5\), got \(2, 2, 2\)"),
        (np.full(SHAPE, 0.5), "sub-0: the label map holds values that are not whole"),
        (np.full(SHAPE, 40_000), "sub-0: the label map holds values that are not whole numbers from"),
    ],
)
def test_label_maps_that_are_refused(tmp_path, bad, message):
    writer = CohortWriter(
        tmp_path / "c",
        name="tiny",
        channels=["T1w"],
        shape=SHAPE,
        spacing=4.0,
        affine=np.eye(4),
        maps=["label"],
    )
    with pytest.raises(UserError, match=message), writer:
        writer.add(volume(0, channels=1), subject="sub-0", age=30, maps={"label": bad})


def round_trip(voxels: np.ndarray, dtype) -> np.ndarray:
    stored, scale = encode(voxels, dtype)
    back = np.empty(voxels.shape, np.float32)
    decode(stored, scale if dtype == "int16" else None, back)
    return back


@settings(max_examples=60, deadline=None)
@given(
    arrays(np.float32, (2, 3, 4, 2), elements=st.floats(-1e6, 1e6, width=32)),
    st.sampled_from([1e-3, 1.0, 1e6]),
)
def test_int16_keeps_its_error_bound_and_every_zero(voxels, factor):
    voxels = (voxels * np.float32(factor)).astype(np.float32)
    largest = np.abs(voxels).max(axis=(1, 2, 3), keepdims=True)
    assume((largest[largest > 0] > 1e-30).all())
    back = round_trip(voxels, "int16")
    step = largest.astype(np.float64) / 32767
    error = np.abs(back.astype(np.float64) - voxels)
    slack = 1e-6 * largest  # of float32 itself
    assert (error <= step + slack).all()
    assert (error <= step / 2 + slack)[np.abs(voxels) >= step / 2].all()
    np.testing.assert_array_equal(back == 0, voxels == 0)


@settings(max_examples=40, deadline=None)
@given(arrays(np.int16, (1, 3, 4, 2), elements=st.integers(-32767, 32767)))
def test_int16_keeps_whole_numbers_exactly(voxels):
    np.testing.assert_array_equal(round_trip(voxels.astype(np.float32), "int16"), voxels)


def test_int16_scales_each_channel_by_itself():
    voxels = np.stack(
        [np.linspace(-3, 3, 27).reshape(3, 3, 3), 1e5 * np.linspace(-3, 3, 27).reshape(3, 3, 3)]
    )
    error = np.abs(round_trip(voxels.astype(np.float32), "int16") - voxels)
    assert error[0].max() < 1e-4
    with pytest.raises(UserError, match="no scale in int16"):
        encode(np.full((1, 2, 2, 2), 1e-40), "int16")


def test_labels_keep_the_sign_and_the_range():
    assert encode_label(np.array([[[-32768.0, 32767.0]]])).tolist() == [[[-32768, 32767]]]


@pytest.mark.parametrize("size", [0, 1, 7, 8, 8167, 8168, 8169, 50_000])
def test_any_flipped_byte_changes_the_checksum(size):
    content = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    before = checksum(content)
    assert checksum(content.copy()) == before
    for place in {0, size // 2, size - 1} if size else ():
        for bit in range(8):
            content[place] ^= 1 << bit
            assert checksum(content) != before
            content[place] ^= 1 << bit


def test_the_checksum_is_the_one_described():
    """A CRC-32 over the words of all rows of 1021 combined by exclusive or, and over what is left, in plain Python."""
    content = np.random.default_rng(3).integers(0, 256, 3 * 8168 + 11, dtype=np.uint8).tobytes()
    rows = [content[start : start + 8168] for start in (0, 8168, 2 * 8168)]
    folded = bytes(a ^ b ^ c for a, b, c in zip(*rows, strict=True))
    assert checksum(np.frombuffer(content, np.uint8)) == f"{zlib.crc32(folded + content[3 * 8168 :]):08x}"


def test_exchanged_sectors_change_the_checksum():
    content = np.random.default_rng(3).integers(0, 256, 500_000, dtype=np.uint8)
    exchanged = content.copy()
    exchanged[4096:8192], exchanged[40960:45056] = content[40960:45056], content[4096:8192]
    assert checksum(exchanged) != checksum(content)
    lost = content.copy()
    lost[8192:12288] = 0
    assert checksum(lost) != checksum(content)
