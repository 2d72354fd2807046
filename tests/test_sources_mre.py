from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from source_trees import DATA

from core.errors import UserError
from core.volumes.images.nifti import read_volume
from core.volumes.sources import list_scans, read_image

GRID = (91, 109, 91)


def study(
    folder: Path, name: str, count: int = 2, *, roles: str = "stiffness dr T1_masked", first: int = 1
) -> None:
    """Arrays named as in the released code; volumes are holes but for one voxel."""
    folder.mkdir(parents=True, exist_ok=True)
    for role in roles.split():
        stored = np.lib.format.open_memmap(
            folder / f"{role}_{name}.npy", mode="w+", dtype="f4", shape=(count, *GRID)
        )
        stored[:, 3, 4, 5] = np.arange(1, count + 1)
    np.save(folder / f"age_{name}.npy", 20.5 + np.arange(count))
    np.save(folder / f"sex_{name}.npy", np.array(["F", "M"] * count)[:count])
    np.save(folder / f"id_{name}.npy", np.arange(first, first + count))
    np.save(folder / f"MRE_coverage_{name}.npy", np.linspace(0.9, 1, count))


def test_several_studies_named_as_published(tmp_path):
    study(tmp_path / "lab" / "OA", "OA", 2)
    study(tmp_path / "lab" / "NITRC_batch_1", "NITRC_batch_1", 3)
    listing = list_scans(tmp_path, channels=("stiffness", "T1"))
    assert listing.kind == "mre"
    assert [(scan.subject, scan.site, scan.age) for scan in listing.scans] == [
        ("NITRC_batch_1_1", "NITRC_batch_1", 20.5), ("NITRC_batch_1_2", "NITRC_batch_1", 21.5),
        ("NITRC_batch_1_3", "NITRC_batch_1", 22.5), ("OA_1", "OA", 20.5), ("OA_2", "OA", 21.5),
    ]  # fmt: skip
    last = listing.scans[-1]
    assert [(file.path.name, file.row) for file in last.images] == [
        ("stiffness_OA.npy", 1),
        ("T1_masked_OA.npy", 1),
    ]
    assert (last.sex, last.extra) == ("M", {"mre_coverage": 1.0})
    with pytest.raises(UserError, match=r"several kinds of image: T1 \(2\), dr \(2\), stiffness \(2\)"):
        list_scans(tmp_path)


@pytest.mark.skipif(not DATA.exists(), reason="needs the real volumes of ../shared/data")
def test_real_maps_as_arrays_are_the_maps_as_files(tmp_path):
    table = pd.read_csv(DATA / "mre_stiffness" / "participants.tsv", sep="\t").iloc[[4, 0, 2]]
    files = [DATA / "mre_stiffness" / s / "mre" / f"{s}_stiffness.nii.gz" for s in table["participant_id"]]
    np.save(tmp_path / "Stiffness_134.npy", np.stack([np.asarray(nib.load(file).dataobj) for file in files]))
    np.save(tmp_path / "AGE_ATLAS.npy", table["age"].to_numpy())
    np.save(tmp_path / "Sex_ATLAS.npy", table["sex"].to_numpy().astype(str))
    np.save(tmp_path / "id_ATLAS.npy", table["participant_id"].to_numpy().astype(str))
    listing = list_scans(tmp_path)
    assert listing.channels == ("stiffness",)
    expected = sorted(zip(table["participant_id"], table["age"], table["sex"], files, strict=True))
    for scan, (subject, age, sex, file) in zip(listing.scans, expected, strict=True):
        number = subject.removeprefix("sub-")
        assert (scan.subject, scan.age, scan.sex, scan.site) == (f"ATLAS_{number}", age, sex, "ATLAS")
        found, affine = read_image(scan.images[0])
        voxels, where = read_volume(file)
        np.testing.assert_array_equal(found, voxels)
        np.testing.assert_allclose(affine, where, atol=1e-6)


def test_studies_side_by_side_in_one_folder(tmp_path):
    study(tmp_path, "A", roles="stiffness")
    study(tmp_path, "B", roles="stiffness")
    assert [scan.subject for scan in list_scans(tmp_path).scans] == ["A_1", "A_2", "B_1", "B_2"]


def test_the_masked_T1_is_taken(tmp_path):
    study(tmp_path, "A", roles="stiffness T1_masked T1")
    (scan, _) = list_scans(tmp_path, channels=["T1"]).scans
    assert scan.images[0].path.name == "T1_masked_A.npy"


def test_bad_rows_cost_themselves_only(tmp_path):
    study(tmp_path, "A", 6, roles="stiffness")
    np.save(tmp_path / "id_A.npy", np.array(["1", "2", "02", "", "5", "6"]))
    np.save(tmp_path / "age_A.npy", np.array([30, 30, 30, 30, np.nan, -1]))
    listing = list_scans(tmp_path)
    assert [(scan.subject, scan.images[0].row) for scan in listing.scans] == [("A_1", 0), ("A_5", 4)]
    assert np.isnan(listing.scans[1].age)
    assert [(reject.subject, reject.file, reject.reason) for reject in listing.rejects] == [
        ("", "stiffness_A.npy", "row 3: its id is missing"),
        ("A_02", "stiffness_A.npy", "A_02 is listed 2 times in id_A.npy"),
        ("A_2", "stiffness_A.npy", "A_2 is listed 2 times in id_A.npy"),
        ("A_6", "stiffness_A.npy", "age -1 is not between 0 and 130 years"),
    ]
    assert len(list_scans(tmp_path, age_column=None).scans) == 3


UNUSABLE = {
    r"different lengths for one study: .*age_A\.npy 3.*stiffness_A\.npy 2": lambda folder: np.save(
        folder / "age_A.npy", np.ones(3)
    ),
    "no array of id for the study A, only MRE_coverage_A.npy, age_A.npy, sex_A.npy, stiffness_A.npy": lambda folder: (
        (folder / "id_A.npy").unlink()
    ),
    "only age_A.npy, id_A.npy, many.npy, sex_A.npy": lambda folder: (
        (folder / "MRE_coverage_A.npy").unlink(),
        (folder / "stiffness_A.npy").rename(folder / "many.npy"),
    ),
    "no array of age": lambda folder: (folder / "age_A.npy").unlink(),
    "two arrays of stiffness: MRE_stiffness_A.npy and stiffness_A.npy": lambda folder: np.save(
        folder / "MRE_stiffness_A.npy", np.ones(2)
    ),
    "names several quantities": lambda folder: np.save(folder / "age_sex_A.npy", np.ones(2)),
    "which is no MNI152 grid": lambda folder: np.save(folder / "stiffness_A.npy", np.ones((2, 9, 9, 9))),
    "pickled Python objects": lambda folder: np.save(
        folder / "sex_A.npy", np.array(["F", None], dtype=object), allow_pickle=True
    ),
}


@pytest.mark.parametrize("reason", UNUSABLE)
def test_arrays_that_leave_a_doubt_are_refused(tmp_path, reason):
    study(tmp_path, "A", roles="stiffness")
    UNUSABLE[reason](tmp_path)
    with pytest.raises(UserError, match=reason) as caught:
        list_scans(tmp_path, kind="mre", channels=["stiffness"], is_age_asked=True)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_folder_of_other_arrays_lists_them(tmp_path):
    np.save(tmp_path / "StiffnessATLAS.npy", np.ones(2))
    with pytest.raises(
        UserError, match=r"no arrays such as stiffness_STUDY\.npy .*, only StiffnessATLAS\.npy"
    ):
        list_scans(tmp_path, kind="mre")
    np.save(tmp_path / "stiffness_age.npy", np.ones(2))
    with pytest.raises(UserError, match=r"stiffness_age\.npy names several quantities \(age, stiffness\)"):
        list_scans(tmp_path)


def test_one_name_for_two_studies(tmp_path):
    study(tmp_path / "one", "A", roles="stiffness")
    study(tmp_path / "two", "A", roles="stiffness")
    with pytest.raises(UserError, match=r"one and .*two are both called study A"):
        list_scans(tmp_path)
