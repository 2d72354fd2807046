"""The figure of the parts of a volume that the winner uses."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from core.report.answer.explained import explained_maps
from core.report.answer.record import RunRecord
from core.report.figures.style import new_figure, styled

PLANES = ("sagittal", "coronal", "axial")


@styled
def where_it_looks(record: RunRecord) -> Figure:
    """The mean brain in three planes: what matters to the winner, left minus right, and to random weights."""
    maps = explained_maps(record)
    rows = (
        ("trained", maps.trained, "inferno", (0.0, _most(maps.trained))),
        (
            "left and right differ",
            maps.difference,
            "RdBu_r",
            (-_most(maps.difference), _most(maps.difference)),
        ),
        ("random weights", maps.random, "inferno", (0.0, _most(maps.random))),
    )
    cut = np.unravel_index(int(np.argmax(maps.trained)), maps.trained.shape)
    figure, _ = new_figure(6.4)
    figure.clear()
    grid = figure.subplots(len(rows), len(PLANES), squeeze=False)
    for row, (title, values, colours, ends) in zip(grid, rows, strict=True):
        for axis, axes in enumerate(row):
            shown = _draw(
                axes, np.take(maps.brain, cut[axis], axis), np.take(values, cut[axis], axis), colours, ends
            )
        row[0].set_title(title, loc="left", fontsize=9)
        figure.colorbar(shown, ax=list(row), shrink=0.8)
    return figure


def _most(values: npt.NDArray[np.generic]) -> float:
    return max(float(np.percentile(np.abs(values.astype(float)), 99.5)), 1e-9)


def _draw(
    axes: Axes,
    brain: npt.NDArray[np.generic],
    values: npt.NDArray[np.generic],
    colours: str,
    ends: tuple[float, float],
) -> AxesImage:
    """A plane of the mean brain with a map over it; background stays clear."""
    inside = brain != 0
    axes.imshow(np.ma.masked_where(~inside, brain).T, origin="lower", cmap="gray")
    shown = axes.imshow(
        np.ma.masked_where(~inside, values).T,
        origin="lower",
        cmap=colours,
        vmin=ends[0],
        vmax=ends[1],
        alpha=0.6,
    )
    axes.set_axis_off()
    return shown
