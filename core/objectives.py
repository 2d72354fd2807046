"""What a search can minimise: a metric of a cell's validation subjects, or the cost. Less is better for each.

measure("mae", metrics) -> float          one cell
mean_of("openbhb_score", cells) -> float  one trial, the mean over its cells
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from core.errors import UserError
from core.evaluation.site import openbhb_score
from core.lookup import look_up

Metrics = Mapping[str, float]
"""What judging a cell measured: mae, r2, site_balanced_accuracy, …"""


@dataclass(frozen=True)
class Objective:
    """One thing to minimise. `of` reads it from a cell's metrics; None if it is not measured on a cell."""

    words: str
    unit: str
    of: Callable[[Metrics], float] | None
    needs_sites: bool = False

    def amount(self, number: str) -> str:
        """`number` with the unit."""
        return f"{number} {self.unit}".strip()

    @property
    def label(self) -> str:
        """For axes and columns: `validation MAE (years)`."""
        return f"{self.words} ({self.unit})" if self.unit else self.words


def _openbhb(metrics: Metrics) -> float:
    """The challenge takes the MAE on sites that training never saw; here all folds share their sites."""
    score = openbhb_score(metrics["site_balanced_accuracy"], metrics["mae"])
    return math.nan if score is None else score


COST = "accelerator_seconds"
OBJECTIVES: dict[str, Objective] = {
    "mae": Objective("validation MAE", "years", lambda metrics: metrics["mae"]),
    "site_balanced_accuracy": Objective(
        "site balanced accuracy", "", lambda metrics: metrics["site_balanced_accuracy"], needs_sites=True
    ),
    "openbhb_score": Objective(
        "site balanced accuracy ** 0.3 · validation MAE", "years", _openbhb, needs_sites=True
    ),
    COST: Objective("cost", "accelerator-seconds", None),
}


def check_objectives(names: Sequence[str], sites: int) -> None:
    """Refuse objectives that cannot be searched for together, or not on a cohort of so many `sites`.

    The first objective is the one that trials are stopped by and the winner is chosen by, so it is measured on
    subjects.

    Raises:
        UserError: naming the objective and the reason.
    """
    if not names:
        raise UserError(f"no objective is named; known: {', '.join(OBJECTIVES)}")
    for place, name in enumerate(names):
        objective = look_up(OBJECTIVES, name, "objective")
        if name in names[:place]:
            raise UserError(f"objective '{name}' is named twice")
        if objective.needs_sites and sites < 2:
            raise UserError(
                f"objective '{name}' needs subjects of two sites or more; this cohort has {sites}"
            )
    if OBJECTIVES[names[0]].of is None:
        raise UserError(
            f"'{names[0]}' cannot be the first objective: trials are stopped, and the winner is chosen, by the first"
        )


def measure(name: str, metrics: Metrics) -> float:
    """The objective `name` of one cell; NaN where it is undefined (site accuracy, if all subjects are of one site)."""
    of = OBJECTIVES[name].of
    if of is None:
        raise ValueError(f"'{name}' is not measured on a cell")
    return float(of(metrics))


def mean_of(name: str, cells: Sequence[Metrics]) -> float:
    """The mean of objective `name` over `cells`; NaN without cells, or where one of them is undefined."""
    return float(np.mean([measure(name, cell) for cell in cells])) if cells else math.nan
