"""A cohort that is too large for memory: one Ray Data execution reads ahead of the training, in the plan's order.

    epochs ──▶ map_batches(plan: one line per read) ──▶ map_batches(read) ──▶ the worker that trains

The tasks ask for no CPU, because the slots hold all CPUs. Instead, the number of tasks at a time is set, and the
amount of data that they may have ready limits the memory. Each line of the table is one read of several batches. So a
shard is opened once for many volumes, and a block is never cut or joined: the worker maps it without a copy.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
from ray.data import DataContext, ExecutionResources, TaskPoolStrategy

from core.errors import UserError
from core.volumes.cohort.reader import Cohort, shape_of
from core.volumes.cohort.shards import VOLUMES, map_column
from distributed.batches.in_process import Direct, Stored, bytes_of_a_map, bytes_of_a_volume, opened
from distributed.batches.plan import Plan, boxes_of

READ_BYTES = 128 * 2**20
"""The aim for one read task: starting it and returning its block takes as long as reading 20 MB."""
PLAIN_READERS, OTHER_READERS = 1, 2
"""Read tasks at a time for each worker that trains. Plain local shards are read faster than they are delivered, so a
second process would only wait for the first; for shards that must be fetched or unpacked, two processes pay off."""
PLAN_BLOCKS = 50
"""The number of objects that the epochs are split into; Ray keeps them until Python collects its garbage."""
READS_AHEAD = 3
"""The number of reads, running or ready, that a stream may keep in the object store."""

_BUFFERS: dict[str, npt.NDArray[np.uint8]] = {}


class Streamed(NamedTuple):
    """One batch as it is stored."""

    volumes: Stored
    """(n, C, X, Y, Z)"""
    maps: dict[str, Stored]
    """(n, X, Y, Z) int16 each, by name."""


@dataclass(frozen=True)
class Streaming(Direct):
    """A cohort whose training batches are streamed; for all other passes the worker reads the shards itself."""

    def stream(self, plan: Plan, maps: Sequence[str] = ()) -> Iterator[Streamed]:
        """The volumes of every batch of `plan` and these `maps`, in order, as read-only views of shared memory.

        Closing this generator ends the execution and frees what was read ahead.

        Raises:
            UserError: a volume or a map is damaged; the message names the shard, the row and the subject.
        """
        cohort = opened(self.address)
        bytes_of_a_row = _bytes_of_a_row(cohort, plan, maps)
        rows_per_read = max(1, READ_BYTES // bytes_of_a_row)
        with DataContext.current(_context(READS_AHEAD * rows_per_read * bytes_of_a_row)):
            tables: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow"}
            # Read on the node where the volumes are needed.
            here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
            task: dict[str, Any] = tables | {"num_cpus": 0, "label_selector": here}
            # Not `from_arrow`: it measures its tables in tasks that would wait for a CPU.
            epochs = ray.data.from_items(
                [{"epoch": epoch} for epoch in plan.epochs],
                override_num_blocks=min(len(plan.epochs), PLAN_BLOCKS),
            )
            planned = epochs.map_batches(
                partial(_plan_reads, plan=plan, rows_per_read=rows_per_read),
                compute=TaskPoolStrategy(size=1),
                **task,
            )
            reads = planned.map_batches(
                partial(_read, address=self.address, maps=tuple(maps)),
                compute=TaskPoolStrategy(size=PLAIN_READERS if cohort.is_plain else OTHER_READERS),
                **task,
            )
            lines: Any = iter(reads.iter_batches(**tables, prefetch_batches=1))
        # Close the stream at once, and not when Python collects its garbage.
        with contextlib.closing(lines):
            for line in lines:
                yield from _batches_of(line, cohort, maps)


def _bytes_of_a_row(cohort: Cohort, plan: Plan, maps: Sequence[str]) -> int:
    """What one row of the plan needs in memory."""
    whole = bytes_of_a_volume(cohort) + len(maps) * bytes_of_a_map(cohort)
    if plan.cut is None:
        return whole
    box = shape_of(plan.cut(plan.rows[:1], 1)[0], cohort.description.shape)
    return max(1, whole * math.prod(box) // math.prod(cohort.description.shape))


def _context(memory: int) -> DataContext:
    """Options for Ray Data: keep the order, leave blocks as they are, use at most `memory` bytes, print nothing."""
    context = DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources(object_store_memory=memory)
    # Every line of a table becomes a block of its own.
    context.target_max_block_size = 1
    context.enable_progress_bars = False
    return context


def _plan_reads(epochs: pa.Table, plan: Plan, rows_per_read: int) -> Iterator[pa.Table]:
    for epoch in epochs["epoch"].to_pylist():
        yield plan.reads(epoch, rows_per_read)


def _read(line: pa.Table, address: str, maps: tuple[str, ...]) -> pa.Table:
    """The line with its volumes and maps as bytes: no conversion, and one copy into the object store.

    A damaged volume is reported as text, because Ray Data wraps an exception and loses its cause.
    """
    cohort, rows = opened(address), line["rows"][0].as_py()
    boxes, damage = boxes_of(line["boxes"][0].as_py()), None
    box = cohort.description.shape if boxes is None else shape_of(boxes, cohort.description.shape)
    channels = len(cohort.description.channels)
    read = {VOLUMES: _buffer(VOLUMES, (len(rows), channels, *box), cohort.description.dtype)}
    read |= {map_column(name): _buffer(map_column(name), (len(rows), *box), "int16") for name in maps}
    try:
        cohort.read_stored(rows, out=read[VOLUMES], boxes=boxes)
        for name in maps:
            cohort.read_map(name, rows, out=read[map_column(name)], boxes=boxes)
    except UserError as error:
        read, damage = {name: array[:0] for name, array in read.items()}, str(error)
    for name, array in read.items():
        buffers = [None, pa.py_buffer(np.array([0, array.nbytes])), pa.py_buffer(array)]
        line = line.append_column(name, pa.Array.from_buffers(pa.large_binary(), 1, buffers))
    return line.append_column("damage", pa.array([damage], pa.string()))


def _buffer(name: str, shape: tuple[int, ...], dtype: str) -> Stored:
    """Memory to read into, the same for every task of this process: new memory pages take longer than the reading.

    A task begins when the block of the task before it is in the object store, so this memory is no longer read.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if name not in _BUFFERS or len(_BUFFERS[name]) < size:
        _BUFFERS[name] = np.empty(size, np.uint8)
    return _BUFFERS[name][:size].view(dtype).reshape(shape)


def _batches_of(line: pa.Table, cohort: Cohort, maps: Sequence[str]) -> Iterator[Streamed]:
    """The batches of one read, as views of its block."""
    if damage := line["damage"][0].as_py():
        raise UserError(damage)
    sizes, boxes = line["sizes"][0].as_py(), boxes_of(line["boxes"][0].as_py())
    box = cohort.description.shape if boxes is None else shape_of(boxes, cohort.description.shape)
    bounds = np.cumsum(sizes)[:-1]

    def split(column: str, dtype: str, *of_one: int) -> list[Stored]:
        content = line[column].chunk(0).buffers()[2]
        return np.split(np.frombuffer(content, dtype).reshape(sum(sizes), *of_one), bounds)

    volumes = split(VOLUMES, cohort.description.dtype, len(cohort.description.channels), *box)
    of_maps = {name: split(map_column(name), "int16", *box) for name in maps}
    for place, several in enumerate(volumes):
        yield Streamed(several, {name: parts[place] for name, parts in of_maps.items()})
