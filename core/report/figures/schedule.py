"""The figure of the winner's schedules: as its settings define them, and as its epochs followed them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from pydantic import ValidationError

from core.errors import UserError
from core.losses.neighbourhood import Neighbours
from core.losses.pairwise import other_rows
from core.report.answer.describe import number
from core.report.answer.record import NothingToShow, RunRecord
from core.report.figures.style import ACCENT, PAPER, SECOND, new_grid, styled
from core.schedules import Shape, as_schedule, with_epochs

Curve = Callable[[Mapping[str, object], float], float | None]


def learning_rate(settings: Mapping[str, object], progress: float) -> float | None:
    """The base rate times the decay, rising from 1 % over the first epochs when there is a warm-up."""
    base, decay = (_value(settings, f"optimiser.{name}", progress) for name in ("learning_rate", "decay"))
    if base is None:
        return None
    epochs = _number_at(settings, "training.epochs") or 0
    warmup = round((_number_at(settings, "optimiser.warmup") or 0) * epochs)
    epoch = progress * epochs
    rise = 0.01 + 0.99 * max(epoch - 1, 0) / warmup if warmup and epoch <= warmup else 1.0
    return base * rise * (1.0 if decay is None else decay)


def temperature(settings: Mapping[str, object], progress: float) -> float | None:
    """The divisor of the similarities."""
    return _value(settings, "objective.temperature", progress)


def kernel_width(settings: Mapping[str, object], progress: float) -> float | None:
    """Age difference in years over which the attraction between two subjects falls."""
    return _value(settings, "objective.width", progress)


def other_rows_repelled(settings: Mapping[str, object], progress: float) -> float | None:
    """How many rows an anchor of a full batch is contrasted with, without its own."""
    objective = _at(settings, "objective")
    views, subjects = _count_at(settings, "views.count"), _count_at(settings, "training.batch_size")
    if not isinstance(objective, Mapping) or "neighbours" not in objective or not views or not subjects:
        return None
    # null means all subjects of the batch
    if objective["neighbours"] is None:
        return float(other_rows(views, subjects, progress, None))
    try:
        neighbours = Neighbours.model_validate(objective["neighbours"])
    except ValidationError:  # settings of another version: the report goes on without the line
        return None
    epochs = _count_at(settings, "training.epochs")
    neighbours = neighbours.with_epochs(epochs) if epochs else neighbours
    return float(other_rows(views, subjects, progress, neighbours))


def _not_set(settings: Mapping[str, object], progress: float) -> float | None:
    """What no setting says, such as a part of the loss."""
    return None


# Title with its unit, column of the history table, and the value that the settings mean.
QUANTITIES: tuple[tuple[str, str, Curve], ...] = (
    ("learning rate", "learning_rate", learning_rate),
    ("temperature", "temperature", temperature),
    ("kernel width (years)", "width", kernel_width),
    ("other rows repelled", "neighbours", other_rows_repelled),
)


@styled
def schedules(record: RunRecord) -> Figure:
    """Learning rate, temperature, kernel width and neighbours of the winner over progress.

    Lines come from best/settings.json, dots are means over cells of what the epochs followed.
    """
    followed = record.history[record.history["number"] == record.best]
    # Not every task notes all of them.
    known = {column for _, column, _ in QUANTITIES}
    of_task = [name for name in record.task.course if name not in known]
    quantities = (*QUANTITIES, *((name.replace("_", " "), name, _not_set) for name in of_task))
    absent = [column for _, column, _ in quantities if column not in followed]
    followed = followed.assign(**dict.fromkeys(absent, np.nan))
    drawn = [quantity for quantity in quantities if _has(record.winner, followed, *quantity[1:])]
    if not drawn:
        raise NothingToShow("neither the winner's settings nor its epochs were recorded")
    rows = (len(drawn) + 1) // 2
    figure, grid = new_grid(0.5 + 1.9 * rows, rows, columns=2)
    for axes, quantity in zip(grid, drawn, strict=False):
        _draw(axes, record.winner, followed, quantity)
    for axes in grid[len(drawn) :]:
        axes.remove()
    figure.supxlabel("progress of training (0: before, 1: last epoch)", fontsize=10)
    return figure


def as_set(settings: Mapping[str, object], curve: Curve) -> npt.NDArray[np.float64] | None:
    """Progress and value of the quantity, shape (2, 201); None where the settings do not define it."""
    progress = np.linspace(0, 1, 201)
    values = [curve(settings, float(each)) for each in progress]
    return None if None in values else np.stack([progress, np.array(values, dtype=float)])


def _value(settings: Mapping[str, object], name: str, progress: float) -> float | None:
    """The value at `progress` of the setting `name`, which is a number or a schedule; None if it is neither."""
    schedule = _schedule(_at(settings, name), _count_at(settings, "training.epochs"))
    return None if schedule is None else schedule(progress)


def _schedule(value: object, epochs: int | None) -> Shape | None:
    if isinstance(value, bool) or not isinstance(value, int | float | Mapping):
        return None
    if isinstance(value, Mapping) and "shape" not in value:
        return None
    try:
        schedule = as_schedule(value)
        schedule = with_epochs(schedule, epochs) if epochs else schedule
        schedule(1.0)
    except UserError:  # settings of another version: the report goes on without the line
        return None
    return schedule


def _number_at(settings: Mapping[str, object], name: str) -> float | None:
    value = _at(settings, name)
    return value if isinstance(value, int | float) else None


def _count_at(settings: Mapping[str, object], name: str) -> int | None:
    value = _at(settings, name)
    return value if isinstance(value, int) else None


def _at(settings: Mapping[str, object], name: str) -> object:
    """The setting with the dotted `name`; None where there is no such setting."""
    value: object = settings
    for key in name.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _has(settings: Mapping[str, object], followed: pd.DataFrame, column: str, curve: Curve) -> bool:
    return bool(followed[column].notna().any()) or as_set(settings, curve) is not None


def _draw(
    axes: Axes, settings: Mapping[str, object], followed: pd.DataFrame, quantity: tuple[str, str, Curve]
) -> None:
    title, column, curve = quantity
    line = as_set(settings, curve)
    if line is not None:
        axes.plot(*line, color=ACCENT, lw=1.8)
    points = followed.dropna(subset=[column]).groupby("progress")[column].mean()
    axes.plot(points.index, points.to_numpy(), "o", mfc=PAPER, mec=SECOND, ms=4)
    values = np.concatenate([points.to_numpy(dtype=float), [] if line is None else line[1]])
    # constant up to the rounding of float32: a flat line in the middle
    if np.ptp(values) <= 1e-6 * abs(values).max():
        axes.set_ylim(0, 2 * values[0] if values[0] > 0 else 1)
        title = f"{title}: constant {number(float(values[0]))}"
    else:
        axes.set_ylim(min(0, values.min()), 1.1 * values.max() if values.max() > 0 else None)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.set(xlim=(0, 1.03))
    axes.set_title(title, fontsize=9.5)
