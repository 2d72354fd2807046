"""What errors on people, each predicted by a model that was trained without them, say of further predictions.

The *gap* is predicted minus true age. Predictions are drawn to the middle age, so the gap depends on age. One straight
line, gap = intercept + slope · age, corrects for this, in two ways:

- corrected gap: gap - (intercept + slope · age) (Beheshti et al. 2019, doi 10.1016/j.nicl.2019.102063), which uses the
  true age. de Lange and Cole (2020, doi 10.1016/j.nicl.2020.102229) fit predicted = α · age + β, so that α = 1 + slope
  and β = intercept, and correct the prediction to predicted + age - (α · age + β): the gap of this is the same number.
- corrected prediction: (predicted - β) / α (Cole et al. 2018, doi 10.1038/mp.2017.62). It does not use the true age.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from core.evaluation import Floats, Names
from core.evaluation.by_subject import subject_weights
from core.evaluation.regression import AgeBias, fit_age_bias, pearson_r

LEVEL = 0.9
"""Of the prediction interval."""
FEWEST = 9
"""The interval of this level needs as many people: with fewer even the largest error is not rare enough."""
LEAST_STRETCH = 0.2
"""Below this slope of predicted on true age a prediction is hardly about age, and stretching it multiplies its error by
more than five: then there is no corrected prediction."""


@dataclass(frozen=True)
class Calibration:
    """The age bias of a model, and how far its predictions are from the truth, from out-of-fold predictions."""

    slope: float
    """Years of gap per year of age; see `AgeBias`. NaN if all people have one age."""
    intercept: float
    """In years."""
    half_width: float | None
    """Half of the prediction interval in years; None if there are fewer than `FEWEST` people."""
    level: float
    """The share of people whose true age is in the interval."""
    subjects: int
    """How many people these numbers come from."""
    source: str = ""
    """Whose predictions: `trial 7, 5 cells`."""

    @property
    def bias(self) -> AgeBias:
        """The straight line of the gap on age."""
        return AgeBias(self.slope, self.intercept)

    @property
    def stretches(self) -> bool:
        """Whether predictions follow age well enough for a corrected prediction; see `LEAST_STRETCH`."""
        return 1 + self.slope >= LEAST_STRETCH

    @property
    def lacks(self) -> tuple[str, ...]:
        """What cannot be given, and why, in words."""
        lacks = []
        if self.half_width is None:
            lacks.append(
                f"no interval: it needs out-of-fold predictions of {FEWEST} people, and this run has {self.subjects}"
            )
        if math.isnan(self.slope):
            lacks.append(
                "all people of this run are of one age: how gaps depend on age is not known, so there is neither a "
                "corrected prediction nor a corrected gap"
            )
        elif not self.stretches:
            lacks.append(
                f"predictions hardly follow age (by {1 + self.slope:.2f} years for each year of age): there is no "
                "corrected prediction, and gaps, corrected or not, say nothing about people"
            )
        return tuple(lacks)

    def to_json(self) -> str:
        """Plain numbers, which `from_json` reads back exactly; null for what is not known."""
        fields = asdict(self)
        known = {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in fields.items()
        }
        return json.dumps(known, indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """The calibration that `to_json` wrote."""
        fields: dict[str, Any] = json.loads(text)
        lines = {name: math.nan for name in ("slope", "intercept") if fields[name] is None}
        return cls(**{**fields, **lines})


def calibrate(predicted_n: Floats, ages_n: Floats, subjects_n: Names, source: str = "") -> Calibration:
    """Fit the age bias and the prediction interval on predictions for people on whom the model was not trained.

    The interval is that of split conformal prediction (Vovk et al. 2005; Lei et al. 2018): half of it is the
    ⌈(n + 1) · level⌉-th smallest absolute error of n people. If people have several predictions, of several scans or
    seeds, each counts as a part of its person, and half of the interval is the smallest error below which lie
    (n + 1) · level people (Dunn et al. 2023; Lee et al. 2023): it is for one scan and one model, whose error is larger
    than a mean of several.

    It holds for people like those of the cohort, on average over people and not for every age. It is nearly valid, and
    not exactly, for two reasons. The errors are those of the K models of a cross-validation, and the refitted model saw
    more people, which makes it a little wide; what is proved for such intervals is 2 · level - 1 (CV+, Barber et al.
    2021). And the configuration was chosen because these errors are small, which makes it a little narrow if many were
    tried.

    Args:
        predicted_n: out-of-fold predictions (N,) in years, of one scan or more for each person.
        ages_n: the true ages (N,) in years.
        subjects_n: whose they are (N,).
        source: for people who read the file.
    """
    predicted_n, ages_n = np.asarray(predicted_n, np.float64), np.asarray(ages_n, np.float64)
    bias = fit_age_bias(predicted_n, ages_n, subject_weights(subjects_n))
    half_width = _conformal(np.abs(predicted_n - ages_n), subjects_n)
    return Calibration(bias.slope, bias.intercept, half_width, LEVEL, len(set(map(str, subjects_n))), source)


def _conformal(errors_n: Floats, subjects_n: Names) -> float | None:
    """The smallest error that (n + 1) · `LEVEL` of n people do not exceed; None if n people are too few."""
    subjects_n = np.asarray(subjects_n, dtype=str)
    weights_n = subject_weights(subjects_n)
    order = np.argsort(errors_n, kind="stable")
    people_n = np.cumsum(np.ones(len(errors_n)) if weights_n is None else weights_n[order])
    needed = (len(np.unique(subjects_n)) + 1) * LEVEL
    # Without a margin for rounding, 0.9 · 10 is more than 9 people.
    enough = np.flatnonzero(people_n >= needed - 1e-9)
    half_width = float(errors_n[order[enough[0]]]) if enough.size else math.nan
    return half_width if math.isfinite(half_width) else None


def gap_table(
    calibration: Calibration | None, predicted_n: Floats, ages_n: Floats | None = None
) -> pd.DataFrame:
    """What is said of N predictions, all in years and NaN where it is not known.

    Columns: predicted; low and high, the ends of the interval; corrected_prediction; age; gap and corrected_gap.

    Args:
        calibration: of the model; None if it has none.
        predicted_n: predicted ages (N,).
        ages_n: true ages (N,), NaN where unknown; without them there are no gaps.
    """
    predicted_n = np.asarray(predicted_n, dtype=np.float64)
    unknown_n = np.full(predicted_n.shape, math.nan)
    ages_n = unknown_n if ages_n is None else np.asarray(ages_n, dtype=np.float64)
    half_width = math.nan if calibration is None or calibration.half_width is None else calibration.half_width
    stretched = calibration is not None and calibration.stretches
    return pd.DataFrame(
        {
            "predicted": predicted_n,
            "low": predicted_n - half_width,
            "high": predicted_n + half_width,
            "corrected_prediction": calibration.bias.correct_prediction(predicted_n)
            if calibration is not None and stretched
            else unknown_n,
            "age": ages_n,
            "gap": predicted_n - ages_n,
            "corrected_gap": unknown_n
            if calibration is None
            else calibration.bias.correct_gap(predicted_n, ages_n),
        }
    )


def gap_metrics(table: pd.DataFrame, subjects_n: Names) -> dict[str, float | str]:
    """What `evaluate` says of gaps and intervals, by names in plain words; every person counts once.

    Args:
        table: of `gap_table` with ages, one row per scan.
        subjects_n: whose the scans are (N,).

    Returns:
        Mean gaps in years and their correlation with age, without the corrected ones if they are not known; and how
        many people are inside their interval, if there is one: a person with several scans counts by their share.
    """
    weights_n = subject_weights(subjects_n)
    ages_n = table["age"].to_numpy(float)
    found: dict[str, float | str] = {}
    for name, words in (("gap", "gap"), ("corrected_gap", "corrected gap")):
        gap_n = table[name].to_numpy(float)
        if not np.isnan(gap_n).any():
            found[f"mean {words} (years)"] = float(np.average(gap_n, weights=weights_n))
            found[f"correlation of {words} with age"] = pearson_r(gap_n, ages_n, weights_n)
    if table["low"].notna().all():
        inside_n = ((table["low"] <= ages_n) & (ages_n <= table["high"])).to_numpy(float)
        people = len(set(map(str, subjects_n)))
        inside = float(np.average(inside_n, weights=weights_n)) * people
        found[f"inside the {100 * LEVEL:.0f} % interval"] = f"{round(inside, 1):g} of {people} subjects"
    return found
