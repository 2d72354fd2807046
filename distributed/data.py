"""The plan, then the volumes: which rows an epoch visits in which order, and how a worker gets them.

The order is a pure function of (seed, epoch): one worker or eight see the same batches, split among them.
"""

from __future__ import annotations

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

READ_ROWS_PER_TASK = 16
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
class Resident:
    """A cohort in the object store, one object per volume: every worker on a node reads the same memory."""

    references: tuple[ray.ObjectRef, ...]

    @classmethod
    def of(cls, cohort: Cohort) -> Resident:
        """Read each shard once, in parallel; Ray reads a lost volume again from its task.

        Raises:
            UserError: the cohort would not fit in the object store, or a shard is damaged.
        """
        _check_it_fits(cohort)
        references: list[ray.ObjectRef] = []
        for start in range(0, len(cohort), READ_ROWS_PER_TASK):
            rows = list(range(start, min(start + READ_ROWS_PER_TASK, len(cohort))))
            task = _read_rows.options(num_returns=len(rows))
            taken: Any = task.remote(str(cohort.folder.resolve()), rows)
            references.extend(taken if len(rows) > 1 else [taken])
        try:
            ray.wait(references, num_returns=len(references), fetch_local=False)
            ray.get(references[::READ_ROWS_PER_TASK])  # a damaged shard fails here, before any trial
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, UserError) else error from None
        return cls(tuple(references))

    def read(self, rows: Rows) -> Floats:
        """See `Volumes.read`."""
        return np.stack(ray.get([self.references[row] for row in rows]))


@ray.remote(num_cpus=0.5)
def _read_rows(folder: str, rows: list[int]) -> Any:
    """The volumes of `rows` as separate objects."""
    cohort = Cohort.open(Path(folder))
    volumes = cohort.read(rows).astype(cohort.description.dtype)
    return list(volumes) if len(rows) > 1 else volumes[0]


def _check_it_fits(cohort: Cohort) -> None:
    volume = np.dtype(cohort.description.dtype).itemsize * int(np.prod(cohort.volume_shape))
    needed = volume * len(cohort)
    available = ray.cluster_resources().get("object_store_memory", 0) * OBJECT_STORE_SHARE
    if needed > available:
        raise UserError(
            f"cohort {cohort.folder} needs {needed / 2**30:.1f} GiB in memory, but {OBJECT_STORE_SHARE:.0%} of "
            f"the object store is {available / 2**30:.1f} GiB; start Ray with a larger --object-store-memory, "
            "or ingest at a coarser --spacing"
        )


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
