"""Ingest, and what is derived, on all cores: Ray Data runs the tasks, as many at a time as cores and memory allow."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ray
import ray.data
from ray.data import DataContext, TaskPoolStrategy

from core.errors import UserError
from core.volumes.cohort.writer import volume_bytes
from core.volumes.ingest.shards import ShardRecord, ShardTask, write_shard_of
from core.volumes.sources import Listing, Scan, read_image_geometry

PROCESS_BYTES = 500 * 2**20
"""The memory of a worker that has imported everything."""
BYTES_PER_VOXEL = 24
"""Peak memory to prepare one scan, per voxel of the larger of file and grid; 16 bytes were measured at 1 mm."""
SAMPLE = 64
"""The number of headers that are read to estimate the size of the scans."""
LARGE = 2 * 10**8
"""The number of voxels that one core prepares in about ten seconds, in which Ray could start twice."""

Row = dict[str, Any]
T = TypeVar("T")
R = TypeVar("R")


def in_parallel(tasks: Sequence[ShardTask]) -> Iterator[ShardRecord]:
    """A `Runner` for `core.volumes.ingest.ingest`; Ray must have been started.

    Each task uses one core with one thread and the memory of `task_bytes`. If the worker of a task dies, the task is
    run again. When a task fails, the other tasks either finish their shard or do not begin it. After the iterator is
    closed, no further task is started.

    Raises:
        UserError: of the first task that fails.
    """
    if tasks:
        yield from on_all_cores(write_shard_of, tasks, task_bytes(tasks))


def on_all_cores(function: Callable[[T], R], tasks: Sequence[T], memory: int) -> Iterator[R]:
    """What `function` gives for each task, in any order: each uses one core with one thread, and so many bytes.

    Raises:
        UserError: of the first task that fails.
    """
    rows = [{"task": pickle.dumps((function, task))} for task in tasks]
    context = DataContext.get_current().copy()
    # The caller shows the progress in shards; Ray Data would show blocks.
    context.enable_progress_bars = False
    with DataContext.current(context):
        outcomes = (
            ray.data.from_items(rows, override_num_blocks=len(rows))
            .map(
                _run,
                num_cpus=1,
                memory=memory,
                compute=TaskPoolStrategy(size=at_a_time(memory, len(tasks))),
            )
            .iter_rows()
        )
    for row in outcomes:
        if row["error"]:
            raise UserError(row["error"])
        yield pickle.loads(row["made"])


def pays(listing: Listing) -> bool:
    """Whether a listing is so large that Ray saves more time than its start takes."""
    voxels = [_voxels(scan) * len(scan.images) for scan in _sampled(listing.scans)]
    return sum(voxels) / max(len(voxels), 1) * len(listing.scans) > LARGE


def task_bytes(tasks: Sequence[ShardTask]) -> int:
    """An upper estimate of the memory of one task, from the headers of some of the images."""
    scans = [scan for task in tasks for scan in task.scans]
    grid = math.prod(tasks[0].description.shape)
    largest = max([grid, *(_voxels(scan) for scan in _sampled(scans))])
    shard = 2 * volume_bytes(tasks[0].description) * max(len(task.scans) for task in tasks)
    return PROCESS_BYTES + BYTES_PER_VOXEL * largest + shard


def _sampled(scans: Sequence[Scan]) -> Sequence[Scan]:
    return scans[:: max(1, math.ceil(len(scans) / SAMPLE))]


def _voxels(scan: Scan) -> int:
    try:
        return math.prod(read_image_geometry(scan.images[0])[0])
    except UserError:
        # Ingest will leave this scan out, with the reason.
        return 0


def at_a_time(memory: int, tasks: int) -> int:
    """The number of tasks at a time: one per core, if there is enough memory.

    Raises:
        UserError: no machine has the memory for one task.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    slots = [min(int(node.get("CPU", 0)), int(node.get("memory", 0) // memory)) for node in nodes]
    if not sum(slots):
        most = max((node.get("memory", 0) for node in nodes), default=0)
        raise UserError(
            f"preparing one of these scans takes about {memory / 2**30:.1f} GiB, but no machine with a free core "
            f"has more than {most / 2**30:.1f} GiB for it"
        )
    return min(sum(slots), tasks)


def _run(row: Row) -> Row:
    """Run one task. An error is returned as text, because Ray Data would print its traceback."""
    _use_one_thread()
    function, task = pickle.loads(row["task"])
    try:
        return {"made": pickle.dumps(function(task)), "error": ""}
    except UserError as error:
        return {"made": b"", "error": str(error)}


def _use_one_thread() -> None:
    """Every task has one core, so several threads of a task would only wait for one another."""
    import SimpleITK
    import torch

    os.environ["OMP_NUM_THREADS"] = "1"
    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    torch.set_num_threads(1)
