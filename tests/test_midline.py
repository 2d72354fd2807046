"""The midline of a head: found however it lies, refused where it is none, and kept through ingest."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import torch

from core.errors import UserError
from core.volumes.cohort.reader import Cohort
from core.volumes.images.midline import find_midline
from core.volumes.images.mirror import opposite_voxels
from core.volumes.images.preprocess import Preprocessing
from core.volumes.images.resample import resample
from core.volumes.ingest.cohort import ingest
from core.volumes.ingest.prepare import brain_centre
from core.volumes.phantom.cohort import phantom_brain
from core.volumes.phantom.settings import PhantomSettings
from core.volumes.sources import list_scans

TURN, SHIFT = 12.0, 7.0


@pytest.fixture(scope="module")
def brain():
    made = phantom_brain(PhantomSettings(spacing=4.0, kind="tissue", channels=("t1w",)), 3)
    image = made.channels["t1w"]
    # Exactly symmetric about x = 0, so that the plane is known.
    even = (image + image[::-1]) / 2
    even[(image == 0) | (image[::-1] == 0)] = 0
    return even, made.affine


def turned(axis, degrees, shift):
    """A rigid motion about a world axis, then along x."""
    angle, motion = np.radians(degrees), np.eye(4)
    one, other = [each for each in range(3) if each != axis]
    motion[[one, one, other, other], [one, other, one, other]] = [
        np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle),
    ]  # fmt: skip
    motion[0, 3] = shift
    return motion


@pytest.mark.parametrize(("axis", "degrees", "shift"), [(2, 0, 0), (2, TURN, SHIFT), (1, -8, -5)])
def test_the_plane_is_found_however_the_head_lies(brain, axis, degrees, shift):
    voxels, affine = brain
    motion = turned(axis, degrees, shift)
    placed = motion @ affine
    found = find_midline(voxels, placed, voxels > 0, brain_centre(voxels > 0, placed))
    normal = motion[:3, 0]
    assert np.degrees(np.arccos(min(1.0, normal @ found.to_source[:3, 0]))) < 0.5
    # The plane x = 0 of the aligned head goes through the point that the plane x = 0 went to.
    assert abs(normal @ (found.to_source[:3, 3] - motion[:3, 3])) < 0.5
    assert found.measures["midline_angle"] == pytest.approx(abs(degrees), abs=0.5)
    assert found.measures["midline_residual_angle"] < 0.5
    assert found.measures["midline_residual_offset"] < 0.5
    rigid = found.to_source[:3, :3]
    np.testing.assert_allclose(rigid @ rigid.T, np.eye(3), atol=1e-9)
    assert np.linalg.det(rigid) == pytest.approx(1)


def test_half_a_head_is_refused(brain):
    voxels, affine = brain
    half = voxels.copy()
    half[: voxels.shape[0] // 2 + 4] = 0
    half[:, : voxels.shape[1] // 2] *= 0.1
    with pytest.raises(UserError, match="the midline was not found"):
        find_midline(half, affine, half > 0, brain_centre(half > 0, affine))


def test_ingest_turns_heads_so_that_flipping_the_grid_mirrors_them(brain, tmp_path):
    """The head is stored turned; the manifest leads back to it."""
    voxels, affine = brain
    motion = turned(2, TURN, SHIFT)
    shape = tuple(side + 12 for side in voxels.shape)
    wide = affine.copy()
    wide[:3, 3] -= 24.0
    stored = resample(voxels, motion @ affine, wide, shape, voxels > 0)
    image = np.where(stored.inside, stored.voxels, 0).astype(np.float32)
    tree = tmp_path / "tree" / "sub-01" / "anat"
    tree.mkdir(parents=True)
    nib.save(nib.Nifti1Image(image, wide), tree / "sub-01_T1w.nii.gz")
    (tmp_path / "tree" / "participants.tsv").write_text("participant_id\tage\nsub-01\t40\n")
    made = {}
    for midline in (False, True):
        out = tmp_path / f"cohort-{midline}"
        preprocessing = Preprocessing(spacing=4.0, midline=midline, centre="brain")
        made[midline] = ingest(
            list_scans(tmp_path / "tree", channels=("T1w",)), out, preprocessing, dtype="float32"
        ).cohort

    def asymmetry(cohort):
        volume = cohort.read([0])[0, 0]
        return np.abs(volume - volume[::-1]).mean() / np.abs(volume).mean()

    assert asymmetry(made[True]) < 0.3 * asymmetry(made[False])
    assert opposite_voxels(torch.from_numpy(made[True].read([0]))) == [made[True].volume_shape[1] - 1]
    scan = made[True].manifest.iloc[0]
    assert scan["midline_angle"] == pytest.approx(TURN, abs=0.7)
    assert scan["midline_residual_angle"] < 0.7
    back = np.vstack([np.asarray(scan["affine"]).reshape(3, 4), [0, 0, 0, 1]])
    assert np.degrees(np.arccos(min(1.0, back[:3, 0] @ motion[:3, 0] / 4.0))) < 0.7
    about = json.loads((tmp_path / "cohort-True" / "cohort.json").read_text())
    assert about["preprocessing"]["midline"] is True
    assert (
        "midline" not in json.loads((tmp_path / "cohort-False" / "cohort.json").read_text())["preprocessing"]
    )
    assert len(Cohort.open(tmp_path / "cohort-True")) == 1


def test_midline_and_registration_exclude_each_other():
    with pytest.raises(ValueError, match="midline cannot act with registration"):
        Preprocessing(midline=True, registration="affine")
