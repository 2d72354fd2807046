"""Which subjects a model is trained and tested on: a hold-out that no trial sees, and folds for the search."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from core.errors import UserError

Rows = npt.NDArray[np.int64]
Subjects = npt.NDArray[np.object_]


@dataclass(frozen=True, eq=False)
class Splits:
    """Rows of a manifest, divided once for a whole sweep. All subjects' rows stay together."""

    holdout: Rows
    """Rows that no trial sees; looked at once, with the refitted winner. Sorted; may be empty."""
    folds: tuple[Rows, ...]
    """Validation rows of each fold, sorted: disjoint, and together all rows outside the hold-out."""

    @property
    def development(self) -> Rows:
        """All rows outside the hold-out, sorted."""
        return np.sort(np.concatenate(self.folds))

    def training(self, fold: int) -> Rows:
        """Rows to train on in `fold`: the development rows without that fold's validation rows."""
        if not 0 <= fold < len(self.folds):
            raise UserError(f"fold {fold} does not exist; there are folds 0 to {len(self.folds) - 1}")
        return np.setdiff1d(self.development, self.folds[fold])

    def fold_of(self, rows: Rows) -> Rows:
        """The fold in which each of these development rows is validated."""
        folds = np.repeat(np.arange(len(self.folds)), [len(fold) for fold in self.folds])
        place = np.argsort(np.concatenate(self.folds))
        of_row: Rows = folds[place][np.searchsorted(self.development, rows)]
        return of_row

    def to_frame(self, manifest: pd.DataFrame) -> pd.DataFrame:
        """Columns subject and role ("holdout", "fold 0", "fold 1", …), one line per row of the manifest."""
        role = np.full(len(manifest), "holdout", dtype=object)
        for fold, rows in enumerate(self.folds):
            role[rows] = f"fold {fold}"
        return pd.DataFrame({"subject": manifest["subject"].to_numpy(), "role": role})


def make_splits(manifest: pd.DataFrame, folds: int, holdout: float = 0.2, seed: int = 0) -> Splits:
    """Split a manifest by subject into a hold-out and `folds` folds alike in age and site.

    Subjects are lined up by site and age and cut into blocks of neighbours: one random subject of each
    block of about 1/holdout is held out, then each block of `folds` gives one to each fold. So blocks are
    the finest age-quantile bins that the counts allow, within sites; sites smaller than a block are
    lined up together. Fold sizes differ by at most one. The result depends on the seed and on the
    subjects' ids, ages and sites, not on the order of rows; the hold-out does not depend on `folds`.
    Raises UserError for counts that cannot be met.
    """
    if folds < 2:
        raise UserError(f"folds={folds} is too few; at least 2 are needed")
    if not 0 <= holdout < 1:
        raise UserError(f"holdout={holdout} must be a fraction from 0 up to, but not including, 1")
    if unknown := manifest["age"].isna().sum():
        raise UserError(
            f"the age of {unknown} of {len(manifest)} scans is unknown, such as that of "
            f"{manifest.loc[manifest['age'].isna(), 'subject'].iloc[0]}; ingest a source with ages"
        )
    subjects = manifest.groupby("subject").agg(age=("age", "mean"), site=("site", "first"))
    held_out = _hold_out(subjects, holdout, seed)
    development = subjects[~subjects.index.isin(held_out)]
    if len(development) < folds:
        raise UserError(
            f"folds={folds} needs at least {folds} development subjects, cohort has {len(development)} "
            f"({len(subjects)} subjects, {len(held_out)} of them held out)"
        )
    line = _line_up(development, folds)
    fold_of = _deal(len(line), folds, np.random.default_rng([seed, 1]))
    return Splits(
        holdout=_rows(manifest, held_out),
        folds=tuple(_rows(manifest, line[fold_of == fold]) for fold in range(folds)),
    )


def nested_splits(manifest: pd.DataFrame, outer: int, folds: int, seed: int = 0) -> tuple[Splits, ...]:
    """`outer` splits whose hold-outs are disjoint, so that every subject is held out once; see `make_splits`.

    Each hold-out is like the cohort in age and site, and so are the folds of the other subjects.
    """
    made = []
    for held_out in make_splits(manifest, outer, 0.0, seed).folds:
        others = np.setdiff1d(np.arange(len(manifest)), held_out)
        inner = make_splits(manifest.iloc[others], folds, 0.0, seed)
        made.append(Splits(holdout=held_out, folds=tuple(others[rows] for rows in inner.folds)))
    return tuple(made)


def _hold_out(subjects: pd.DataFrame, holdout: float, seed: int) -> Subjects:
    """One random subject of each block of about 1/holdout neighbours; the same for any number of folds."""
    if holdout == 0:
        return np.empty(0, dtype=object)
    line = _line_up(subjects, smallest_site=round(1 / holdout))
    blocks = np.array_split(line, max(1, round(holdout * len(line)))) if len(line) else []
    generator = np.random.default_rng([seed, 0])
    return np.array([generator.choice(block) for block in blocks], dtype=object)


def _line_up(subjects: pd.DataFrame, smallest_site: int) -> Subjects:
    """Subjects by site, then age: ages rise in one site and fall in the next; small sites are pooled.

    The turn at each site (serpentine ordering, known from survey sampling) keeps neighbours alike in
    age where a block reaches over two sites.
    """
    sizes = subjects["site"].map(subjects["site"].value_counts())
    stratum = subjects["site"].where(sizes >= smallest_site, "")
    line: list[str] = []
    for turn, (_, members) in enumerate(subjects.groupby(stratum)):
        ascending = members.reset_index().sort_values(["age", "subject"])["subject"].tolist()
        line += ascending if turn % 2 == 0 else ascending[::-1]
    return np.array(line, dtype=object)


def _deal(subjects: int, folds: int, generator: np.random.Generator) -> Rows:
    """The fold of each subject in line: every block of `folds` neighbours is dealt one to each fold."""
    blocks = -(-subjects // folds)
    return np.concatenate([generator.permutation(folds) for _ in range(blocks)])[:subjects]


def _rows(manifest: pd.DataFrame, subjects: Subjects) -> Rows:
    """Positions of the subjects' rows, sorted."""
    return np.flatnonzero(manifest["subject"].isin(subjects).to_numpy())
