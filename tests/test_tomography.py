"""Computed tomography: Hounsfield units kept as whole numbers, windows at training, and synthetic heads with skull."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from process_helpers import run

from core.config import resolve
from core.errors import UserError
from core.volumes.cohort.reader import Cohort
from core.volumes.images.intensity import FAINTEST, foreground, parse_intensity, scale
from core.volumes.images.preprocess import normalise
from core.volumes.phantom.cohort import phantom_disease, write_phantom_cohort
from core.volumes.phantom.settings import PhantomSettings

HU = parse_intensity("hu")


def head_in_a_scanner():
    """Air with noise, a head with a cavity, and a table below it."""
    grid = np.indices((24, 24, 24)).astype(float)
    away = np.sqrt(((grid - 12) ** 2).sum(0))
    draws = np.random.default_rng(0)
    image = -1000 + 15 * draws.normal(size=away.shape)
    image = np.where(away < 8, 40.4, image)
    image = np.where((away >= 7) & (away < 8), 900.0, image)
    image = np.where(away < 2, -900.0, image)
    image[:, 1:3, 2] = 200.0
    return image.astype(np.float32), away


def test_the_head_is_its_largest_piece_with_its_cavities_and_without_the_table():
    image, away = head_in_a_scanner()
    inside = foreground(image, HU)
    assert np.array_equal(inside, away < 8)


def test_hounsfield_units_stay_whole_numbers_and_only_0_is_moved():
    image, _ = head_in_a_scanner()
    image[12, 12, 8] = 0.3
    inside = foreground(image, HU)
    stored = scale(image, inside, HU)
    assert (stored[~inside] == 0).all()
    assert (stored[inside] != 0).all()
    others = inside & (np.rint(image) != 0)
    assert np.array_equal(stored[others], np.rint(image)[others])
    assert stored[12, 12, 8] == 1


def test_what_is_no_ct_is_refused():
    with pytest.raises(UserError, match="no voxel is above -500 HU"):
        foreground(np.full((4, 4, 4), -1000.0, np.float32), HU)


def test_a_window_at_training_is_its_formula():
    volume = torch.tensor([-100.0, 1.0, 40.0, 80.0, 900.0, 0.0]).view(1, 1, 6, 1, 1)
    found = normalise(volume, "window:ct_brain").flatten()
    torch.testing.assert_close(found, torch.tensor([FAINTEST, 1 / 80, 0.5, 1, 1, 0]))
    stored = normalise(volume.short(), "window:0,80")
    assert stored.dtype == torch.int16
    with pytest.raises(UserError, match=r"normalise.*lower end of a window"):
        resolve({"task": "brain_age", "data": {"normalise": "window:80,0"}})
    with pytest.raises(UserError, match="normalise"):
        resolve({"task": "brain_age", "data": {"normalise": "zscore"}})


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    settings = PhantomSettings(kind="ct", subjects=6, spacing=8.0)
    return write_phantom_cohort(tmp_path_factory.mktemp("ct") / "cohort", settings)


def test_synthetic_heads_have_published_units_skull_and_bleedings(cohort):
    assert cohort.description.dtype == "int16"
    settings = PhantomSettings(kind="ct", subjects=40, spacing=4.0)
    seen = [phantom_disease(settings, index) for index in range(16)]
    ill = [each for each in seen if each.side]
    assert 4 <= len(ill) <= 12
    for each in seen:
        image, fractions = each.brain.channels["ct"], each.brain.fractions
        # Where a voxel is one tissue alone.
        grey, white = (
            np.median(image[(fractions[..., place] > 0.9) & (each.lesion == 0)]) for place in (1, 2)
        )
        assert 24 < white < 33 < grey < 45
        assert image.max() > 500
        assert image.min() >= -1000
    for each in ill:
        blood = each.brain.channels["ct"][each.lesion > 0]
        assert 55 < np.median(blood) < 75
        assert each.lesion_ml == pytest.approx(40, rel=0.1)
    invisible = PhantomSettings(kind="ct", subjects=40, spacing=4.0, rung=5)
    same = [phantom_disease(invisible, index) for index in range(16)]
    assert [each.side for each in same] == [each.side for each in seen]


def test_a_tree_of_ct_is_ingested_as_whole_hounsfield_units(tmp_path):
    """Through the commands that a user types, on files that store units by slope and intercept as scanners do."""
    tree = tmp_path / "tree"
    made = run("phantom", tree, "--kind", "ct", "--subjects", 2, "--spacing", 4, "--nifti", cwd=tmp_path)
    assert "--intensity hu --dtype int16" in " ".join(made.stdout.split()), made.stderr
    first = tree / "sub-0001" / "ct" / "sub-0001_ct.nii.gz"
    image = nib.load(first)
    values = np.asarray(image.dataobj)
    kept = nib.Nifti1Image((np.rint(values) + 1024).astype(np.int16), image.affine)
    kept.header.set_slope_inter(1, -1024)
    nib.save(kept, first)
    made = run("ingest", tree, "cohort", "--channels", "ct", "--maps", "lesion", "--intensity", "hu", "--dtype",
               "int16", "--spacing", 4, cwd=tmp_path)  # fmt: skip
    assert made.returncode == 0, made.stderr
    opened = Cohort.open(tmp_path / "cohort")
    volume = opened.read_stored([0])[0, 0]
    assert opened.scales([0]).tolist() == [[1.0]]
    inside = volume != 0
    expected = np.rint(np.maximum(values, -1024))
    assert 0.2 < inside.mean() < 0.5
    close = np.abs(volume[inside] - expected[inside]) <= 1
    assert close.mean() > 0.99


def test_a_map_of_another_region_scheme_is_refused_by_what_it_holds(tmp_path, cohort):
    refused = run("train", cohort.location, "--task", "segmentation", "--set", "data.target=lesion", "--set",
                  "data.classes=brats2021", "--out", "run", cwd=tmp_path)  # fmt: skip
    assert refused.returncode == 2
    assert "no map lesion of the cohort holds 4; they hold 0, 1" in " ".join(refused.stderr.split())
