"""OpenBHB: quasi-raw or VBM volumes as NumPy arrays, and tables of participants, joined on the subject's id.

Dufumier et al. 2022, "OpenBHB: a large-scale multi-site brain MRI data-set for age prediction and debiasing",
NeuroImage 263. Two forms are in use: one array for many subjects with participants_id.npy beside it, and one
array for each subject, called sub-ID_preproc-quasiraw_T1w.npy.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import UserError
from core.volumes.sources.arrays import MNI_NOTE, AffineRows, mni_affine, read_header, read_values, volumes_in
from core.volumes.sources.choose import chosen_channels
from core.volumes.sources.files import checked_folder, digest_of, files_below, name_in
from core.volumes.sources.labels import (
    Labels,
    Wanted,
    known_text,
    labels_of,
    need_columns,
    number_columns,
    plain_id,
    read_table,
)
from core.volumes.sources.listing import ImageFile, Listing, Reject, Scan

KINDS = {"quasiraw": "quasiraw", "quasi_raw": "quasiraw", "quasi-raw": "quasiraw", "vbm": "vbm"}
"""What file names say, and the channel that it is."""
IDS = "participants_id"
OWN = ("participant_id",)
SPLIT = "split"


@dataclass(frozen=True)
class Volume:
    """One volume of an array, before its labels are known."""

    subject: str
    """As `plain_id` gives it; "" where it cannot be trusted."""
    file: ImageFile
    part: str
    """Folder of the official split that it lies in: "train", "val" or ""."""
    fault: str = ""
    """Why its id cannot be trusted."""


def list_openbhb(source: Path, wanted: Wanted) -> Listing:
    """Volumes of an OpenBHB folder with the labels of their subjects, matched by id, never by position.

    All arrays and tables below `source` are taken, so train and val may be there both, or one of them. The
    official split stays as the column "split": of the table, or else the folder (train, val). A subject
    with two volumes, or with tables that contradict each other, is left out. Raises UserError where the
    folder as a whole cannot be used: arrays without ids or on no MNI152 grid, ids of another length.
    """
    if wanted.label or wanted.mask:
        raise UserError(f"{source}: OpenBHB has no maps; leave --label and --mask out")
    arrays = _arrays(checked_folder(source, "openbhb"))
    channels = wanted.channels or chosen_channels(source, Counter(arrays.values()))
    if len(channels) > 1 or channels[0] not in arrays.values():
        raise UserError(f"{source} has the channels {', '.join(sorted(set(arrays.values())))}; choose one of them")
    paths = [path for path, kind in arrays.items() if kind == channels[0]]
    volumes, id_files = _volumes(source, paths)
    tables = [path for path in files_below(source, (".tsv", ".csv")) if "participants" in path.name]
    people = _read_people(source, tables, wanted.age_column)
