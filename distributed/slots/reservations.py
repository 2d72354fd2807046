"""CPUs and GPUs that stay reserved after a slot is killed, and how the next slot gets them back.

Ray Train reserves the resources of a slot as a placement group. When the process of the slot is killed, its controller
and its workers end with it, but Ray keeps the group as long as the job lives. Then the next slot waits for ever for
resources that are not used. This happens when the machine runs out of memory: Ray ends several processes at once,
among them one that the controller needs to release its group. Train starts an actor for this case
(PlacementGroupCleaner, ray-project/ray#58515). The actor asks the State API of the dashboard, and does nothing if the
API does not answer, as in a Ray without a dashboard (2.60). So every group is recorded in the folder of the run, with
the process it belongs to.
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
    """A process, identified on all machines, and one of the worker groups that it has one after another."""

    process: int
    began: float
    """Seconds since 1970."""
    node: str
    """The id that Ray gives the node."""
    group: str


def holder(group: str) -> Holder:
    """This process as the holder of `group`."""
    node = ray.get_runtime_context().get_node_id()
    return Holder(process=os.getpid(), began=psutil.Process().create_time(), node=node, group=group)


def record(folder: Path, held_by: Holder) -> None:
    """Record the placement group of the calling worker, for the slot `held_by` (see `holder`)."""
    group = get_current_placement_group()
    if group is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / f"{group.id.hex()}.json", json.dumps(held_by))


def release_left(folder: Path) -> int:
    """Remove the recorded placement groups whose slot was on this node and has ended; returns how many were removed."""
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
    """Remove the placement group of `held_by`, if it still exists; its workers have ended."""
    for file in folder.glob("*.json"):
        # Another slot may have removed the group and its file just now.
        with contextlib.suppress(FileNotFoundError):
            if json.loads(file.read_text()) == held_by:
                _remove(file)
                file.unlink()


def _remove(file: Path) -> None:
    remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(file.stem))))


def somebody_waits() -> bool:
    """Whether a placement group of this cluster, of this sweep or of another one, waits for CPUs or GPUs."""
    groups = placement_group_table().values()
    return any(group["state"] in ("PENDING", "RESCHEDULING") for group in groups)


def _lives(held_by: Holder) -> bool:
    try:
        process = psutil.Process(held_by["process"])
        began: float = process.create_time()
        return process.status() != psutil.STATUS_ZOMBIE and abs(began - held_by["began"]) < 1
    except psutil.NoSuchProcess:
        return False
