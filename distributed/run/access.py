"""Which cell used each subject, and when: the record that shows that the search never saw the hold-out.

Every worker writes a file of its own under RUN/access/. It notes when the voxels of a subject reach a model, or the
statistics for normalisation, for the first time in every cell of every trial. So a subject that a refit used, and a
trial of a search that went on after it, is there twice. Reading whole shards into shared memory and comparing them with
their checksums comes before; this is not a use of a subject and is not noted.
"""

from __future__ import annotations

import contextlib
import csv
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from core.files.writing import writing_to
from distributed.batches.plan import Rows
from distributed.run.assignment import Cell
from distributed.run.working_copy import send

COLUMNS = ("time", "trial", "fold", "seed", "rows")
"""Of a line: seconds since 1970, whose cell it is, and rows of the cohort, separated by spaces."""

EVALUATION = "evaluate"
"""In the place of a trial: `brainsweep evaluate` of the run on its own cohort."""


@dataclass
class AccessRecord:
    """Notes the uses of every row in `folder`. Every worker receives a copy that has seen nothing yet."""

    folder: Path
    cell: Cell | None = None
    seen: set[int] = field(default_factory=set)
    """The rows that `cell` has used."""

    def note(self, rows: Rows, cell: Cell) -> None:
        """Note that `cell` uses these `rows` of the cohort now."""
        if cell != self.cell:
            self.cell, self.seen = cell, set()
        fresh = [row for row in map(int, rows) if row not in self.seen]
        if not fresh:
            return
        self.seen.update(fresh)
        used = " ".join(map(str, fresh))
        with writing_to(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{socket.gethostname()}-{os.getpid()}.csv"
            with path.open("a") as file:
                file.write(f"{time.time():.3f},{cell.trial},{cell.fold},{cell.seed},{used}\n")
            send(path)


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
        with path.open(newline="") as file:
            for line in csv.reader(file):
                # A process that was killed may leave a part of a line.
                with contextlib.suppress(ValueError):
                    if len(line) == len(COLUMNS):
                        yield float(line[0]), line[1], int(line[2]), [int(row) for row in line[4].split()]
                    elif len(line) == 3:
                        # Version 0.2 and before: the first use only, as time, row, fold.
                        yield float(line[0]), "", int(line[2]), [int(line[1])]
