"""CPUs and GPUs that a killed slot leaves reserved, and how the next slot gets them back.

Ray Train reserves the workers of a slot as a placement group. When the slot's process is killed, its controller and
its workers end with it, but Ray keeps the group for as long as the job lives, and the next slot waits for ever for
what nobody uses. So it is when the machine runs out of memory: Ray ends several processes at once, among them one
that the controller needs for giving back what it holds. Train starts an actor against that (PlacementGroupCleaner,
ray-project/ray#58515), which asks the dashboard's State API and does nothing where that does not answer, as in a Ray
without a dashboard (2.60). So every group is recorded in the run's folder with the process it belongs to.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import TypedDict

import psutil
import ray
from ray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    placement_group_table,
    remove_placement_group,
)

from core.files.writing import write_text


class Holder(TypedDict):
    """A process as no other is called, and a name of its worker group among those that it has one after another."""

    process: int
    began: float
    """Seconds since 1970."""
    node: str
    """Ray's name of it."""
    group: str


def holder(group: str) -> Holder:
    """This process as the holder of `group`."""
    node = ray.get_runtime_context().get_node_id()
    return Holder(process=os.getpid(), began=psutil.Process().create_time(), node=node, group=group)


def record(folder: Path, held_by: Holder) -> None:
    """Note the placement group that the calling worker runs in, for the slot `held_by` (see `holder`)."""
    group = get_current_placement_group()
    if group is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / f"{group.id.hex()}.json", json.dumps(held_by))


def release_left(folder: Path) -> int:
    """Remove the placement groups recorded in `folder` whose slot lived on this node and is dead; returns how many."""
    released, there = 0, placement_group_table()
    here = ray.get_runtime_context().get_node_id()
    for file in sorted(folder.glob("*.json")):
        held_by = json.loads(file.read_text())
        known = there.get(file.stem, {}).get("state", "REMOVED") != "REMOVED"
        if known and (held_by["node"] != here or _lives(held_by)):
            continue
        if known:
            _remove(file)
            released += 1
        file.unlink(missing_ok=True)
    return released


def release(folder: Path, held_by: Holder) -> None:
    """Remove what `held_by` has reserved, should it still be: its workers have ended."""
    for file in folder.glob("*.json"):
        with contextlib.suppress(FileNotFoundError):  # another slot has just dealt with it
            if json.loads(file.read_text()) == held_by:
                _remove(file)
                file.unlink()


def _remove(file: Path) -> None:
    remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(file.stem))))


def somebody_waits() -> bool:
    """Whether any placement group of this cluster, of this sweep or another's, waits for CPUs or GPUs."""
    groups = placement_group_table().values()
    return any(group["state"] in ("PENDING", "RESCHEDULING") for group in groups)


def _lives(held_by: Holder) -> bool:
    try:
        process = psutil.Process(held_by["process"])
        began: float = process.create_time()
        return process.status() != psutil.STATUS_ZOMBIE and abs(began - held_by["began"]) < 1
    except psutil.NoSuchProcess:
        return False
