"""The plan, then the volumes: from the rows of every batch to tensors on the device, one batch ahead.

    plan ──▶ resident, streaming or direct ──▶ read ahead ──▶ tensors

All ways give the same batches in the same order; they differ in speed and in what they need.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import get_args

import ray
import torch

from core.errors import UserError
from core.lookup import look_up
from core.volumes.cohort.reader import Cohort
from distributed.batches.in_process import Direct, Stored, Volumes, bytes_of_a_volume
from distributed.batches.mode import Mode
from distributed.batches.plan import Plan, Rows
from distributed.batches.resident import Resident, scan
from distributed.batches.streaming import Streaming

Batches = Generator[torch.Tensor, None, None]
"""Tensors (n, C, X, Y, Z) in the stored type on the device. One may be overwritten once the one after it was
asked for, and none may be written to. Closing the generator ends the reading. A damaged volume is a UserError
that names shard, row and subject."""

OBJECT_STORE_SHARE = 0.6
"""Largest share of a node's object store that a resident cohort may fill; beyond it Ray would spill to disk."""


def checked_mode(name: str) -> Mode:
    """`name` as a mode; UserError if it is none."""
    known: dict[str, Mode] = {mode: mode for mode in get_args(Mode)}
    return look_up(known, name, "data mode")


def hold(cohort: Cohort, mode: Mode = "auto") -> Volumes:
    """The cohort made ready for the workers of a sweep.

    resident: read once into the object store. streaming: read by tasks of Ray Data while a trial trains.
    direct: read by a thread of the worker that trains. All three read every byte once here, and hold it
    against its checksum, for the statistics that normalisation needs. auto: see `choose_mode`.

    Raises:
        UserError: a damaged shard, an unknown mode, or a cohort that does not fit where it was told to stay.
    """
    mode = checked_mode(mode)
    needed, room = bytes_of_a_volume(cohort) * len(cohort), _room()
    if mode == "resident" and needed > room:
        raise UserError(
            f"a resident cohort of {needed / 1e9:.1f} GB does not fit: {OBJECT_STORE_SHARE:.0%} of the smallest "
            f"node's object store is {room / 1e9:.1f} GB; use streaming, or start Ray with a larger object store"
        )
    chosen = choose_mode(cohort, room) if mode == "auto" else mode
    if chosen == "resident":
        return Resident.of(cohort)
    return (Direct if chosen == "direct" else Streaming)(cohort.address, scan(cohort))


def choose_mode(cohort: Cohort, room: float) -> Mode:
    """Resident where `room` bytes are enough. Else direct for plain local shards, streaming for all others.

    A plain shard is read at the speed of memory, about twice as fast as a stream can hand it over
    (`benchmarks.data`). Shards that have to be unpacked or fetched first are worth the processes of a stream.
    """
    if bytes_of_a_volume(cohort) * len(cohort) <= room:
        return "resident"
    return "direct" if cohort.is_plain else "streaming"


def batches(volumes: Volumes, plan: Plan, device: torch.device) -> Batches:
    """Every batch of `plan`, in order: streamed where the volumes are, else as `read_ahead` gives them."""
    if isinstance(volumes, Streaming):
        return _ahead(volumes.stream(plan), device)
    return read_ahead(volumes, plan.batches(), device)


def read_ahead(volumes: Volumes, parts: Iterable[Rows], device: torch.device) -> Batches:
    """The volumes of each of the `parts`; a thread reads the next one while the last one is used."""
    return _ahead(_in_turn(volumes, parts, pinned=device.type == "cuda"), device)


def _room() -> float:
    """Bytes that a resident cohort may take: every node that works has to hold it whole."""
    stores = [
        node["Resources"].get("object_store_memory", 0)
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU")
    ]
    return OBJECT_STORE_SHARE * min(stores, default=0)


def _in_turn(volumes: Volumes, parts: Iterable[Rows], pinned: bool) -> Iterator[Stored]:
    """Part after part into two buffers in turn: one is used while the other is filled."""
    buffers: list[Stored] = []
    for turn, rows in enumerate(parts):
        if len(buffers) < 2 or len(buffers[turn % 2]) < len(rows):
            fresh = volumes.read(rows)
            if pinned:  # the GPU fetches from page-locked memory by itself
                fresh = torch.from_numpy(fresh).pin_memory().numpy()
            buffers[turn % 2 : turn % 2 + 1] = [fresh]
            yield fresh
        else:
            yield volumes.read(rows, out=buffers[turn % 2][: len(rows)])


def _ahead(source: Iterator[Stored], device: torch.device) -> Batches:
    """The batches of `source` on `device`; a thread makes the next one while the last one is used."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def make() -> torch.Tensor | None:
        stored = next(source, None)
        if stored is None:
            return None
        tensor = torch.from_numpy(stored)
        if stream is None:
            return tensor
        with torch.cuda.stream(stream):  # beside the training's own queue
            moved = tensor.to(device, non_blocking=True)
        stream.synchronize()  # the buffer may be filled again
        return moved

    reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
    try:
        coming = reader.submit(make)
        while (batch := coming.result()) is not None:
            coming = reader.submit(make)
            if stream is not None:
                batch.record_stream(torch.cuda.current_stream(device))
            yield batch
    finally:
        reader.submit(
            getattr(source, "close", lambda: None)
        )  # a generator is closed by the thread that runs it
        reader.shutdown(wait=True)
