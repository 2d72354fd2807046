from __future__ import annotations

import math

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from source_trees import DATA, image, text

from core.errors import UserError
from core.volumes.sources import list_scans, read_image
from core.volumes.sources.labels import plain_id, read_table


def test_a_table_of_paths_with_everything(tmp_path):
    for name in ("a.nii.gz", "b.nii", "seg.nii.gz", "brain.nii.gz"):
        image(tmp_path / "images" / name)
    absolute = image(tmp_path / "elsewhere" / "c.nii.gz")
    source = text(
        tmp_path / "list.csv",
        "subject,session,path,age,sex,site,label,mask,score,row,note",
        'P 1,v1,images/a.nii.gz,30.5,male,A,images/seg.nii.gz,images/brain.nii.gz,1,x,"well, yes"',
        "P 1,v2,images/../images/b.nii,31,,A,images/seg.nii.gz,images/brain.nii.gz,n/a,y,",
        f"P2,,{absolute},40,f,B,images/seg.nii.gz,images/brain.nii.gz,3,z,",
    )
    listing = list_scans(source)
    assert (listing.kind, listing.channels, listing.rejects) == ("table", ("image",), ())
    first, second, third = listing.scans
    assert (first.subject, first.session, first.age, first.sex, first.site) == ("P 1", "v1", 30.5, "M", "A")
    assert first.images[0].path.samefile(tmp_path / "images" / "a.nii.gz")
    assert first.maps["label"].path.name == "seg.nii.gz"
    assert first.mask.path.name == "brain.nii.gz"
    assert first.extra == {"score": 1.0, "table_row": "x", "note": "well, yes"}
    assert math.isnan(second.extra["score"])
    assert third.images[0].path == absolute


def test_a_label_of_numbers_is_a_class(tmp_path):
    image(tmp_path / "a.nii")
    source = text(tmp_path / "list.tsv", "id\timage\tage\tlabel", "x\ta.nii\t30\t2")
    (scan,) = list_scans(source).scans
    assert (scan.maps, scan.extra) == ({}, {"label": 2.0})


def test_a_slip_among_the_paths_of_label_maps_costs_its_line_only(tmp_path):
    image(tmp_path / "a.nii")
    lines = ["x,a.nii,30,a.nii", "y,a.nii,30,1", "z,a.nii,30,"]
    listing = list_scans(text(tmp_path / "list.csv", "subject,path,age,label", *lines))
    assert [(scan.subject, [file.path.name for file in scan.maps.values()]) for scan in listing.scans] == [
        ("x", ["a.nii"]),
        ("z", []),
    ]
    assert [reject.reason.rpartition("/")[2] for reject in listing.rejects] == ["1 does not exist"]


def test_a_column_for_each_channel(tmp_path):
    for name in ("t1.nii", "flair.nii", "seg.nii"):
        image(tmp_path / name)
    source = text(
        tmp_path / "list.tsv",
        "participant_id\tT1w\tFLAIR\ttumour\tyears",
        "x\tt1.nii\tflair.nii\tseg.nii\t30",
        "y\tt1.nii\t\tseg.nii\t30",
        "z\tt1.nii\tflair.nii\tn/a\t30",
    )
    listing = list_scans(source, channels=("FLAIR", "T1w"), maps=["tumour"], age_column="years")
    assert [(scan.subject, sorted(scan.maps)) for scan in listing.scans] == [("x", ["tumour"]), ("z", [])]
    assert [file.path.name for file in listing.scans[0].images] == ["flair.nii", "t1.nii"]
    assert {r.subject: r.reason for r in listing.rejects} == {"y": "FLAIR is missing"}
    with pytest.raises(
        UserError, match="needs a column 'path' \\(or image\\), but has 'participant_id', 'T1w'"
    ):
        list_scans(source, age_column="years")
    with pytest.raises(UserError, match=r"no column 'T2w'.*did you mean 'T1w'"):
        list_scans(source, channels=["T2w"])


BAD_LINES = {
    "is missing": ",a.nii,30",
    "path is missing": "x,n/a,30",
    "does not exist": "x,b.nii,30",
    "/nowhere/b.nii does not exist": "x,/nowhere/b.nii,30",
    "../../b.nii does not exist": "x,../../b.nii,30",
    "is not a file": "x,folder.nii,30",
    "is not an image; .nii.gz, .nii, .npy are read": "x,list.csv,30",
    "cannot be read: File name too long": f"x,{'a' * 5000}.nii,30",
    "age 'two lines' is not a number": 'x,a.nii,"two\nlines"',
    "is a link to itself.nii": "x,itself.nii,30",
    "age '30 y' is not a number": "x,a.nii,30 y",
    "is listed 2 times; a column 'session'": "x,a.nii,30\nx,a.nii,31",
    "is a link to": "x,broken.nii,30",
}


@pytest.mark.parametrize("reason", BAD_LINES)
def test_a_bad_line_costs_itself_only(tmp_path, reason):
    image(tmp_path / "a.nii")
    image(tmp_path / "good.nii")
    (tmp_path / "folder.nii").mkdir()
    (tmp_path / "itself.nii").symlink_to("itself.nii")
    (tmp_path / "broken.nii").symlink_to(tmp_path / "gone.nii")
    listing = list_scans(
        text(tmp_path / "list.csv", "subject,path,age", BAD_LINES[reason], "good,good.nii,40")
    )
    assert [scan.subject for scan in listing.scans] == ["good"]
    assert listing.rejects
    assert all(reason in reject.reason for reject in listing.rejects), listing.rejects
    assert all("\n" not in reject.reason for reject in listing.rejects)


def leaks_in(listing):
    """The notes, without those about columns."""
    return tuple(note for note in listing.notes if "looked for" not in note)


def test_one_image_under_two_names_is_pointed_out(tmp_path):
    image(tmp_path / "a.nii")
    listing = list_scans(text(tmp_path / "list.csv", "subject,path,age", "x,a.nii,30", "y,a.nii,31"))
    assert len(listing.scans) == 2
    assert leaks_in(listing) == ("LEAK: 1 images belong to more than one subject, such as a.nii (x, y)",)


def test_a_subject_in_two_folds_is_pointed_out(tmp_path):
    for name in "abcd":
        image(tmp_path / f"{name}.nii", ord(name))
    lines = ["x,1,a.nii,30,0", "x,2,b.nii,31,1", "y,1,c.nii,30,2", "y,2,d.nii,31,2"]
    listing = list_scans(text(tmp_path / "list.csv", "subject,session,path,age,fold", *lines))
    assert leaks_in(listing) == ("LEAK: 1 subjects are in more than one fold or list: x (fold 0, fold 1)",)
    assert [scan.extra["fold"] for scan in listing.scans] == [0, 1, 2, 2]


def test_semicolons_and_a_table_without_lines_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"looks separated by semicolon: save it with tabs as \.tsv"):
        list_scans(text(tmp_path / "a.csv", "subject;path;age", "x;a.nii;30"))
    with pytest.raises(UserError, match="is empty"):
        list_scans(text(tmp_path / "b.csv", "subject,path,age"))
    with pytest.raises(UserError, match="is empty"):
        list_scans(text(tmp_path / "c.csv"))


@pytest.mark.skipif(not DATA.exists(), reason="needs the real volumes of ../shared/data")
def test_a_table_of_real_volumes_equals_the_folder_that_it_lists(tmp_path):
    folder = list_scans(DATA / "t1w_bids")
    lines = [f"{scan.subject}\t{scan.images[0].path}\t{scan.age}\t{scan.sex}" for scan in folder.scans]
    table = list_scans(text(tmp_path / "list.tsv", "subject\tpath\tage\tsex", *reversed(lines)))
    assert [(s.subject, s.images, s.age, s.sex) for s in table.scans] == [
        (s.subject, s.images, s.age, s.sex) for s in folder.scans
    ]


@pytest.mark.skipif(not DATA.exists(), reason="needs the real volumes of ../shared/data")
def test_an_array_of_one_volume_lies_where_its_nifti_file_does(tmp_path):
    file = DATA / "mre_stiffness" / "sub-001" / "mre" / "sub-001_stiffness.nii.gz"
    np.save(tmp_path / "x.npy", np.asarray(nib.load(file).dataobj)[np.newaxis])
    source = text(
        tmp_path / "list.csv", "subject,path,age", f"array,{tmp_path / 'x.npy'},24", f"file,{file},24"
    )
    array, nifti = (read_image(scan.images[0]) for scan in list_scans(source).scans)
    np.testing.assert_array_equal(array[0], nifti[0])
    np.testing.assert_allclose(array[1], nifti[1])


CELLS = st.text(
    st.characters(codec="utf-8", exclude_characters="\0\r", exclude_categories=["Cs"]), max_size=8
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=5))
def test_tables_say_what_pandas_wrote(tmp_path_factory, cells):
    path = tmp_path_factory.getbasetemp() / "fuzz.csv"
    frame = pd.DataFrame([("x", *pair) for pair in cells], columns=["subject", "a", "b"])
    frame.to_csv(path, index=False, lineterminator="\n")
    assert [tuple(row.values()) for row in read_table(path)] == [("x", *pair) for pair in cells]


@pytest.mark.parametrize(
    "written", [7, 7.0, "7", "007", "7.0", "sub-007", b"007", " 7 ", np.float32(7).item()]
)
def test_an_id_is_the_same_whatever_stored_it(written):
    assert plain_id(written) == "7"


@pytest.mark.parametrize(
    ("written", "expected"), [("A07", "A07"), ("12e4", "12e4"), ("0", "0"), ("1.5", "1.5")]
)
def test_ids_that_are_no_numbers_stay(written, expected):
    assert plain_id(written) == expected


@pytest.mark.parametrize("written", ["", "n/a", float("nan"), 7.5, 2.0**60, "1.23E+11", "sub-"])
def test_ids_that_cannot_be_trusted(written):
    with pytest.raises(UserError, match="its id"):
        plain_id(written)


@pytest.mark.parametrize("name", ["NA", "null", "None", "nan", "=1+1"])
def test_a_subject_may_have_a_name_that_means_unknown_elsewhere(tmp_path, name):
    image(tmp_path / "a.nii")
    (scan,) = list_scans(text(tmp_path / "list.csv", "subject,path,age", f"{name},a.nii,40")).scans
    assert scan.subject == name
    assert plain_id(name) == name
