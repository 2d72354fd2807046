"""Does one method predict better than another? Paired differences over the held-out subjects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from core.evaluation.bootstrap import FEWEST, studentised_interval
from core.report.answer.classes import auc_interval, pooled_auc
from core.run_description import Look
from core.run_names import WINNER
from core.task_description import BRAIN_AGE, TaskDescription

FEWEST_SUBJECTS = FEWEST
LEVEL = 0.95

Outcome = Literal["better", "worse", "cannot be told apart", "identical", "too few subjects"]


@dataclass(frozen=True)
class Comparison:
    """`method` against `other` on the same held-out subjects, by the error that the task gives every person.

    `gain` is the mean over subjects of the error of other - the error of method: above 0, `method` is better.
    `low` and `high` are the ends of its bootstrap 95 % interval (NaN if there are fewer than six subjects).
    """

    method: str
    other: str
    n: int
    gain: float
    low: float
    high: float
    family: int = 1
    """Comparisons that are made together: each interval is wide enough that in 95 % of cases all of them hold."""
    task: TaskDescription = BRAIN_AGE

    @property
    def outcome(self) -> Outcome:
        """The conclusion that the interval allows."""
        if self.n < FEWEST_SUBJECTS:
            return "too few subjects"
        if self.gain == self.low == self.high == 0.0:
            return "identical"
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "cannot be told apart"

    def sentence(self) -> str:
        """The comparison in a sentence, with its numbers."""
        words, error = self.task.in_words, self.task.error
        this, that = words.get(self.method, self.method), words.get(self.other, self.other)
        if self.method in words:
            # The name of a run stays as it is.
            this = this[0].upper() + this[1:]
        amount = error.amount(f"{abs(self.gain):.2f}")
        together = f", for {self.family} comparisons together," if self.family > 1 else ""
        interval = (
            f"(95 % interval of the gain{together} {_signed(self.low)} to {error.amount(_signed(self.high))})"
        )
        if self.outcome == "too few subjects":
            subjects = f"{self.n} held-out subject{'' if self.n == 1 else 's'}"
            return f"{this} against {that}: {subjects} cannot tell (at least {FEWEST_SUBJECTS} are needed)."
        if self.outcome == "identical":
            return f"{this} and {that} make the same errors."
        if self.outcome == "cannot be told apart":
            return f"{this} and {that} cannot be told apart: {error.amount(_signed(self.gain))} {interval}."
        verb = "beats" if self.outcome == "better" else "is worse than"
        return f"{this} {verb} {that} by {amount} {interval}."


def compare(
    predictions: pd.DataFrame, method: str, other: str, family: int = 1, task: TaskDescription = BRAIN_AGE
) -> Comparison | None:
    """The paired comparison of two methods in the predictions table; None if one of them has no predictions.

    First the errors of a subject are averaged over scans and refit seeds, then subjects are resampled
    (studentised bootstrap of the mean). So the interval holds for new subjects like these. Of a `family` of comparisons
    each has the level 1 - 0.05/family (Bonferroni).
    """
    errors = errors_of(predictions)
    if method not in errors or other not in errors:
        return None
    gains = (errors[other] - errors[method]).dropna().to_numpy(dtype=float)
    if len(gains) == 0:
        return None
    low, high = studentised_interval(gains, level=1 - (1 - LEVEL) / family)
    return Comparison(method, other, len(gains), float(gains.mean()), low, high, family, task)


def errors_of(predictions: pd.DataFrame) -> pd.DataFrame:
    """The errors, averaged over refit seeds: one row per subject, one column per method."""
    return predictions.pivot_table(index="subject", columns="method", values="error", aggfunc="mean")


def error_interval(predictions: pd.DataFrame, method: str) -> tuple[float, float]:
    """The interval of a method's mean error over held-out subjects; NaN if they are too few."""
    errors = errors_of(predictions)
    if method not in errors:
        return float("nan"), float("nan")
    return studentised_interval(errors[method].dropna().to_numpy(dtype=float), LEVEL)


def judged_interval(predictions: pd.DataFrame, method: str, task: TaskDescription) -> tuple[float, float]:
    """The interval of the metric of the answer over held-out subjects; NaN if there is none."""
    if task.interval == "error":
        return error_interval(predictions, method)
    if task.interval == "complement":
        low, high = error_interval(predictions, method)
        return 1 - high, 1 - low
    if task.interval == "auc":
        return auc_interval(predictions[predictions["method"] == method], LEVEL)
    return float("nan"), float("nan")


def judged_value(predictions: pd.DataFrame, method: str, task: TaskDescription) -> float:
    """The metric of the answer over all these people; NaN if it cannot be told from predictions."""
    if task.interval in ("error", "complement"):
        errors = errors_of(predictions)
        mean = float(errors[method].mean()) if method in errors else float("nan")
        return mean if task.interval == "error" else 1 - mean
    if task.interval == "auc":
        return pooled_auc(predictions[predictions["method"] == method])
    return float("nan")


def comparisons(predictions: pd.DataFrame, task: TaskDescription = BRAIN_AGE) -> list[Comparison]:
    """The search winner against every other method that has predictions."""
    return _together(predictions, [(WINNER, other) for other in task.methods if other != WINNER], task)


def beating_the_floor(predictions: pd.DataFrame, task: TaskDescription = BRAIN_AGE) -> list[str] | None:
    """The methods that beat what predicts without images; None if there is no comparison with it."""
    if task.floor is None:
        return None
    floor = task.floor.method
    found = _together(predictions, [(method, floor) for method in task.methods if method != floor], task)
    usable = [each for each in found if each.outcome != "too few subjects"]
    return [each.method for each in usable if each.outcome == "better"] if usable else None


def _together(
    predictions: pd.DataFrame, pairs: list[tuple[str, str]], task: TaskDescription
) -> list[Comparison]:
    """The comparisons that can be made, corrected for their number."""
    methods = set(predictions["method"].unique())
    possible = [pair for pair in pairs if methods.issuperset(pair)]
    # What is one and the same is no comparison: it widens no interval.
    errors = errors_of(predictions)
    family = max(1, sum(not errors[method].equals(errors[other]) for method, other in possible))
    found = (compare(predictions, method, other, family, task) for method, other in possible)
    return [comparison for comparison in found if comparison is not None]


def verdict(predictions: pd.DataFrame, task: TaskDescription = BRAIN_AGE) -> str:
    """One sentence: what the search winner beats, what it cannot be told apart from, and what it is worse than."""
    made, in_words = comparisons(predictions, task), task.in_words
    if not made:
        return "Nothing can be said about the search winner: it has no predictions on held-out subjects."
    if made[0].outcome == "too few subjects":
        return f"Nothing can be said: {made[0].n} held-out subjects are too few to compare methods."
    said = {
        "better": "beats {}",
        "cannot be told apart": "cannot be told apart from {}",
        "identical": "predicts exactly like {}",
        "worse": "is worse than {}",
    }
    parts = []
    for outcome, words in said.items():
        others = [in_words[each.other] for each in made if each.outcome == outcome]
        if others:
            parts.append(words.format(_listed(others, "and" if outcome == "better" else "or")))
    sentence = f"The search winner {'; it '.join(parts)}."
    beating = beating_the_floor(predictions, task)
    floor = "" if task.floor is None else task.floor.words
    if beating == []:
        sentence += f" No method here is shown to beat {floor}."
    elif beating and WINNER not in beating:
        sentence += f" What does beat {floor}: {_listed([in_words[each] for each in beating], 'and')}."
    return sentence


def after_a_look(looks: Sequence[Look]) -> str:
    """A warning beside the verdict of a search that went on after a look at the hold-out; empty if it did not."""
    if len(looks) < 2:
        return ""
    return (
        f"This search went on after the held-out subjects had been looked at ({looks[0].in_words()}). Whoever let "
        "it go on could know that result, so the comparison is not independent of it."
    )


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _listed(names: list[str], last: str) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {last} {names[-1]}"
