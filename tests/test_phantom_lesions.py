"""Ill phantoms: their lesions have the volumes, contrasts and sides that are said, and the last rung shows nothing."""

from __future__ import annotations

from functools import lru_cache

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError
from scipy import ndimage

from core.volumes.cohort.reader import Cohort
from core.volumes.phantom.cohort import (
    phantom_brain,
    phantom_disease,
    write_phantom_bids,
    write_phantom_cohort,
)
from core.volumes.phantom.lesions import LADDER
from core.volumes.phantom.settings import PhantomSettings
from core.volumes.sources import list_scans

PEOPLE = 48


def settings_of(rung, subjects=PEOPLE, spacing=8.0):
    return PhantomSettings(kind="lesions", rung=rung, subjects=subjects, spacing=spacing)


@lru_cache
def people(rung):
    return [phantom_disease(settings_of(rung), index) for index in range(PEOPLE)]


@lru_cache
def healthy():
    return [phantom_brain(settings_of(1), index) for index in range(PEOPLE)]


def test_half_are_ill_and_the_rung_does_not_say_who():
    kinds = [one.condition for one in people(1)]
    # 24 expected, SD 3.5.
    assert 12 <= kinds.count("healthy") <= 36
    assert set(kinds) == {"healthy", "unilateral", "diffuse", "atrophy"}
    for rung in (2, 5):
        assert [(one.condition, one.side) for one in people(rung)] == [
            (one.condition, one.side) for one in people(1)
        ]


@pytest.mark.parametrize("rung", [1, 2, 3])
def test_lesions_have_their_volume_and_contrast(rung):
    volume_ml, darker = LADDER[rung - 1]
    shares = []
    for one, before in zip(people(rung), healthy(), strict=True):
        has_lesion = one.condition in ("unilateral", "diffuse")
        assert one.lesion.any() == has_lesion
        if has_lesion:
            assert one.lesion_ml == pytest.approx(volume_ml, abs=0.512)
            after, image = one.brain.channels["t1w"], before.channels["t1w"]
            core = ndimage.binary_erosion(one.lesion, iterations=1)
            shares += (1 - after[core] / image[core]).tolist()
            far = ndimage.binary_dilation(one.lesion, iterations=4)
            np.testing.assert_array_equal(after[~far], image[~far])
    if shares:
        assert np.median(shares) == pytest.approx(darker, abs=0.02)
    assert bool(shares) or rung > 1


def test_lesions_are_on_the_side_that_the_table_says():
    of_diffuse = []
    for one in people(1):
        if one.condition == "healthy":
            assert one.side == ""
            continue
        changed = one.lesion > 0
        if one.condition == "atrophy":
            changed = one.brain.channels["t1w"] != healthy()[people(1).index(one)].channels["t1w"]
            assert (one.brain.tissue[changed] == 2).all()
        x_mm = nib.affines.apply_affine(one.brain.affine, np.argwhere(changed))[:, 0]
        on_side = (x_mm > 0) if one.side == "right" else (x_mm < 0)
        if one.condition == "diffuse":
            of_diffuse.append(on_side.mean())
        else:
            assert on_side.all()
    assert 0.65 < np.mean(of_diffuse) < 1


def test_the_last_rung_cannot_be_seen():
    for one, before in zip(people(5), healthy(), strict=True):
        np.testing.assert_array_equal(one.brain.channels["t1w"], before.channels["t1w"])
    assert any(one.lesion.any() for one in people(5))


def test_a_person_is_the_same_in_any_cohort():
    alone = phantom_disease(settings_of(2, subjects=200), 7)
    assert (alone.condition, alone.side) == (people(2)[7].condition, people(2)[7].side)
    np.testing.assert_array_equal(alone.lesion, people(2)[7].lesion)
    np.testing.assert_array_equal(alone.brain.channels["t1w"], people(2)[7].brain.channels["t1w"])


def test_ageing_cohorts_are_what_they_were():
    assert PhantomSettings().identity() == {
        "phantom": 1, "subjects": 96, "spacing": 4.0, "seed": 0, "ages": "clusters", "sites": 3,
        "channels": ["stiffness"], "sex_effect": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rung": 2}, "rung cannot act with kind ageing"),
        ({"kind": "lesions", "channels": ("stiffness",)}, "channels must be of t1w with kind lesions"),
        ({"kind": "lesions", "rung": 6}, "less than or equal to 5"),
    ],
)
def test_settings_that_cannot_act(given, message):
    with pytest.raises(ValidationError, match=message):
        PhantomSettings(**given)


def test_cohort_and_nifti_tree_tell_the_same(tmp_path):
    settings = settings_of(1, subjects=10)
    cohort = write_phantom_cohort(tmp_path / "cohort", settings)
    assert Cohort.open(tmp_path / "cohort").description.map_names == ("lesion",)
    tree = write_phantom_bids(tmp_path / "tree", settings)
    table = pd.read_csv(tree / "participants.tsv", sep="\t", keep_default_na=False)
    for column in ("disease", "condition", "side", "lesion_ml"):
        assert table[column].tolist() == cohort.manifest[column].tolist()
    listing = list_scans(tree, channels=["T1w"], maps=["lesion"])
    assert len(listing.scans) == 10
    for row, scan in enumerate(listing.scans):
        stored = np.asarray(nib.load(scan.maps["lesion"].path).dataobj)
        np.testing.assert_array_equal(cohort.read_map("lesion", [row])[0], stored)
