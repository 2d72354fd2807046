"""A lease on work that several trials want and one of them does: it is kept up, and a dead one is taken over."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

BEAT_S = 5.0
"""How often the holder of a lease shows that it is alive."""
DEAD_AFTER_S = 30.0
"""A lease that has not changed for so long is nobody's. Clocks of several machines are not compared."""


@dataclass
class Lease:
    """A file that says who does the work; `take` before it, `release` after it."""

    path: Path
    holder: threading.Event | None = None
    seen: tuple[str, float] = ("", 0.0)
    """The last content of the lease of another, and when it was first seen."""
    thread: threading.Thread | None = field(default=None, repr=False)

    def take(self) -> bool:
        """Take the lease, and keep it up in a thread; False if it is another's."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self._create() and not (self._is_dead() and self._create()):
            return False
        ended = self.holder = threading.Event()
        self.thread = threading.Thread(target=self._keep_up, args=(ended,), name="lease", daemon=True)
        self.thread.start()
        return True

    def release(self) -> None:
        """Give the lease back, if it is held."""
        if self.holder is None or self.thread is None:
            return
        self.holder.set()
        self.thread.join()
        self.holder = None
        # After a pause it may be another's.
        with contextlib.suppress(FileNotFoundError):
            if self.path.read_text().startswith(_mine("")):
                self.path.unlink()

    def _create(self) -> bool:
        try:
            handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        os.write(handle, _mine(0).encode())
        os.close(handle)
        return True

    def _is_dead(self) -> bool:
        """Whether the holder has ended; then its lease is moved away, by one of those who notice it."""
        try:
            content = self.path.read_text()
        except FileNotFoundError:
            return True
        if content != self.seen[0]:
            self.seen = (content, time.monotonic())
        if not _has_ended(content) and time.monotonic() - self.seen[1] < DEAD_AFTER_S:
            return False
        aside = self.path.with_name(f"{self.path.name}-{os.getpid()}-{time.time_ns()}")
        with contextlib.suppress(FileNotFoundError):
            self.path.rename(aside)
            aside.unlink()
        return True

    def _keep_up(self, ended: threading.Event) -> None:
        beats = 0
        while not ended.wait(BEAT_S):
            beats += 1
            # Nobody reads half of it: the content is one short write.
            with contextlib.suppress(OSError):
                if self.path.read_text().startswith(_mine("")):
                    self.path.write_text(_mine(beats))


def _mine(beats: int | str) -> str:
    return f"{socket.gethostname()} {os.getpid()} {beats}"


def _has_ended(content: str) -> bool:
    """Whether a lease names a process of this machine that is no more."""
    host, _, rest = content.partition(" ")
    pid = rest.partition(" ")[0]
    if host != socket.gethostname() or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
