"""A cohort that is too large for memory: one Ray Data execution reads ahead of the training, in the plan's order.

    epochs ──▶ map_batches(plan: one line per read) ──▶ map_batches(read) ──▶ the worker that trains

The tasks ask for no CPU, because the slots hold all CPUs. Instead, the number of tasks at a time is set, and the
amount of data that they may have ready limits the memory. Each line of the table is one read of several batches. So a
shard is opened once for many volumes, and a block is never cut or joined: the worker maps it without a copy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
from ray.data import DataContext, ExecutionResources, TaskPoolStrategy

from core.errors import UserError
from core.volumes.cohort.reader import Cohort
from distributed.batches.in_process import Direct, Stored, bytes_of_a_volume, opened
from distributed.batches.plan import Plan

READ_BYTES = 128 * 2**20
"""The aim for one read task: starting it and returning its block takes as long as reading 20 MB."""
PLAIN_READERS, OTHER_READERS = 1, 2
"""Read tasks at a time for each worker that trains. Plain local shards are read faster than they are delivered, so a
second process would only wait for the first; for shards that must be fetched or unpacked, two processes pay off."""
PLAN_BLOCKS = 50
"""The number of objects that the epochs are split into; Ray keeps them until Python collects its garbage."""
READS_AHEAD = 3
"""The number of reads, running or ready, that a stream may keep in the object store."""

_BUFFERS: dict[tuple[str, str], Stored] = {}


@dataclass(frozen=True)
class Streaming(Direct):
    """A cohort whose training batches are streamed; for all other passes the worker reads the shards itself."""

    def stream(self, plan: Plan) -> Iterator[Stored]:
        """The volumes of every batch of `plan`, in order, as read-only views of shared memory.

        Closing this generator ends the execution and frees what was read ahead.

        Raises:
            UserError: a volume is damaged; the message names the shard, the row and the subject.
        """
        cohort = opened(self.address)
        rows_per_read = max(1, READ_BYTES // bytes_of_a_volume(cohort))
        shape, dtype = cohort.volume_shape, np.dtype(cohort.description.dtype)
        with DataContext.current(_context(READS_AHEAD * rows_per_read * bytes_of_a_volume(cohort))):
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
                partial(_read, address=self.address),
                compute=TaskPoolStrategy(size=PLAIN_READERS if cohort.is_plain else OTHER_READERS),
                **task,
            )
            lines: Any = iter(reads.iter_batches(**tables, prefetch_batches=1))
        # Close the stream at once, and not when Python collects its garbage.
        with contextlib.closing(lines):
            for line in lines:
                yield from _batches_of(line, shape, dtype)


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


def _read(line: pa.Table, address: str) -> pa.Table:
    """The line with its volumes as bytes: no conversion, and one copy into the object store.

    A damaged volume is reported as text, because Ray Data wraps an exception and loses its cause.
    """
    rows, damage = line["rows"][0].as_py(), None
    volumes: npt.NDArray[np.generic]
    try:
        volumes = opened(address).read_stored(rows, out=_buffer(opened(address), len(rows)))
    except UserError as error:
        volumes, damage = np.empty(0, np.float32), str(error)
    bounds = np.array([0, volumes.nbytes])
    buffers = [None, pa.py_buffer(bounds), pa.py_buffer(volumes)]
    line = line.append_column("volumes", pa.Array.from_buffers(pa.large_binary(), 1, buffers))
    return line.append_column("damage", pa.array([damage], pa.string()))


def _buffer(cohort: Cohort, volumes: int) -> Stored:
    """Memory to read into, the same for every task of this process: new memory pages take longer than the reading.

    A task begins when the block of the task before it is in the object store, so this memory is no longer read.
    """
    key = (cohort.address, cohort.description.hash)
    if key not in _BUFFERS or len(_BUFFERS[key]) < volumes:
        _BUFFERS.clear()
        _BUFFERS[key] = np.empty((volumes, *cohort.volume_shape), cohort.description.dtype)
    return _BUFFERS[key][:volumes]


def _batches_of(line: pa.Table, shape: tuple[int, ...], dtype: np.dtype) -> Iterator[Stored]:
    """The batches of one read, as views of its block."""
    if damage := line["damage"][0].as_py():
        raise UserError(damage)
    content = line["volumes"].chunk(0).buffers()[2]
    volumes = np.frombuffer(content, dtype).reshape(-1, *shape)
    bounds = np.cumsum(line["sizes"][0].as_py())[:-1]
    yield from np.split(volumes, bounds)
