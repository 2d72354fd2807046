"""A sweep from beginning to end: space, splits, slots, search, refits, report. And how it is resumed."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from optuna.trial import TrialState
from pydantic import BaseModel, ConfigDict, Field
from ray import tune
from rich.console import Console

from core.config import Settings, merge, resolve
from core.errors import UserError
from core.report.page import write_report
from core.report.tables import print_leaderboard, read_run
from core.volumes.cohort import Cohort
from core.volumes.shards import writing_to
from core.volumes.splits import Splits, make_splits
from distributed import run_folder
from distributed.cluster import check_shared, connect, plan_slots
from distributed.data import hold
from distributed.run_folder import RunFolder
from distributed.search import (
    PUBLISHED,
    Budget,
    Proposals,
    StudySearch,
    check_space,
    make_scheduler,
    open_study,
    published_parameters,
    replay,
)
from distributed.slot import Slot
from distributed.train_loop import HOLDOUT
from distributed.trial import assign, make_runner
from distributed.watch import Display, TensorBoard
from search_spaces import Space, load_space, pin

TRIAL_RESTARTS = 2
# Tune's per-trial driver must hold something; the head's marker resource costs no CPU of the slots.
DRIVER_RESOURCES = {"CPU": 0, "node:__internal_head__": 0.001}


class SweepRequest(BaseModel):
    """What a user asks of a sweep; recorded in run.json, so that `resume` asks the same."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    space: str = Field("brain_age", description="NAME of a space, or FILE.py:FUNCTION")
    trials: int = Field(20, ge=1)
    folds: int = Field(5, ge=2, description="cross-validation folds among the development subjects")
    seeds: int = Field(1, ge=1, description="repeats of every fold with another seed")
    refit_seeds: int = Field(
        1, ge=1, description="refits of the winner and the baselines, each with its own seed"
    )
    holdout: float = Field(0.2, gt=0, lt=1, description="share of the subjects that the search never sees")
    slots: int | None = Field(
        None, ge=1, description="trials at a time; as many as the cluster holds if absent"
    )
    workers_per_slot: int = Field(1, ge=1)
    gpus_per_worker: float | None = Field(None, ge=0, description="1 where there are GPUs, if absent")
    scheduler: str = "asha"
    sampler: str = "tpe"
    time_budget: float | None = Field(None, gt=0, description="seconds, refits not counted")
    search_seed: int = Field(0, ge=0, description="seed of splits and sampler")
    changes: dict[str, Any] = Field({}, description="settings fixed by the user, by dotted name")

    @property
    def cells(self) -> list[dict[str, int]]:
        """The (fold, seed) cells of every trial, in the order all trials visit them."""
        return [{"fold": fold, "seed": seed} for seed in range(self.seeds) for fold in range(self.folds)]

    @property
    def refit_cells(self) -> list[dict[str, int]]:
        """The cells of a refit."""
        return [{"fold": HOLDOUT, "seed": seed} for seed in range(self.refit_seeds)]


def run_sweep(
    cohort: Path, request: SweepRequest, out: Path, address: str | None, console: Console
) -> RunFolder:
    """Search, refit, look at the hold-out once, report. Returns the run's folder.

    Raises:
        UserError: before anything is started, for anything in the request that cannot work.
    """
    opened = Cohort.open(cohort)
    space, settings = _space_of(request)
    base = resolve(settings).model_dump(mode="json")
    check_space(space, base)
    make_scheduler(request.scheduler, base["training"]["epochs"], len(request.cells))
    splits = make_splits(opened.manifest, request.folds, request.holdout, request.search_seed)
    folder = run_folder.create_run(out, "sweep", request.model_dump(mode="json"), base, opened)
    run_folder.write_splits(folder, splits, opened)
    study = open_study(folder.journal, request.sampler, request.search_seed)
    parameters = published_parameters(space, base)
    if parameters is not None:
        study.enqueue_trial(parameters, user_attrs={"label": PUBLISHED}, skip_if_exists=True)
    else:
        console.print("note: the starting settings lie outside this space; they are refitted, not searched")
    return _execute(folder, request, opened, splits, study, address, console)


def resume_sweep(
    run: Path, address: str | None, console: Console, time_budget: float | None = None
) -> RunFolder:
    """Continue a sweep that was interrupted: unfinished trials first, each from its last epoch."""
    folder = run_folder.open_run(run)
    about = folder.about
    if about.get("kind") != "sweep":
        raise UserError(f"{run} is not a sweep but a '{about.get('kind')}' run; only sweeps are resumed")
    request = SweepRequest(**about["sweep"] | {"time_budget": time_budget})
    cohort = Cohort.open(Path(about["cohort"]["path"]))
    if cohort.description.hash != about["cohort"]["hash"]:
        raise UserError(
            f"cohort {cohort.folder} has changed since the run began; its trials would not be comparable"
        )
    splits = make_splits(cohort.manifest, request.folds, request.holdout, request.search_seed)
    recorded = pd.read_csv(folder.path / "splits.csv", dtype=str)
    if not splits.to_frame(cohort.manifest).astype(str).reset_index(drop=True).equals(recorded):
        raise UserError(
            f"the splits recorded in {folder.path}/splits.csv are not those of this version; start anew"
        )
    study = open_study(folder.journal, request.sampler, request.search_seed)
    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    if about["finished"] and sum(state.is_finished() for state in states) >= request.trials:
        console.print(f"nothing left to do: all {request.trials} trials of {run} are finished")
        return folder
    if about["code"] != run_folder.code_version():
        console.print("note: the code has changed since this run began; later trials may not be comparable")
    return _execute(folder, request, cohort, splits, study, address, console)


def _space_of(request: SweepRequest) -> tuple[Space, Settings]:
    """The space with what the user fixed taken out of it, and the settings it starts from."""
    space, settings = load_space(request.space)
    return pin(space, request.changes), merge(settings, request.changes)


def _execute(
    folder: RunFolder, request: SweepRequest, cohort: Cohort, splits: Splits, study: optuna.Study,
    address: str | None, console: Console,
) -> RunFolder:  # fmt: skip
    """Run what is left of a sweep on Ray, and write everything it leaves."""
    space, _ = _space_of(request)
    base: Settings = folder.about["settings"]
    budget = Budget(request.time_budget)
    unfinished = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    proposals = Proposals(
        study=study,
        space=space,
        base=base,
        trials=request.trials,
        assignment=lambda name, settings, prunable: assign(
            folder.trial(name), settings, request.cells, prunable=prunable
        ),
        refits=lambda study: _refits(folder, request, base, study),
        continued=unfinished,
    )
    epochs = base["training"]["epochs"]
    scheduler = make_scheduler(request.scheduler, epochs, len(request.cells))
    replay(scheduler, [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()])
    with connect(address, console), _interruptible(budget, console):
        workers, slots = plan_slots(
            request.slots, request.workers_per_slot, request.gpus_per_worker, request.trials, console
        )
        check_shared(folder.path)
        console.print(
            f"{slots} slots of {workers.count} worker(s), {workers.cpus:g} CPUs and {workers.gpus:g} GPUs each"
        )
        display = Display(console, request.trials, epochs, budget)
        arguments = {
            "volumes": hold(cohort),
            "manifest": cohort.manifest[["subject", "age", "site"]],
            "splits": splits,
            "channels": cohort.description.channels,
        }
        trainable = tune.with_parameters(
            Slot,
            workers=workers,
            make_runner=make_runner,
            arguments=arguments,
            storage=str(folder.path / "tune"),
        )
        tuner = tune.Tuner(
            tune.with_resources(trainable, DRIVER_RESOURCES),
            tune_config=tune.TuneConfig(
                search_alg=StudySearch(proposals, budget),
                scheduler=scheduler,
                num_samples=-1,
                max_concurrent_trials=slots,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                storage_path=str(folder.path / "tune"),
                name="sweep",
                stop=budget,
                failure_config=tune.FailureConfig(max_failures=TRIAL_RESTARTS),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                callbacks=[display, TensorBoard(folder.path / "tensorboard", check_space(space, base))],
                verbose=0,
            ),
        )
        with display:
            tuner.fit()
    return _conclude(folder, study, cohort, splits, budget, console)


def _refits(
    folder: RunFolder, request: SweepRequest, base: Settings, study: optuna.Study
) -> list[dict[str, Any]]:
    """The winner, the published configuration and the L1 baseline, each on all development subjects."""
    regression = merge(base, {"objective.name": "l1"})
    chosen = {"published": base, "l1": resolve(regression).model_dump(mode="json")}
    best = run_folder.best_trial(study)
    if best is not None:
        chosen = {"winner": json.loads(best.user_attrs["settings"])} | chosen
    return [
        assign(folder.refit(method), settings, request.refit_cells, keep_model=True)
        for method, settings in chosen.items()
    ]


def _conclude(
    folder: RunFolder, study: optuna.Study, cohort: Cohort, splits: Splits, budget: Budget, console: Console
) -> RunFolder:
    """Tables, the best model, the report, the leaderboard, and what to type next."""
    with writing_to(folder.path):
        run_folder.write_tables(folder, study)
        run_folder.write_holdout(folder, cohort, splits)
        model = folder.refit("winner") / "model-0"
        if model.exists():
            run_folder.keep_best(folder, model)
        if not budget.interrupted:
            run_folder.finish(folder, study)
    failed = study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
    if failed and len(failed) == len(study.get_trials(deepcopy=False)):
        reason = failed[0].user_attrs.get("reason", "unknown")
        raise UserError(f"all {len(failed)} trials failed; the first: {reason}")
    page = write_report(folder.path)
    print_leaderboard(console, read_run(folder.path))
    _say_next(folder, page, study, budget, console)
    return folder


def _say_next(folder: RunFolder, page: Path, study: optuna.Study, budget: Budget, console: Console) -> None:
    run = _short(folder.path)
    unfinished = len(study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))
    if budget.interrupted or unfinished:
        console.print(f"\n{unfinished} trial(s) unfinished. Continue with\n  brainsweep resume {run}")
    console.print(
        f"\nNext:\n  open {_short(page)}\n"
        f"  tensorboard --logdir {run}/tensorboard\n"
        f"  optuna-dashboard {run}/study.journal\n"
        f"  brainsweep predict {run} VOLUME.nii.gz\n",
        highlight=False,
    )


def _short(path: Path) -> str:
    """`path` as a user in the current folder would type it."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


@contextlib.contextmanager
def _interruptible(budget: Budget, console: Console) -> Iterator[None]:
    """Ctrl-C once stops gracefully, what runs stays resumable; twice stops at once."""

    def stop(signum: int, frame: Any) -> None:
        if budget.interrupted:
            raise KeyboardInterrupt
        budget.interrupted = True
        console.print("stopping after the current epochs; press Ctrl-C again to stop at once")

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
