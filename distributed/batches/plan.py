"""The plan: which rows an epoch visits in which order, and what each worker takes of them. No Ray, no voxels.

The order is a pure function of (seed, epoch, number of workers): one worker or eight see the same batches,
split among them, whether the volumes come from memory, from disk or from a stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Rows = npt.NDArray[np.int64]

READS = pa.schema([("epoch", pa.int64()), ("rows", pa.list_(pa.int64())), ("sizes", pa.list_(pa.int64()))])
"""One line per read: the rows of several batches one after the other, and how many rows each batch has."""


@dataclass(frozen=True)
class Plan:
    """All batches that one worker takes of a cell's training. Costs nothing until an epoch is asked for.

    What it holds grows with the rows alone (8 bytes each), not with the epochs: an epoch's order is worked
    out when it comes, in time and memory in proportion to the rows.
    """

    rows: Rows
    """Rows of the manifest to train on: a fold is a selection of rows, no volume is copied for it."""
    batch_size: int
    """Rows per step, over all workers."""
    seed: int
    epochs: range
    """The epochs to run, counted from 1; one that continues starts later."""
    rank: int = 0
    workers: int = 1
    drop_last: bool = False

    def epoch(self, epoch: int) -> list[Rows]:
        """This worker's part of every batch of `epoch`, in order."""
        batches = epoch_batches(
            self.rows, self.batch_size, self.seed, epoch, self.workers, drop_last=self.drop_last
        )
        return [share(batch, self.rank, self.workers) for batch in batches]

    def batches(self) -> Iterator[Rows]:
        """This worker's part of every batch of all epochs, in order."""
        for epoch in self.epochs:
            yield from self.epoch(epoch)

    def reads(self, epoch: int, rows_per_read: int) -> pa.Table:
        """The batches of `epoch`, one line per read (`READS`), as many batches to a read as fit `rows_per_read`."""
        batches = self.epoch(epoch)
        sizes = np.array([len(batch) for batch in batches])
        together = max(1, rows_per_read // int(sizes.max()))
        first_batch = np.append(np.arange(0, len(batches), together), len(batches))
        first_row = np.append(0, np.cumsum(sizes))[first_batch]
        columns = [
            pa.array(np.full(len(first_batch) - 1, epoch)),
            pa.ListArray.from_arrays(first_row, np.concatenate(batches)),
            pa.ListArray.from_arrays(first_batch, sizes),
        ]
        return pa.table(columns, schema=READS)


def epoch_batches(
    rows: Rows, batch_size: int, seed: int, epoch: int, workers: int = 1, *, drop_last: bool = False
) -> list[Rows]:
    """The batches of one epoch: a permutation of `rows`, cut into `batch_size`.

    The last batch is kept, as in the references, unless `drop_last` and there is a whole one. One that
    would leave a worker fewer than two subjects (nothing to contrast, no batch statistics) joins the batch
    before it.
    """
    order = np.random.default_rng((seed, epoch)).permutation(np.asarray(rows))
    if drop_last and len(order) > batch_size:
        order = order[: len(order) // batch_size * batch_size]
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if len(batches) > 1 and len(batches[-1]) < 2 * workers:
        batches[-2:] = [np.concatenate(batches[-2:])]
    return batches


def share(rows: Rows, rank: int, workers: int) -> Rows:
    """The part of a batch that worker `rank` of `workers` takes; the parts differ by at most one row."""
    each, left = divmod(len(rows), workers)
    start = rank * each + min(rank, left)
    return rows[start : start + each + (rank < left)]


def chunks(rows: Sequence[int] | Rows, size: int) -> Iterator[Rows]:
    """`rows` in order, `size` at a time."""
    rows = np.asarray(rows)
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
