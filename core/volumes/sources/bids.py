"""BIDS-like folders: images under sub-*/ (and ses-*/), labels in participants.tsv and sessions.tsv."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from core.errors import UserError
from core.volumes.sources.bids_tables import PARTICIPANTS, People, read_people
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

MAPS = {"dseg", "probseg", "mask"}
"""Suffixes of maps that belong to an image: never taken for the image itself unless asked for."""


@dataclass(frozen=True)
class BidsImage:
    """One NIfTI file and the parts of its name."""

    path: Path
    parts: frozenset[str]
    """The pieces between underscores: entities such as ses-1 and acq-fast, and the suffix."""
    suffix: str
    """T1w for sub-01_ses-1_T1w.nii.gz; "image" for sub-01.nii.gz, which has none."""
    session: str
    """"ses-1" or ""."""
    run: str
    """"run-2" or ""."""


Visit = dict[str, list[BidsImage]]
"""The images of one subject and session by kind: every kind that is needed, in the order asked."""


def list_bids(source: Path, wanted: Wanted) -> Listing:
    """Match the images of a BIDS-like folder with its tables.

    A kind of image (channel, map, mask) is a suffix, or a suffix after entities that a name must have
    too: "T1w", "space-MNI152NLin6Asym_T1w". It is looked for under sub-*/ and, only if no subject has it
    there, under derivatives/*/sub-*/.

    Every session and run of a subject is a scan, called "ses-1", "run-2" or "ses-1_run-2". Two images of
    a kind that session and run do not distinguish, or of which only one has a run, are not chosen between:
    that visit is left out. Without participants.tsv and sessions.tsv ages are NaN, with a note.
    UserError where the folder as a whole cannot be used.
    """
    folders = _subject_folders(checked_folder(source, "bids"))
    people = read_people(source, folders, wanted)
    images, rejects = _read_names(folders)
    kinds = _kinds(images)
    if not kinds and not rejects:
        raise UserError(f"{source} has no images: NIfTI files (.nii or .nii.gz) are needed under sub-*/")
    own = {kind: count for kind, count in kinds.items() if kind not in MAPS}
    channels = wanted.channels or chosen_channels(source, own or kinds, leave=wanted.kinds_of_maps)
    needed = [kind for kind in (*channels, wanted.mask) if kind]
    found = {kind: _of_kind(source, images, kind) for kind in (*needed, *wanted.maps)}
    scans: list[Scan] = []
    for subject in sorted({*people.subjects, *images} - {reject.subject for reject in rejects}):
        for session, name, visit in _visits({kind: found[kind].get(subject, []) for kind in found}):
            try:
                # A scan may lack a map.
                there = {kind: group for kind, group in visit.items() if group or kind in needed}
                files = _only_files(source, subject, name, there)
                shown = tuple(files[kind] for kind in channels)
                maps = {kind: files[kind] for kind in wanted.maps if kind in files}
                mask = files.get(wanted.mask or "")
                scans.append(Scan(subject, shown, name, maps, mask, *people.labels(subject, session)))
            except UserError as error:
                blamed = next((image.path for group in visit.values() for image in group), None)
                rejects.append(Reject(subject, name_in(source, blamed) if blamed else "", str(error)))
    rejects.sort(key=lambda reject: (reject.subject, reject.file))
    notes = tuple(_notes(people, scans, kinds, [*needed, *wanted.maps], wanted))
    return Listing(source, "bids", channels, tuple(scans), tuple(rejects), digest_of(people.files), notes)


def _subject_folders(source: Path) -> list[Path]:
    return [folder for folder in folders_in(source) if folder.name.startswith("sub-")]


def _read_names(folders: Sequence[Path]) -> tuple[dict[str, list[BidsImage]], list[Reject]]:
    """All images by subject, and the subjects whose folder cannot be read."""
    images, rejects = {}, []
    for folder in folders:
        try:
            images[folder.name] = [_read_name(path, folder) for path in files_below(folder)]
        except UserError as error:
            rejects.append(Reject(folder.name, folder.name, str(error)))
    return images, rejects


def _read_name(path: Path, folder: Path) -> BidsImage:
    parts = stem(path).split("_")
    above = path.relative_to(folder).parts
    nameless = len(parts) == 1 and parts[0].startswith("sub-")
    entities = {part.split("-")[0]: part for part in parts if "-" in part}
    return BidsImage(
        path,
        frozenset(parts),
        "image" if nameless else parts[-1],
        entities.get("ses") or next((part for part in above[:-1] if part.startswith("ses-")), ""),
        entities.get("run", ""),
    )


def _of_kind(source: Path, images: Mapping[str, list[BidsImage]], kind: str) -> dict[str, list[BidsImage]]:
    """By subject the images of a kind, from sub-*/ or, if there are none, from the one derivative that has any."""
    if own := _matching(images, kind):
        return own
    pipelines = folders_in(source / "derivatives") if (source / "derivatives").is_dir() else []
    having = {
        pipeline.name: group
        for pipeline in pipelines
        if (group := _matching(_read_names(_subject_folders(pipeline))[0], kind))
    }
    if len(having) == 1:
        return next(iter(having.values()))
    if having:
        raise UserError(
            f"{source} has '{kind}' in several derivatives: {', '.join(having)}; "
            f"name one more closely, or give {source}/derivatives/{next(iter(having))} as the source"
        )
    raise UserError(f"{source} has no image with suffix '{kind}'; it has {listed(_kinds(images))}")


def _matching(images: Mapping[str, list[BidsImage]], kind: str) -> dict[str, list[BidsImage]]:
    *entities, suffix = kind.split("_")
    chosen = {
        subject: [image for image in group if image.suffix == suffix and image.parts.issuperset(entities)]
        for subject, group in images.items()
    }
    return {subject: group for subject, group in chosen.items() if group}


def _kinds(images: Mapping[str, list[BidsImage]]) -> Counter[str]:
    return Counter(image.suffix for group in images.values() for image in group)


def _visits(mine: Visit) -> Iterator[tuple[str, str, Visit]]:
    """Session, name and images of each visit and run; a subject without images has one, without images."""
    for session in sorted({image.session for group in mine.values() for image in group}) or [""]:
        here = {kind: [image for image in group if image.session == session] for kind, group in mine.items()}
        runs = sorted({image.run for group in here.values() for image in group})
        if "" in runs or len(runs) < 2:  # one run, which some names may leave out
            yield session, _scan_name(session, *runs[-1:]), here
            continue
        for run in runs:
            of_run = {kind: [image for image in group if image.run == run] for kind, group in here.items()}
            yield session, _scan_name(session, run), of_run


def _scan_name(*parts: str) -> str:
    return "_".join(part for part in parts if part)


def _only_files(source: Path, subject: str, name: str, visit: Visit) -> dict[str, ImageFile]:
    """The one image of each kind; UserError if there is none, or several, or one of another subject."""
    files = {}
    for kind, group in visit.items():
        if not group:
            scan = f" for {name}" if name else ""
            raise UserError(f"{subject} has no image {subject}/**/*_{kind}.nii[.gz]{scan}")
        if len(group) > 1:
            names = ", ".join(name_in(source, image.path) for image in group[:3])
            raise UserError(
                f"{subject} has {len(group)} images with suffix {kind} ({names}); one is needed for each "
                f"session and run{_how_to_choose(kind, group)}"
            )
        path = group[0].path
        named = stem(path).split("_")[0]
        if named.startswith("sub-") and named != subject:
            raise UserError(f"{name_in(source, path)} is of another subject by its name; {subject} is needed")
        files[kind] = ImageFile(checked_file(path))
    return files


def _how_to_choose(kind: str, group: list[BidsImage]) -> str:
    """Advice, if an entity such as acq-fast distinguishes one of the images from the others."""
    for image in group:
        others = frozenset().union(*(other.parts for other in group if other is not image))
        if telling := sorted(part for part in image.parts - others if "-" in part and part != image.run):
            return f"; ask for {telling[0]}_{kind}, say, in place of {kind}"
    return ""


def _notes(
    people: People, scans: list[Scan], kinds: Counter[str], needed: list[str], wanted: Wanted
) -> Iterator[str]:
    if not people.files:
        yield f"there is no {PARTICIPANTS}: ages, sexes and sites are unknown"
    elif wanted.age_column and people.columns.age is None:
        yield f"{people.files[0].name} has no column '{wanted.age_column}': ages are unknown"
    yield from people.columns.notes
    if unused := {kind: count for kind, count in kinds.items() if kind in MAPS and kind not in needed}:
        yield f"maps that are there but were not asked for: {listed(unused)}"
    sessions: dict[str, set[str]] = defaultdict(set)
    for scan in scans:
        if scan.subject not in people.visits:
            sessions[scan.subject].add(scan.session.split("_run-")[0])
    same_age = [subject for subject, visits in sessions.items() if len(visits) > 1]
    if same_age and people.columns.age:
        yield (
            f"{len(same_age)} subjects have one age for several sessions, such as {same_age[0]}; "
            "sessions.tsv can hold the age at each visit"
        )
