"""Folds and hold-outs that the user gives: of a column, of whole groups, of another run."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from small_cohort import SMALL, write_small_cohort

from core.errors import UserError
from core.evaluation.splits import make_splits, splits_as_recorded, splits_by_column, splits_leaving_out
from distributed.sweeps.request import SweepRequest
from distributed.sweeps.resolve import splits_of, with_hash


def people(count=60, seed=0):
    generator = np.random.default_rng(seed)
    rows = pd.DataFrame(
        {
            "subject": [f"s{index:02d}" for index in range(count)],
            "age": generator.uniform(20, 80, count),
            "site": generator.choice(["A", "B", "C", "D", "E", "F"], count),
            "fold": np.arange(count) % 3,
        }
    )
    # Every fifth person was scanned twice.
    return pd.concat([rows, rows[::5]], ignore_index=True)


def parts_of(splits, manifest):
    """The subjects of the hold-out, and of every fold."""
    named = manifest["subject"].to_numpy()
    return [set(named[rows]) for rows in (splits.holdout, *splits.folds)]


def check_parts(splits, manifest):
    """Everybody is in one part, with all scans."""
    parts = parts_of(splits, manifest)
    assert sum(map(len, parts)) == manifest["subject"].nunique()
    rows = np.concatenate([splits.holdout, *splits.folds])
    assert sorted(rows.tolist()) == list(range(len(manifest)))
    return parts


def test_the_folds_are_those_of_the_column():
    manifest = people()
    splits = splits_by_column(manifest, "fold", 3, 0.2, 0, "age")
    held_out, *folds = check_parts(splits, manifest)
    assert len(held_out) == 12
    for number, fold in enumerate(folds):
        assert fold == set(manifest.query(f"fold == {number}")["subject"]) - held_out


@pytest.mark.parametrize("missing", [np.nan, "n/a-free"])
def test_who_has_no_fold_is_held_out(missing):
    manifest = people()
    if isinstance(missing, str):
        manifest["fold"] = manifest["fold"].map({0: "x", 1: "y", 2: ""})
        expected, folds = set(manifest.query("fold == ''")["subject"]), 2
    else:
        manifest["fold"] = manifest["fold"].where(manifest["fold"] != 1)
        expected, folds = set(manifest[manifest["fold"].isna()]["subject"]), 2
    held_out, *_ = check_parts(splits_by_column(manifest, "fold", folds, 0.2, 0, "age"), manifest)
    assert held_out == expected


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("folds", [2, 4, 5])
def test_a_site_is_in_one_part(folds, seed):
    manifest = people(seed=seed)
    parts = check_parts(splits_leaving_out(manifest, "site", folds, 0.2, seed), manifest)
    assert all(parts)
    sites = [set(manifest[manifest["subject"].isin(part)]["site"]) for part in parts]
    assert sum(map(len, sites)) == 6
    if folds == 2:
        # Of six sites of about ten people: one, or two, is nearest to twelve.
        assert 1 <= len(sites[0]) <= 2
    again = splits_leaving_out(manifest, "site", folds, 0.2, seed)
    assert parts_of(again, manifest) == parts


def test_the_seed_draws_the_sites_that_are_held_out():
    manifest = people()
    drawn = {
        frozenset(parts_of(splits_leaving_out(manifest, "site", 2, 0.2, seed), manifest)[0])
        for seed in range(20)
    }
    assert len(drawn) > 3


def test_another_run_gives_its_roles_whatever_is_known_of_whom():
    manifest = people()
    first = make_splits(manifest, 3, 0.2, 7)
    recorded = first.to_frame(manifest)
    other = manifest.iloc[::-1].drop_duplicates("subject").assign(age=np.nan)
    again = splits_as_recorded(other, recorded, 3, "splits.csv")
    assert parts_of(again, other) == parts_of(first, manifest)


MADE = {
    "--folds-from: the cohort has no column 'folds'; did you mean 'fold'": lambda m: splits_by_column(
        m, "folds", 3, 0.2, 0, "age"
    ),
    r"has 3 values \(0, 1, 2\), and --folds is 5; give --folds 3": lambda m: splits_by_column(
        m, "fold", 5, 0.2, 0, "age"
    ),
    "12 subjects have several values there, such as s00; all scans of a person": lambda m: splits_by_column(
        m.assign(fold=np.arange(len(m)) // 60), "fold", 2, 0.2, 0, "age"
    ),
    "the column has 6 values, and 6 folds and a hold-out need 7; give --folds 5": lambda m: (
        splits_leaving_out(m, "site", 6, 0.2, 0)
    ),
    "12 subjects have no value there, such as s": lambda m: splits_leaving_out(
        m.assign(site=np.where(m["subject"].isin(m["subject"].unique()[:12]), "", m["site"])),
        "site",
        2,
        0.2,
        0,
    ),
    "splits.csv has no role for 1 of 60 subjects of the cohort, such as s07": lambda m: splits_as_recorded(
        m, make_splits(m, 3).to_frame(m).query("subject != 's07'"), 3, "splits.csv"
    ),
    "splits.csv has 3 folds, and --folds is 4; give --folds 3": lambda m: splits_as_recorded(
        m, make_splits(m, 3).to_frame(m), 4, "splits.csv"
    ),
}


@pytest.mark.parametrize("message", MADE)
def test_what_cannot_be_divided_so(message):
    with pytest.raises(UserError, match=message) as caught:
        MADE[message](people())
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    write_small_cohort(folder / "cohort", subjects=30)
    return folder


def asked(folder: Path, out: str, *more: object) -> tuple[object, ...]:
    small = [part for name, value in SMALL.items() for part in ("--set", f"{name}={value}")]
    return ("train", folder / "cohort", "--out", folder / out, *small, "--set", "training.epochs=1", *more)


def test_train_takes_the_splits_of_another_run(cohort, brainsweep):
    assert brainsweep(*asked(cohort, "first", "--folds", 3))[0] == 0
    assert brainsweep(*asked(cohort, "second", "--folds", 3, "--splits-from", cohort / "first"))[0] == 0
    first, second = (pd.read_csv(cohort / name / "splits.csv") for name in ("first", "second"))
    pd.testing.assert_frame_equal(first, second)
    for more, message in (
        (
            ("--splits-from", cohort / "first", "--leave-out", "site"),
            "both say who is in which part; give one",
        ),
        (("--splits-from", cohort / "none"), "there is no "),
        (("--folds", 3, "--leave-out", "site"), "the column has 2 values"),
    ):
        code, _, said = brainsweep(*asked(cohort, "third", *more))
        assert code == 2
        assert message in said
        assert said.count("\n") == 1
    assert not (cohort / "third").exists()


def test_what_was_taken_from_another_run_is_kept_and_checked(tmp_path):
    """The other run may go; a changed table of one's own is not taken for what it was."""
    manifest = people()
    (tmp_path / "other").mkdir()
    first = make_splits(manifest, 3, 0.2, 7)
    first.to_frame(manifest).to_csv(tmp_path / "other" / "splits.csv", index=False)
    asked = SweepRequest(folds=3, splits_from=tmp_path / "other")
    own = tmp_path / "splits.csv"
    taken = splits_of(asked, manifest, "age", own)
    assert parts_of(taken, manifest) == parts_of(first, manifest)
    request = with_hash(asked, taken, manifest)
    assert with_hash(SweepRequest(), taken, manifest) == SweepRequest()

    shutil.move(tmp_path / "other" / "splits.csv", own)
    again = splits_of(SweepRequest.model_validate(request.model_dump(mode="json")), manifest, "age", own)
    assert parts_of(again, manifest) == parts_of(first, manifest)
    with pytest.raises(UserError, match="there is no "):
        splits_of(request, manifest, "age")

    table = pd.read_csv(own)
    in_fold = table["subject"] == table.query("role == 'fold 0'")["subject"].iloc[0]
    table.assign(role=table["role"].mask(in_fold, "holdout")).to_csv(own, index=False)
    with pytest.raises(UserError, match="is damaged: put it back from a backup"):
        splits_of(request, manifest, "age", own)


def test_a_nested_search_has_hold_outs_of_its_own():
    with pytest.raises(UserError, match="--leave-out site cannot act: --outer 3 makes hold-outs of its own"):
        splits_of(SweepRequest(outer=3, outer_fold=0, leave_out="site"), people(), "age")
