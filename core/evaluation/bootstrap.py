"""Confidence intervals over subjects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Interval:
    """A metric and its percentile bootstrap interval."""

    value: float
    """The metric of all subjects."""
    low: float
    high: float
    undefined: int
    """Resamples in which the metric was NaN; the interval leaves them out."""


def bootstrap_interval(
    metric: Callable[..., float],
    *arrays: npt.NDArray[np.generic],
    subjects: npt.NDArray[np.generic] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile interval of `metric(*arrays)` when subjects are drawn with replacement.

    It shows how much the number depends on which subjects are in this sample. It does not show how much it
    depends on the training of the model: folds and seeds are varied for that.

    Args:
        metric: takes the arrays, resampled along their first axis, and gives one number.
        arrays: of equal length, for instance predicted and true ages.
        subjects: which subject each row belongs to, so that rows of one subject stay together; one each if
            absent.
        level: coverage of the interval.
        resamples: how many draws.
        seed: of the draws.
    """
    lengths = [len(array) for array in arrays]
    subjects = np.arange(lengths[0]) if subjects is None else np.asarray(subjects)
    if {*lengths, len(subjects)} != {len(subjects)} or not len(subjects):
        raise ValueError(f"arrays must be as long as subjects, got {lengths} and {len(subjects)}")
    rows_of = _rows_of_each(subjects)
    draws = np.random.default_rng(seed)
    values = np.empty(resamples)
    for resample in range(resamples):
        drawn = draws.integers(0, len(rows_of), len(rows_of))
        rows = np.concatenate([rows_of[subject] for subject in drawn])
        values[resample] = metric(*(array[rows] for array in arrays))
    defined = values[~np.isnan(values)]
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2]) if defined.size else (np.nan, np.nan)
    return Interval(float(metric(*arrays)), float(low), float(high), int(np.isnan(values).sum()))


def _rows_of_each(subjects: npt.NDArray[np.generic]) -> list[npt.NDArray[np.intp]]:
    """Rows of each subject, subjects in sorted order."""
    order = np.argsort(subjects, kind="stable")
    _, starts = np.unique(subjects[order], return_index=True)
    return np.split(order, starts[1:])
