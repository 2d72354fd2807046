"""OpenBHB: quasi-raw or VBM volumes as NumPy arrays, and tables of participants, joined on the subject's id.

Dufumier et al. 2022, "OpenBHB: a large-scale multi-site brain MRI data-set for age prediction and debiasing",
NeuroImage 263. Two forms are in use: one array for many subjects with participants_id.npy beside it, and one
array for each subject, called sub-ID_preproc-quasiraw_T1w.npy.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.errors import UserError
from core.volumes.sources.arrays import (
    MNI_NOTE,
    array_file,
    mni_affine,
    read_header,
    read_values,
    volumes_in,
)
from core.volumes.sources.choose import chosen_channels, listed
from core.volumes.sources.files import checked_folder, digest_of, files_below, name_in
from core.volumes.sources.labels import (
    Columns,
    Wanted,
    columns_of,
    known_name,
    known_text,
    labels_of,
    need_columns,
    number_columns,
    plain_id,
    read_table,
)
from core.volumes.sources.listing import ImageFile, Listing, Reject, Scan

KINDS = {"quasiraw": "quasiraw", "quasi_raw": "quasiraw", "quasi-raw": "quasiraw", "vbm": "vbm"}
"""Words of file names, and the channel that each stands for."""
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
    """Why its id cannot be trusted, or its array not be read."""


@dataclass(frozen=True)
class Person:
    """The labels of one subject in the tables."""

    written: str
    """The id as the table writes it, without sub-."""
    row: dict[str, str]
    fault: str = ""
    """Why the tables cannot be trusted about this subject."""


def list_openbhb(source: Path, wanted: Wanted) -> Listing:
    """Volumes of an OpenBHB folder with the labels of their subjects, matched by id, never by position.

    All arrays and participants tables below `source` are taken: of train, of val, or of both. The official
    split stays as the column "split": that of the table or, without one, the folder (train, val). A subject
    with two volumes, or whose tables contradict each other, is left out. Raises UserError where the folder as
    a whole cannot be used: arrays without ids or with another number of them, volumes on no MNI152 grid, no
    table.
    """
    if wanted.maps or wanted.mask:
        raise UserError(f"{source}: OpenBHB has no maps or masks; leave --maps and --mask out")
    kinds = _arrays(checked_folder(source, "openbhb"))
    channels = wanted.channels or chosen_channels(source, Counter(kinds.values()))
    if len(channels) > 1 or channels[0] not in kinds.values():
        there = listed(Counter(kinds.values()))
        raise UserError(f"{source} has no channels {', '.join(channels)} side by side; choose one of {there}")
    paths = [path for path, kind in kinds.items() if kind == channels[0]]
    volumes, id_files = _volumes(source, paths)
    tables = [path for path in files_below(source, (".tsv", ".csv")) if "participants" in path.name]
    people, columns = _read_people(source, tables, wanted)
    numeric = number_columns(person.row for person in people.values())
    times = Counter(volume.subject for volume in volumes)
    scans: list[Scan] = []
    rejects: list[Reject] = []
    for volume in volumes:
        person = people.get(volume.subject)
        name = volume.subject and f"sub-{person.written if person else volume.subject}"
        try:
            if volume.fault:
                raise UserError(volume.fault)
            if times[volume.subject] > 1:
                raise UserError(f"{name} has {times[volume.subject]} volumes; one is needed")
            if person is None:
                raise UserError(f"{name} has a volume, but no row in {_names(source, tables)}")
            if person.fault:
                raise UserError(person.fault)
            row = {**person.row, SPLIT: known_text(person.row.get(SPLIT, "")) or volume.part}
            labels = labels_of(
                row, columns=columns, numeric=numeric - {SPLIT}, own=OWN, prefix="participants_"
            )
            scans.append(Scan(name, (volume.file,), "", {}, None, *labels))
        except UserError as error:
            rejects.append(Reject(name, name_in(source, volume.file.path), str(error)))
    notes = [MNI_NOTE, *columns.notes]
    if absent := sorted(people.keys() - times.keys()):
        notes.append(
            f"{len(absent)} of {len(people)} participants have no volume here, such as sub-{absent[0]}"
        )
    digest = digest_of([*tables, *id_files])
    return Listing(source, "openbhb", channels, tuple(scans), tuple(rejects), digest, tuple(notes))


def is_openbhb_array(path: Path) -> bool:
    """Whether the name is one of OpenBHB's arrays of volumes; its region tables (ROI) are not."""
    return _kind(path) is not None


def _kind(path: Path) -> str | None:
    name = path.name.lower()
    if IDS in name or "roi" in name:
        return None
    return next((kind for text, kind in KINDS.items() if text in name), None)


def _arrays(source: Path) -> dict[Path, str]:
    kinds = {path: kind for path in files_below(source, (".npy",)) if (kind := _kind(path))}
    if not kinds:
        raise UserError(f"{source} has no arrays of OpenBHB, such as *quasiraw*.npy or *vbm*.npy")
    return kinds


def _volumes(source: Path, paths: Sequence[Path]) -> tuple[list[Volume], list[Path]]:
    """All volumes in order of their files, and the files of ids that named them."""
    volumes: list[Volume] = []
    id_files: dict[Path, Path] = {}
    for path in paths:
        words = {
            word.lower() for folder in path.relative_to(source.parent).parts for word in folder.split("_")
        }
        part = next((name for name in ("train", "val") if name in words), "")
        if alone := re.match(r"sub-([^_]+)_", path.name):
            volumes.append(_volume_of_one(alone[1], path, part))
            continue
        count, shape = volumes_in(path)
        affine = mni_affine(path, shape)
        id_file = _ids_of(source, path)
        if id_file in id_files:
            raise UserError(
                f"{id_files[id_file]} and {path} are both of the subjects in {id_file.name}; keep one"
            )
        id_files[id_file] = path
        ids = _read_ids(id_file)
        if len(ids) != count:
            raise UserError(f"{path} holds {count} volumes, but {id_file} names {len(ids)} subjects")
        volumes += [_named(subject, ImageFile(path, row, affine), part) for row, subject in enumerate(ids)]
    return volumes, list(id_files)


def _named(written: object, file: ImageFile, part: str) -> Volume:
    """A row of an array, with the fault of its id if there is one."""
    try:
        return Volume(plain_id(written), file, part)
    except UserError as error:
        return Volume("", file, part, f"row {file.row}: {error}")


def _volume_of_one(written: str, path: Path, part: str) -> Volume:
    """The array of one subject; if it is damaged, only this subject is left out."""
    try:
        return Volume(plain_id(written), array_file(path), part)
    except UserError as error:
        return Volume(written, ImageFile(path), part, str(error))


def _ids_of(source: Path, path: Path) -> Path:
    """The file of ids that belongs to an array: in its folder, or the nearest one above within `source`."""
    for folder in path.parents:
        found = sorted(folder.glob(f"*{IDS}*.npy"))
        # where train and val share a folder, train_participants_id.npy goes with train_quasiraw.npy
        own = [ids for ids in found if path.name.startswith(ids.name.split(IDS)[0])]
        if len(own) == 1 or len(found) == 1:
            return (own or found)[0]
        if found:
            names = ", ".join(ids.name for ids in found)
            raise UserError(f"{path} has several files of ids beside it: {names}; one is needed")
        if folder == source:
            break
    raise UserError(f"{path} has no {IDS}.npy beside it, so the subjects of its volumes are unknown")


def _read_ids(path: Path) -> list[object]:
    ids, dtype = read_values(path), read_header(path, kinds="iufUSb").dtype
    if dtype.kind == "f" and dtype.itemsize < 8 and np.nanmax(np.abs(np.array(ids, dtype=float))) >= 2**24:
        raise UserError(f"{path} holds ids as {dtype}, which cannot tell such large numbers apart; use int64")
    return ids


def _read_people(source: Path, tables: Sequence[Path], wanted: Wanted) -> tuple[dict[str, Person], Columns]:
    """The labels of each subject in the tables, by `plain_id`, and the columns that hold them."""
    if not tables:
        raise UserError(f"{source} has no participants.tsv, so ages and sites are unknown")
    people: dict[str, Person] = {}
    columns: dict[str, str] = {}
    for path in tables:
        rows = read_table(path)
        need_columns(path, rows, ["participant_id"])
        columns |= dict.fromkeys(rows[0], "")
        seen: Counter[str] = Counter()
        for row in rows:
            if not (written := known_name(row["participant_id"]).removeprefix("sub-")):
                continue
            try:
                key = plain_id(written)
            except UserError:
                continue  # its volume is rejected for having no row
            seen[key] += 1
            people[key] = _merged(people.get(key), Person(written, row), path.name, seen[key])
    sidecars = [path.with_suffix(".json") for path in tables]
    return people, columns_of(tables[0], columns, wanted, sidecars)


def _merged(known: Person | None, new: Person, table: str, times: int) -> Person:
    """One subject's rows of several tables as one, with a fault if there are two in a table or they differ."""
    if known is None:
        return new
    fault = known.fault
    if times > 1:
        fault = f"sub-{known.written} is listed {times} times in {table}; one row is needed"
    for name, value in new.row.items():
        old = known_text(known.row.get(name, ""))
        if old and known_text(value) and name != "participant_id" and old != known_text(value):
            fault = fault or f"its {name} is {old} in one table and {value.strip()} in {table}"
    row = {**known.row, **{name: value for name, value in new.row.items() if known_text(value)}}
    return Person(known.written, row, fault)


def _names(source: Path, paths: Sequence[Path]) -> str:
    return ", ".join(name_in(source, path) for path in paths[:3])
