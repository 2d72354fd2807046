"""A population: its members copy each other and change settings while they train. What the study records of it.

A population finds a schedule. It evolves only in the first cell, so its members cannot be compared with other trials,
and they end as PRUNED. Then the settings that the weights of the best member followed, epoch by epoch, become one
ordinary trial on all cells. This trial is reported, refitted, and written to `schedule.yaml`. Everything random in a
cell follows from its seeds, so in the first cell this trial repeats the best member exactly.
"""

from __future__ import annotations

import json
import math
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypedDict, cast

import numpy as np
import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from sklearn.exceptions import ConvergenceWarning

from core.errors import UserError
from core.files.writing import write_text, writing_to
from core.objectives import COST
from core.report.answer.record import reported
from core.run_names import CELLS_DONE, CHECKPOINT, EXCHANGED, LINEAGE, MEMBER_VALUE, REASON, SECONDS, SETTINGS
from distributed.run.assignment import Answer, Assignment, kept_checkpoint
from distributed.search.budget import Budget
from distributed.search.population_methods import (
    CLOCK,
    POPULATIONS,
    Method,
    Range,
    change,
    exchange_interval,
    setting,
)
from distributed.search.schedulers import Result
from distributed.search.study import ranks, report_value


class Exchange(TypedDict):
    """A member continued with the weights of another member, its donor."""

    epoch: int
    donor: str
    changed: dict[str, float]
    """The settings that were changed and could act: their new values, by dotted name."""


@dataclass
class Member:
    """The state of one member; `changed` are the changeable settings as the method sees them."""

    assignment: Assignment
    changed: dict[str, float]
    lineage: list[Exchange] = field(default_factory=list)
    exchanged: list[Exchange] = field(default_factory=list)
    epochs: int = 0
    spent: float = 0.0


def begin_member(method: Method, ranges: Sequence[Range], assignment: Assignment) -> Member:
    """A member before its first epoch. A setting that it does not have is seen as the middle of the range."""
    changed = {}
    for one in ranges:
        value = setting(assignment["settings"], one.name)
        number = value if isinstance(value, int | float) else one.at_place(0.5)
        changed[one.name] = method.seen(one, float(number))
    return Member(assignment, changed)


class Population(TrialScheduler):
    """The scheduler of Ray for members that are trials of the study, with their own folders and checkpoints.

    Ray clones a trial by copying the whole configuration of the donor. This class notices it at once, and gives the
    member an assignment of its own: its folder, the kept checkpoint of the donor to continue from, and the settings of
    the donor until this epoch, followed by the changed ones.
    """

    def __init__(
        self, name: str, ranges: Sequence[Range], epochs: int, seed: int, study: optuna.Study,
        budget: Budget, state: Path,
    ) -> None:  # fmt: skip
        super().__init__()  # type: ignore[no-untyped-call]  # Ray left it untyped
        self.method, self.ranges, self.epochs, self.seed = POPULATIONS[name], ranges, epochs, seed
        self.study, self.budget, self.state = study, budget, state
        self.interval = exchange_interval(epochs)
        self.members: dict[str, Member] = {}
        self.ended: set[str] = set()
        self.names: dict[str, str] = {}
        self.boundary = self.entered = 0
        """The epoch of the last exchange, and of the exchange at which this session began."""
        self.broken: str | None = None

    def enter(self, members: dict[str, Member], boundary: int) -> None:
        """Begin with `members` in their state at the exchange after epoch `boundary`."""
        self.members, self.boundary, self.entered = members, boundary, boundary
        mode = "max" if self.study.direction == StudyDirection.MAXIMIZE else "min"
        self.exchange = self.method.scheduler(self.ranges, self.interval, mode)
        self._record()

    def on_trial_add(self, tune_controller: TuneController, trial: Trial) -> None:
        """Give a trial of Tune the assignment of its member."""
        name = trial.config["member"]
        self.names[trial.trial_id] = name
        self._give(trial, name)
        self.exchange.on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: TuneController, trial: Trial, result: Result) -> str:
        """Record the value; exchange as soon as all members have reached the epoch of the next exchange."""
        name = self.names[trial.trial_id]
        member = self.members[name]
        answer = cast(Answer, result)
        member.epochs, member.spent = answer["epochs"], answer["spent_seconds"]
        with self._storage():
            self._report(name, answer)
        return self._hand_on(tune_controller, trial, result)

    def choose_trial_to_run(self, tune_controller: TuneController) -> Trial | None:
        """The choice of Ray. If all members wait for one that has failed, exchange now: Ray would wait for ever."""
        chosen = self.exchange.choose_trial_to_run(tune_controller)
        live = [trial for trial in tune_controller.get_trials() if not trial.is_finished()]
        if chosen is None and live and all(trial.status == "PAUSED" for trial in live):
            self._hand_on(tune_controller, live[-1], live[-1].last_result)
            chosen = self.exchange.choose_trial_to_run(tune_controller)
        return chosen

    def on_trial_complete(self, tune_controller: TuneController, trial: Trial, result: Result) -> None:
        """Tell the study how the member ended; an interrupted member has not ended."""
        self.exchange.on_trial_complete(tune_controller, trial, result)
        answer = cast(Answer, result)
        if answer.get("storage"):
            self._stop_for(answer["failed"])
        elif answer.get("failed"):
            self._tell(trial, TrialState.FAIL, answer["failed"])
        elif answer.get("finished"):
            with self._storage():
                name = self.names[trial.trial_id]
                self._report(name, answer)
                self._trial(name).set_user_attr(MEMBER_VALUE, answer["value"])
                self.members[name].spent = answer["spent_seconds"]
            self._tell(trial, TrialState.PRUNED, "its cell was for finding a schedule")

    def on_trial_error(self, tune_controller: TuneController, trial: Trial) -> None:
        """A member has failed if its slot crashed too often."""
        self.exchange.on_trial_error(tune_controller, trial)
        if not self.budget.interrupted:
            self._tell(trial, TrialState.FAIL, "its slot crashed; see error.txt under tune/")

    def on_trial_remove(self, tune_controller: TuneController, trial: Trial) -> None:
        """An interrupted member keeps its state."""
        self.exchange.on_trial_remove(tune_controller, trial)

    def debug_string(self) -> str:
        """For Tune's log."""
        return self.exchange.debug_string()

    def _hand_on(self, tune_controller: TuneController, trial: Trial, result: Result) -> str:
        """The decision of Ray; after an exchange, give the clones their own assignments."""
        # Ray draws from the global generators, and only in an exchange. With these seeds a resumed run draws the same.
        random.seed(f"{self.seed} {self.boundary}")
        np.random.seed([self.seed, self.boundary])
        clocked = result | {CLOCK: cast(Answer, result)["epochs"] - self.entered}
        with warnings.catch_warnings():
            # The Gaussian process of PB2 warns at the ends of its bounds.
            warnings.simplefilter("ignore", ConvergenceWarning)
            decision = self.exchange.on_trial_result(tune_controller, trial, clocked)
        live = [member for name, member in self.members.items() if name not in self.ended]
        due = self.boundary + self.interval
        if all(member.epochs >= due for member in live):
            for each in tune_controller.get_trials():
                name, donor = self.names[each.trial_id], each.config["assignment"]["name"]
                if donor != name:
                    self._clone(each, name, donor, due)
            before, self.boundary = self.boundary, due
            with self._storage():
                self._record()
                # Members that began at the exchange before have a later checkpoint now.
                for member in self.members.values():
                    kept_checkpoint(Path(member.assignment["folder"]), before).unlink(missing_ok=True)
        return decision

    def _clone(self, trial: Trial, name: str, donor_name: str, epoch: int) -> None:
        """Let `name` continue from the state of `donor_name` after `epoch`, with the settings that Ray has changed."""
        member, donor = self.members[name], self.members[donor_name]
        drawn = trial.config["changed"]
        meant = {one.name: self.method.meant(one, drawn[one.name]) for one in self.ranges}
        moved = {one: value for one, value in meant.items() if drawn[one] != donor.changed[one]}
        settings, acted = change(donor.assignment["settings"], moved, epoch / self.epochs)
        inherited = donor.spent - donor.assignment["spent_before"]
        member.assignment = member.assignment.copy()
        member.assignment["settings"] = settings
        member.assignment["begin"] = str(kept_checkpoint(Path(donor.assignment["folder"]), epoch))
        member.assignment["spent_before"] = member.spent - inherited
        member.changed = {one.name: self.method.seen(one, meant[one.name]) for one in self.ranges}
        exchange = Exchange(epoch=epoch, donor=donor_name, changed=acted)
        member.lineage, member.exchanged = [*donor.lineage, exchange], [*member.exchanged, exchange]
        self._give(trial, name)
        with self._storage():
            own = self._trial(name)
            own.set_user_attr(SETTINGS, json.dumps(settings))
            own.set_user_attr(LINEAGE, member.lineage)
            own.set_user_attr(EXCHANGED, member.exchanged)

    def _give(self, trial: Trial, name: str) -> None:
        member = self.members[name]
        trial.set_config({"member": name, "assignment": member.assignment, "changed": dict(member.changed)})

    def _report(self, name: str, answer: Answer) -> None:
        """Record the value once, because a resumed population repeats the epochs since its last exchange."""
        frozen = self.study.get_trials(deepcopy=False)[int(name)]
        if math.isfinite(answer["value"]) and answer["epochs"] not in reported(frozen):
            report_value(self._trial(name), answer["value"], answer["epochs"])

    def _tell(self, trial: Trial, state: TrialState, reason: str) -> None:
        name = self.names[trial.trial_id]
        self.ended.add(name)
        with self._storage():
            own, member = self._trial(name), self.members[name]
            described = {REASON: reason, CELLS_DONE: 1, SECONDS: member.spent}
            for key, value in (described | {COST: member.spent * self.budget.devices}).items():
                own.set_user_attr(key, value)
            self.study.tell(own, state=state)
            (Path(member.assignment["folder"]) / CHECKPOINT).unlink(missing_ok=True)

    def _trial(self, name: str) -> optuna.Trial:
        return optuna.Trial(self.study, self.study.get_trials(deepcopy=False)[int(name)]._trial_id)

    def _record(self) -> None:
        """Write the state from which `resume` continues."""
        content = {
            "boundary": self.boundary,
            "members": {name: asdict(one) for name, one in self.members.items()},
        }
        with writing_to(self.state.parent):
            write_text(self.state, json.dumps(content))

    def _storage(self) -> _StopWhereStorageFails:
        return _StopWhereStorageFails(self)

    def _stop_for(self, reason: str) -> None:
        self.broken, self.budget.interrupted = self.broken or reason.partition(";")[0], True


@dataclass(frozen=True)
class _StopWhereStorageFails:
    """Stops everything if the folder of the run cannot be written; the run can be resumed from the last exchange."""

    population: Population

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, where: object) -> bool:
        if isinstance(error, OSError):
            self.population._stop_for(f"cannot write the run: {error.strerror or error}")
        elif isinstance(error, UserError) and isinstance(error.__cause__, OSError):
            self.population._stop_for(str(error))
        else:
            return False
        return True


def read_members(
    state: Path, running: set[str], place: Callable[[str], Path]
) -> tuple[dict[str, Member], int]:
    """The members of an interrupted population that are still `running`, in their state at its last exchange.

    They repeat the epochs since this exchange, with the same numbers: at most one interval each. So no member is past
    the next exchange before it takes place.

    Args:
        state: the file.
        running: the names of the trials that have not ended.
        place: the folder of a trial, by its name. No path of the file is used: the run may have been moved, and others
            may have written the file.

    Raises:
        UserError: the file is damaged.
    """
    members = {}
    try:
        content = json.loads(state.read_text())
        boundary = int(content["boundary"])
        for name in sorted(running & content["members"].keys()):
            member = Member(**content["members"][name])
            folder, begin = place(name), member.assignment["begin"]
            if begin is not None:
                begin = str(place(Path(begin).parent.name) / Path(begin).name)
            member.assignment["name"], member.assignment["folder"] = name, str(folder)
            member.assignment["begin"] = begin
            begun_here = member.lineage and member.lineage[-1]["epoch"] == boundary
            if boundary and not begun_here:
                member.assignment["begin"] = str(kept_checkpoint(folder, boundary))
            members[name] = member
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{state} is damaged ({type(error).__name__}): put it back from a backup, or start a new run"
        ) from None
    for name in members:
        (place(name) / CHECKPOINT).unlink(missing_ok=True)
    return members, boundary


def best_member(study: optuna.Study) -> FrozenTrial | None:
    """The member with the best last value; None if no member trained to the end."""
    ended = [trial for trial in study.get_trials(deepcopy=False) if MEMBER_VALUE in trial.user_attrs]
    return min(
        ended, key=lambda trial: (ranks(study, [trial.user_attrs[MEMBER_VALUE]]), trial.number), default=None
    )
