"""Which subjects a model is trained and tested on: a hold-out that no trial sees, and folds for the search."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from core.errors import UserError
from core.lookup import did_you_mean

Rows = npt.NDArray[np.int64]
Subjects = npt.NDArray[np.object_]


NO_NAME = ("", "n/a", "nan")
"""What a column of names says where a value is unknown: nothing, BIDS' n/a, or what reading an empty cell gives."""


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

    Subjects without a value are divided in the same way by themselves. Who is where depends on who has a value: to
    compare two tasks on the same people, take the splits of one for the other (`splits_as_recorded`).

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
    is_number = pd.api.types.is_numeric_dtype(manifest[by])
    values = manifest[by] if is_number else manifest[by].map(known_name)
    of_scans = pd.DataFrame({"subject": manifest["subject"], "site": manifest["site"], "value": values})
    subjects = of_scans.groupby("subject").agg(
        value=("value", "mean" if is_number else "first"), site=("site", "first")
    )
    known = subjects["value"].notna()
    if by == "site" and not known.any():
        # Then everybody counts as of one site.
        subjects["site"], subjects["value"] = "", ""
        known[:] = True
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


def known_name(value: object) -> object:
    """A name in a column of a cohort; None where it says that there is none."""
    return None if pd.isna(value) or str(value).strip().lower() in NO_NAME else value  # type: ignore[call-overload]


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


def splits_by_column(
    manifest: pd.DataFrame, column: str, folds: int, holdout: float, seed: int, by: str
) -> Splits:
    """The folds that a column of the cohort names, in the order of its values.

    Subjects without a value are held out. If everybody has one, a hold-out is drawn from all folds as in `make_splits`.

    Raises:
        UserError: no such column, another number of values than `folds`, or a subject with two values.
    """
    value = _column_by_subject(manifest, column, "--folds-from")
    names = sorted(value[value != ""].unique(), key=lambda name: (len(name), name))
    if len(names) != folds:
        some = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
        raise UserError(
            f"--folds-from {column}: the column has {len(names)} values ({some}), and --folds is {folds}; "
            + (f"give --folds {len(names)}" if len(names) > 1 else "two or more are needed")
        )
    held_out = np.array(value.index[value == ""], dtype=object)
    if not held_out.size:
        how = "mean" if pd.api.types.is_numeric_dtype(manifest[by]) else "first"
        subjects = manifest.groupby("subject").agg(value=(by, how), site=("site", "first"))
        subjects["value"] = subjects["value"].fillna(subjects["value"].min())
        held_out = _hold_out(subjects, holdout, [seed])
    return _of_roles(manifest, value.where(~value.index.isin(held_out), ""), names, column)


def splits_leaving_out(manifest: pd.DataFrame, column: str, folds: int, holdout: float, seed: int) -> Splits:
    """Folds, and a hold-out, of whole groups: everybody with one value of a column, such as a site, is in one part.

    The seed draws the groups of the hold-out until they have about `holdout` of the subjects; the others go, the
    largest first, to the fold that is smallest.

    Raises:
        UserError: no such column, a subject with no value or with two, or too few groups.
    """
    group = _column_by_subject(manifest, column, "--leave-out")
    if (group == "").any():
        raise UserError(
            f"--leave-out {column}: {int((group == '').sum())} subjects have no value there, such as "
            f"{group.index[group == ''][0]}; give them one, or leave them out of the cohort"
        )
    sizes = group.value_counts().sort_index()
    if len(sizes) < folds + 1:
        raise UserError(
            f"--leave-out {column}: the column has {len(sizes)} values, and {folds} folds and a hold-out need "
            f"{folds + 1}; {f'give --folds {len(sizes) - 1}' if len(sizes) > 2 else 'three or more are needed'}"
        )
    names = sizes.index.to_numpy(dtype=object)
    drawn = names[np.random.default_rng([seed, len(column)]).permutation(len(names))]
    # The first group is held out whatever its size, and every fold keeps one.
    held = [drawn[0]]
    for name in drawn[1 : len(drawn) - folds]:
        with_it = sizes[held].sum() + sizes[name]
        if abs(with_it - holdout * len(group)) < abs(sizes[held].sum() - holdout * len(group)):
            held.append(name)
    rest = sorted((name for name in drawn if name not in held), key=lambda name: (-sizes[name], str(name)))
    filled = [0] * folds
    role = pd.Series("", index=group.index)
    for name in rest:
        fold = int(np.argmin(filled))
        filled[fold] += int(sizes[name])
        role[group == name] = str(fold)
    return _of_roles(manifest, role, [str(fold) for fold in range(folds)], column)


def splits_as_recorded(manifest: pd.DataFrame, recorded: pd.DataFrame, folds: int, source: str) -> Splits:
    """The roles that another run has given to the same subjects.

    Args:
        manifest: of the cohort.
        recorded: columns subject and role, as `Splits.to_frame` makes them.
        folds: how many are asked for.
        source: what the error message calls the table.

    Raises:
        UserError: a subject without a role, or another number of folds.
    """
    role = recorded.drop_duplicates("subject").set_index("subject")["role"]
    known = sorted({name for name in role if name != "holdout"}, key=lambda name: (len(name), name))
    if len(known) != folds:
        raise UserError(f"{source} has {len(known)} folds, and --folds is {folds}; give --folds {len(known)}")
    subjects = pd.Series(manifest["subject"].unique())
    strange = subjects[~subjects.isin(role.index)]
    if len(strange):
        raise UserError(
            f"{source} has no role for {len(strange)} of {len(subjects)} subjects of the cohort, such as "
            f"{strange.iloc[0]}; its run must know everybody"
        )
    of_subject = role[subjects].replace("holdout", "")
    return _of_roles(manifest, of_subject, known, source)


def _column_by_subject(manifest: pd.DataFrame, column: str, option: str) -> pd.Series[str]:
    """The value of every subject as text, "" where there is none."""
    if column not in manifest:
        raise UserError(
            f"{option}: the cohort has no column '{column}'; {did_you_mean(column, map(str, manifest.columns))}"
        )
    values = manifest[column]
    if pd.api.types.is_float_dtype(values) and (values.dropna() % 1 == 0).all():
        values = values.astype("Int64")
    text = values.astype("string").fillna("").str.strip()
    found = text.groupby(manifest["subject"].to_numpy()).agg(["first", "nunique"])
    double = found.index[found["nunique"] > 1]
    if len(double):
        raise UserError(
            f"{option} {column}: {len(double)} subjects have several values there, such as {double[0]}; all scans of a "
            "person must lie in one part"
        )
    return found["first"].astype(str)


def _of_roles(manifest: pd.DataFrame, role: pd.Series[str], names: Sequence[str], source: str) -> Splits:
    """Splits of the role of every subject: one of `names`, or "" for the hold-out."""
    parts = [_rows(manifest, role.index[role == name]) for name in names]
    for name, rows in zip(names, parts, strict=True):
        if not rows.size:
            raise UserError(f"{source}: nobody of the cohort is left in fold {name}")
    return Splits(holdout=_rows(manifest, role.index[role == ""]), folds=tuple(parts))


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


def labelled_order(manifest: pd.DataFrame, rows: Rows, by: str, seed: int) -> list[object]:
    """The subjects of these rows in the order in which they keep their label, if only some do.

    Every beginning of it is alike in `by`: of names each has its share, the first ones being one of every name, and of
    numbers each fifth. The order depends on the seed and on the subjects alone.

    Args:
        manifest: columns subject and `by`.
        rows: of the training subjects, whose value is known.
        by: see `make_splits`.
        seed: of the random order.
    """
    chosen = manifest.iloc[rows]
    is_number = pd.api.types.is_numeric_dtype(chosen[by])
    values = chosen.groupby("subject", sort=True)[by].agg("mean" if is_number else "first")
    groups = pd.qcut(values.rank(method="first"), min(5, len(values)), labels=False) if is_number else values
    draws = pd.Series(np.random.default_rng(seed).random(len(values)), index=values.index)
    place = draws.groupby(groups).rank(method="first") - draws
    share = place / groups.map(groups.value_counts()).to_numpy(float)
    if not is_number:
        # Whoever is left out here is a class that nobody could learn.
        share = share.where(draws.groupby(groups).rank(method="first") > 1, draws - 1)
    return share.sort_values(kind="stable").index.tolist()
