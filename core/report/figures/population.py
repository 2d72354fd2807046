"""The figures of a population: its members and their exchanges over epochs, and the schedule that it found."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from optuna.trial import FrozenTrial

from core.report.answer.describe import number
from core.report.answer.population import (
    FOLLOWED,
    FoundSchedule,
    exchange_table,
    found_schedule,
    members,
)
from core.report.answer.record import NothingToShow, RunRecord, reported
from core.report.figures.style import (
    ACCENT,
    MUTED,
    SECOND,
    cut_above,
    legend_above,
    new_figure,
    new_grid,
    styled,
)
from core.run_names import EXCHANGED

UNITS = {"objective.width": " (years)", "objective.neighbours.end": " (share or count)"}
WIDE_RANGE = 8
"""A setting whose largest value is more than this many times its smallest is drawn on a logarithmic scale."""
LABEL_HEIGHT = 0.045
"""As a fraction of the height of the axes."""

Values = dict[int, dict[int, float]]
"""What the members reported, by member and epoch."""


@styled
def population(record: RunRecord) -> Figure:
    """Value of every member after every epoch, the exchanges between members, and the weights that won."""
    every = members(record)
    values = {member.number: _finite(member) for member in every}
    if not any(values.values()):
        raise NothingToShow("no member of a population reported a value, or the Optuna study is absent")
    figure, axes = new_figure(3.8)
    for place, member in enumerate(every):
        _draw_member(axes, member, values, bow=0.25 if place % 2 else -0.25)
    found = found_schedule(record)
    if found is not None:
        path = followed_values(found, values)
        axes.plot(list(path), list(path.values()), color=ACCENT, lw=2.6, zorder=4, label="the best weights")
    axes.plot([], [], color=MUTED, lw=1, label="members")
    exchanges = exchange_table(record)
    if len(exchanges):
        axes.plot([], [], color=SECOND, lw=1.1, marker=7, ms=5, label="goes on from")
    if record.objective.better == "low":
        _keep_scale(axes, values, exchanges["after epoch"].min())
    _name_ends(axes, values)
    axes.set(xlabel="epochs done in the first cell", ylabel=record.value_label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_above(axes, columns=3)
    return figure


def followed_values(found: FoundSchedule, values: Values) -> dict[int, float]:
    """By epoch, the value of the member that trained the weights of the schedule in that epoch."""
    path: dict[int, float] = {}
    begun = 0
    for member, last in found.followed:
        own = values.get(member, {})
        path |= {epoch: own[epoch] for epoch in range(begun + 1, last + 1) if epoch in own}
        begun = last
    return path


@styled
def steps(record: RunRecord) -> Figure:
    """Each setting that the population could change: its value in every epoch of the schedule that was found."""
    found = found_schedule(record)
    if found is None:
        raise NothingToShow("no schedule was found: no member trained to the end, or the study is absent")
    drawn = {name: values for name in FOLLOWED if (values := found.every_epoch(name))}
    if not drawn:
        raise NothingToShow("the schedule found has none of the settings that a population changes")
    rows = (len(drawn) + 1) // 2
    figure, grid = new_grid(0.5 + 1.7 * rows, rows, columns=2)
    for axes, (name, values) in zip(grid, drawn.items(), strict=False):
        _draw_steps(axes, FOLLOWED[name] + UNITS.get(name, ""), values)
    for axes in grid[len(drawn) :]:
        axes.remove()
    figure.supxlabel("epochs done", fontsize=10)
    return figure


def _finite(member: FrozenTrial) -> dict[int, float]:
    return {epoch: value for epoch, value in sorted(reported(member).items()) if np.isfinite(value)}


def _draw_member(axes: Axes, member: FrozenTrial, values: Values, bow: float) -> None:
    """One line for each stretch between its exchanges; a stretch begins at the value of the donor."""
    own = values[member.number]
    begin, first = 0, None
    for each in [*member.user_attrs.get(EXCHANGED, []), None]:
        end = max(own, default=0) if each is None else int(each["epoch"])
        stretch = {epoch: own[epoch] for epoch in range(begin + 1, end + 1) if epoch in own}
        points = ({begin: first} if first is not None else {}) | stretch
        axes.plot(list(points), list(points.values()), color=MUTED, lw=1, alpha=0.75)
        if each is None:
            return
        begin, first = end, values.get(int(each["donor"]), {}).get(end)
        if first is not None and end in own:
            _draw_exchange(axes, end, (own[end], first), bow)


def _draw_exchange(axes: Axes, epoch: int, given_up_and_taken: tuple[float, float], bow: float) -> None:
    """A bent arrow, because there may be several arrows at one epoch."""
    look = {
        "arrowstyle": "-|>", "connectionstyle": f"arc3,rad={bow}", "color": SECOND, "lw": 1.1, "shrinkA": 0,
        "shrinkB": 0, "mutation_scale": 8,
    }  # fmt: skip
    given_up, taken = given_up_and_taken
    arrow = axes.annotate("", (epoch, taken), (epoch, given_up), arrowprops=look, zorder=5)
    # the value that was given up may lie above the axes
    if arrow.arrow_patch is not None:
        arrow.arrow_patch.set_clip_path(axes.patch)


def _keep_scale(axes: Axes, values: Values, first_exchange: float) -> None:
    """Values of first epochs and of members that are about to be replaced can be extreme: they do not set the scale."""
    every = [value for own in values.values() for value in own.values()]
    later = [value for own in values.values() for epoch, value in own.items() if epoch >= first_exchange]
    limit = min(1.1 * max(later), 2 * np.percentile(later, 90)) if later else np.inf
    if max(every) > limit:
        cut_above(axes, min(every), limit)


def _name_ends(axes: Axes, values: Values) -> None:
    """Each member's number beside its last value; numbers of close values are moved apart."""
    low, high = axes.get_ylim()
    last = max(max(own) for own in values.values() if own)
    below = -np.inf
    for value, epoch, name in sorted((own[max(own)], max(own), name) for name, own in values.items() if own):
        below = max(min(value, high), below + LABEL_HEIGHT * (high - low))
        axes.annotate(
            str(name),
            (epoch, below),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=MUTED,
        )
    axes.set_xlim(right=1.05 * last + 0.2)


def _draw_steps(axes: Axes, title: str, values: Sequence[float]) -> None:
    """One step for each epoch, from the number of epochs done before it to the number done after it."""
    epochs = len(values)
    axes.stairs(values, range(epochs + 1), baseline=None, color=ACCENT, lw=1.8)
    if min(values) == max(values):
        title = f"{title}: constant {number(values[0])}"
    if min(values) > 0 and max(values) > WIDE_RANGE * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, place: number(value)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(min(0, *values), 1.15 * max(values) if max(values) > 0 else None)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
        axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.set(xlim=(0, epochs * 1.03))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_title(title, fontsize=9.5)
