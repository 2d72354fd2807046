"""How much each setting matters for the value of a trial."""

from __future__ import annotations

import warnings

import numpy as np
import optuna
from optuna.trial import TrialState

from core.report.answer.record import NothingToShow, RunRecord


def importances_of(record: RunRecord) -> dict[str, float]:
    """The importance of each setting that every completed trial has, the greatest first.

    Raises:
        NothingToShow: there are not enough trials for fANOVA (Hutter et al., ICML 2014), or they do not differ.
    """
    if record.study is None:
        raise NothingToShow("the Optuna study is absent")
    completed = record.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(completed) < 2:
        raise NothingToShow(f"importance needs at least 2 completed trials; this run has {len(completed)}")
    if np.ptp([trial.values[0] for trial in completed]) == 0:
        raise NothingToShow("all completed trials have the same value, so no setting made a difference")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = optuna.importance.get_param_importances(
                record.study,
                evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0),
                target=lambda trial: trial.values[0],
            )
    except (RuntimeError, ValueError) as error:
        raise NothingToShow(f"Optuna cannot assess it: {error}") from None
    if not found:
        raise NothingToShow("no setting is shared by all trials, so their influence cannot be compared")
    return {name: float(value) for name, value in found.items()}


def unassessed_settings(record: RunRecord) -> list[str]:
    """The searched settings that act only in some trials; the importance leaves them out."""
    try:
        assessed = importances_of(record)
    except NothingToShow:
        return []
    return [name for name in record.searched() if name not in assessed]
