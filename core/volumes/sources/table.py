"""A plain table, CSV or TSV: one line per scan, with the paths of its images and its labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from core.errors import UserError
from core.volumes.sources.arrays import MNI_NOTE, array_file
from core.volumes.sources.files import NIFTI, checked_file, digest_of
from core.volumes.sources.labels import (
    Wanted,
    columns_of,
    known_name,
    known_text,
    labels_of,
    need_columns,
    number_columns,
    read_table,
)
from core.volumes.sources.leaks import leak_notes
from core.volumes.sources.listing import ImageFile, Listing, Reject, Scan

SUBJECT_COLUMNS = ("subject", "participant_id", "id")
PATH_COLUMNS = ("path", "image")
SESSION_COLUMN = "session"
FOLD_COLUMNS = ("fold", "split")
"""Columns in which all lines of a subject must have the same value."""
ENDINGS = (*NIFTI, ".npy")


def list_table(source: Path, wanted: Wanted) -> Listing:
    """Scans from a table with columns subject (or participant_id, id), path, age, sex, site and session.

    With `channels` there is a column of paths for each of them, in place of "path". `maps` and `mask`
    name columns of paths; by default the columns "label" and "mask" are used if they hold paths (a "label" of
    numbers is a class). A line without one of its images, or without its mask, is left out. All other columns are
    kept. Relative paths start at `root`, or at the table's folder; several lines of a subject need a session each.
    UserError where the table as a whole cannot be used.
    """
    rows = read_table(source)
    subject_column = _first_column(source, rows, SUBJECT_COLUMNS)
    paths = wanted.channels or (_first_column(source, rows, PATH_COLUMNS),)
    found = _column_of_paths(rows, "label")
    maps = wanted.maps or ((found,) if found else ())
    mask = wanted.mask or _column_of_paths(rows, "mask")
    need_columns(source, rows, [column for column in (*paths, *maps, mask) if column])
    columns = columns_of(source, rows[0], wanted, [source.with_suffix(".json")])
    own = {column for column in (subject_column, SESSION_COLUMN, *paths, *maps, mask) if column}
    numeric, folder = number_columns(rows), wanted.root or source.parent
    keys = Counter(_key(row, subject_column) for row in rows)
    scans: list[Scan] = []
    rejects: list[Reject] = []
    for row in rows:
        subject, session = _key(row, subject_column)
        try:
            _check_key(subject, session, subject_column, keys[subject, session])
            scans.append(
                Scan(
                    subject,
                    tuple(_image(folder, row, column) for column in paths),
                    session,
                    {name: _image(folder, row, name) for name in maps if known_text(row[name])},
                    _image(folder, row, mask) if mask else None,
                    *labels_of(row, columns=columns, numeric=numeric, own=own, prefix="table_"),
                )
            )
        except UserError as error:
            rejects.append(Reject(subject, row[paths[0]].strip(), str(error)))
    arrays = any(file.path.suffix == ".npy" for scan in scans for file in scan.images)
    channels = wanted.channels or ("image",)
    notes = [MNI_NOTE] if arrays else []
    notes += columns.notes
    if wanted.age_column and columns.age is None:
        notes.append(f"the table has no column '{wanted.age_column}': ages are unknown")
    for column in FOLD_COLUMNS:
        folds = [(_key(row, subject_column)[0], known_text(row.get(column, ""))) for row in rows]
        notes += leak_notes("subjects", [(name, f"{column} {fold}") for name, fold in folds if name and fold])
    return Listing(source, "table", channels, tuple(scans), tuple(rejects), digest_of([source]), tuple(notes))


def _first_column(source: Path, rows: Sequence[dict[str, str]], names: Sequence[str]) -> str:
    found = next((name for name in names if name in rows[0]), None)
    if found is None:
        there = ", ".join(map(repr, rows[0]))
        raise UserError(f"{source} needs a column '{names[0]}' (or {', '.join(names[1:])}), but has {there}")
    return found


def _column_of_paths(rows: Sequence[dict[str, str]], name: str) -> str | None:
    """`name`, if the table has such a column and any of its values is the path of an image."""
    return name if any(row.get(name, "").strip().endswith(ENDINGS) for row in rows) else None


def _key(row: dict[str, str], subject_column: str) -> tuple[str, str]:
    return known_name(row[subject_column]), known_text(row.get(SESSION_COLUMN, ""))


def _check_key(subject: str, session: str, subject_column: str, times: int) -> None:
    if not subject:
        raise UserError(f"{subject_column} is missing")
    if times > 1:
        which = f"session '{session}'" if session else subject
        raise UserError(
            f"{which} is listed {times} times; a column '{SESSION_COLUMN}' with different values is needed"
        )


def _image(folder: Path, row: dict[str, str], column: str) -> ImageFile:
    text = known_text(row[column])
    if not text:
        raise UserError(f"{column} is missing")
    path = checked_file(folder / text)  # an absolute path stays what it is
    if not path.name.endswith(ENDINGS):
        raise UserError(f"{path} is not an image; {', '.join(ENDINGS)} are read")
    return array_file(path) if path.suffix == ".npy" else ImageFile(path)
