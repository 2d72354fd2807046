"""The quality page of constraint maps: do clusters follow tissue?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib import colormaps
from matplotlib.figure import Figure

from core.report.figures.style import as_svg, new_figure, styled
from core.report.html import load_page, write_page
from core.report.quality.measures import identity
from core.volumes.cohort.overlay import OverlayDescription
from core.volumes.cohort.reader import Cohort
from core.volumes.derive.constraint import ConstraintSettings, explained_by

MOST_DRAWN = 6
MOST_MEASURED = 48
"""Scans of which the variance that clusters explain is measured."""


def write_constraint_page(
    cohort: Cohort, description: OverlayDescription, settings: ConstraintSettings, path: Path
) -> Path:
    """Write the page of the constraint maps `description.name` of a cohort to `path` and return it."""
    name, rows = description.name, np.arange(len(cohort))
    drawn = rows[np.unique(np.linspace(0, len(rows) - 1, min(MOST_DRAWN, len(rows))).round().astype(int))]
    measured = rows[
        np.unique(np.linspace(0, len(rows) - 1, min(MOST_MEASURED, len(rows))).round().astype(int))
    ]
    channels = [cohort.description.channels.index(each) for each in settings.contrasts]
    explained = np.zeros((len(measured), len(channels)))
    for place, row in enumerate(measured):
        volume, classes = cohort.read([int(row)])[0], cohort.read_map(name, [int(row)])[0]
        explained[place] = [explained_by(classes, volume[channel]) for channel in channels]
    shares = [
        f"{each} {100 * column.mean():.0f} % ({100 * column.min():.0f} to {100 * column.max():.0f})"
        for each, column in zip(settings.contrasts, explained.T, strict=True)
    ]
    guides = (
        "With one contrast clusters are levels of its grey values: nothing else guides a pre-training."
        if len(channels) == 1
        else ""
    )
    pictures = []
    for row in drawn:
        volume, classes = cohort.read([int(row)])[0], cohort.read_map(name, [int(row)])[0]
        figure = contrasts_and_clusters(volume[channels], classes, settings)
        title = identity(cohort.manifest.iloc[int(row)])
        pictures.append((title, Markup(as_svg(figure, f"scan{row}", f"Contrasts and clusters of {title}"))))
    page = load_page("constraint.html").render(
        name=f"{cohort.description.name} · {name}",
        headline=f"Clusters explain, of the variance inside the brain: {'; '.join(shares)}",
        guides=guides,
        scans=len(measured),
        pictures=pictures,
        made_by=description.made_by,
        command=description.command,
    )
    return write_page(page, path, "quality page")


@styled
def contrasts_and_clusters(
    volume_cxyz: npt.NDArray[np.float32], classes: npt.NDArray[np.int16], settings: ConstraintSettings
) -> Figure:
    """Every contrast, and the clusters in colours, in an axial and a coronal slice through the middle of the brain."""
    inside = classes > 0
    middle = [int(np.average(np.arange(side), weights=inside.sum(axis=others))) for side, others in zip(
        classes.shape, ((1, 2), (0, 2), (0, 1)), strict=True)]  # fmt: skip
    figure, _ = new_figure(3.6)
    figure.clear()
    grid = figure.subplots(2, len(volume_cxyz) + 1, squeeze=False)
    colours = colormaps["turbo"].resampled(settings.clusters)
    for row, axis in zip(grid, (2, 1), strict=True):
        for axes, contrast, title in zip(row, volume_cxyz, settings.contrasts, strict=False):
            low, high = np.percentile(contrast[inside], [1, 99])
            axes.imshow(
                np.take(contrast, middle[axis], axis).T, origin="lower", cmap="gray", vmin=low, vmax=high
            )
            axes.set_title(title, loc="left", fontsize=9)
        cut = np.take(classes, middle[axis], axis)
        shown = np.ma.masked_where(cut == 0, cut - 1)
        row[-1].imshow(shown.T, origin="lower", cmap=colours, vmin=-0.5, vmax=settings.clusters - 0.5,
                       interpolation="nearest")  # fmt: skip
        row[-1].set_title(f"{settings.clusters} clusters", loc="left", fontsize=9)
        for axes in row:
            axes.set_axis_off()
    return figure
