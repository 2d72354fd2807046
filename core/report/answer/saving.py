"""How many labels a start saves: how few are needed with it to be as good as many are without.

Shape suffixes: L budgets of labels, P people, R resamples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from core.evaluation import Floats
from core.evaluation.bootstrap import FEWEST

LEVEL = 0.95
RESAMPLES = 4_999


@dataclass(frozen=True)
class Saving:
    """What `needed` labels with a start are worth: as much as `labelled` ones without it.

    All numbers are of labelled people; `needed` is inf where the start does not become so good, and the smallest budget
    where it is so good from there on.
    """

    labelled: int
    needed: float
    low: float
    high: float
    """The ends of the interval over people; NaN if they are too few."""
    smallest: int
    """The smallest budget that was tried: fewer are never claimed."""

    @property
    def is_shown(self) -> bool:
        """Whether the interval says that fewer labels are enough."""
        return self.high < self.labelled

    def sentence(self, start: str, other: str) -> str:
        """In words; `start` and `other` are the methods."""
        if math.isnan(self.low):
            return f"{self.labelled} labelled: too few held-out people to say what {start} saves."
        if self.labelled == self.smallest and self.needed == self.smallest:
            return f"{self.labelled} labelled: {start} is as good as {other}, and fewer were not tried."
        interval = f"95 % interval {self._amount(self.low)} to {self._amount(self.high)}"
        if math.isinf(self.needed):
            return (
                f"{self.labelled} labelled: no saving shown; {start} is nowhere as good as {other}, whatever was tried "
                f"({interval})."
            )
        shown = "" if self.is_shown else "no saving shown; "
        return (
            f"{self.labelled} labelled: {shown}{start} is as good as {other} with {self._amount(self.needed)} "
            f"({interval})."
        )

    def _amount(self, number: float) -> str:
        if math.isinf(number):
            return "more than were tried"
        return f"{self.smallest} or fewer" if number <= self.smallest else f"{number:.0f}"


def savings(
    labelled_l: list[int], with_start_lp: Floats, without_lp: Floats, starts: int = 1, seed: int = 0
) -> list[Saving]:
    """For every budget without the start: the labels that are needed with it, read off its curve.

    The curve of mean errors is drawn straight between budgets on a logarithmic scale of labels; what is needed is where
    it first is as low. People are resampled, the same ones at all budgets and on both curves (percentile bootstrap,
    Efron and Tibshirani 1993, section 13.3), with 1 - 0.05/L for each of the L budgets, over the number of starts.

    Args:
        labelled_l: the budgets, ascending.
        with_start_lp: the error of every held-out person (L, P) with the start; less is better.
        without_lp: the same without it, of the same people.
        starts: how many starts are compared.
        seed: of the resamples.
    """
    people = with_start_lp.shape[1]
    drawn_rp = np.random.default_rng(seed).integers(0, people, (RESAMPLES, people))
    curve_lr, other_lr = (errors_lp[:, drawn_rp].mean(axis=2) for errors_lp in (with_start_lp, without_lp))
    alpha = (1 - LEVEL) / (len(labelled_l) * starts)
    found = []
    for place, labelled in enumerate(labelled_l):
        needed = float(
            needed_labels(labelled_l, with_start_lp.mean(axis=1)[:, None], without_lp[place].mean())[0]
        )
        low = high = math.nan
        if people >= FEWEST:
            needed_r = needed_labels(labelled_l, curve_lr, other_lr[place])
            low, high = np.quantile(needed_r, [alpha / 2, 1 - alpha / 2], method="inverted_cdf")
        found.append(Saving(labelled, needed, float(low), float(high), labelled_l[0]))
    return found


def needed_labels(labelled_l: list[int], curve_lr: Floats, target_r: Floats | float) -> Floats:
    """Where each curve (L, R) first is as low as its target: labels (R,), inf where it never is."""
    budgets_l = np.log2(np.asarray(labelled_l, dtype=np.float64))
    needed_r = np.full(curve_lr.shape[1], math.inf)
    # From the largest budget to the smallest, so that the first crossing is the one that stays.
    for place in range(len(budgets_l) - 1, 0, -1):
        before_r, after_r = curve_lr[place - 1], curve_lr[place]
        crosses_r = (before_r > target_r) & (after_r <= target_r)
        with np.errstate(divide="ignore", invalid="ignore"):
            # Beyond 0 and 1 no curve crosses here.
            share_r = np.clip((before_r - target_r) / (before_r - after_r), 0, 1)
        at_r = budgets_l[place - 1] + share_r * (budgets_l[place] - budgets_l[place - 1])
        needed_r = np.where(crosses_r, 2.0**at_r, needed_r)
    return np.where(curve_lr[0] <= target_r, float(labelled_l[0]), needed_r)
