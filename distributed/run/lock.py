"""One process at a time writes to a run: the lock of its folder."""

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
from core.run_names import LOCK

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""The errors of file systems that have no locks."""


class HeldError(UserError):
    """Another process writes to the run."""


@contextlib.contextmanager
def claim(folder: Path, console: Console) -> Iterator[None]:
    """Lock the run in `folder` for this process: two processes would continue the same trials and write one study.

    The lock is a lock of the kernel (flock). It ends with its process, in whatever way the process ends, so there is
    nothing to clean up. Other machines see it on NFS, where Linux makes it a lock of the server, and on Lustre if that
    is mounted with `-o flock`. On a file system without locks a note asks the user to watch.

    Raises:
        HeldError: another process holds the run; the message names it and its machine.
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


def refuse_url(out: Path) -> None:
    """UserError if a run would be written directly to an object store: only sweeps have working copies for that."""
    if found := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", str(out)):
        raise UserError(
            f"--out {out} is a {found[1]} address; only sweeps can be written to one, this needs a folder on storage "
            "that all nodes mount"
        )
