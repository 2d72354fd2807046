"""Ray, here or elsewhere, and how many slots of what size fit on it."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

import ray
from rich.console import Console

from core.errors import UserError
from distributed.slot import Workers

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


@contextlib.contextmanager
def connect(address: str | None, console: Console) -> Iterator[None]:
    """Ray for the length of a command: the cluster at `address` or in RAY_ADDRESS, else this machine."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray").setLevel(logging.ERROR)
    where = address or os.environ.get("RAY_ADDRESS")
    with console.status("starting Ray …" if where is None else f"connecting to Ray at {where} …"):
        try:
            if where is None:
                ray.init(
                    address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
                )
            else:
                ray.init(address=where, log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError as error:
            raise UserError(f"no Ray cluster at {where}: {' '.join(str(error).split())[:160]}") from None
    try:
        yield
    finally:
        ray.shutdown()


def plan_slots(
    slots: int | None, workers: int, gpus_per_worker: float | None, trials: int
) -> tuple[Workers, int]:
    """How many slots of what size; refuses what could never be scheduled (Ray would wait in silence).

    Args:
        slots: how many are wanted; as many as fit, but no more than `trials`, if None.
        workers: workers of each slot.
        gpus_per_worker: None means one where the cluster has any.
        trials: how many trials there are to run.
    """
    resources = ray.cluster_resources()
    cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
    per_worker = float(gpus > 0) if gpus_per_worker is None else gpus_per_worker
    if 0 < per_worker < 1 < workers:
        raise UserError(
            f"gpus_per_worker={per_worker:g} with {workers} workers: NCCL needs a whole GPU for each"
        )
    possible = int(min(cpus / workers, gpus / (per_worker * workers) if per_worker else cpus))
    slots = slots or max(1, min(possible, trials))
    if slots > possible:
        raise UserError(
            f"{slots} slot(s) of {workers} worker(s) with {per_worker:g} GPU(s) each do not fit on {cpus:g} CPUs "
            f"and {gpus:g} GPUs; at most {possible} do"
        )
    return Workers(workers, float(max(1, int(cpus // (slots * workers)))), per_worker), slots
