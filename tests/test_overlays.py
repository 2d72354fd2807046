"""Overlays: columns beside a cohort that stays as it is, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from small_cohort import write_small_cohort

from core.config import merge, resolve
from core.errors import UserError
from core.run_description import CohortOfRun, find_cohort
from core.volumes.cohort.overlay import DERIVED, check_new, describe_overlay, write_overlay
from core.volumes.cohort.reader import Cohort
from distributed.sweeps.starts import check_leaks
from search_spaces import published

VOLUMES = ("csf_ml", "gm_ml", "wm_ml")


@pytest.fixture
def cohort(tmp_path):
    return write_small_cohort(tmp_path / "cohort", 12)


def add(cohort, name="volumes", columns=VOLUMES, seen=()):
    draws = np.random.default_rng(0)
    values = pd.DataFrame({column: draws.uniform(10, 900, len(cohort)) for column in columns})
    known = np.isin(np.arange(len(cohort)), seen)
    description, content = describe_overlay(
        name, values, known, cohort.description.hash, made_by="the models of run"
    )
    write_overlay(cohort.folder, description, content)
    return values, description


def test_columns_are_there_and_the_cohort_is_as_it_was(cohort):
    values, description = add(cohort, seen=[3])
    opened = Cohort.open(cohort.location)
    pd.testing.assert_frame_equal(opened.manifest[list(VOLUMES)], values, check_names=False)
    assert opened.description == cohort.description
    pd.testing.assert_frame_equal(opened.manifest[cohort.manifest.columns], cohort.manifest)
    overlay = opened.overlays["volumes"]
    assert overlay.description == description
    assert np.flatnonzero(overlay.seen).tolist() == [3]
    np.testing.assert_array_equal(opened.read([5]), cohort.read([5]))


def test_two_overlays_and_one_that_was_deleted(cohort):
    add(cohort)
    add(cohort, "again", ("again_csf_ml",))
    assert list(Cohort.open(cohort.location).overlays) == ["volumes", "again"]
    (cohort.folder / DERIVED / "volumes" / "overlay.json").unlink()
    opened = Cohort.open(cohort.location)
    assert list(opened.overlays) == ["again"]
    assert "csf_ml" not in opened.manifest


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda place: (place / "columns.parquet").write_bytes(b"nothing"), "is damaged"),
        (lambda place: (place / "overlay.json").write_text("{}"), "is damaged"),
        (lambda place: (place.parent / "index.json").write_text("5"), "is damaged"),
        (lambda place: _change(place), "was changed"),
        (lambda place: _of_another(place), "belongs to other scans"),
    ],
)
def test_damage_is_named(cohort, spoil, said):
    add(cohort)
    spoil(cohort.folder / DERIVED / "volumes")
    with pytest.raises(UserError, match=said):
        Cohort.open(cohort.location)


def _change(place):
    table = pd.read_parquet(place / "columns.parquet")
    table.loc[0, "csf_ml"] += 1
    table.to_parquet(place / "columns.parquet", index=False)


def _of_another(place):
    fields = json.loads((place / "overlay.json").read_text())
    (place / "overlay.json").write_text(json.dumps({**fields, "cohort": "another"}))


def test_what_is_there_is_not_overwritten(cohort):
    add(cohort)
    known = Cohort.open(cohort.location).manifest.columns
    with pytest.raises(UserError, match="is there already"):
        check_new(cohort.folder, "volumes", VOLUMES, known)
    with pytest.raises(UserError, match="--name predicted makes predicted_csf_ml"):
        check_new(cohort.folder, "other", VOLUMES, known)
    check_new(cohort.folder, "other", ["other_csf_ml"], known)


def test_a_run_finds_the_overlay_with_which_it_began(cohort):
    _, description = add(cohort)
    recorded = CohortOfRun(
        path=cohort.location, hash=cohort.description.hash, overlays={"volumes": description.hash}
    )
    assert find_cohort(cohort.folder, recorded).overlays
    place = cohort.folder / DERIVED / "volumes"
    (place / "overlay.json").rename(place / "kept.json")
    with pytest.raises(UserError, match="volumes is missing since the run began"):
        find_cohort(cohort.folder, recorded)


def test_people_whom_the_models_know_are_not_judged_on_what_they_say(cohort):
    add(cohort, seen=[2, 7])
    opened, console = Cohort.open(cohort.location), Console(quiet=True)
    settings = resolve(published("tissue_age"))
    names = opened.manifest["subject"].iloc[[2, 7]].tolist()
    judged = np.arange(len(opened))
    with pytest.raises(UserError, match=f"{names[0]}, {names[1]}.*--confirm-seeds 1"):
        check_leaks({}, settings, opened, judged, console, is_allowed=False)
    (allowed,) = check_leaks({}, settings, opened, judged, console, is_allowed=True)
    assert allowed.seen == tuple(names)
    (fine,) = check_leaks({}, settings, opened, np.array([0, 1]), console, is_allowed=False)
    assert fine.seen == ()
    # A task of ours that sees images only has no use for them; one on columns may choose others in its space.
    images = resolve(published("brain_age"))
    assert check_leaks({}, images, opened, judged, console, is_allowed=False) == ()
    others = resolve(merge(published("tissue_age"), {"data.volumes": ["age"]}))
    with pytest.raises(UserError, match="--confirm-seeds 1"):
        check_leaks({}, others, opened, judged, console, is_allowed=False)
