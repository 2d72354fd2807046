"""A cohort in Ray's object store: read once per node, and used by every trial on the node without a copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import ray

from core.errors import UserError
from core.volumes.cohort.moments import Moments
from core.volumes.cohort.reader import Boxes, Cohort
from distributed.batches.in_process import (
    Maps,
    Stored,
    bytes_of_a_map,
    bytes_of_a_volume,
    gather,
    no_map,
    opened,
    read_with_moments,
)
from distributed.batches.plan import Rows, chunks

BLOCK_BYTES = 4 * 2**20
"""Smaller objects cost more calls, and Ray keeps objects below 100 kB in the memory of one process."""

_BLOCKS: dict[ray.ObjectRef[Stored], Stored] = {}
"""The blocks that this process has mapped. It keeps them, so that Ray does not evict them while they are used."""


@dataclass(frozen=True)
class ResidentMap:
    """The maps of one name in the object store, of the scans that have one."""

    blocks: tuple[ray.ObjectRef[Maps], ...]
    maps_per_block: int
    place: npt.NDArray[np.int64]
    """Which of the maps each row of the cohort has; -1 if it has none."""

    @classmethod
    def of(cls, cohort: Cohort, name: str) -> ResidentMap:
        """Read these maps once, in parallel."""
        having = np.flatnonzero(cohort.has_map(name))
        place = np.full(len(cohort), -1, dtype=np.int64)
        place[having] = np.arange(len(having))
        maps_per_block = max(1, BLOCK_BYTES // bytes_of_a_map(cohort))
        blocks = _in_tasks(_read_map_block, cohort.address, list(chunks(having, maps_per_block)), name)
        _outcome([ready for _, ready in blocks])
        return cls(tuple(block for block, _ in blocks), maps_per_block, place)

    def of_row(self, row: int) -> Maps:
        """The map (X, Y, Z) of a row."""
        place = int(self.place[row])
        block = _mapped(self.blocks[place // self.maps_per_block])
        return cast("Maps", block[place % self.maps_per_block])


@dataclass(frozen=True)
class Resident:
    """A cohort in the object store, in blocks of consecutive rows; all workers on a node read the same memory.

    If a block is lost with its node, or evicted, its task reads it again when a worker asks for it.
    """

    references: tuple[ray.ObjectRef[Stored], ...]
    rows_per_block: int
    known: Moments
    """Moments (rows, C, 3) of the whole cohort."""
    maps: Mapping[str, ResidentMap] = field(default_factory=dict)

    @classmethod
    def of(cls, cohort: Cohort, maps: Sequence[str] = ()) -> Resident:
        """Read every volume once, in parallel, and these `maps`.

        Raises:
            UserError: a shard is damaged.
        """
        rows_per_block = max(1, BLOCK_BYTES // bytes_of_a_volume(cohort))
        blocks = list(chunks(np.arange(len(cohort)), rows_per_block))
        pairs = _in_tasks(_read_block, cohort.address, blocks)
        known = _outcome([moments for _, moments in pairs])
        held = {name: ResidentMap.of(cohort, name) for name in maps}
        return cls(tuple(block for block, _ in pairs), rows_per_block, np.concatenate(known), held)

    def read(self, rows: Rows, out: Stored | None = None, boxes: Boxes | None = None) -> Stored:
        """See `Volumes.read`."""
        return gather(
            [self._block(row // self.rows_per_block)[row % self.rows_per_block] for row in rows], out, boxes
        )

    def read_map(self, name: str, rows: Rows, out: Maps | None = None, boxes: Boxes | None = None) -> Maps:
        """See `Volumes.read_map`; the maps that are held."""
        held = self.maps.get(name)
        absent = next((row for row in rows.tolist() if held is None or held.place[row] < 0), None)
        if held is None or absent is not None:
            raise no_map(name, int(rows[0]) if absent is None else absent)
        return gather([held.of_row(row) for row in rows.tolist()], out, boxes)

    def moments(self, rows: Rows) -> Moments:
        """See `Volumes.moments`."""
        return self.known[rows]

    def _block(self, index: int) -> Stored:
        return _mapped(self.references[index])


def scan(cohort: Cohort, maps: Sequence[str] = ()) -> Moments:
    """Moments (rows, C, 3) of a cohort that does not stay in memory: one pass over its shards, in parallel.

    Every volume is compared with its checksum, and every one of these `maps`, so damage is found before the first trial
    begins.

    Raises:
        UserError: a shard is damaged.
    """
    rows_per_block = max(1, BLOCK_BYTES // bytes_of_a_volume(cohort))
    blocks = chunks(np.arange(len(cohort)), rows_per_block)
    names = list(maps)
    return np.concatenate(_outcome([_scan_block.remote(cohort.address, rows, names) for rows in blocks]))


def _in_tasks(task: Any, address: str, blocks: list[Rows], *more: str) -> list[list[ray.ObjectRef[Stored]]]:
    """(block, what else it gives) of every block, two tasks at a time for each CPU."""
    at_once = max(1, 2 * int(ray.cluster_resources().get("CPU", 1)))
    pairs: list[list[ray.ObjectRef[Stored]]] = []
    reading: list[ray.ObjectRef[Stored]] = []
    for rows in blocks:
        if len(reading) == at_once:
            _, reading = ray.wait(reading, num_returns=1)
        pairs.append(task.remote(address, rows, *more))
        reading.append(pairs[-1][1])
    return pairs


# Ray restores a lost block by running its task again, as often as needed. The task needs no CPU: the slots hold all
# CPUs by then, so a worker that asks for the block would wait for ever.
@ray.remote(num_cpus=0, num_returns=2, max_retries=-1, scheduling_strategy="SPREAD")
def _read_block(address: str, rows: Rows) -> tuple[Stored, Moments]:
    return read_with_moments(opened(address), rows)


@ray.remote(num_cpus=0, num_returns=2, max_retries=-1, scheduling_strategy="SPREAD")
def _read_map_block(address: str, rows: Rows, name: str) -> tuple[Maps, int]:
    return opened(address).read_map(name, rows), len(rows)


@ray.remote(num_cpus=0.5)
def _scan_block(address: str, rows: Rows, maps: list[str]) -> Moments:
    cohort = opened(address)
    for name in maps:
        cohort.read_map(name, rows[cohort.has_map(name)[rows]])
    return read_with_moments(cohort, rows)[1]


def _mapped(reference: ray.ObjectRef[Stored]) -> Stored:
    if reference not in _BLOCKS:
        _BLOCKS[reference] = ray.get(reference)
    return _BLOCKS[reference]


def _outcome(references: list[ray.ObjectRef[Any]]) -> list[Any]:
    """The results of the tasks; the UserError of a task is raised again as it was."""
    try:
        return ray.get(references)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, UserError) else error from None
