"""How often a 95 % interval of a mean leaves the true mean out, for few subjects: asked are 5 %.

    python -m benchmarks.intervals

Gains of one method over another are drawn with a true mean of 0: of two methods that are equal (the difference of two
absolute errors of the same distribution), normal, with heavy tails, and skewed. Beside our studentised bootstrap stand
the percentile and the BCa bootstrap of SciPy and Student's t.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table
from scipy import stats

from core.evaluation.bootstrap import studentised_interval

Values = npt.NDArray[np.float64]
Draw = Callable[[np.random.Generator, int], Values]

GAINS: dict[str, Draw] = {
    "two equal methods": lambda draws, n: np.abs(draws.normal(size=n)) - np.abs(draws.normal(size=n)),
    "normal": lambda draws, n: draws.normal(size=n),
    "heavy tails (t, 3)": lambda draws, n: draws.standard_t(3, size=n),
    "skewed (exponential)": lambda draws, n: draws.exponential(size=n) - 1,
    "skewed (lognormal 0.8)": lambda draws, n: np.exp(0.8 * draws.normal(size=n)) - np.exp(0.32),
}
SUBJECTS = (6, 10, 26)


def by_scipy(method: str) -> Callable[[Values], tuple[float, float]]:
    """The interval of SciPy's bootstrap."""

    def interval(values: Values) -> tuple[float, float]:
        found = stats.bootstrap((values,), np.mean, n_resamples=1_999, method=method, rng=0)  # type: ignore[call-overload]
        return float(found.confidence_interval.low), float(found.confidence_interval.high)

    return interval


def by_t(values: Values) -> tuple[float, float]:
    """Student's interval."""
    return stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))


METHODS: dict[str, Callable[[Values], tuple[float, float]]] = {
    "percentile": by_scipy("percentile"),
    "BCa": by_scipy("BCa"),
    "Student's t": by_t,
    "studentised": studentised_interval,
}


def main() -> None:
    """Draw, count, and print the table."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--repeats", type=int, default=1_000, help="samples for each row")
    repeats = options.parse_args().repeats
    table = Table("gains", "subjects", *METHODS, title="true mean outside the 95 % interval (median width)")
    for name, draw in GAINS.items():
        for subjects in SUBJECTS:
            draws = np.random.default_rng(0)
            samples = [draw(draws, subjects) for _ in range(repeats)]
            cells = []
            for interval in METHODS.values():
                with warnings.catch_warnings():
                    # BCa of a sample whose resamples are all alike.
                    warnings.simplefilter("ignore")
                    bounds = np.array([interval(sample) for sample in samples])
                outside = ((bounds[:, 0] > 0) | (bounds[:, 1] < 0)).mean()
                cells.append(f"{outside:.1%} ({np.nanmedian(np.diff(bounds, axis=1)):.2f})")
            table.add_row(name, str(subjects), *cells)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
