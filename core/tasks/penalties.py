"""How the cells of one trial choose the penalty of a probe for each other: nested cross-validation on their embeddings.

An encoder fits the people that it was trained on, so their embeddings follow the truth too closely, and a penalty that
is chosen on them is too small. In the cells of other folds, people are judged whom neither encoder nor probe knows.
`python -m benchmarks.probe_penalty` has the figures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from core.evaluation import Floats
from core.evaluation.splits import Rows
from core.tasks.task import JudgedCell, Observed

BY_PENALTY, WITHOUT = "by_penalty", "without"
"""What a cell keeps: its predictions with every penalty, and by fold the error (P,) of every penalty if the people of
this fold are not among those of the probe."""

Errors = Callable[[Observed, Observed], Floats]
"""The errors (P,) over people of the evaluation, of a probe of the training scans with each of P penalties."""


def errors_without_folds(
    training: Observed, evaluation: Observed, folds: Rows, errors: Errors, fewest: int
) -> dict[int, Floats]:
    """By fold, the error (P,) of every penalty if the probe is fitted without the people of this fold.

    Empty if without any two folds fewer people than `fewest` remain for a probe. So this is the same in all cells of a
    trial.
    """
    people = [len(np.unique(training.subjects[folds == fold])) for fold in np.unique(folds)]
    people.append(len(np.unique(evaluation.subjects)))
    if sum(sorted(people)[:-2]) < fewest:
        return {}
    return {int(fold): errors(part_of(training, folds != fold), evaluation) for fold in np.unique(folds)}


def part_of(observed: Observed, chosen: Rows) -> Observed:
    """Those of the scans (a mask, or rows)."""
    return replace(
        observed,
        labels=observed.labels[chosen],
        sites=observed.sites[chosen],
        subjects=observed.subjects[chosen],
        embeddings=observed.embeddings[chosen],
        outputs={name: values[chosen] for name, values in observed.outputs.items()},
    )


def chosen_for_each(cells: Sequence[JudgedCell]) -> list[int]:
    """For every cell the place of the penalty that the cells of other folds choose for it.

    The people of the cell itself have no part in it as far as probes can tell: for them the probes of the other cells
    are fitted, and judged, without them. What remains: the encoders of the other cells were trained with them.

    An empty list if a cell finds no other one that can choose for it: with two folds or fewer, or with very few people.
    """
    curves = [
        [
            without_of(other)[cell.fold]
            for other in cells
            if other.fold != cell.fold and cell.fold in without_of(other)
        ]
        for cell in cells
    ]
    return [best_place(each) for each in curves] if all(curves) else []


def best_place(errors_cp: Sequence[Floats]) -> int:
    """The place of the penalty with the least mean error over C cells."""
    return int(np.argmin(np.mean(np.stack(errors_cp), axis=0)))


def without_of(cell: JudgedCell) -> Mapping[int, Floats]:
    """See `WITHOUT`."""
    found = cell.kept[WITHOUT]
    if not isinstance(found, Mapping):
        raise TypeError(f"the cell of fold {cell.fold} keeps {type(found).__name__}, not errors by fold")
    return found


def by_penalty_of(cell: JudgedCell) -> Floats:
    """See `BY_PENALTY`."""
    found: Floats = np.asarray(cell.kept[BY_PENALTY])
    return found
