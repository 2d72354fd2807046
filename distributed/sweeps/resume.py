"""Continue a sweep that was interrupted, or one that was not enough: with more trials, or another space."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from pydantic import ValidationError
from rich.console import Console

from core.errors import UserError
from core.evaluation.splits import Splits, make_splits
from core.volumes.cohort.reader import Cohort
from distributed.run import folder as run_folder
from distributed.run.folder import RunFolder
from distributed.run.lock import claim, mend_journal
from distributed.run.working_copy import bring_run, kept_up, run_as_typed
from distributed.search.population_methods import POPULATIONS
from distributed.search.samplers import GRID
from distributed.search.study import carry_over, open_study
from distributed.sweeps.request import SearchPlan, SweepRequest, plan_search
from distributed.sweeps.sweep import execute
from search_spaces import fixed_by

CHANGE = "--change-search"
SEARCH_FIELDS = ("space", "changes", "trials")
"""What of a request is the search itself: changed on purpose only, and recorded."""


def resume_sweep(
    run: Path,
    address: str | None,
    console: Console,
    *,
    budgets: dict[str, float | None] | None = None,
    search: dict[str, Any] | None = None,
    change: bool = False,
    cohort: Path | str | None = None,
) -> RunFolder:
    """Continue a sweep: unfinished trials first, each from its last epoch.

    Args:
        run: its folder.
        address: of a Ray cluster; this machine if None.
        console: where to say how it goes.
        budgets: `time_budget` in seconds from now, `accelerator_hours` of the whole run.
        search: what to change of it: `space`, `changes` (settings to fix), `trials`.
        change: whether a change of the search is meant.
        cohort: where the run's cohort lies now, if it was moved.

    Raises:
        UserError: no sweep, another cohort, other splits, or a search that changed without `change`.
    """
    bring_run(run, console)
    folder = run_folder.open_run(run)
    about = folder.about
    if about.get("kind") != "sweep":
        raise UserError(f"{run} is not a sweep but a '{about.get('kind')}' run; only sweeps are resumed")
    if not about.get("begun", True):
        raise UserError(
            f"{run} was stopped before its first trial: there is nothing to resume. Delete it, start anew"
        )
    recorded = SweepRequest(**about["sweep"])
    request = _asked(recorded, budgets or {}, search or {})
    with (
        claim(folder.path, console),
        kept_up(folder.path, console),
    ):  # before the study is read: a running sweep has trials that look interrupted
        mend_journal(folder.journal)
        opened = run_folder.cohort_of(folder, cohort)
        return _resume(folder, recorded, request, opened, change, address, console)


def _resume(
    folder: RunFolder, recorded: SweepRequest, request: SweepRequest, cohort: Cohort, change: bool,
    address: str | None, console: Console,
) -> RunFolder:  # fmt: skip
    """`resume_sweep`, once the run is claimed and its cohort found."""
    run, about = folder.path, folder.about
    splits = _same_subjects(folder, request, cohort)
    plan = plan_search(request, cohort, about["settings"])
    study = open_study(
        folder.journal, request.sampler, request.search_seed, request.objectives, about["study"]
    )
    changed = _what_changed(recorded, request, about, plan)
    if changed and not change:
        raise UserError(
            f"this would change the search of {run_as_typed(run)}: {'; '.join(changed)}. Give {CHANGE} if "
            "that is meant, or start a new run"
        )
    if changed and request.scheduler in POPULATIONS:
        raise UserError(
            f"the search of a population cannot be changed while it evolves, or after: "
            f"{run_as_typed(run)}; start a new run"
        )
    if changed:
        study = _change(folder, recorded, request, plan, study, changed, console)
    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    if about["finished"] and sum(state.is_finished() for state in states) >= request.trials:
        console.print(f"nothing left to do: all {request.trials} trials of {run_as_typed(run)} are finished")
        return folder
    if about["code"] != run_folder.code_version():
        console.print("note: the code has changed since this run began; later trials may not be comparable")
    return execute(folder, request, plan, cohort, splits, study, address, console)


def _asked(recorded: SweepRequest, budgets: dict[str, float | None], search: dict[str, Any]) -> SweepRequest:
    """The recorded request with what is asked now. A time budget is for one session; it does not carry over."""
    given = {name: value for name, value in search.items() if value}
    fixed = recorded.changes | given.pop("changes", {})
    hours = budgets.get("accelerator_hours") or recorded.accelerator_hours
    asked = {"time_budget": budgets.get("time_budget"), "accelerator_hours": hours, "changes": fixed} | given
    try:
        return SweepRequest(**recorded.model_dump() | asked)
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]).replace("_", "-")
        raise UserError(f"--{option}: {first['msg'].lower()}, got {first['input']!r}") from None


def _same_subjects(folder: RunFolder, request: SweepRequest, cohort: Cohort) -> Splits:
    """The splits of the run; refused where cohort or splits are no longer what they were."""
    if cohort.description.hash != folder.about["cohort"]["hash"]:
        raise UserError(
            f"cohort {cohort.folder} has changed since the run began; its trials would not be comparable"
        )
    splits = make_splits(cohort.manifest, request.folds, request.holdout, request.search_seed)
    recorded = pd.read_csv(folder.path / "splits.csv", dtype=str)
    if not splits.to_frame(cohort.manifest).astype(str).reset_index(drop=True).equals(recorded):
        raise UserError(
            f"the splits recorded in {folder.path}/splits.csv are not those of this version; start anew"
        )
    return splits


def _what_changed(
    recorded: SweepRequest, request: SweepRequest, about: dict[str, Any], plan: SearchPlan
) -> list[str]:
    """What is no longer searched as it was, in words; also where the file of the space was edited meanwhile."""
    changed = []
    if request.space != recorded.space:
        changed.append(f"space {recorded.space} becomes {request.space}")
    for name, value in request.changes.items():
        if name not in recorded.changes:
            changed.append(f"{name} is fixed at {value!r}")
        elif value != recorded.changes[name]:
            changed.append(f"{name} is fixed at {value!r} and was at {recorded.changes[name]!r}")
    if request.trials != recorded.trials:
        changed.append(f"{recorded.trials} trials become {request.trials}")
    before, now = about.get("searched"), plan.profile.as_json()
    if before is not None and before != now:
        differing = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        changed.append(f"searched otherwise or no longer: {', '.join(differing)}")
    return changed


def _change(
    folder: RunFolder, recorded: SweepRequest, request: SweepRequest, plan: SearchPlan, study: optuna.Study,
    changed: list[str], console: Console,
) -> optuna.Study:  # fmt: skip
    """Record the change, and carry the trials over to a new study where the space is another one."""
    _check_comparable(folder, recorded, request)
    about = folder.about
    started = sum(trial.state.name != "WAITING" for trial in study.get_trials(deepcopy=False))
    if request.trials < started:
        raise UserError(
            f"--trials {request.trials} is less than the {started} trials that this run has begun"
        )
    note: dict[str, Any] = {
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "what": changed,
        "after_trials": started,
        "holdout_seen": folder.refit("published").exists(),
    }
    name = about["study"]
    if about.get("searched") != plan.profile.as_json():
        if request.sampler == GRID:
            raise UserError("the grid of a run cannot be changed: start a new run")
        known = {each.study_name for each in optuna.get_all_study_summaries(study._storage)}
        name = next(each for index in range(2, 10_000) if (each := f"brainsweep-{index}") not in known)
        fresh = open_study(folder.journal, request.sampler, request.search_seed, request.objectives, name)
        carried = carry_over(study, fresh, plan.space, fixed_by(request.changes))
        note |= {"inside": carried.inside, "outside": carried.outside, "dropped": carried.dropped}
        # opened again, now that it has trials: its sampler must not draw again what began the search
        study = open_study(folder.journal, request.sampler, request.search_seed, request.objectives, name)
        console.print(
            f"the search goes on in a changed space: {carried.inside} of its trials lie inside, "
            f"{len(carried.outside)} outside keep their rows but cannot win",
            highlight=False,
        )
    folder.update(
        study=name,
        sweep=request.model_copy(update={"time_budget": recorded.time_budget}).model_dump(mode="json"),
        searched=plan.profile.as_json(),
        changes=[*about.get("changes", []), note],
    )
    return study


def _check_comparable(folder: RunFolder, recorded: SweepRequest, request: SweepRequest) -> None:
    """Fixing what was searched narrows the space; any other setting would make new trials another experiment."""
    searched = folder.about.get("searched") or {}
    blocks = {name.rpartition(".")[0] for name in searched}
    for name, value in request.changes.items():
        if recorded.changes.get(name, value) != value or (
            name not in recorded.changes and name not in searched and name not in blocks
        ):
            raise UserError(
                f"--set {name}={value} is no setting that this run searches: new trials could not be compared with "
                "those there are; start a new run"
            )
