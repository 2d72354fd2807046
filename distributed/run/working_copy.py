"""A run in an object store: every machine that takes part works on a copy of it in a local folder.

    s3://bucket/runs/demo  ◀── send ── /tmp/brainsweep-1000/s3%3A%2F%2Fbucket%2Fruns%2Fdemo ──▶ trials/0007/…
                           ─── bring ─▶        (the same path on every node)

The path of a working copy contains the address, so any process on any node can tell from a path where the file
belongs. For all other paths `send` and `bring` do nothing. Workers send what they write (trials, refits) after every
epoch. The driver sends what it writes when a trial begins or ends, and every few seconds. The files at the address
are the valid ones: `bring` replaces local files that differ from them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Collection, Iterator
from pathlib import Path
from urllib.parse import quote, unquote

from rich.console import Console

from core.errors import UserError
from core.files.places import check_keyless, download, exists, is_url, list_files, remove, shown, upload_file
from core.files.writing import replacing
from core.run_names import (
    ACCESS,
    BASELINE,
    CHECKPOINT,
    CONFIRMED,
    JOURNAL,
    LOCK,
    PROGRESS,
    REFITS,
    RUN_JSON,
    TRIALS,
    TUNE,
)
from distributed.run.lock import HeldError, claim

SCRATCH = "BRAINSWEEP_SCRATCH"
"""The folder for working copies, the same on every node; if it is not set, the folder for temporary files."""
SIGN = quote("://", safe="")
SEND_S = 10.0
LEFT_OUT = (TUNE, LOCK, f"{JOURNAL}.lock")
"""Files and folders of a run that are only of use to the machine that wrote them."""
BY_WORKERS = (TRIALS, BASELINE, REFITS, CONFIRMED, ACCESS)
"""Folders of a run in which workers on any node write; they send these files themselves."""
DAMAGED = ".damaged"
"""What is added to the name of a damaged file, which is kept."""
CHECKPOINTS = Path(CHECKPOINT).stem
"""What the names of all checkpoints of a trial begin with."""

_SENT: dict[Path, tuple[int, int]] = {}
"""Size and time of every file when this process sent it."""
_ONE_AT_A_TIME = threading.Lock()
"""Without this lock an older state of the study, sent by the thread of `kept_up`, could replace a newer one."""


def place_of_run(text: str) -> Path:
    """The folder that RUN or --out means: itself, or the working copy of an address.

    Raises:
        UserError: the address contains keys, which would be visible in paths and logs.
    """
    scratch = Path(os.environ.get(SCRATCH) or _default_scratch()).absolute()
    if is_url(text):
        check_keyless(text)
        return scratch / quote(text.rstrip("/"), safe="")
    path = Path(text)
    if (place := address_of(path.absolute())) is not None and not path.absolute().is_relative_to(scratch):
        raise UserError(
            f"{text} has the name of a working copy of {shown(place[0])} and is not one of yours: its files would be "
            "replaced by those at that address; give the address, or rename the folder"
        )
    return path


def _default_scratch() -> Path:
    return Path(tempfile.gettempdir()) / f"brainsweep-{os.getuid()}"


def own_working_copy(path: Path) -> None:
    """Make the working copy that `path` is in, for this user alone; nothing happens for other paths.

    Everyone may write to the folder for temporary files: somebody else could have made our folder before us.

    Raises:
        UserError: the folder is another user's, or a link.
    """
    for index, part in enumerate(path.parts):
        if SIGN in part:
            copy = Path(*path.parts[: index + 1])
            for folder in (copy.parent, copy) if copy.parent.name == _default_scratch().name else (copy,):
                own_folder(folder, SCRATCH)


def own_folder(folder: Path, variable: str) -> None:
    """Make `folder` for this user alone; `variable` is what the user can set to have another one.

    Raises:
        UserError: the folder is another user's, or a link, or cannot be made.
    """
    remedy = f"set {variable} to a folder of yours"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.lstat()
    except OSError as error:
        raise UserError(f"cannot make {folder}: {error.strerror}; {remedy}") from None
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid():
        what = "is a link" if stat.S_ISLNK(about.st_mode) else f"belongs to user {about.st_uid}"
        raise UserError(f"{folder} {what}, so others could change what lies in it; {remedy}")
    if about.st_mode & 0o077:
        folder.chmod(0o700)


def address_of(path: Path) -> tuple[str, str] | None:
    """The address of the run whose working copy `path` is in, and the name of the file there; None for other paths."""
    for index, part in enumerate(path.parts):
        if SIGN in part:
            return unquote(part), "/".join(path.parts[index + 1 :])
    return None


def run_as_typed(path: Path) -> str:
    """The run in the folder `path` as a user would type it: its address, or its path from the current folder."""
    if (found := address_of(path)) is not None:
        return found[0]
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def send(path: Path, leave_out: Collection[str] = ()) -> None:
    """Copy what has changed of a file or folder to its address.

    progress.json comes last, because it says which other files there are.

    Args:
        path: a file or a folder; if it is not in a working copy, nothing happens.
        leave_out: names of entries of this folder that are not sent.

    Raises:
        OSError: the store cannot be written.
    """
    if address_of(path) is None:
        return
    files = (
        [path] if path.is_file() else sorted(path.rglob("*"), key=lambda file: (file.name == PROGRESS, file))
    )
    for file in files:
        below = file.relative_to(path).parts
        if not (below and below[0] in leave_out) and not file.name.endswith(".tmp"):
            _send_file(file)


def _send_file(file: Path) -> None:
    """Send `file` unless this process has sent it since its last change."""
    place = address_of(file)
    # Another process may replace or delete the file at any moment.
    with _ONE_AT_A_TIME, contextlib.suppress(FileNotFoundError):
        about = file.stat()
        signature = (about.st_size, about.st_mtime_ns)
        if place is not None and file.is_file() and _SENT.get(file) != signature:
            upload_file(file, *place)
            _SENT[file] = signature


def bring(path: Path, leave_out: Collection[str] = (), checkpoints: bool = True) -> None:
    """Make a folder of a working copy equal to the folder at its address; other local files in it are deleted.

    Args:
        path: the folder; if it is not in a working copy, nothing happens.
        leave_out: names of entries of this folder that stay as they are.
        checkpoints: whether checkpoints are fetched, too; if not, they stay as they are.

    Raises:
        OSError: the store cannot be read, or the folder cannot be written.
    """
    place = address_of(path)
    if place is None:
        return
    address, folder = place
    own_working_copy(path)
    there = set()
    for name, _ in list_files(address, folder):
        if _is_left_out(name, leave_out, checkpoints):
            continue
        there.add(path / name)
        _refuse_links(path, name)
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError), replacing(path / name) as fresh:
            download(address, f"{folder}/{name}".lstrip("/"), fresh)
    for file in path.rglob("*"):
        name = file.relative_to(path).as_posix()
        if file.is_file() and file not in there and not _is_left_out(name, leave_out, checkpoints):
            file.unlink(missing_ok=True)


def _refuse_links(folder: Path, name: str) -> None:
    """UserError if a folder on the way to the file is a link: the file would be written somewhere else."""
    for above in (folder / name).parents:
        if above == folder.parent:
            return
        if above.is_symlink():
            raise UserError(f"{above} is a link, and a working copy has none; remove it")


def _is_left_out(name: str, leave_out: Collection[str], checkpoints: bool) -> bool:
    first, last = name.split("/")[0], name.rpartition("/")[2]
    return first in leave_out or last.endswith(".tmp") or (last.startswith(CHECKPOINTS) and not checkpoints)


def bring_results(run: Path) -> None:
    """Fetch what workers on all nodes have written, without checkpoints: only a trial that continues needs them."""
    for name in BY_WORKERS:
        bring(run / name, checkpoints=False)


def bring_run(run: Path, console: Console) -> None:
    """Fetch all that people and a resumed sweep need of a run, unless a sweep on this machine writes to it now.

    Raises:
        UserError: the address cannot be read, or there is no run at it.
    """
    place = address_of(run)
    if place is None:
        return
    try:
        if not exists(place[0], RUN_JSON):
            raise UserError(f"{shown(place[0])} is not a run: it has no run.json")
        own_working_copy(run)
        with contextlib.suppress(HeldError), claim(run, console):
            bring(run, LEFT_OUT, checkpoints=False)
    except OSError as error:
        raise UserError(f"cannot read {shown(place[0])}: {error}") from error


def refuse_taken(run: Path) -> None:
    """UserError if the address of a new run is not empty, or its working copy cannot be made for this user alone."""
    place = address_of(run)
    own_working_copy(run)
    if place is not None and (first := next(list_files(place[0]), None)) is not None:
        address = shown(place[0])
        raise UserError(
            f"{address} is not empty: it has {first[0]}; continue a run with `brainsweep resume {address}`, or give "
            "another --out"
        )
    if place is not None and (run / RUN_JSON).exists():
        # A process was killed before it had sent anything: only the files at the address are valid.
        with claim(run, Console(quiet=True)):
            shutil.rmtree(run)
        own_working_copy(run)


def send_report(page: Path) -> None:
    """Send a new version of the report.

    Raises:
        UserError: the address cannot be written.
    """
    try:
        send(page)
    except OSError as error:
        raise UserError(str(error)) from error


def forget(path: Path) -> None:
    """Delete at its address a file or folder that is deleted on this machine."""
    if (place := address_of(path)) is not None:
        remove(*place)


def set_aside(made: Path, name: str) -> Path:
    """Rename the folder `made` of a run to `name`, or if that is taken `name-2` and so on; returns its new place."""
    names = (name if number == 1 else f"{name}-{number}" for number in range(1, 10_000))
    aside = made.rename(next(place for each in names if not (place := made.with_name(each)).exists()))
    send(aside)
    forget(made)
    return aside


@contextlib.contextmanager
def kept_up(run: Path, console: Console) -> Iterator[None]:
    """Send what the driver writes, every few seconds and once more at the end.

    If the store does not answer, the next attempt follows a few seconds later; if the last one fails, it is a
    UserError.
    """
    if address_of(run) is None:
        yield
        return
    console.print(
        f"note: working in {run}; an address has no locks, see that no other machine writes to it",
        highlight=False,
        soft_wrap=True,
    )
    ended = threading.Event()

    def keep_up() -> None:
        while not ended.wait(SEND_S):
            with contextlib.suppress(OSError, UserError):
                send_driver(run)

    thread = threading.Thread(target=keep_up, name="sends-the-run", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        try:
            send_driver(run)
        except OSError as error:
            raise UserError(f"{error}; all of the run but this lies in {run}") from error


def send_driver(run: Path) -> None:
    """Send what the driver has written of a run."""
    send(run, (*LEFT_OUT, *BY_WORKERS))
