"""The figure of features as colours, beside the clusters that guided a pre-training."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from core.report.answer.features import feature_pictures
from core.report.answer.record import RunRecord
from core.report.figures.style import new_figure, styled


@styled
def features_as_colours(record: RunRecord) -> Figure:
    """An axial slice of a few held-out people (winner, first refit): image, clusters, components of the features."""
    pictures = feature_pictures(record)
    figure, _ = new_figure(1.9 * len(pictures) + 0.3)
    figure.clear()
    grid = figure.subplots(len(pictures), 3, squeeze=False)
    for row, each in zip(grid, pictures, strict=True):
        inside = each.image != 0
        row[0].imshow(np.ma.masked_where(~inside, each.image).T, origin="lower", cmap="gray")
        row[1].imshow(np.ma.masked_where(each.clusters == 0, each.clusters).T, origin="lower", cmap="turbo",
                      interpolation="nearest")  # fmt: skip
        clear = np.where(inside, 255, 0).astype(np.uint8)[..., None]
        row[2].imshow(np.concatenate([each.colours.astype(np.uint8), clear], axis=-1).swapaxes(0, 1), origin="lower",
                      interpolation="nearest")  # fmt: skip
        for axes in row:
            axes.set_axis_off()
        row[0].set_title(each.subject, loc="left", fontsize=9)
    grid[0][1].set_title("clusters", loc="left", fontsize=9)
    grid[0][2].set_title("features", loc="left", fontsize=9)
    return figure
