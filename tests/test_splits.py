from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import UserError
from core.evaluation.splits import Splits, labelled_order, make_splits, nested_splits


def manifest_of(count: int, sites: int = 1, seed: int = 0) -> pd.DataFrame:
    generator = np.random.default_rng(seed)
    young, old = generator.normal(25, 4, count), generator.normal(70, 6, count)
    return pd.DataFrame({
        "subject": [f"sub-{number:03d}" for number in generator.permutation(count)],
        "age": np.where(generator.random(count) < 0.6, young, old),
        "site": generator.choice([f"site {letter}" for letter in "ABCDEFG"[:sites]], count),
    })  # fmt: skip


def by_subject(splits: Splits, manifest: pd.DataFrame) -> dict[str, str]:
    return dict(splits.to_frame(manifest).itertuples(index=False))


@given(
    count=st.integers(12, 90),
    sites=st.integers(1, 7),
    folds=st.integers(2, 8),
    holdout=st.sampled_from([0.0, 0.1, 0.2, 0.33]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=30, deadline=None)
def test_laws(count, sites, folds, holdout, seed):
    manifest = manifest_of(count, sites, seed=count)
    splits = make_splits(manifest, folds, holdout, seed)
    parts = [splits.holdout, *splits.folds]
    assert sorted(np.concatenate(parts).tolist()) == list(range(count))  # disjoint, and nobody left out
    assert len(splits.holdout) == (max(1, round(holdout * count)) if holdout else 0)
    sizes = [len(fold) for fold in splits.folds]
    assert max(sizes) - min(sizes) <= 1
    for number, fold in enumerate(splits.folds):
        assert set(splits.training(number)) == set(range(count)) - set(fold) - set(splits.holdout)
        assert set(splits.training(number)) | set(fold) == set(splits.development)
    shuffled = manifest.sample(frac=1, random_state=seed % 1000)
    assert by_subject(make_splits(shuffled, folds, holdout, seed), shuffled) == by_subject(splits, manifest)


def test_seed_decides_and_folds_do_not_change_the_holdout():
    manifest = manifest_of(60, 3)
    five = make_splits(manifest, 5, seed=1)
    assert by_subject(five, manifest) == by_subject(make_splits(manifest, 5, seed=1), manifest)
    np.testing.assert_array_equal(five.holdout, make_splits(manifest, 3, seed=1).holdout)
    holdouts = {tuple(make_splits(manifest, 5, seed=seed).holdout.tolist()) for seed in range(8)}
    assert len(holdouts) == 8
    folds = {tuple(make_splits(manifest, 5, holdout=0.0, seed=seed).folds[0].tolist()) for seed in range(8)}
    assert len(folds) == 8


def test_everyone_is_held_out_sometimes():
    manifest = manifest_of(40, 2)
    counts = np.zeros(40)
    for seed in range(100):
        counts[make_splits(manifest, 4, seed=seed).holdout] += 1
    # each of 100 draws takes a subject with p = 1/5: the SD of a count is 4
    assert counts.min() > 4
    assert counts.max() < 40


def test_parts_are_more_alike_in_age_and_site_than_random_ones():
    manifest = manifest_of(100, 3)
    stratified, random = [], []
    for seed in range(15):
        splits = make_splits(manifest, 5, 0.2, seed)
        shuffled = np.random.default_rng(seed).permutation(100)
        for collected, parts in (
            (stratified, [splits.holdout, *splits.folds]),
            (random, [shuffled[:20], *np.array_split(shuffled[20:], 5)]),
        ):
            ages = [manifest["age"].iloc[rows].mean() for rows in parts]
            shares = [(manifest["site"].iloc[rows] == "site A").mean() for rows in parts]
            collected.append((np.std(ages), np.std(shares)))
    age_ratio, site_ratio = np.mean(stratified, axis=0) / np.mean(random, axis=0)
    assert age_ratio < 0.4
    assert site_ratio < 0.4


def test_every_age_bin_and_site_is_shared_out_evenly():
    manifest = pd.DataFrame({
        "subject": [f"s{number:02d}" for number in range(60)],
        "age": np.tile(np.arange(30.0), 2) + 20,
        "site": ["A"] * 30 + ["B"] * 30,
    })  # fmt: skip
    splits = make_splits(manifest, 6, holdout=0.0, seed=3)
    for fold in splits.folds:
        block = (manifest["age"].iloc[fold] - 20) // 6  # five bins of six subjects in each site
        assert sorted(zip(manifest["site"].iloc[fold], block, strict=True)) == [
            (site, bin_) for site in "AB" for bin_ in range(5)
        ]
    held_out = make_splits(manifest, 2, holdout=0.2, seed=3).holdout
    assert (manifest["site"].iloc[held_out] == "A").sum() == 6


def test_small_sites_are_pooled_so_that_age_stays_balanced():
    manifest = pd.DataFrame({
        "subject": [f"s{number:02d}" for number in range(40)],
        "age": np.arange(40.0) + 20,
        "site": [f"site {number % 20}" for number in range(40)],  # two subjects each
    })  # fmt: skip
    splits = make_splits(manifest, 4, holdout=0.0)
    for fold in splits.folds:
        assert sorted((manifest["age"].iloc[fold] - 20) // 4) == list(range(10))


def test_rows_of_one_subject_stay_together():
    manifest = manifest_of(30, 2)
    twice = pd.concat([manifest, manifest.assign(age=manifest["age"] + 1)], ignore_index=True)
    roles = make_splits(twice, 4).to_frame(twice)
    assert (roles.groupby("subject")["role"].nunique() == 1).all()
    assert len(roles) == 60


def test_to_frame_names_roles():
    manifest = manifest_of(10)
    splits = make_splits(manifest, 2)
    frame = splits.to_frame(manifest)
    assert frame["subject"].tolist() == manifest["subject"].tolist()
    assert set(frame["role"].iloc[splits.holdout]) == {"holdout"}
    assert set(frame["role"].iloc[splits.folds[1]]) == {"fold 1"}


def test_impossible_counts_are_refused():
    with pytest.raises(UserError, match="folds=7 needs at least 7 development subjects, cohort has 5"):
        make_splits(manifest_of(6), 7)
    with pytest.raises(UserError, match="folds=1 is too few"):
        make_splits(manifest_of(6), 1)
    with pytest.raises(UserError, match=r"holdout=1\.0 must be a fraction"):
        make_splits(manifest_of(6), 2, holdout=1.0)
    with pytest.raises(UserError, match="cohort has 0"):
        make_splits(manifest_of(6).iloc[:0], 2)
    with pytest.raises(UserError, match="fold 2 does not exist"):
        make_splits(manifest_of(6), 2).training(2)


@pytest.mark.parametrize(("subjects", "outer", "folds"), [(36, 5, 3), (23, 4, 2)])
def test_nested_hold_outs_are_disjoint_and_hold_everybody_out_once(
    subjects: int, outer: int, folds: int
) -> None:
    """Laws, with two scans of every third subject: no person is on both sides of any split."""
    scans = pd.DataFrame(
        {
            "subject": [f"s{index:03d}" for index in range(subjects)],
            "age": np.linspace(20, 80, subjects),
            "site": ["a", "b"] * (subjects // 2) + ["a"] * (subjects % 2),
        }
    )
    manifest = pd.concat([scans, scans[::3]], ignore_index=True).sample(
        frac=1, random_state=0, ignore_index=True
    )
    person = manifest["subject"].to_numpy()
    made = nested_splits(manifest, outer, folds, seed=3)
    assert len(made) == outer
    held_out = np.concatenate([splits.holdout for splits in made])
    assert sorted(held_out) == list(range(len(manifest)))
    sizes = [len(set(person[splits.holdout])) for splits in made]
    assert max(sizes) - min(sizes) <= 1
    for splits in made:
        assert len(splits.folds) == folds
        assert sorted([*splits.holdout, *splits.development]) == list(range(len(manifest)))
        assert not set(person[splits.holdout]) & set(person[splits.development])
        for fold in range(folds):
            assert not set(person[splits.folds[fold]]) & set(person[splits.training(fold)])
        ages = manifest["age"].to_numpy()
        assert abs(ages[splits.holdout].mean() - ages.mean()) < 6  # each hold-out is like the cohort
    again = nested_splits(manifest, outer, folds, seed=3)
    assert all((one.holdout == other.holdout).all() for one, other in zip(made, again, strict=True))


def test_a_cohort_whose_sites_nobody_knows_is_of_one_site():
    manifest = pd.DataFrame({"subject": [f"s{row:02d}" for row in range(20)], "site": ["", "n/a"] * 10})
    splits = make_splits(manifest, folds=3, holdout=0.2, by="site")
    everyone = np.concatenate([splits.holdout, *splits.folds])
    assert sorted(everyone) == list(range(20))
    assert len(splits.holdout) == 4
    assert sorted(labelled_order(manifest, np.arange(20), "site", 0)) == sorted(manifest["subject"])
    for part in nested_splits(manifest, outer=4, folds=2, by="site"):
        assert len(part.holdout) == 5
