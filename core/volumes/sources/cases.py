"""One folder for each case, with one image for each contrast, as in BraTS: CASE/CASE-t1n.nii.gz."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from core.errors import UserError
from core.volumes.sources.choose import chosen_channels, listed
from core.volumes.sources.files import (
    checked_file,
    checked_folder,
    digest_of,
    files_below,
    folders_in,
    name_in,
    stem,
)
from core.volumes.sources.labels import Wanted
from core.volumes.sources.listing import ImageFile, Listing, Reject, Scan

MAPS = {"seg", "dseg", "mask", "label"}
"""Contrasts that are maps: never taken for an image unless asked for."""
TIMEPOINT = re.compile(r"(BraTS-[A-Za-z]+-\d{5})-(\d{3})")
"""BraTS since 2023 names a case PATIENT-TIMEPOINT."""


def list_cases(source: Path, wanted: Wanted) -> Listing:
    """Scans from a folder of case folders; a contrast is the last word of a file's name.

    `channels` names the contrasts that a scan needs, and `mask` its mask; a case that lacks one is left out. It may
    lack any of the `maps`. A case that has one of them twice is left out. The case's folder is the subject; in names
    like BraTS-GLI-00001-002 the last number is the session, so that no patient is ever split. There are no tables:
    ages are NaN, with a note. UserError where the folder as a whole cannot be used.
    """
    folders = folders_in(checked_folder(source, "cases"))
    cases: dict[str, dict[str, list[Path]]] = {}
    rejects: list[Reject] = []
    for folder in folders:
        try:
            cases[folder.name] = _by_contrast(folder)
        except UserError as error:
            rejects.append(Reject(folder.name, folder.name, str(error)))
    kinds = Counter(kind for contrasts in cases.values() for kind in contrasts)
    if not kinds:
        raise UserError(f"{source} has no folders with images: CASE/CASE_CONTRAST.nii.gz is needed")
    own = {kind: count for kind, count in kinds.items() if kind not in MAPS}
    channels = wanted.channels or chosen_channels(source, own or kinds, leave=wanted.kinds_of_maps)
    needed = [kind for kind in (*channels, wanted.mask) if kind]
    for kind in (*needed, *wanted.maps):
        if kind not in kinds:
            raise UserError(f"{source} has no contrast '{kind}'; it has {listed(kinds)}")
    scans: list[Scan] = []
    for case, contrasts in cases.items():
        subject, session = found.groups() if (found := TIMEPOINT.fullmatch(case)) else (case, "")
        try:
            there = [kind for kind in wanted.maps if kind in contrasts]
            files = {kind: _only_file(source, case, kind, contrasts) for kind in (*needed, *there)}
            shown = tuple(files[kind] for kind in channels)
            maps = {kind: files[kind] for kind in there}
            scans.append(Scan(subject, shown, session, maps, files.get(wanted.mask or "")))
        except UserError as error:
            rejects.append(Reject(subject, case, str(error)))
    notes = [f"{source} has no table: ages, sexes and sites are unknown"]
    if unused := {
        kind: count for kind, count in kinds.items() if kind in MAPS and kind not in (*needed, *wanted.maps)
    }:
        notes.append(f"maps that are there but were not asked for: {listed(unused)}")
    return Listing(source, "cases", channels, tuple(scans), tuple(rejects), digest_of([]), tuple(notes))


def _by_contrast(folder: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in files_below(folder):
        found.setdefault(re.split(r"[-_]", stem(path))[-1], []).append(path)
    return found


def _only_file(source: Path, case: str, kind: str, contrasts: dict[str, list[Path]]) -> ImageFile:
    paths = contrasts.get(kind, [])
    if not paths:
        raise UserError(f"{case} has no {kind}; it has {', '.join(sorted(contrasts)) or 'no images'}")
    if len(paths) > 1:
        names = ", ".join(name_in(source, path) for path in paths[:3])
        raise UserError(f"{case} has {len(paths)} images of {kind} ({names}); one is needed")
    return ImageFile(checked_file(paths[0]))
