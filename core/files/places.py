"""Where a cohort lies: a folder on this machine, or a prefix in an object store such as s3://bucket/cohort."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self
from urllib.parse import unquote

from pyarrow import fs

from core.errors import UserError


class OpenFile(Protocol):
    """A file that is open for reading at any place, of this machine or of an object store."""

    def read(self, size: int = -1, /) -> bytes:
        """The next `size` bytes; all that are left if negative."""
        ...

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Fill the buffer with the next bytes and return how many were read; 0 at the end of the file."""
        ...

    def seek(self, offset: int, /) -> int:
        """Go to the byte at `offset`, counted from the beginning."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...


def is_url(location: str | Path) -> bool:
    """Whether `location` is in an object store; if not, it is a path on this machine."""
    return "://" in str(location)


def beneath(location: str | Path, name: str) -> str:
    """The file `name` of the cohort at `location`, for messages and for `open_file`."""
    return f"{shown(location)}/{name}"


def shown(location: str | Path) -> str:
    """A location for messages: without the keys and options that a URL can contain."""
    kind, sign, rest = str(location).partition("://")
    if not sign:
        return kind.split("?")[0].rstrip("/")
    # A key may have a slash or a question mark in it.
    return f"{kind}{sign}{rest.rpartition('@')[2].split('?')[0].split('#')[0].rstrip('/')}"


def check_name(location: str | Path, name: str) -> str:
    """`name`; UserError if it leads out of the folder that it is said to be in.

    Names come from listings of stores and from tables of cohorts, which others may have written.
    """
    if "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise UserError(
            f"{shown(location)} names the file {name!r}, which is not below it: this is damage or an attack, and it is "
            "not touched"
        )
    return name


def check_keyless(location: str | Path) -> None:
    """UserError if an address contains keys: run.json, logs and the list of processes would show them to everyone."""
    kind, sign, rest = str(location).partition("://")
    path, _, options = unquote(rest).partition("?")
    before, at, _ = path.rpartition("@")
    store = path.partition("/")[0].removeprefix("anonymous@")
    # The store of Azure is written container@account. A key may have a slash in it.
    has_user = (at and ":" in before) or ("@" in store and not kind.startswith(("abfs", "wasb")))
    secret = re.search(
        r"(?:^|[&;])[^=&;]*(?:key|secret|token|passw|pwd|credential(?!_kind)|sig|sas|auth(?!ority))[^=&;]*=",
        options,
        re.I,
    )
    if sign and (has_user or "@" in options or "#" in rest or secret):
        raise UserError(
            f"{shown(location)}: an address must not contain keys, because run.json and logs would show them; "
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or those of your store"
        )


def open_file(location: str | Path, name: str) -> OpenFile:
    """The file `name` below `location`, open for `seek` and `readinto`, without a buffer in between.

    FileNotFoundError or another OSError as for any file; UserError where the store cannot be reached at all, or `name`
    leads out of `location`.
    """
    check_name(location, name)
    if not is_url(location):
        return open(f"{location}/{name}", "rb", buffering=0)
    filesystem, root = _store(str(location))
    try:
        opened: OpenFile = filesystem.open_input_file(f"{root}/{name}")
        return opened
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {beneath(location, name)}: {_reason(error)}") from error


def list_files(location: str | Path, folder: str = "") -> Iterator[tuple[str, int]]:
    """Name below `location` (or a folder there) and size in bytes of every file, in order of name.

    UserError for a name that leads out of it.
    """
    filesystem, root = _store(str(location)) if is_url(location) else (fs.LocalFileSystem(), str(location))
    root = f"{root}/{folder}".rstrip("/")
    found = filesystem.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
    files = sorted((str(info.path), int(info.size)) for info in found if info.type == fs.FileType.File)
    # All names are checked before the first one is used.
    yield from [(check_name(location, path[len(root) :].removeprefix("/")), size) for path, size in files]


def upload(folder: Path, url: str, last: str) -> None:
    """Copy every file of `folder` below `url`; the file `last` comes last, because it marks the copy as complete."""
    filesystem, root = _store(url)
    names = sorted((name for name, _ in list_files(folder)), key=lambda name: name == last)
    try:
        for name in names:
            if not isinstance(filesystem, fs.S3FileSystem):
                filesystem.create_dir(os.path.dirname(f"{root}/{name}"), recursive=True)
            fs.copy_files(
                f"{folder}/{name}", f"{root}/{name}", destination_filesystem=filesystem, use_threads=False
            )
    except OSError as error:
        raise UserError(f"cannot write to {shown(url)}: {_reason(error)}") from error


def exists(url: str, name: str) -> bool:
    """Whether there is a file `name` below `url`; UserError or OSError where the store does not answer."""
    filesystem, root = _store(url)
    with _words(f"cannot read {shown(url)}"):
        return bool(filesystem.get_file_info(f"{root}/{name}").type == fs.FileType.File)


def upload_file(file: Path, url: str, name: str) -> None:
    """Copy `file` to `name` below `url`, whole or not at all; OSError where the store cannot be written."""
    filesystem, root = _store(url)
    check_name(url, name)
    with _words(f"cannot write to {shown(url)}"):
        if not isinstance(filesystem, fs.S3FileSystem):
            filesystem.create_dir(os.path.dirname(f"{root}/{name}"), recursive=True)
        fs.copy_files(str(file), f"{root}/{name}", destination_filesystem=filesystem, use_threads=False)


def download(url: str, name: str, file: Path) -> None:
    """Copy `name` below `url` to `file`; OSError where it cannot be read."""
    filesystem, root = _store(url)
    check_name(url, name)
    with _words(f"cannot read {beneath(url, name)}"):
        fs.copy_files(f"{root}/{name}", str(file), source_filesystem=filesystem, use_threads=False)


def remove(url: str, name: str) -> None:
    """Delete the file or folder `name` below `url`, if it is there; OSError where the store cannot be written."""
    filesystem, root = _store(url)
    check_name(url, name)
    with _words(f"cannot write to {shown(url)}"):
        kind = filesystem.get_file_info(f"{root}/{name}").type
        if kind == fs.FileType.Directory:
            filesystem.delete_dir(f"{root}/{name}")
        elif kind == fs.FileType.File:
            filesystem.delete_file(f"{root}/{name}")


@contextlib.contextmanager
def _words(what: str) -> Iterator[None]:
    """Turn an error of the store into one line that says what failed; FileNotFoundError stays as it is."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise OSError(f"{what}: {_reason(error)}") from error


def _store(url: str) -> tuple[fs.FileSystem, str]:
    """The file system that a URL belongs to, and the path in it."""
    return _connected(url, os.getpid())


@functools.lru_cache(maxsize=16)
def _connected(url: str, _process: int) -> tuple[fs.FileSystem, str]:
    """Connected once per process: the clients of object stores do not survive a fork."""
    check_keyless(url)
    try:
        filesystem, root = fs.FileSystem.from_uri(_patient_for_a_while(url))
        bucket = root.split("/")[0]
        if (
            isinstance(filesystem, fs.S3FileSystem)
            and filesystem.get_file_info(bucket).type == fs.FileType.NotFound
        ):
            raise UserError(f"{shown(url)}: there is no bucket '{bucket}'; check the name and the region")
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise UserError(f"cannot open {shown(url)}: {_reason(error)}") from error
    return filesystem, root.rstrip("/")


def _patient_for_a_while(url: str) -> str:
    """The URL with a limit of 20 s: Google's client would try to connect for a quarter of an hour."""
    if not url.startswith(("gs://", "gcs://")) or "retry_limit_seconds" in url:
        return url
    return f"{url}{'&' if '?' in url else '?'}retry_limit_seconds=20"


def _reason(error: Exception) -> str:
    """The error in one line; without credentials a store gives a long answer that does not say so."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "ACCESS_DENIED" in text or "credentials" in text.lower() or "HTTP status 403" in text:
        return f"access denied; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role ({text[:160]})"
    return text[:300]
