from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import subprocess
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from reference_resample import affine_of, rotation

from core.errors import UserError
from core.volumes.cohort.describe import describe
from core.volumes.cohort.reader import Cohort
from core.volumes.cohort.verify import verify
from core.volumes.images.preprocess import Preprocessing
from core.volumes.ingest import shards as ingest_shards
from core.volumes.ingest.cohort import IngestReport, volumes_per_shard, write_shard_of
from core.volumes.ingest.cohort import ingest as ingest_listing
from core.volumes.sources import list_scans

DATA = Path(__file__).parents[1].parent / "shared" / "data"
SETTINGS = Preprocessing(spacing=8, intensity="raw")
SCANNER = affine_of([-6, 6, 6], [40, -50, -30], rotation(0.1, 0, 0.05))


def ingest(
    source: Path,
    out: Path,
    preprocessing: Preprocessing,
    *,
    suffix: str | None = None,
    age_column="age",
    **options,
) -> IngestReport:
    """The BIDS folder `source` as a cohort, in this process."""
    listing = list_scans(source, kind="bids", channels=[suffix] if suffix else None, age_column=age_column)
    return ingest_listing(listing, out, preprocessing, **options)


def brain(number: int) -> np.ndarray:
    """A block of "brain" with its own intensities, away from the middle of its field of view."""
    voxels = np.zeros((20, 22, 20), np.float32)
    voxels[3:15, 4:18, 2:14] = np.random.default_rng(number).uniform(50, 100, (12, 14, 12)) + number
    return voxels


def save(folder: Path, name: str, voxels: np.ndarray, affine: np.ndarray = SCANNER) -> Path:
    path = folder / name.split("_")[0] / "anat" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, affine), path)
    return path


def tree(folder: Path, count: int = 4) -> Path:
    """A BIDS-like folder of `count` good subjects, aged 20, 21, …"""
    folder.mkdir(parents=True)
    lines = ["participant_id\tage\tsex\tsite\thandedness\tiq"]
    for number in range(count):
        save(folder, f"sub-{number:02d}_T1w.nii.gz", brain(number))
        sex = ("M", "female", "n/a", "m")[number % 4]
        lines.append(
            f"sub-{number:02d}\t{20 + number}\t{sex}\tA\tright\t{'n/a' if number == 1 else 100 + number}"
        )
    (folder / "participants.tsv").write_text("\n".join(lines) + "\n")
    return folder


def add_row(source: Path, row: str) -> None:
    with (source / "participants.tsv").open("a") as file:
        file.write(row + "\n")


def replace_row(source: Path, old: str, new: str) -> None:
    path = source / "participants.tsv"
    assert path.read_text().count(old) == 1
    path.write_text(path.read_text().replace(old, new))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_clean_folder(tmp_path):
    seen = []
    source = tree(tmp_path / "study")
    report = ingest(source, tmp_path / "c", SETTINGS, on_progress=lambda *step: seen.append(step))
    manifest = report.cohort.manifest
    assert manifest["subject"].tolist() == ["sub-00", "sub-01", "sub-02", "sub-03"]
    assert manifest["age"].tolist() == [20, 21, 22, 23]
    assert manifest["sex"].tolist() == ["M", "F", "", "M"]
    assert manifest["site"].tolist() == ["A"] * 4
    assert manifest["handedness"].tolist() == ["right"] * 4
    np.testing.assert_array_equal(manifest["iq"], [100, np.nan, 102, 103])
    assert manifest["source"][2] == "sub-02/anat/sub-02_T1w.nii.gz"
    assert (report.rejects, report.notes, report.already_there) == ((), (), False)
    assert (tmp_path / "c" / "rejects.csv").read_text() == "subject,file,reason\n"
    assert seen == [(4, 4, "sub-03")]
    assert sorted(contents(tmp_path / "c")) == [
        "cohort.json", "manifest.parquet", "rejects.csv", "shards/00000.h5",
    ]  # fmt: skip
    description = report.cohort.description
    assert description.channels == ("T1w",)
    assert description.preprocessing == SETTINGS.model_copy(update={"centre": "brain"}).settings
    assert description.source == str(source)
    assert not description.synthetic
    # What leads back to the source, and where a volume lies, are no classes.
    assert not [name for name in describe(report.cohort) if name.startswith("classes of")]


def test_each_subject_keeps_its_own_voxels_and_its_place_in_mm(tmp_path):
    report = ingest(tree(tmp_path / "study"), tmp_path / "c", SETTINGS, dtype="float32")
    for row, volume in enumerate(report.cohort.read(range(4))[:, 0]):
        original = brain(row)
        affine = np.vstack([report.cohort.manifest["affine"][row].reshape(3, 4), [0, 0, 0, 1]])
        middle = nib.affines.apply_affine(affine, np.argwhere(volume).mean(axis=0))
        expected = nib.affines.apply_affine(SCANNER, np.argwhere(original).mean(axis=0))
        np.testing.assert_allclose(middle, expected, atol=1)
        assert volume[volume != 0].mean() == pytest.approx(original[original != 0].mean(), rel=0.01)
        assert np.count_nonzero(volume) * 8**3 == pytest.approx(np.count_nonzero(original) * 6**3, rel=0.1)


def test_same_input_and_settings_same_bytes_and_row_order_does_not_matter(tmp_path):
    source = tree(tmp_path / "study")
    ingest(source, tmp_path / "1" / "c", SETTINGS)
    table = pd.read_csv(source / "participants.tsv", sep="\t", dtype=str, keep_default_na=False)
    ingest(source, tmp_path / "2" / "c", SETTINGS)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    table[::-1].to_csv(source / "participants.tsv", sep="\t", index=False)
    turned = ingest(source, tmp_path / "3", SETTINGS).cohort
    assert turned.description.hash == Cohort.open(tmp_path / "1" / "c").description.hash


def test_ids_without_prefix_windows_lines_and_byte_order_mark(tmp_path):
    source = tree(tmp_path / "study")
    text = (source / "participants.tsv").read_text().replace("sub-", "").replace("\n", "\r\n")
    (source / "participants.tsv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert len(ingest(source, tmp_path / "c", SETTINGS).cohort) == 4


def test_columns_that_clash_with_the_manifest_are_renamed(tmp_path):
    source = tree(tmp_path / "study")
    replace_row(source, "handedness\tiq", "source\tvolume")
    replace_row(source, "\tage\t", "\tscan_age\t")
    manifest = ingest(source, tmp_path / "c", SETTINGS, age_column="scan_age").cohort.manifest
    assert manifest["participants_source"].tolist() == ["right"] * 4
    assert manifest["volume"][0] == 100
    assert manifest["age"][3] == 23


def nan_voxels() -> np.ndarray:
    voxels = brain(1)
    voxels[5, 5, 5:8] = np.nan
    return voxels


BAD_IMAGES = {
    "3 NaN or infinite voxels": lambda source: save(source, "sub-01_T1w.nii.gz", nan_voxels()),
    r"4D with shape \(20, 22, 20, 2\)": lambda source: save(
        source, "sub-01_T1w.nii.gz", np.stack([brain(1)] * 2, axis=-1)
    ),
    "empty: every voxel is 0": lambda source: save(
        source, "sub-01_T1w.nii.gz", np.zeros((5, 5, 5), np.float32)
    ),
    "constant": lambda source: save(source, "sub-01_T1w.nii.gz", np.ones((5, 5, 5), np.float32)),
    "truncated": lambda source: cut_short(source / "sub-01" / "anat" / "sub-01_T1w.nii.gz"),
    "has no image": lambda source: shutil.rmtree(source / "sub-01"),
    "has 2 images with suffix T1w": lambda source: save(source, "sub-01_run-2_T1w.nii.gz", brain(1)),
    "of another subject by its name": lambda source: misplace(source),
    "listed 2 times": lambda source: add_row(source, "01\t21\tF\tA\tright\t100"),
    "has no row": lambda source: replace_row(source, "sub-01", "sub-"),
    "age 'n.a.n' is not a number": lambda source: replace_row(source, "\t21\t", "\tn.a.n\t"),
    "age '89\\+' is not a number": lambda source: replace_row(source, "\t21\t", "\t89+\t"),
    "age -3 is not between 0 and 130": lambda source: replace_row(source, "\t21\t", "\t-3\t"),
    "age 2100 is not between": lambda source: replace_row(source, "\t21\t", "\t2100\t"),
    "age inf is not between": lambda source: replace_row(source, "\t21\t", "\tinf\t"),
}


def misplace(source: Path) -> None:
    shutil.rmtree(source / "sub-01")
    shutil.copytree(source / "sub-00", source / "sub-01")


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-300])


@pytest.mark.parametrize("reason", BAD_IMAGES)
def test_a_bad_subject_is_rejected_with_its_reason_and_the_rest_goes_on(tmp_path, reason):
    source = tree(tmp_path / "study")
    BAD_IMAGES[reason](source)
    report = ingest(source, tmp_path / "c", SETTINGS)
    assert report.cohort.manifest["subject"].tolist() == ["sub-00", "sub-02", "sub-03"]
    written = pd.read_csv(tmp_path / "c" / "rejects.csv")
    assert written["subject"].tolist() == ["sub-01"]
    assert [reject.subject for reject in report.rejects] == ["sub-01"]
    assert written["reason"].str.contains(reason).all(), written["reason"][0]
    with pytest.raises(UserError, match=rf"study.*sub-01.*{reason}"):
        ingest(source, tmp_path / "strict", SETTINGS, strict=True)
    assert not (tmp_path / "strict").exists()


def test_loops_of_links_and_names_without_a_suffix(tmp_path):
    source = tree(tmp_path / "study")
    for number in range(4):
        folder = source / f"sub-{number:02d}" / "anat"
        (folder / f"sub-{number:02d}_T1w.nii.gz").rename(folder / f"sub-{number:02d}.nii.gz")
        (folder / "loop").symlink_to(source)
    cohort = ingest(source, tmp_path / "c", SETTINGS).cohort
    assert len(cohort) == 4
    assert cohort.description.channels == ("image",)


def test_no_usable_subject_at_all(tmp_path):
    source = tree(tmp_path / "study")
    table = source / "participants.tsv"
    table.write_text("participant_id\tage\n" + "".join(f"sub-{number:02d}\told\n" for number in range(3)))
    save(source, "sub-03_T1w.nii.gz", nan_voxels())
    add_row(source, "sub-03\t30")
    with pytest.raises(
        UserError, match=r"no usable subject in .*all 4 are in .*sub-00: age 'old' is not a number"
    ):
        ingest(source, tmp_path / "c", SETTINGS)
    assert len(pd.read_csv(tmp_path / "c" / "rejects.csv")) == 4
    assert sorted(contents(tmp_path / "c")) == ["rejects.csv"]
    replace_row(source, "sub-00\told", "sub-00\t30")
    assert len(ingest(source, tmp_path / "c", SETTINGS).cohort) == 1


def test_a_cohort_that_is_there_is_known_again_or_left_alone(tmp_path):
    source = tree(tmp_path / "study")
    add_row(source, "sub-99\t30\tF\tA\tleft\t1")
    first = ingest(source, tmp_path / "c", SETTINGS)
    before = contents(tmp_path / "c")
    again = ingest(source, tmp_path / "c", SETTINGS)
    assert again.already_there
    assert again.cohort.description == first.cohort.description
    assert again.rejects == first.rejects
    assert len(again.rejects) == 1
    for change in ({"preprocessing": Preprocessing(spacing=16)}, {"dtype": "float32"}):
        with pytest.raises(UserError, match=r"already holds a cohort made from other .*4 subjects"):
            ingest(source, tmp_path / "c", **{"preprocessing": SETTINGS, **change})
    replace_row(source, "\t21\t", "\t22.5\t")
    with pytest.raises(UserError, match="already holds a cohort made from other files or settings"):
        ingest(source, tmp_path / "c", SETTINGS)
    assert contents(tmp_path / "c") == before


def test_an_output_folder_that_cannot_be_used(tmp_path, monkeypatch):
    source = tree(tmp_path / "study")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*file/c.*choose another output folder"):
        ingest(source, tmp_path / "file" / "c", SETTINGS)
    with pytest.raises(UserError, match=r"holds other files, such as participants\.tsv"):
        ingest(source, source, SETTINGS)

    def read_only(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "mkdir", read_only)
        with pytest.raises(UserError, match=r"cannot write to .*Permission denied"):
            ingest(source, tmp_path / "c", SETTINGS)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"needs 0\.1 MB for 4 volumes, but 0\.0 MB are free"):
        ingest(source, tmp_path / "d", SETTINGS)
    assert not (tmp_path / "d").exists()


def test_values_too_large_for_float16_are_left_out_with_advice(tmp_path):
    source = tree(tmp_path / "study")
    save(source, "sub-02_T1w.nii.gz", brain(2) * 1e4)
    report = ingest(source, tmp_path / "c", SETTINGS)
    assert [reject.subject for reject in report.rejects] == ["sub-02"]
    assert "above 65504, the largest float16; store the cohort as float32" in report.rejects[0].reason
    assert len(ingest(source, tmp_path / "d", SETTINGS, dtype="float32").cohort) == 4
    exact = ingest(source, tmp_path / "e", SETTINGS, dtype="int16").cohort
    np.testing.assert_allclose(
        exact.read(range(4)), Cohort.open(tmp_path / "d").read(range(4)), atol=1.1e6 / 32767 / 2
    )


def test_template_space_is_settled_for_the_whole_cohort(tmp_path):
    source = tree(tmp_path / "study", count=0)
    template = affine_of([8, 8, 8], [-88, -126, -70])
    for number in range(2):
        voxels = np.zeros((23, 28, 23), np.float32)
        voxels[4:19, 5:24, 3 : 10 + 5 * number] = brain(number)[5:6, 6:7, 3:4] + number  # coverage differs
        voxels[4, 5, 3] += 1
        save(source, f"sub-{number:02d}_T1w.nii.gz", voxels, template)
        add_row(source, f"sub-{number:02d}\t30\tF\tA\tleft\t1")
    cohort = ingest(source, tmp_path / "c", SETTINGS).cohort
    assert cohort.description.preprocessing["centre"] == "world"
    assert [affine[11] for affine in cohort.manifest["affine"]] == [-70, -70]
    np.testing.assert_array_equal(cohort.description.affine, template)
    save(source, "sub-02_T1w.nii.gz", brain(2))
    add_row(source, "sub-02\t30\tF\tA\tleft\t1")
    with pytest.raises(
        UserError, match=r"2 of 3 images cover the MNI152 field of view.*such as sub-02.*centre="
    ):
        ingest(source, tmp_path / "d", SETTINGS)


def test_brains_that_reach_out_of_the_grid_are_pointed_out(tmp_path):
    small = Preprocessing(spacing=8, shape=(5, 20, 20), intensity="raw")
    report = ingest(tree(tmp_path / "study"), tmp_path / "c", small)
    assert len(report.notes) == 1
    assert "4 of 4 brains reach out of the grid" in report.notes[0]
    assert (report.cohort.manifest["coverage"] < 0.95).all()


@pytest.mark.skipif(not DATA.exists(), reason="needs the real volumes of ../shared/data")
@pytest.mark.parametrize(
    ("folder", "count", "centre"),
    [pytest.param("mre_stiffness", 34, "world", marks=pytest.mark.slow), ("t1w_bids", 36, "brain")],
)
def test_real_folders(tmp_path, folder, count, centre):
    report = ingest(DATA / folder, tmp_path / "c", Preprocessing(spacing=8, intensity="raw"))
    cohort = report.cohort
    assert (len(cohort), report.rejects) == (count, ())
    assert [note for note in report.notes if "looked for site" not in note] == []
    assert cohort.description.preprocessing["centre"] == centre
    labels = pd.read_csv(DATA / folder / "participants.tsv", sep="\t").set_index("participant_id")
    assert cohort.manifest["age"].tolist() == labels.loc[cohort.manifest["subject"], "age"].tolist()
    for row in (0, count // 2, count - 1):
        stored = np.asarray(nib.load(DATA / folder / cohort.manifest["source"][row]).dataobj, dtype=float)
        volume = cohort.read([row])[0, 0].astype(float)
        assert np.count_nonzero(volume) * 512 == pytest.approx(np.count_nonzero(stored) * 8, rel=0.02)
        assert volume[volume != 0].mean() == pytest.approx(stored[stored != 0].mean(), rel=0.03)


def ingest_slowly(source: Path, out: Path, pause: float) -> None:
    """As `ingest`, in a process that is about to be killed; a pause before each shard spreads the moments."""

    def run(tasks):
        for task in tasks:
            time.sleep(pause)
            yield write_shard_of(task)

    ingest(source, out, SETTINGS, run=run)


def study_of_several_shards(folder: Path) -> Path:
    source = tree(folder, count=10)
    save(source, "sub-05_T1w.nii.gz", nan_voxels())
    cut_short(source / "sub-06" / "anat" / "sub-06_T1w.nii.gz")
    return source


def test_killed_at_any_moment_it_goes_on_and_ends_in_the_same_bytes(tmp_path):
    source = study_of_several_shards(tmp_path / "study")
    ingest(source, tmp_path / "whole" / "c", SETTINGS)
    whole = contents(tmp_path / "whole" / "c")
    assert sum(name.startswith("shards/") for name in whole) == 3
    began = time.monotonic()
    process = multiprocessing.get_context("fork").Process(
        target=ingest_slowly, args=(source, tmp_path / "timed" / "c", 0.02)
    )
    process.start()
    process.join(60)
    assert process.exitcode == 0
    duration = time.monotonic() - began
    out, generator, killed = tmp_path / "killed" / "c", np.random.default_rng(0), 0
    for _ in range(8):
        process = multiprocessing.get_context("fork").Process(target=ingest_slowly, args=(source, out, 0.02))
        process.start()
        process.join(generator.uniform(0, 0.7 * duration))
        process.kill()
        process.join(60)
        killed += process.exitcode == -9
        if not (out / "cohort.json").exists():
            with pytest.raises(UserError, match=r"not a cohort|incomplete"):
                Cohort.open(out)
    assert killed >= 2
    ingest(source, out, SETTINGS)
    assert contents(out) == whole
    assert verify(out) == []


@pytest.mark.parametrize("step", range(1, 12))
def test_killed_at_every_replaced_file_it_ends_in_the_same_bytes(tmp_path, step):
    """Files are replaced at each step of the way; the process dies right before or after the one of number `step`."""
    source = study_of_several_shards(tmp_path / "study")
    whole = ingest(source, tmp_path / "1" / "c", SETTINGS).cohort.folder

    def ingest_and_die() -> None:
        replace, steps = Path.replace, itertools.count(1)

        def counted(self: Path, target: Path) -> None:
            if (count := next(steps)) == step:
                os._exit(9)
            replace(self, target)
            if count == step - 1 and step % 2:
                os._exit(9)

        Path.replace = counted
        ingest(source, tmp_path / "2" / "c", SETTINGS)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=ingest_and_die)
    process.start()
    process.join(60)
    assert process.exitcode == 9  # the request, 3 shards with a record each, rejects, manifest, cohort.json
    done = []
    ingest(
        source, tmp_path / "2" / "c", SETTINGS, run=lambda tasks: map(write_shard_of, done_by(done, tasks))
    )
    assert contents(tmp_path / "2" / "c") == contents(whole)
    if step >= 4:
        assert len(done) < 3  # finished shards are not made again


def done_by(done: list[int], tasks):
    done.extend(task.index for task in tasks)
    return tasks


@pytest.mark.parametrize("what", ["settings", "subjects or labels", "images", "times"])
def test_an_unfinished_cohort_of_another_request_is_started_over_with_a_note(tmp_path, what):
    source = study_of_several_shards(tmp_path / "study")

    def stop_after_one(tasks):
        yield write_shard_of(tasks[0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(source, tmp_path / "c", SETTINGS, run=stop_after_one)
    assert (tmp_path / "c" / "unfinished" / "00000.json").exists()
    settings = Preprocessing(spacing=10, intensity="raw") if what == "settings" else SETTINGS
    image = source / "sub-01" / "anat" / "sub-01_T1w.nii.gz"
    if what == "subjects or labels":
        replace_row(source, "\t23\t", "\t24\t")
    elif what == "images":
        save(source, "sub-01_T1w.nii.gz", brain(33) * 3)
    elif what == "times":
        os.utime(image, (1, 1))
    report = ingest(source, tmp_path / "c", settings)
    assert any(f"unfinished cohort of other {what}" in note for note in report.notes), report.notes
    ingest(source, tmp_path / "fresh" / "c", settings)
    assert contents(tmp_path / "c") == contents(tmp_path / "fresh" / "c")


def test_an_image_changed_after_the_cohort_was_made_is_noticed(tmp_path):
    source = tree(tmp_path / "study")
    ingest(source, tmp_path / "c", SETTINGS)
    image = source / "sub-01" / "anat" / "sub-01_T1w.nii.gz"
    content = bytearray(image.read_bytes())
    content[-9] ^= 1
    image.write_bytes(content)  # the same number of bytes
    with pytest.raises(UserError, match=r"already holds a cohort that is older than .*sub-01_T1w\.nii\.gz"):
        ingest(source, tmp_path / "c", SETTINGS)


def test_two_processes_do_not_write_one_cohort(tmp_path):
    source = study_of_several_shards(tmp_path / "study")

    def run(tasks):
        with pytest.raises(UserError, match="is being written by another process"):
            ingest(source, tmp_path / "c", SETTINGS)
        return map(write_shard_of, tasks)

    assert len(ingest(source, tmp_path / "c", SETTINGS, run=run).cohort) == 8


def test_strict_keeps_what_was_finished_before_it_stopped(tmp_path):
    source = study_of_several_shards(tmp_path / "study")
    with pytest.raises(UserError, match=r"sub-05: .*NaN"):
        ingest(source, tmp_path / "c", SETTINGS, strict=True)
    done: list[int] = []
    ingest(source, tmp_path / "c", SETTINGS, run=lambda tasks: map(write_shard_of, done_by(done, tasks)))
    assert done == [1, 2]


def test_a_bug_in_a_reader_costs_one_subject_and_is_written_down(tmp_path, monkeypatch):
    source = tree(tmp_path / "study")
    prepare = ingest_shards.prepare_scan

    def surprised(scan, preprocessing):
        if scan.subject == "sub-02":
            raise RuntimeError("ITK says\nsomething long")
        return prepare(scan, preprocessing)

    monkeypatch.setattr(ingest_shards, "prepare_scan", surprised)
    report = ingest(source, tmp_path / "c", SETTINGS)
    assert len(report.cohort) == 3
    assert [reject.reason for reject in report.rejects] == [
        "cannot be prepared (RuntimeError: ITK says something long)"
    ]


def test_a_full_disk_is_one_line_and_finished_shards_stay(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs to mount a small file system")
    source, disk = study_of_several_shards(tmp_path / "study"), tmp_path / "disk"
    large = Preprocessing(spacing=4, intensity="raw")
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2M", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(UserError, match=r"needs 2\.\d MB for 10 volumes, but 2\.\d MB are free"):
            ingest(source, disk / "c", large)

        def fill_up(tasks):
            yield write_shard_of(tasks[0])
            (disk / "other").write_bytes(bytes(1_300_000))
            yield write_shard_of(tasks[1])

        small = large.model_copy(update={"shape": (40, 48, 40)})
        with pytest.raises(UserError, match=r"^cannot write to .*No space left on device; choose"):
            ingest(source, disk / "c", small, run=fill_up)
        (disk / "other").unlink()
        done: list[int] = []
        ingest(source, disk / "c", small, run=lambda tasks: map(write_shard_of, done_by(done, tasks)))
        assert done == [1, 2]
        ingest(source, tmp_path / "c", small)
        assert contents(disk / "c") == contents(tmp_path / "c")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_shards_are_as_large_as_the_cohort_allows():
    assert volumes_per_shard(1_805_258, 10_000) == 35  # 64 MB
    assert volumes_per_shard(30_000, 100_000) == 256
    assert volumes_per_shard(2 * 10**8, 100) == 1
    assert volumes_per_shard(232_760, 36) == 4  # nine shards, for two processes to share
    assert volumes_per_shard(232_760, 300) == 10


@pytest.mark.parametrize("storage", ["hdf5", "parquet"])
def test_label_maps_and_channels_of_a_listing(tmp_path, storage):
    source = tree(tmp_path / "study", count=3)
    for number in range(3):
        save(source, f"sub-{number:02d}_FLAIR.nii.gz", brain(number + 9))
        save(source, f"sub-{number:02d}_dseg.nii.gz", (brain(number) > 75).astype(np.uint8))
    listing = list_scans(source, kind="bids", channels=["T1w", "FLAIR"], maps=["dseg"])
    cohort = ingest_listing(listing, tmp_path / "c", SETTINGS, storage=storage, compression="zstd").cohort
    assert cohort.description.channels == ("T1w", "FLAIR")
    assert cohort.description.map_names == ("dseg",)
    labels, volumes = cohort.read_map("dseg", range(3)), cohort.read(range(3))
    assert labels.shape == (3, *cohort.description.shape)
    assert set(np.unique(labels)) == {0, 1}
    assert (
        volumes[:, 0][labels == 1] > volumes[:, 0][(labels == 0) & (volumes[:, 0] > 0)].mean()
    ).mean() > 0.8
    assert verify(tmp_path / "c") == []


def test_an_address_of_an_object_store_is_no_folder(tmp_path):
    with pytest.raises(UserError, match=r"s3://bucket/c is not a folder: ingest into a folder, then copy"):
        ingest(tree(tmp_path / "study"), "s3://bucket/c", SETTINGS)
