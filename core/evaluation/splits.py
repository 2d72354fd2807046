"""Which subjects a model is trained and tested on: a hold-out that no trial sees, and folds for the search."""

from __future__ import annotations

from collections.abc import Collection
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


def make_splits(
    manifest: pd.DataFrame, folds: int, holdout: float = 0.2, seed: int = 0, by: str = "age"
) -> Splits:
    """Split a manifest by subject into a hold-out and `folds` folds alike in a column and in site.

    Subjects are lined up by site and by the column and cut into blocks of neighbours: one random subject of each
    block of about 1/holdout is held out, then each block of `folds` gives one to each fold. So blocks are
    the finest quantile bins that the counts allow, within sites; sites smaller than a block are
    lined up together. Fold sizes differ by at most one. The result depends on the seed and on the
    subjects' ids, values and sites, not on the order of rows; the hold-out does not depend on `folds`.

    Subjects without a value are divided in the same way by themselves, so whether other people have one never changes
    where a subject is.

    Args:
        manifest: columns subject, site and `by`, one row per scan.
        folds: two or more.
        holdout: the share of subjects that no fold has.
        seed: of the random choices.
        by: a column of numbers, of which a subject has the mean over scans, or of names, of which it has the first.

    Raises:
        UserError: counts that cannot be met, or no subject has a value.
    """
    if folds < 2:
        raise UserError(f"folds={folds} is too few; at least 2 are needed")
    if not 0 <= holdout < 1:
        raise UserError(f"holdout={holdout} must be a fraction from 0 up to, but not including, 1")
    how = "mean" if pd.api.types.is_numeric_dtype(manifest[by]) else "first"
    subjects = manifest.groupby("subject").agg(value=(by, how), site=("site", "first"))
    known = subjects["value"].notna()
    if len(subjects) and not known.any():
        raise UserError(f"the {by} of no scan is known; ingest a source with a column '{by}'")
    held_out, fold_of = _divide(subjects[known], folds, holdout, [seed])
    if len(fold_of) < folds:
        raise UserError(
            f"folds={folds} needs at least {folds} development subjects, cohort has {len(fold_of)} "
            f"({int(known.sum())} subjects{' with a known ' + by if not known.all() else ''}, {len(held_out)} of them "
            "held out)"
        )
    others = subjects[~known].assign(value=0.0)
    more_held_out, more_folds = _divide(others, folds, holdout, [seed, len(by)])
    place = pd.concat([fold_of, more_folds])
    return Splits(
        holdout=_rows(manifest, [*held_out, *more_held_out]),
        folds=tuple(_rows(manifest, place.index[place == fold]) for fold in range(folds)),
    )


def _divide(
    subjects: pd.DataFrame, folds: int, holdout: float, seed: list[int]
) -> tuple[Subjects, pd.Series[int]]:
    """The held-out subjects, and the fold of every other one."""
    held_out = _hold_out(subjects, holdout, seed)
    line = _line_up(subjects[~subjects.index.isin(held_out)], folds)
    return held_out, pd.Series(_deal(len(line), folds, np.random.default_rng([*seed, 1])), line)


def nested_splits(
    manifest: pd.DataFrame, outer: int, folds: int, seed: int = 0, by: str = "age"
) -> tuple[Splits, ...]:
    """`outer` splits whose hold-outs are disjoint, so that every subject is held out once; see `make_splits`.

    Each hold-out is like the cohort in the column `by` and in site, and so are the folds of the other subjects.
    """
    made = []
    for held_out in make_splits(manifest, outer, 0.0, seed, by).folds:
        others = np.setdiff1d(np.arange(len(manifest)), held_out)
        inner = make_splits(manifest.iloc[others], folds, 0.0, seed, by)
        made.append(Splits(holdout=held_out, folds=tuple(others[rows] for rows in inner.folds)))
    return tuple(made)


def _hold_out(subjects: pd.DataFrame, holdout: float, seed: list[int]) -> Subjects:
    """One random subject of each block of about 1/holdout neighbours; the same for any number of folds."""
    if holdout == 0:
        return np.empty(0, dtype=object)
    line = _line_up(subjects, smallest_site=round(1 / holdout))
    blocks = np.array_split(line, max(1, round(holdout * len(line)))) if len(line) else []
    generator = np.random.default_rng([*seed, 0])
    return np.array([generator.choice(block) for block in blocks], dtype=object)


def _line_up(subjects: pd.DataFrame, smallest_site: int) -> Subjects:
    """Subjects by site, then value: values rise in one site and fall in the next; small sites are pooled.

    The turn at each site (serpentine ordering, known from survey sampling) keeps neighbours alike in
    value where a block reaches over two sites.
    """
    sizes = subjects["site"].map(subjects["site"].value_counts())
    stratum = subjects["site"].where(sizes >= smallest_site, "")
    line: list[str] = []
    for turn, (_, members) in enumerate(subjects.groupby(stratum)):
        ascending = members.reset_index().sort_values(["value", "subject"])["subject"].tolist()
        line += ascending if turn % 2 == 0 else ascending[::-1]
    return np.array(line, dtype=object)


def _deal(subjects: int, folds: int, generator: np.random.Generator) -> Rows:
    """The fold of each subject in line: every block of `folds` neighbours is dealt one to each fold."""
    blocks = -(-subjects // folds)
    dealt = [np.empty(0, dtype=np.int64), *(generator.permutation(folds) for _ in range(blocks))]
    return np.concatenate(dealt)[:subjects]


def _rows(manifest: pd.DataFrame, subjects: Collection[object]) -> Rows:
    """Positions of the subjects' rows, sorted."""
    return np.flatnonzero(manifest["subject"].isin(subjects).to_numpy())
