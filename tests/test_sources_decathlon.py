from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from source_trees import DATA, image

from core.errors import UserError
from core.volumes.sources import list_scans, read_image


def save(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def files(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        image(folder / name, number)


def reasons(listing) -> list[str]:
    return [reject.reason for reject in listing.rejects]


def test_folds_classes_and_maps(tmp_path):
    files(tmp_path, "a.nii", "b.nii", "c.nii", "seg/b.nii.gz")
    source = save(
        tmp_path / "folds.json",
        {
            "name": "study", "numTraining": 2, "labels": {"0": "background"},
            "training": [
                {"image": "a.nii", "label": 1, "fold": 0, "id": 7, "age": 31.5, "sex": "m", "site": "X"},
                {"image": ["b.nii"], "label": "seg/b.nii.gz", "fold": 1, "id": 8, "age": "32", "score": None},
            ],
            "test": [{"image": str(tmp_path / "c.nii"), "id": 9, "age": 33}],
        },
    )  # fmt: skip
    listing = list_scans(source)
    assert (listing.kind, listing.channels, listing.rejects, listing.notes) == (
        "decathlon",
        ("image",),
        (),
        (),
    )
    one, two, three = listing.scans
    assert (one.subject, one.age, one.sex, one.site, one.maps) == ("7", 31.5, "M", "X", {})
    assert {key: one.extra[key] for key in ("list", "fold", "label")} == {
        "list": "training",
        "fold": 0,
        "label": 1,
    }
    assert (two.subject, two.age, two.maps["label"].path.parent.name) == ("8", 32, "seg")
    assert math.isnan(two.extra["label"])
    assert two.extra["fold"] == 1
    assert three.extra["list"] == "test"


def test_the_decathlons_own_form(tmp_path):
    files(tmp_path, "imagesTr/la_1.nii.gz", "imagesTr/la_2.nii.gz", "imagesTs/la_3.nii.gz", "labelsTr/la_1.nii.gz",
          "labelsTr/la_2.nii.gz")  # fmt: skip
    save(
        tmp_path / "dataset.json",
        {
            "modality": {"0": "MRI"},
            "training": [
                {"image": "./imagesTr/la_1.nii.gz", "label": "./labelsTr/la_1.nii.gz"},
                {"image": "la_2.nii.gz", "label": "labelsTr/la_2.nii.gz"},
            ],
            "test": ["./imagesTs/la_3.nii.gz"],
        },
    )
    listing = list_scans(tmp_path)
    assert (listing.kind, listing.channels, listing.rejects) == ("decathlon", ("MRI",), ())
    assert [(scan.subject, not scan.maps) for scan in listing.scans] == [
        ("la_1", False), ("la_2", False), ("la_3", True),
    ]  # fmt: skip
    assert listing.scans[1].images[0].path.parent.name == "imagesTr"
    assert all(math.isnan(scan.age) for scan in listing.scans)
    assert listing.notes == ("no entry has 'age': ages are unknown",)


def test_channels_are_chosen_by_name_and_subjects_are_what_names_share(tmp_path):
    names = [f"BraTS2021_00001/BraTS2021_00001_{kind}.nii.gz" for kind in ("flair", "t1", "t1ce")]
    files(tmp_path, *names)
    content = {
        "channel_names": {"1": "t1", "0": "flair", "2": "t1ce"},
        "training": [{"image": names, "fold": 0}],
    }
    listing = list_scans(save(tmp_path / "l.json", content), channels=("t1ce", "flair"))
    (scan,) = listing.scans
    assert scan.subject == "BraTS2021_00001"
    assert [file.path.name[16:] for file in scan.images] == ["t1ce.nii.gz", "flair.nii.gz"]
    del content["channel_names"]
    assert list_scans(save(tmp_path / "l.json", content)).channels == ("image_0", "image_1", "image_2")
    listing = list_scans(save(tmp_path / "l.json", content), channels=("t1", "flair"))
    assert reasons(listing) == [
        "training[0]: it names 3 images for 2 channels (t1, flair); a file for each is needed, 4D files are not split"
    ]


def test_leaks_are_named_and_counted(tmp_path):
    names = [f"sub-{subject}/ses-{session}_T1w.nii" for subject in "abc" for session in (1, 2)]
    files(tmp_path, *names)
    a1, a2, b1, b2, c1, c2 = names
    source = save(
        tmp_path / "l.json",
        {
            "training": [
                {"image": a1, "fold": 0, "id": "i1"},
                {"image": a2, "fold": 1, "id": "i2"},  # subject a again
                {"image": b1, "fold": 0, "id": "i3"},
                {"image": b2, "fold": 0, "id": "i4"},  # subject b again, in the same fold: no leak
                {"image": c1, "fold": 2, "id": "i4"},  # an id again
                {"image": c2, "fold": 2, "id": "i6"},
            ],
            "test": [{"image": f"./{c2}", "id": "i7"}],  # a file again, written otherwise
        },
    )
    listing = list_scans(source)
    assert listing.notes[:3] == (
        "LEAK: 1 files are in more than one fold or list: sub-c/ses-2_T1w.nii (training fold 2, test)",
        "LEAK: 1 ids are in more than one fold or list: i4 (training fold 0, training fold 2)",
        "LEAK: 2 subjects are in more than one fold or list: sub-a (training fold 0, training fold 1), "
        "sub-c (training fold 2, test)",
    )
    assert [(scan.subject, scan.session) for scan in listing.scans] == [
        (f"sub-{subject}", f"ses-{session}") for subject in "abc" for session in (1, 2)
    ]
    assert [(scan.extra["fold"]) for scan in listing.scans] == [0, 1, 0, 0, 2, 2]
    assert reasons(listing) == ["test[0]: the scan is listed again in test; the first is taken"]


def test_a_clean_list_has_no_leak(tmp_path):
    files(tmp_path, "a.nii", "b.nii", "c.nii")
    entries = [
        {"image": f"{name}.nii", "fold": fold, "age": 30} for name, fold in (("a", 0), ("b", 1), ("c", 1))
    ]
    assert list_scans(save(tmp_path / "l.json", {"training": entries})).notes == ()


def test_a_subject_with_two_files_and_no_sessions(tmp_path):
    files(tmp_path, "x_pre.nii", "x_post.nii")
    entries = [{"image": f"x_{when}.nii", "subject": "x", "age": 30} for when in ("pre", "post")]
    listing = list_scans(save(tmp_path / "l.json", {"training": entries}))
    assert [(scan.subject, scan.session) for scan in listing.scans] == [("x", "x_post"), ("x", "x_pre")]


BAD_ENTRIES = {
    "it names no image": {"label": 1},
    "it names 2 images for 1 channels": {"image": ["a.nii", "b.nii"]},
    "gone.nii does not exist": {"image": "gone.nii"},
    "/nowhere/x.nii does not exist": {"image": "/nowhere/x.nii"},
    "seg.nii.gz does not exist": {"image": "a.nii", "label": "seg.nii.gz"},
    "age -1 is not between": {"image": "a.nii", "age": -1},
    "age 'old' is not a number": {"image": "a.nii", "age": "old"},
    "age 'true' is not a number": {"image": "a.nii", "age": True},
    "age '[30]' is not a number": {"image": "a.nii", "age": [30]},
    "is not a file": {"image": "folder.nii"},
    "cannot be read: File name too long": {"image": "a" * 5000 + ".nii"},
    "does not exist": {"image": "a\0.nii"},
    "it names no image ": {"image": 5},
    "it names no image  ": {"image": [None]},
}


@pytest.mark.parametrize("reason", BAD_ENTRIES)
def test_a_bad_entry_costs_itself_only(tmp_path, reason):
    files(tmp_path, "a.nii", "b.nii", "good.nii")
    (tmp_path / "folder.nii").mkdir()
    content = {"training": [{"age": 30, **BAD_ENTRIES[reason]}, {"image": "good.nii", "age": 40}]}
    listing = list_scans(save(tmp_path / "l.json", content), channels=["T1w"])
    assert [scan.subject for scan in listing.scans] == ["good"]
    (found,) = reasons(listing)
    assert found.startswith("training[0]: ")
    assert reason.strip() in found


UNUSABLE = {
    b"": "is not JSON: ",
    b"{": "is not JSON: .*line 1",
    b'{"training": []}': "lists no images, it has 'training'",
    b"[]": "lists no images, it has an empty list",
    b"3": "holds int; a list of images is needed",
    b'{"labels": {"0": "x"}, "numTraining": 4}': "lists no images, it has 'labels', 'numTraining'",
    b"[" * 100_000: "nested too deeply",
    '{"training": "Zürich"}'.encode("latin-1"): "is not JSON: ",
    b'{"training": [{"image": "a.nii"}, {"image": ["a.nii", "b.nii"]}]}': "entries of 1 to 2 images",
}


@pytest.mark.parametrize("content", UNUSABLE, ids=[key[:24] for key in UNUSABLE])
def test_a_list_that_cannot_be_used_says_why(tmp_path, content):
    (tmp_path / "l.json").write_bytes(content)
    with pytest.raises(UserError, match=UNUSABLE[content]) as caught:
        list_scans(tmp_path / "l.json")
    assert "l.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not DATA.exists(), reason="needs the real volumes of ../shared/data")
def test_a_list_of_real_contrasts_reads_as_the_folder_does(tmp_path):
    kinds = ("T1w", "T1Gd", "T2w", "FLAIR")
    folder = list_scans(DATA / "multi_contrast", channels=kinds)
    entries = [
        {"image": [str(file.path) for file in scan.images], "fold": number % 2}
        for number, scan in enumerate(folder.scans)
    ]
    names = {str(number): kind for number, kind in enumerate(kinds)}
    listing = list_scans(
        save(tmp_path / "l.json", {"channel_names": names, "training": entries}), channels=["T2w"]
    )
    assert [scan.subject for scan in listing.scans] == [scan.subject for scan in folder.scans]
    assert [scan.images[0] for scan in listing.scans] == [scan.images[2] for scan in folder.scans]
    assert [scan.extra["fold"] for scan in listing.scans] == [0, 1, 0, 1]
    voxels, affine = read_image(listing.scans[1].images[0])
    assert voxels.shape == (240, 240, 155)
    assert np.linalg.det(affine[:3, :3]) == pytest.approx(1)
