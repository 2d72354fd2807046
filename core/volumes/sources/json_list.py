"""The content of a Decathlon-style JSON list, before its files are looked for: entries, channels, leaks."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path, PurePosixPath

from core.errors import UserError
from core.volumes.sources.files import stem
from core.volumes.sources.labels import known_name, known_text
from core.volumes.sources.leaks import leak_notes

CHANNEL_KEYS = ("channel_names", "modality")
LIST_COLUMN = "list"


@dataclass(frozen=True)
class Entry:
    """One line of a list."""

    where: str
    """Such as "training[3]"."""
    part: str
    """Name of the list that contains it."""
    images: tuple[str, ...]
    """Paths as written; empty where the entry names none."""
    values: Mapping[str, str]
    """Everything beside the images as text, "" for null, and the column "list"."""

    @property
    def place(self) -> str:
        """The list, and the fold within it: a subject must not be in two places."""
        fold = known_text(self.values.get("fold", ""))
        return f"{self.part} fold {fold}" if fold else self.part

    @property
    def subject(self) -> str:
        """The first that is known: subject or participant_id, the sub-… of a path, id, the shared name of the files."""
        for key in ("subject", "participant_id"):
            if text := known_text(self.values.get(key, "")):
                return text
        for image in self.images:
            if found := re.search(r"(?:^|[/\\])(sub-[^/\\_.]+)", image):
                return found[1]
        return known_name(self.values.get("id", "")) or _shared_name(self.images)


@dataclass(frozen=True)
class JsonList:
    """All entries of a file, and its names for the channels of an image."""

    entries: tuple[Entry, ...]
    channels: tuple[str, ...] | None


def read_json_list(path: Path) -> JsonList:
    """Entries of every list in the file ("training", "validation", "test", …), in order.

    An entry is an object with "image" (a path or several), or a path alone, as in the Decathlon's tests.
    UserError where the file is not JSON, or has no such list.
    """
    content = _parsed(path)
    lists = {"training": content} if isinstance(content, list) else content
    if not isinstance(lists, dict):
        raise UserError(f"{path} holds {type(content).__name__}; a list of images is needed")
    entries = [
        _entry(f"{part}[{number}]", part, value)
        for part, values in lists.items()
        if isinstance(values, list) and part not in CHANNEL_KEYS and _lists_images(values)
        for number, value in enumerate(values)
    ]
    if not entries:
        keys = ", ".join(map(repr, lists)) if isinstance(content, dict) else "an empty list"
        raise UserError(
            f'{path} lists no images, it has {keys}; {{"training": [{{"image": path, …}}]}} is needed'
        )
    return JsonList(tuple(entries), _channels(lists))


def leaks(entries: Sequence[Entry]) -> Iterator[str]:
    """A note for each kind of name (file, id, subject) that occurs in two folds or lists."""
    named = {
        "files": [(os.path.normpath(image), entry.place) for entry in entries for image in entry.images],
        "ids": [(text, entry.place) for entry in entries if (text := known_name(entry.values.get("id", "")))],
        "subjects": [(entry.subject, entry.place) for entry in entries if entry.subject],
    }
    for what, placed in named.items():
        yield from leak_notes(what, placed)


def _parsed(path: Path) -> object:
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except RecursionError:
        raise UserError(f"{path} is nested too deeply to be a list of images") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise UserError(f"{path} is not JSON: {error}") from error


def _lists_images(values: list[object]) -> bool:
    return any(
        (isinstance(value, dict) and "image" in value)
        or (isinstance(value, str) and value.endswith((".nii", ".nii.gz", ".npy")))
        for value in values
    )


def _entry(where: str, part: str, value: object) -> Entry:
    values = value if isinstance(value, dict) else {"image": value}
    image = values.get("image")
    images = image if isinstance(image, list) else [image]
    texts = {str(key): _as_text(item) for key, item in values.items() if key != "image"}
    return Entry(
        where,
        part,
        tuple(item for item in images if isinstance(item, str) and item),
        {**texts, LIST_COLUMN: part},
    )


def _as_text(value: object) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def _channels(lists: Mapping[str, object]) -> tuple[str, ...] | None:
    """{"0": "T1", "1": "FLAIR"} in the order of its numbers, or a list of names."""
    named = next((lists[key] for key in CHANNEL_KEYS if lists.get(key)), None)
    if isinstance(named, dict) and all(str(key).isdecimal() for key in named):
        return tuple(str(named[key]) for key in sorted(named, key=int))
    return tuple(map(str, named)) if isinstance(named, list) else None


def _shared_name(images: Sequence[str]) -> str:
    """The first words that all file names share; for a single image the whole name."""
    names = [stem(Path(PurePosixPath(image).name)) for image in images]
    if len(names) == 1:
        return re.sub(r"_000\d$", "", names[0])  # nnU-Net writes the channel at the end
    words = zip(*(re.split(r"([-_.])", name) for name in names), strict=False)
    shared = "".join(alike[0] for alike in takewhile(lambda alike: len(set(alike)) == 1, words))
    folder = PurePosixPath(images[0]).parent.name if images else ""
    return shared.rstrip("-_.") or folder
