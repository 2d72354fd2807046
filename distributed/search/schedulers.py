"""The schedulers of Ray Tune, which stop a trial early by its reported values, and how they continue in a resumed run.

All of them compare `METRIC` (the first objective) at `TIME` (the epochs done in all cells). They never stop a trial
that reports no `TIME`: the published trial and the refits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState
from ray import tune
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from scipy.stats import wilcoxon

from core.errors import UserError
from core.lookup import look_up
from core.objectives import Better, Metric, measure
from core.report.answer.record import reported
from core.run_names import AFTER_CELLS, CELL_VALUES, LABEL, PUBLISHED
from distributed.run.assignment import METRIC, PRUNABLE_EPOCHS, Answer, trial_name, trial_number
from distributed.search.budget import Budget
from distributed.search.population_methods import POPULATIONS

TIME = PRUNABLE_EPOCHS
"""The key of the epochs done in all cells."""
HYPERBAND_REDUCTION = 3


def mode_of(better: Better) -> str:
    """As Ray says which values are better."""
    return "min" if better == "low" else "max"


def _asha(epochs: int, cells: int, better: Better) -> TrialScheduler:
    """Compare at 1/4 and 1/2 of the first cell, at its end, and at every doubling of whole cells."""
    grace, mode = max(1, epochs // 4), mode_of(better)
    return ASHAScheduler(TIME, METRIC, mode, max_t=epochs * cells, grace_period=grace, reduction_factor=2)


Result = dict[str, object]
"""A result as Tune passes it on: an `Answer` of `distributed.run.assignment`, with additional fields of Tune."""


class MedianStopping(MedianStoppingRule):
    """The rule of Ray, which expects `TIME` in the last result of every trial, and raises an error without it."""

    def on_trial_result(self, tune_controller: TuneController, trial: Trial, result: Result) -> str:
        """The decision, also on a trial that goes on although it would be stopped now: one of an earlier session."""
        self._stopped_trials.discard(trial)
        return super().on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: TuneController, trial: Trial, result: Result) -> None:
        """Compare the trial only if it reports `TIME`."""
        if TIME in result:
            super().on_trial_complete(tune_controller, trial, result)


def _median(epochs: int, cells: int, better: Better) -> TrialScheduler:
    """From half of the first cell on, stop a trial that is worse than the median of the running means of the others."""
    return MedianStopping(
        TIME,
        METRIC,
        mode_of(better),
        grace_period=max(1, epochs // 2),
        min_samples_required=3,
        # Never pause a trial to give its slot to another one.
        min_time_slice=float("inf"),  # type: ignore[arg-type]
    )


class Hyperband(FIFOScheduler):
    """Asynchronous Hyperband: several brackets of ASHA side by side, from early stopping to no stopping.

    Bracket s first compares its trials after r·eta^s epochs. It gets trials in proportion to eta^s'/(s'+1), where s'
    is counted from the last bracket, as in Hyperband (Li et al., JMLR 18, 2018, algorithm 1). No trial waits until a
    rung is full: the synchronous HyperBandScheduler of Ray pauses trials for this, and reports half of the trials that
    ran to their end as stopped. AsyncHyperBandScheduler(brackets=k) of Ray draws the bracket of a trial from the
    global random state, so a resumed search would choose other brackets; here the bracket follows from the number of
    the trial.
    """

    def __init__(self, epochs: int, cells: int, better: Better) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # Ray left it untyped
        grace, longest, eta = max(1, epochs // 4), epochs * cells, HYPERBAND_REDUCTION
        last = int(math.log(longest / grace) / math.log(eta) + 1e-9)
        self.brackets = [
            ASHAScheduler(
                TIME,
                METRIC,
                mode_of(better),
                max_t=longest,
                grace_period=grace * eta**step,
                reduction_factor=eta,
            )
            for step in range(last + 1)
        ]
        self.shares = [eta ** (last - step) / (last - step + 1) for step in range(last + 1)]
        self.bracket_of: dict[str, ASHAScheduler] = {}

    def bracket_number(self, number: int) -> int:
        """The bracket of trial `number`: each trial in turn goes to the bracket that is furthest below its share."""
        dealt = [0] * len(self.brackets)
        for _ in range(number + 1):
            behind = [(count + 1) / share for count, share in zip(dealt, self.shares, strict=True)]
            chosen = int(np.argmin(behind))
            dealt[chosen] += 1
        return chosen

    def on_trial_add(self, tune_controller: TuneController, trial: Trial) -> None:
        """Put the trial into its bracket. A refit or a repetition reports no `TIME`, so its bracket does not matter."""
        number = trial_number(trial.config["assignment"]["name"])
        self.bracket_of[trial.trial_id] = self.brackets[self.bracket_number(number or 0)]
        self.bracket_of[trial.trial_id].on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: TuneController, trial: Trial, result: Result) -> str:
        """The decision of its bracket."""
        return self.bracket_of[trial.trial_id].on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: TuneController, trial: Trial, result: Result) -> None:
        """Tell its bracket the last value."""
        self.bracket_of.pop(trial.trial_id).on_trial_complete(tune_controller, trial, result)

    def debug_string(self) -> str:
        """For Tune's log."""
        return f"Hyperband, {len(self.brackets)} brackets"


SCHEDULERS: dict[str, Callable[[int, int, Better], TrialScheduler]] = {
    "asha": _asha,
    "hyperband": Hyperband,
    "median": _median,
    "none": lambda epochs, cells, better: FIFOScheduler(),
}
"""(epochs of a cell, cells, which values are better) -> scheduler; `population_methods.py` has the methods that change
settings in training."""


Spares = Callable[[str], bool]
"""Whether nothing stops the trial of this name early."""


def spares(startup_trials: int, budget: Budget) -> Spares:
    """Nothing stops the first `startup_trials`, and the one that has to be completed so that there is a result."""

    def is_spared(name: str) -> bool:
        number = trial_number(name)
        return name == budget.completes or (number is not None and number < startup_trials)

    return is_spared


def _nobody(name: str) -> bool:
    return False


def make_scheduler(
    name: str, epochs: int, cells: int, is_spared: Spares = _nobody, better: Better = "low"
) -> TrialScheduler:
    """The scheduler `name` for trials of `cells` cells of `epochs` epochs each; see `ByName` for `is_spared`.

    `better` says which values of the first objective are better.
    """
    # What follows the evolution of a population is compared on all cells: no scheduler stops it early.
    known = SCHEDULERS | dict.fromkeys(POPULATIONS, SCHEDULERS["none"])
    return ByName(look_up(known, name, "scheduler")(epochs, cells, better), is_spared)


@dataclass(frozen=True, eq=False)
class _Named:
    """A trial as the schedulers of Ray see it: they identify it by its `trial_id`, or by the object."""

    trial_id: str
    config: dict[str, dict[str, str]]


class ByName(FIFOScheduler):
    """Shows every trial to a scheduler under its name, which it keeps for the whole run.

    Tune gives a new id to a trial that continues in a resumed run, or after its slot crashed. A scheduler that knows
    only the id takes it for a new trial: at its first report, in epoch 8, ASHA would record this value at the rung of
    epoch 6, although the trial has a value of epoch 6.

    The values of trials that are spared count for the others, but these trials are not stopped.
    """

    def __init__(self, scheduler: TrialScheduler, is_spared: Spares = _nobody) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # Ray left it untyped
        self.scheduler, self.is_spared = scheduler, is_spared
        self.trials: dict[str, Trial] = {}

    def on_trial_add(self, tune_controller: TuneController, trial: Trial) -> None:
        """Add the trial, unless the scheduler knows it."""
        name = trial.config["assignment"]["name"]
        if name not in self.trials:
            self.trials[name] = cast(Trial, _Named(name, trial.config))
            self.scheduler.on_trial_add(tune_controller, self.trials[name])

    def on_trial_result(self, tune_controller: TuneController, trial: Trial, result: Result) -> str:
        """The decision of the scheduler."""
        decision = self.scheduler.on_trial_result(tune_controller, self._known(trial), result)
        return self.CONTINUE if self.is_spared(trial.config["assignment"]["name"]) else decision

    def on_trial_complete(self, tune_controller: TuneController, trial: Trial, result: Result) -> None:
        """Tell the scheduler the last value."""
        self.scheduler.on_trial_complete(tune_controller, self._known(trial), result)

    def on_trial_error(self, tune_controller: TuneController, trial: Trial) -> None:
        """Keep the values that it has reported: it continues, or they still measure others."""

    def on_trial_remove(self, tune_controller: TuneController, trial: Trial) -> None:
        """See `on_trial_error`."""

    def debug_string(self) -> str:
        """For Tune's log."""
        return self.scheduler.debug_string()

    def _known(self, trial: Trial) -> Trial:
        return self.trials[trial.config["assignment"]["name"]]


def replay(
    scheduler: TrialScheduler, trials: list[FrozenTrial], named: Callable[[int], str] = trial_name
) -> None:
    """Show a new scheduler the values of earlier trials, so that a resumed search prunes as if never interrupted.

    Trials that are not finished are shown, too: they continue, and are compared at the epochs that they have done. The
    published trial is left out, as in a search that was not interrupted: it reports no `TIME`. `named` gives the name
    of a trial, by its number.
    """
    # Only schedulers that pause trials use the controller.
    controller = cast(TuneController, None)
    for trial in trials:
        values = reported(trial)
        if not values or trial.user_attrs.get(LABEL) == PUBLISHED:
            continue
        name = named(trial.number)
        shown = cast(Trial, _Named(name, {"assignment": {"name": name}}))
        scheduler.on_trial_add(controller, shown)
        result: Result = {}
        for epochs, value in sorted(values.items()):
            result = {TIME: epochs, METRIC: value}
            scheduler.on_trial_result(controller, shown, result)
        if trial.state.is_finished():
            scheduler.on_trial_complete(controller, shown, result)


@dataclass
class Wilcoxon(tune.Stopper):
    """Stop a trial that is worse than the best trial on the same cells, by the signed-rank test over pairs of cells.

    As the WilcoxonPruner of Optuna: one-sided, zero differences split, and never while the mean of the trial is the
    better one. The test is made after every finished cell. With n cells the p-value is at least 1/2^n, so a threshold
    of 0.1 first acts after 4 cells, and a threshold of 0.05 after 5.
    """

    threshold: float
    study: optuna.Study
    metric: str
    """The name of the first objective."""
    about: Metric
    cells: int
    is_spared: Spares = _nobody
    reasons: dict[str, str] = field(default_factory=dict)

    def __call__(self, trial_id: str, result: Result) -> bool:
        """Whether to stop the trial; `reasons` keeps the reason."""
        answer = cast(Answer, result)
        finished = answer.get("cells") or []
        if self.is_spared(answer.get("name", "")):
            return False
        if TIME not in answer or answer["done"] or not 2 <= len(finished) < self.cells:
            return False
        p = self._p_value([measure(self.metric, cell) for cell in finished])
        if p >= self.threshold:
            return False
        self.reasons[trial_id] = f"Wilcoxon p = {p:.3f} against the best trial over {len(finished)} cells"
        return True

    def stop_all(self) -> bool:
        """Never."""
        return False

    def _p_value(self, values: list[float]) -> float:
        """The p-value against `values` being no worse than those of the best trial; 1 without a best trial."""
        completed = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        judged = [trial for trial in completed if CELL_VALUES in trial.user_attrs]
        if not judged:
            return 1.0
        sign = self.about.sign
        best = min(judged, key=lambda trial: (sign * trial.values[0], trial.number)).user_attrs
        # The pruner compares trials as they are, or were, after equally many cells. Trials of version 0.2 did not keep
        # this, and none of their cells changed later: then, as in Optuna, the mean is that of all cells.
        after_cells = best.get(AFTER_CELLS)
        others = after_cells[len(values) - 1] if after_cells else best[CELL_VALUES][: len(values)]
        differences = sign * np.subtract(values, others)
        if sign * np.mean(values) <= sign * np.mean(others if after_cells else best[CELL_VALUES]):
            return 1.0
        return float(wilcoxon(differences, alternative="greater", zero_method="zsplit").pvalue)


def pruner_threshold(text: str, cells: int) -> float | None:
    """The p-value of `--pruner`, which is `none`, `wilcoxon` (0.1) or `wilcoxon=P`; None for `none`.

    Raises:
        UserError: another name, a threshold outside (0, 1), or one that so few cells cannot reach.
    """
    name, _, given = text.partition("=")
    if look_up({"none": False, "wilcoxon": True}, name, "pruner") is False:
        return None
    try:
        threshold = float(given or 0.1)
    except ValueError:
        threshold = math.nan
    if not 0 < threshold < 1:
        raise UserError(f"--pruner wilcoxon=P needs a P between 0 and 1, got {given!r}")
    if 0.5 ** (cells - 1) >= threshold:
        raise UserError(
            f"--pruner {text} could never stop a trial: after {cells - 1} of {cells} cells no p-value is below "
            f"{0.5 ** (cells - 1):.3g}; use more --folds or --seeds, or a larger P"
        )
    return threshold
