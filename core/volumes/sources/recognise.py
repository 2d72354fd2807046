"""Recognising the layout of a folder or file from its content."""

from __future__ import annotations

import os
from pathlib import Path

from core.errors import UserError
from core.volumes.sources.bids_tables import PARTICIPANTS
from core.volumes.sources.files import NIFTI, folders_in
from core.volumes.sources.mre import is_mre_array
from core.volumes.sources.openbhb import is_openbhb_array

LAYOUTS = {
    "bids": "a folder with sub-*/ and participants.tsv",
    "table": "a .csv or .tsv file of paths",
    "openbhb": "a folder with *quasiraw*.npy or *vbm*.npy and participants.tsv",
    "mre": "a folder with stiffness_*.npy, age_*.npy, id_*.npy, …",
    "decathlon": "a .json list, or a folder with dataset.json",
    "cases": "a folder with one folder of images for each case",
}
"""How each layout is recognised; keys as in `core.volumes.sources.SOURCES`."""
ENDINGS = (*NIFTI, ".npy")
FILES = {".csv": "table", ".tsv": "table", ".json": "decathlon"}


def recognised(source: Path) -> str:
    """The layout of `source`; UserError, listing the layouts, if it has none that is known."""
    if not source.exists():
        raise UserError(f"{source} does not exist")
    kind = FILES.get(source.suffix.lower()) if source.is_file() else _of_folder(source)
    if kind is None:
        known = "; ".join(f"{name}: {what}" for name, what in LAYOUTS.items())
        raise UserError(f"{source} is of no layout that is known: {known}")
    return kind


def _of_folder(source: Path) -> str | None:
    folders = folders_in(source)
    subjects = [folder for folder in folders if folder.name.startswith("sub-")]
    for images in map(_images_below, subjects or [source]):
        if any(is_openbhb_array(path) for path in images if path.suffix == ".npy"):
            return "openbhb"
        if any(is_mre_array(path) for path in images):
            return "mre"
        if images and subjects:
            return "bids"
    if subjects or (source / PARTICIPANTS).is_file():
        return "bids"
    if (source / "dataset.json").is_file():
        return "decathlon"
    return "cases" if any(map(_images_below, folders)) else None


def _images_below(folder: Path) -> list[Path]:
    """Images and arrays in a folder and its subfolders; the layout reports folders that cannot be read."""
    return [
        Path(parent, name)
        for parent, _, names in os.walk(folder)
        for name in names
        if name.endswith(ENDINGS) and not name.startswith(".")
    ]
