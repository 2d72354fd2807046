"""The figure of age by volumes of tissues (system B)."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from core.objectives import with_unit
from core.report.answer.record import RunRecord
from core.report.answer.tissues import people_with_volumes
from core.report.figures.style import ACCENT, MUTED, PAPER, new_figure, styled

DEGREE = 3
"""Of the line; 3 is what the publication draws."""


@styled
def volumes_against_age(record: RunRecord) -> Figure:
    """Age against every volume, or its share, of the held-out people, with a line through what is predicted."""
    people = people_with_volumes(record)
    names = [str(name) for name in people.columns[2:]]
    figure, _ = new_figure(3.0)
    figure.clear()
    grid = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(grid, names, strict=True):
        volumes = people[name].to_numpy(float)
        axes.plot(volumes, people["truth"], "o", color=MUTED, mec=PAPER, mew=0.4, ms=4.5)
        curve = np.polynomial.Polynomial.fit(volumes, people["predicted"].to_numpy(float), DEGREE)
        line = np.linspace(volumes.min(), volumes.max(), 100)
        axes.plot(line, curve(line), color=ACCENT, lw=2)
        axes.set(xlabel=name)
    grid[0].set(ylabel=with_unit(record.task.truth, record.task.truth_unit))
    return figure
