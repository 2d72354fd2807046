from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.affines import apply_affine
from nilearn.image import resample_img
from pydantic import ValidationError
from reference_resample import affine_of, rotation, trilinear

from core.errors import UserError
from core.volumes.images.intensity import Intensity, scale
from core.volumes.images.nifti import read_volume
from core.volumes.images.preprocess import (
    IntensityStatistics,
    Preprocessing,
    covers_template_field,
    fit_intensity_statistics,
    grid_affine,
    normalise,
)
from core.volumes.images.resample import resample
from core.volumes.ingest.prepare import PreparedScan, brain_centre, prepare_scan
from core.volumes.sources.listing import ImageFile, Scan

DATA = Path(__file__).parents[1].parent / "shared" / "data"
OBLIQUE = rotation(0.2, -0.15, 0.3)


def prepare_volume(
    folder: Path, voxels: np.ndarray, affine: np.ndarray, settings: Preprocessing
) -> PreparedScan:
    path = folder / "volume.nii"
    nib.save(nib.Nifti1Image(voxels.astype(np.float32), affine), path)
    return prepare_scan(Scan("sub-01", (ImageFile(path),)), settings)


def bump(shape: tuple[int, int, int], affine: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """A Gaussian of SD 5 mm around `centre` mm, 0 from 20 mm on: a landmark that survives coarse voxels."""
    places = apply_affine(affine, np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1))
    distance = np.linalg.norm(places - centre, axis=-1)
    return np.where(distance < 20, 100 * np.exp(-(distance**2) / 50), 0).astype(np.float32)


def ball(shape: tuple[int, int, int], affine: np.ndarray, centre: list[float], radius: float) -> np.ndarray:
    """A ball of `radius` mm around `centre` mm: 100 inside, 0 outside."""
    places = apply_affine(affine, np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1))
    return np.where(np.linalg.norm(places - centre, axis=-1) <= radius, 100, 0).astype(np.float32)


def centre_of_mass(voxels: np.ndarray, affine: np.ndarray) -> np.ndarray:
    return apply_affine(affine, np.average(np.argwhere(voxels), axis=0, weights=voxels[voxels != 0]))


@pytest.mark.parametrize(
    ("spacing", "shape"), [(1, (182, 218, 182)), (2, (91, 109, 91)), (4, (46, 55, 46)), (8, (23, 28, 23))]
)
def test_default_grids(spacing, shape):
    preprocessing = Preprocessing(spacing=spacing)
    assert preprocessing.shape == shape
    first, last = apply_affine(preprocessing.affine, [(0, 0, 0), np.array(shape) - 1])
    np.testing.assert_allclose(
        (first + last) / 2, [0, -18, 18]
    )  # the middle of MNI152's -90…90, -126…90, -72…108
    assert (last - first + spacing >= [182, 218, 182]).all()


def test_settings_and_hash():
    first = Preprocessing(spacing=4, intensity="raw", centre="brain")
    assert first.hash == Preprocessing(centre="brain", shape=(46, 55, 46), intensity="raw", spacing=4.0).hash
    others = [
        first.model_copy(update=change)
        for change in (
            {"spacing": 2.0},
            {"shape": (46, 55, 47)},
            {"intensity": "zscore"},
            {"centre": "world"},
        )
    ]
    assert len({other.hash for other in [first, *others]}) == 5
    assert Preprocessing.from_settings(first.settings) == first
    assert len({first, Preprocessing.from_settings(first.settings)}) == 1
    with pytest.raises(UserError, match="version 99"):
        Preprocessing.from_settings({**first.settings, "version": 99})
    for wrong, message in (
        ({"spacing": 0}, r"spacing\.constrained-float\n  Input should be greater than or equal to 0.5 "),
        ({"shape": (0, 5, 5)}, r"shape\.0\n  Input should be greater than or equal to 1 "),
        ({"shape": (5, 5)}, r"shape\.2\n  Field required "),
        ({"intensity": "log"}, "unknown intensity 'log'; known: hu, percentile, raw, window, zscore"),
        ({"spcing": 4}, "spcing\n  Extra inputs are not permitted "),
    ):
        with pytest.raises(ValidationError, match=message):
            Preprocessing(**wrong)


AFFINES = {
    "aligned": affine_of([2, 2, 2], [-9, -8, -7]),
    "left-handed": affine_of([-2, 2, 2], [9, -8, -7]),
    "anisotropic": affine_of([1.5, 2, 3], [-6, -8, -10]),
    "oblique": affine_of([2, 1.7, 2.2], [-7, -9, -6], OBLIQUE),
    "oblique left-handed": affine_of([2, -1.7, 2.2], [-10, 7, -8], OBLIQUE),
}


@pytest.mark.parametrize("name", AFFINES)
def test_resampling_to_finer_voxels_is_trilinear_within_the_mask(name):
    voxels = np.random.default_rng(0).uniform(1, 2, (9, 10, 8)).astype(np.float32)
    voxels[:2] = voxels[:, :, -2:] = voxels[4, 5, 4] = 0
    target, shape = grid_affine(1.5, (11, 12, 10), [0.3, 0.2, -0.1]), (11, 12, 10)
    expected = trilinear(voxels, AFFINES[name], target, shape)
    result = resample(voxels, AFFINES[name], target, shape).voxels
    assert 0.1 < (expected != 0).mean() < 0.9
    # a weight of exactly one half may fall on either side of the threshold by rounding
    differs = (result != 0) != (expected != 0)
    assert differs.mean() < 0.02
    np.testing.assert_allclose(result[~differs], expected[~differs], rtol=2e-5)


@pytest.mark.parametrize("name", ["anisotropic", "oblique", "oblique left-handed"])
def test_agrees_with_nilearn_away_from_the_mask_edge(name):
    voxels = np.random.default_rng(1).uniform(1, 2, (12, 13, 14)).astype(np.float32)
    target, shape = grid_affine(1.5, (8, 8, 8), apply_affine(AFFINES[name], [5.5, 6, 6.5])), (8, 8, 8)
    image = nib.Nifti1Image(voxels, AFFINES[name])
    expected = resample_img(
        image, target, shape, interpolation="linear", copy_header=True, force_resample=True
    )
    np.testing.assert_allclose(
        resample(voxels, AFFINES[name], target, shape).voxels, expected.get_fdata(), rtol=1e-5
    )


@pytest.mark.parametrize("name", AFFINES)
@pytest.mark.parametrize("spacing", [2.0, 4.0])
def test_a_landmark_stays_at_its_mm(name, spacing, tmp_path):
    affine = AFFINES[name].copy()
    affine[:3, 3] *= 6
    landmark = apply_affine(affine, [33, 24, 30])
    voxels = bump((60, 60, 60), affine, landmark)
    for centre in ("brain", "world"):
        settings = Preprocessing(spacing=spacing, intensity="raw", centre=centre, shape=(64, 64, 64))
        prepared = prepare_volume(tmp_path, voxels, affine, settings)
        assert prepared.quality["coverage"] == 1
        np.testing.assert_allclose(np.diag(prepared.affine)[:3], spacing)
        found = centre_of_mass(prepared.voxels[0], prepared.affine)
        np.testing.assert_allclose(found, landmark, atol=0.02)
        middle = apply_affine(prepared.affine, np.full(3, 31.5))
        np.testing.assert_allclose(middle, landmark if centre == "brain" else [0, -18, 18], atol=2)


def test_left_stays_left(tmp_path):
    affine = affine_of([2, 2, 2], [-60, -60, -60])
    voxels = ball((60, 60, 60), affine, [0, 0, 0], radius=50)
    voxels[10, 30, 30] = 5000  # at X = -40 mm: the subject's left
    prepared = prepare_volume(
        tmp_path, voxels, affine, Preprocessing(spacing=4, intensity="raw", centre="brain")
    )
    brightest = np.unravel_index(prepared.voxels[0].argmax(), prepared.voxels[0].shape)
    np.testing.assert_allclose(apply_affine(prepared.affine, brightest), [-40, 0, 0], atol=2.01)
    assert brightest[0] < prepared.voxels[0].shape[0] / 2


@pytest.mark.parametrize("spacing", [2.0, 3.3, 4.0, 8.0])
def test_the_edge_is_neither_dark_nor_spread_and_volume_is_kept(spacing, tmp_path):
    affine = AFFINES["oblique"]
    voxels = ball((64, 64, 64), affine, apply_affine(affine, [32, 31, 30]).tolist(), radius=45)
    result = prepare_volume(
        tmp_path, voxels, affine, Preprocessing(spacing=spacing, intensity="raw", centre="brain")
    ).voxels
    inside = result[result != 0]
    np.testing.assert_allclose(inside, 100, rtol=1e-5)
    expected = 4 / 3 * np.pi * 45**3
    assert inside.size * spacing**3 == pytest.approx(expected, rel=0.03)


def test_smoothing_before_downsampling_keeps_a_fine_pattern_from_aliasing():
    affine = affine_of([1, 1, 1], [0, 0, 0])
    voxels = 100 + 50 * (-1.0) ** np.arange(64)[:, None, None] * np.ones((64, 64, 64), np.float32)
    target = grid_affine(4, (12, 12, 12), [32, 32, 32])
    result = resample(voxels.astype(np.float32), affine, target, (12, 12, 12)).voxels
    np.testing.assert_allclose(result, 100, atol=0.5)
    # FWHM sqrt(16 - 1) mm: sigma 1.64 mm, which leaves exp(-2 (pi sigma f)^2) of a wave of f = 1/8 per mm
    wave = 100 + 50 * np.cos(2 * np.pi * np.arange(64) / 8)[:, None, None] * np.ones((64, 64, 64))
    smooth = resample(wave.astype(np.float32), affine, affine_of([4, 4, 4], [16, 16, 16]), (8, 8, 8)).voxels
    kept = np.exp(-2 * (np.pi * np.sqrt(15) / np.sqrt(8 * np.log(2)) / 8) ** 2)
    np.testing.assert_allclose(smooth[::2] - 100, 50 * kept, rtol=0.01)


def test_the_same_grid_gives_the_same_bits():
    voxels = np.random.default_rng(0).normal(size=(9, 10, 8)).astype(np.float32)
    voxels[voxels < 0] = 0
    affine = AFFINES["aligned"]
    np.testing.assert_array_equal(resample(voxels, affine, affine, voxels.shape).voxels, voxels)


def test_a_volume_of_the_right_spacing_is_moved_without_interpolation(tmp_path):
    affine = affine_of([2, 2, 2], [-31.3, 4.7, 12.9])
    voxels = np.zeros((120, 130, 100), np.float32)
    voxels[30:90, 20:95, 11:71] = np.random.default_rng(0).uniform(1, 2, (60, 75, 60))
    prepared = prepare_volume(
        tmp_path, voxels, affine, Preprocessing(spacing=2, intensity="raw", centre="brain")
    )
    np.testing.assert_array_equal(
        np.sort(prepared.voxels[0][prepared.voxels[0] != 0]), np.sort(voxels[voxels != 0])
    )


def test_brain_centre_ignores_stray_voxels():
    affine = affine_of([2, 2, 2], [0, 0, 0])
    voxels = ball((64, 64, 64), affine, [40, 50, 60], radius=30)
    np.testing.assert_allclose(brain_centre(voxels != 0, affine), [40, 50, 60], atol=2)
    voxels[63, 63, 0:3] = 1
    np.testing.assert_allclose(brain_centre(voxels != 0, affine), [40, 50, 60], atol=2)


def test_coverage_counts_the_voxels_inside(tmp_path):
    affine = affine_of([2, 2, 2], [0, 0, 0])
    voxels = np.zeros((40, 40, 40), np.float32)
    voxels[10:30, 10:30, 10:30] = 1
    settings = Preprocessing(spacing=4.2, shape=(5, 20, 20), intensity="raw", centre="brain")
    # the grid reaches 10.5 mm to both sides of voxel 19, at 38 mm: voxels 14 to 24 of 10 to 29
    assert prepare_volume(tmp_path, voxels, affine, settings).quality["coverage"] == pytest.approx(11 / 20)
    far = affine_of([2, 2, 2], [500, 0, 0])
    with pytest.raises(UserError, match=r"volume\.nii: no voxel of the brain falls into the grid"):
        prepare_volume(tmp_path, voxels, far, Preprocessing(centre="world"))


def test_template_space_is_recognised_by_its_field_of_view():
    assert covers_template_field((91, 109, 91), affine_of([2, 2, 2], [-90, -126, -72]))
    assert covers_template_field((91, 109, 91), affine_of([-2, 2, 2], [90, -126, -72]))
    assert covers_template_field((182, 218, 182), affine_of([-1, 1, 1], [90, -126, -72]))
    assert covers_template_field(
        (193, 229, 193), affine_of([1, 1, 1], [-96, -132, -78])
    )  # MNI152NLin2009cAsym
    assert covers_template_field((121, 145, 121), affine_of([1.5, 1.5, 1.5], [-90, -126, -72]))
    assert not covers_template_field((91, 109, 91), affine_of([2, 2, 2], [-90, -126, -92]))
    assert not covers_template_field((256, 256, 192), affine_of([1, 1, 1], [-128, -128, -96]))
    tilted = affine_of([2, 2, 2], [0, 0, 0], rotation(0.05, 0, 0))
    tilted[:3, 3] = np.array([0, -18, 18]) - apply_affine(tilted, [45, 54, 45])
    assert not covers_template_field((91, 109, 91), tilted)


def test_zscore():
    voxels = np.random.default_rng(0).uniform(3000, 4000, (6, 7, 8)).astype(np.float32)
    voxels[:3] = 0
    result = scale(voxels, voxels != 0, Intensity("zscore"))
    assert (result[:3] == 0).all()
    inside = voxels[3:].astype(np.float64)
    np.testing.assert_allclose(result[3:], (inside - inside.mean()) / inside.std(), atol=1e-4)
    with pytest.raises(UserError, match="all alike"):
        scale(np.where(voxels > 0, 5, 0).astype(np.float32), voxels > 0, Intensity("zscore"))


def test_intensity_statistics_are_those_of_all_voxels_together():
    generator = np.random.default_rng(0)
    volumes = [
        generator.normal([[[[mean]]], [[[1e6]]]], [[[[5]]], [[[0.5]]]], size=(2, 4, 5, 6))
        for mean in (100, 200, 50)
    ]
    for volume in volumes:
        volume[:, generator.random((4, 5, 6)) < 0.3] = 0
    volumes[1][1] = 0  # a channel may be absent in one volume
    mean, sd = fit_intensity_statistics(iter(volumes))
    for channel in range(2):
        inside = np.concatenate([volume[channel][volume[channel] != 0] for volume in volumes])
        assert mean[channel] == pytest.approx(inside.mean(), rel=1e-12)
        assert sd[channel] == pytest.approx(inside.std(), rel=1e-9)
    for nothing in ([], [np.zeros((1, 2, 2, 2))], [np.ones((1, 2, 2, 2))]):
        with pytest.raises(UserError, match="intensity statistics"):
            fit_intensity_statistics(nothing)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_normalise(dtype):
    generator = torch.Generator().manual_seed(0)
    volumes = torch.randn(3, 2, 4, 5, 6, generator=generator) * 5 + 40
    volumes[:, :, :2] = 0
    volumes = volumes.to(dtype)
    before = volumes.clone()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert normalise(volumes, "none") is volumes
    per_volume = normalise(volumes, "per_volume")
    by_training = normalise(volumes, "training", IntensityStatistics((40.0, 10.0), (5.0, 2.0)))
    for result in (per_volume, by_training):
        assert result.dtype == dtype
        assert (result[:, :, :2] == 0).all()
    for n in range(3):
        for c, (mean, sd) in enumerate(((40, 5), (10, 2))):
            inside = before[n, c, 2:].double().numpy()
            expected = (inside - inside.mean()) / inside.std()
            np.testing.assert_allclose(
                per_volume[n, c, 2:].double(), expected, atol=tolerance, rtol=tolerance
            )
            np.testing.assert_allclose(
                by_training[n, c, 2:].double(), (inside - mean) / sd, atol=tolerance, rtol=tolerance
            )
    assert torch.equal(volumes, before)


def test_normalise_does_not_make_nan_of_flat_or_empty_volumes():
    volumes = torch.zeros(2, 1, 3, 3, 3)
    volumes[1] = 7
    assert torch.equal(normalise(volumes, "per_volume"), torch.zeros_like(volumes))


def test_normalise_refuses_what_cannot_be():
    volumes = torch.ones(1, 2, 3, 3, 3)
    with pytest.raises(UserError, match="needs statistics for 2 channels, none were given"):
        normalise(volumes, "training")
    with pytest.raises(UserError, match="2 channels, those given are for 1"):
        normalise(volumes, "training", IntensityStatistics((1.0,), (1.0,)))
    with pytest.raises(UserError, match="did you mean 'training'"):
        normalise(volumes, "trainning")  # type: ignore[arg-type]


@pytest.mark.skipif(not DATA.exists(), reason="needs the real volumes of ../shared/data")
def test_real_stiffness_map_at_its_own_grid_is_unchanged(tmp_path):
    voxels, affine = read_volume(DATA / "mre_stiffness" / "sub-005" / "mre" / "sub-005_stiffness.nii.gz")
    prepared = prepare_volume(tmp_path, voxels, affine, Preprocessing(spacing=2, intensity="raw"))
    np.testing.assert_array_equal(prepared.voxels[0], voxels)
    np.testing.assert_array_equal(prepared.affine, affine)


@pytest.mark.skipif(not DATA.exists(), reason="needs the real volumes of ../shared/data")
def test_real_brain_is_centred_whole_and_of_the_same_size(tmp_path):
    voxels, affine = read_volume(DATA / "t1w_bids" / "sub-31" / "anat" / "sub-31_T1w.nii.gz")
    prepared = prepare_volume(tmp_path, voxels, affine, Preprocessing(spacing=4))
    occupied = np.argwhere(prepared.voxels[0])
    margins = np.stack([occupied.min(axis=0), np.array([46, 55, 46]) - 1 - occupied.max(axis=0)])
    assert (margins >= 2).all()
    assert (np.abs(margins[0] - margins[1]) <= 3).all()
    assert prepared.quality["coverage"] == 1
    assert len(occupied) * 64 == pytest.approx(np.count_nonzero(voxels) * 8, rel=0.01)
    inside = prepared.voxels[0][prepared.voxels[0] != 0].astype(np.float64)
    assert (inside.mean(), inside.std()) == pytest.approx((0, 1), abs=1e-5)
