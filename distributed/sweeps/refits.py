"""What follows a search in the same slots: the winner is measured again, and refits are judged on the hold-out."""

from __future__ import annotations

import json
from pathlib import Path

import optuna

from core.config import merge, resolve
from core.run_names import LABEL, PENALTY, PUBLISHED, SETTINGS
from distributed.run.assignment import Assignment, assign
from distributed.run.folder import RunFolder
from distributed.run.working_copy import bring, set_aside
from distributed.search.study import best_trial
from distributed.sweeps.baseline import best_baseline
from distributed.sweeps.looks import looks_of, record_look
from distributed.sweeps.request import SweepRequest


def after_search(folder: RunFolder, request: SweepRequest, study: optuna.Study) -> list[Assignment]:
    """The assignments that follow the last trial, in order."""
    return repetitions(folder, request, study) + refits(folder, request, study)


def repetitions(folder: RunFolder, request: SweepRequest, study: optuna.Study) -> list[Assignment]:
    """Winner and published again on the folds of the search, with fresh seeds: luck does not repeat itself."""
    best = best_trial(study)
    if best is None or not request.confirm_cells:
        return []
    _set_aside_former_winner(folder, best.number)
    chosen = {"winner": json.loads(best.user_attrs[SETTINGS])}
    if best.user_attrs.get(LABEL) != PUBLISHED:
        chosen["published"] = folder.about.settings
    made = []
    for method, settings in chosen.items():
        assignment = assign(
            folder.confirmed(method), settings, request.confirm_cells, prunable=False,
            metric=request.objectives[0],
        )  # fmt: skip
        assignment["name"] = f"{method}-repeated"
        made.append(assignment)
    return made


def refits(folder: RunFolder, request: SweepRequest, study: optuna.Study) -> list[Assignment]:
    """The winner, the published configuration and the L1 baseline, each on all development subjects.

    Without a winner there is nothing to judge, so the held-out subjects stay unseen.
    """
    base, tuned = folder.about.settings, best_baseline(folder, request)
    chosen = {
        "published": base,
        "l1": resolve(merge(base, {"objective.name": "l1"})).model_dump(mode="json")
        if tuned is None
        else json.loads(tuned.user_attrs[SETTINGS]),
    }
    best = best_trial(study)
    if best is None:
        return []
    _set_aside_former_winner(folder, best.number)
    baseline = None if tuned is None else tuned.number
    _set_aside_former_baseline(folder, baseline)
    record_look(folder, study, best.number, baseline)
    chosen = {"winner": json.loads(best.user_attrs[SETTINGS])} | chosen
    published = next(
        (trial for trial in study.get_trials(deepcopy=False) if trial.user_attrs.get(LABEL) == PUBLISHED),
        None,
    )
    penalties = {
        method: trial.user_attrs.get(PENALTY)
        for method, trial in {"winner": best, "published": published}.items()
        if trial is not None
    }
    return [
        assign(
            folder.refit(method),
            settings,
            request.refit_cells,
            keep_model=True,
            penalty=penalties.get(method),
        )
        for method, settings in chosen.items()
    ]


def _set_aside_former_winner(folder: RunFolder, number: int) -> None:
    """A search that continued after its refits may have another winner: rename the folders of the former winner."""
    former = folder.about.refitted
    if former not in (None, number):
        for made in (folder.refit("winner"), folder.confirmed("winner")):
            _set_aside(made, f"winner-was-{former}")
    folder.update(refitted=number)


def _set_aside_former_baseline(folder: RunFolder, number: int | None) -> None:
    """The same for the L1 baseline, if its trials went on after a look at the hold-out."""
    looks = looks_of(folder)
    if looks and looks[-1].baseline != number:
        former = looks[-1].baseline
        _set_aside(folder.refit("l1"), f"l1-was-{'untuned' if former is None else former}")


def _set_aside(made: Path, name: str) -> None:
    bring(made)
    if made.exists():
        set_aside(made, name)
