"""A search for the best baseline, before the main search: on the same cells, in the same slots, by the same rules.

The winner is the best of many configurations. Compared with one untuned baseline, such as direct regression, it has
an advantage that does not come from its objective. The trials of the baseline have a study and folders of their own.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

import optuna
from optuna.trial import FrozenTrial
from ray.tune.stopper import CombinedStopper
from rich.console import Console

from core.objectives import Objectives
from core.run_names import BASELINE_STUDY, LABEL, PUBLISHED, SETTINGS
from distributed.run.assignment import Assignment, assign, baseline_name
from distributed.run.folder import RunFolder
from distributed.run.working_copy import send
from distributed.search.budget import Budget
from distributed.search.schedulers import make_scheduler, replay, spares
from distributed.search.searcher import Proposals, StudySearch
from distributed.search.study import (
    ReadProgress,
    best_trial,
    enqueue,
    hear_missed,
    open_study,
    owed_trial,
    progress_reader,
    published_parameters,
    running_trials,
)
from distributed.sweeps.display import Display, TensorBoard
from distributed.sweeps.executor import Executor, release_slots
from distributed.sweeps.interruption import interruptible
from distributed.sweeps.request import SweepRequest
from distributed.sweeps.resolve import ResolvedSearch, judgement
from distributed.sweeps.tables import accelerator_seconds


def baseline_study(folder: RunFolder, request: SweepRequest, objectives: Objectives) -> optuna.Study:
    """The study of the baseline, made if absent."""
    return open_study(folder.journal, request.sampler, request.search_seed, objectives, BASELINE_STUDY)


def baseline_progress(folder: RunFolder, request: SweepRequest, search: ResolvedSearch) -> ReadProgress:
    """Reads the progress of a trial of the baseline."""
    return progress_reader(folder.baseline, request.cells, search.first)


def best_baseline(folder: RunFolder, request: SweepRequest, objectives: Objectives) -> FrozenTrial | None:
    """The best completed trial of the baseline; None if there is none."""
    return best_trial(baseline_study(folder, request, objectives)) if request.baseline_trials else None


def baseline_finished(folder: RunFolder, request: SweepRequest, objectives: Objectives) -> int:
    """How many trials of the baseline have ended."""
    if not request.baseline_trials:
        return 0
    study = baseline_study(folder, request, objectives)
    return sum(trial.state.is_finished() for trial in study.get_trials(False))


@dataclass(frozen=True)
class Baseline:
    """The search for the baseline of a run; a search of an earlier session continues."""

    folder: RunFolder
    request: SweepRequest
    search: ResolvedSearch
    """Of the baseline: its space and its settings."""
    console: Console

    def run(self, budget: Budget, executor: Executor) -> str | None:
        """Run what is left of the baseline's trials.

        Args:
            budget: of the main search; it learns what the baseline has used, and whether the sweep was interrupted.
            executor: the slots.

        Returns:
            Why the storage of the run or of the cohort failed; None if it did not.
        """
        study = baseline_study(self.folder, self.request, self.search.objectives)
        self.begin(study)
        own = self.share_of(budget, study)
        broken = None
        if self._is_left(study, own) and not budget.interrupted:
            broken = self._search(study, own, executor)
        budget.used |= own.used
        budget.elapsed = own.running_for
        budget.checked = own.checked
        budget.hopeless, budget.interrupted = own.hopeless, budget.interrupted or own.interrupted
        return broken

    @property
    def progress(self) -> ReadProgress:
        """Reads the progress of a trial."""
        return baseline_progress(self.folder, self.request, self.search)

    def begin(self, study: optuna.Study) -> None:
        """Enqueue the first trial, once: the published settings with its changes, which nothing stops early."""
        if study.get_trials(deepcopy=False):
            return
        point = published_parameters(self.search.space, self.search.base)
        if point is not None:
            enqueue(study, [point], PUBLISHED)
        else:
            # They lie outside the space, so no sampler can learn from this trial.
            study.enqueue_trial({}, user_attrs={LABEL: PUBLISHED, SETTINGS: json.dumps(self.search.base)})

    def share_of(self, budget: Budget, study: optuna.Study) -> Budget:
        """The budget of the baseline: of every 10 trials of the run it has so many, and the same share of the time."""
        request = self.request
        return Budget(
            seconds=budget.seconds,
            accelerator_hours=budget.accelerator_hours,
            devices=budget.devices,
            unit=budget.unit,
            epochs=self.search.epochs * len(request.cells),
            later_epochs=budget.later_epochs,
            time_shares=budget.time_shares,
            hour_shares=budget.hour_shares,
            share=request.baseline_trials / (request.trials + request.baseline_trials),
            used=accelerator_seconds(study, budget.devices, self.progress, baseline_name),
        )

    def searcher(self, study: optuna.Study, own: Budget) -> StudySearch:
        """The searcher of the baseline; nothing follows its trials."""
        request = self.request
        proposals = Proposals(
            study=study,
            space=self.search.space,
            base=self.search.base,
            trials=request.baseline_trials,
            assignment=self._assignment,
            refits=lambda study: [],
            continued=running_trials(study),
            starts=request.starts,
            stages=0 if self.search.settings.pretraining is None else request.stages,
            secure=lambda: send(self.folder.journal),
            tell=lambda text: self.console.print(text, highlight=False, soft_wrap=True, markup=False),
        )
        return StudySearch(proposals, own, judgement(request, self.search, study, own))

    def _is_left(self, study: optuna.Study, own: Budget) -> bool:
        trials = study.get_trials(deepcopy=False)
        has_result = owed_trial(study) is None and best_trial(study) is not None
        ended = sum(trial.state.is_finished() for trial in trials) >= self.request.baseline_trials
        return not ended and not (own.spent and has_result)

    def _search(self, study: optuna.Study, own: Budget, executor: Executor) -> str | None:
        request, first = self.request, self.search.about_first
        hear_missed(study, running_trials(study), self.progress)
        searcher = self.searcher(study, own)
        is_spared = spares(request.startup_trials, own)
        scheduler = make_scheduler(
            request.scheduler, self.search.judged_epochs, len(request.cells), is_spared, first.better
        )
        replay(scheduler, study.get_trials(deepcopy=False), baseline_name)
        rival = self.search.about.rival
        name = "baseline" if rival is None else rival.method
        display = Display(
            self.console, request.baseline_trials, self.search.judged_epochs, own, first, what=name
        )
        best = best_trial(study)
        display.count_earlier(
            sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False)),
            (best.values[0], baseline_name(best.number)) if best else None,
        )
        board = TensorBoard.of(self.folder.path, self.search)
        pruner = searcher.judgement.pruner
        tuner = dataclasses.replace(executor, callbacks=(display, board)).search(
            searcher, scheduler, CombinedStopper(own, pruner) if pruner else own, "baseline"
        )
        self.console.print(
            f"first the {name}, which the winner is compared with: {request.baseline_trials} trial(s)",
            highlight=False,
        )
        with interruptible(own, self.console), display:
            tuner.fit()
        release_slots()
        return searcher.broken

    def _assignment(self, name: str, settings: dict[str, object], prunable: bool) -> Assignment:
        request = self.request
        assignment = assign(
            self.folder.baseline(name),
            settings,
            request.cells,
            prunable=prunable,
            metric=self.search.first,
        )
        assignment["name"] = baseline_name(int(name))
        return assignment
