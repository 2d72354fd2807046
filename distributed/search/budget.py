"""The limits of a search: time, accelerators, and an expected improvement. `searcher.py` counts the trials."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.terminator import (
    CrossValidationErrorEvaluator,
    EMMREvaluator,
    MedianErrorEvaluator,
    RegretBoundEvaluator,
    Terminator,
)
from optuna.trial import TrialState
from ray import tune

from core.errors import UserError
from core.lookup import look_up
from distributed.run.assignment import HOLDOUT

NEAR = 0.1
"""A trial may finish its cell beyond a budget if this takes at most this share of the budget."""
HOPELESS = 2.0
"""A sweep is refused if what is always completed would end beyond so many times the budget."""
FEWEST_TRIALS = 20
"""The number of completed trials before a terminator is asked, as in Optuna."""


def _regret(seed: int) -> Terminator:
    """End when the bound on the remaining improvement is below the noise of the best trial (Makarova et al. 2022)."""
    return Terminator(RegretBoundEvaluator(seed=seed), CrossValidationErrorEvaluator(), FEWEST_TRIALS)


def _emmr(seed: int) -> Terminator:
    """End when the expected minimum model regret is far below its earlier values (Ishibashi et al. 2023)."""
    evaluator = EMMREvaluator(seed=seed)
    return Terminator(evaluator, MedianErrorEvaluator(evaluator), FEWEST_TRIALS)


STOP_WHEN: dict[str, Callable[[int], Terminator] | None] = {"never": None, "regret": _regret, "emmr": _emmr}
"""The terminators of Optuna. Both model only settings that every trial has; to them conditional settings are noise."""


def make_terminator(name: str, seed: int, objectives: int, shared_settings: int) -> Terminator | None:
    """The terminator of `--stop-when`; None for `never`.

    Raises:
        UserError: an unknown name, several objectives, or a space without a setting that all trials have.
    """
    make = look_up(STOP_WHEN, name, "--stop-when")
    if make is None:
        return None
    if objectives > 1:
        raise UserError(f"--stop-when {name} is defined for one objective, and {objectives} are asked for")
    if not shared_settings:
        raise UserError(
            f"--stop-when {name} needs a setting that every configuration has, and this space has none"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return make(seed)


@dataclass
class Budget(tune.Stopper):
    """When to begin no further trial (`spent`, `unlikely`), and when to stop everything at once (`interrupted`).

    The clock of `seconds` starts with the first result, because the start of the slots is not search time. Accelerator
    time is the time of the epochs, multiplied by the devices of a slot; it includes earlier sessions of the run. Refits
    count for neither of them. A spent budget stops running trials, except the one that `completes`, and those that are
    near the end of their cell.
    """

    seconds: float | None = None
    accelerator_hours: float | None = None
    devices: float = 1.0
    """The GPUs of a slot; its CPUs if it has no GPUs."""
    unit: str = "CPU"
    interrupted: bool = False
    unlikely: bool = False
    deadline: float | None = None
    used: dict[str, float] = field(default_factory=dict)
    """The accelerator-seconds that each trial has used so far, by its name."""
    beyond: set[str] = field(default_factory=set)
    """The ids in Tune of what is not part of the budget: refits, and the repetition of the winner."""
    completes: str = ""
    """The name of the trial that runs to its end whatever the budget says, so that there is a result."""
    epochs: int = 0
    """The epochs of a whole trial, over all cells."""
    later_epochs: int = 0
    """The epochs of a trial that is completed after this search: of the published one, if this is a population."""
    hopeless: str | None = None
    """Why the sweep is refused: even what is always completed would end far beyond the budget."""
    first_answers: dict[str, float] = field(default_factory=dict)
    """The seconds that trials had used at their first answer in this session, by name."""
    checked: bool = False
    """Whether it was found out in this session that the budget is not hopeless."""
    cut: set[str] = field(default_factory=set)
    """The ids in Tune of the trials that this budget has stopped."""
    time_shares: int = 1
    hour_shares: int = 1
    """In how many equal parts the sweeps of a nested search share what the user gave: those that were left when this
    session began share the time, and all of them the accelerator-hours."""
    share: float = 1.0
    """The part of both budgets that this search may use; the rest is for another search of the run."""
    elapsed: float = 0.0
    """Seconds of the time budget that another search of this session has used."""

    @property
    def own_seconds(self) -> float | None:
        """The seconds that are for this search."""
        return None if self.seconds is None else self.seconds * self.share - self.elapsed

    @property
    def own_hours(self) -> float | None:
        """The accelerator-hours that are for this search."""
        return None if self.accelerator_hours is None else self.accelerator_hours * self.share

    @property
    def running_for(self) -> float:
        """Seconds since the first result of this session; 0 without a time budget."""
        if self.deadline is None or self.own_seconds is None:
            return 0.0
        return time.time() - self.deadline + self.own_seconds

    @property
    def out_of_hours(self) -> bool:
        """Whether the accelerator-hours of this search are used up."""
        return self.own_hours is not None and self.hours_used >= self.own_hours

    @property
    def hours_used(self) -> float:
        """The accelerator-hours that all trials of the run have used."""
        return sum(self.used.values()) / 3600

    @property
    def spent(self) -> bool:
        """Whether a budget is used up. Then running trials are stopped, and `resume` can continue them."""
        out_of_time = self.deadline is not None and time.time() > self.deadline
        return out_of_time or self.out_of_hours

    @property
    def far_beyond(self) -> bool:
        """Whether even a search without a result ends now, and begins no further trial."""
        late = self.seconds is not None and self.elapsed + self.running_for > HOPELESS * self.seconds
        hours = self.accelerator_hours
        return late or (hours is not None and self.hours_used > HOPELESS * hours)

    @property
    def is_over(self) -> bool:
        """Whether no further trial begins."""
        return self.spent or self.unlikely or self.interrupted

    @property
    def reason(self) -> str | None:
        """Why the search ended before its last trial; None if it did not."""
        if self.hopeless is not None:
            return self.hopeless
        if self.interrupted:
            return "interrupted"
        if self.unlikely:
            return "further improvement was judged unlikely"
        if self.out_of_hours:
            return f"{self.hours_used:.3g} {self.unit}-hours used of {self.own_hours:g}"
        return f"the time budget of {self.seconds:g} s was used up" if self.spent else None

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether to stop a running trial: the budget is spent. Refits run to their end."""
        if trial_id in self.beyond or result.get("fold") == HOLDOUT:
            return False
        if self.deadline is None and self.own_seconds is not None:
            self.deadline = time.time() + self.own_seconds
        if "spent_seconds" in result:
            self.used[result["name"]] = result["spent_seconds"] * self.devices
        is_owed = bool(self.completes) and result.get("name") == self.completes
        if is_owed or (self.later_epochs and not self.completes):
            own_left = self.epochs - result.get("epochs", 0) if is_owed else 0
            self._refuse_if_hopeless(result.get("name", ""), result.get("spent_seconds", 0.0), own_left)
        if is_owed or not self.spent or result["done"] or self._finishes_soon(result):
            return False
        self.cut.add(trial_id)
        return True

    def _refuse_if_hopeless(self, name: str, spent: float, own_left: int) -> None:
        """Asked once in a session, at the second answer of a trial, because its first epoch also warms up.

        Args:
            name: of the trial.
            spent: seconds that it has used so far.
            own_left: epochs that it will go on for, over all cells, whatever the budget says.
        """
        is_first = name not in self.first_answers
        each = spent - self.first_answers.setdefault(name, spent)
        left = own_left + self.later_epochs
        if not is_first and each <= 0:
            # The time of a member of a population may go back, when it takes the weights of another one.
            self.first_answers[name] = spent
        if is_first or self.checked or left <= 0 or each <= 0:
            return
        self.checked = True
        seconds = self.elapsed + self.running_for + left * each
        hours = self.hours_used + left * each * self.devices / 3600
        needed = f"what is completed in any case ({left} more epochs of {each:.2g} s) needs"

        def each_of(shares: int) -> str:
            return f" that each of {shares} hold-outs has" if shares > 1 else ""

        if self.seconds is not None and seconds > HOPELESS * self.seconds:
            self.hopeless = (
                f"{needed} about {seconds:.0f} s in all, more than {HOPELESS:g} times the time budget of "
                f"{self.seconds:g} s{each_of(self.time_shares)}; give --time-budget "
                f"{math.ceil(seconds * self.time_shares)} or more"
            )
        elif self.accelerator_hours is not None and hours > HOPELESS * self.accelerator_hours:
            self.hopeless = (
                f"{needed} about {hours:.2g} {self.unit}-hours in all, more than {HOPELESS:g} times the budget of "
                f"{self.accelerator_hours:g}{each_of(self.hour_shares)}; give --accelerator-hours "
                f"{hours * self.hour_shares:.2g} or more"
            )
        self.interrupted = self.interrupted or self.hopeless is not None

    def _finishes_soon(self, result: dict[str, Any]) -> bool:
        """Whether the rest of the cell takes at most the share `NEAR` of each budget that was set."""
        progress = result.get("progress", 1.0)
        if progress >= 1.0:
            return False
        epochs_left = result["epoch"] * (1.0 / progress - 1.0)
        seconds_left = epochs_left * result["spent_seconds"] / result["epochs"]
        soon = [seconds_left <= NEAR * self.own_seconds] if self.own_seconds is not None else []
        if self.own_hours is not None:
            soon.append(seconds_left * self.devices / 3600 <= NEAR * self.own_hours)
        return all(soon)

    def stop_all(self) -> bool:
        """Whether to stop everything; Tune asks this between results."""
        return self.interrupted

    def remaining(self) -> list[str]:
        """The rest of each budget that was set, as text."""
        left = []
        if self.own_seconds is not None:
            seconds = self.own_seconds if self.deadline is None else self.deadline - time.time()
            left.append(f"{max(0.0, seconds):.0f} s")
        if self.own_hours is not None:
            left.append(f"{max(0.0, self.own_hours - self.hours_used):.3g} {self.unit}-hours")
        return left


def judge_improvement(terminator: Terminator | None, study: optuna.Study) -> bool:
    """Whether the terminator expects no improvement from further trials; asked after every completed trial."""
    if (
        terminator is None
        or len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))) < FEWEST_TRIALS
    ):
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bool(terminator.should_terminate(study))
