"""One writer at a time: who holds a run's folder, and what a writer that was killed left half written in it."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from core.errors import UserError
from core.files.writing import writing_to

LOCK = "writer.lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system answers that has no locks."""


class HeldError(UserError):
    """Another process writes to the run."""


@contextlib.contextmanager
def claim(folder: Path, console: Console) -> Iterator[None]:
    """Hold the run in `folder` for this process: two would continue the same trials, and both write the study.

    The lock is the kernel's (flock), so it ends with its process, however that ends, and nothing has to be
    cleaned up. Other machines see it on NFS (Linux makes it a lock of the server there), on Lustre where that
    is mounted with `-o flock`; on file systems without locks a note says that nobody watches.

    Raises:
        HeldError: another process holds the run (named with its machine).
        UserError: the folder cannot be written.
    """
    with writing_to(folder):
        file = (folder / LOCK).open("a+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise HeldError(
                f"{folder} is being written by {holder}; let it end, or stop it with Ctrl-C"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise UserError(f"cannot lock {folder}: {error.strerror or error}") from None
            console.print(f"note: {folder} is on storage without locks; see that no other sweep writes to it")
        with writing_to(folder):
            file.truncate(0)
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            file.write(f"process {os.getpid()} on {socket.gethostname()}, since {now}\n")
            file.flush()
        yield


def mend_journal(journal: Path) -> int:
    """Clear away what a killed writer, or a full disk, left of an Optuna journal; returns the bytes cut off.

    Optuna (5.0, JournalFileBackend) skips half a line while it comes last, but appends to it, and then can read
    no line after it. And it waits half a minute for the lock of a dead writer, for ever where the folder was
    moved, since that lock is a link to the journal's old place. Call this only while the run is claimed.
    """
    if not journal.exists():
        return 0
    content = journal.read_bytes()
    torn = len(content) - (content.rfind(b"\n") + 1)
    with writing_to(journal.parent):
        journal.with_name(f"{journal.name}.lock").unlink(missing_ok=True)
        if torn:
            os.truncate(journal, len(content) - torn)
    return torn


def refuse_url(out: Path) -> None:
    """UserError where a run is to be written straight to an object store: sweeps have working copies for that."""
    if found := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", str(out)):
        raise UserError(
            f"--out {out} is a {found[1]} address; only sweeps can be written to one, this needs a folder on storage "
            "that all nodes mount"
        )
