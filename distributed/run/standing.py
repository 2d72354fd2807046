"""The state of a trial, from its epochs and its finished cells: the search and the schedulers decide by this answer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from core.objectives import mean_of, measure
from distributed.run.assignment import Answer, Assignment, CellRow, EpochRow, clock


def standing(
    assignment: Assignment, history: Sequence[EpochRow], finished: Sequence[CellRow], value: float
) -> Answer:
    """The state of a trial after an epoch.

    Args:
        assignment: of the trial.
        history: all its epochs.
        finished: its finished cells.
        value: the metric after the last epoch, NaN if it was not measured; it is the value of the trial until a cell is
            finished.
    """
    metric = assignment["metric"]
    values = [measure(metric, cell) for cell in finished]
    is_over = len(finished) == len(assignment["cells"])
    return clock(assignment, history) | Answer(
        name=assignment["name"],
        value=mean_of(metric, finished) if finished else value,
        sd=float(np.std(values, ddof=1)) if len(values) > 1 else math.nan,
        n=len(values),
        cells=list(finished),
        spent_seconds=assignment["spent_before"] + sum(row["spent_seconds"] for row in history),
        finished=is_over,
        done=is_over,
    )
