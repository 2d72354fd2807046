"""Whether a model was trained on a scan: told by voxels, whatever the file is called, and else by names."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_cohort import SIDE, write_small_cohort

from core.volumes.cohort.reader import Cohort
from core.volumes.cohort.writer import CohortWriter
from core.volumes.ingest.prepare import PreparedScan
from distributed.commands import known_scans
from distributed.commands.known_scans import KnownScans, Standing

TRAINED = "on whom the model was trained: the prediction is too good, and the interval does not hold"
ROLES = {"sub-000": "fold 0", "sub-001": "fold 1", "sub-002": "holdout"}
NEW = Path("new.nii.gz")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Of its four subjects the last one is in no split."""
    return write_small_cohort(tmp_path_factory.mktemp("known") / "cohort", subjects=4)


def known(cohort, validation="fold 0", channel="stiffness"):
    return KnownScans(ROLES, validation, cohort, channel)


def scan(voxels, **quality):
    return PreparedScan(np.asarray(voxels, np.float32), None, np.eye(4), quality)


def nobody(seed=0):
    return scan(np.random.default_rng(seed).uniform(1, 3, (1, SIDE, SIDE, SIDE)))


@pytest.mark.parametrize("validation", ["fold 0", ""])
def test_a_scan_is_known_by_its_voxels_and_its_role_is_told(cohort, validation):
    found = [known(cohort, validation).standing(NEW, scan(cohort.read([row])[0])) for row in range(4)]
    validated = ("no", "who was in the validation fold, not in the training")
    expected = [
        validated if validation else ("yes", TRAINED),
        ("yes", TRAINED),
        ("no", "who was held out"),
        ("no", "who was not used in this run"),
    ]
    assert found == [
        Standing(trained_on, f"this is a scan of sub-{row:03d}, {words}")
        for row, (trained_on, words) in enumerate(expected)
    ]


@pytest.mark.parametrize(("difference", "same"), [(0.0, True), (0.001, True), (0.005, True), (0.03, False)])
def test_a_scan_is_the_same_one_after_rounding_and_not_after_more(cohort, difference, same):
    voxels = cohort.read([1])[0]
    noise = np.random.default_rng(1).normal(0, 1, voxels.shape) * (voxels != 0)
    voxels = voxels + noise * difference * np.sqrt(np.mean(voxels**2) / np.mean(noise**2))
    standing = known(cohort).standing(NEW, scan(voxels))
    assert standing.trained_on == ("yes" if same else "no")


def test_a_scan_of_nobody_has_no_note(cohort):
    assert known(cohort).standing(NEW, nobody()) == Standing("no", "")


def test_a_scan_in_units_that_the_cohort_cannot_store_is_new(cohort):
    assert known(cohort).standing(NEW, scan(nobody().voxels * 1e5)) == Standing("no", "")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("sub-001_T1w.nii.gz", ("perhaps", f"its name is that of the subject sub-001, {TRAINED}")),
        ("sub-001.nii", ("perhaps", f"its name is that of the subject sub-001, {TRAINED}")),
        ("study/sub-001/anat/T1w.nii", ("perhaps", f"its name is that of the subject sub-001, {TRAINED}")),
        ("sub-002_T1w.nii.gz", ("no", "its name is that of the subject sub-002, who was held out")),
        # The name of the file counts more than that of a folder.
        ("sub-001/sub-002_T1w.nii", ("no", "its name is that of the subject sub-002, who was held out")),
        ("sub-0011_T1w.nii.gz", ("no", "")),
        ("sub-001b/x.nii", ("no", "")),
    ],
)
def test_a_scan_with_other_voxels_is_known_by_its_name_at_most(cohort, path, expected):
    assert known(cohort).standing(Path(path), nobody()) == Standing(*expected)


def damaged(cohort, tmp_path):
    manifest = cohort.manifest.assign(checksum="00000000")
    return replace(cohort, manifest=manifest)


def test_what_cannot_be_compared_is_not_called_new(cohort, tmp_path, monkeypatch):
    reasons = {
        "the cohort of the run was not found": None,
        "the cohort of the run cannot be read": damaged(cohort, tmp_path),
    }
    for reason, place in reasons.items():
        said = f"whether the model was trained on this scan is not known: {reason}"
        assert known(place).standing(NEW, nobody()) == Standing("unknown", said)
    monkeypatch.setattr(known_scans, "MOST_BYTES", 3 * nobody().voxels.nbytes)
    said = "whether the model was trained on this scan is not known: 4 scans are too many to be compared"
    assert known(cohort).standing(NEW, nobody()) == Standing("unknown", said)
    held_out, trained = (
        known(cohort).standing(Path(name), nobody()) for name in ("sub-002.nii", "sub-001.nii")
    )
    assert held_out == Standing(
        "unknown", f"{said}; its name is that of the subject sub-002, who was held out"
    )
    assert trained == Standing("perhaps", f"{said}; its name is that of the subject sub-001, {TRAINED}")
    # Its checksum tells which scan it is.
    assert known(cohort).standing(NEW, scan(cohort.read([1])[0])).trained_on == "yes"


def test_only_scans_with_a_brain_of_this_size_are_read(cohort, monkeypatch):
    measured = replace(cohort, manifest=cohort.manifest.assign(brain_ml=[1400.0, 1500.0, 1505.0, np.nan]))
    wanted = []
    read = Cohort.read
    monkeypatch.setattr(Cohort, "read", lambda self, rows: wanted.extend(rows) or read(self, rows))
    known(measured).standing(NEW, scan(nobody().voxels, brain_ml=1501.0))
    assert wanted == [1, 2, 3]
    nearly = cohort.read([1])[0] * np.float32(1.002)
    assert known(measured).standing(NEW, scan(nearly, brain_ml=1501.0)).trained_on == "yes"


def test_a_model_of_the_second_channel_compares_this_channel(tmp_path):
    draws = np.random.default_rng(2)
    volumes = draws.uniform(1, 2, (3, 2, SIDE, SIDE, SIDE)).astype(np.float32)
    with CohortWriter(
        tmp_path / "two", name="two", channels=("T1w", "stiffness"), shape=(SIDE,) * 3, spacing=8.0,
        affine=np.eye(4), preprocessing={"spacing": 8.0}, source="test", synthetic=True,
    ) as writer:  # fmt: skip
        for number, volume in enumerate(volumes):
            writer.add(volume, subject=f"sub-{number:03d}", age=30.0 + number, brain_ml=1000.0)
    several = Cohort.open(tmp_path / "two")
    assert "brain_ml" in several.manifest
    # The size of the brain is that of the first channel, so it tells nothing here.
    asked = scan(volumes[1, 1:], brain_ml=500.0)
    assert known(several).standing(NEW, asked).note == f"this is a scan of sub-001, {TRAINED}"
    assert known(several, channel="T1w").standing(NEW, asked) == Standing("no", "")
