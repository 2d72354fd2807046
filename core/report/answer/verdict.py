"""Does one method predict better than another? Paired differences over the held-out subjects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from scipy.stats import bootstrap

from core.run_names import L1, MEDIAN, PUBLISHED, WINNER

IN_WORDS = {
    WINNER: "the search winner",
    PUBLISHED: "the published configuration",
    L1: "the L1 baseline",
    MEDIAN: "predicting the training median",
}
# Five gains of one sign happen by chance in more than 5 % of cases (two-sided sign test: 2/2^5 = 0.06), and
# yet their bootstrap interval always leaves out 0.
FEWEST_SUBJECTS = 6

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
        interval = f"(95 % interval of the gain {_signed(self.low)} to {_signed(self.high)} years)"
        if self.outcome == "too few subjects":
            subjects = f"{self.n} held-out subject{'' if self.n == 1 else 's'}"
            return f"{this} against {that}: {subjects} cannot tell (at least {FEWEST_SUBJECTS} are needed)."
        if self.outcome == "identical":
            return f"{this} and {that} make the same errors."
        if self.outcome == "cannot be told apart":
            return f"{this} and {that} cannot be told apart: {_signed(self.gain)} years {interval}."
        verb = "beats" if self.outcome == "better" else "is worse than"
        return f"{this} {verb} {that} by {amount} {interval}."


def compare(predictions: pd.DataFrame, method: str, other: str) -> Comparison | None:
    """The paired comparison of two methods in the predictions table; None if one of them has no predictions.

    First the absolute errors of a subject are averaged over the refit seeds, then subjects are resampled (percentile
    bootstrap of the mean, 9999 resamples). So the interval holds for new subjects like these.
    """
    errors = absolute_errors(predictions)
    if method not in errors or other not in errors:
        return None
    gains = (errors[other] - errors[method]).dropna().to_numpy(dtype=float)
    if len(gains) == 0:
        return None
    low, high = _interval(gains)
    return Comparison(method, other, len(gains), float(gains.mean()), low, high)


def absolute_errors(predictions: pd.DataFrame) -> pd.DataFrame:
    """|predicted - age| in years, averaged over refit seeds: one row per subject, one column per method."""
    table = predictions.assign(error=(predictions["predicted"] - predictions["age"]).abs())
    return table.pivot_table(index="subject", columns="method", values="error", aggfunc="mean")


def comparisons(predictions: pd.DataFrame) -> list[Comparison]:
    """The search winner against every other method that has predictions."""
    found = (compare(predictions, WINNER, other) for other in (PUBLISHED, L1, MEDIAN))
    return [comparison for comparison in found if comparison is not None]


def beating_the_median(predictions: pd.DataFrame) -> list[str] | None:
    """The methods that beat the training median; None if there is no comparison with it."""
    found = [compare(predictions, method, MEDIAN) for method in (WINNER, PUBLISHED, L1)]
    usable = [each for each in found if each is not None and each.outcome != "too few subjects"]
    return [each.method for each in usable if each.outcome == "better"] if usable else None


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


def _interval(gains: np.ndarray) -> tuple[float, float]:
    if len(gains) < FEWEST_SUBJECTS:
        return float("nan"), float("nan")
    # All resamples would have the same mean.
    if np.ptp(gains) == 0:
        return float(gains[0]), float(gains[0])
    found = bootstrap(
        (gains,), np.mean, n_resamples=9999, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return float(found.low), float(found.high)


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _listed(names: list[str], last: str) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {last} {names[-1]}"
