from __future__ import annotations

import errno
import gzip
import itertools
import os
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from reference_resample import affine_of, rotation

from core.errors import UserError
from core.volumes.images.nifti import UNPACKED_RATIO, read_geometry, read_volume

DATA = Path(__file__).parents[1].parent / "shared" / "data"
SHAPE = (4, 5, 6)
ORIENTATIONS = [
    "".join(side[flip] for side, flip in zip(order, flips, strict=True))
    for order in itertools.permutations(("LR", "PA", "IS"))
    for flips in itertools.product((0, 1), repeat=3)
]


def voxels_of(dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 100, SHAPE).astype(dtype)


def save(path: Path, voxels: np.ndarray, affine: np.ndarray | None = None, kind=nib.Nifti1Image) -> Path:
    nib.save(kind(voxels, np.diag([2, 2, 2, 1]) if affine is None else affine), path)
    return path


def values_at_mm(voxels: np.ndarray, affine: np.ndarray) -> dict[tuple[float, ...], float]:
    """The value of each voxel by its place in mm."""
    return {
        tuple((affine @ [*index, 1])[:3].round(4).tolist()): float(voxels[index])
        for index in np.ndindex(voxels.shape)
    }


@pytest.mark.parametrize("axes", ORIENTATIONS)
def test_every_orientation_becomes_ras_and_keeps_each_value_at_its_mm(tmp_path, axes):
    from_ras = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axes)
    )
    oblique = affine_of([1, 2, 3], [-7, 11, 5], rotation(0.1, -0.2, 0.15))
    affine = oblique @ nib.orientations.inv_ornt_aff(from_ras, (6, 4, 5))
    path = save(tmp_path / "a.nii.gz", voxels_of(), affine)
    assert "".join(nib.aff2axcodes(nib.load(path).affine)) == axes
    voxels, canonical = read_volume(path)
    assert nib.aff2axcodes(canonical) == ("R", "A", "S")
    assert values_at_mm(voxels, canonical) == values_at_mm(voxels_of(), nib.load(path).affine)


@pytest.mark.parametrize(
    "dtype", [np.uint8, np.int16, np.int32, np.uint16, np.float32, np.float64, ">i2", ">f4"]
)
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_types_byte_orders_and_versions(tmp_path, dtype, kind, name):
    voxels, affine = read_volume(save(tmp_path / name, voxels_of(dtype), kind=kind))
    assert voxels.dtype == np.float32
    np.testing.assert_array_equal(voxels, voxels_of())
    np.testing.assert_array_equal(affine, np.diag([2, 2, 2, 1]))


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_slope_and_intercept(tmp_path, name):
    image = nib.Nifti1Image(voxels_of(np.int16), np.eye(4))
    image.header.set_slope_inter(0.25, -3)
    nib.save(image, tmp_path / name)
    stored = nib.load(tmp_path / name).dataobj.get_unscaled()
    np.testing.assert_allclose(read_volume(tmp_path / name)[0], stored * 0.25 - 3, rtol=1e-6)


def test_trailing_axes_of_one_are_dropped(tmp_path):
    path = save(tmp_path / "a.nii.gz", voxels_of()[..., None, None])
    np.testing.assert_array_equal(read_volume(path)[0], voxels_of())
    assert read_geometry(path)[0] == SHAPE


def volume_or_error(path: Path) -> tuple[np.ndarray, np.ndarray] | UserError:
    """What reading gives; any other error fails the test."""
    try:
        return read_volume(path)
    except UserError as error:
        return error


def with_value(value: float) -> np.ndarray:
    voxels = voxels_of()
    voxels[1, 2, 3:5] = value
    return voxels


@pytest.mark.parametrize(
    ("voxels", "message"),
    [
        (np.ones((4, 5, 6, 2), np.float32), r"4D with shape \(4, 5, 6, 2\)"),
        (np.ones((4, 5), np.float32), r"shape \(4, 5.*3D volume"),
        (np.ones((4, 5, 1), np.float32), r"shape \(4, 5, 1\).*3D volume"),
        (with_value(np.nan), "2 NaN or infinite voxels"),
        (with_value(-np.inf), "2 NaN or infinite voxels"),
        (np.zeros(SHAPE, np.int16), "is empty: every voxel is 0"),
        (np.full(SHAPE, 7, np.int16), "is constant: every voxel is 7"),
        (np.ones(SHAPE, np.complex64), "holds complex64 voxels"),
    ],
)
def test_voxels_that_are_refused(tmp_path, voxels, message):
    path = save(tmp_path / "sub-01_T1w.nii.gz", voxels)
    with pytest.raises(UserError, match=rf"sub-01_T1w\.nii\.gz .*{message}"):
        read_volume(path)


def with_sform(path: Path, matrix: np.ndarray) -> Path:
    """The file with this affine in its header, though no library would write it there."""
    image = nib.Nifti1Image(voxels_of(), np.eye(4))
    content = bytearray(image.to_bytes())
    content[254:256] = np.int16(1).tobytes()  # sform_code
    content[280:328] = matrix[:3].astype("<f4").tobytes()
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.diag([2, 2, 0, 1]), "singular affine"),
        (np.array([[2, 2, 0, 0], [1, 1, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]]), "singular affine"),
        (np.diag([2, 2, np.nan, 1]), "affine with values that are not numbers"),
        (np.diag([0.002, 0.002, 0.002, 1]), "voxels of 0.002 x 0.002 x 0.002 mm.*unit"),
    ],
)
def test_affines_that_are_refused(tmp_path, matrix, message):
    path = with_sform(tmp_path / "a.nii", matrix)
    for read in (read_volume, read_geometry):
        with pytest.raises(UserError, match=rf"a\.nii .*{message}"):
            read(path)


def test_files_that_are_not_there_or_not_nifti(tmp_path):
    with pytest.raises(UserError, match=r"gone\.nii does not exist"):
        read_volume(tmp_path / "gone.nii")
    with pytest.raises(UserError, match="is not a file"):
        read_volume(tmp_path)
    for name, content in {
        "empty.nii.gz": b"",
        "empty.nii": b"",
        "text.nii.gz": b"age\tsex\n" * 90,
        "text.nii": b"age\tsex\n" * 90,
        "gzipped-text.nii.gz": gzip.compress(b"age\tsex\n" * 90),
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} cannot be read as NIfTI"):
            read_volume(tmp_path / name)
    nib.save(nib.MGHImage(voxels_of(), np.eye(4)), tmp_path / "a.mgz")
    with pytest.raises(
        UserError, match=r"a\.mgz cannot be read as NIfTI \(it does not begin with a NIfTI header"
    ):
        read_volume(tmp_path / "a.mgz")


def test_paths_that_lead_nowhere_are_named_with_the_reason(tmp_path):
    (tmp_path / "loop.nii").symlink_to(tmp_path / "loop.nii")
    with pytest.raises(UserError, match=r"loop\.nii cannot be read: Too many levels of symbolic links"):
        read_volume(tmp_path / "loop.nii")
    (tmp_path / "dangling.nii").symlink_to(tmp_path / "gone.nii")
    with pytest.raises(UserError, match=r"dangling\.nii does not exist"):
        read_geometry(tmp_path / "dangling.nii")
    with pytest.raises(UserError, match=r"cannot be read: File name too long"):
        read_volume(tmp_path / ("a" * 300 + ".nii"))
    os.mkfifo(tmp_path / "pipe.nii")  # opening it would wait for ever
    with pytest.raises(UserError, match=r"pipe\.nii is not a file"):
        read_volume(tmp_path / "pipe.nii")


@pytest.mark.parametrize("where", ["file", "folder"])
def test_files_without_permission_are_named_with_the_reason(tmp_path, where, monkeypatch):
    path = tmp_path / "shut" / "a.nii"
    path.parent.mkdir()
    save(path, voxels_of())
    (path if where == "file" else path.parent).chmod(0)
    if os.geteuid() == 0:  # root may read everything: what the system would have said
        denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        monkeypatch.setattr(Path, "open" if where == "file" else "stat", raising(denied))
    try:
        with pytest.raises(UserError, match=r"a\.nii cannot be read: Permission denied"):
            read_volume(path)
    finally:
        monkeypatch.undo()
        path.parent.chmod(0o700)


def raising(error: Exception) -> Callable[..., None]:
    def always(*_: object, **__: object) -> None:
        raise error

    return always


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.NII", "a.nii.GZ", "a"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_file_is_what_its_first_bytes_say_whatever_its_name(tmp_path, name, packed):
    content = nib.Nifti1Image(voxels_of(), np.diag([2, 2, 2, 1])).to_bytes()
    (tmp_path / name).write_bytes(gzip.compress(content) if packed else content)
    np.testing.assert_array_equal(read_volume(tmp_path / name)[0], voxels_of())


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_voxels_are_never_taken_from_the_header(tmp_path, kind):
    """nibabel reads from byte 0 where vox_offset is 0."""
    image = kind(voxels_of(), np.diag([2, 2, 2, 1]))
    content = image.to_bytes()
    fields, start = image.header.template_dtype.fields["vox_offset"]
    damaged = content[:start] + bytes(fields.itemsize) + content[start + fields.itemsize :]
    (tmp_path / "a.nii").write_bytes(damaged)
    with pytest.raises(UserError, match=r"a\.nii places its voxels at byte 0, inside its header"):
        read_volume(tmp_path / "a.nii")


def test_small_faults_of_a_header_are_mended_without_a_word(tmp_path, capfd):
    content = bytearray(nib.Nifti1Image(voxels_of(), np.diag([2, 2, 2, 1])).to_bytes())
    content[76:80] = np.float32(0.5).tobytes()  # pixdim[0], the handedness, is 1 or -1
    content[252:254] = np.int16(77).tobytes()  # qform_code goes from 0 to 5
    (tmp_path / "a.nii").write_bytes(content)
    np.testing.assert_array_equal(read_volume(tmp_path / "a.nii")[0], voxels_of())
    assert "".join(capfd.readouterr()) == ""


@pytest.mark.parametrize("kind", [nib.Nifti1Pair, nib.Nifti2Pair])
@pytest.mark.parametrize("name", ["a.hdr", "b.nii"])
def test_one_file_of_a_pair_is_refused(tmp_path, kind, name):
    nib.save(kind(voxels_of(), np.diag([2, 2, 2, 1])), tmp_path / "a.img")
    (tmp_path / "b.nii").write_bytes((tmp_path / "a.hdr").read_bytes() + (tmp_path / "a.img").read_bytes())
    with pytest.raises(UserError, match=rf"{name} is half of a pair"):
        read_volume(tmp_path / name)


@pytest.mark.parametrize("esize", [0, -16, 2**31 - 1])
@pytest.mark.parametrize("packed", [False, True])
def test_forged_extensions_of_the_header_cost_neither_memory_nor_time(tmp_path, esize, packed):
    content = bytearray(nib.Nifti1Image(voxels_of(), np.diag([2, 2, 2, 1])).to_bytes())
    content[108:112] = np.float32(384).tobytes()  # vox_offset
    content[348:352] = b"\1\0\0\0" + np.array([esize, 6], "<i4").tobytes() + bytes(24)
    path = tmp_path / "a.nii"
    path.write_bytes(gzip.compress(content) if packed else content)
    tracemalloc.start()
    try:
        np.testing.assert_array_equal(read_volume(path)[0], voxels_of())
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_every_truncation_is_found(tmp_path, name):
    content = save(tmp_path / name, voxels_of()).read_bytes()
    for length in [*range(0, len(content), 37), len(content) - 4, len(content) - 1]:
        (tmp_path / name).write_bytes(content[:length])
        with pytest.raises(UserError, match=r"cannot be read as NIfTI|truncated"):
            read_volume(tmp_path / name)


def test_every_flipped_bit_of_a_gzip_stream_is_found_or_harmless(tmp_path):
    path = save(tmp_path / "a.nii.gz", np.random.default_rng(0).normal(size=SHAPE).astype(np.float32))
    voxels, _ = read_volume(path)
    content = path.read_bytes()
    for position in range(10, len(content)):  # the first ten bytes are gzip's header: time, system, …
        damaged = bytearray(content)
        damaged[position] ^= 4
        path.write_bytes(damaged)
        outcome = volume_or_error(path)
        if not isinstance(outcome, UserError):
            np.testing.assert_array_equal(outcome[0], voxels)


def forged(shape: tuple[int, ...], packed: bool) -> bytes:
    """A small file whose header claims `shape`."""
    content = bytearray(nib.Nifti1Image(voxels_of(), np.eye(4)).to_bytes())
    content[40:56] = np.array([len(shape), *shape, *[1] * (7 - len(shape))], "<i2").tobytes()
    return gzip.compress(content) if packed else bytes(content)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "shape", [(30_000, 30_000, 30_000), (800, 800, 800), (300, 300, 300), (-4, 5, 6), (0, 5, 6)]
)
def test_a_forged_header_costs_no_memory(tmp_path, shape, packed):
    path = tmp_path / f"a.nii{'.gz' if packed else ''}"
    path.write_bytes(forged(shape, packed))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"a\.nii"):
            read_volume(path)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


def test_a_header_that_claims_what_a_stream_could_hold_costs_no_memory(tmp_path):
    noise = np.random.default_rng(0).bytes(300_000)  # packed no smaller, so up to 310 MB are plausible
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(forged((400, 400, 400), False) + noise))
    tracemalloc.start()
    try:
        with pytest.raises(
            UserError, match=r"a\.nii\.gz claims 256,000,352 bytes, but its stream holds 300,"
        ):
            read_volume(tmp_path / "a.nii.gz")
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


def test_a_stream_that_goes_on_after_the_volume_is_not_read_to_its_end(tmp_path):
    content = nib.Nifti1Image(voxels_of(), np.eye(4)).to_bytes()
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(content + b"a short note"))
    np.testing.assert_array_equal(read_volume(tmp_path / "a.nii.gz")[0], voxels_of())
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(content + bytes(100_000_000), compresslevel=1))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"a\.nii\.gz continues after the 832 bytes"):
            read_volume(tmp_path / "a.nii.gz")
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_mutated_headers_give_a_volume_or_a_user_error(tmp_path, name):
    content = nib.Nifti1Image(voxels_of(np.int16), np.diag([2, 2, 2, 1])).to_bytes()
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        mutated = bytearray(content)
        for position in generator.integers(0, 352, generator.integers(1, 6)):
            mutated[position] = generator.integers(0, 256)
        (tmp_path / name).write_bytes(gzip.compress(mutated) if name.endswith("gz") else mutated)
        outcome = volume_or_error(tmp_path / name)
        if isinstance(outcome, UserError):
            refused += 1
            assert name in str(outcome)
            assert "\n" not in str(outcome)
        else:
            assert outcome[0].ndim == 3
            assert np.isfinite(outcome[0]).all()
            assert abs(np.linalg.det(outcome[1])) > 0
    assert 20 < refused < 280  # both ways were taken


@pytest.mark.skipif(not DATA.exists(), reason="needs the real volumes of ../shared/data")
def test_real_stiffness_map_is_turned_from_las_to_ras():
    path = DATA / "mre_stiffness" / "sub-001" / "mre" / "sub-001_stiffness.nii.gz"
    stored = nib.load(path)
    assert nib.aff2axcodes(stored.affine) == ("L", "A", "S")
    voxels, affine = read_volume(path)
    np.testing.assert_array_equal(voxels, np.asarray(stored.dataobj)[::-1])
    np.testing.assert_array_equal(affine, affine_of([2, 2, 2], [-90, -126, -72]))


def test_a_small_file_that_would_fill_the_memory_is_refused_in_words(tmp_path, monkeypatch):
    """A quarter of a megabyte of packed zeros, but for one voxel, is a gigabyte of float32."""
    shape = (640, 640, 640)
    voxels = np.zeros(shape, np.uint8)
    voxels[1, 2, 3] = 1
    path = tmp_path / "bomb.nii.gz"
    path.write_bytes(gzip.compress(nib.Nifti1Image(voxels, np.eye(4)).to_bytes(), 9))
    size = path.stat().st_size
    assert size < 300_000
    with pytest.raises(
        UserError, match=rf"would take 1,049 MB of memory, {4 * voxels.size / size:,.0f} times"
    ) as refused:
        read_volume(path)
    (remedy,) = re.findall(rf"set {UNPACKED_RATIO}=(\d+)", str(refused.value))
    monkeypatch.setenv(UNPACKED_RATIO, remedy)
    assert read_geometry(path)[0] == shape
    monkeypatch.setenv(UNPACKED_RATIO, str(int(remedy) - 1))
    with pytest.raises(UserError, match="times as much"):
        read_geometry(path)


def test_a_map_that_packs_very_well_is_read(tmp_path):
    path = tmp_path / "mask.nii.gz"
    mask = np.zeros((256, 256, 256), np.float32)
    mask[100:150, 100:150, 100:150] = 1
    nib.save(nib.Nifti1Image(mask, np.eye(4)), path)
    assert mask.nbytes / path.stat().st_size > 200
    np.testing.assert_array_equal(read_volume(path)[0], mask)
