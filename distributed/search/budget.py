"""How much a search may use: trials are counted in search.py; here time, accelerators, and hope of improvement."""

from __future__ import annotations

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

FEWEST_TRIALS = 20
"""Completed trials before the end is judged: what Optuna takes."""


def _regret(seed: int) -> Terminator:
    """The bound on what the best could still gain is below the noise of its own cells (Makarova et al. 2022)."""
    return Terminator(RegretBoundEvaluator(seed=seed), CrossValidationErrorEvaluator(), FEWEST_TRIALS)


def _emmr(seed: int) -> Terminator:
    """The expected minimum model regret has fallen far below what it was (Ishibashi et al. 2023)."""
    evaluator = EMMREvaluator(seed=seed)
    return Terminator(evaluator, MedianErrorEvaluator(evaluator), FEWEST_TRIALS)


STOP_WHEN: dict[str, Callable[[int], Terminator] | None] = {"never": None, "regret": _regret, "emmr": _emmr}
"""Optuna's terminators. Both model only settings that every trial has; the conditional ones count as noise."""


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
    """When to propose nothing more (`spent`, `unlikely`), and when to stop everything at once (`interrupted`).

    The clock of `seconds` starts with the first result: bringing slots up is no searching. Accelerator-time is
    that of the epochs, times the devices of a slot; what earlier sessions of the run used counts on. Neither
    counts refits.
    """

    seconds: float | None = None
    accelerator_hours: float | None = None
    devices: float = 1.0
    """GPUs of a slot; its CPUs where there are no GPUs."""
    unit: str = "CPU"
    interrupted: bool = False
    unlikely: bool = False
    deadline: float | None = None
    used: dict[str, float] = field(default_factory=dict)
    """Accelerator-seconds so far of each trial, by its name."""
    beyond: set[str] = field(default_factory=set)
    """Tune's names of what runs outside the budget: refits, and the winner's confirmation."""

    @property
    def hours_used(self) -> float:
        """Accelerator-hours of all trials of the run."""
        return sum(self.used.values()) / 3600

    @property
    def spent(self) -> bool:
        """Whether a budget is used up: what runs is stopped, and can be continued by `resume`."""
        out_of_time = self.deadline is not None and time.time() > self.deadline
        out_of_hours = self.accelerator_hours is not None and self.hours_used >= self.accelerator_hours
        return out_of_time or out_of_hours

    @property
    def is_over(self) -> bool:
        """Whether no further trial is begun."""
        return self.spent or self.unlikely or self.interrupted

    @property
    def reason(self) -> str | None:
        """Why the search ended before its last trial; None where it did not."""
        if self.interrupted:
            return "interrupted"
        if self.unlikely:
            return "further improvement was judged unlikely"
        if self.accelerator_hours is not None and self.hours_used >= self.accelerator_hours:
            return f"{self.hours_used:.3g} {self.unit}-hours used of {self.accelerator_hours:g}"
        return f"the time budget of {self.seconds:g} s was used up" if self.spent else None

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Stop a running trial of the search once the budget is spent; refits run to their end."""
        if trial_id in self.beyond or result.get("fold") == HOLDOUT:
            return False
        if self.deadline is None and self.seconds is not None:
            self.deadline = time.time() + self.seconds
        if "spent_seconds" in result:
            self.used[result["name"]] = result["spent_seconds"] * self.devices
        return self.spent and not result["done"]

    def stop_all(self) -> bool:
        """Asked by Tune between results."""
        return self.interrupted

    def remaining(self) -> list[str]:
        """What is left, in words, of each budget that was set."""
        left = []
        if self.seconds is not None:
            seconds = self.seconds if self.deadline is None else max(0.0, self.deadline - time.time())
            left.append(f"{seconds:.0f} s")
        if self.accelerator_hours is not None:
            left.append(f"{max(0.0, self.accelerator_hours - self.hours_used):.3g} {self.unit}-hours")
        return left


def judge_improvement(terminator: Terminator | None, study: optuna.Study) -> bool:
    """Whether the terminator expects nothing of further trials; asked after every completed one."""
    if (
        terminator is None
        or len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))) < FEWEST_TRIALS
    ):
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bool(terminator.should_terminate(study))
