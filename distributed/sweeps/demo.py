"""The demonstration: how much of a search fits into a few minutes on this machine."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch

from core.config import merge, resolve
from core.tasks import find_task
from core.volumes.cohort.reader import Cohort
from distributed.batches.in_process import InMemory
from distributed.run.assignment import Cell
from distributed.sweeps.request import SweepRequest
from distributed.sweeps.resolve import splits_of
from distributed.training.loop import CellTraining
from distributed.training.subjects import Place, Subjects
from search_spaces import load_space

SECONDS = 180.0
START = 25.0
"""Seconds for the start of Ray and its workers, and for the report."""
COMPLETED = 4
"""Trials that are never stopped early, so that the leaderboard has something to compare."""
STOPPED_SHARE = 0.2
"""What a trial that is stopped early costs of a whole one, roughly."""
SHARED_CORES = 1.3
"""How much slower an epoch is when all cores are at work, roughly."""
SIZES = ((24, 12), (16, 12), (12, 10), (8, 8), (6, 6), (4, 6), (4, 4))
"""Numbers of trials and epochs, the most first."""
CHANGES = {"model.width": 0.25, "training.batch_size": 16, "objective.neighbours.step": 2}
"""An encoder a quarter as wide as the published one."""


@dataclass(frozen=True)
class Size:
    """A search that fits: its request, and how long it may take, in seconds."""

    request: SweepRequest
    seconds: float
    epoch: float
    """Seconds of an epoch in one slot."""


def size_of(epoch: float, slots: int) -> Size:
    """The largest search that fits into `SECONDS`, or the smallest one if none does.

    Args:
        epoch: seconds of an epoch in one slot.
        slots: trials at a time.
    """
    for trials, epochs in SIZES:
        request = SweepRequest(
            trials=trials, folds=3, refit_seeds=2, startup_trials=COMPLETED,
            changes={**CHANGES, "training.epochs": epochs},
        )  # fmt: skip
        whole = len(request.cells) * epochs
        # Three methods are refitted, on half as many subjects again as a fold of three leaves.
        refits = 3 * request.refit_seeds * epochs * 1.5
        stopped = STOPPED_SHARE * whole * (trials - COMPLETED)
        seconds = START + (COMPLETED * whole + stopped + refits) * epoch * SHARED_CORES / slots
        if seconds <= SECONDS:
            break
    return Size(request, seconds, epoch)


def measure_epoch(cohort: Cohort) -> float:
    """Seconds of an epoch of the published configuration in one slot, measured in this process on one core."""
    request = SweepRequest(folds=3, changes={**CHANGES, "training.epochs": SIZES[0][1]})
    settings = resolve(merge(load_space(request.space_name)[1], request.changes))
    by = find_task(settings.task).balanced_by(settings)
    subjects = Subjects.of(cohort, splits_of(request, cohort.manifest, by), InMemory.of(cohort))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        training = CellTraining(settings, subjects, Cell(0, 0), Place())
        # The first epoch warms up.
        training.run_epoch()
        started = time.perf_counter()
        training.run_epoch()
        training.judge()
        training.close()
        return time.perf_counter() - started
    finally:
        torch.set_num_threads(threads)


def slots_here() -> int:
    """How many trials run at a time on this machine."""
    return len(os.sched_getaffinity(0))
