"""Ingest on all cores: Ray Data runs the shard tasks, as many at a time as cores and memory allow."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import ray
import ray.data
from ray.data import DataContext, TaskPoolStrategy

from core.errors import UserError
from core.volumes.ingest.cohort import volume_bytes
from core.volumes.ingest.shards import ShardRecord, ShardTask, write_shard_of
from core.volumes.sources import Listing, Scan, read_image_geometry

PROCESS_BYTES = 500 * 2**20
"""What a worker holds once it has imported everything."""
BYTES_PER_VOXEL = 24
"""Peak of preparing one scan, per voxel of the larger of file and grid; 16 were measured at 1 mm."""
SAMPLE = 64
"""How many headers are looked at to learn how large scans are."""
LARGE = 2 * 10**8
"""Voxels that one core prepares in the ten seconds or so that Ray needs to start twice."""

Row = dict[str, Any]


def in_parallel(tasks: Sequence[ShardTask]) -> Iterator[ShardRecord]:
    """A `Runner` for `core.volumes.ingest.ingest`; Ray must have been started.

    Each task takes one core with one thread and the memory of `task_bytes`. A task whose worker dies is run
    again. Raises the first task's UserError; shards that are being written meanwhile are finished or not
    begun. Where the iterator is closed, no further task is started.
    """
    if not tasks:
        return
    memory = task_bytes(tasks)
    rows = [{"task": pickle.dumps(task)} for task in tasks]
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False  # the caller shows shards, not blocks
    with DataContext.current(context):
        outcomes = (
            ray.data.from_items(rows, override_num_blocks=len(rows))
            .map(
                _write,
                num_cpus=1,
                memory=memory,
                compute=TaskPoolStrategy(size=at_a_time(memory, len(tasks))),
            )
            .iter_rows()
        )
    for row in outcomes:
        if row["error"]:
            raise UserError(row["error"])
        yield pickle.loads(row["record"])


def pays(listing: Listing) -> bool:
    """Whether a listing is so large that starting Ray for it is made up for; else ingest in this process."""
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
        return 0  # it will be left out, with its reason


def at_a_time(memory: int, tasks: int) -> int:
    """How many tasks run at once: one per core, as far as memory goes.

    Raises:
        UserError: no machine has the memory for a single one.
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


def _write(row: Row) -> Row:
    """Run one task; an error travels as text, because Ray Data would print a traceback of it."""
    _use_one_thread()
    try:
        return {"record": pickle.dumps(write_shard_of(pickle.loads(row["task"]))), "error": ""}
    except UserError as error:
        return {"record": b"", "error": str(error)}


def _use_one_thread() -> None:
    """Tasks share the cores one each; threads of their own would only wait for one another."""
    import SimpleITK
    import torch

    os.environ["OMP_NUM_THREADS"] = "1"
    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    torch.set_num_threads(1)
