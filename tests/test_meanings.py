"""What people mean: declared units, masks that were interpolated, columns under other names."""

import json

import nibabel as nib
import numpy as np
import pytest
from source_trees import bids, image, text

from core.errors import UserError
from core.volumes.images.nifti import read_geometry, read_volume
from core.volumes.images.preprocess import Preprocessing
from core.volumes.ingest.cohort import ingest
from core.volumes.ingest.prepare import mask_of
from core.volumes.sources import list_scans
from core.volumes.sources.labels import Wanted, columns_of


def study(tmp_path, header, lines, sidecar=None):
    source = bids(
        tmp_path / "study", *(line.split("\t")[0] for line in lines), table=("\t".join(header), *lines)
    )
    if sidecar is not None:
        (source / "participants.json").write_text(json.dumps(sidecar))
    return source


@pytest.mark.parametrize(
    ("unit", "per_year"),
    [
        ("months", 12),
        ("Month", 12),
        ("weeks", 365.25 / 7),
        ("days", 365.25),
        ("years", 1),
        ("yr", 1),
        (" Mo ", 12),
    ],
)
def test_the_unit_that_a_sidecar_declares_is_used(tmp_path, unit, per_year):
    about = {"age": {"Description": "at the scan", "Units": unit}, "sex": {"Levels": {"M": "male"}}}
    source = study(tmp_path, ("participant_id", "age"), ("sub-01\t72", "sub-02\t117"), about)
    listing = list_scans(source)
    assert [scan.age for scan in listing.scans] == pytest.approx([72 / per_year, 117 / per_year])
    assert any("ages are in" in note for note in listing.notes) == (per_year != 1)


def test_the_unit_in_the_name_of_a_column_is_used_in_any_table(tmp_path):
    image(tmp_path / "a.nii")
    table = text(tmp_path / "list.csv", "subject,path,age_months", "x,a.nii,90")
    assert np.isnan(list_scans(table).scans[0].age)
    listing = list_scans(table, age_column="age_months", is_age_asked=True)
    assert listing.scans[0].age == 7.5
    assert "column 'age_months': ages are in months, and are brought to years" in listing.notes
    (tmp_path / "list.json").write_text(json.dumps({"age_months": {"Units": "years"}}))
    assert list_scans(table, age_column="age_months", is_age_asked=True).scans[0].age == 90


@pytest.mark.parametrize(
    ("name", "per_year"),
    [
        ("age_mo", 12), ("Age (months)", 12), ("age in days", 365.25), ("age_wks", 365.25 / 7), ("age, years", 1),
        ("age_day_of_scan", 1), ("birthday_age", 1), ("age_m", 1), ("42", 1),
    ],
)  # fmt: skip
def test_of_the_name_of_a_column_its_last_word_is_the_unit(tmp_path, name, per_year):
    found = columns_of(tmp_path / "list.csv", [name], Wanted(age_column=name, is_age_asked=True))
    assert (found.age, found.per_year) == (name, per_year)


@pytest.mark.parametrize(
    ("sidecar", "says"),
    [
        ({"age": {"Units": "decades"}}, "'age' has the unit 'decades'; years, months, weeks or days"),
        (None, r"participants\.json cannot be read as JSON"),
    ],
)
def test_a_unit_that_is_not_understood_is_refused(tmp_path, sidecar, says):
    source = study(tmp_path, ("participant_id", "age"), ("sub-01\t72",), sidecar)
    if sidecar is None:
        (source / "participants.json").write_text("{")
    with pytest.raises(UserError, match=says):
        list_scans(source)


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (("age", "sex", "site"), ("age", "sex", "site")),
        (("Age", "SEX", "Site"), ("Age", "SEX", "Site")),
        (("Age at scan", "Gender", "site_id"), ("Age at scan", "Gender", "site_id")),
        (("age_in_years", "biological sex", "Centre"), ("age_in_years", "biological sex", "Centre")),
        (("age", "sex", "gender", "Site", "site"), ("age", "sex", "site")),
        (("stage", "sexual_orientation", "website"), (None, "sex", "site")),
    ],
)
def test_columns_under_other_names_are_found_and_said(tmp_path, names, taken):
    found = columns_of(tmp_path / "participants.tsv", names, Wanted())
    assert (found.age, found.sex, found.site) == taken
    said = "\n".join(found.notes)
    for meaning, name in zip(("age", "sex", "site"), taken, strict=True):
        assert (f"column '{name}' is taken for {meaning}" in said) == (name in names and name != meaning)
    assert ("has no sex and no site; looked for sex, gender" in said) == ("website" in names)


def test_empty_fields_behind_the_last_column_are_a_spreadsheets(tmp_path):
    lines = ("sub-01\t30\t\t", "sub-02\t40")
    assert [scan.age for scan in list_scans(study(tmp_path, ("participant_id", "age"), lines)).scans] == [
        30,
        40,
    ]
    full = study(tmp_path / "full", ("participant_id", "age"), ("sub-01\t30\tx",))
    with pytest.raises(UserError, match="line 2 has 3 fields, but there are 2 columns"):
        list_scans(full)


def test_sites_under_another_name_are_those_of_the_cohort(tmp_path):
    lines = ("sub-01\t30\tmale\tA", "sub-02\t40\tF\tB")
    listing = list_scans(study(tmp_path, ("participant_id", "Age", "Gender", "Center"), lines))
    assert [(scan.age, scan.sex, scan.site, scan.extra) for scan in listing.scans] == [
        (30, "M", "A", {}), (40, "F", "B", {}),
    ]  # fmt: skip
    with pytest.raises(UserError, match="has no column 'age'"):
        list_scans(tmp_path / "study", age_column="age", is_age_asked=True)


@pytest.mark.parametrize(
    ("unit", "factor"), [("mm", 1.0), ("meter", 1000.0), ("micron", 0.001), ("unknown", 1.0)]
)
def test_the_unit_of_length_that_a_header_declares_is_used(tmp_path, unit, factor):
    made = nib.Nifti1Image(
        np.arange(60, dtype=np.float32).reshape(3, 4, 5), np.diag([2 / factor] * 3 + [1.0])
    )
    made.header.set_xyzt_units(unit)
    nib.save(made, tmp_path / "scan.nii")
    for affine in (read_volume(tmp_path / "scan.nii")[1], read_geometry(tmp_path / "scan.nii")[1]):
        np.testing.assert_allclose(affine, np.diag([2.0, 2.0, 2.0, 1.0]), rtol=1e-6)


def test_a_unit_of_length_that_cannot_be_right_is_named(tmp_path):
    made = nib.Nifti1Image(np.arange(60, dtype=np.float32).reshape(3, 4, 5), np.eye(4))
    made.header.set_xyzt_units("meter")
    nib.save(made, tmp_path / "scan.nii")
    with pytest.raises(UserError, match=r"1000 x 1000 x 1000 mm; .*its header says meter; is that wrong"):
        read_volume(tmp_path / "scan.nii")


@pytest.mark.parametrize(
    ("edge", "says"), [(25.0, "15.6 litres or more"), (11.0, None), (3.0, "0.027 litres or more")]
)
def test_brains_of_an_implausible_size_are_one_note(tmp_path, edge, says):
    cube = np.zeros((20, 20, 20), dtype=np.float32)
    cube[5:15, 5:15, 5:15] = np.arange(1, 11)
    for name in ("sub-01", "sub-02"):
        folder = tmp_path / "study" / name / "anat"
        folder.mkdir(parents=True)
        nib.save(nib.Nifti1Image(cube, np.diag([edge] * 3 + [1.0])), folder / f"{name}_T1w.nii")
    preprocessing = Preprocessing(spacing=min(edge, 20.0), shape=(20, 20, 20), intensity="raw")
    notes = ingest(list_scans(tmp_path / "study"), tmp_path / "cohort", preprocessing).notes
    assert [note for note in notes if "litres" in note] == [note for note in notes if says and says in note]
    assert any("litres" in note for note in notes) == (says is not None)


BRAIN = np.zeros((20, 20, 20), dtype=np.float32)
BRAIN[5:15, 5:15, 5:15] = 1


def blurred(full: float) -> np.ndarray:
    """The same, interpolated: a rim of two voxels, traces everywhere, and a spline's overshoot."""
    soft = BRAIN.copy()
    for axis in range(3):
        soft = (np.roll(soft, 1, axis) + 2 * soft + np.roll(soft, -1, axis)) / 4
    return full * (soft + 1e-3 + 0.03 * (soft > 0.99) - 0.02 * (soft == 0) * (np.indices(soft.shape)[0] == 0))


@pytest.mark.parametrize("full", [1, 255, 3, 0.9999])
def test_masks_of_two_numbers_are_where_they_are_not_0(full):
    assert np.array_equal(mask_of(np.float32(full) * BRAIN), BRAIN > 0)


@pytest.mark.parametrize("full", [1, 255])
def test_an_interpolated_mask_is_brain_from_half_of_its_full_value(full):
    soft = blurred(full).astype(np.float32)
    assert np.count_nonzero(soft) > 7 * BRAIN.sum()
    found = mask_of(soft)
    assert np.array_equal(found, soft >= full / 2)
    assert abs(found.sum() / BRAIN.sum() - 1) < 0.1
    assert np.array_equal(mask_of(np.rint(blurred(255)).astype(np.float32)), blurred(255).round() >= 127.5)


@pytest.mark.parametrize(
    ("voxels", "says"),
    [
        (0 * BRAIN, "is empty"),
        (BRAIN * np.arange(1, 21, dtype=np.float32), "is no mask: it has 11 values from 0 to 15"),
        (
            np.where(BRAIN > 0, np.arange(20, dtype=np.float32) % 3 + 1, 0),
            "is no mask: it has 4 values from 0 to 3",
        ),
        (BRAIN * np.where(np.arange(20) == 7, 255, 2).astype(np.float32), "is no mask: it has 3 values"),
        (1000 * blurred(1).astype(np.float32), "is no mask"),
        (-BRAIN, "is no mask: it has 2 values from -1 to 0"),
    ],
)
def test_what_is_no_mask_is_named(voxels, says):
    with pytest.raises(UserError, match=says):
        mask_of(voxels)
