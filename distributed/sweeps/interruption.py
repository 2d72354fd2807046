"""What can stop a sweep from outside, Ctrl-C or a full disk, and the message in this case."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ray.tune import TuneError
from rich.console import Console

from core.errors import UserError
from distributed.run.working_copy import run_as_typed
from distributed.search.budget import Budget

FULL = (errno.ENOSPC, errno.EDQUOT)
"""The errors of a full disk."""


@contextlib.contextmanager
def resumable(run: Path) -> Iterator[None]:
    """Stop `run` with one line when the disk is full, also when Tune, pandas or another library was writing."""
    try:
        yield
    except (OSError, UserError, TuneError) as error:
        full = next((each for each in _causes(error) if getattr(each, "errno", None) in FULL), None)
        if full is None:
            raise
        raise stopped(run, os.strerror(full.errno)) from error


def _causes(error: BaseException | None) -> Iterator[Any]:
    """`error` and its causes; Tune wraps the error of a callback."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def stopped(run: Path, reason: str | None) -> UserError:
    """The message of a sweep that was stopped for `reason`, and how to continue it."""
    return UserError(
        f"the sweep stopped: {reason}. Finished epochs are kept; when the cause is fixed, continue with: "
        f"brainsweep resume {run_as_typed(run)}"
    )


@contextlib.contextmanager
def interruptible(budget: Budget, console: Console) -> Iterator[None]:
    """The first Ctrl-C stops after the current epochs, and the run can be resumed; the second one stops at once."""

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
