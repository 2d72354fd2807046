"""The plan: which rows an epoch visits in which order, and which of them each worker takes. No Ray, no voxels.

The order is a pure function of (seed, epoch): one worker or eight workers see the same batches, split among them,
whether the volumes come from memory, from disk or from a stream. There is one exception: with three or more workers, a
last batch that has fewer subjects than workers joins the one before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from core.volumes.cohort.reader import Boxes

Rows = npt.NDArray[np.int64]
Cut = Callable[[Rows, int], Sequence[Boxes]]
"""(rows (n,), pass) -> for each row the k boxes that are read of it, all of one shape. A pure function that can be
pickled: the same scan gives the same boxes in the same pass, in whatever batch and process."""

READS = pa.schema(
    [
        ("epoch", pa.int64()),
        ("rows", pa.list_(pa.int64())),
        ("sizes", pa.list_(pa.int64())),
        ("boxes", pa.list_(pa.int64())),
    ]
)
"""One line per read: what is read for several consecutive batches. `rows` stands as often as a scan has boxes; `sizes`
counts the rows of each batch; `boxes` has the first voxel of each row's box and the one behind its last, along X, Y and
Z: 6 numbers, and none where whole volumes are read."""


class Part(NamedTuple):
    """What is read for one batch."""

    rows: Rows
    """(n,); the row of a scan of which k boxes are read stands k times, side by side."""
    boxes: Boxes | None = None
    """The part of each of them that is read; all of it if None."""


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
    cut: Cut | None = None
    """The boxes that are read of every scan; whole volumes if None."""

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

    def parts_of(self, epoch: int) -> list[Part]:
        """What this worker reads for every batch of `epoch`, in order."""
        if self.cut is None:
            return [Part(rows) for rows in self.epoch(epoch)]
        return [
            _part(rows, self.cut(rows, number))
            for rows, number in zip(self.epoch(epoch), self.passes(epoch), strict=True)
        ]

    def parts(self) -> Iterator[Part]:
        """What this worker reads for every batch of all epochs, in order."""
        for epoch in self.epochs:
            yield from self.parts_of(epoch)

    def reads(self, epoch: int, rows_per_read: int) -> pa.Table:
        """The batches of `epoch`, one line per read (`READS`); as many batches per read as fit into `rows_per_read`."""
        parts = self.parts_of(epoch)
        sizes = np.array([len(part.rows) for part in parts])
        together = max(1, rows_per_read // int(sizes.max()))
        first_batch = np.append(np.arange(0, len(parts), together), len(parts))
        first_row = np.append(0, np.cumsum(sizes))[first_batch]
        edges = [
            edge
            for part in parts
            for box in part.boxes or ()
            for cut in box
            for edge in (cut.start, cut.stop)
        ]
        columns = [
            pa.array(np.full(len(first_batch) - 1, epoch)),
            pa.ListArray.from_arrays(first_row, np.concatenate([part.rows for part in parts])),
            pa.ListArray.from_arrays(first_batch, sizes),
            pa.ListArray.from_arrays(first_row * 6 if edges else first_row * 0, pa.array(edges, pa.int64())),
        ]
        return pa.table(columns, schema=READS)


def boxes_of(edges: Sequence[int]) -> Boxes | None:
    """The boxes whose `edges` are a line of `READS`; None if whole volumes are read."""
    if not edges:
        return None
    by_axis = [slice(*edges[at : at + 2]) for at in range(0, len(edges), 2)]
    return [(by_axis[at], by_axis[at + 1], by_axis[at + 2]) for at in range(0, len(by_axis), 3)]


def _part(rows: Rows, boxes: Sequence[Boxes]) -> Part:
    counts = {len(several) for several in boxes}
    if len(counts) != 1:
        raise ValueError(f"every scan needs the same number of boxes, got {sorted(counts)}")
    return Part(np.repeat(rows, counts.pop()), [box for several in boxes for box in several])


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
