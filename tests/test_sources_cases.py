from __future__ import annotations

import math
from pathlib import Path

import pytest
from source_trees import DATA, image

from core.errors import UserError
from core.volumes.sources import SOURCES, list_scans
from core.volumes.sources.recognise import LAYOUTS

CONTRASTS = ("t1n", "t1c", "t2w", "t2f")


def case(folder: Path, name: str, *contrasts: str, join: str = "-") -> None:
    for contrast in contrasts:
        image(folder / name / f"{name}{join}{contrast}.nii.gz")


def test_folders_as_brats_has_them(tmp_path):
    for name in ("BraTS-GLI-00001-000", "BraTS-GLI-00001-001", "BraTS-GLI-00002-000"):
        case(tmp_path, name, *CONTRASTS, "seg")
    listing = list_scans(tmp_path, channels=("t2f", "t1n"), maps=["seg"])
    assert (listing.kind, listing.rejects) == ("cases", ())
    assert [(scan.subject, scan.session) for scan in listing.scans] == [
        ("BraTS-GLI-00001", "000"), ("BraTS-GLI-00001", "001"), ("BraTS-GLI-00002", "000"),
    ]  # fmt: skip
    last = listing.scans[-1]
    assert [file.path.name for file in last.images] == [
        "BraTS-GLI-00002-000-t2f.nii.gz", "BraTS-GLI-00002-000-t1n.nii.gz",
    ]  # fmt: skip
    assert last.maps["seg"].path.name == "BraTS-GLI-00002-000-seg.nii.gz"
    assert math.isnan(last.age)
    assert "ages, sexes and sites are unknown" in listing.notes[0]


def test_a_case_that_lacks_a_contrast_or_has_it_twice_is_left_out(tmp_path):
    case(tmp_path, "one", "t1", "flair", join="_")
    case(tmp_path, "two", "t1", join="_")
    case(tmp_path, "three", "t1", "flair", "again_flair", join="_")
    (tmp_path / "empty").mkdir()
    listing = list_scans(tmp_path, channels=("t1", "flair"))
    assert [scan.subject for scan in listing.scans] == ["one"]
    assert {reject.subject: reject.reason.split(" (")[0] for reject in listing.rejects} == {
        "two": "two has no flair; it has t1",
        "three": "three has 2 images of flair",
        "empty": "empty has no flair; it has no images",
    } | {"empty": "empty has no t1; it has no images"}


def test_what_has_to_be_chosen_is_listed(tmp_path):
    case(tmp_path, "one", "t1", "flair", "seg", join="_")
    with pytest.raises(
        UserError, match=r"several kinds of image: flair \(1\), t1 \(1\); choose with --channels"
    ):
        list_scans(tmp_path)
    with pytest.raises(UserError, match=r"no contrast 't2'; it has flair \(1\), seg \(1\), t1 \(1\)"):
        list_scans(tmp_path, channels=["t2"])


def test_loops_of_links(tmp_path):
    case(tmp_path, "one", "t1", join="_")
    (tmp_path / "one" / "loop").symlink_to(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path)
    assert "one" in {scan.subject for scan in list_scans(tmp_path).scans}


def test_every_layout_says_how_it_is_known():
    assert SOURCES.keys() == LAYOUTS.keys()


@pytest.mark.skipif(not DATA.exists(), reason="needs the real volumes of ../shared/data")
def test_real_contrasts_as_cases_and_as_bids_are_the_same_files():
    wanted = {"channels": ("T1w", "FLAIR"), "maps": ["dseg"]}
    bids, cases = (list_scans(DATA / "multi_contrast", kind=kind, **wanted) for kind in ("bids", "cases"))
    assert [(scan.subject, scan.images, scan.maps) for scan in cases.scans] == [
        (scan.subject, scan.images, scan.maps) for scan in bids.scans
    ]
    assert {reject.subject for reject in cases.rejects} == {reject.subject for reject in bids.rejects}
