from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from source_trees import DATA, text

from core.errors import UserError
from core.volumes.images.nifti import read_volume
from core.volumes.sources import list_scans, read_image

GRID = (91, 109, 91)
REAL = sorted((DATA / "mre_stiffness").glob("sub-*/mre/*.nii.gz"))[:6]  # on FSL's grid of 2 mm
HEADER = "participant_id\tage\tsex\tsite\tsplit\tstudy"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="needs the real volumes of ../shared/data")


def array(path: Path, count: int = 3, *, channel: bool = False, shape: tuple[int, ...] = GRID) -> Path:
    """`count` volumes of which nothing but the header and a few voxels is written: the rest is a hole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    full = (count, 1, *shape) if channel else (count, *shape)
    stored = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=full)
    for number in range(count):
        stored[(number, 0, 5, 5, 5) if channel else (number, 5, 5, 5)] = 10 + number
    return path


def ids(path: Path, values, dtype=None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.asarray(values, dtype=dtype))
    return path


def people(path: Path, *rows: str) -> Path:
    return text(path, HEADER, *rows)


def reasons(listing) -> dict[str, str]:
    return {reject.subject: reject.reason for reject in listing.rejects}


@needs_data
@pytest.mark.parametrize("channel", [False, True])
def test_real_volumes_are_joined_on_id_and_keep_their_place_in_mm(tmp_path, channel):
    """Arrays as nibabel gives them, rows in another order than the table's."""
    order = [3, 0, 5, 1, 4, 2]
    number = {index: 100 + 7 * index for index in range(6)}
    volumes = np.stack([np.asarray(nib.load(REAL[index]).dataobj) for index in order])
    np.save(tmp_path / "val_quasiraw_2mm.npy", volumes[:, np.newaxis] if channel else volumes)
    ids(tmp_path / "participants_id.npy", [number[index] for index in order])
    people(
        tmp_path / "participants.tsv",
        *(f"{number[i]}\t{20 + i}\tmale\t{i}.0\tval\tX" for i in (5, 4, 0, 1, 2, 3)),
    )
    listing = list_scans(tmp_path)
    assert (listing.kind, listing.channels, listing.rejects) == ("openbhb", ("quasiraw",), ())
    assert [scan.subject for scan in listing.scans] == [f"sub-{number[index]}" for index in range(6)]
    assert [scan.age for scan in listing.scans] == [20, 21, 22, 23, 24, 25]
    for index, scan in enumerate(listing.scans):
        found, affine = read_image(scan.images[0])
        expected, where = read_volume(REAL[index])
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_allclose(affine, where, atol=1e-6)


WRITTEN = {
    "int64": ([30, 7, 200], "i8"),
    "float64": ([30, 7, 200], "f8"),
    "text": (["30", "7", "200"], None),
    "text with zeros": (["0030", "0007", "0200"], None),
    "bytes": ([b"030", b"007", b"200"], None),
    "text of numbers with a point": (["30.0", "7.0", "200.0"], None),
    "prefixed": (["sub-30", "sub-7", "sub-200"], None),
}


@pytest.mark.parametrize(
    "table", [("7", "30", "200"), ("sub-007", "sub-030", "sub-200"), ("7.0", "30.0", "200.0")]
)
@pytest.mark.parametrize("written", WRITTEN)
def test_ids_match_however_they_are_written(tmp_path, written, table):
    array(tmp_path / "quasiraw.npy")
    ids(tmp_path / "participants_id.npy", *WRITTEN[written])
    people(
        tmp_path / "participants.tsv",
        *(f"{id}\t{age}\tF\t1\ttrain\tX" for id, age in zip(table, (7, 30, 100), strict=True)),
    )
    listing = list_scans(tmp_path)
    assert {scan.age: scan.images[0].row for scan in listing.scans} == {30: 0, 7: 1, 100: 2}
    assert listing.rejects == ()


def test_the_published_folders_of_train_and_val(tmp_path):
    """As the code of the brain-age papers reads them: tables and arrays in folders of their own."""
    array(tmp_path / "train" / "train_quasiraw" / "train_quasiraw" / "train_quasiraw_2mm.npy", 3)
    ids(tmp_path / "train" / "train_quasiraw" / "train_quasiraw" / "participants_id.npy", ["1", "2", "3"])
    people(tmp_path / "train" / "train_labels" / "train_participants.tsv",
           "3\t33\tF\t1\tn/a\tX", "1\t31\tF\t1\tn/a\tX", "2\t32\tF\t1\tn/a\tX")  # fmt: skip
    array(tmp_path / "val" / "val_quasiraw" / "val_quasiraw_2mm.npy", 2)
    ids(tmp_path / "val" / "val_quasiraw" / "participants_id.npy", ["5", "4"])
    people(tmp_path / "val" / "val_labels" / "val_participants.tsv",
           "4\t34\tF\t1\texternal_test\tX", "5\t35\tF\t1\tinternal_test\tX")  # fmt: skip
    both = list_scans(tmp_path)
    assert [(scan.subject, scan.age, scan.extra["split"]) for scan in both.scans] == [
        ("sub-1", 31, "train"), ("sub-2", 32, "train"), ("sub-3", 33, "train"),
        ("sub-4", 34, "external_test"), ("sub-5", 35, "internal_test"),
    ]  # fmt: skip
    assert [scan.images[0].row for scan in both.scans] == [0, 1, 2, 1, 0]
    assert [scan.subject for scan in list_scans(tmp_path / "val").scans] == ["sub-4", "sub-5"]
    assert {scan.extra["split"] for scan in list_scans(tmp_path / "train").scans} == {"train"}
    people(tmp_path / "participants.tsv", *(f"{id}\t{30 + id}\tF\t1\tn/a\tX" for id in range(1, 10)))
    with_all = list_scans(tmp_path)
    assert [scan.age for scan in with_all.scans] == [scan.age for scan in both.scans]
    assert any("4 of 9 participants have no volume here, such as sub-6" in note for note in with_all.notes)


def test_the_official_form_of_one_array_for_each_subject(tmp_path):
    folder = tmp_path / "train" / "derivatives"
    for id in ("11", "12"):
        array(folder / f"sub-{id}" / "ses-1" / f"sub-{id}_preproc-quasiraw_T1w.npy", 1, channel=True)
        array(folder / f"sub-{id}" / "ses-1" / f"sub-{id}_preproc-cat12vbm_desc-gm_T1w.npy", 1, channel=True,
              shape=(121, 145, 121))  # fmt: skip
        np.save(
            folder / f"sub-{id}" / "ses-1" / f"sub-{id}_preproc-cat12vbm_desc-gm_ROI.npy",
            np.ones((1, 1, 284)),
        )
    people(tmp_path / "participants.tsv", "12\t32\tF\t1\t\tX", "11\t31\tF\t1\t\tX")
    with pytest.raises(UserError, match=r"several kinds of image: quasiraw \(2\), vbm \(2\)"):
        list_scans(tmp_path)
    listing = list_scans(tmp_path, channels=["vbm"])
    assert [(scan.subject, scan.age, scan.extra["split"]) for scan in listing.scans] == [
        ("sub-11", 31, "train"), ("sub-12", 32, "train"),
    ]  # fmt: skip
    voxels, affine = read_image(listing.scans[0].images[0])
    assert voxels.shape == (121, 145, 121)
    np.testing.assert_array_equal(np.abs(np.diag(affine)), [1.5, 1.5, 1.5, 1])
    # voxel 5, 5, 5 of the array: from the right end at 90 mm five steps to the left, and so on
    place = np.unravel_index(voxels.argmax(), voxels.shape)
    np.testing.assert_allclose((affine @ [*place, 1])[:3], [90 - 7.5, -126 + 7.5, -72 + 7.5])


@pytest.mark.parametrize(
    ("shape", "edge"), [((182, 218, 182), 1), ((121, 145, 121), 1.5), ((91, 109, 91), 2)]
)
def test_grids_cover_the_template_of_fsl(tmp_path, shape, edge):
    array(tmp_path / "quasiraw.npy", 1, shape=shape)
    ids(tmp_path / "participants_id.npy", [1])
    people(tmp_path / "participants.tsv", "1\t30\tF\t1\ttrain\tX")
    affine = np.array(list_scans(tmp_path).scans[0].images[0].affine)
    assert nib.aff2axcodes(affine) == ("L", "A", "S")
    anterior_commissure = np.linalg.solve(affine, [0, 0, 0, 1])[:3]
    np.testing.assert_allclose(anterior_commissure, np.array([90, 126, 72]) / edge)


def test_missing_and_double_ids_are_left_out_with_their_reason(tmp_path):
    array(tmp_path / "quasiraw.npy", 8)
    ids(tmp_path / "participants_id.npy", ["1", "2", "2", "3", "", "1.2E+11", "4", "6"])
    people(
        tmp_path / "participants.tsv",
        "1\t31\tF\t1\ttrain\tX", "2\t32\tF\t1\ttrain\tX", "4\t34\tF\t1\ttrain\tX", "04\t44\tF\t1\ttrain\tX",
        "5\t35\tF\t1\ttrain\tX", "6\tn/a\tF\t1\ttrain\tX",
    )  # fmt: skip
    listing = list_scans(tmp_path)
    assert [scan.subject for scan in listing.scans] == ["sub-1", "sub-6"]
    assert np.isnan(listing.scans[1].age)
    found = sorted((reject.subject, reject.reason) for reject in listing.rejects)
    assert found == [
        ("", "row 4: its id is missing"),
        ("", "row 5: its id '1.2E+11' was shortened by a spreadsheet; the digits are lost"),
        ("sub-2", "sub-2 has 2 volumes; one is needed"),
        ("sub-2", "sub-2 has 2 volumes; one is needed"),
        ("sub-3", "sub-3 has a volume, but no row in participants.tsv"),
        ("sub-4", "sub-4 is listed 2 times in participants.tsv; one row is needed"),
    ]
    assert {reject.file for reject in listing.rejects} == {"quasiraw.npy"}


def test_tables_that_contradict_each_other(tmp_path):
    array(tmp_path / "quasiraw.npy", 2)
    ids(tmp_path / "participants_id.npy", [1, 2])
    people(tmp_path / "participants.tsv", "1\t31\tF\t1\ttrain\tX", "2\t32\tF\t1\ttrain\tX")
    people(tmp_path / "labels" / "train_participants.tsv", "1\t13\tF\t1\ttrain\tX", "2\t32\tF\tn/a\ttrain\tX")
    listing = list_scans(tmp_path)
    assert [scan.subject for scan in listing.scans] == ["sub-2"]
    assert "its age is" in reasons(listing)["sub-1"]


def whole(tmp_path: Path) -> None:
    array(tmp_path / "quasiraw.npy")
    ids(tmp_path / "participants_id.npy", [1, 2, 3])
    people(tmp_path / "participants.tsv", "1\t31\tF\t1\ttrain\tX")


UNUSABLE = {
    "holds 3 volumes, but .*participants_id.npy names 2": lambda folder: ids(
        folder / "participants_id.npy", [1, 2]
    ),
    "has no participants_id.npy beside it": lambda folder: (folder / "participants_id.npy").unlink(),
    r"no participants\.tsv": lambda folder: (folder / "participants.tsv").unlink(),
    r"shape \(90, 109, 91\), which is no MNI152 grid": lambda folder: array(
        folder / "quasiraw.npy", shape=(90, 109, 91)
    ),
    r"has shape \(109, 91\); \(N, X, Y, Z\)": lambda folder: np.save(
        folder / "quasiraw.npy", np.ones((109, 91))
    ),
    "ids as float32, which cannot tell such large": lambda folder: ids(
        folder / "participants_id.npy", [149439141692, 149439141693, 3], "f4"
    ),
    "pickled Python objects, which are not loaded": lambda folder: np.save(
        folder / "participants_id.npy", np.array(["1", "2", "3"], dtype=object), allow_pickle=True
    ),
    "truncated": lambda folder: (folder / "quasiraw.npy").write_bytes(
        (folder / "quasiraw.npy").read_bytes()[:-5]
    ),
    "magic": lambda folder: (folder / "quasiraw.npy").write_bytes(b"not an array"),
    "one value for each subject": lambda folder: ids(folder / "participants_id.npy", np.ones((3, 2))),
    "several files of ids": lambda folder: (
        ids(folder / "a_participants_id.npy", [1, 2, 3]),
        (folder / "participants_id.npy").rename(folder / "b_participants_id.npy"),
    ),
    r"quasiraw\.npy and .*quasiraw_1mm\.npy are both of the subjects": lambda folder: array(
        folder / "quasiraw_1mm.npy", shape=(182, 218, 182)
    ),
    "no column 'age'": lambda folder: text(folder / "participants.tsv", "participant_id\tyears", "1\t30"),
}


@pytest.mark.parametrize("reason", UNUSABLE)
def test_a_folder_that_cannot_be_used_says_why(tmp_path, reason):
    whole(tmp_path)
    UNUSABLE[reason](tmp_path)
    with pytest.raises(UserError, match=reason) as caught:
        list_scans(tmp_path, is_age_asked=True)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
