from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import apply_affine
from pydantic import ValidationError
from reference_resample import affine_of, rotation, trilinear

from core.errors import UserError
from core.inference import scan_of
from core.volumes.images.preprocess import Preprocessing
from core.volumes.ingest.prepare import prepare_scan
from core.volumes.sources.listing import ImageFile, Scan

SHAPE = (24, 28, 22)
AFFINE = affine_of([2.0, 2, 2], [-20, -30, -25])
SETTINGS = Preprocessing(spacing=4, shape=(16, 18, 14), intensity="raw", centre="brain")


def ball(shape: tuple[int, int, int] = SHAPE, affine: np.ndarray = AFFINE, seed: int = 0) -> np.ndarray:
    """An uneven ball of 16 mm around one place in mm, whatever the grid; 0 outside."""
    places = apply_affine(affine, np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1))
    away = places - [3.0, -2.0, -3.0]
    values = 100 + 2 * away[..., 0] + away[..., 1] + np.random.default_rng(seed).uniform(0, 1, shape)
    return np.where(np.linalg.norm(away, axis=-1) < 16, values, 0).astype(np.float32)


def save(path: Path, voxels: np.ndarray, affine: np.ndarray = AFFINE) -> ImageFile:
    nib.save(nib.Nifti1Image(voxels, affine), path)
    return ImageFile(path)


def classes(voxels: np.ndarray) -> np.ndarray:
    labels = np.zeros(voxels.shape, np.int16)
    labels[voxels > 0] = 1
    labels[voxels > 105] = 4
    return labels


@pytest.fixture
def scan(tmp_path) -> Scan:
    return Scan("sub-01", (save(tmp_path / "t1.nii", ball()),))


def test_channels_on_other_grids_are_laid_over_the_first_by_their_own_affines(scan, tmp_path):
    others = {
        "finer": affine_of([1.5, 1.5, 1.5], [-22, -31, -27]),
        "left-handed": affine_of([-2, 2, 2], [26, -30, -25]),
        "oblique": affine_of([2, 2, 2], [-20, -28, -24], rotation(0.2, -0.1, 0.15)),
    }
    files = [
        save(tmp_path / f"{name}.nii", ball((34, 40, 34), affine), affine) for name, affine in others.items()
    ]
    prepared = prepare_scan(replace(scan, images=(*scan.images, *files)), SETTINGS)
    assert prepared.voxels.shape == (4, *SETTINGS.shape)
    assert prepared.voxels.dtype == np.float32
    first = prepared.voxels[0]
    for other in prepared.voxels[1:]:
        both = (first != 0) & (other != 0)
        assert both.sum() > 0.93 * (first != 0).sum()
        # noise of 0 to 1 and a slope of 2.2 per mm: a shift of one 4 mm voxel would be 9
        assert np.abs(first - other)[both].mean() < 0.8


def test_a_label_map_follows_by_the_nearest_voxel_and_no_class_is_invented(scan, tmp_path):
    voxels = ball()
    labels = classes(voxels)
    settings = SETTINGS.model_copy(update={"spacing": 3.0})
    prepared = prepare_scan(replace(scan, maps={"label": save(tmp_path / "seg.nii", labels)}), settings)
    assert prepared.maps["label"].dtype == np.int16
    assert set(np.unique(prepared.maps["label"])) == {0, 1, 4}
    to_source = np.linalg.inv(AFFINE) @ prepared.affine
    for index in np.ndindex(*settings.shape):
        place = apply_affine(to_source, index)
        nearest = np.floor(place + 0.5).astype(int)
        if np.abs(place - np.floor(place) - 0.5).min() < 1e-6:
            continue  # half way between two voxels either is nearest
        within = (nearest >= 0).all() and (nearest < SHAPE).all()
        assert prepared.maps["label"][index] == (labels[tuple(nearest)] if within else 0)


def test_the_label_map_of_a_healthy_brain_is_all_0(scan, tmp_path):
    healthy = replace(scan, maps={"label": save(tmp_path / "seg.nii", np.zeros(SHAPE, np.uint8))})
    assert not prepare_scan(healthy, SETTINGS).maps["label"].any()


def test_what_nobody_knows_of_a_label_map_stays_unknown(scan, tmp_path):
    known = classes(ball())
    unknown = np.where(np.arange(SHAPE[0])[:, None, None] < SHAPE[0] // 2, -1, known).astype(np.int16)
    maps = {"all": save(tmp_path / "all.nii", known), "half": save(tmp_path / "half.nii", unknown)}
    prepared = prepare_scan(replace(scan, maps=maps), SETTINGS).maps
    hidden = prepared["half"] == -1
    assert 0.2 < hidden.mean() < 0.8
    np.testing.assert_array_equal(prepared["half"][~hidden], prepared["all"][~hidden])


def test_a_label_map_stored_in_another_orientation_is_the_same_grid(scan, tmp_path):
    image = nib.Nifti1Image(classes(ball()), AFFINE)
    turned = image.as_reoriented([[1, -1], [2, 1], [0, -1]])
    straight, other = (
        prepare_scan(
            replace(scan, maps={"label": save(tmp_path / f"{name}.nii", np.asarray(i.dataobj), i.affine)}),
            SETTINGS,
        )
        for name, i in (("straight", image), ("turned", turned))
    )
    np.testing.assert_array_equal(straight.maps["label"], other.maps["label"])


def test_the_mask_file_says_what_is_brain_also_where_the_image_is_0(tmp_path):
    voxels = ball() + np.float32(7)  # a head: not 0 anywhere
    voxels[12, 14, 11] = 0
    inside = ball() > 0
    head = save(tmp_path / "head.nii", voxels)
    mask = save(tmp_path / "mask.nii", inside.astype(np.uint8))
    settings = Preprocessing(spacing=2, shape=(25, 29, 23), intensity="raw", centre="brain", mask="file")
    prepared = prepare_scan(Scan("sub-01", (head,), mask=mask), settings)
    shift = np.rint(apply_affine(np.linalg.inv(AFFINE) @ prepared.affine, [0, 0, 0])).astype(int)
    index = np.indices(settings.shape).reshape(3, -1).T
    at = index + shift
    known = ((at >= 0) & (at < SHAPE)).all(axis=1)
    expected = np.zeros(len(index), bool)
    expected[known] = inside[tuple(at[known].T)]
    np.testing.assert_array_equal(prepared.voxels[0].ravel() != 0, expected)
    values = prepared.voxels[0].ravel()[known]
    original = np.where(inside, voxels, 0)[tuple(at[known].T)]
    np.testing.assert_allclose(values, original, atol=1e-4)


def test_a_mask_cuts_the_other_channels_too(tmp_path):
    mask = save(tmp_path / "mask.nii", (ball() > 0).astype(np.uint8))
    affine = affine_of([1.5, 1.5, 1.5], [-22, -31, -27])
    head, other = (
        save(tmp_path / "a.nii", ball() + 7),
        save(tmp_path / "b.nii", ball((34, 40, 34), affine) + 7, affine),
    )
    settings = SETTINGS.model_copy(update={"mask": "file"})
    first, second = prepare_scan(Scan("sub-01", (head, other), mask=mask), settings).voxels
    assert (first == 0).mean() > 0.5
    assert ((first != 0) == (second != 0)).mean() > 0.985


def test_quality_is_what_one_counts_by_hand(scan):
    voxels = ball()
    quality = prepare_scan(scan, SETTINGS).quality
    assert quality["brain_ml"] == pytest.approx(np.count_nonzero(voxels) * 8 / 1000)
    assert quality["coverage"] == 1
    assert np.isnan(quality["template_overlap"])
    target = prepare_scan(scan, SETTINGS).affine
    # at its own spacing nothing is smoothed, so the reference can follow
    fine = SETTINGS.model_copy(update={"spacing": 2.0, "shape": (26, 26, 26)})
    prepared = prepare_scan(scan, fine)
    expected = trilinear(voxels, AFFINE, prepared.affine, fine.shape)
    expected = np.sort(expected[expected != 0])
    assert prepared.quality["intensity_mean"] == pytest.approx(expected.mean(), rel=1e-4)
    assert prepared.quality["intensity_median"] == pytest.approx(np.median(expected), rel=1e-4)
    assert prepared.quality["intensity_p99"] == pytest.approx(expected[int(0.99 * expected.size)], rel=1e-3)
    np.testing.assert_allclose(np.diag(target)[:3], 4)


def test_intensities_are_measured_before_scaling_and_for_every_channel(scan, tmp_path):
    twice = save(tmp_path / "twice.nii", 2 * ball())
    both = replace(scan, images=(*scan.images, twice))
    raw, scaled = (
        prepare_scan(both, SETTINGS.model_copy(update={"intensity": i})) for i in ("raw", "zscore")
    )
    assert raw.quality == pytest.approx(scaled.quality, nan_ok=True)
    for name in ("mean", "median", "p01", "p99"):
        assert raw.quality[f"intensity_{name}_2"] == pytest.approx(
            2 * raw.quality[f"intensity_{name}"], rel=1e-5
        )
    inside = scaled.voxels[0] != 0
    assert inside.sum() == (raw.voxels[0] != 0).sum()
    assert (scaled.voxels[0][inside].mean(), scaled.voxels[0][inside].std()) == pytest.approx(
        (0, 1), abs=1e-3
    )


def damaged(tmp_path: Path, scan: Scan) -> dict[str, tuple[Scan, Preprocessing, str]]:
    voxels, first = ball(), scan.images[0]
    masked = SETTINGS.model_copy(update={"mask": "file"})
    away = AFFINE.copy()
    away[0, 3] += 3
    corner = np.zeros(SHAPE, np.uint8)
    corner[:2, :2, :2] = 1
    flat = np.where(voxels > 0, 5, 0).astype(np.float32)
    half = classes(voxels).astype(np.float32) / 2
    label = {"shape": classes(ball((20, 28, 22))), "affine": classes(voxels), "half": half}
    far = affine_of([2.0, 2, 2], [900, 0, 0])
    return {
        "label of another shape": (
            replace(scan, maps={"label": save(tmp_path / "a.nii", label["shape"])}), SETTINGS,
            r"a\.nii: this label map has \(20, 28, 22\) voxels, its image t1\.nii has \(24, 28, 22\)"),
        "label moved": (
            replace(scan, maps={"label": save(tmp_path / "b.nii", label["affine"], away)}), SETTINGS,
            r"b\.nii: this label map lies 1\.5 voxels away from its image t1\.nii"),
        "label of halves": (
            replace(scan, maps={"label": save(tmp_path / "c.nii", label["half"])}), SETTINGS,
            r"c\.nii: classes must be whole numbers from 0 to 32767, or -1 where unknown, got 0\.5"),
        "negative label": (
            replace(scan, maps={"label": save(tmp_path / "d.nii", -classes(voxels))}), SETTINGS,
            r"d\.nii: classes must be whole numbers from 0 to 32767, or -1 where unknown, got -"),
        "label too large": (
            replace(scan, maps={"label": save(tmp_path / "e.nii", 40_000 * classes(voxels).astype(np.int32))}),
            SETTINGS,
            r"e\.nii: classes must be whole numbers from 0 to 32767, or -1 where unknown, got 160000"),
        "mask of another shape": (
            replace(scan, mask=save(tmp_path / "f.nii", (ball((20, 28, 22)) > 0).astype(np.uint8))), masked,
            r"f\.nii: this mask has \(20, 28, 22\) voxels"),
        "empty mask": (
            replace(scan, mask=save(tmp_path / "g.nii", np.zeros(SHAPE, np.uint8))), masked,
            r"g\.nii is empty: every voxel is 0"),
        "mask beside the brain": (
            replace(scan, mask=save(tmp_path / "h.nii", corner)), masked,
            r"h\.nii: the image is 0 everywhere inside this mask"),
        "no mask": (scan, masked, r"t1\.nii comes with no brain mask, but preprocessing has mask='file'"),
        "mask not wanted": (
            replace(scan, mask=save(tmp_path / "i.nii", (voxels > 0).astype(np.uint8))), SETTINGS,
            r"i\.nii: a brain mask is listed, but preprocessing has mask=None"),
        "constant brain": (
            replace(scan, images=(save(tmp_path / "j.nii", flat),)),
            SETTINGS.model_copy(update={"intensity": "zscore"}), r"j\.nii: the voxels of the brain are all alike"),
        "constant second channel": (
            replace(scan, images=(first, save(tmp_path / "k.nii", flat))),
            SETTINGS.model_copy(update={"intensity": "percentile:1,99"}), r"k\.nii: percentiles 1 and 99 .* both 5"),
        "second channel elsewhere": (
            replace(scan, images=(first, save(tmp_path / "l.nii", ball((24, 28, 22), AFFINE), far))), SETTINGS,
            r"l\.nii: no voxel of the brain falls into the grid"),
        "all below the window": (
            scan, SETTINGS.model_copy(update={"intensity": "window:500,600"}),
            r"t1\.nii: no voxel is above the lower end of window:500,600"),
        "missing channel": (
            replace(scan, images=(first, ImageFile(tmp_path / "gone.nii"))), SETTINGS, r"gone\.nii does not exist"),
    }  # fmt: skip


DAMAGES = (
    "label of another shape", "label moved", "label of halves", "negative label", "label too large",
    "mask of another shape", "empty mask", "mask beside the brain", "no mask", "mask not wanted", "constant brain",
    "constant second channel", "second channel elsewhere", "all below the window", "missing channel",
)  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_what_cannot_be_used_is_refused_in_one_line_that_names_the_file(name, scan, tmp_path):
    wrong, settings, said = damaged(tmp_path, scan)[name]
    with pytest.raises(UserError, match=said) as refused:
        prepare_scan(wrong, settings)
    assert "\n" not in str(refused.value)
    assert str(tmp_path) in str(refused.value)


def test_affines_that_differ_by_rounding_are_one_grid(scan, tmp_path):
    rounded = AFFINE + np.random.default_rng(0).uniform(-1, 1, (4, 4)) * 1e-4
    rounded[3] = [0, 0, 0, 1]
    label = save(tmp_path / "seg.nii", classes(ball()), rounded)
    assert prepare_scan(replace(scan, maps={"label": label}), SETTINGS).maps["label"].any()


def test_rows_of_arrays_are_prepared_like_files(scan, tmp_path):
    np.save(tmp_path / "all.npy", np.stack([np.ones(SHAPE, np.float32), ball()]))
    row = ImageFile(tmp_path / "all.npy", row=1, affine=tuple(map(tuple, AFFINE.tolist())))
    ours, theirs = (prepare_scan(each, SETTINGS) for each in (replace(scan, images=(row,)), scan))
    np.testing.assert_array_equal(ours.voxels, theirs.voxels)
    with pytest.raises(UserError, match=r"all\.npy row 0 is constant"):
        prepare_scan(replace(scan, images=(replace(row, row=0),)), SETTINGS)


def test_prediction_prepares_files_as_ingest_did(scan, tmp_path):
    mask = save(tmp_path / "mask.nii", (ball() > 100).astype(np.uint8))
    for settings, masks in ((SETTINGS, None), (SETTINGS.model_copy(update={"mask": "file"}), mask.path)):
        expected = prepare_scan(replace(scan, mask=mask if masks else None), settings).voxels
        np.testing.assert_array_equal(
            prepare_scan(scan_of(scan.images[0].path, masks), settings).voxels, expected
        )
    with pytest.raises(UserError, match="comes with no brain mask"):
        prepare_scan(scan_of(scan.images[0].path), settings)


def test_settings_round_trip_and_equal_voxels_have_equal_hashes():
    settings = Preprocessing(spacing=2, intensity="window:ct", mask="file", registration="affine")
    assert settings.centre == "world"
    assert settings.intensity == "window:-1000,1000"
    assert Preprocessing.from_settings(settings.settings) == settings
    assert (
        settings.hash
        == Preprocessing(
            spacing=2, intensity="window:-1e3, 1e3", mask="file", registration="affine", centre="world"
        ).hash
    )
    others = [{"mask": None}, {"registration": None}, {"intensity": "window:ct_brain"}]
    assert len({settings.hash, *(settings.model_copy(update=each).hash for each in others)}) == 4
    for wrong, message in (
        ({"registration": "rigid"}, "registration\n  Input should be 'affine' "),
        ({"mask": "otsu"}, "mask\n  Input should be 'file' "),
        ({"registration": "affine", "centre": "brain"}, "centre 'brain' cannot act with registration"),
    ):
        with pytest.raises(ValidationError, match=message):
            Preprocessing(**wrong)
    with pytest.raises(ValidationError, match="did you mean 'window'"):
        Preprocessing(intensity="windw:ct")


def test_settings_of_phantoms_or_of_another_version_are_refused_by_name():
    with pytest.raises(UserError, match="phantoms, which are made on their grid"):
        Preprocessing.from_settings({"phantom": 1, "spacing": 4.0})
    with pytest.raises(UserError, match="setting 'denoise'"):
        Preprocessing.from_settings({**Preprocessing().settings, "denoise": True})
