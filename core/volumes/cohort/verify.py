"""Whether every byte of a cohort is what was written, and if not, whose volume it is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from core.errors import UserError
from core.files.places import list_files
from core.volumes.cohort.description import DESCRIPTION, MANIFEST, read_description, read_file
from core.volumes.cohort.reader import Cohort


class Damage(NamedTuple):
    """One finding."""

    file: str
    """Below the cohort's location."""
    row: int | None
    """Of the manifest; None where no single volume is damaged."""
    subject: str
    reason: str


OnProgress = Callable[[int, int], None]
"""Called as on_progress(files done, files in all)."""


def verify(location: str | Path, on_progress: OnProgress | None = None) -> list[Damage]:
    """Everything in the cohort at `location` that is not as it was written; [] where all of it is.

    Every file is compared with its sha256 in cohort.json, and cohort.json with its own, so a changed byte
    is found in any file. In a damaged shard every volume and map is then read, to name the
    subjects that are lost; if all of them are whole, the structure of the shard is damaged. Files that the
    cohort does not know, such as a quality page, are not looked at. Raises UserError where there is no
    cohort, or one of another version.
    """
    location = str(location)
    try:
        description = read_description(location)
    except UserError as error:
        if any(name == DESCRIPTION for name, _ in list_files(location)) and "has format" not in str(error):
            return [Damage(DESCRIPTION, None, "", str(error))]
        raise
    text = read_file(location, DESCRIPTION)
    digest = description.digest.encode()
    damage = []
    if len(digest) != 64 or _sha256(text.replace(digest, b"")) != description.digest:
        damage.append(Damage(DESCRIPTION, None, "", "it does not match its own sha256"))
    for done, (name, expected) in enumerate(description.digests.items(), start=1):
        damage += _check_file(location, name, expected)
        if on_progress is not None:
            on_progress(done, len(description.digests))
    return damage


def _check_file(location: str, name: str, expected: str) -> list[Damage]:
    try:
        if _sha256(read_file(location, name)) == expected:
            return []
        reason = "it does not match its sha256"
    except OSError as error:
        reason = (
            "the file is missing" if isinstance(error, FileNotFoundError) else str(error.strerror or error)
        )
    return _damaged_rows(location, name, reason) or [Damage(name, None, "", reason)]


def _damaged_rows(location: str, name: str, reason: str) -> list[Damage]:
    """One finding for each volume that is lost with a shard; none for other files."""
    if name == MANIFEST:
        return []
    try:
        cohort = Cohort.open(location)
    # a damaged manifest has its own entry in the list
    except UserError:
        return []
    damage = []
    for row in cohort.rows_of(name):
        try:
            cohort.read_stored([row])
            for map_name in cohort.description.map_names:
                if cohort.has_map(map_name)[row]:
                    cohort.read_map(map_name, [row])
        except UserError as error:
            subject = str(cohort.manifest["subject"].iloc[row])
            damage.append(Damage(name, int(row), subject, f"{reason}: {error}"))
    return damage


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
