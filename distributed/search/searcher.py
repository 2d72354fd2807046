"""The course of a search: which configuration a slot tries next, and what the study is told about it.

The Optuna study in the journal file of the run is the only record of the search. Ray Tune only executes it: Tune asks
`StudySearch` for the next assignment, passes results to the scheduler, and can be killed at any moment.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import optuna
from optuna.terminator import Terminator
from optuna.trial import FrozenTrial, TrialState
from ray import tune

from core.config import Settings
from core.objectives import COST, Objectives, mean_of, measure
from core.run_names import (
    AFTER_CELLS,
    CELL_VALUES,
    CELLS_DONE,
    IDLE_SECONDS,
    LABEL,
    OUTSIDE,
    PENALTY,
    PUBLISHED,
    REASON,
    SD,
    SECONDS,
    WEIGHTS,
)
from distributed.run.assignment import METRIC, Answer, Assignment, forget_checkpoint, trial_name
from distributed.search.budget import Budget, judge_improvement
from distributed.search.schedulers import Wilcoxon, mode_of
from distributed.search.study import (
    best_trial,
    owed_trial,
    report_cells,
    report_value,
    settings_of,
    together,
    trials_begun,
)
from search_spaces.points import Space

FIRST_STAGE = "pretraining."
"""What the names of the settings of a first stage begin with."""
SLOT_CRASHES = 2
"""How often a trial may lose its slot and get another one, in addition to the restarts of Tune."""


@dataclass
class Proposals:
    """The source of the assignments of a search, and the number of trials that it may use."""

    study: optuna.Study
    space: Space
    base: Settings
    trials: int
    assignment: Callable[[str, Settings, bool], Assignment]
    """(name of its folder, settings, prunable) -> assignment"""
    refits: Callable[[optuna.Study], list[Assignment]]
    continued: list[FrozenTrial] = field(default_factory=list)
    starts: Sequence[str | None] = ()
    """What is compared in equally many trials: the choices of the parameter `WEIGHTS`; all alike if fewer than two."""
    stages: int = 0
    """How many different first stages are tried; 0 if there is none."""
    secure: Callable[[], None] = lambda: None
    """Called when the study has changed in a way that must not be lost with this machine."""
    tell: Callable[[str], None] = lambda text: None
    """Called with what the user must know about a trial that does not run."""


@dataclass(frozen=True)
class Judgement:
    """How trials are judged: the objectives, and what stops a trial or the whole search early."""

    objectives: Objectives
    measured: Objectives = field(default_factory=dict)
    """What the tables show of every trial, too: what the task offers as objectives."""
    scheduler: str = "none"
    pruner: Wilcoxon | None = None
    terminator: Terminator | None = None


class StudySearch(tune.search.Searcher):
    """The searcher of Ray Tune for an Optuna study; it tells the study how each trial really ended.

    The OptunaSearch of Ray tells COMPLETE for trials that the scheduler stopped, and only logs a NaN. Here a trial
    that is stopped early is PRUNED, with its intermediate values and the reason. A trial that diverged or crashed is
    FAIL, with the reason. An interrupted trial stays RUNNING until `resume` continues it. After the search the refits
    follow in the same slots.
    """

    def __init__(self, proposals: Proposals, budget: Budget, judgement: Judgement) -> None:
        self.first, *self.others = judgement.objectives
        super().__init__(metric=METRIC, mode=mode_of(judgement.objectives[self.first].better))
        self.proposals, self.budget, self.judgement = proposals, budget, judgement
        self.running: dict[str, optuna.Trial] = {}
        self.refitting: dict[str, Assignment] = {}
        self.crashes: dict[str, int] = {}
        self.broken: str | None = None
        """Why the storage of the run or of the cohort failed. Then everything stops, and the run can be resumed."""
        self.refits: list[Assignment] | None = None
        self.started: dict[str, float] = {}
        self.heard: set[str] = set()
        """The trials that have answered; the first answer of one without a network is its last, too."""

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, object], **spec: object
    ) -> bool:
        """Tell Tune that the metric is fixed."""
        return True

    def suggest(self, trial_id: str) -> Any:
        """The next assignment; None while refits wait for the last trials; FINISHED at the end."""
        with self._storage():
            while (trial := self._next_trial()) is not None:
                assignment = self._assignment(trial)
                # Otherwise a sweep that is resumed on another machine could give this folder to another trial.
                self.proposals.secure()
                if assignment is not None:
                    self.running[trial_id] = trial
                    self.started[trial_id] = time.time()
                    return {"assignment": assignment}
        if self.running and self.broken is None:
            return None
        if self.budget.interrupted:
            # A refit would look at the hold-out now, and never begin.
            return tune.search.Searcher.FINISHED
        if self.refits is None:
            self.refits = self.proposals.refits(self.proposals.study)
        # While a refit runs its slot may crash, and then the refit must run again.
        if not self.refits:
            return None if self.refitting else tune.search.Searcher.FINISHED
        self.budget.beyond.add(trial_id)
        self.refitting[trial_id] = self.refits.pop(0)
        return {"assignment": self.refitting[trial_id]}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Record the intermediate value, at the number of epochs done in all cells."""
        # If the storage has failed, the journal may end with half a line.
        if self.broken is None:
            with self._storage():
                self._keep(trial_id, cast(Answer, result))

    def _keep(self, trial_id: str, answer: Answer) -> None:
        trial = self.running.get(trial_id)
        # In a first stage the value is that of the cells before it, which is known already.
        if trial is not None and math.isfinite(answer["value"]) and "stage" not in answer:
            report_value(trial, answer["value"], answer.get("judged_epochs", answer["epochs"]))
        before = answer.get("previous_end_at")
        is_first, self.heard = trial_id not in self.heard, self.heard | {trial_id}
        if trial is not None and before and is_first:
            trial.set_user_attr(IDLE_SECONDS, answer["started_at"] - before)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tell the study how the trial ended."""
        if self.broken is None:
            with self._storage():
                self._end(trial_id, cast(Answer, result or {}), error)

    def _end(self, trial_id: str, answer: Answer, error: bool) -> None:
        trial = self.running.pop(trial_id, None)
        refit = self.refitting.pop(trial_id, None)
        self.heard.discard(trial_id)
        if answer.get("storage"):
            self._stop_for(answer["failed"])
        if self.budget.interrupted and (error or "storage" in answer):
            return
        if error and refit is not None and self._may_begin_again(refit["name"]) and self.refits is not None:
            self.refits.append(refit)
        if trial is None:
            return
        if error and self._may_begin_again(trial_name(trial.number)):
            self.proposals.continued.append(self.proposals.study.get_trials(deepcopy=False)[trial.number])
            return
        failed = "its slot crashed; see error.txt under tune/" if error else answer.get("failed")
        if failed is None and answer.get("finished"):
            failed = self._undefined(answer)
        elif failed is None and (self.budget.interrupted or trial_id in self.budget.cut):
            return
        with together(self.proposals.study):
            self._describe(trial, trial_id, answer)
            if failed is not None:
                self._tell_failed(trial, failed)
            elif answer.get("finished"):
                self._tell_completed(trial, answer)
            else:
                self._tell_pruned(trial, trial_id, answer)
        is_complete = failed is None and answer.get("finished")
        if is_complete and judge_improvement(self.judgement.terminator, self.proposals.study):
            self.budget.unlikely = True
        self._name_owed()
        self.proposals.secure()
        self._forget_checkpoint(trial)

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the study is on disk already."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: see `save`."""

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Do nothing: see `save`."""

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its searcher for a restore that we do not use; the study is not pickled."""
        return {}

    def _next_trial(self) -> optuna.Trial | None:
        proposals = self.proposals
        if self.budget.is_over:
            return self._owed()
        if proposals.continued:
            unfinished = proposals.continued.pop(0)
            return optuna.Trial(proposals.study, unfinished._trial_id)
        return self._ask() if trials_begun(proposals.study) < proposals.trials else None

    def _ask(self) -> optuna.Trial:
        """A new trial: the one that waits, or one of the start and the first stage that have had the fewest trials."""
        study, starts = self.proposals.study, self.proposals.starts
        if not study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            begun = [trial for trial in study.get_trials(deepcopy=False) if trial.state != TrialState.FAIL]
            had = [trial.params for trial in begun if OUTSIDE not in trial.user_attrs]
            fixed: dict[str, Any] = {}
            if len(starts) > 1:
                fixed[WEIGHTS] = min(starts, key=[params.get(WEIGHTS) for params in had].count)
            if self.proposals.stages:
                stages = [stage for params in had if (stage := _of_first_stage(params))]
                known = [stage for place, stage in enumerate(stages) if stage not in stages[:place]]
                # A value that is drawn anew is never drawn twice, so no trial would share the stage of another.
                if len(known) >= self.proposals.stages:
                    counts = [stages.count(stage) for stage in known]
                    fixed |= known[counts.index(min(counts))]
            if fixed:
                study.enqueue_trial(fixed)
        return study.ask()

    def _owed(self) -> optuna.Trial | None:
        """The trial that is completed whatever the budget says, if it does not run; None if there is none.

        If nothing has completed and nothing is unfinished, another trial begins.
        """
        study, proposals = self.proposals.study, self.proposals
        if self.budget.interrupted:
            return None
        owed = owed_trial(study)
        if owed is None:
            may_begin = trials_begun(study) < proposals.trials and not self.budget.far_beyond
            return self._ask() if best_trial(study) is None and may_begin else None
        if owed.number in {trial.number for trial in self.running.values()}:
            return None
        if owed.state == TrialState.WAITING:
            # `study.ask` would take the one that has waited longest.
            study._storage.set_trial_state_values(owed._trial_id, TrialState.RUNNING)
        proposals.continued[:] = [trial for trial in proposals.continued if trial.number != owed.number]
        return optuna.Trial(study, owed._trial_id)

    def _name_owed(self) -> None:
        """Tell the budget which trial it may not stop now."""
        owed = owed_trial(self.proposals.study)
        is_running = owed is not None and owed.state == TrialState.RUNNING
        self.budget.completes = self._name(owed.number) if owed is not None and is_running else ""

    def _name(self, number: int) -> str:
        """The name of a trial's assignment."""
        return self.proposals.assignment(trial_name(number), {}, True)["name"]

    def _assignment(self, trial: optuna.Trial) -> Assignment | None:
        """The assignment of a trial; None if the space or the settings refuse it, and then the trial has ended.

        Its resolved settings are recorded before anything runs.
        """
        # Not told together: the sampler and the space of a user may take long, and nobody else could write meanwhile.
        settings = settings_of(trial, self.proposals.space, self.proposals.base)
        if settings is None:
            reason = trial.user_attrs[REASON]
            self.proposals.tell(f"trial {trial_name(trial.number)} did not begin: {reason}")
            return None
        self._name_owed()
        prunable = trial.user_attrs.get(LABEL) != PUBLISHED and not self._is_first_of_its_start(trial)
        return self.proposals.assignment(trial_name(trial.number), settings, prunable)

    def _is_first_of_its_start(self, trial: optuna.Trial) -> bool:
        """Whether no earlier trial of this start has, or may have, a result: every start needs one to compare."""
        if len(self.proposals.starts) < 2:
            return False
        start, without = trial.params.get(WEIGHTS), (TrialState.FAIL, TrialState.PRUNED)
        earlier = (
            each
            for each in self.proposals.study.get_trials(deepcopy=False)
            if each.number < trial.number and each.state not in without and OUTSIDE not in each.user_attrs
        )
        return all(each.params.get(WEIGHTS) != start for each in earlier)

    @contextlib.contextmanager
    def _storage(self) -> Iterator[None]:
        """Stop everything if the journal of the study cannot be written."""
        try:
            yield
        except OSError as error:
            self._stop_for(f"cannot write the study: {error.strerror or error}")

    def _stop_for(self, reason: str) -> None:
        self.broken, self.budget.interrupted = self.broken or reason.partition(";")[0], True

    def _may_begin_again(self, name: str) -> bool:
        """Whether a trial whose slot crashed gets another slot; it continues from its last epoch.

        Tune restarts a running trial, but not a trial that the slot was just receiving.
        """
        self.crashes[name] = self.crashes.get(name, 0) + 1
        return self.crashes[name] <= SLOT_CRASHES

    def _undefined(self, answer: Answer) -> str | None:
        """Why a finished trial has no value; None if it has one."""
        for name, metric in self.judgement.objectives.items():
            if name != COST and not math.isfinite(mean_of(name, answer["cells"])):
                why = ": fewer than two sites among its subjects" if metric.needs_sites else ""
                return f"'{name}' is undefined in a cell{why}"
        return None

    def _describe(self, trial: optuna.Trial, trial_id: str, answer: Answer) -> None:
        """Record what the tables show of a trial, whether it finished or not."""
        cells = answer.get("cells") or []
        cost = answer.get("spent_seconds", 0.0) * self.budget.devices
        known = self.judgement.measured or self.judgement.objectives
        measured = {name: mean_of(name, cells) for name in known if name != COST and cells}
        described = {
            SD: answer.get("sd"),
            CELLS_DONE: answer.get("n"),
            SECONDS: time.time() - self.started.pop(trial_id),
            COST: cost,
            CELL_VALUES: [measure(self.first, cell) for cell in cells],
            **{name: value for name, value in measured.items() if math.isfinite(value)},
        }
        for name, value in described.items():
            trial.set_user_attr(name, value)

    def _tell_failed(self, trial: optuna.Trial, reason: str) -> None:
        trial.set_user_attr(REASON, reason)
        self.proposals.study.tell(trial, state=TrialState.FAIL)

    def _tell_completed(self, trial: optuna.Trial, answer: Answer) -> None:
        values = [answer["value"]]
        for name in self.others:
            is_cost = name == COST
            values.append(trial.user_attrs[COST] if is_cost else mean_of(name, answer["cells"]))
        if "after_cells" in answer:
            trial.set_user_attr(AFTER_CELLS, answer["after_cells"])
        if "penalty" in answer:
            trial.set_user_attr(PENALTY, answer["penalty"])
        report_cells(trial, [measure(self.first, cell) for cell in answer["cells"]])
        self.proposals.study.tell(trial, values)

    def _tell_pruned(self, trial: optuna.Trial, trial_id: str, answer: Answer) -> None:
        if math.isfinite(answer["value"]):
            report_value(trial, answer["value"], answer.get("judged_epochs", answer["epochs"]))
        by_pruner = self.judgement.pruner.reasons.pop(trial_id, None) if self.judgement.pruner else None
        trial.set_user_attr(REASON, by_pruner or f"{self.judgement.scheduler} after epoch {answer['epochs']}")
        self.proposals.study.tell(trial, state=TrialState.PRUNED)

    def _forget_checkpoint(self, trial: optuna.Trial) -> None:
        folder = self.proposals.assignment(trial_name(trial.number), {}, True)["folder"]
        forget_checkpoint(Path(folder))


def _of_first_stage(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a first stage."""
    return {name: value for name, value in params.items() if name.startswith(FIRST_STAGE)}
