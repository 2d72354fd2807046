"""Ray, here or elsewhere, and how many slots of what size fit on it."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console

from core.errors import UserError
from distributed.run.quiet import quiet
from distributed.run.working_copy import address_of
from distributed.slots.slot import Workers

QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # our own TensorBoard callback says more
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ours tells an interruption from an early stop
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    # Slots keep a handful of processes that take no CPU; Ray's warning counts them against the cores.
    "RAY_worker_maximum_startup_concurrency": "8",
}
ANSWER_TIMEOUT_S = 10
PACKAGES_FOLDER = Path(__file__).parents[2]
"""The folder in which `core`, `distributed` and `search_spaces` lie."""
PATIENCE = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
"""Set (by cluster.yaml) where nodes come with the work: the seconds that this may take."""


@contextlib.contextmanager
def connect(address: str | None, console: Console) -> Iterator[None]:
    """Ray for the length of a command: the cluster at `address` or in RAY_ADDRESS, else this machine."""
    quiet()
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray").setLevel(logging.ERROR)
    where = address or os.environ.get("RAY_ADDRESS")
    if where and where.startswith("ray://"):
        # Ray Client pickles the whole Tuner to the head: study, display and interruption would stay behind.
        raise UserError(
            f"no sweep can be driven through {where}: use `ray job submit`, or HEAD_IP:PORT on one of its nodes"
        )
    if where:
        _check_answers(where)
    with console.status("starting Ray …" if where is None else f"connecting to Ray at {where} …"):
        try:
            # Ray puts the folder in which the driver is at this moment first on the path of every worker. The
            # user's own may hold a core.py. A submitted job has a folder of its own, which Ray prefers to this.
            with contextlib.chdir(PACKAGES_FOLDER):
                if where is None:
                    ray.init(
                        address="local",
                        include_dashboard=False,
                        log_to_driver=False,
                        logging_level=logging.ERROR,
                    )
                else:
                    ray.init(address=where, log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError as error:
            raise UserError(
                f"no Ray cluster at {where}, or its token (RAY_AUTH_MODE, ~/.ray/auth_token) is not yours: "
                f"{' '.join(str(error).split())[:160]}"
            ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(where: str) -> None:
    """Ask HEAD_IP:PORT for a connection: Ray would try for minutes."""
    host, _, port = where.rpartition(":")
    if not (host and port.isdigit()):
        return  # auto, local: Ray's to resolve
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
    """How many slots of what size; refuses what could never be scheduled (Ray would wait in silence).

    A worker lives on one node, so it is the nodes that count and not their sum: on a CPU head and two GPU
    nodes, a share of all CPUs may be more than any GPU node has.

    Args:
        slots: how many are wanted; as many as fit, but no more than `trials`, if None.
        workers: workers of each slot.
        gpus_per_worker: None means one where the cluster has any.
        trials: how many trials there are to run.
        console: where to say that nodes are awaited, on a cluster that grows (see `PATIENCE`).
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
    """How many workers of this size the nodes hold now, each on one node."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    almost = 1e-6  # 0.7 / 0.1 is a little less than 7
    return sum(
        int(min(node.get("CPU", 0) / cpus, node.get("GPU", 0) / gpus if gpus else float("inf")) + almost)
        for node in nodes
    )


def _await_nodes(workers: int, gpus: float, console: Console | None) -> None:
    """Have an autoscaling cluster grow to `workers`, at least one CPU each; no longer than `PATIENCE` allows."""
    patience = float(os.environ.get(PATIENCE, 0))
    if not patience:
        return
    if console is not None:
        console.print(f"waiting up to {patience:g} s for nodes with room for {workers} worker(s)")
    # A placement group is a request that the autoscaler answers; removed, it leaves the nodes to the slots.
    group = placement_group([{"CPU": 1.0} | ({"GPU": gpus} if gpus else {})] * workers)
    try:
        group.wait(timeout_seconds=patience)
    finally:
        remove_placement_group(group)


def check_shared(folder: Path) -> None:
    """Refuse a run folder that some node cannot see: its workers would write to a disk of their own.

    Raises:
        UserError: naming the node.
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
