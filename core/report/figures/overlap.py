"""The figures of a segmentation: the overlap of every class, and how volumes agree.

As in `search`, every function takes the record of a run, and raises `NothingToShow` with the reason.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from core.report.answer.overlap import DICE, PLANES, PREDICTED, REFERENCE, cases_of, classes_of, typical_cases
from core.report.answer.record import RunRecord
from core.report.figures.style import INK, MARKERS, MUTED, PAPER, SERIES, legend_above, new_figure, styled

LIMITS = 1.96
"""SDs of the limits of agreement."""


@styled
def overlap_by_class(record: RunRecord) -> Figure:
    """Dice of every held-out case by class (winner, mean over refits): each case a mark over its box."""
    cases = cases_of(record)
    names = classes_of(cases)
    figure, axes = new_figure(1.2 + 0.55 * len(names))
    draws = np.random.default_rng(0)
    for place, name in enumerate(names):
        values = cases[f"{DICE}{name}"].dropna().to_numpy(float)
        if not values.size:
            continue
        line = {"color": MUTED, "lw": 1.1}
        axes.boxplot(
            values, positions=[place], orientation="horizontal", widths=0.5, showfliers=False, boxprops=line,
            whiskerprops=line, capprops=line, medianprops={"color": INK, "lw": 1.6},
        )  # fmt: skip
        axes.plot(
            values, place + draws.uniform(-0.15, 0.15, values.size), MARKERS[place % len(MARKERS)],
            color=SERIES[place % len(SERIES)], mec=PAPER, mew=0.6, ms=6,
        )  # fmt: skip
    axes.set_yticks(range(len(names)), names)
    axes.set(ylim=(len(names) - 0.5, -0.5), xlim=(-0.02, 1.02), xlabel="Dice")
    axes.grid(visible=False, axis="y")
    return figure


@styled
def volume_agreement(record: RunRecord) -> Figure:
    """Difference of volumes against their mean (Bland and Altman 1986), one mark for each case and class."""
    cases = cases_of(record)
    figure, axes = new_figure(3.8)
    for place, name in enumerate(classes_of(cases)):
        both = cases[[f"{PREDICTED}{name}", f"{REFERENCE}{name}"]].dropna().to_numpy(float)
        if not len(both):
            continue
        difference, mean = both[:, 0] - both[:, 1], both.mean(axis=1)
        colour = SERIES[place % len(SERIES)]
        axes.plot(
            mean,
            difference,
            MARKERS[place % len(MARKERS)],
            color=colour,
            mec=PAPER,
            mew=0.6,
            ms=6,
            label=name,
        )
        if len(both) > 1:
            ends = [mean.min(), mean.max()]
            axes.plot(ends, [difference.mean()] * 2, color=colour, lw=1.4)
            for sign in (-1, 1):
                limit = difference.mean() + sign * LIMITS * difference.std(ddof=1)
                axes.plot(ends, [limit] * 2, color=colour, lw=1, ls=(0, (4, 3)))
    axes.axhline(0, color=INK, lw=1)
    axes.set(xlabel="mean of predicted and reference volume (mL)", ylabel="predicted − reference (mL)")
    legend_above(axes)
    return figure


@styled
def cases_in_planes(record: RunRecord) -> Figure:
    """The best, the median and the worst held-out case (winner, first refit) in three planes.

    Filled is what was predicted, the line is the reference.
    """
    cases, names = typical_cases(record), classes_of(cases_of(record))
    figure, _ = new_figure(2.1 * len(cases) + 0.5)
    figure.clear()
    grid = figure.subplots(len(cases), len(PLANES), squeeze=False)
    for row, case in zip(grid, cases, strict=True):
        for axes, plane in zip(row, case.planes, strict=True):
            image, predicted, reference = (each.T for each in plane)
            axes.imshow(_coloured(image, predicted, len(names)), origin="lower", interpolation="nearest")
            for place in range(1, len(names) + 1):
                if (reference == place).any():
                    colour = SERIES[(place - 1) % len(SERIES)]
                    axes.contour(reference == place, [0.5], colors=[colour], linewidths=0.9)
            axes.set_axis_off()
        row[0].set_title(f"{case.rank} {case.subject}, Dice {case.dice:.2f}".strip(), loc="left", fontsize=9)
    handles = [
        Line2D([], [], color=SERIES[place % len(SERIES)], lw=5, label=name)
        for place, name in enumerate(names)
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False)
    return figure


def _coloured(
    image: npt.NDArray[np.generic], predicted: npt.NDArray[np.generic], count: int
) -> npt.NDArray[np.float64]:
    """A grey slice (Y, X) with the predicted classes over it, as colours (Y, X, 3)."""
    colours = np.repeat(image[..., None].astype(float) / 255, 3, axis=-1)
    for place in range(1, count + 1):
        inside = predicted == place
        colours[inside] = 0.55 * colours[inside] + 0.45 * np.array(to_rgb(SERIES[(place - 1) % len(SERIES)]))
    return colours
