"""Ray on this machine or on a cluster, and the number and size of the slots that fit on it."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console

from core.errors import UserError
from distributed.run.allocator import keep_freed_memory
from distributed.run.quiet import quiet
from distributed.run.working_copy import address_of, own_folder
from distributed.slots.slot import Workers

QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Our own TensorBoard callback writes more.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # Our own handler distinguishes an interruption from an early stop.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    # Every slot has a few processes that use no CPU, but the warning of Ray compares their number with the cores.
    "RAY_worker_maximum_startup_concurrency": "8",
}
ANSWER_TIMEOUT_S = 10
TOKEN = "RAY_AUTH_TOKEN"
"""The variable with the token that protects a Ray cluster; workers inherit it."""
SOCKET = "/ray/session_2026-11-26_17-14-31_741148_1234567/sockets/plasma_store"
"""What Ray adds to its folder for the longest path of a socket."""
LONGEST_SOCKET = 107
"""Bytes that the path of a socket may have (Linux, sun_path)."""
PACKAGES_FOLDER = Path(__file__).parents[2]
"""The folder in which `core`, `distributed` and `search_spaces` lie."""
PATIENCE = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
"""The seconds that new nodes may take to start; cluster.yaml sets it, because its cluster grows on demand."""


@contextlib.contextmanager
def connect(address: str | None, console: Console) -> Iterator[None]:
    """Ray during a command: the cluster at `address` or in RAY_ADDRESS, or this machine if both are absent."""
    quiet()
    keep_freed_memory()
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray").setLevel(logging.ERROR)
    where = address or os.environ.get("RAY_ADDRESS")
    if where and where.startswith("ray://"):
        # Ray Client sends the whole Tuner to the head, but study, display and interruption stay on this machine.
        raise UserError(
            f"a sweep cannot be run through {where}; use `ray job submit`, or HEAD_IP:PORT on one of the nodes"
        )
    if where:
        _check_answers(where)
    with console.status("starting Ray …" if where is None else f"connecting to Ray at {where} …"):
        try:
            # Ray puts the current folder of the driver first on the path of every worker. The folder of the user may
            # contain a core.py. A submitted job has a folder of its own, which Ray puts before this one.
            with contextlib.chdir(PACKAGES_FOLDER):
                if where is None:
                    _ensure_token()
                    ray.init(
                        address="local",
                        include_dashboard=False,
                        log_to_driver=False,
                        logging_level=logging.ERROR,
                        _temp_dir=_short_folder(),
                    )
                else:
                    ray.init(address=where, log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError as error:
            raise UserError(
                f"no Ray cluster at {where}, or its token (RAY_AUTH_MODE, ~/.ray/auth_token) is not yours: "
                f"{' '.join(str(error).split())[:160]}"
            ) from None
        # What Ray raises has no common class: a machine that is too busy is a plain Exception.
        except Exception as error:
            raise UserError(
                f"Ray did not start{f' at {where}' if where else ''}: {' '.join(str(error).split())[:300]}; see that "
                f"there is room in memory and in {tempfile.gettempdir()} (TMPDIR gives Ray another folder), and try "
                "again when the machine is less busy"
            ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _ensure_token() -> None:
    """Give the Ray of this machine a token if it cannot keep one in ~/.ray, because HOME cannot be written."""
    if TOKEN in os.environ or f"{TOKEN}_PATH" in os.environ:
        return
    try:
        folder = Path("~/.ray").expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        can_keep = os.access(folder, os.W_OK) or (folder / "auth_token").exists()
    # A RuntimeError: a user id without a passwd entry, and no HOME.
    except (OSError, RuntimeError):
        can_keep = False
    if not can_keep:
        os.environ[TOKEN] = secrets.token_hex(32)


def _short_folder() -> str | None:
    """Another folder for the files of Ray if TMPDIR is too long for the paths of its sockets; None if it is not."""
    if len(tempfile.gettempdir()) + len(SOCKET) <= LONGEST_SOCKET:
        return None
    folder = Path("/tmp") / f"brainsweep-ray-{os.getuid()}"
    own_folder(folder, "TMPDIR")
    return str(folder)


def _check_answers(where: str) -> None:
    """Try to connect to HEAD_IP:PORT, because Ray itself would try for minutes."""
    host, _, port = where.rpartition(":")
    if not (host and port.isdigit()):
        # Ray itself resolves `auto` and `local`.
        return
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_TIMEOUT_S).close()
    except OSError as error:
        raise UserError(f"no Ray cluster at {where}: {error.strerror or error}") from None


def fit_slots(
    slots: int | None,
    workers: int,
    gpus_per_worker: float | None,
    trials: int,
    console: Console | None = None,
) -> tuple[Workers, int]:
    """The number of slots and their size.

    A worker runs on one node. So the resources of each node count, and not their sum: on a cluster of a CPU head and
    two GPU nodes, an equal share of all CPUs may be more than a GPU node has.

    Args:
        slots: how many are wanted; None means as many as fit, but not more than `trials`.
        workers: workers of each slot.
        gpus_per_worker: None means one if the cluster has GPUs.
        trials: the number of trials.
        console: where to print that new nodes are awaited, on a cluster that grows (see `PATIENCE`).

    Raises:
        UserError: the slots do not fit on the cluster; without this check Ray would wait without a message.
    """
    gpus = float(ray.cluster_resources().get("GPU", 0) > 0) if gpus_per_worker is None else gpus_per_worker
    if 0 < gpus < 1 < workers:
        raise UserError(f"gpus_per_worker={gpus:g} with {workers} workers: NCCL needs a whole GPU for each")
    if slots and slots * workers > _workers_that_fit(1, gpus):
        _await_nodes(slots * workers, gpus, console)
    possible = _workers_that_fit(1, gpus) // workers
    slots = slots or max(1, min(possible, trials))
    if slots > possible:
        resources = ray.cluster_resources()
        raise UserError(
            f"{slots} slot(s) of {workers} worker(s) with {gpus:g} GPU(s) each do not fit on "
            f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs; at most {possible} do"
        )
    cpus = 1
    while _workers_that_fit(cpus + 1, gpus) >= slots * workers:
        cpus += 1
    return Workers(workers, float(cpus), gpus), slots


def _workers_that_fit(cpus: float, gpus: float) -> int:
    """How many workers of this size fit on the nodes now, each on one node."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    # In floating point 0.7 / 0.1 is a little less than 7.
    almost = 1e-6
    return sum(
        int(min(node.get("CPU", 0) / cpus, node.get("GPU", 0) / gpus if gpus else float("inf")) + almost)
        for node in nodes
    )


def _await_nodes(workers: int, gpus: float, console: Console | None) -> None:
    """Let an autoscaling cluster grow until `workers` fit, at least one CPU each; wait as long as `PATIENCE` allows."""
    patience = float(os.environ.get(PATIENCE, 0))
    if not patience:
        return
    if console is not None:
        console.print(f"waiting up to {patience:g} s for nodes with room for {workers} worker(s)")
    # The autoscaler starts nodes for a placement group. After the group is removed, the slots use these nodes.
    group = placement_group([{"CPU": 1.0} | ({"GPU": gpus} if gpus else {})] * workers)
    try:
        group.wait(timeout_seconds=patience)
    finally:
        remove_placement_group(group)


def check_shared(folder: Path) -> None:
    """Refuse a run folder that a node cannot see: the workers on this node would write to their own disk.

    Raises:
        UserError: a node does not see the folder; the message names the node.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) == 1 or address_of(folder):
        return
    seen = {
        node["NodeManagerAddress"]: _sees.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(str(folder))
        for node in nodes
    }
    for address, answer in seen.items():
        if not ray.get(answer):
            raise UserError(
                f"node {address} does not see {folder}; put cohort and --out on storage that all nodes mount"
            )


@ray.remote(num_cpus=0)
def _sees(folder: str) -> bool:
    return Path(folder).is_dir()
