"""Read RUN/access/: which cell used each subject, and when. `distributed.run.access` writes these records."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

COLUMNS = ("time", "trial", "fold", "seed", "rows")
"""Of a line: seconds since 1970, whose cell it is, and rows of the cohort, separated by spaces."""

EVALUATION = "evaluate"
"""In the place of a trial: `brainsweep evaluate` of the run on its own cohort."""


def evaluations(folder: Path) -> list[float]:
    """When `brainsweep evaluate` used the held-out subjects, in seconds since 1970."""
    return sorted(when for when, trial, _, _ in _lines(folder) if trial == EVALUATION)


def read_access(folder: Path) -> pd.DataFrame:
    """Who used what: one line for every row of the cohort and every fold that used it, in order of the first use.

    Columns: row, fold, first and last (seconds since 1970), uses (cells of trials; a cell that another process
    continued counts again).
    """
    found: dict[tuple[int, int], tuple[float, float, int]] = {}
    for when, _, fold, rows in _lines(folder):
        for row in rows:
            first, last, uses = found.get((row, fold), (when, when, 0))
            found[row, fold] = (min(first, when), max(last, when), uses + 1)
    table = pd.DataFrame(
        [(*key, *value) for key, value in found.items()], columns=["row", "fold", "first", "last", "uses"]
    )
    return table.sort_values(["first", "row"], ignore_index=True)


def _lines(folder: Path) -> Iterator[tuple[float, str, int, list[int]]]:
    """When, the trial, the fold, and the rows of every line."""
    for path in sorted(folder.glob("*.csv")):
        with contextlib.suppress(OSError), path.open(errors="replace") as file:
            for line in (text.rstrip("\n").split(",") for text in file):
                # A process that was killed may leave a part of a line, and a damaged disk a time that is none.
                with contextlib.suppress(ValueError, OverflowError, OSError):
                    in_words(float(line[0]))
                    if len(line) == len(COLUMNS):
                        yield float(line[0]), line[1], int(line[2]), [int(row) for row in line[4].split()]
                    elif len(line) == 3:
                        # Version 0.2 and before: the first use only, as time, row, fold.
                        yield float(line[0]), "", int(line[2]), [int(line[1])]


def in_words(when: float) -> str:
    """Seconds since 1970 as date and time; ValueError, OverflowError or OSError for a time that is none."""
    return f"{datetime.datetime.fromtimestamp(when, datetime.UTC):%Y-%m-%d %H:%M} UTC"
