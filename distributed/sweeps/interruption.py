"""What stops a sweep from outside, Ctrl-C or a full disk, and what it says then."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Iterator
from typing import Any

from ray.tune import TuneError
from rich.console import Console

from core.errors import UserError
from distributed.run.folder import RunFolder
from distributed.run.working_copy import run_as_typed
from distributed.search.budget import Budget

FULL = (errno.ENOSPC, errno.EDQUOT)
"""How a disk says that it is full."""


@contextlib.contextmanager
def resumable(folder: RunFolder) -> Iterator[None]:
    """Tune, pandas and others write files, too: a disk that is full for them stops the sweep as it does for us."""
    try:
        yield
    except (OSError, UserError, TuneError) as error:
        full = next((each for each in _causes(error) if getattr(each, "errno", None) in FULL), None)
        if full is None:
            raise
        raise stopped(folder, os.strerror(full.errno)) from error


def _causes(error: BaseException | None) -> Iterator[Any]:
    """`error` and what led to it; Tune wraps what a callback raises."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def stopped(folder: RunFolder, reason: str | None) -> UserError:
    """What a sweep says that was stopped for `reason`, and how it goes on."""
    return UserError(
        f"the sweep stopped: {reason}. Nothing finished is lost; once that is mended: "
        f"brainsweep resume {run_as_typed(folder.path)}"
    )


@contextlib.contextmanager
def interruptible(budget: Budget, console: Console) -> Iterator[None]:
    """Ctrl-C once stops gracefully, what runs stays resumable; twice stops at once."""

    def stop(signum: int, frame: Any) -> None:
        if budget.interrupted:
            raise KeyboardInterrupt
        budget.interrupted = True
        console.print("stopping after the current epochs; press Ctrl-C again to stop at once")

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
