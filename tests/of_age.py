"""Brain age for tests of the engine, which knows no task: its first objective, its settings, and what it judges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from core.config import resolve
from core.evaluation.probes import AgeProbe
from core.task_description import BRAIN_AGE
from core.tasks.brain_age import BrainAge
from core.tasks.task import JudgedCell, Judging, Observed, Outcome, Truth
from distributed.run import assignment
from distributed.search.searcher import Judgement
from search_spaces import published

MAE = {"mae": BRAIN_AGE.metrics["mae"]}
"""The objectives of an ordinary search."""
TASK = BrainAge()
SETTINGS = resolve(published("brain_age"))


def assign(
    folder: Path, settings: dict[str, Any], cells: list[dict[str, int]], **more: Any
) -> assignment.Assignment:
    """An assignment of a trial that is judged by its MAE."""
    return assignment.assign(folder, settings, cells, **{"metric": "mae", **more})


def objectives(*names: str) -> dict[str, Any]:
    """The objectives of these names."""
    return {name: BRAIN_AGE.objective(name) for name in names}


def judgement(*names: str, **more: Any) -> Judgement:
    """How a search judges its trials; by their MAE if no objective is named."""
    return Judgement(objectives(*names or ("mae",)), BRAIN_AGE.searchable, **more)


def observed(embeddings: Any, ages: Any, sites: Any, subjects: Any) -> Observed:
    """Scans (n,) as a model sees them."""
    return Observed(np.asarray(ages), np.asarray(sites), np.asarray(subjects), np.asarray(embeddings))


def judge(training: Observed, evaluation: Observed, **more: Any) -> Outcome:
    """The outcome of brain age."""
    return TASK.judge(SETTINGS, training, evaluation, Judging(**more))


def probe_of(outcome: Outcome) -> AgeProbe:
    """The probe that was fitted."""
    assert outcome.fitted is not None
    return AgeProbe.from_json(outcome.fitted)


def predicted_by(outcome: Outcome) -> Any:
    """The predicted ages (n,)."""
    return outcome.predictions["predicted"].to_numpy()


def judged_cell(fold: int, by_penalty: Any, ages: Any, subjects: Any, without: Any) -> JudgedCell:
    """A finished cell of scans (n,)."""
    truth = Truth(np.asarray(ages), np.full(len(ages), "a"), np.asarray(subjects))
    return JudgedCell(fold, truth, {"by_penalty": by_penalty, "without": without})


def judge_together(cells: list[JudgedCell]) -> list[tuple[dict[str, float], Any]]:
    """Metrics and predicted ages of every cell."""
    return [(metrics, table["predicted"].to_numpy()) for metrics, table in TASK.judge_together(cells)]
