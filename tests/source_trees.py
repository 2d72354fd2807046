"""Small folders of scans in the layouts that `core.volumes.sources` reads."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np

DATA = Path(__file__).parents[1].parent / "shared" / "data"


def image(path: Path, number: int = 1, shape: tuple[int, ...] = (4, 5, 6)) -> Path:
    """A NIfTI file of random whole numbers, other ones for each `number`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.random.default_rng(number).integers(1, 100, shape).astype(np.int16)
    nib.save(nib.Nifti1Image(voxels, np.diag([2, 2, 2, 1])), path)
    return path


def text(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def bids(folder: Path, *names: str, table: tuple[str, ...] | None = None) -> Path:
    """Images such as "sub-01_ses-1_T1w" in the folders that BIDS has for them, and participants.tsv."""
    for number, name in enumerate(names):
        subject, *parts = name.split("_")
        session = next((part for part in parts if part.startswith("ses-")), "")
        image(folder / subject / session / "anat" / f"{name}.nii.gz", number)
    if table is not None:
        text(folder / "participants.tsv", *table)
    return folder
