"""Echoes of one acquisition, in one 4-D file, as channels."""

import nibabel as nib
import numpy as np
import pytest

from core.errors import UserError
from core.volumes.cohort.reader import Cohort
from core.volumes.sources import list_scans, read_image

AFFINE = np.diag([-2.0, 2.0, 2.0, 1.0])  # stored from right to left


@pytest.fixture
def tree(tmp_path):
    """Three people with three echoes and a T1w, one with two echoes."""
    generator = np.random.default_rng(0)
    rows = ["participant_id\tage"]
    for number, echoes in enumerate((3, 3, 3, 2), 1):
        name, folder = f"sub-{number:02d}", tmp_path / f"sub-{number:02d}" / "anat"
        folder.mkdir(parents=True)
        for suffix, shape in (("MEGRE", (9, 8, 7, echoes)), ("T1w", (9, 8, 7))):
            image = nib.Nifti1Image(generator.normal(100, 9, shape).astype(np.float32), AFFINE)
            image.to_filename(folder / f"{name}_{suffix}.nii.gz")
        rows.append(f"{name}\t{20 + number}")
    (tmp_path / "participants.tsv").write_text("\n".join(rows) + "\n")
    (tmp_path / "dataset_description.json").write_text('{"Name": "echoes", "BIDSVersion": "1.8.0"}')
    return tmp_path


def test_every_volume_is_a_channel_and_who_has_another_number_is_left_out(tree):
    listing = list_scans(tree, channels=["T1w", "MEGRE"], split="echo")
    assert listing.channels == ("T1w", "echo-1", "echo-2", "echo-3")
    assert [scan.subject for scan in listing.scans] == ["sub-01", "sub-02", "sub-03"]
    (left,) = listing.rejects
    assert left.subject == "sub-04"
    assert left.reason.endswith("sub-04_MEGRE.nii.gz has 2 volumes, and most 4-D images have 3")
    for scan in listing.scans:
        whole = nib.as_closest_canonical(nib.load(scan.images[1].path)).get_fdata()
        for echo, image in enumerate(scan.images[1:]):
            voxels, affine = read_image(image)
            np.testing.assert_allclose(voxels, whole[..., echo], rtol=1e-6)
            assert affine[0, 0] > 0
        assert voxels.shape == (9, 8, 7)


def test_what_cannot_be_split_is_one_line(tree):
    with pytest.raises(UserError, match="every image is 3-D"):
        list_scans(tree, channels=["T1w"], split="echo")
    listing = list_scans(tree, channels=["MEGRE"])
    with pytest.raises(UserError, match=r"4D with shape \(9, 8, 7, 3\).*--split-4d NAME"):
        read_image(listing.scans[0].images[0])


def test_echoes_are_ingested_as_contrasts(tree, tmp_path, brainsweep):
    out = tmp_path / "cohort"
    code, told, _ = brainsweep(
        "ingest", tree, out, "--channels", "MEGRE", "--split-4d", "echo", "--spacing", "2", "--shape", "9,8,7"
    )
    assert code == 0
    assert "3 scans in" in told
    cohort = Cohort.open(out)
    assert cohort.description.channels == ("echo-1", "echo-2", "echo-3")
    assert len(set(cohort.manifest["source_hash"])) == 3
    volumes = cohort.read([0])[0]
    assert not np.allclose(volumes[0], volumes[1])
    _, again, _ = brainsweep(
        "ingest", tree, out, "--channels", "MEGRE", "--split-4d", "echo", "--spacing", "2", "--shape", "9,8,7"
    )
    assert "already holds this cohort" in again
