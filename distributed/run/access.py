"""Which cell used each subject, and when: the record that shows that the search never saw the hold-out.

Every worker writes a file of its own under RUN/access/. It notes when the voxels of a subject reach a model, or the
statistics for normalisation, for the first time in every cell of every trial. So a subject that a refit used, and a
trial of a search that went on after it, is there twice. Reading whole shards into shared memory and comparing them with
their checksums comes before; this is not a use of a subject and is not noted.
`core.run_access` reads the records.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path

from core.files.writing import writing_to
from distributed.batches.plan import Rows
from distributed.run.assignment import Cell
from distributed.run.working_copy import send


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
