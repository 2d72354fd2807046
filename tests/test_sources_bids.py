from __future__ import annotations

import math
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from source_trees import DATA, bids, text

from core.errors import UserError
from core.volumes.sources import list_scans

PEOPLE = ("participant_id\tage\tsex\tsite\tiq", "sub-01\t30\tfemale\tA\t100", "sub-02\t40\tM\tB\tn/a")


def names(listing) -> list[tuple[str, str]]:
    return [(scan.subject, scan.session) for scan in listing.scans]


def reasons(listing) -> dict[str, str]:
    return {reject.subject: reject.reason for reject in listing.rejects}


def test_sessions_and_runs_are_scans_of_their_own(tmp_path):
    source = bids(
        tmp_path,
        "sub-01_ses-2_T1w",
        "sub-01_ses-1_run-1_T1w",
        "sub-01_ses-1_run-2_T1w",
        "sub-02_T1w",
        table=PEOPLE,
    )
    listing = list_scans(source)
    assert listing.kind == "bids"
    assert names(listing) == [
        ("sub-01", "ses-1_run-1"), ("sub-01", "ses-1_run-2"), ("sub-01", "ses-2"), ("sub-02", ""),
    ]  # fmt: skip
    assert [scan.images[0].path.name for scan in listing.scans][1] == "sub-01_ses-1_run-2_T1w.nii.gz"
    assert [scan.age for scan in listing.scans] == [30, 30, 30, 40]
    assert [scan.sex for scan in listing.scans] == ["F", "F", "F", "M"]
    assert listing.scans[0].extra == {"iq": 100.0}
    assert math.isnan(listing.scans[3].extra["iq"])
    assert any(
        "1 subjects have one age for several sessions, such as sub-01" in note for note in listing.notes
    )


@pytest.mark.parametrize("where", ["top", "subject"])
def test_what_sessions_tsv_says_goes_before_participants_tsv(tmp_path, where):
    source = bids(tmp_path, "sub-01_ses-1_T1w", "sub-01_ses-2_T1w", "sub-02_ses-1_T1w", table=PEOPLE)
    if where == "top":
        text(source / "sessions.tsv", "participant_id\tsession_id\tage\tscanner",
             "sub-01\tses-1\t31\tx", "01\t2\t33.5\tn/a")  # fmt: skip
    else:
        text(
            source / "sub-01" / "sub-01_sessions.tsv",
            "session_id\tage\tscanner",
            "ses-1\t31\tx",
            "2\t33.5\tn/a",
        )
    listing = list_scans(source)
    assert [(scan.age, scan.sex, scan.site) for scan in listing.scans] == [
        (31, "F", "A"), (33.5, "F", "A"), (40, "M", "B"),
    ]  # fmt: skip
    assert [scan.extra["scanner"] for scan in listing.scans] == ["x", "", ""]
    assert listing.notes == ()
    assert listing.digest != list_scans(bids(tmp_path / "other", "sub-01_T1w", table=PEOPLE)).digest


def test_an_unknown_value_of_a_visit_leaves_that_of_the_person(tmp_path):
    source = bids(tmp_path, "sub-01_ses-1_T1w", "sub-01_ses-2_T1w", table=PEOPLE[:2])
    text(source / "sub-01" / "sub-01_sessions.tsv", "session_id\tsite\tiq", "ses-1\tn/a\t90", "ses-2\tC\tn/a")
    listing = list_scans(source)
    assert [(scan.site, scan.extra["iq"]) for scan in listing.scans] == [("A", 90), ("C", 100)]


def test_the_age_at_another_visit_is_not_taken_for_this_one(tmp_path):
    source = bids(tmp_path, "sub-01_ses-1_T1w", "sub-01_ses-2_T1w", table=PEOPLE[:2])
    text(source / "sub-01" / "sub-01_sessions.tsv", "session_id\tage", "ses-1\t31", "ses-2\tn/a")
    listing = list_scans(source)
    assert names(listing) == [("sub-01", "ses-1"), ("sub-01", "ses-2")]
    assert listing.scans[0].age == 31
    assert math.isnan(listing.scans[1].age)


def test_a_bad_table_of_sessions_costs_its_subject_only(tmp_path):
    source = bids(tmp_path, "sub-01_ses-1_T1w", "sub-02_ses-1_T1w", table=PEOPLE)
    text(source / "sub-01" / "sub-01_sessions.tsv", "session_id\tage", "ses-1\t31", "1\t32")
    listing = list_scans(source)
    assert names(listing) == [("sub-02", "ses-1")]
    assert "lists ses-1 of sub-01 twice" in reasons(listing)["sub-01"]


def test_participants_with_a_row_for_each_session(tmp_path):
    table = ("participant_id\tsession\tage", "sub-01\t1\t30", "sub-01\t2\t32")
    listing = list_scans(bids(tmp_path, "sub-01_ses-1_T1w", "sub-01_ses-2_T1w", table=table))
    assert [(scan.session, scan.age) for scan in listing.scans] == [("ses-1", 30), ("ses-2", 32)]


AMBIGUOUS = {
    "one has no run": ("sub-01_T1w", "sub-01_run-2_T1w"),
    "acquisition": ("sub-01_acq-fast_T1w", "sub-01_acq-slow_T1w"),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_images_that_session_and_run_do_not_tell_apart_are_not_guessed_between(tmp_path, case):
    listing = list_scans(bids(tmp_path, *AMBIGUOUS[case], "sub-02_T1w", table=PEOPLE), channels=["T1w"])
    assert names(listing) == [("sub-02", "")]
    assert "sub-01 has 2 images with suffix T1w" in reasons(listing)["sub-01"]
    assert ("ask for acq-fast_T1w, say, in place of T1w" in reasons(listing)["sub-01"]) == (
        case == "acquisition"
    )


def test_an_entity_before_the_suffix_chooses(tmp_path):
    source = bids(tmp_path, "sub-01_acq-fast_run-1_T1w", "sub-01_acq-slow_run-1_T1w", table=PEOPLE[:2])
    listing = list_scans(source, channels=["acq-slow_T1w"])
    assert [scan.images[0].path.name for scan in listing.scans] == ["sub-01_acq-slow_run-1_T1w.nii.gz"]
    assert names(listing) == [("sub-01", "run-1")]


def test_channels_maps_and_mask_travel_together_and_a_map_may_be_absent(tmp_path):
    source = bids(
        tmp_path, "sub-01_T1w", "sub-01_run-1_FLAIR", "sub-01_dseg", "sub-01_desc-brain_mask",
        "sub-02_T1w", "sub-02_FLAIR", "sub-02_desc-brain_mask", table=PEOPLE,
    )  # fmt: skip
    listing = list_scans(source, channels=("FLAIR", "T1w"), maps=["dseg"], mask="mask")
    scan, without_map = listing.scans
    assert [file.path.name for file in scan.images] == ["sub-01_run-1_FLAIR.nii.gz", "sub-01_T1w.nii.gz"]
    assert scan.maps["dseg"].path.name == "sub-01_dseg.nii.gz"
    assert scan.mask.path.name == "sub-01_desc-brain_mask.nii.gz"
    assert listing.channels == ("FLAIR", "T1w")
    assert (without_map.subject, without_map.maps) == ("sub-02", {})
    assert reasons(listing) == {}


def test_maps_are_never_taken_for_the_image_and_are_pointed_out(tmp_path):
    listing = list_scans(bids(tmp_path, "sub-01_T1w", "sub-01_dseg", table=PEOPLE[:2]))
    assert listing.channels == ("T1w",)
    assert listing.notes == ("maps that are there but were not asked for: dseg (1)",)


def test_maps_from_derivatives(tmp_path):
    source = bids(tmp_path, "sub-01_T1w", "sub-02_T1w", table=PEOPLE)
    bids(source / "derivatives" / "first", "sub-01_T1w", "sub-01_dseg", "sub-02_dseg", "sub-01_space-MNI_T1w")
    listing = list_scans(source, maps=["dseg"])
    assert [scan.maps["dseg"].path.relative_to(source).parts[1] for scan in listing.scans] == [
        "first",
        "first",
    ]
    assert [scan.images[0].path.relative_to(source).parts[0] for scan in listing.scans] == [
        "sub-01",
        "sub-02",
    ]
    assert names(list_scans(source, channels=["space-MNI_T1w"])) == [("sub-01", "")]
    alone = list_scans(source / "derivatives" / "first", channels=["dseg"])
    assert [scan.age for scan in alone.scans] == [30, 40]  # from the raw dataset's participants.tsv
    bids(source / "derivatives" / "second", "sub-01_dseg")
    with pytest.raises(UserError, match="'dseg' in several derivatives: first, second"):
        list_scans(source, maps=["dseg"])


def test_without_any_table_ages_are_unknown_and_a_note_says_so(tmp_path):
    listing = list_scans(bids(tmp_path, "sub-01_T1w"))
    assert math.isnan(listing.scans[0].age)
    assert listing.notes == ("there is no participants.tsv: ages, sexes and sites are unknown",)


def test_ages_that_are_not_wanted(tmp_path):
    table = ("participant_id\tsex", "sub-01\tF")
    source = bids(tmp_path, "sub-01_T1w", table=table)
    with pytest.raises(UserError, match="has no column 'age'"):
        list_scans(source, is_age_asked=True)
    for asked in ({}, {"age_column": None}):
        assert math.isnan(list_scans(source, **asked).scans[0].age)


BAD_ROWS = {
    "is listed 2 times in participants.tsv": "sub-01\t30\tF\tA\t1\nsub-01\t30\tF\tA\t1",
    "has no row in participants.tsv": "sub-03\t30\tF\tA\t1",
    "age 0 is not between": "sub-01\t0\tF\tA\t1",
    "age -4 is not between": "sub-01\t-4\tF\tA\t1",
    "age 131 is not between": "sub-01\t131\tF\tA\t1",
    "age 'forty' is not a number": "sub-01\tforty\tF\tA\t1",
    "age '23,5' is not a number": "sub-01\t23,5\tF\tA\t1",
    "age inf is not between": "sub-01\tinf\tF\tA\t1",
}


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_a_bad_row_costs_its_subject_only(tmp_path, reason):
    source = bids(tmp_path, "sub-01_T1w", "sub-02_T1w", table=(PEOPLE[0], BAD_ROWS[reason], PEOPLE[2]))
    listing = list_scans(source)
    assert names(listing) == [("sub-02", "")]
    assert reason in reasons(listing)["sub-01"]
    assert all("\n" not in reject.reason for reject in listing.rejects)


def test_a_row_cut_short_is_a_row_with_unknown_values(tmp_path):
    listing = list_scans(bids(tmp_path, "sub-01_T1w", table=(PEOPLE[0], "sub-01\t30")))
    assert (listing.scans[0].age, listing.scans[0].sex) == (30, "")


BAD_TABLES = {
    b"": "is empty",
    b"participant_id\tage\n": "is empty",
    b"participant_id,age\nsub-01,30\n": "separated by comma: save it with",
    b"participant_id\tage\nsub-01\t30\t40\n": "line 2 has 3 fields, but there are 2 columns",
    b"participant_id\tage\tage\nsub-01\t30\t40\n": "two columns 'age'",
    "participant_id\tage\tsite\nsub-01\t30\tZürich\n".encode("latin-1"): "line 2 is not UTF-8",
    "participant_id\tage\nsub-01\t30\n".encode("utf-16"): "not UTF-8",
    b'participant_id\tage\nsub-01\t"30\n': "not tab-separated text",
    b"participant_id\tage\nsub-01\t3\x000\n": "has zero bytes",
}


@pytest.mark.parametrize("content", BAD_TABLES)
def test_a_table_that_would_have_to_be_guessed_at_is_refused(tmp_path, content):
    source = bids(tmp_path, "sub-01_T1w")
    (source / "participants.tsv").write_bytes(content)
    with pytest.raises(UserError, match=BAD_TABLES[content]) as caught:
        list_scans(source)
    assert "participants.tsv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_byte_order_mark_windows_lines_spaces_and_blank_lines(tmp_path):
    source = bids(tmp_path, "sub-01_T1w")
    (source / "participants.tsv").write_bytes(b"\xef\xbb\xbfparticipant_id\t age \r\n\r\n 01 \t30\r\n\t\r\n")
    listing = list_scans(source)
    assert names(listing) == [("sub-01", "")]
    assert listing.rejects == ()


def test_links_that_loop_hang_nothing_and_links_to_images_work(tmp_path):
    source = bids(tmp_path / "study", "sub-01_T1w", "sub-02_T1w", table=PEOPLE)
    (source / "sub-01" / "anat" / "up").symlink_to(source)
    (source / "sub-01" / "self").symlink_to(source / "sub-01")
    (source / "sub-03").symlink_to(source)
    target = (source / "sub-02" / "anat" / "sub-02_T1w.nii.gz").rename(tmp_path / "annexed.nii.gz")
    (source / "sub-02" / "anat" / "sub-02_T1w.nii.gz").symlink_to(target)
    listing = list_scans(source)
    assert names(listing) == [("sub-01", ""), ("sub-02", "")]
    assert [reject.subject for reject in listing.rejects] == ["sub-03"]
    target.unlink()
    assert "is a link to" in reasons(list_scans(source))["sub-02"]


def test_folders_and_hidden_files_that_look_like_images(tmp_path):
    source = bids(tmp_path, "sub-01_T1w", table=PEOPLE)
    (source / "sub-02" / "anat" / "sub-02_T1w.nii").mkdir(parents=True)
    (source / "sub-01" / "anat" / "._sub-01_T1w.nii.gz").write_bytes(b"macOS")
    listing = list_scans(source)
    assert names(listing) == [("sub-01", "")]
    assert "has no image" in reasons(listing)["sub-02"]


def test_a_folder_that_may_not_be_read_costs_its_subject_only(tmp_path, monkeypatch):
    source = bids(tmp_path, "sub-01_T1w", "sub-02_T1w", table=PEOPLE)
    scandir = os.scandir

    def refuse(path):  # tests may run as root, who may read everything
        if Path(path).parent.name == "sub-01":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    listing = list_scans(source)
    assert names(listing) == [("sub-02", "")]
    assert "cannot be read: Permission denied" in reasons(listing)["sub-01"]


def test_a_file_that_may_not_be_read_costs_its_subject_only(tmp_path, monkeypatch):
    source = bids(tmp_path, "sub-01_T1w", "sub-02_T1w", table=PEOPLE)
    is_file = Path.is_file

    def refuse(path):
        if path.name == "sub-01_T1w.nii.gz":
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refuse)
    listing = list_scans(source)
    assert names(listing) == [("sub-02", "")]
    assert "sub-01_T1w.nii.gz cannot be read: Permission denied" in reasons(listing)["sub-01"]


def test_what_is_no_bids_folder_says_what_is_known(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        list_scans(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"of no layout that is known: bids: a folder .*table: .*decathlon: "):
        list_scans(tmp_path)
    with pytest.raises(UserError, match="unknown layout 'bidz'; did you mean 'bids'"):
        list_scans(tmp_path, kind="bidz")
    source = bids(tmp_path / "study", "sub-01_T1w", "sub-01_FLAIR", table=PEOPLE)
    with pytest.raises(
        UserError, match=r"several kinds of image: FLAIR \(1\), T1w \(1\); choose with --channels"
    ):
        list_scans(source)
    with pytest.raises(UserError, match=r"no image with suffix 'T2w'; it has FLAIR \(1\), T1w \(1\)"):
        list_scans(source, channels=["T2w"])
    with pytest.raises(UserError, match="'T1w' is asked for twice"):
        list_scans(source, channels=["T1w", "T1w"])
    with pytest.raises(UserError, match="is a file; the layout 'bids' is a folder"):
        list_scans(source / "participants.tsv", kind="bids")


@pytest.mark.skipif(not DATA.exists(), reason="needs the real volumes of ../shared/data")
@pytest.mark.parametrize("folder", ["t1w_bids", "mre_stiffness"])
def test_real_folders_agree_with_their_tables(folder):
    listing = list_scans(DATA / folder)
    table = pd.read_csv(DATA / folder / "participants.tsv", sep="\t").sort_values("participant_id")
    assert [scan.subject for scan in listing.scans] == table["participant_id"].tolist()
    assert [scan.age for scan in listing.scans] == table["age"].tolist()
    assert [scan.sex for scan in listing.scans] == table["sex"].str.upper().tolist()
    assert listing.rejects == ()
    assert [note for note in listing.notes if "has no site; looked for" not in note] == []


@pytest.mark.skipif(not DATA.exists(), reason="needs the real volumes of ../shared/data")
def test_real_contrasts_and_their_segmentation_lie_on_one_grid():
    listing = list_scans(DATA / "multi_contrast", channels=("T1w", "T1Gd", "T2w", "FLAIR"), maps=["dseg"])
    with_map = [scan for scan in listing.scans if scan.maps]
    assert [scan.subject for scan in with_map] == ["sub-du7294", "sub-fg6692"]
    assert sorted(scan.subject for scan in listing.scans if not scan.maps) == ["sub-aurora", "sub-gli00001"]
    for scan in with_map:
        grids = [nib.load(file.path) for file in (*scan.images, *scan.maps.values())]
        assert {grid.shape for grid in grids} == {(240, 240, 155)}
        for grid in grids[1:]:
            np.testing.assert_array_equal(grid.affine, grids[0].affine)
