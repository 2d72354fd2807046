"""What a search can optimise: a metric of a cell's validation subjects, or the cost.

measure("mae", metrics) -> float          one cell
mean_of("openbhb_score", cells) -> float  one trial, the mean over its cells

Values keep their natural sign everywhere; `Metric.better` says whether low or high ones are better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from core.errors import UserError
from core.evaluation.site import openbhb_score
from core.lookup import look_up

Metrics = Mapping[str, float]
"""What judging a cell measured, by name."""
Better = Literal["low", "high"]


class Metric(BaseModel):
    """A number that says how good something is, in words for people."""

    model_config = ConfigDict(frozen=True, extra="allow")

    title: str
    """For the heading of a column: `MAE`."""
    unit: str = ""
    better: Better = "low"
    needs_sites: bool = False
    """Whether it is undefined if all subjects are of one site."""
    as_objective: str = ""
    """Its words as an objective of a search; `validation` and the title if empty."""

    @property
    def words(self) -> str:
        """As an objective of a search: `validation MAE`."""
        return self.as_objective or f"validation {self.title}"

    @property
    def label(self) -> str:
        """For axes and columns: `validation MAE (years)`."""
        return with_unit(self.words, self.unit)

    @property
    def heading(self) -> str:
        """For a column of results on other subjects: `MAE (years)`."""
        return with_unit(self.title, self.unit)

    @property
    def direction(self) -> Literal["minimize", "maximize"]:
        """As Optuna says it."""
        return "minimize" if self.better == "low" else "maximize"

    @property
    def sign(self) -> int:
        """A value multiplied by it is better if it is lower."""
        return 1 if self.better == "low" else -1

    def amount(self, number: str) -> str:
        """`number` with the unit."""
        return f"{number} {self.unit}".strip()


def with_unit(words: str, unit: str) -> str:
    """`words (unit)`; only the words if there is no unit."""
    return f"{words} ({unit})" if unit else words


OPENBHB = "openbhb_score"
COST = "accelerator_seconds"
COST_METRIC = Metric(title="cost", unit="accelerator-seconds", as_objective="cost")
"""The cost of a trial is known from its epochs: no task measures it."""

Objectives = Mapping[str, Metric]
"""What a search optimises, by name. The first one stops trials, and chooses the winner."""


def find_objectives(names: Sequence[str], metrics: Mapping[str, Metric], sites: int) -> dict[str, Metric]:
    """The objectives of these names, in their order.

    Args:
        names: of the metrics, or the cost.
        metrics: those that the task offers as objectives.
        sites: how many the cohort has.

    Raises:
        UserError: naming the objective, and the reason why it cannot be searched for.
    """
    known = {**metrics, COST: COST_METRIC}
    if not names:
        raise UserError(f"no objective is named; known: {', '.join(known)}")
    found: dict[str, Metric] = {}
    for name in names:
        metric = look_up(known, name, "objective")
        if name in found:
            raise UserError(f"objective '{name}' is named twice")
        if metric.needs_sites and sites < 2:
            raise UserError(
                f"objective '{name}' needs subjects of two sites or more; this cohort has {sites}"
            )
        found[name] = metric
    if names[0] == COST:
        raise UserError(
            f"'{COST}' cannot be the first objective: trials are stopped, and the winner is chosen, by the first"
        )
    return found


def measure(name: str, metrics: Metrics) -> float:
    """The objective `name` of one cell; NaN where it is undefined (site accuracy, if all subjects are of one site)."""
    if name == OPENBHB and name not in metrics and "site_balanced_accuracy" in metrics:
        # Versions before 0.3 did not keep it.
        accuracy = metrics["site_balanced_accuracy"]
        return openbhb_score(accuracy, metrics["mae"]) or math.nan
    if name not in metrics:
        raise ValueError(f"'{name}' is not measured on a cell")
    return float(metrics[name])


def mean_of(name: str, cells: Sequence[Metrics]) -> float:
    """The mean of objective `name` over `cells`; NaN without cells, or where one of them is undefined."""
    return float(np.mean([measure(name, cell) for cell in cells])) if cells else math.nan
