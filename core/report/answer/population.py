"""The findings of a population, from the record of its run: the schedule in words, the members and their exchanges."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
from optuna.trial import FrozenTrial

from core.report.answer.describe import describe, is_absent, number
from core.report.answer.record import RunRecord
from core.run_names import EXCHANGED, FOUND, FOUND_BY, LABEL, LINEAGE, MEMBER, SETTINGS
from core.schedules import as_schedule, with_epochs

FOLLOWED = {
    "optimiser.learning_rate": "learning rate",
    "optimiser.weight_decay": "weight decay",
    "objective.temperature": "temperature",
    "objective.width": "kernel width",
    "objective.neighbours.end": "neighbours' end",
}
"""The settings that a population changes, by dotted name, and their names in the report."""
SHOWN_VALUES = 3

Course = list[tuple[int, float]]
"""First epoch (from 1) and value of every piece of a setting, in order."""


@dataclass(frozen=True)
class FoundSchedule:
    """The trial with the schedule that a population found: its number, the best member, and its settings."""

    trial: int
    member: int
    settings: dict[str, Any]
    lineage: list[dict[str, Any]]

    @property
    def epochs(self) -> int:
        """The epochs of a cell."""
        return int(self.settings["training"]["epochs"])

    def course(self, name: str) -> Course:
        """The values of the setting `name`, each with its first epoch; empty if absent or with its own schedule."""
        return _course(_at(self.settings, name), self.epochs)

    def every_epoch(self, name: str) -> list[float]:
        """The value of the setting `name` in epoch 1, 2, …, also if it has its own schedule; empty if it is absent."""
        value = _at(self.settings, name)
        if not isinstance(value, int | float | Mapping):
            return []
        schedule = with_epochs(as_schedule(value, name), self.epochs)
        return [schedule(epoch / self.epochs) for epoch in range(1, self.epochs + 1)]

    @property
    def courses(self) -> dict[str, Course]:
        """The course of every setting that a population changes and that this schedule has."""
        every = {name: self.course(name) for name in FOLLOWED}
        return {name: course for name, course in every.items() if course}

    @property
    def followed(self) -> list[tuple[int, int]]:
        """The members that trained these weights, in order, each with the last epoch in which it trained them."""
        donors = [(int(each["donor"]), int(each["epoch"])) for each in self.lineage]
        return [*donors, (self.member, self.epochs)]


def found_schedule(record: RunRecord) -> FoundSchedule | None:
    """The schedule that the population of a run found; None if there is none, or if the study is absent."""
    for trial in _trials(record, FOUND):
        settings = trial.user_attrs.get(SETTINGS)
        if settings is not None and FOUND_BY in trial.user_attrs:
            member, lineage = trial.user_attrs[FOUND_BY], trial.user_attrs.get(LINEAGE, [])
            return FoundSchedule(trial.number, int(member), json.loads(settings), lineage)
    return None


def members(record: RunRecord) -> list[FrozenTrial]:
    """The members of the population of a run, in the order of their numbers."""
    return _trials(record, MEMBER)


def is_member(trials: pd.DataFrame) -> pd.Series:
    """Which rows of a trials table are members, which were not stopped early but always train in one cell."""
    return (trials["label"] == MEMBER) & (trials["state"] == "PRUNED")


def has_population(record: RunRecord) -> bool:
    """Whether the run began with a population."""
    return bool((record.trials["label"] == MEMBER).any())


def exchange_table(record: RunRecord) -> pd.DataFrame:
    """All exchanges. Columns: after epoch, member, weights of, changed (settings and their new values)."""
    rows = [
        {
            "after epoch": int(each["epoch"]),
            "member": member.number,
            "weights of": int(each["donor"]),
            "changed": _changes_in_words(each["changed"]),
        }
        for member in members(record)
        for each in member.user_attrs.get(EXCHANGED, [])
    ]
    columns = ["after epoch", "member", "weights of", "changed"]
    return pd.DataFrame(rows, columns=columns).sort_values(["after epoch", "member"], ignore_index=True)


def found_in_words(record: RunRecord, most: int | None = None) -> str:
    """The schedule, then the settings that it left alone: `temperature 0.1 → 0.07 (epoch 3), exponential, …`.

    `(epoch 3)` is the first epoch with the value before it. With `most`, there are only so many parts, and a setting
    that changed often has only its first and its last value.
    """
    found = found_schedule(record)
    if found is None:
        return "see schedule.yaml"
    changed = [
        f"{FOLLOWED[name]} {text}" for name, text in course_texts(found, short=most is not None).items()
    ]
    kept = {name: value for name, value in values_of(record, found).items() if len(found.course(name)) < 2}
    parts = changed or [f"as member {found.member} throughout"]
    if not all(is_absent(value) for value in kept.values()):
        parts.append(describe(kept, most=None if most is None else max(most - len(parts), 0)))
    return ", ".join(parts)


def course_texts(found: FoundSchedule, short: bool = False) -> dict[str, str]:
    """The settings that changed, by dotted name: `0.1 → 0.07 (epoch 3) → 0.05 (epoch 6)`."""
    return {name: _text(course, short) for name, course in found.courses.items() if len(course) > 1}


def values_of(record: RunRecord, found: FoundSchedule) -> dict[str, Any]:
    """The searched settings in the schedule found, by dotted name: a value, the text of a course, or None."""
    values = {}
    for name in record.searched():
        course, value = found.course(name), _at(found.settings, name)
        values[name] = _text(course) if len(course) > 1 else None if isinstance(value, Mapping) else value
    return values


def _text(course: Course, short: bool = False) -> str:
    (_, first), *later = course
    steps = [f"{number(value)} (epoch {epoch})" for epoch, value in later]
    if short and len(steps) >= SHOWN_VALUES:
        steps = ["…", steps[-1]]
    return " → ".join([number(first), *steps])


def _changes_in_words(changed: Mapping[str, float]) -> str:
    return ", ".join(f"{FOLLOWED.get(name, name)} to {number(value)}" for name, value in changed.items())


def _course(value: Any, epochs: int) -> Course:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return [(1, value)]
    if not isinstance(value, Mapping) or value.get("shape") != "piecewise":
        return []
    begins = [1, *(round(until * epochs) + 1 for until in value["until"])]
    return list(zip(begins, value["values"], strict=True))


def _at(settings: Mapping[str, Any], name: str) -> Any:
    """The setting `name`; None if it is absent, or if it is a part of a setting that is now piecewise."""
    value: Any = settings
    for key in name.split("."):
        if not isinstance(value, Mapping) or value.get("shape") == "piecewise":
            return None
        value = value.get(key)
    return value


def _trials(record: RunRecord, label: str) -> list[FrozenTrial]:
    if record.study is None:
        return []
    every = record.study.get_trials(deepcopy=False)
    return [trial for trial in every if trial.user_attrs.get(LABEL) == label]


def population_in_words(record: RunRecord) -> str:
    """The members and their exchanges, for people who cannot see the figure."""
    exchanges = "; ".join(
        f"after epoch {row['after epoch']} member {row['member']} went on from member {row['weights of']}"
        for _, row in exchange_table(record).iterrows()
    )
    return f"{record.value_title} of {len(members(record))} members against epochs. {exchanges or 'No exchange'}."


def steps_in_words(record: RunRecord) -> str:
    """The schedule, for people who cannot see the figure."""
    return f"The schedule found, from which epoch on: {found_in_words(record)}."
