"""Decathlon-style JSON lists: {"training": [{"image": path or paths, "label": class or path, "fold": 0}, …], …}."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from core.errors import UserError
from core.volumes.sources.arrays import MNI_NOTE, array_file
from core.volumes.sources.files import NIFTI, checked_file, digest_of, is_file, stem
from core.volumes.sources.json_list import Entry, leaks, read_json_list
from core.volumes.sources.labels import Wanted, columns_of, known_text, labels_of, number_columns
from core.volumes.sources.listing import ImageFile, Listing, Reject, Scan

FOLDERS = (".", "imagesTr", "imagesTs", "labelsTr")
"""Folders of files that a list names without a folder."""
ENDINGS = (*NIFTI, ".npy")
OWN = {"image", "session", "subject", "participant_id"}


def list_decathlon(source: Path, wanted: Wanted) -> Listing:
    """Scans of a JSON list (or of dataset.json in a folder); relative paths start at its folder.

    List and fold stay as the columns "list" and "fold". A label that is a number or a word is the column
    "label", one that is a path the scan's label map. A file, id or subject in two folds, or in training
    and test, is a leak: a note reports it, and no entry is moved. A visit that is listed twice is taken once.
    Where no entry has an age, ages are NaN, with a note. UserError where the file as a whole cannot be
    used.
    """
    source = source / "dataset.json" if source.is_dir() else source
    content = read_json_list(source)
    channels = wanted.channels or content.channels or _numbered(source, content.entries)
    names = dict.fromkeys(name for entry in content.entries for name in entry.values)
    columns = columns_of(source, names, replace(wanted, is_age_asked=False))
    numeric = number_columns(
        {key: value for key, value in entry.values.items() if not value.endswith(ENDINGS)}
        for entry in content.entries
    )
    folder, maps = wanted.root or source.parent, wanted.maps or ("label",)
    visits: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for entry in content.entries:
        visits[entry.subject].add(entry.images)
    scans: dict[tuple[str, str], Scan] = {}
    rejects: list[Reject] = []
    for entry in content.entries:
        try:
            files = _images(folder, entry, content.channels, channels)
            session = _session(entry, several=len(visits[entry.subject]) > 1)
            if (entry.subject, session) in scans:
                raise UserError(f"the scan is listed again in {entry.place}; the first is taken")
            found = {name: file for name in maps if (file := _map(folder, entry, name, bool(wanted.maps)))}
            mask = _mask(folder, entry, wanted.mask)
            own = OWN | found.keys() | ({wanted.mask or "mask"} if mask else set())
            labels = labels_of(entry.values, columns=columns, numeric=numeric, own=own, prefix="list_")
            scans[entry.subject, session] = Scan(entry.subject, files, session, found, mask, *labels)
        except UserError as error:
            first = entry.images[0] if entry.images else ""
            rejects.append(Reject(entry.subject, first, f"{entry.where}: {error}"))
    notes = list(leaks(content.entries))
    notes += [note for note in columns.notes if "is taken for" in note]
    if wanted.age_column and not columns.age:
        notes.append(f"no entry has '{wanted.age_column}': ages are unknown")
    if any(file.path.suffix == ".npy" for scan in scans.values() for file in scan.images):
        notes.append(MNI_NOTE)
    digest = digest_of([source])
    return Listing(source, "decathlon", channels, tuple(scans.values()), tuple(rejects), digest, tuple(notes))


def _numbered(source: Path, entries: Sequence[Entry]) -> tuple[str, ...]:
    """Names of the channels where the list has none: image, or image_0, image_1, …"""
    counts = {len(entry.images) for entry in entries if entry.images}
    if len(counts) > 1:
        low, high = min(counts), max(counts)
        raise UserError(
            f"{source} has entries of {low} to {high} images; name the channels meant with --channels"
        )
    return ("image",) if counts <= {1} else tuple(f"image_{number}" for number in range(max(counts)))


def _images(
    folder: Path, entry: Entry, named: tuple[str, ...] | None, channels: tuple[str, ...]
) -> tuple[ImageFile, ...]:
    """One file for each channel: by its name where the list names its channels, otherwise by its position."""
    order = named if named and set(channels) <= set(named) else channels
    if not entry.images:
        raise UserError("it names no image")
    if len(entry.images) != len(order):
        raise UserError(
            f"it names {len(entry.images)} images for {len(order)} channels ({', '.join(order)}); a file for "
            "each is needed, 4D files are not split"
        )
    if not entry.subject:
        raise UserError("the subject of this image is unknown; a key 'subject' is needed")
    return tuple(_file(folder, entry.images[order.index(channel)]) for channel in channels)


def _map(folder: Path, entry: Entry, name: str, is_asked: bool) -> ImageFile | None:
    """The map that an entry names under `name`, if it names one; a value that is no path is one of a column."""
    text = known_text(entry.values.get(name, ""))
    if is_asked and text and not text.endswith(ENDINGS):
        raise UserError(f"{name} '{text}' is not the path of an image")
    return _file(folder, text) if text.endswith(ENDINGS) else None


def _mask(folder: Path, entry: Entry, wanted: str | None) -> ImageFile | None:
    """The brain mask, which every entry needs if the user asks for it."""
    found = _map(folder, entry, wanted or "mask", wanted is not None)
    if wanted and found is None:
        raise UserError(f"{wanted} is missing")
    return found


def _file(folder: Path, text: str) -> ImageFile:
    candidates = [folder / below / text for below in FOLDERS]
    path = checked_file(next(filter(is_file, candidates), candidates[0]))
    return array_file(path) if path.suffix == ".npy" else ImageFile(path)


def _session(entry: Entry, *, several: bool) -> str:
    """As the entry says, or the name of its first file; "" for the only scan of a subject without either."""
    if text := known_text(entry.values.get("session", "")):
        return text
    name = stem(Path(entry.images[0]))
    stated = "_".join(part for part in name.split("_") if part.startswith(("ses-", "run-")))
    return stated or (name if several else "")
