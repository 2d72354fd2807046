"""A cohort in Ray's object store: read once per node, and used by every trial on the node without a copy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import ray

from core.errors import UserError
from core.volumes.cohort.moments import Moments
from core.volumes.cohort.reader import Cohort
from distributed.batches.in_process import (
    Stored,
    bytes_of_a_volume,
    gather,
    opened,
    read_with_moments,
)
from distributed.batches.plan import Rows, chunks

BLOCK_BYTES = 4 * 2**20
"""Smaller objects cost more calls, and Ray keeps objects below 100 kB in the memory of one process."""

_BLOCKS: dict[ray.ObjectRef[Stored], Stored] = {}
"""The blocks that this process has mapped. It keeps them, so that Ray does not evict them while they are used."""


@dataclass(frozen=True)
class Resident:
    """A cohort in the object store, in blocks of consecutive rows; all workers on a node read the same memory.

    If a block is lost with its node, or evicted, its task reads it again when a worker asks for it.
    """

    references: tuple[ray.ObjectRef[Stored], ...]
    rows_per_block: int
    known: Moments
    """Moments (rows, C, 3) of the whole cohort."""

    @classmethod
    def of(cls, cohort: Cohort) -> Resident:
        """Read every shard once, in parallel.

        Raises:
            UserError: a shard is damaged.
        """
        rows_per_block = max(1, BLOCK_BYTES // bytes_of_a_volume(cohort))
        blocks = list(chunks(np.arange(len(cohort)), rows_per_block))
        pairs = _read_blocks(cohort.address, blocks)
        known = _outcome([moments for _, moments in pairs])
        return cls(tuple(block for block, _ in pairs), rows_per_block, np.concatenate(known))

    def read(self, rows: Rows, out: Stored | None = None) -> Stored:
        """See `Volumes.read`."""
        return gather(
            [self._block(row // self.rows_per_block)[row % self.rows_per_block] for row in rows], out
        )

    def moments(self, rows: Rows) -> Moments:
        """See `Volumes.moments`."""
        return self.known[rows]

    def _block(self, index: int) -> Stored:
        reference = self.references[index]
        if reference not in _BLOCKS:
            _BLOCKS[reference] = ray.get(reference)
        return _BLOCKS[reference]


def scan(cohort: Cohort) -> Moments:
    """Moments (rows, C, 3) of a cohort that does not stay in memory: one pass over its shards, in parallel.

    Every volume is compared with its checksum, so damage is found before the first trial begins.

    Raises:
        UserError: a shard is damaged.
    """
    rows_per_block = max(1, BLOCK_BYTES // bytes_of_a_volume(cohort))
    blocks = chunks(np.arange(len(cohort)), rows_per_block)
    return np.concatenate(_outcome([_scan_block.remote(cohort.address, rows) for rows in blocks]))


def _read_blocks(address: str, blocks: list[Rows]) -> list[list[ray.ObjectRef[Stored]]]:
    """(block, moments) of every block, two tasks at a time for each CPU."""
    at_once = max(1, 2 * int(ray.cluster_resources().get("CPU", 1)))
    pairs: list[list[ray.ObjectRef[Stored]]] = []
    reading: list[ray.ObjectRef[Stored]] = []
    for rows in blocks:
        if len(reading) == at_once:
            _, reading = ray.wait(reading, num_returns=1)
        pairs.append(_read_block.remote(address, rows))  # type: ignore[arg-type]
        reading.append(pairs[-1][1])
    return pairs


# Ray restores a lost block by running its task again, as often as needed. The task needs no CPU: the slots hold all
# CPUs by then, so a worker that asks for the block would wait for ever.
@ray.remote(num_cpus=0, num_returns=2, max_retries=-1, scheduling_strategy="SPREAD")
def _read_block(address: str, rows: Rows) -> tuple[Stored, Moments]:
    return read_with_moments(opened(address), rows)


@ray.remote(num_cpus=0.5)
def _scan_block(address: str, rows: Rows) -> Moments:
    return read_with_moments(opened(address), rows)[1]


def _outcome(references: list[ray.ObjectRef[Stored]]) -> list[Moments]:
    """The results of the tasks; the UserError of a task is raised again as it was."""
    try:
        return ray.get(references)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, UserError) else error from None
