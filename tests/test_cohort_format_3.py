"""Format 3: several maps, each absent or not, boxes, edges of three lengths; and cohorts that version 0.2 wrote."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import apply_affine
from reference_resample import affine_of
from test_shards import KINDS, SHAPE, label, volume

from core.errors import UserError
from core.volumes.cohort import reader
from core.volumes.cohort.reader import Cohort
from core.volumes.cohort.shards import read_compressed
from core.volumes.cohort.verify import verify
from core.volumes.cohort.writer import CohortWriter
from core.volumes.images.preprocess import Preprocessing, grid_affine
from core.volumes.images.resample import resample
from core.volumes.ingest.cohort import ingest
from core.volumes.ingest.prepare import prepare_scan
from core.volumes.sources import list_scans
from core.volumes.sources.listing import ImageFile, Scan

OF_0_2 = Path(__file__).parent / "fixtures" / "cohorts_0_2"
BOX = (slice(1, 6), slice(2, 3), slice(0, SHAPE[2]))


def write(folder, **options):
    """Five scans: all have the map `dseg`, the even ones `lesion`, and the ages of two are unknown."""
    writer = CohortWriter(
        folder, name="tiny", channels=["T1w", "FLAIR"], shape=SHAPE, spacing=(1.0, 2.0, 5.0), affine=np.eye(4),
        volumes_per_shard=2, dtype="float16", maps=["dseg", "lesion"], **options,
    )  # fmt: skip
    with writer:
        for number in range(5):
            maps = {"dseg": label(number)} | ({"lesion": label(50 + number)} if number % 2 == 0 else {})
            age = 20.0 + number if number > 1 else float("nan")
            writer.add(volume(number), subject=f"sub-{number}", age=age, maps=maps)
    return Cohort.open(folder)


@pytest.mark.parametrize(("storage", "compression"), KINDS)
def test_maps_that_are_there_are_read_and_the_others_are_named(tmp_path, storage, compression):
    cohort = write(tmp_path / "c", storage=storage, compression=compression)
    assert verify(cohort.folder) == []
    assert cohort.description.map_names == ("dseg", "lesion")
    assert cohort.description.edges == (1.0, 2.0, 5.0)
    assert np.isnan(cohort.manifest["age"]).tolist() == [True, True, False, False, False]
    assert cohort.has_map("dseg").all()
    assert cohort.has_map("lesion").tolist() == [True, False, True, False, True]
    np.testing.assert_array_equal(cohort.read_map("dseg", [3, 0]), [label(3), label(0)])
    np.testing.assert_array_equal(cohort.read_map("lesion", [4, 2]), [label(54), label(52)])
    with pytest.raises(UserError, match="sub-3 has no map 'lesion'"):
        cohort.read_map("lesion", [2, 3])
    with pytest.raises(UserError, match="has no maps 'lesions': it has dseg, lesion"):
        cohort.read_map("lesions", [2])


@pytest.mark.parametrize(("storage", "compression"), KINDS)
def test_a_box_is_that_part_of_the_whole(tmp_path, storage, compression):
    cohort = write(tmp_path / "c", storage=storage, compression=compression)
    rows = [4, 0, 0, 3]
    np.testing.assert_array_equal(
        cohort.read_stored(rows, boxes=[BOX] * 4), cohort.read_stored(rows)[..., *BOX]
    )
    np.testing.assert_array_equal(
        cohort.read_map("dseg", rows, boxes=[BOX] * 4), cohort.read_map("dseg", rows)[:, *BOX]
    )
    into = np.empty((4, 2, 5, 1, SHAPE[2]), dtype=np.float16)
    assert cohort.read_stored(rows, out=into, boxes=[BOX] * 4) is into
    np.testing.assert_array_equal(into, cohort.read_stored(rows)[..., *BOX])


@pytest.mark.parametrize(("storage", "compression"), KINDS)
def test_every_row_has_its_own_box_and_a_packed_volume_is_read_once_for_all_of_them(
    tmp_path, storage, compression, monkeypatch
):
    cohort = write(tmp_path / "c", storage=storage, compression=compression)
    rows = [4, 4, 4, 1, 0]
    boxes = [(slice(0, 3), slice(at, at + 1), slice(2, 2 + 3)) for at in range(5)]
    expected = np.stack(
        [cohort.read_stored([row])[0][..., *box] for row, box in zip(rows, boxes, strict=True)]
    )
    read = []
    monkeypatch.setattr(
        reader, "read_compressed", lambda *given: read.append(given[3]) or read_compressed(*given)
    )
    np.testing.assert_array_equal(cohort.read_stored(rows, boxes=boxes), expected)
    assert len(read) == (0 if compression == "none" else 3)
    with pytest.raises(ValueError, match="4 boxes cannot be read from 5 rows"):
        cohort.read_stored(rows, boxes=boxes[:4])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (slice(0, 6, 2), "is no part of"), (slice(-1, 2), "is no part of"), (slice(3, 3), "is no part of"),
        (slice(SHAPE[0] - 1, SHAPE[0] + 1), "is no part of"), (slice(0, 4), "all boxes must have one shape"),
    ],
)  # fmt: skip
def test_boxes_beyond_the_grid_or_of_several_shapes_are_refused(tmp_path, wrong, says):
    cohort = write(tmp_path / "c")
    with pytest.raises(ValueError, match=says):
        cohort.read_stored([0, 1], boxes=[BOX, (wrong, *BOX[1:])])


def test_the_subject_whose_box_lies_behind_the_end_of_a_shard_is_named(tmp_path):
    cohort = write(tmp_path / "c")
    end = int(cohort.manifest["offset"].iloc[1])
    os.truncate(cohort.folder / "shards" / "00000.h5", end)
    with pytest.raises(UserError, match=r"row 1, subject sub-1: the file ends too early"):
        cohort.read_stored([0, 1], boxes=[BOX, BOX])


def test_a_shard_that_was_written_anew_is_not_read_as_it_was(tmp_path):
    """A mapped file that becomes shorter ends the process that reads beyond its end."""
    cohort = write(tmp_path / "c")
    shard = cohort.folder / "shards" / "00000.h5"
    before = cohort.read_stored([0], boxes=[BOX])
    content = shard.read_bytes()
    os.truncate(shard, 300)
    with pytest.raises(UserError, match="ends too early"):
        cohort.read_stored([0], boxes=[BOX])
    shard.write_bytes(content)
    np.testing.assert_array_equal(cohort.read_stored([0], boxes=[BOX]), before)


def test_a_shard_that_is_cut_off_is_named_when_a_box_is_read(tmp_path):
    cohort = write(tmp_path / "c")
    shard = cohort.folder / "shards" / "00001.h5"
    shard.write_bytes(shard.read_bytes()[:300])
    with pytest.raises(UserError, match=r"00001\.h5.*ends too early"):
        cohort.read_stored([2], boxes=[BOX])
    cohort.read_stored([0], boxes=[BOX])


@pytest.mark.parametrize("storage", ["hdf5", "parquet"])
def test_a_cohort_of_version_0_2_opens_in_place(tmp_path, storage):
    """Written by that version, with the volumes and maps that tests/test_shards.py makes."""
    shutil.copytree(OF_0_2 / storage, tmp_path / "c")
    before = {path: path.read_bytes() for path in (tmp_path / "c").rglob("*") if path.is_file()}
    assert b'"format": 2' in before[tmp_path / "c" / "cohort.json"]
    cohort = Cohort.open(tmp_path / "c")
    assert verify(cohort.folder) == []
    rows = range(4)
    np.testing.assert_allclose(cohort.read(rows), [volume(row) for row in rows], atol=2e-3, rtol=0)
    assert cohort.description.map_names == ("label",)
    assert cohort.description.edges == (4.0, 4.0, 4.0)
    assert cohort.has_map("label").all()
    np.testing.assert_array_equal(cohort.read_map("label", rows), [label(row) for row in rows])
    np.testing.assert_array_equal(
        cohort.read_map("label", rows, boxes=[BOX] * 4), np.stack([label(row)[BOX] for row in rows])
    )
    assert {path: path.read_bytes() for path in (tmp_path / "c").rglob("*") if path.is_file()} == before


def scan_of(path, voxels, affine):
    nib.save(nib.Nifti1Image(voxels.astype(np.float32), affine), path)
    return Scan(subject="one", images=(ImageFile(path),))


def ball(shape, affine):
    """An uneven ball of 40 mm around the origin."""
    places = apply_affine(affine, np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1))
    return (np.linalg.norm(places, axis=-1) < 40) * (100 + places[..., 0] + 0.5 * places[..., 2])


def test_the_hash_of_a_scan_knows_it_under_another_name_and_spacing(tmp_path):
    shape, affine = (30, 28, 26), affine_of([-3.0, 3, 3.5], [44, -40, -45])
    voxels = ball(shape, affine)
    raw = {"intensity": "raw", "centre": "brain"}
    first = prepare_scan(scan_of(tmp_path / "a.nii", voxels, affine), Preprocessing(spacing=4, **raw)).origin
    again = prepare_scan(
        scan_of(tmp_path / "b.nii.gz", voxels, affine), Preprocessing(spacing=(4, 4, 8), **raw)
    ).origin
    assert again == first
    assert first["source_shape"] == list(shape)
    assert first["source_affine"] == affine[:3].ravel().tolist()
    assert first["source_codes"] == "LAS"
    with_axis = prepare_scan(
        scan_of(tmp_path / "d.nii", voxels[..., None], affine), Preprocessing(spacing=4, **raw)
    ).origin
    assert with_axis == first | {"source_shape": [*shape, 1]}
    voxels[15, 14, 13] += 1
    other = prepare_scan(scan_of(tmp_path / "c.nii", voxels, affine), Preprocessing(spacing=4, **raw)).origin
    assert other["source_hash"] != first["source_hash"]


def test_thick_slices_have_their_own_edge_and_hold_the_same_places(tmp_path):
    affine = affine_of([2.0, 2, 2], [-46, -46, -46])
    settings = Preprocessing(spacing=(2, 4, 8), intensity="raw", centre="brain")
    # 182 x 218 x 182 mm
    assert settings.shape == (91, 55, 23)
    made = prepare_scan(scan_of(tmp_path / "a.nii", ball((47, 47, 47), affine), affine), settings)
    assert nib.affines.voxel_sizes(made.affine).tolist() == [2, 4, 8]
    inner = np.argwhere(made.voxels[0] != 0)
    places = apply_affine(made.affine, inner)
    deep = np.linalg.norm(places, axis=1) < 20
    assert deep.sum() > 300
    # Smoothing does not change what is linear.
    found = made.voxels[0][tuple(inner[deep].T)]
    np.testing.assert_allclose(found, 100 + places[deep, 0] + 0.5 * places[deep, 2], atol=0.6)


def test_a_spline_goes_through_what_is_cubic_and_linear_interpolation_does_not():
    shape, affine = (30, 30, 30), affine_of([2.0, 2, 2], [-29, -29, -29])
    target, coarse = grid_affine(1.5, (12, 12, 12), (0.4, 0.3, -0.2)), (12, 12, 12)

    def cubic(places):
        x, y, z = np.moveaxis(places / 10, -1, 0)
        return (50 + x**3 - 4 * y**2 * z + x * y).astype(np.float32)

    def on(affine, shape):
        return cubic(
            apply_affine(affine, np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1))
        )

    expected = on(target, coarse)
    errors = {
        kind: np.abs(resample(on(affine, shape), affine, target, coarse, None, kind).voxels - expected).max()
        for kind in ("linear", "bspline")
    }
    assert errors["bspline"] < 1e-3
    assert errors["linear"] > 10 * errors["bspline"]


def test_a_spline_is_chosen_at_ingest_and_stays_out_of_old_settings():
    assert "interpolation" not in Preprocessing().settings
    spline = Preprocessing(interpolation="bspline")
    assert Preprocessing.from_settings(spline.settings) == spline
    assert spline.hash != Preprocessing().hash


def test_the_paths_of_a_list_begin_at_the_root(tmp_path):
    for folder in ("images", "lists"):
        (tmp_path / folder).mkdir()
    affine = affine_of([4.0, 4, 4], [-50, -50, -50])
    for name in ("a", "b"):
        scan_of(tmp_path / "images" / f"{name}.nii", ball((26, 26, 26), affine), affine)
    listed = tmp_path / "lists" / "list.csv"
    listed.write_text("subject,path,age\nx,a.nii,30\ny,b.nii,\n")
    assert len(list_scans(listed).rejects) == 2
    listing = list_scans(listed, root=tmp_path / "images")
    report = ingest(listing, tmp_path / "c", Preprocessing(spacing=8, intensity="raw", centre="brain"))
    assert report.cohort.manifest["subject"].tolist() == ["x", "y"]
    assert np.isnan(report.cohort.manifest["age"]).tolist() == [False, True]
