"""The winner's schedules, drawn: as its settings say, and as its epochs followed them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from core.errors import UserError
from core.report.describe import number
from core.report.record import RunRecord
from core.report.style import ACCENT, PAPER, SECOND, NothingToDraw, new_figure, styled
from core.schedules import Shape, as_schedule, with_epochs

# Title with its unit, column of the history table, and where the settings may hold it (dotted names).
QUANTITIES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("learning rate", "learning_rate", ("optimiser.learning_rate",)),
    ("temperature", "temperature", ("objective.temperature",)),
    ("kernel width (years)", "width", ("objective.kernel.width", "objective.width")),
    ("neighbours repelled", "neighbours", ("objective.neighbours",)),
)


@styled
def schedules(record: RunRecord) -> Figure:
    """Learning rate, temperature, kernel width and neighbours of the winner over progress.

    Lines come from best/settings.json, dots are means over cells of what the epochs followed.
    """
    followed = record.history[record.history["number"] == record.best]
    drawn = [quantity for quantity in QUANTITIES if _has(record.winner, followed, quantity)]
    if not drawn:
        raise NothingToDraw("neither the winner's settings nor its epochs were recorded")
    rows = (len(drawn) + 1) // 2
    figure, grid = new_figure(0.5 + 1.9 * rows, nrows=rows, ncols=2, squeeze=False)
    for axes, quantity in zip(grid.flat, drawn, strict=False):
        _draw(axes, record.winner, followed, quantity)
    for axes in grid.flat[len(drawn) :]:
        axes.remove()
    figure.supxlabel("progress of training (0: before, 1: last epoch)", fontsize=10)
    return figure


def value_over_progress(settings: Mapping[str, Any], names: tuple[str, ...]) -> np.ndarray | None:
    """Progress and value, shape (2, 201), of the first of `names` that is a number or a schedule."""
    for name in names:
        schedule = _schedule(_at(settings, name), _epochs(settings))
        if schedule is not None:
            progress = np.linspace(0, 1, 201)
            values = np.array([schedule(float(each)) for each in progress])
            if name == "optimiser.learning_rate":
                values = values * _learning_rate_factor(settings, progress)
            return np.stack([progress, values])
    return None


def _learning_rate_factor(settings: Mapping[str, Any], progress: np.ndarray) -> np.ndarray:
    """The optimiser's decay, and a straight rise from 1 % over the warm-up."""
    decay = _schedule(_at(settings, "optimiser.decay"), _epochs(settings))
    factor = np.ones_like(progress) if decay is None else np.array([decay(float(each)) for each in progress])
    warmup = _at(settings, "optimiser.warmup") or 0.0
    return factor * np.minimum(1.0, 0.01 + 0.99 * progress / warmup) if warmup else factor


def _schedule(value: Any, epochs: int | None) -> Shape | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number and not (isinstance(value, Mapping) and "shape" in value):
        return None
    try:
        schedule = as_schedule(value)
        schedule = with_epochs(schedule, epochs) if epochs else schedule
        schedule(1.0)
    except UserError:  # settings of another version: the report goes on without the line
        return None
    return schedule


def _at(settings: Mapping[str, Any], name: str) -> Any:
    value: Any = settings
    for key in name.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _epochs(settings: Mapping[str, Any]) -> int | None:
    return _at(settings, "training.epochs")


def _has(
    settings: Mapping[str, Any], followed: pd.DataFrame, quantity: tuple[str, str, tuple[str, ...]]
) -> bool:
    _, column, names = quantity
    return bool(followed[column].notna().any()) or value_over_progress(settings, names) is not None


def _draw(
    axes: Axes,
    settings: Mapping[str, Any],
    followed: pd.DataFrame,
    quantity: tuple[str, str, tuple[str, ...]],
) -> None:
    title, column, names = quantity
    line = value_over_progress(settings, names)
    if line is not None:
        axes.plot(*line, color=ACCENT, lw=1.8)
    points = followed.dropna(subset=[column]).groupby("progress")[column].mean()
    axes.plot(points.index, points.to_numpy(), "o", mfc=PAPER, mec=SECOND, ms=4)
    values = np.concatenate([points.to_numpy(dtype=float), [] if line is None else line[1]])
    if np.ptp(values) < 1e-9 * max(
        abs(values).max(), 1e-12
    ):  # constant: a flat line, without a scale of noise
        axes.set_ylim(0, 2 * values[0] if values[0] > 0 else 1)
        title = f"{title}: constant {number(float(values[0]))}"
    else:
        axes.set_ylim(bottom=min(0, values.min()))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4), useMathText=True)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.set(xlim=(0, 1.03))
    axes.set_title(title, fontsize=9.5)
