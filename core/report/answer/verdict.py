"""Does one method predict better than another? Paired differences over the held-out subjects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from core.evaluation.bootstrap import FEWEST, studentised_interval
from core.run_description import Look
from core.run_names import L1, MEDIAN, PUBLISHED, WINNER

IN_WORDS = {
    WINNER: "the search winner",
    PUBLISHED: "the published configuration",
    L1: "the L1 baseline",
    MEDIAN: "predicting the training median",
}
FEWEST_SUBJECTS = FEWEST
LEVEL = 0.95

Outcome = Literal["better", "worse", "cannot be told apart", "identical", "too few subjects"]


@dataclass(frozen=True)
class Comparison:
    """`method` against `other` on the same held-out subjects, errors in years.

    `gain` is the mean over subjects of |error of other| - |error of method|: above 0, `method` is better.
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
        this, that = IN_WORDS.get(self.method, self.method), IN_WORDS.get(self.other, self.other)
        this = this[0].upper() + this[1:]
        amount = f"{abs(self.gain):.2f} years"
        together = f", for {self.family} comparisons together," if self.family > 1 else ""
        interval = f"(95 % interval of the gain{together} {_signed(self.low)} to {_signed(self.high)} years)"
        if self.outcome == "too few subjects":
            subjects = f"{self.n} held-out subject{'' if self.n == 1 else 's'}"
            return f"{this} against {that}: {subjects} cannot tell (at least {FEWEST_SUBJECTS} are needed)."
        if self.outcome == "identical":
            return f"{this} and {that} make the same errors."
        if self.outcome == "cannot be told apart":
            return f"{this} and {that} cannot be told apart: {_signed(self.gain)} years {interval}."
        verb = "beats" if self.outcome == "better" else "is worse than"
        return f"{this} {verb} {that} by {amount} {interval}."


def compare(predictions: pd.DataFrame, method: str, other: str, family: int = 1) -> Comparison | None:
    """The paired comparison of two methods in the predictions table; None if one of them has no predictions.

    First the absolute errors of a subject are averaged over scans and refit seeds, then subjects are resampled
    (studentised bootstrap of the mean). So the interval holds for new subjects like these. Of a `family` of comparisons
    each has the level 1 - 0.05/family (Bonferroni).
    """
    errors = absolute_errors(predictions)
    if method not in errors or other not in errors:
        return None
    gains = (errors[other] - errors[method]).dropna().to_numpy(dtype=float)
    if len(gains) == 0:
        return None
    low, high = studentised_interval(gains, level=1 - (1 - LEVEL) / family)
    return Comparison(method, other, len(gains), float(gains.mean()), low, high, family)


def absolute_errors(predictions: pd.DataFrame) -> pd.DataFrame:
    """|predicted - age| in years, averaged over refit seeds: one row per subject, one column per method."""
    table = predictions.assign(error=(predictions["predicted"] - predictions["age"]).abs())
    return table.pivot_table(index="subject", columns="method", values="error", aggfunc="mean")


def error_interval(predictions: pd.DataFrame, method: str) -> tuple[float, float]:
    """The interval of a method's mean absolute error over held-out subjects, in years; NaN if they are too few."""
    errors = absolute_errors(predictions)
    if method not in errors:
        return float("nan"), float("nan")
    return studentised_interval(errors[method].dropna().to_numpy(dtype=float), LEVEL)


def comparisons(predictions: pd.DataFrame) -> list[Comparison]:
    """The search winner against every other method that has predictions."""
    return _together(predictions, [(WINNER, other) for other in (PUBLISHED, L1, MEDIAN)])


def beating_the_median(predictions: pd.DataFrame) -> list[str] | None:
    """The methods that beat the training median; None if there is no comparison with it."""
    found = _together(predictions, [(method, MEDIAN) for method in (WINNER, PUBLISHED, L1)])
    usable = [each for each in found if each.outcome != "too few subjects"]
    return [each.method for each in usable if each.outcome == "better"] if usable else None


def _together(predictions: pd.DataFrame, pairs: list[tuple[str, str]]) -> list[Comparison]:
    """The comparisons that can be made, corrected for their number."""
    methods = set(predictions["method"].unique())
    possible = [pair for pair in pairs if methods.issuperset(pair)]
    found = (compare(predictions, method, other, len(possible)) for method, other in possible)
    return [comparison for comparison in found if comparison is not None]


def verdict(predictions: pd.DataFrame) -> str:
    """One sentence: what the search winner beats, what it cannot be told apart from, and what it is worse than."""
    made = comparisons(predictions)
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
        others = [IN_WORDS[each.other] for each in made if each.outcome == outcome]
        if others:
            parts.append(words.format(_listed(others, "and" if outcome == "better" else "or")))
    sentence = f"The search winner {'; it '.join(parts)}."
    beating = beating_the_median(predictions)
    if beating == []:
        sentence += " No method here is shown to beat predicting the training median."
    elif beating and WINNER not in beating:
        sentence += (
            f" What does beat {IN_WORDS[MEDIAN]}: {_listed([IN_WORDS[each] for each in beating], 'and')}."
        )
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
