"""The figures of a classification: how held-out people are ranked, what they are taken for, and how sure that is."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from sklearn.metrics import roc_curve

from core.evaluation.classification import predicted_classes
from core.files.tables import PROBABILITY
from core.report.answer.classes import confidence, confusion, held_out_people
from core.report.answer.record import RunRecord
from core.report.figures.style import ACCENT, INK, MARKERS, MUTED, PAPER, SERIES, new_figure, styled

BINS = 5


@styled
def roc(record: RunRecord) -> Figure:
    """The ROC curve of every class against the rest, of the mean probabilities over refits (winner)."""
    people, names = held_out_people(record), predicted_classes(record.predictions)
    figure, axes = new_figure(4.3, width=4.8)
    axes.plot([0, 1], [0, 1], color=MUTED, lw=1, ls=(0, (4, 3)), label="chance")
    # Of two classes, one curve is the other one turned.
    shown = names[1:] if len(names) == 2 else names
    for index, name in enumerate(shown):
        is_class = people["truth"] == name
        if not 0 < is_class.sum() < len(people):
            continue
        false, true, _ = roc_curve(is_class, people[f"{PROBABILITY}{name}"])
        axes.step(
            false,
            true,
            where="post",
            color=SERIES[index % len(SERIES)],
            label=f"{name}, n = {is_class.sum()}",
        )
    axes.set(
        xlabel="1 − specificity", ylabel="sensitivity", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal"
    )
    figure.legend(loc="outside upper left", ncols=3)
    return figure


@styled
def confusion_matrix(record: RunRecord) -> Figure:
    """How many people of every class are taken for every class; darker: a larger share of the class."""
    people, names = held_out_people(record), predicted_classes(record.predictions)
    table = confusion(people, names).to_numpy()
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    figure, axes = new_figure(1.4 + 0.5 * len(names), width=2.6 + 0.7 * len(names))
    for row in range(len(names)):
        for column in range(len(names)):
            corner = (column - 0.5, row - 0.5)
            axes.add_patch(
                Rectangle(corner, 1, 1, color=ACCENT, alpha=float(0.75 * share[row, column]), lw=0)
            )
            axes.text(column, row, str(table[row, column]), ha="center", va="center", color=INK)
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names)
    axes.set(
        xlim=(-0.5, len(names) - 0.5), ylim=(len(names) - 0.5, -0.5), xlabel="predicted", ylabel="true",
        aspect="equal",
    )  # fmt: skip
    axes.grid(visible=False)
    return figure


@styled
def reliability(record: RunRecord) -> Figure:
    """How often predictions are right against how sure they are, in groups of equal size; on the line both agree."""
    sure_n, right_n = confidence(held_out_people(record))
    figure, axes = new_figure(3.4, width=4.8)
    axes.plot([0, 1], [0, 1], color=MUTED, lw=1, ls=(0, (4, 3)))
    for group in np.array_split(np.argsort(sure_n, kind="stable"), min(BINS, len(sure_n))):
        axes.plot(
            sure_n[group].mean(),
            right_n[group].mean(),
            MARKERS[0],
            color=ACCENT,
            mec=PAPER,
            ms=3 + 2 * np.sqrt(len(group)),
        )
        axes.annotate(
            f"{len(group)}", (sure_n[group].mean(), right_n[group].mean()), (7, -3), textcoords="offset points",
            fontsize=8, color=MUTED,
        )  # fmt: skip
    axes.set(
        xlabel="probability of the predicted class",
        ylabel="share that is right",
        xlim=(0, 1.04),
        ylim=(-0.04, 1.04),
    )
    return figure
