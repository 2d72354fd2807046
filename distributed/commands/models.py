"""The models of a run: the best one and those of the folds, and for every scan those that do not know it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from rich.console import Console

from core.config import task_of
from core.errors import UserError
from core.inference import Predictor, load_predictor
from core.run_names import CURVE, NESTED, WINNER_FOLDER
from core.starts import TRAINED_ON, Seen, Start, data_set_of, read_trained_on, seen_of
from core.volumes.cohort.reader import Cohort
from distributed.commands.options import Ensemble
from distributed.run.folder import RunFolder, open_run
from distributed.run.trust import check_trusted


@dataclass(frozen=True)
class Model:
    """A model, and whom it was trained on."""

    folder: Path
    predictor: Predictor
    trained_on: pd.DataFrame | None
    """None if it is unknown."""

    def knows(self, cohort: Cohort) -> npt.NDArray[np.bool_]:
        """Which rows (N,) of a cohort it was trained on; all of them if it is unknown."""
        found, rows = self._seen(cohort), np.arange(len(cohort))
        return np.ones(len(rows), dtype=bool) if found is None else np.isin(rows, found.rows)

    def alike(self, cohort: Cohort) -> int:
        """How many people of a cohort have an id that it knows from another data set."""
        found = self._seen(cohort)
        return 0 if found is None else found.alike

    def _seen(self, cohort: Cohort) -> Seen | None:
        rows, data_set = np.arange(len(cohort)), data_set_of(cohort.description)
        return seen_of(Start("", {}, self.trained_on), cohort.manifest, rows, data_set)


@dataclass(frozen=True)
class Models:
    """The models of a run."""

    best: Model
    kept: tuple[Path, ...] = ()
    """The folders of the models of the winner on every fold; () if the run kept none."""
    expected: int = 0
    """How many there are once the run is finished."""
    task: str = ""

    @classmethod
    def of(cls, folder: RunFolder, console: Console | None, is_trusted: bool) -> Models:
        """Read them. The file of a task is executed only if it is the one with which the run began.

        Raises:
            UserError: there is no best model, or one is damaged.
        """
        check_trusted(
            folder, None, console or Console(quiet=True), is_trusted=is_trusted, does="this command"
        )
        kept = sorted(path.parent for path in folder.confirmed(WINNER_FOLDER).glob("model-*-*/input.json"))
        task, asked = task_of(folder.about.settings), folder.about.sweep
        counts = [asked.get(name) for name in ("folds", "confirm_seeds")]
        expected = math.prod(count if isinstance(count, int) else 0 for count in counts)
        return cls(_read(folder.path / "best", task), tuple(kept), expected, task)

    @cached_property
    def folds(self) -> tuple[Model, ...]:
        """The models of the winner on every fold."""
        return tuple(_read(path, self.task) for path in self.kept)

    def of_kind(self, kind: Ensemble) -> list[Model]:
        """The best model, or those of all folds, whose predictions are averaged.

        Raises:
            UserError: the run kept none of the folds.
        """
        if kind == "best":
            return [self.best]
        if not self.kept:
            raise UserError(
                "the run kept no models of its folds; sweep with --confirm-seeds 1, which trains the winner on every "
                "fold again and keeps them"
            )
        if len(self.kept) < self.expected:
            raise UserError(
                f"the run has {len(self.kept)} of {self.expected} models of its folds; finish it with `brainsweep "
                "resume`, or put them back from a backup"
            )
        return list(self.folds)

    def unseen(
        self, cohort: Cohort, kind: Ensemble = "best"
    ) -> tuple[npt.NDArray[np.int64], list[list[Model]]]:
        """For every row (N,) of a cohort which group of models predicts it, and the groups.

        A row that no model of the `kind` knows is in group 0. A row that some of them know has the models of the folds
        that do not. Where there is none, the row is in no group: -1.
        """
        known_best = self.best.knows(cohort)
        known_mn = np.array([model.knows(cohort) for model in self.folds], dtype=bool).reshape(
            len(self.folds), len(cohort)
        )
        groups: list[list[Model]] = [self.of_kind(kind)]
        is_new = ~known_best if kind == "best" else ~known_mn.any(axis=0)
        group = np.where(is_new, 0, -1)
        numbers: dict[tuple[int, ...], int] = {}
        for row in np.flatnonzero(group < 0):
            honest = tuple(int(number) for number in np.flatnonzero(~known_mn[:, row]))
            if honest:
                if honest not in numbers:
                    numbers[honest] = len(groups)
                    groups.append([self.folds[number] for number in honest])
                group[row] = numbers[honest]
        return group, groups


def single_run(run: Path) -> RunFolder:
    """The run, if it has one best model; UserError for a nested search, which has one for every hold-out."""
    folder = open_run(run)
    if folder.about.kind == CURVE:
        raise UserError(
            f"{run} is a curve, with a best model for every budget of labels; use one of its sweeps, such as "
            f"{run}/labelled-all"
        )
    if folder.about.kind == NESTED:
        raise UserError(
            f"{run} is a nested search: it judges the search and has no model of its own; use one of its sweeps, such "
            f"as {run}/outer-1, or run a sweep without --outer"
        )
    return folder


def batches_of(group: npt.NDArray[np.int64], size: int) -> Sequence[tuple[int, npt.NDArray[np.int64]]]:
    """The rows of every group but -1, `size` at most at a time."""
    return [
        (int(number), rows[start : start + size])
        for number in np.unique(group[group >= 0])
        for rows in [np.flatnonzero(group == number)]
        for start in range(0, len(rows), size)
    ]


def _read(folder: Path, task: str) -> Model:
    predictor, known = load_predictor(folder, task), folder / TRAINED_ON
    return Model(folder, predictor, read_trained_on(known) if known.exists() else None)
