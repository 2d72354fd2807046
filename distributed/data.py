"""The plan, then the volumes: which rows an epoch visits in which order, and how a worker gets them.

The order is a pure function of (seed, epoch): one worker or eight see the same batches, split among them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import ray

from core.errors import UserError
from core.volumes.cohort import Cohort

Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.floating[Any]]

BLOCK_BYTES = 4 * 2**20
"""Smaller objects cost more calls, and below 100 kB Ray keeps them in the memory of one process."""
OBJECT_STORE_SHARE = 0.6
"""Largest share of the object store that a resident cohort may fill; beyond it Ray would spill to disk."""


class Volumes(Protocol):
    """Where a worker gets its volumes from."""

    def read(self, rows: Rows) -> Floats:
        """Volumes (n, C, X, Y, Z) of the cohort's `rows`, in the order asked."""


@dataclass(frozen=True)
class InMemory:
    """A cohort held by this very process: for `train` without Ray, and for debugging."""

    volumes: Floats

    @classmethod
    def of(cls, cohort: Cohort) -> InMemory:
        """Read the whole cohort, keeping the precision it is stored in."""
        return cls(cohort.read(np.arange(len(cohort))).astype(cohort.description.dtype))

    def read(self, rows: Rows) -> Floats:
        """See `Volumes.read`."""
        return self.volumes[rows]


@dataclass(frozen=True)
class OnDisk:
    """A cohort too large to hold: every batch is read from its shards by the worker that needs it."""

    folder: str

    def read(self, rows: Rows) -> Floats:
        """See `Volumes.read`."""
        return _opened(self.folder).read(rows)


@dataclass(frozen=True)
class Resident:
    """A cohort in the object store, in blocks of consecutive rows: workers on a node read the same memory.

    A worker keeps hold of the blocks it has seen, without copying them, so they are never evicted under it.
    """

    references: tuple[ray.ObjectRef, ...]
    rows_per_block: int

    @classmethod
    def of(cls, cohort: Cohort) -> Resident:
        """Read every shard once, in parallel; Ray reads a lost block again from its task.

        Raises:
            UserError: a shard is damaged.
        """
        rows_per_block = max(1, BLOCK_BYTES // _bytes_of_a_volume(cohort))
        rows = np.arange(len(cohort))
        folder = str(cohort.folder.resolve())
        references = [_read_block.remote(folder, block) for block in chunks(rows, rows_per_block)]
        try:
            ray.get([_is_read.remote(reference) for reference in references])  # a damaged shard fails here
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, UserError) else error from None
        return cls(tuple(references), rows_per_block)

    def read(self, rows: Rows) -> Floats:
        """See `Volumes.read`."""
        return np.stack([self._block(row // self.rows_per_block)[row % self.rows_per_block] for row in rows])

    def _block(self, index: int) -> Floats:
        reference = self.references[index]
        if reference not in _BLOCKS:
            _BLOCKS[reference] = ray.get(reference)
        return _BLOCKS[reference]


_BLOCKS: dict[ray.ObjectRef, Floats] = {}
"""The blocks that this process has mapped."""


def hold(cohort: Cohort) -> Resident | OnDisk:
    """The cohort in the object store where it fits, else on disk (Ray would spill it to disk in silence)."""
    needed = _bytes_of_a_volume(cohort) * len(cohort)
    available = ray.cluster_resources().get("object_store_memory", 0) * OBJECT_STORE_SHARE
    return Resident.of(cohort) if needed <= available else OnDisk(str(cohort.folder.resolve()))


@ray.remote(num_cpus=0.5)
def _read_block(folder: str, rows: Rows) -> Floats:
    cohort = _opened(folder)
    return cohort.read(rows).astype(cohort.description.dtype)


@ray.remote(num_cpus=0)
def _is_read(block: Floats) -> bool:
    """Runs only once `block` is there, and raises what its task raised."""
    return True


@functools.lru_cache(maxsize=4)
def _opened(folder: str) -> Cohort:
    return Cohort.open(Path(folder))


def _bytes_of_a_volume(cohort: Cohort) -> int:
    return np.dtype(cohort.description.dtype).itemsize * int(np.prod(cohort.volume_shape))


def epoch_batches(rows: Rows, batch_size: int, seed: int, epoch: int, workers: int = 1) -> list[Rows]:
    """The batches of one epoch: a permutation of `rows`, cut into `batch_size`.

    The last batch is kept, as in the references. One that would leave a worker fewer than two subjects
    (nothing to contrast, no batch statistics) joins the batch before it.
    """
    order = np.random.default_rng((seed, epoch)).permutation(np.asarray(rows))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if len(batches) > 1 and len(batches[-1]) < 2 * workers:
        batches[-2:] = [np.concatenate(batches[-2:])]
    return batches


def share(rows: Rows, rank: int, workers: int) -> Rows:
    """The part of a batch that worker `rank` of `workers` takes; the parts differ by at most one row."""
    return np.array_split(rows, workers)[rank]


def chunks(rows: Sequence[int] | Rows, size: int) -> Iterator[Rows]:
    """`rows` in order, `size` at a time."""
    rows = np.asarray(rows)
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
