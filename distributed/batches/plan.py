"""The plan: which rows an epoch visits in which order, and which of them each worker takes. No Ray, no voxels.

The order is a pure function of (seed, epoch): one worker or eight workers see the same batches, split among them,
whether the volumes come from memory, from disk or from a stream. There is one exception: with three or more workers, a
last batch that has fewer subjects than workers joins the one before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Rows = npt.NDArray[np.int64]

READS = pa.schema([("epoch", pa.int64()), ("rows", pa.list_(pa.int64())), ("sizes", pa.list_(pa.int64()))])
"""One line per read: the rows of several consecutive batches, and the number of rows in each batch."""


@dataclass(frozen=True)
class Plan:
    """The part of one worker in all batches of a cell's training. It costs nothing until an epoch is asked for.

    Its memory grows with the rows only (8 bytes each), not with the epochs. The order of an epoch is computed when the
    epoch begins; this takes time and memory in proportion to the rows.
    """

    rows: Rows
    """Rows of the manifest to train on. A fold is a selection of rows; no volume is copied for it."""
    batch_size: int
    """Rows per step, over all workers."""
    seed: int
    epochs: range
    """The epochs to run, counted from 1; a training that is continued starts later."""
    rank: int = 0
    workers: int = 1
    drop_last: bool = False
    batches_per_epoch: int | None = None
    """If the length of a training is given in steps, an epoch is so many batches of one pass over the rows after the
    other."""

    def epoch(self, epoch: int) -> list[Rows]:
        """This worker's part of every batch of `epoch`, in order."""
        if self.batches_per_epoch is None:
            return self._pass(epoch)
        each = len(self._pass(1))
        first = (epoch - 1) * self.batches_per_epoch
        passes = {number: self._pass(number) for number in set(self.passes(epoch))}
        return [passes[at // each + 1][at % each] for at in range(first, first + self.batches_per_epoch)]

    def passes(self, epoch: int) -> list[int]:
        """The pass over the rows (from 1) in which each batch of `epoch` lies; no row is twice in a pass."""
        each = len(self._pass(1))
        if self.batches_per_epoch is None:
            return [epoch] * each
        first = (epoch - 1) * self.batches_per_epoch
        return [at // each + 1 for at in range(first, first + self.batches_per_epoch)]

    def _pass(self, number: int) -> list[Rows]:
        batches = epoch_batches(
            self.rows, self.batch_size, self.seed, number, self.workers, drop_last=self.drop_last
        )
        return [share(batch, self.rank, self.workers) for batch in batches]

    def batches(self) -> Iterator[Rows]:
        """This worker's part of every batch of all epochs, in order."""
        for epoch in self.epochs:
            yield from self.epoch(epoch)

    def reads(self, epoch: int, rows_per_read: int) -> pa.Table:
        """The batches of `epoch`, one line per read (`READS`); as many batches per read as fit into `rows_per_read`."""
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
    """The batches of one epoch: a permutation of `rows`, cut into parts of `batch_size`.

    An incomplete last batch is kept, as in the references; `drop_last` leaves it out if there is a complete batch. A
    last batch of one subject (nothing to contrast), or with fewer subjects than workers, joins the batch before it.
    """
    order = np.random.default_rng((seed, epoch)).permutation(np.asarray(rows))
    if drop_last and len(order) > batch_size:
        order = order[: len(order) // batch_size * batch_size]
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if len(batches) > 1 and len(batches[-1]) < max(2, workers):
        batches[-2:] = [np.concatenate(batches[-2:])]
    return batches


def share(rows: Rows, rank: int, workers: int) -> Rows:
    """The part of a batch that worker `rank` of `workers` takes; the parts differ by at most one row."""
    each, left = divmod(len(rows), workers)
    start = rank * each + min(rank, left)
    return rows[start : start + each + (rank < left)]


def chunks(rows: Sequence[int] | Rows, size: int) -> Iterator[Rows]:
    """`rows` in their order, in parts of `size`."""
    rows = np.asarray(rows)
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
