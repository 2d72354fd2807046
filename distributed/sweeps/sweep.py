"""A sweep from beginning to end: splits, study, slots, search, refits, report. `resume.py` continues one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState
from ray import tune
from ray.tune.schedulers import TrialScheduler
from ray.tune.stopper import CombinedStopper
from rich.console import Console

from core.config import Settings, merge, resolve
from core.errors import UserError
from core.evaluation.splits import Splits, make_splits
from core.files.writing import writing_to
from core.report.answer.tables import print_leaderboard, read_run
from core.report.page import write_report
from core.volumes.cohort.reader import Cohort
from distributed.batches.hold import hold
from distributed.run import folder as run_folder
from distributed.run.access import AccessRecord
from distributed.run.assignment import assign, trial_name
from distributed.run.folder import RunFolder
from distributed.run.lock import claim
from distributed.run.working_copy import (
    address_of,
    bring,
    bring_results,
    forget,
    kept_up,
    refuse_taken,
    run_as_typed,
    send,
)
from distributed.search.budget import Budget, make_terminator
from distributed.search.population_methods import POPULATIONS
from distributed.search.samplers import GRID, grid_points, sampler_note
from distributed.search.schedulers import Wilcoxon, make_scheduler, pruner_threshold, replay
from distributed.search.searcher import Judgement, Proposals, StudySearch
from distributed.search.study import (
    ENQUEUED,
    PUBLISHED,
    best_trial,
    enqueue,
    open_study,
    published_parameters,
    read_points,
)
from distributed.slots.cluster import check_shared, connect, plan_slots
from distributed.slots.slot import Slot, Workers, pack
from distributed.sweeps import tables
from distributed.sweeps.display import Display, TensorBoard
from distributed.sweeps.evolution import EVOLVED, evolve
from distributed.sweeps.forget_finished import ForgetFinished
from distributed.sweeps.interruption import interruptible, resumable, stopped
from distributed.sweeps.request import SearchPlan, SweepRequest, plan_search
from distributed.training.subjects import Subjects
from distributed.training.trial import make_runner

TRIAL_RESTARTS = 2
# Tune's per-trial driver must hold something; the head's marker resource costs no CPU of the slots.
DRIVER_RESOURCES = {"CPU": 0, "node:__internal_head__": 0.001}


def run_sweep(
    cohort: str | Path,
    request: SweepRequest,
    out: Path,
    address: str | None,
    console: Console,
    enqueued: Path | None = None,
) -> RunFolder:
    """Search, refit, look at the hold-out once, report. Returns the run's folder.

    Args:
        cohort: its folder.
        request: what is asked.
        out: the run's folder, made here.
        address: of a Ray cluster; this machine if None.
        console: where to say how it goes.
        enqueued: a YAML file with configurations to try after the published one.

    Raises:
        UserError: before anything is started, for anything in the request that cannot work.
    """
    opened = Cohort.open(cohort)
    plan = plan_search(request, opened)
    if address_of(out) and request.scheduler in POPULATIONS:
        raise UserError(
            f"--scheduler {request.scheduler} needs --out on storage that all nodes mount: its members begin from each "
            "other's checkpoints"
        )
    refuse_taken(out)
    first = _first_points(plan, enqueued, console)
    grid = None
    if request.sampler == GRID:
        grid = grid_points(plan.space, request.grid_points, request.search_seed)
        request = _with_whole_grid(request, first, grid)
    splits = make_splits(opened.manifest, request.folds, request.holdout, request.search_seed)
    folder = run_folder.create_run(out, "sweep", request.model_dump(mode="json"), plan.base, opened)
    with claim(folder.path, console), kept_up(folder.path, console):
        return _begin(folder, request, plan, first, grid, opened, splits, address, console)


def _begin(
    folder: RunFolder, request: SweepRequest, plan: SearchPlan, first: dict[str, list[dict[str, Any]]],
    grid: list[dict[str, Any]] | None, opened: Cohort, splits: Splits, address: str | None, console: Console,
) -> RunFolder:  # fmt: skip
    """Record what is searched and who is held out, fill the study, and run it."""
    folder.update(searched=plan.profile.as_json())
    run_folder.write_splits(folder, splits, opened)
    study = open_study(folder.journal, request.sampler, request.search_seed, request.objectives)
    for label, points in first.items():
        if label != PUBLISHED or request.scheduler not in POPULATIONS:  # else it is tried after they evolved
            enqueue(study, points, label)
    enqueue(study, grid or [], None)
    folder.update(begun=True)
    note = sampler_note(request.sampler, plan.profile)
    if note:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    return execute(folder, request, plan, opened, splits, study, address, console)


def _first_points(
    plan: SearchPlan, enqueued: Path | None, console: Console
) -> dict[str, list[dict[str, Any]]]:
    """What is tried before the sampler is asked, by label: the published configuration, then the user's own."""
    published = published_parameters(plan.space, plan.base)
    if published is None:
        console.print("note: the starting settings lie outside this space; they are refitted, not searched")
    own = read_points(enqueued, plan.space) if enqueued else []
    return {PUBLISHED: [published] if published is not None else [], ENQUEUED: own}


def _with_whole_grid(
    request: SweepRequest, first: dict[str, list[dict[str, Any]]], grid: list[dict[str, Any]]
) -> SweepRequest:
    """`request` with as many trials as the grid and what comes before it have; refused where they are not asked for."""
    before = [point for points in first.values() for point in points if point not in grid]
    needed = len(grid) + len(before)
    if request.trials < needed:
        raise UserError(
            f"the grid has {len(grid)} points, {needed} trials with those before it, and --trials is {request.trials}; "
            f"give --trials {needed}, fewer --grid-points, or --sampler qmc to spread fewer trials"
        )
    return request.model_copy(update={"trials": needed})


def execute(
    folder: RunFolder, request: SweepRequest, plan: SearchPlan, cohort: Cohort, splits: Splits,
    study: optuna.Study, address: str | None, console: Console,
) -> RunFolder:  # fmt: skip
    """Run what is left of a sweep on Ray, and write everything it leaves."""
    with resumable(folder):
        return _execute(folder, request, plan, cohort, splits, study, address, console)


def _execute(
    folder: RunFolder, request: SweepRequest, plan: SearchPlan, cohort: Cohort, splits: Splits,
    study: optuna.Study, address: str | None, console: Console,
) -> RunFolder:  # fmt: skip
    epochs = plan.base["training"]["epochs"]
    budget = Budget(request.time_budget, request.accelerator_hours)
    threshold = pruner_threshold(request.pruner, len(request.cells))
    pruner = Wilcoxon(threshold, study, request.objectives[0], len(request.cells)) if threshold else None
    judgement = Judgement(
        request.objectives,
        request.scheduler,
        pruner,
        make_terminator(
            request.stop_when, request.search_seed, len(request.objectives), len(plan.profile.always)
        ),
    )
    evolving = request.scheduler in POPULATIONS and not folder.about.get(EVOLVED)
    proposals = Proposals(
        study=study,
        space=plan.space,
        base=plan.base,
        trials=request.trials,
        assignment=lambda name, settings, prunable: assign(
            folder.trial(name), settings, request.cells, prunable=prunable, metric=request.objectives[0]
        ),
        refits=lambda study: _repetitions(folder, request, study) + _refits(folder, request, study),
        continued=[] if evolving else study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)),
        secure=lambda: send(folder.journal),
    )
    search = StudySearch(proposals, budget, judgement)
    scheduler = make_scheduler(request.scheduler, epochs, len(request.cells))
    finished = [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]
    replay(scheduler, finished)
    with connect(address, console), interruptible(budget, console):
        workers, slots = plan_slots(
            request.slots, request.workers_per_slot, request.gpus_per_worker, request.trials, console
        )
        _count_devices(budget, workers, folder, study)
        check_shared(folder.path)
        console.print(
            f"{slots} slots of {workers.count} worker(s), {workers.cpus:g} CPUs and {workers.gpus:g} GPUs each"
        )
        display = Display(console, request.trials, epochs, budget, request.objectives[0])
        best = best_trial(study)
        display.count_earlier(len(finished), (best.values[0], trial_name(best.number)) if best else None)
        volumes = hold(cohort, request.data_mode)
        subjects = Subjects.of(cohort, splits, volumes, AccessRecord(folder.access))
        trainable = tune.with_parameters(
            Slot,
            workers=workers,
            runner=pack(make_runner, subjects=subjects),
            storage=str(folder.path / "tune"),
        )
        run = run_options(
            folder.path, [display, TensorBoard(folder.path / "tensorboard", list(plan.profile.settings))]
        )
        stopper = CombinedStopper(budget, pruner) if pruner else budget
        tuner = make_tuner(trainable, search, scheduler, stopper, slots, run)
        with display:
            if evolving:
                search.broken = evolve(folder, request, plan, study, budget, trainable, slots, run)
                proposals.trials = len(study.get_trials(deepcopy=False))
            if not (evolving and budget.is_over):
                tuner.fit()
    if search.broken is not None:
        raise stopped(folder, search.broken)
    return _conclude(folder, request, study, cohort, splits, budget, console)


def run_options(folder: Path, callbacks: list[tune.Callback]) -> dict[str, Any]:
    """What every use of Tune in a run has in common: where it keeps its files, and when it gives a trial up."""
    return {
        "storage_path": str(folder / "tune"),
        "failure_config": tune.FailureConfig(max_failures=TRIAL_RESTARTS),
        "checkpoint_config": tune.CheckpointConfig(checkpoint_at_end=False),
        "callbacks": [*callbacks, ForgetFinished()],
        "verbose": 0,
    }


def make_tuner(
    trainable: Any, search: StudySearch, scheduler: TrialScheduler, stopper: tune.Stopper, slots: int,
    run: dict[str, Any],
) -> tune.Tuner:  # fmt: skip
    """Tune as the executor of `search`: trials come from it and are stopped by `scheduler`, in `slots` at a time.

    `run` are the options of `run_options`.
    """
    return tune.Tuner(
        tune.with_resources(trainable, DRIVER_RESOURCES),
        tune_config=tune.TuneConfig(
            search_alg=search,
            scheduler=scheduler,
            num_samples=-1,
            max_concurrent_trials=slots,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(name="sweep", stop=stopper, **run),
    )


def _count_devices(budget: Budget, workers: Workers, folder: RunFolder, study: optuna.Study) -> None:
    """Tell the budget what a slot holds, and what the trials of earlier sessions have used."""
    budget.unit = "GPU" if workers.gpus else "CPU"
    budget.devices = workers.count * (workers.gpus or workers.cpus)
    budget.used = tables.accelerator_seconds(folder, study, budget.devices)


def _repetitions(folder: RunFolder, request: SweepRequest, study: optuna.Study) -> list[dict[str, Any]]:
    """Winner and published on the search's own folds again, with fresh seeds: what was luck does not repeat."""
    best = best_trial(study)
    if best is None or not request.confirm_cells:
        return []
    _set_aside_former_winner(folder, best.number)
    chosen = {"winner": json.loads(best.user_attrs["settings"])}
    if best.user_attrs.get("label") != PUBLISHED:
        chosen["published"] = folder.about["settings"]
    return [
        assign(
            folder.confirmed(method),
            settings,
            request.confirm_cells,
            prunable=False,
            metric=request.objectives[0],
        )
        | {"name": f"{method}-repeated"}
        for method, settings in chosen.items()
    ]


def _refits(folder: RunFolder, request: SweepRequest, study: optuna.Study) -> list[dict[str, Any]]:
    """The winner, the published configuration and the L1 baseline, each on all development subjects."""
    base: Settings = folder.about["settings"]
    regression = merge(base, {"objective.name": "l1"})
    chosen = {"published": base, "l1": resolve(regression).model_dump(mode="json")}
    best = best_trial(study)
    if best is not None:
        _set_aside_former_winner(folder, best.number)
        chosen = {"winner": json.loads(best.user_attrs["settings"])} | chosen
    return [
        assign(folder.refit(method), settings, request.refit_cells, keep_model=True)
        for method, settings in chosen.items()
    ]


def _set_aside_former_winner(folder: RunFolder, number: int) -> None:
    """A search that went on after its refits may have another winner: the old one's refits must not stand for it."""
    former = folder.about.get("refitted")
    if former not in (None, number):
        for made in (folder.refit("winner"), folder.confirmed("winner")):
            bring(made)
            if made.exists():
                aside = made.rename(made.with_name(f"winner-was-{former}"))
                send(aside)
                forget(made)
    folder.update(refitted=number)


def _conclude(
    folder: RunFolder, request: SweepRequest, study: optuna.Study, cohort: Cohort, splits: Splits,
    budget: Budget, console: Console,
) -> RunFolder:  # fmt: skip
    """Tables, the best model, the report, the leaderboard, and what to type next."""
    with writing_to(folder.path):
        bring_results(folder.path)
        tables.write_tables(folder, study)
        tables.write_confirmed(folder)
        tables.write_access(folder, cohort)
        tables.write_holdout(folder, cohort, splits)
        model = folder.refit("winner") / f"model-{request.refit_cells[0]['seed']}"
        if model.exists():
            run_folder.keep_best(folder, model)
        if not budget.interrupted:
            tables.finish(folder, study, budget.reason)
    failed = study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
    if failed and len(failed) == len(study.get_trials(deepcopy=False)):
        reason = failed[0].user_attrs.get("reason", "unknown")
        raise UserError(f"all {len(failed)} trials failed; the first: {reason}")
    page = write_report(folder.path)
    print_leaderboard(console, read_run(folder.path))
    _say_next(folder, page, study, budget, console)
    return folder


def _say_next(folder: RunFolder, page: Path, study: optuna.Study, budget: Budget, console: Console) -> None:
    run = run_as_typed(folder.path)
    here = folder.path if address_of(folder.path) else run
    unfinished = len(study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))
    if budget.reason and not budget.interrupted:
        console.print(f"\nThe search ended early: {budget.reason}.", highlight=False)
    if budget.interrupted or unfinished:
        console.print(f"\n{unfinished} trial(s) unfinished. Continue with\n  brainsweep resume {run}")
    console.print(
        f"\nNext:\n  open {here}/{page.name}\n"
        f"  tensorboard --logdir {here}/tensorboard\n"
        f"  optuna-dashboard {here}/study.journal\n"
        f"  brainsweep predict {run} VOLUME.nii.gz\n",
        highlight=False,
    )
