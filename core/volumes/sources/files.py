"""Finding files below a source, and naming them in messages."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from core.errors import UserError

NIFTI = (".nii.gz", ".nii")


def files_below(folder: Path, endings: Sequence[str] = NIFTI) -> list[Path]:
    """All files in `folder` and its subfolders with one of these endings, sorted; hidden ones are left out.

    Linked subfolders are not entered, because they may loop; linked files count. UserError where a folder
    cannot be read.
    """

    def stop(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error

    return sorted(
        Path(parent, name)
        for parent, _, names in os.walk(folder, onerror=stop)
        for name in names
        if name.endswith(tuple(endings)) and not name.startswith(".")
    )


def folders_in(folder: Path) -> list[Path]:
    """The folders directly in `folder`, sorted, hidden ones left out; UserError if it cannot be read."""
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from error


def is_file(path: Path) -> bool:
    """Whether there is a file that can be accessed; never raises OSError, unlike `Path.is_file`."""
    try:
        return path.is_file()
    except OSError:
        return False


def checked_file(path: Path) -> Path:
    """`path`, if it is a file; UserError says what it is instead."""
    try:
        if path.is_file():
            return path
        if path.is_symlink():
            target = os.readlink(path)
            raise UserError(f"{path} is a link to {target}, which is not there; fetch it (git-annex?)")
        if path.exists():
            raise UserError(f"{path} is not a file")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    raise UserError(f"{path} does not exist")


def checked_folder(source: Path, kind: str) -> Path:
    """`source`, if it is a folder; UserError otherwise."""
    if not source.is_dir():
        state = "is a file" if source.exists() else "does not exist"
        raise UserError(f"{source} {state}; the layout '{kind}' is a folder")
    return source


def stem(path: Path) -> str:
    """The file's name without .nii, .nii.gz or .npy."""
    return path.name.removesuffix(".gz").removesuffix(".nii").removesuffix(".npy")


def name_in(source: Path, path: Path) -> str:
    """`path` for messages: relative to the source's folder, or as it is if it lies outside."""
    folder = source.parent if source.is_file() else source
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def digest_of(tables: Iterable[Path]) -> str:
    """sha256 over the content of the tables and lists, in this order."""
    digest = hashlib.sha256()
    for path in tables:
        try:
            digest.update(path.read_bytes())
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()
