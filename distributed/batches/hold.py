"""From the plan to the volumes: the rows of every batch become tensors on the device, one batch ahead.

    plan ──▶ resident, streaming or direct ──▶ read ahead ──▶ tensors

All modes give the same batches in the same order; they differ in speed and in what they need.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import ray
import torch

from core.errors import UserError
from core.volumes.cohort.reader import Boxes, Cohort
from distributed.batches.in_process import Direct, Stored, Volumes, bytes_of_a_cohort
from distributed.batches.mode import Mode
from distributed.batches.plan import Part, Plan
from distributed.batches.resident import Resident, scan
from distributed.batches.streaming import Streamed, Streaming


class Batch(NamedTuple):
    """What was read of a batch of scans, on the device."""

    volumes: torch.Tensor
    """(n, C, X, Y, Z) in the stored type."""
    maps: dict[str, torch.Tensor]
    """Maps of classes (n, X, Y, Z) int16 by name: those that were asked for."""


Batches = Generator[Batch, None, None]
"""A batch may be overwritten as soon as the next one is asked for, and the caller must not write to it. Closing the
generator ends the reading. A damaged volume is a UserError that names the shard, the row and the subject."""

OBJECT_STORE_SHARE = 0.6
"""Largest share of a node's object store that a resident cohort may fill; beyond it Ray would spill to disk."""


def hold(cohort: Cohort, mode: Mode = "auto", maps: Sequence[str] = ()) -> Volumes:
    """The volumes of a cohort and these of its `maps`, ready for the workers of a sweep.

    resident: read once into the object store. streaming: read by tasks of Ray Data while a trial trains.
    direct: read by a thread of the worker that trains. In all three modes every byte is read once here and compared
    with its checksum; this also gives the statistics that normalisation needs. auto: see `choose_mode`.

    Raises:
        UserError: a damaged shard, or a resident cohort that does not fit into the object store.
    """
    needed, room = bytes_of_a_cohort(cohort, maps), _room()
    if mode == "resident" and needed > room:
        raise UserError(
            f"a resident cohort of {needed / 1e9:.1f} GB does not fit: {OBJECT_STORE_SHARE:.0%} of the smallest "
            f"node's object store is {room / 1e9:.1f} GB; use streaming, or start Ray with a larger object store"
        )
    chosen = choose_mode(cohort, room, maps) if mode == "auto" else mode
    if chosen == "resident":
        return Resident.of(cohort, maps)
    return (Direct if chosen == "direct" else Streaming)(cohort.address, scan(cohort, maps))


def choose_mode(cohort: Cohort, room: float, maps: Sequence[str] = ()) -> Mode:
    """Resident if the cohort fits into `room` bytes; if not, direct for plain local shards, streaming for all others.

    A plain shard is read at the speed of memory, about twice as fast as a stream can deliver it (`benchmarks.data`).
    For shards that must be unpacked or fetched first, the additional processes of a stream pay off.
    """
    if bytes_of_a_cohort(cohort, maps) <= room:
        return "resident"
    return "direct" if cohort.is_plain else "streaming"


def batches(volumes: Volumes, plan: Plan, device: torch.device, maps: Sequence[str] = ()) -> Batches:
    """Every batch of `plan`, in order: from the stream if the volumes are streamed, otherwise from `read_ahead`."""
    if isinstance(volumes, Streaming):
        return _ahead(volumes.stream(plan, maps), device)
    return read_ahead(volumes, plan.parts(), device, maps)


def read_ahead(
    volumes: Volumes, parts: Iterable[Part], device: torch.device, maps: Sequence[str] = ()
) -> Batches:
    """The volumes of each of the `parts`; a thread reads the next part while the caller uses the last one."""
    return _ahead(_in_turn(volumes, parts, maps, pinned=device.type == "cuda"), device)


def _room() -> float:
    """Bytes that a resident cohort may use: every node with CPUs must be able to hold the whole cohort."""
    stores = [
        node["Resources"].get("object_store_memory", 0)
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU")
    ]
    return OBJECT_STORE_SHARE * min(stores, default=0)


def _in_turn(
    volumes: Volumes, parts: Iterable[Part], maps: Sequence[str], pinned: bool
) -> Iterator[Streamed]:
    """Part after part, in two sets of buffers that alternate: the caller uses one while the other is filled."""
    buffers: list[Streamed] = []
    for turn, (rows, boxes) in enumerate(parts):
        if len(buffers) < 2 or not _holds(buffers[turn % 2].volumes, len(rows), boxes):
            read = Streamed(
                volumes.read(rows, boxes=boxes),
                {name: volumes.read_map(name, rows, boxes=boxes) for name in maps},
            )
            if pinned:
                # The GPU copies from page-locked memory without the CPU.
                read = Streamed(_pin(read.volumes), {name: _pin(each) for name, each in read.maps.items()})
            buffers[turn % 2 : turn % 2 + 1] = [read]
            yield read
        else:
            into = buffers[turn % 2]
            yield Streamed(
                volumes.read(rows, into.volumes[: len(rows)], boxes),
                {name: volumes.read_map(name, rows, into.maps[name][: len(rows)], boxes) for name in maps},
            )


def _holds(buffer: Stored, rows: int, boxes: Boxes | None) -> bool:
    """Whether a buffer has room for so many rows, and their shape."""
    shape = buffer.shape[-3:] if not boxes else tuple(cut.stop - cut.start for cut in boxes[0])
    return len(buffer) >= rows and buffer.shape[-3:] == shape


def _pin(stored: Stored) -> Stored:
    return torch.from_numpy(stored).pin_memory().numpy()


def _ahead(source: Iterator[Streamed], device: torch.device) -> Batches:
    """The batches of `source` on `device`; a thread makes the next batch while the caller uses the last one."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def make() -> Batch | None:
        read = next(source, None)
        if read is None:
            return None
        tensors = [torch.from_numpy(each) for each in (read.volumes, *read.maps.values())]
        if stream is not None:
            # A stream of its own, so that the copy does not wait for the training steps.
            with torch.cuda.stream(stream):
                tensors = [tensor.to(device, non_blocking=True) for tensor in tensors]
            # After this the buffers may be filled again.
            stream.synchronize()
        return Batch(tensors[0], dict(zip(read.maps, tensors[1:], strict=True)))

    reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
    try:
        coming = reader.submit(make)
        while (batch := coming.result()) is not None:
            coming = reader.submit(make)
            if stream is not None:
                for tensor in (batch.volumes, *batch.maps.values()):
                    tensor.record_stream(torch.cuda.current_stream(device))
            yield batch
    finally:
        # The thread that runs a generator must also close it. There are no more threads if the process ends.
        with contextlib.suppress(RuntimeError):
            reader.submit(getattr(source, "close", lambda: None))
        reader.shutdown(wait=True)
