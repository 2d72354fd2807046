"""The figure of age by volumes of tissues (system B)."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from core.objectives import with_unit
from core.report.answer.record import NothingToShow, RunRecord
from core.report.figures.style import ACCENT, MUTED, PAPER, new_figure, styled
from core.run_names import WINNER

VOLUME = "volume_"
"""What the columns of predictions with volumes begin with."""
DEGREE = 3
"""Of the line; 3 is what the publication draws."""


@styled
def volumes_against_age(record: RunRecord) -> Figure:
    """Age against every volume, or its share, of the held-out people, with a line through what is predicted."""
    table = record.predictions[record.predictions["method"] == WINNER]
    names = [str(name) for name in table if str(name).startswith(VOLUME)]
    people = table.groupby("subject")[["truth", "predicted", *names]].mean(numeric_only=True).dropna()
    if not names or len(people) < DEGREE + 2:
        raise NothingToShow("there are too few held-out people with volumes")
    figure, _ = new_figure(3.0)
    figure.clear()
    grid = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(grid, names, strict=True):
        volumes = people[name].to_numpy(float)
        axes.plot(volumes, people["truth"], "o", color=MUTED, mec=PAPER, mew=0.4, ms=4.5)
        curve = np.polynomial.Polynomial.fit(volumes, people["predicted"].to_numpy(float), DEGREE)
        line = np.linspace(volumes.min(), volumes.max(), 100)
        axes.plot(line, curve(line), color=ACCENT, lw=2)
        axes.set(xlabel=name.removeprefix(VOLUME).replace("_", " "))
    grid[0].set(ylabel=with_unit(record.task.truth, record.task.truth_unit))
    return figure
