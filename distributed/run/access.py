"""Which cell used each subject first, and when: the record that shows that the search never saw the hold-out.

Every worker writes a file of its own under RUN/access/. It notes the first time that the voxels of a subject reach a
model, or the statistics for normalisation. Reading whole shards into shared memory and comparing them with their
checksums comes before; this is not a use of a subject and is not noted.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from core.files.writing import writing_to
from distributed.batches.plan import Rows
from distributed.run.working_copy import send

COLUMNS = ["time", "row", "fold"]


@dataclass
class AccessRecord:
    """Notes the first use of every row in `folder`. Every worker receives a copy that has seen nothing yet."""

    folder: Path
    seen: set[int] = field(default_factory=set)

    def note(self, rows: Rows, fold: int) -> None:
        """Note that a cell of `fold` uses these `rows` of the cohort now."""
        fresh = [row for row in map(int, rows) if row not in self.seen]
        if not fresh:
            return
        self.seen.update(fresh)
        now = time.time()
        with writing_to(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{socket.gethostname()}-{os.getpid()}.csv"
            with path.open("a") as file:
                file.writelines(f"{now:.3f},{row},{fold}\n" for row in fresh)
            send(path)


def read_access(folder: Path) -> pd.DataFrame:
    """The first use of every row by any process, in order of time: columns time (seconds since 1970), row, fold."""
    parts = [pd.read_csv(path, names=COLUMNS) for path in sorted(folder.glob("*.csv"))]
    if not parts:
        return pd.DataFrame(columns=COLUMNS)
    return pd.concat(parts).sort_values("time").drop_duplicates("row").reset_index(drop=True)
