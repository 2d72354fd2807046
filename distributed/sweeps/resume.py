"""Continue a sweep that was interrupted, or change it: more trials, or another space."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import optuna
from optuna.trial import TrialState
from pydantic import ValidationError
from rich.console import Console

from core.errors import UserError
from core.evaluation.splits import Splits
from core.files.tables import read_table
from core.files.writing import writing_to
from core.run_description import SearchChange
from core.run_names import BASELINE, CONFIRMED, PROGRESS, REFITS, SPLITS, STUDY, TRIALS
from core.volumes.cohort.reader import Cohort
from distributed.run.assignment import read_progress
from distributed.run.code import code_version, describe_code
from distributed.run.folder import RunFolder, cohort_of, now, open_run
from distributed.run.journal import copy_of, mend_journal
from distributed.run.quiet import quiet
from distributed.run.trust import check_trusted
from distributed.run.working_copy import DAMAGED, bring_run, forget, run_as_typed
from distributed.search.population_methods import POPULATIONS
from distributed.search.samplers import GRID
from distributed.search.study import carry_over, open_study, trials_begun
from distributed.sweeps.baseline import baseline_finished
from distributed.sweeps.launch import check_place, check_subjects
from distributed.sweeps.looks import looks_of, tell_looks
from distributed.sweeps.request import ResumeRequest, SweepRequest
from distributed.sweeps.resolve import resolve_search, splits_of
from distributed.sweeps.sweep import Shared, Sweep, held
from search_spaces import fixed_by

CHANGE = "--change-search"
NO_CHANGES = {"cohort", "time_budget", "accelerator_hours", "trust_space"}
"""What a `ResumeRequest` asks that does not change the search."""

Searched = dict[str, list[str]]
"""Every searched setting, and the distributions that it has in parts of the space; see `Profile.as_json`."""


def resume_sweep(
    run: Path,
    asked: ResumeRequest,
    address: str | None,
    console: Console,
    shared: Shared | None = None,
) -> RunFolder:
    """Continue a sweep: unfinished trials first, each from its last epoch. One that has not begun begins.

    Args:
        run: the folder of the run.
        asked: what changes from now on.
        address: the address of a Ray cluster; this machine if None.
        console: where to print the progress.
        shared: what a nested search gives to its sweeps.

    Raises:
        UserError: the cohort or the splits are others, or the search changed without `change_search`.
    """
    quiet()
    bring_run(run, console)
    folder = open_run(run)
    # Lock the folder before the study is read, because the trials of a running sweep look interrupted, and a sweep that
    # is just beginning looks stopped.
    with held(folder, console):
        about = folder.about
        recorded = as_request(about.sweep)
        request = _combined(recorded, asked)
        for mended in mend_journal(folder.journal):
            console.print(f"note: {mended}", highlight=False, soft_wrap=True)
        _mend_progress(folder, console)
        check_place(run, request)
        # Before anything is written: run.json would be a file of ours then, whoever wrote it.
        space = recorded.space_name if asked.space is None else None
        check_trusted(folder, space, console, is_trusted=asked.trust_space)
        if asked.accelerator_hours is not None:
            # They are those of the whole run, so later sessions have them, too.
            kept = recorded.model_copy(update={"accelerator_hours": asked.accelerator_hours})
            folder.update(sweep=kept.model_dump(mode="json"))
        cohort = cohort_of(folder, asked.cohort)
        search = resolve_search(request, cohort, about.settings)
        if not about.begun:
            _forget_beginning(folder, asked)
            splits = check_subjects(request, search, cohort)
        else:
            by = search.task.balanced_by(search.settings)
            splits = same_splits(
                folder, splits_of(request, cohort.manifest, by, folder.path / SPLITS), cohort
            )
        study = open_study(
            folder.journal, request.sampler, request.search_seed, search.objectives, about.study
        )
        sweep = Sweep(folder, request, search, cohort, splits, study, console, address, shared)
        if not about.begun:
            return sweep.begin().execute()
        changed = _what_changed(recorded, request, about.searched, search.profile.as_json())
        if changed:
            _check_change(sweep, recorded, changed, is_meant=asked.change_search)
            sweep = _change(sweep, recorded, changed)
        return _go_on(sweep)


def _go_on(sweep: Sweep) -> RunFolder:
    """Run the rest of `sweep`; do nothing if all trials are finished and the report is made."""
    folder, trials = sweep.folder, sweep.request.trials
    states = [trial.state for trial in sweep.study.get_trials(deepcopy=False)]
    ended = baseline_finished(folder, sweep.request, sweep.search.objectives)
    of_baseline = sweep.request.baseline_trials - ended
    # What waits in an ordinary search may be more than it was asked for.
    left = {TrialState.RUNNING} | ({TrialState.WAITING} if sweep.request.scheduler in POPULATIONS else set())
    has_ended = sum(state.is_finished() for state in states) >= trials and not left & set(states)
    if folder.is_concluded and has_ended and not of_baseline:
        sweep.console.print(
            f"nothing left to do: all {trials} trials of {run_as_typed(folder.path)} are finished"
        )
        return folder
    if folder.about.code != code_version():
        sweep.console.print(
            "note: the code has changed since this run began; later trials may not be comparable"
        )
    tell_looks(folder, sweep.study, trials, sweep.console, of_baseline)
    # Whatever follows, the page is that of an earlier session.
    folder.update(concluded=False)
    return sweep.execute()


def _mend_progress(folder: RunFolder, console: Console) -> None:
    """Set damaged files of trials aside: what the study knows of a trial, and its checkpoint, are enough to go on."""
    for name in (TRIALS, BASELINE, REFITS, CONFIRMED):
        for path in sorted((folder.path / name).glob(f"*/{PROGRESS}")):
            try:
                read_progress(path.parent)
            except UserError:
                with writing_to(folder.path):
                    path.rename(path.with_name(f"{PROGRESS}{DAMAGED}"))
                    forget(path)
                console.print(
                    f"note: {path} is damaged and was set aside; if its trial has ended, its epochs are missing in the "
                    "tables, and its result is kept",
                    highlight=False,
                    soft_wrap=True,
                )


def as_request(recorded: Mapping[str, object]) -> SweepRequest:
    """The request of a run, as run.json has it.

    Raises:
        UserError: it is none.
    """
    try:
        return SweepRequest.model_validate(recorded)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"run.json has a request that this version does not understand ({'.'.join(map(str, first['loc']))}: "
            f"{first['msg']}): put it back from a backup"
        ) from None


def _combined(recorded: SweepRequest, asked: ResumeRequest) -> SweepRequest:
    """The recorded request with the changes of this session. A time budget is only for one session."""
    given = asked.model_dump(include={"space", "trials", "accelerator_hours"}, exclude_none=True)
    fixed = {**recorded.changes, **asked.changes}
    return recorded.model_copy(update=given | {"time_budget": asked.time_budget, "changes": fixed})


def _forget_beginning(folder: RunFolder, asked: ResumeRequest) -> None:
    """Delete what a run has that was stopped before its first trial, and that it begins with again.

    UserError if its search would be changed, too.
    """
    given = asked.model_dump(exclude=NO_CHANGES, exclude_defaults=True)
    if given:
        raise UserError(
            f"{run_as_typed(folder.path)} was stopped before its first trial, so its search cannot be changed "
            f"(--{next(iter(given)).replace('_', '-')}): resume it as it is, or start a new run"
        )
    with writing_to(folder.path):
        for path in (folder.journal, copy_of(folder.journal), folder.path / SPLITS):
            path.unlink(missing_ok=True)


def same_splits(folder: RunFolder, splits: Splits, cohort: Cohort) -> Splits:
    """`splits`, if the run has recorded the same ones; UserError if it has not."""
    path = folder.path / SPLITS
    try:
        recorded = read_table(path, ("subject", "role"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; put it back from a backup, or start a new run") from None
    if splits.to_frame(cohort.manifest).astype(str).to_numpy().tolist() != recorded.to_numpy().tolist():
        raise UserError(
            f"the splits recorded in {path} are not those of this version, or the file is damaged: put it back from a "
            "backup, or start a new run"
        )
    return splits


def _what_changed(
    recorded: SweepRequest, request: SweepRequest, before: Searched | None, now: Searched
) -> list[str]:
    """What has changed in the search, as text; also if the file of the space was edited meanwhile."""
    changed = []
    if request.space_name != recorded.space_name:
        changed.append(f"space {recorded.space_name} becomes {request.space_name}")
    for name, value in request.changes.items():
        if name not in recorded.changes:
            changed.append(f"{name} is fixed at {value!r}")
        elif value != recorded.changes[name]:
            changed.append(f"{name} is fixed at {value!r} and was at {recorded.changes[name]!r}")
    if request.trials != recorded.trials:
        changed.append(f"{recorded.trials} trials become {request.trials}")
    if before is not None and before != now:
        differing = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        changed.append(f"searched differently or no longer: {', '.join(differing)}")
    return changed


def _check_change(sweep: Sweep, recorded: SweepRequest, changed: list[str], *, is_meant: bool) -> None:
    """UserError if the search may not be changed, or if the user did not want to change it."""
    request, run = sweep.request, run_as_typed(sweep.folder.path)
    if not is_meant:
        raise UserError(
            f"this would change the search of {run}: {'; '.join(changed)}. Give {CHANGE} if "
            "you want this, or start a new run"
        )
    if request.scheduler in POPULATIONS:
        raise UserError(
            f"the search of a population cannot be changed while it evolves, or after: {run}; start a new run"
        )
    _check_comparable(sweep, recorded)
    started = trials_begun(sweep.study)
    if request.trials < started:
        raise UserError(
            f"--trials {request.trials} is less than the {started} trials that this run has begun"
        )
    is_other_space = sweep.folder.about.searched != sweep.search.profile.as_json()
    ended = baseline_finished(sweep.folder, request, sweep.search.objectives)
    if is_other_space and ended < request.baseline_trials:
        raise UserError(
            f"of the baseline of {run} {ended} of {request.baseline_trials} trials have ended, and the others "
            "belong to the same space: resume without a change of the space until they have ended, or start a new run"
        )
    if is_other_space and request.sampler == GRID:
        raise UserError("the grid of a run cannot be changed: start a new run")


def _change(sweep: Sweep, recorded: SweepRequest, changed: list[str]) -> Sweep:
    """Record the change, and carry the trials over to a new study if the space is another one."""
    folder, request, search, study = sweep.folder, sweep.request, sweep.search, sweep.study
    about = folder.about
    change = SearchChange(
        when=now(),
        what=tuple(changed),
        after_trials=trials_begun(study),
        holdout_seen=bool(looks_of(folder)),
    )
    if about.searched != search.profile.as_json():
        known = {each.study_name for each in optuna.get_all_study_summaries(study._storage)}
        name = next(each for index in range(2, 10_000) if (each := f"{STUDY}-{index}") not in known)

        def opened() -> optuna.Study:
            return open_study(folder.journal, request.sampler, request.search_seed, search.objectives, name)

        carried = carry_over(study, opened(), search.space, fixed_by(request.changes))
        change = change.model_copy(
            update={
                "inside": carried.inside,
                "outside": tuple(carried.outside),
                "dropped": carried.dropped,
            }
        )
        # Open the study again, now that it has trials, so that its sampler does not draw the first points again.
        study = opened()
        sweep.console.print(
            f"the search continues in a changed space: {carried.inside} of its trials lie inside, "
            f"{len(carried.outside)} outside keep their rows but cannot win",
            highlight=False,
        )
    folder.update(
        study=study.study_name,
        sweep=request.model_copy(update={"time_budget": recorded.time_budget}).model_dump(mode="json"),
        searched=search.profile.as_json(),
        space_file=describe_code(request.space_name),
        changes=(*about.changes, change),
    )
    return dataclasses.replace(sweep, study=study)


def _check_comparable(sweep: Sweep, recorded: SweepRequest) -> None:
    """Only searched settings may be fixed: after any other change, new and earlier trials could not be compared."""
    searched = sweep.folder.about.searched or {}
    blocks = {name.rpartition(".")[0] for name in searched}
    for name, value in sweep.request.changes.items():
        if recorded.changes.get(name, value) != value or (
            name not in recorded.changes and name not in searched and name not in blocks
        ):
            raise UserError(
                f"--set {name}={value} is not a setting that this run searches: new trials could not be compared "
                "with the earlier ones; start a new run"
            )
