"""The journal of the study, and a copy with checksums from which damage is mended.

Optuna's journal is a file of JSON lines; trials have the numbers in which they stand there. So one damaged line would
make all that follow it unreadable, and a lost end would give a number to another trial.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.storages.journal._file import get_lock_file

from core.errors import StorageError, UserError
from core.files.writing import replacing, writing_to
from core.run_names import JOURNAL_COPY
from distributed.run.working_copy import DAMAGED

SEAL = 9
"""Bytes before every line of the copy: the CRC-32 of the line in eight digits, and a space."""
_COPIED: dict[Path, tuple[int, int]] = {}
"""The size of every copy that this process has written, and how many bytes of its journal it holds."""


class Journal(JournalFileBackend):
    """Optuna's journal file; every line is also written to the copy beside it.

    Its lock is a file and not a link, because some storage has no symbolic links.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), JournalFileOpenLock(str(path)))
        self._path = path
        self._pending: list[bytes] | None = None
        """The lines of `together` that are not on disk yet; None outside of it."""

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What is appended inside is one write at its end.

        A trial that ends leaves two dozen lines, and each would be locked, flushed to the disk and read again by
        itself. No other process writes meanwhile: Optuna counts lines. So nothing in it may take long.

        Raises:
            StorageError: the storage of the run fails.
        """
        if self._pending is not None:
            yield
            return
        try:
            with get_lock_file(self._lock):
                # The lines of other processes, a dashboard's, stand before these.
                for _ in super().read_logs(self._lines_known):
                    pass
                self._pending = []
                try:
                    yield
                finally:
                    lines, self._pending = self._pending, None
                    self._write(lines)
        except OSError as error:
            raise StorageError(error.errno, error.strerror or str(error)) from error
        # The lock was taken by another process, because it was held for long.
        except RuntimeError as error:
            raise StorageError(
                errno.EBUSY, f"another process has taken the lock of {self._path.name}"
            ) from error

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write `logs`, one line each; StorageError if the storage of the run fails."""
        with self.together():
            assert self._pending is not None
            self._pending += [f"{json.dumps(log, separators=(',', ':'))}\n".encode() for log in logs]

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """The lines from this one on, also those that are not on disk yet."""
        on_disk = self._lines_known
        if self._pending is None or log_number_from < on_disk:
            yield from super().read_logs(log_number_from)
        for line in (self._pending or [])[max(0, log_number_from - on_disk) :]:
            yield json.loads(line)

    @property
    def _lines_known(self) -> int:
        """How many lines of the file this process has seen; Optuna notes where each ends, in order."""
        return next(reversed(self._log_number_offset))

    def _write(self, lines: list[bytes]) -> None:
        if not lines:
            return
        if self._path.stat().st_size != self._log_number_offset[self._lines_known]:
            # Its lines would have the numbers of these.
            raise OSError(errno.EBUSY, f"another process has written to {self._path.name}")
        with self._path.open("ab") as file:
            file.write(b"".join(lines))
            file.flush()
            os.fsync(file.fileno())
        # Otherwise Optuna would look for the next line from the first one on.
        number = self._lines_known
        for line in lines:
            self._log_number_offset[number + 1] = self._log_number_offset[number] + len(line)
            number += 1
        _follow(self._path)


def copy_of(journal: Path) -> Path:
    """The copy of a journal."""
    return journal.with_name(JOURNAL_COPY)


def mend_journal(journal: Path) -> list[str]:
    """Mend a journal after a killed process, a full disk or damage, and the copy, too; returns what was done, in words.

    Optuna (5.0, JournalFileBackend) skips a half line at the end of the file, but appends to it, and then it cannot
    read any line after it. Optuna also waits half a minute for the lock of a process that has ended. Call this only
    while the run is claimed.

    Raises:
        UserError: a damaged line is not in the copy, or the folder cannot be written.
    """
    copy = copy_of(journal)
    if not journal.exists() and not copy.exists():
        return []
    content = journal.read_bytes() if journal.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    known = b"".join(line for line in _sound_lines(copy))
    mended = known + whole[len(known) :]
    _check(mended[len(known) :], known.count(b"\n"), journal)
    with writing_to(journal.parent):
        journal.with_name(f"{journal.name}.lock").unlink(missing_ok=True)
        notes = _differences(content, whole, mended, journal)
        if mended != content:
            with replacing(journal) as fresh:
                fresh.write_bytes(mended)
        _COPIED.pop(copy, None)
        _follow(journal)
    return notes


def _differences(content: bytes, whole: bytes, mended: bytes, journal: Path) -> list[str]:
    """What is mended, in words; a journal that has lost more than half a line is kept under another name."""
    notes = []
    torn, lost = len(content) - len(whole), mended.count(b"\n") - whole.count(b"\n")
    if whole != mended:
        if journal.exists():
            shutil.copyfile(journal, f"{journal}{DAMAGED}")
        what = (
            f"had lost its last {lost} lines, and they were taken"
            if mended.startswith(whole)
            else "was damaged, and was made again"
        )
        notes.append(f"{journal.name} {what} from {JOURNAL_COPY}")
    elif torn:
        notes.append(f"{torn} bytes of half a line were cut off the end of {journal.name}")
    return notes


def _sound_lines(copy: Path) -> Iterator[bytes]:
    """The lines of the journal in its copy, up to the first one that is damaged there."""
    if not copy.exists():
        return
    for sealed in io.BytesIO(copy.read_bytes()):
        line = sealed[SEAL:]
        if sealed[:SEAL] != _seal(line) or not line.endswith(b"\n"):
            return
        yield line


def _check(lines: bytes, before: int, journal: Path) -> None:
    """UserError if one of the lines, of which the copy has none, is no JSON."""
    for number, line in enumerate(io.BytesIO(lines), start=before + 1):
        try:
            json.loads(line)
        except ValueError:
            raise UserError(
                f"line {number} of {journal} is damaged and {JOURNAL_COPY} does not have it: put both files back from "
                "a backup; the results of finished trials are in trials.csv and trials/"
            ) from None


def _seal(line: bytes) -> bytes:
    return b"%08x " % zlib.crc32(line)


def _follow(journal: Path) -> None:
    """Write to the copy what the journal has more."""
    copy = copy_of(journal)
    size = copy.stat().st_size if copy.exists() else 0
    known, done = _COPIED.get(copy, (-1, 0))
    if known != size:
        lines = list(_sound_lines(copy))
        done, size = sum(map(len, lines)), sum(SEAL + len(line) for line in lines)
    with journal.open("rb") as file:
        file.seek(done)
        more = file.read()
    # A dashboard may be writing a line just now.
    fresh = more[: more.rfind(b"\n") + 1]
    with copy.open("ab") as file:
        file.truncate(size)
        file.write(b"".join(_seal(line) + line for line in io.BytesIO(fresh)))
        file.flush()
    _COPIED[copy] = (os.stat(copy).st_size, done + len(fresh))
