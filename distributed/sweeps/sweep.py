"""A sweep from beginning to end: splits, study, slots, search, refits, report. `resume.py` continues a sweep."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import optuna
from optuna.trial import TrialState
from ray import tune
from ray.tune.stopper import CombinedStopper
from rich.console import Console

from core.errors import UserError
from core.evaluation.splits import Splits
from core.files.writing import writing_to
from core.report.answer.record import read_run
from core.report.answer.tables import print_leaderboard
from core.report.page import write_report
from core.run_names import LABEL, MEMBER, PUBLISHED, REASON, STAGES, SWEEP
from core.starts import BEST, Start
from core.volumes.cohort.reader import Cohort
from distributed.batches.hold import hold
from distributed.batches.in_process import Volumes
from distributed.run.access import AccessRecord
from distributed.run.assignment import assign, trial_name
from distributed.run.code import describe_code
from distributed.run.folder import RunFolder, create_run, keep_best, write_splits
from distributed.run.lock import claim
from distributed.run.quiet import quiet
from distributed.run.working_copy import (
    address_of,
    bring_results,
    kept_up,
    refuse_taken,
    run_as_typed,
    send,
)
from distributed.search.budget import Budget
from distributed.search.population_methods import POPULATIONS
from distributed.search.samplers import GRID, grid_points, sampler_note
from distributed.search.schedulers import make_scheduler, replay, spares
from distributed.search.searcher import Proposals, StudySearch
from distributed.search.study import (
    POINTS_TRIED,
    ReadProgress,
    best_trial,
    enqueue,
    hear_missed,
    open_study,
    owed_trial,
    progress_reader,
    running_trials,
)
from distributed.slots.cluster import check_shared, connect, fit_slots
from distributed.slots.slot import Slot, Workers, pack
from distributed.sweeps import tables
from distributed.sweeps.baseline import Baseline, baseline_finished, baseline_progress, baseline_study
from distributed.sweeps.display import Display, TensorBoard
from distributed.sweeps.evolution import STATE, Evolution
from distributed.sweeps.executor import Executor
from distributed.sweeps.interruption import interruptible, resumable, stopped
from distributed.sweeps.launch import (
    Launch,
    Points,
    check_place,
    check_subjects,
    first_points,
    recorded,
    tell_of_grid,
    with_whole_grid,
)
from distributed.sweeps.refits import after_search, share_refit
from distributed.sweeps.request import SweepRequest
from distributed.sweeps.resolve import ResolvedSearch, judgement, maps_of, resolve_search, with_hash
from distributed.sweeps.starts import (
    check_leaks,
    keep_starts,
    read_starts,
    refuse_other_starts,
    starts_of,
    tell_what_matches,
    with_starts,
)
from distributed.training.subjects import Subjects
from distributed.training.trial import make_runner


@dataclass(frozen=True)
class Shared:
    """What the sweeps of a nested search have in common: it was found out, or brought into memory, once."""

    volumes: Volumes
    """Those of the cohort; Ray is connected."""
    first: Mapping[str, Points]
    """The configurations to try first, by label."""
    starts: Mapping[str, Start]
    """The weights to start from, by name."""
    left: int
    """The number of sweeps that were not finished when this session began."""


@dataclass(frozen=True)
class Sweep:
    """A sweep in progress: the request, the cohort, and the folder of the run.

    A new sweep starts with `begin`; `resume.py` makes a sweep from an existing run. `execute` runs what is left of it,
    and ends with `conclude`. The folder of the run is locked during this time (see `held`).
    """

    folder: RunFolder
    request: SweepRequest
    search: ResolvedSearch
    cohort: Cohort
    splits: Splits
    study: optuna.Study
    console: Console
    address: str | None = None
    """The address of a Ray cluster; this machine if None."""
    shared: Shared | None = None
    """What this sweep has in common with others of a nested search."""

    def begin(self) -> Sweep:
        """Record the splits and the searched settings; enqueue the points to try first, then those of the grid."""
        request = self.request
        first: Mapping[str, Points] = self.folder.about.first
        grid: Points = []
        if request.sampler == GRID:
            grid = grid_points(self.search.space, request.grid_points, request.search_seed)
        self.folder.update(
            searched=self.search.profile.as_json(), space_file=describe_code(request.space_name)
        )
        write_splits(self.folder, self.splits, self.cohort)
        for label, points in first.items():
            # If a population evolves, the published configuration is tried after it.
            if label != PUBLISHED or self.request.scheduler not in POPULATIONS:
                enqueue(self.study, points, label)
        enqueue(self.study, grid, None)
        self.folder.update(begun=True)
        refused = self.search.profile.refused
        if refused:
            self._note(
                f"of {POINTS_TRIED} random points of this space {len(refused)} are refused, and such trials fail; the "
                f"first: {refused[0]}"
            )
        note = sampler_note(self.request.sampler, self.search.profile)
        if note:
            self._note(note)
        return self

    def execute(self) -> RunFolder:
        """Run what is left of the sweep on Ray, and write its results."""
        request = self.request
        budget = Budget(request.time_budget, request.accelerator_hours)
        if self.shared is not None:
            budget.time_shares, budget.hour_shares = self.shared.left, len(request.parts)
        with resumable(self.to_continue):
            searcher = self._searcher(budget)
            with self._connected(), interruptible(budget, self.console):
                self._run(searcher, budget)
            if searcher.broken is not None:
                raise stopped(self.to_continue, searcher.broken)
            if budget.hopeless is not None:
                raise UserError(
                    f"{budget.hopeless}; what is done is kept for `brainsweep resume {run_as_typed(self.to_continue)}`"
                )
            return self.conclude(budget)

    def _note(self, text: str) -> None:
        self.console.print(f"note: {text}", highlight=False, soft_wrap=True, markup=False)

    def _connected(self) -> AbstractContextManager[None]:
        """Ray, if it is not connected already."""
        return nullcontext() if self.shared is not None else connect(self.address, self.console)

    def conclude(self, budget: Budget) -> RunFolder:
        """Write the tables, the best model and the report; print the leaderboard, and the next commands."""
        folder, study = self.folder, self.study
        with writing_to(folder.path):
            bring_results(folder.path)
            share_refit(folder, study)
            tables.write_tables(folder, study, self.progress)
            if self.request.baseline_trials:
                of_baseline = baseline_progress(folder, self.request, self.search)
                tables.write_baseline(
                    folder, baseline_study(folder, self.request, self.search.objectives), of_baseline
                )
            tables.write_confirmed(folder)
            tables.write_access(folder, self.cohort)
            tables.write_holdout(folder, self.cohort, self.splits)
            model = folder.refit("winner") / f"model-{self.request.refit_cells[0]['seed']}"
            if model.exists():
                keep_best(folder, model)
                best = folder.about.refitted
                if best is not None:
                    tables.calibrate_best(
                        folder, self.search.task, folder.trial(trial_name(best)), f"trial {best}"
                    )
            folder.update(rows=tables.count_rows(folder))
            if not budget.interrupted:
                tables.finish(folder, study, budget.reason)
        failed = study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
        if failed and len(failed) == len(study.get_trials(deepcopy=False)):
            reason = failed[0].user_attrs.get(REASON, "unknown")
            raise UserError(f"all {len(failed)} trials failed; the first: {reason}")
        page = write_report(folder.path)
        if not budget.interrupted:
            folder.update(concluded=True)
            if not running_trials(study):
                # Whoever goes on with this search trains them anew. Shared ones go when the last sweep has ended.
                shutil.rmtree(folder.path / STAGES, ignore_errors=True)
        print_leaderboard(self.console, read_run(folder.path))
        self._say_next(page, budget)
        return folder

    @property
    def progress(self) -> ReadProgress:
        """Reads the progress of a trial."""
        return progress_reader(self.folder.trial, self.request.cells, self.search.first)

    @property
    def to_continue(self) -> Path:
        """The run that a user continues: the nested search, if it has begun this sweep in this session."""
        return self.folder.path if self.shared is None else self.folder.path.parent

    @property
    def shares_stages(self) -> bool:
        """Whether this is one of the sweeps with more and more labels; hold-outs have people of their own."""
        return self.shared is not None and not self.request.outer

    @property
    def evolves(self) -> bool:
        """Whether a population must evolve first."""
        return self.request.scheduler in POPULATIONS and not self.folder.about.evolved

    def _searcher(self, budget: Budget) -> StudySearch:
        """The searcher for the study of this sweep, with its refits."""
        request, study, first = self.request, self.study, self.search.first
        # A population that a budget has cut may have more trials than were asked for; see `_run`.
        after_evolution = len(study.get_trials(deepcopy=False)) if self.folder.about.evolved else 0
        proposals = Proposals(
            study=study,
            space=self.search.space,
            base=self.search.base,
            trials=max(request.trials, after_evolution),
            assignment=lambda name, settings, prunable: assign(
                self.folder.trial(name), settings, request.cells, prunable=prunable, metric=first
            ),
            refits=lambda study: after_search(self.folder, request, self.search, study),
            continued=self._unfinished(),
            starts=request.starts,
            stages=0 if self.search.settings.pretraining is None else request.stages,
            secure=lambda: send(self.folder.journal),
            tell=lambda text: self.console.print(text, highlight=False, soft_wrap=True, markup=False),
        )
        return StudySearch(proposals, budget, judgement(request, self.search, study, budget))

    def _unfinished(self) -> list[optuna.trial.FrozenTrial]:
        """The trials that continue from an earlier session. Members of a population do not: they evolve."""
        if self.evolves and not (self.folder.path / STATE).exists():
            # All that have begun become members.
            return []
        running = running_trials(self.study)
        return [trial for trial in running if trial.user_attrs.get(LABEL) != MEMBER]

    def _run(self, searcher: StudySearch, budget: Budget) -> None:
        """Evolve the population if there is one, then search, in slots."""
        request = self.request
        is_spared = spares(request.startup_trials, budget)
        scheduler = make_scheduler(
            request.scheduler,
            self.search.judged_epochs,
            len(request.cells),
            is_spared,
            self.search.about_first.better,
        )
        replay(scheduler, self._earlier())
        workers, slots = fit_slots(
            request.slots, request.workers_per_slot, request.gpus_per_worker, request.trials, self.console
        )
        self._count_devices(budget, workers)
        check_shared(self.folder.path)
        self.console.print(
            f"{slots} slots of {workers.count} worker(s), {workers.cpus:g} CPUs and {workers.gpus:g} GPUs each"
        )
        display = self._display(budget)
        tensorboard = TensorBoard.of(self.folder.path, self.search)
        executor = Executor(self._slot(workers), slots, self.folder.tune, (display, tensorboard))
        pruner = searcher.judgement.pruner
        tuner = executor.search(searcher, scheduler, CombinedStopper(budget, pruner) if pruner else budget)
        evolves = self.evolves
        if owed_trial(self.study) is not None or best_trial(self.study) is None:
            budget.later_epochs = budget.epochs
        if self.search.baseline is not None:
            baseline = Baseline(self.folder, request, self.search.baseline, self.console)
            searcher.broken = baseline.run(budget, executor)
        with display:
            if evolves and not budget.interrupted:
                evolution = Evolution(self.folder, request, self.search, self.study)
                searcher.broken = evolution.run(budget, executor)
                known = len(self.study.get_trials(deepcopy=False))
                # If the budget has cut it, and the published configuration fails, another trial may be the result.
                searcher.proposals.trials = max(known + 1, request.trials) if self.evolves else known
                # What it has cost is known, and not a reason to give up the rest.
                budget.checked = True
            budget.later_epochs = 0
            if not budget.interrupted:
                tuner.fit()

    def _slot(self, workers: Workers) -> type[tune.Trainable]:
        """The class `Slot` with the subjects of this sweep for its workers."""
        held_already = None if self.shared is None else self.shared.volumes
        maps = maps_of(self.request, self.search.base)
        volumes = held_already or hold(self.cohort, self.request.data_mode, maps)
        access, starts = AccessRecord(self.folder.access), starts_of(self.folder)
        subjects = Subjects.of(self.cohort, self.splits, volumes, access, starts)
        # Sweeps that belong together share first stages: with more labels the pre-training is often the same.
        runner = pack(
            make_runner,
            subjects=subjects,
            stages=(self.to_continue if self.shares_stages else self.folder.path) / STAGES,
        )
        slot: type[tune.Trainable] = tune.with_parameters(
            Slot, workers=workers, runner=runner, storage=str(self.folder.tune)
        )
        return slot

    def _display(self, budget: Budget) -> Display:
        """The display, with the trials that earlier sessions of the run have finished."""
        request, best = self.request, best_trial(self.study)
        display = Display(
            self.console, request.trials, self.search.judged_epochs, budget, self.search.about_first
        )
        found = (best.values[0], trial_name(best.number)) if best else None
        display.count_earlier(len(self._finished()), found)
        return display

    def _earlier(self) -> list[optuna.trial.FrozenTrial]:
        """The trials of earlier sessions with all values that they have answered."""
        hear_missed(self.study, self._unfinished(), self.progress)
        return self.study.get_trials(deepcopy=False)

    def _finished(self) -> list[optuna.trial.FrozenTrial]:
        return [trial for trial in self.study.get_trials(deepcopy=False) if trial.state.is_finished()]

    def _count_devices(self, budget: Budget, workers: Workers) -> None:
        """Tell the budget the devices of a slot, and what the trials of earlier sessions have used."""
        budget.unit = "GPU" if workers.gpus else "CPU"
        budget.epochs = self.search.epochs * len(self.request.cells)
        budget.devices = workers.count * (workers.gpus or workers.cpus)
        budget.used = tables.accelerator_seconds(self.study, budget.devices, self.progress)

    def _say_next(self, page: Path, budget: Budget) -> None:
        run = run_as_typed(self.folder.path)
        here = self.folder.path if address_of(self.folder.path) else run
        unfinished = len(running_trials(self.study))
        if budget.reason and not budget.interrupted:
            self.console.print(f"\nThe search ended early: {budget.reason}.", highlight=False)
        ended = baseline_finished(self.folder, self.request, self.search.objectives)
        missing = self.request.baseline_trials - ended
        if missing and not budget.interrupted:
            self.console.print(
                f"\nOf the baseline {ended} of {self.request.baseline_trials} trials ended.",
                highlight=False,
            )
        if self.request.is_part:
            # Whoever continued it by itself would search on after a look; the nested search says what follows.
            return
        if budget.interrupted or unfinished or missing:
            self.console.print(
                f"\n{unfinished + missing} trial(s) unfinished. Continue with\n  brainsweep resume {run}"
            )
        self.console.print(
            f"\nNext:\n  open {here}/{page.name}\n"
            f"  tensorboard --logdir {here}/tensorboard\n"
            f"  optuna-dashboard {here}/study.journal\n"
            + (f"  brainsweep predict {run} VOLUME.nii.gz\n" if (self.folder.path / BEST).exists() else ""),
            highlight=False,
        )


def run_sweep(launch: Launch, shared: Shared | None = None) -> RunFolder:
    """Search, refit, look at the hold-out once, report. Returns the run's folder.

    Args:
        launch: how the user began it.
        shared: what a nested search gives to its sweeps.

    Raises:
        UserError: a part of the request cannot work; this is raised before anything starts.
    """
    quiet()
    out, console = launch.out, launch.console
    request, starts = read_starts(launch.request, None if shared is None else shared.starts)
    opened = Cohort.open(launch.cohort)
    search = resolve_search(request, opened)
    refuse_other_starts(search.settings.begin.weights, search.profile.settings, starts)
    check_place(out, request)
    refuse_taken(out)
    first = first_points(search, launch) if shared is None else shared.first
    request = with_whole_grid(request, search, first)
    splits = check_subjects(request, search, opened)
    tell_of_grid(search.settings, opened, console)
    judged = np.concatenate([splits.development, splits.holdout])
    tell_what_matches(search.settings, starts, opened, splits.development, console)
    leaks = check_leaks(
        starts, search.settings, opened, judged, console, is_allowed=request.allow_seen_subjects
    )
    request = with_hash(request, splits, opened.manifest)
    folder = create_run(out, SWEEP, recorded(request, search), search.base, opened, first)
    keep_starts(folder, starts, leaks)
    folder.update(task=with_starts(folder.about.task, request.starts))
    with held(folder, console):
        study = open_study(folder.journal, request.sampler, request.search_seed, search.objectives)
        sweep = Sweep(folder, request, search, opened, splits, study, console, launch.address, shared)
        return sweep.begin().execute()


@contextmanager
def held(folder: RunFolder, console: Console) -> Iterator[None]:
    """Lock the folder of the run against other writers; if the run has an address, keep its files up to date."""
    with claim(folder.path, console), kept_up(folder.path, console):
        yield
