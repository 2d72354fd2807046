"""The story of a search: which configuration a slot tries next, and what is told to the study about it.

The Optuna study in the run's journal file is the one record of the search. Ray Tune only executes: it asks
`StudySearch` for the next assignment, hands results to the scheduler, and can be killed at any moment.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from core.config import Settings, flatten, merge, resolve, with_absent
from core.errors import UserError
from core.lookup import look_up
from core.tasks import TASKS
from distributed.train_loop import HOLDOUT
from distributed.trial import CHECKPOINT, PRUNABLE_EPOCHS

# The grouped and quasi-random samplers are "experimental" since years.
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
optuna.logging.set_verbosity(optuna.logging.WARNING)

STUDY = "brainsweep"
METRIC, TIME = "value", PRUNABLE_EPOCHS
"""The keys of a result that the scheduler compares: validation error, and epochs done over all cells."""
PUBLISHED = "published"
"""The label of the first trial. It is never stopped early, so that every other can be compared with it."""

Space = Callable[[optuna.Trial], Mapping[str, Any]]


def _asha(epochs: int, cells: int) -> TrialScheduler:
    """Halving at 1/4 and 1/2 of the first cell, at its end, and at every doubling of whole cells."""
    grace = max(1, epochs // 4)
    return ASHAScheduler(TIME, METRIC, "min", max_t=epochs * cells, grace_period=grace, reduction_factor=2)


def _median(epochs: int, cells: int) -> TrialScheduler:
    """Stop what is worse than the median of the others' running means, from half of the first cell on."""
    return MedianStoppingRule(
        TIME,
        METRIC,
        "min",
        grace_period=max(1, epochs // 2),
        min_samples_required=3,
        min_time_slice=float("inf"),  # type: ignore[arg-type]  # never pause a trial to give others its slot
    )


SCHEDULERS: dict[str, Callable[[int, int], TrialScheduler]] = {
    "asha": _asha,
    "median": _median,
    "none": lambda epochs, cells: FIFOScheduler(),
}

SAMPLERS: dict[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(
        seed=seed, multivariate=True, group=True, constant_liar=True, n_startup_trials=8
    ),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
    "qmc": lambda seed: optuna.samplers.QMCSampler(seed=seed),
    "cmaes": lambda seed: optuna.samplers.CmaEsSampler(seed=seed),
}


def make_scheduler(name: str, epochs: int, cells: int) -> TrialScheduler:
    """The scheduler `name` for trials of `cells` cells of `epochs` epochs each."""
    return look_up(SCHEDULERS, name, "scheduler")(epochs, cells)


def open_study(journal: Path, sampler: str, seed: int) -> optuna.Study:
    """The study in `journal`, made if absent."""
    return optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(journal))),
        study_name=STUDY,
        sampler=look_up(SAMPLERS, sampler, "sampler")(seed),
        direction="minimize",
        load_if_exists=True,
    )


def published_parameters(space: Space, base: Settings) -> dict[str, Any] | None:
    """The point of `space` that is the published configuration `base`; None if it lies outside."""
    every_setting = flatten(resolve(base).model_dump(mode="json"))
    trial = optuna.trial.FixedTrial(with_absent(every_setting))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Optuna only warns of a value out of range
        try:
            space(trial)  # type: ignore[arg-type]
        except (ValueError, UserWarning):
            return None
    return dict(trial.params)


def check_space(space: Space, base: Settings, samples: int = 30) -> frozenset[str]:
    """Try `space` on random points before anything is started; returns the names of what it searches.

    Raises:
        UserError: the first mistake.
    """
    names: set[str] = set()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(samples):
        trial = study.ask()
        proposed = space(trial)
        names |= trial.params.keys()
        if not isinstance(proposed, Mapping):
            raise UserError(f"the space must return a dict of settings, got {type(proposed).__name__}")
        settings = resolve(merge(base, proposed))
        look_up(TASKS, settings.task, "task").check(settings)
    return frozenset(names)


@dataclass
class Budget(tune.Stopper):
    """When to propose nothing more (`spent`), and when to stop everything at once (`interrupted`).

    The clock of `seconds` starts with the first result: bringing slots up is no searching.
    """

    seconds: float | None = None
    interrupted: bool = False
    deadline: float | None = None

    @property
    def spent(self) -> bool:
        """Whether the time budget is used up."""
        return self.deadline is not None and time.time() > self.deadline

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Stop a running trial of the search once the time is up; refits run to their end."""
        if self.deadline is None and self.seconds is not None:
            self.deadline = time.time() + self.seconds
        return self.spent and not result["done"] and result["fold"] != HOLDOUT

    def stop_all(self) -> bool:
        """Asked by Tune between results."""
        return self.interrupted


@dataclass
class Proposals:
    """What a search draws its assignments from, and how many trials it may use."""

    study: optuna.Study
    space: Space
    base: Settings
    trials: int
    assignment: Callable[[str, Settings, bool], dict[str, Any]]
    """(name, settings, prunable) -> assignment"""
    refits: Callable[[optuna.Study], list[dict[str, Any]]]
    continued: list[FrozenTrial] = field(default_factory=list)


class StudySearch(tune.search.Searcher):
    """Ray Tune's searcher over an Optuna study, which it tells the truth.

    Ray's own OptunaSearch tells COMPLETE for trials the scheduler stopped and only logs a NaN. Here an early
    stop is PRUNED with its intermediate values, a diverged or crashed trial FAIL with the reason, and an
    interrupted trial stays RUNNING until `resume` continues it. When the search is over, the refits follow
    in the same slots.
    """

    def __init__(self, proposals: Proposals, budget: Budget) -> None:
        super().__init__(metric=METRIC, mode="min")
        self.proposals, self.budget = proposals, budget
        self.running: dict[str, optuna.Trial] = {}
        self.refitting: set[str] = set()
        self.refits: list[dict[str, Any]] | None = None
        self.started: dict[str, float] = {}

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict, **spec: Any) -> bool:
        """The metric is fixed."""
        return True

    def suggest(self, trial_id: str) -> Any:
        """The next assignment; None while refits wait for the last trials; FINISHED in the end."""
        trial = self._next_trial()
        if trial is not None:
            self.running[trial_id] = trial
            self.started[trial_id] = time.time()
            return {"assignment": self._assignment(trial)}
        if self.running:
            return None
        if self.refits is None:
            self.refits = self.proposals.refits(self.proposals.study)
        if not self.refits:
            return tune.search.Searcher.FINISHED
        self.refitting.add(trial_id)
        return {"assignment": self.refits.pop(0)}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Keep the intermediate value, at the epochs done over all cells."""
        trial = self.running.get(trial_id)
        if trial is not None and math.isfinite(result[METRIC]):
            trial.report(result[METRIC], step=result["epochs"])
        if trial is not None and result["epochs"] == 1 and result.get("previous_end_at"):
            # from the end of the slot's last trial to the first step of this one
            trial.set_user_attr("idle_seconds", result["started_at"] - result["previous_end_at"])

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tell the study how the trial ended."""
        self.refitting.discard(trial_id)
        trial = self.running.pop(trial_id, None)
        if trial is None:
            return
        result = result or {}
        finished = bool(result.get("finished"))
        if not (error or finished or "failed" in result) and (self.budget.interrupted or self.budget.spent):
            return
        seconds = time.time() - self.started[trial_id]
        for name, value in {"sd": result.get("sd"), "n": result.get("n"), "seconds": seconds}.items():
            trial.set_user_attr(name, value)
        study = self.proposals.study
        if error or "failed" in result:
            trial.set_user_attr(
                "reason", result.get("failed") or "its slot crashed; see error.txt under tune/"
            )
            study.tell(trial, state=TrialState.FAIL)
        elif finished:
            study.tell(trial, result[METRIC])
        else:
            if math.isfinite(result[METRIC]):
                trial.report(result[METRIC], step=result["epochs"])
            study.tell(trial, state=TrialState.PRUNED)
        self._forget_checkpoint(trial)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study is on disk already."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: see `save`."""

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing: see `save`."""

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its searcher for a restore that we do not use; the study does not travel."""
        return {}

    def _next_trial(self) -> optuna.Trial | None:
        proposals = self.proposals
        if self.budget.spent or self.budget.interrupted:
            return None
        if proposals.continued:
            unfinished = proposals.continued.pop(0)
            return optuna.Trial(proposals.study, unfinished._trial_id)
        asked = [
            trial for trial in proposals.study.get_trials(deepcopy=False) if trial.state != TrialState.WAITING
        ]
        return proposals.study.ask() if len(asked) < proposals.trials else None

    def _assignment(self, trial: optuna.Trial) -> dict[str, Any]:
        """The trial's resolved settings, recorded with it before anything runs."""
        recorded = trial.user_attrs.get("settings")
        if recorded is None:
            proposed = self.proposals.space(trial)
            settings = resolve(merge(self.proposals.base, proposed)).model_dump(mode="json")
            trial.set_user_attr("settings", json.dumps(settings))
        else:
            settings = json.loads(recorded)
        prunable = trial.user_attrs.get("label") != PUBLISHED
        return self.proposals.assignment(trial_name(trial.number), settings, prunable)

    def _forget_checkpoint(self, trial: optuna.Trial) -> None:
        folder = self.proposals.assignment(trial_name(trial.number), {}, True)["folder"]
        (Path(folder) / CHECKPOINT).unlink(missing_ok=True)


def trial_name(number: int) -> str:
    """The name of a trial's folder."""
    return f"{number:04d}"


@dataclass(frozen=True)
class _Replayed:
    """Stands for a finished trial before a scheduler, which knows trials by their `trial_id`."""

    trial_id: str


def replay(scheduler: TrialScheduler, finished: list[FrozenTrial]) -> None:
    """Show a new scheduler what earlier trials reported, so that a resumed search prunes as it would have."""
    for trial in finished:
        stand_in: Any = _Replayed(f"replayed-{trial.number}")
        controller: Any = None  # asked only by schedulers that pause trials
        scheduler.on_trial_add(controller, stand_in)
        result: dict[str, Any] = {}
        for epochs, value in sorted(trial.intermediate_values.items()):
            result = {TIME: epochs, METRIC: value}
            scheduler.on_trial_result(controller, stand_in, result)
        if result:
            scheduler.on_trial_complete(controller, stand_in, result)
