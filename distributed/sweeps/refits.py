"""What follows a search in the same slots: the winner is measured again, and refits are judged on the hold-out."""

from __future__ import annotations

import shutil
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial

from core.config import Settings, merge, resolve
from core.run_names import LABEL, PENALTY, PUBLISHED, WEIGHTS
from distributed.run.assignment import Assignment, assign, read_progress
from distributed.run.folder import RunFolder
from distributed.run.working_copy import bring, send, set_aside
from distributed.search.study import best_trial, recorded_settings
from distributed.sweeps.baseline import best_baseline
from distributed.sweeps.looks import looks_of, record_look
from distributed.sweeps.request import SweepRequest
from distributed.sweeps.resolve import ResolvedSearch


def after_search(
    folder: RunFolder, request: SweepRequest, search: ResolvedSearch, study: optuna.Study
) -> list[Assignment]:
    """The assignments that follow the last trial, in order."""
    return repetitions(folder, request, search, study) + refits(folder, request, search, study)


def repetitions(
    folder: RunFolder, request: SweepRequest, search: ResolvedSearch, study: optuna.Study
) -> list[Assignment]:
    """Winner and published again on the folds of the search, with fresh seeds: luck does not repeat itself."""
    best = best_trial(study)
    if best is None or not request.confirm_cells:
        return []
    _set_aside_former_winner(folder, best.number)
    chosen = {"winner": recorded_settings(best, search.base)}
    if not _is_published(best):
        chosen["published"] = folder.about.settings
    made = []
    for method, settings in chosen.items():
        assignment = assign(
            folder.confirmed(method), settings, request.confirm_cells, prunable=False,
            metric=search.first, keep_model=method == "winner",
        )  # fmt: skip
        assignment["name"] = f"{method}-repeated"
        made.append(assignment)
    return made


def refits(
    folder: RunFolder, request: SweepRequest, search: ResolvedSearch, study: optuna.Study
) -> list[Assignment]:
    """The winner, the published configuration and the baselines of the task, each on all development subjects.

    Without a winner there is nothing to judge, so the held-out subjects stay unseen.
    """
    base, of_task = folder.about.settings, search.about
    tuned = best_baseline(folder, request, search.objectives)
    chosen: dict[str, Settings] = {PUBLISHED: base}
    if of_task.rival is not None:
        untuned = resolve(merge(base, of_task.rival.changes)).model_dump(mode="json")
        chosen[of_task.rival.folder] = untuned if tuned is None else recorded_settings(tuned, base)
    best = best_trial(study)
    if best is None:
        return []
    _set_aside_former_winner(folder, best.number)
    tuned_as = None if tuned is None else tuned.number
    if of_task.rival is not None:
        _set_aside_former_baseline(folder, of_task.rival.folder, tuned_as)
    record_look(folder, study, best.number, tuned_as)
    chosen = {"winner": recorded_settings(best, base)} | chosen
    published = next(
        (trial for trial in study.get_trials(deepcopy=False) if trial.user_attrs.get(LABEL) == PUBLISHED),
        None,
    )
    penalties = {
        method: trial.user_attrs.get(PENALTY)
        for method, trial in {"winner": best, "published": published}.items()
        if trial is not None
    }
    for rival in folder.about.task.starts:
        of_start = best_trial(study, rival.changes[WEIGHTS])
        if of_start is not None and of_start.number != best.number:
            chosen[rival.folder] = recorded_settings(of_start, base)
            penalties[rival.folder] = of_start.user_attrs.get(PENALTY)
        else:
            # It is the winner itself by now, or has no trial.
            _set_aside(folder.refit(rival.folder), f"{rival.folder}-was")
    if _is_published(best):
        # It would be trained twice, to the same last digit; see `share_refit`.
        del chosen[PUBLISHED]
    made = [
        assign(
            folder.refit(method),
            settings,
            request.refit_cells,
            metric=of_task.objectives[0],
            keep_model=True,
            penalty=penalties.get(method),
        )
        for method, settings in chosen.items()
    ]
    for baseline in (of_task.voxels, of_task.simplest):
        if baseline is not None:
            # Nothing in it is drawn but who is labelled, so without a budget one seed is enough.
            seeds = 1 if search.settings.data.labelled is None else None
            place, cells = folder.refit(baseline.folder), request.refit_cells[:seeds]
            made.append({**assign(place, base, cells, metric=of_task.objectives[0]), "on_voxels": True})
    return made


def share_refit(folder: RunFolder, study: optuna.Study) -> None:
    """The refit of the winner as that of the published configuration, where they are one."""
    best, winner, published = best_trial(study), folder.refit("winner"), folder.refit(PUBLISHED)
    is_there = read_progress(published)["answer"] is not None
    if best is None or not _is_published(best) or is_there or read_progress(winner)["answer"] is None:
        return
    # In one step: a kill must not leave half of it. The models are the winner's.
    fresh = published.with_name(f"{PUBLISHED}.new")
    for left in (fresh, published):
        shutil.rmtree(left, ignore_errors=True)
    shutil.copytree(winner, fresh, ignore=shutil.ignore_patterns("model-*"))
    fresh.rename(published)
    send(published)


def _is_published(trial: FrozenTrial) -> bool:
    return trial.user_attrs.get(LABEL) == PUBLISHED


def _set_aside_former_winner(folder: RunFolder, number: int) -> None:
    """A search that continued after its refits may have another winner: rename the folders of the former winner."""
    former = folder.about.refitted
    if former not in (None, number):
        for made in (folder.refit("winner"), folder.confirmed("winner")):
            _set_aside(made, f"winner-was-{former}")
    folder.update(refitted=number)


def _set_aside_former_baseline(folder: RunFolder, rival: str, number: int | None) -> None:
    """The same for the baseline, if its trials went on after a look at the hold-out."""
    looks = looks_of(folder)
    if looks and looks[-1].baseline != number:
        former = looks[-1].baseline
        _set_aside(folder.refit(rival), f"{rival}-was-{'untuned' if former is None else former}")


def _set_aside(made: Path, name: str) -> None:
    bring(made)
    if made.exists():
        set_aside(made, name)
