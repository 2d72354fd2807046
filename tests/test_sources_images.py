from __future__ import annotations

import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from reference_resample import affine_of, rotation

from core.errors import UserError
from core.volumes.sources import ImageFile, read_image, read_image_geometry

SHAPE = (7, 8, 9)
LANDMARK = (2, 5, 3)
AFFINES = {
    "RAS": affine_of([2, 2, 2], [-10, 5, 3]),
    "left-handed": affine_of([-2, 2, 2], [90, -126, -72]),
    "all flipped": affine_of([-1, -2, -3], [10, 20, 30]),
    "oblique": affine_of([1, 2, 3], [-7, 11, 5], rotation(0.3, -0.2, 0.4)),
    "left-handed and oblique": affine_of([-1, 2, 3], [-7, 11, 5], rotation(0.3, -0.2, 0.4)),
    "axes swapped": affine_of([1, 2, 3], [-7, 11, 5])[:, [2, 0, 1, 3]],
}


def marked(dtype: str) -> np.ndarray:
    """Small whole numbers, and one landmark above all."""
    voxels = np.random.default_rng(0).integers(1, 50, SHAPE).astype(dtype)
    voxels[LANDMARK] = 99
    return voxels


def rows_of(affine: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, affine.tolist()))


def assert_landmark_stays(file: ImageFile, affine: np.ndarray, value: float) -> None:
    voxels, found = read_image(file)
    assert nib.aff2axcodes(found) == ("R", "A", "S")
    assert voxels.dtype == np.float32
    assert voxels.flags.c_contiguous
    assert voxels.max() == pytest.approx(value)
    place = np.unravel_index(voxels.argmax(), voxels.shape)
    np.testing.assert_allclose((found @ [*place, 1])[:3], (affine @ [*LANDMARK, 1])[:3], atol=1e-4)
    shape, stored = read_image_geometry(file)
    assert shape == SHAPE
    np.testing.assert_allclose(stored, affine, atol=1e-5)


@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
@pytest.mark.parametrize("dtype", ["u1", "i2", ">i2", "f4", "f8"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_a_landmark_keeps_its_place_in_mm(tmp_path, affine, dtype, kind):
    voxels = marked(dtype)
    path = tmp_path / ("a.nii" if dtype == "i2" else "a.nii.gz")
    header = kind.header_class(endianness=">" if dtype.startswith(">") else "<")
    stored = kind(voxels, affine, header)
    stored.header.set_data_dtype(voxels.dtype)
    nib.save(stored, path)
    assert_landmark_stays(ImageFile(path), affine, 99)


@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
def test_slope_and_intercept_are_applied(tmp_path, affine):
    stored = nib.Nifti1Image(marked("i2"), affine)
    nib.save(stored, tmp_path / "a.nii")
    content = bytearray((tmp_path / "a.nii").read_bytes())
    content[112:120] = np.array([0.5, -10], "<f4").tobytes()  # scl_slope and scl_inter of the standard
    (tmp_path / "a.nii").write_bytes(content)
    assert_landmark_stays(ImageFile(tmp_path / "a.nii"), affine, 99 * 0.5 - 10)


@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
@pytest.mark.parametrize(
    ("form", "dtype"),
    [("(N, X, Y, Z)", "i2"), ("(N, 1, X, Y, Z)", ">i4"), ("Fortran", "f2"), ("(X, Y, Z)", "f8")],
)
def test_rows_of_arrays_are_read_as_files_are(tmp_path, affine, dtype, form):
    voxels = marked(dtype)
    array = np.stack([voxels * 0 + np.arange(9).astype(dtype), voxels])
    row: int | None = 1
    if form == "(N, 1, X, Y, Z)":
        array = array[:, np.newaxis]
    if form == "Fortran":
        array = np.asfortranarray(array)
    if form == "(X, Y, Z)":
        array, row = voxels, None
    np.save(tmp_path / "a.npy", array)
    nib.save(nib.Nifti1Image(voxels.astype("f4"), affine), tmp_path / "a.nii")
    file = ImageFile(tmp_path / "a.npy", row, rows_of(affine))
    assert_landmark_stays(file, affine, 99)
    expected, where = read_image(ImageFile(tmp_path / "a.nii"))
    found, place = read_image(file)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(place, where, atol=1e-5)


def test_one_row_is_read_without_the_others(tmp_path):
    path = tmp_path / "a.npy"
    with path.open("wb") as file:  # 40 volumes of 1 MB that are only claimed by a hole in the file
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<f4", "fortran_order": False, "shape": (40, 64, 64, 64)}
        )
        file.truncate(file.tell() + 40 * 64**3 * 4 - 64**3 * 4)
        file.seek(0, 2)
        file.write(np.random.default_rng(0).random((64, 64, 64), dtype=np.float32).tobytes())
    tracemalloc.start()
    read_image(ImageFile(path, 39, rows_of(np.eye(4))))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * 2**20


def nan() -> np.ndarray:
    array = marked("f4")[np.newaxis]
    array[0, 1, 1, 1:4] = np.nan
    return array


class Evil:
    """What a pickle can do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


BAD_ARRAYS = {
    "row 0 has 3 NaN or infinite": lambda path: np.save(path, nan()),
    "row 0 has 504 NaN or infinite": lambda path: np.save(path, marked("f8")[np.newaxis] * 1e300),
    "row 0 is empty: every voxel is 0": lambda path: np.save(path, np.zeros((1, *SHAPE))),
    "row 0 is constant: every voxel is 3": lambda path: np.save(path, np.full((1, *SHAPE), 3)),
    r"row 0 has shape \(8, 9\)": lambda path: np.save(path, marked("f4")[:1]),
    r"row 0 has shape \(2, 7, 8, 9\)": lambda path: np.save(path, np.ones((1, 2, *SHAPE))),
    "pickled Python objects": lambda path: plant(path),
    "holds complex128 values": lambda path: np.save(path, np.ones((1, *SHAPE), complex)),
    "holds <U1 values": lambda path: np.save(path, np.full((1, *SHAPE), "a")),
    "holds .* values; integer or floating": lambda path: np.save(path, np.zeros((1, *SHAPE), [("a", "f4")])),
    "is empty": lambda path: np.save(path, np.ones((0, *SHAPE))),
    "truncated": lambda path: (np.save(path, marked("f4")[np.newaxis]), cut(path, 9)),
    "magic": lambda path: path.write_bytes(b"PK\x03\x04" * 99),
    "cannot be read as a NumPy array": lambda path: path.write_bytes(b""),
    "cannot be read as a NumPy array .*EOF": lambda path: path.write_bytes(b"\x93NUMPY\x01\x00\xff"),
    "does not exist": lambda path: None,
    "is not a file": lambda path: path.mkdir(),
}


def plant(path: Path) -> None:
    np.save(path, np.array([Evil(path.with_name("was-here"))], dtype=object), allow_pickle=True)


def cut(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:-count])


@pytest.mark.parametrize("reason", BAD_ARRAYS)
def test_bad_arrays_name_themselves(tmp_path, reason):
    path = tmp_path / "a.npy"
    BAD_ARRAYS[reason](path)
    with pytest.raises(UserError, match=reason) as caught:
        read_image(ImageFile(path, 0, rows_of(np.eye(4))))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "was-here").exists()


def test_rows_and_affines_that_are_not_there(tmp_path):
    np.save(tmp_path / "a.npy", marked("f4")[np.newaxis])
    with pytest.raises(UserError, match="has rows 0 to 0, but row 1 is asked for"):
        read_image(ImageFile(tmp_path / "a.npy", 1, rows_of(np.eye(4))))
    for affine in (None, rows_of(np.zeros((4, 4))), rows_of(np.full((4, 4), np.nan)), ((1.0,),)):
        with pytest.raises(UserError, match="row 0 needs an affine"):
            read_image(ImageFile(tmp_path / "a.npy", 0, affine))


def test_forged_headers_cost_neither_memory_nor_a_crash(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, marked("f4")[np.newaxis])
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    outcomes = {"read": 0, "refused": 0}
    tracemalloc.start()
    for _ in range(300):
        content = bytearray(good)
        for place in rng.integers(6, 90, rng.integers(1, 3)):
            content[place] = rng.choice([rng.integers(0, 256), *b"0123456789<>|fiuO()-, "])
        path.write_bytes(content)
        try:
            read_image(ImageFile(path, 0, rows_of(np.eye(4))))
            outcomes["read"] += 1
        except UserError:
            outcomes["refused"] += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 2**20
    assert min(outcomes.values()) > 2, outcomes
