from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import apply_affine
from reference_resample import rotation

from core.errors import UserError
from core.volumes.images import registration
from core.volumes.images.nifti import read_volume
from core.volumes.images.preprocess import Preprocessing, grid_affine
from core.volumes.images.registration import (
    Registration,
    load_template,
    overlap_with_template,
    register,
)
from core.volumes.images.resample import resample
from core.volumes.ingest.prepare import prepare_scan
from core.volumes.sources.listing import ImageFile, Scan

DATA = Path(__file__).parents[1].parent / "shared" / "data" / "t1w_bids"
SETTINGS = Preprocessing(spacing=4, registration="affine", intensity="raw")
MNI_CORNERS = apply_affine(grid_affine(2, (91, 109, 91)), list(itertools.product((0, 90), (0, 108), (0, 90))))

TRUTH = np.eye(4)
"""MNI mm to the mm of a made-up scanner: smaller, sheared a little, nodding by 14 degrees, 40 mm away."""
TRUTH[:3, :3] = (
    rotation(0.25, -0.08, 0.1) @ np.diag([0.9, 0.86, 0.95]) @ [[1, 0.03, 0], [0, 1, -0.04], [0, 0, 1]]
)
TRUTH[:3, 3] = [25, -20, 30]

LEVELS = {"SHRINKING": (4, 2), "BLUR_MM": (4.0, 2.0)}
"""Without the last level, which takes most of the time; tests marked slow use all."""

IN_ANOTHER_PROCESS = """
import hashlib, sys
from pathlib import Path
from core.volumes.images import registration
from core.volumes.ingest.prepare import prepare_scan
from core.volumes.images.preprocess import Preprocessing
from core.volumes.sources.listing import ImageFile, Scan
settings = Preprocessing.model_validate_json(sys.argv[2])
vars(registration).update(eval(sys.argv[3]))
prepared = prepare_scan(Scan("sub-01", (ImageFile(Path(sys.argv[1])),)), settings)
print(hashlib.sha256(prepared.voxels.tobytes() + prepared.affine.tobytes()).hexdigest())
print(repr(sorted(prepared.quality.items())))
"""


@pytest.fixture(scope="module")
def moved(tmp_path_factory) -> Path:
    """The template's brain as that scanner would see it, in other units and with noise."""
    template = load_template()
    affine = np.diag([2.0, 2, 2, 1])
    affine[:3, 3] = apply_affine(TRUTH, [0, -18, 18]) - 2 * (np.array([100, 110, 96]) - 1) / 2
    to_template = np.linalg.inv(TRUTH) @ affine
    voxels, inside = resample(template.brain, template.affine, to_template, (100, 110, 96))
    noise = np.random.default_rng(0).normal(0, 20, voxels.shape)
    path = tmp_path_factory.mktemp("moved") / "brain.nii"
    nib.save(
        nib.Nifti1Image(
            np.where(inside, np.clip(voxels * 800 + noise, 1, None), 0).astype(np.float32), affine
        ),
        path,
    )
    return path


@pytest.fixture(scope="module")
def prepared(moved):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in LEVELS.items():
            patch.setattr(registration, name, value)
        return prepare_scan(Scan("sub-01", (ImageFile(moved),)), SETTINGS)


def matrix(quality: dict[str, float]) -> np.ndarray:
    return np.array([[quality[f"registration_{row}{column}"] for column in range(4)] for row in range(3)])


def test_a_known_affine_is_found_again(prepared):
    found = np.vstack([matrix(prepared.quality), [0, 0, 0, 1]])
    apart = np.linalg.norm(apply_affine(found, MNI_CORNERS) - apply_affine(TRUTH, MNI_CORNERS), axis=1)
    assert apart.max() < 1.5  # mm, at corners 140 mm from the middle
    np.testing.assert_allclose(prepared.affine, found @ SETTINGS.affine, atol=1e-9)
    assert prepared.quality["registration_determinant"] == pytest.approx(
        np.linalg.det(TRUTH[:3, :3]), rel=0.01
    )
    stretches = np.sqrt(np.linalg.eigvalsh(TRUTH[:3, :3].T @ TRUTH[:3, :3]))
    assert prepared.quality["registration_stretch"] == pytest.approx(
        stretches.max() / stretches.min(), rel=0.01
    )
    assert prepared.quality["template_overlap"] > 0.98
    assert prepared.quality["template_overlap_before"] < 0.7
    assert prepared.quality["coverage"] > 0.999


def test_the_registered_brain_lies_over_the_template(prepared):
    template = load_template()
    expected = resample(template.brain, template.affine, SETTINGS.affine, SETTINGS.shape)
    both = expected.inside & (prepared.voxels[0] != 0)
    assert both.sum() > 0.97 * expected.inside.sum()
    assert np.corrcoef(expected.voxels[both], prepared.voxels[0][both])[0, 1] > 0.98


def test_the_same_bytes_in_another_process_on_other_numbers_of_threads(moved, prepared):
    environment = os.environ | dict.fromkeys(
        (
            "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS",
            "OMP_NUM_THREADS",
            "OPENBLAS_NUM_THREADS",
            "MKL_NUM_THREADS",
        ),
        "3",
    )
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS, str(moved), SETTINGS.model_dump_json(), repr(LEVELS)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=True)
    digest, quality = done.stdout.strip().splitlines()
    assert digest == hashlib.sha256(prepared.voxels.tobytes() + prepared.affine.tobytes()).hexdigest()
    assert quality == repr(sorted(prepared.quality.items()))


def test_overlap_is_the_dice_coefficient():
    template = load_template()
    half = template.mask.copy()
    half[: half.shape[0] // 2] = False
    expected = 2 * half.sum() / (half.sum() + template.mask.sum())
    assert overlap_with_template(half, template.affine) == pytest.approx(expected)
    assert overlap_with_template(template.mask, template.affine) == 1
    aside = template.affine.copy()
    aside[0, 3] += 500
    assert overlap_with_template(template.mask, aside) == 0
    back = np.eye(4)
    back[0, 3] = 500
    assert overlap_with_template(template.mask, aside, back) == 1


def scaled(x: float, y: float, z: float) -> np.ndarray:
    return np.diag([x, y, z, 1.0])


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (
            scaled(1.4, 1.4, 1.4),
            "takes the brain for 2.74 times the template's volume, plausible is 0.35 to 2",
        ),
        (scaled(0.6, 0.6, 0.6), "takes the brain for 0.22 times"),
        (scaled(1.3, 1, 0.8), "stretches the brain 1.62 times more along one direction"),
        (scaled(0.85, 0.85, 0.85), r"overlap by 0\.\d\d \(Dice; 1.00 before\), at least 0.98 is needed"),
    ],
)
def test_an_implausible_result_is_refused_with_its_reason(found, said, monkeypatch):
    template = load_template()
    monkeypatch.setattr(registration, "_optimise", lambda *_: (found, 0.5))
    with pytest.raises(UserError, match=said) as refused:
        register(template.brain, template.affine, template.mask)
    assert "\n" not in str(refused.value)


def test_a_brain_that_lies_in_mni_space_is_not_refused_for_losing_a_trifle(monkeypatch):
    template = load_template()
    shifted = np.eye(4)
    shifted[0, 3] = 0.75
    monkeypatch.setattr(registration, "_optimise", lambda *_: (shifted, 0.5))
    found = register(template.brain, template.affine, template.mask)
    assert isinstance(found, Registration)
    assert 0.98 < found.measures["template_overlap"] <= 1 == found.measures["template_overlap_before"]


def test_a_volume_with_nothing_to_go_by_is_refused(monkeypatch):
    monkeypatch.setattr(registration, "SHRINKING", (4,))
    monkeypatch.setattr(registration, "BLUR_MM", (4.0,))
    block = np.zeros((30, 30, 30), np.float32)
    block[5:8, 5:8, 5:8] = np.random.default_rng(0).uniform(1, 2, (3, 3, 3))
    with pytest.raises(UserError, match="registration to MNI152 failed"):
        register(block, np.diag([2.0, 2, 2, 1]), block != 0)


def test_a_forged_voxel_size_costs_no_memory_and_a_speck_no_traceback():
    huge = np.ones((60, 60, 60), np.float32)
    with pytest.raises(UserError, match=r"3000 x 3000 x 3000 mm large, a head is below 600 mm"):
        register(huge, np.diag([50.0, 50, 50, 1]), huge != 0)
    speck = np.zeros((20, 20, 20), np.float32)
    speck[10, 10, 10] = 1
    with pytest.raises(UserError, match="nothing is left of the brain at 2 mm"):
        register(speck, np.diag([0.1, 0.1, 0.1, 1]), speck != 0)


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason="needs the real volumes of ../shared/data")
@pytest.mark.parametrize("subject", ["sub-31", "sub-55"])
def test_real_brains_come_out_alike_however_they_lay_in_the_scanner(subject, tmp_path):
    voxels, affine = read_volume(DATA / subject / "anat" / f"{subject}_T1w.nii.gz")
    straight = register(voxels, affine, voxels != 0)
    assert straight.measures["template_overlap"] > 0.93
    turned = np.eye(4)
    turned[:3, :3] = rotation(*np.deg2rad([-20, 20, 20]))
    turned[:3, 3] = [30, 30, -30]

    def apart(found: Registration, from_straight: np.ndarray) -> float:
        back = np.linalg.inv(from_straight) @ found.template_to_source
        differences = apply_affine(back, MNI_CORNERS) - apply_affine(straight.template_to_source, MNI_CORNERS)
        return float(np.linalg.norm(differences, axis=1).max())

    assert apart(register(voxels, turned @ affine, voxels != 0), turned) < 0.5
    # the same turned by interpolation, on a straight grid
    grid = grid_affine(2, (140, 140, 140), apply_affine(turned @ affine, np.argwhere(voxels).mean(axis=0)))
    copy = resample(voxels, turned @ affine, grid, (140, 140, 140))
    assert apart(register(copy.voxels, grid, copy.inside), turned) < 2
    # and stored back to front and upside down
    path = tmp_path / "flipped.nii"
    nib.save(nib.Nifti1Image(voxels, affine).as_reoriented([[2, -1], [0, 1], [1, -1]]), path)
    flipped, flipped_affine = read_volume(path)
    assert apart(register(flipped, flipped_affine, flipped != 0), np.eye(4)) < 0.01


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason="needs the real volumes of ../shared/data")
@pytest.mark.parametrize(
    "wrong",
    [
        (180, 0, 0),
        pytest.param((90, 0, 0), marks=pytest.mark.campaign),
        pytest.param((0, 0, 90), marks=pytest.mark.campaign),
    ],
)
def test_a_real_brain_on_a_wrong_side_is_refused(wrong):
    voxels, affine = read_volume(DATA / "sub-31" / "anat" / "sub-31_T1w.nii.gz")
    turned = np.eye(4)
    turned[:3, :3] = rotation(*np.deg2rad(wrong))
    with pytest.raises(UserError, match=r"registration to MNI152 failed: .*upright"):
        register(voxels, turned @ affine, voxels != 0)
