"""The phantom against the published numbers, and against itself in other processes, cohorts and grids."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from core.errors import UserError
from core.volumes.phantom.cohort import (
    phantom_brain,
    phantom_participants,
    write_phantom_bids,
    write_phantom_cohort,
)
from core.volumes.phantom.settings import PhantomSettings
from core.volumes.phantom.subject import Person, PhantomBrain, make_brain, smooth_field

REGIONS = ("frontal", "temporal", "parietal", "occipital", "cerebellum", "thalamus", "caudate", "putamen",
           "pallidum", "hippocampus", "amygdala")  # fmt: skip
SMALL = PhantomSettings(subjects=6, spacing=8.0)
BOTH = SMALL.model_copy(update={"channels": ("stiffness", "t1w")})


def whole_brain(brain: PhantomBrain) -> float:
    stiffness = brain.channels["stiffness"]
    return float(stiffness[stiffness > 0].mean())


def region_mean(brain: PhantomBrain, *names: str) -> float:
    wanted = np.isin(brain.regions, [1 + REGIONS.index(name) for name in names])
    return float(brain.channels["stiffness"][wanted].mean())


@lru_cache
def population() -> tuple[pd.DataFrame, list[PhantomBrain]]:
    settings = PhantomSettings(subjects=500, spacing=8.0, ages="uniform", seed=1)
    return phantom_participants(settings), [phantom_brain(settings, index) for index in range(500)]


@lru_cache
def lifetime(age: float) -> list[PhantomBrain]:
    """The same twelve people at one age: all that differs between two ages is ageing."""
    return [make_brain(Person(5, index, age, site=1), 4.0, ("stiffness",)) for index in range(12)]


def percent_per_year(start: float, end: float, *names: str) -> float:
    """Change between two ages in % of the value at 25 y, of regions or of the whole brain, over 12 people."""
    values = [
        np.mean([region_mean(brain, *names) if names else whole_brain(brain) for brain in lifetime(age)])
        for age in (25.0, start, end)
    ]
    return float(100 * (values[2] - values[1]) / (end - start) / values[0])


# one brain, however it is made


def digest(brain: PhantomBrain) -> str:
    parts: list[np.ndarray] = [*brain.channels.values(), brain.tissue, brain.regions, brain.affine]
    content = b"".join(part.tobytes() for part in parts) + repr(brain.volumes_ml).encode()
    return hashlib.sha256(content).hexdigest()


def test_another_process_with_other_threads_makes_the_same_bytes() -> None:
    code = (
        "from tests.test_phantom import BOTH, digest, phantom_brain, phantom_participants\n"
        "print(digest(phantom_brain(BOTH, 3)), phantom_participants(BOTH).to_csv().encode().hex())"
    )
    root = Path(__file__).parents[1]
    environment = {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2", "PYTHONPATH": str(root)}
    there = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root, env=environment
    ).stdout.split()
    assert there == [digest(phantom_brain(BOTH, 3)), phantom_participants(BOTH).to_csv().encode().hex()]


def test_a_subject_does_not_depend_on_the_size_of_the_cohort() -> None:
    larger = SMALL.model_copy(update={"subjects": 100})
    pd.testing.assert_frame_equal(phantom_participants(larger).head(6), phantom_participants(SMALL))
    assert digest(phantom_brain(larger, 5)) == digest(phantom_brain(SMALL, 5))


def test_a_channel_does_not_depend_on_the_others() -> None:
    alone, together = phantom_brain(SMALL, 0), phantom_brain(BOTH, 0)
    assert np.array_equal(alone.channels["stiffness"], together.channels["stiffness"])
    assert alone.volumes_ml == together.volumes_ml


def test_seed_and_subject_change_the_brain() -> None:
    other_seed = SMALL.model_copy(update={"seed": 1})
    brains = [phantom_brain(SMALL, 0), phantom_brain(SMALL, 1), phantom_brain(other_seed, 0)]
    assert len({digest(brain) for brain in brains}) == 3


def test_spacings_show_the_same_brain() -> None:
    for index in range(3):
        coarse = phantom_brain(SMALL, index)
        fine = phantom_brain(SMALL.model_copy(update={"spacing": 4.0}), index)
        at_same_places = fine.channels["stiffness"][::2, ::2, ::2]  # every second centre is a centre at 8 mm
        both = (coarse.channels["stiffness"] > 0) & (at_same_places > 0)
        assert np.corrcoef(coarse.channels["stiffness"][both], at_same_places[both])[0, 1] > 0.95
        for tissue, tolerance in (("gm_ml", 0.02), ("wm_ml", 0.02), ("csf_ml", 0.06), ("ventricle_ml", 0.25)):
            assert coarse.volumes_ml[tissue] == pytest.approx(fine.volumes_ml[tissue], rel=tolerance)


@pytest.mark.parametrize(("spacing", "shape"), [(4.0, (46, 55, 46)), (8.0, (23, 28, 23))])
def test_grid_is_the_mni_field_of_view(spacing: float, shape: tuple[int, int, int]) -> None:
    brain = phantom_brain(BOTH.model_copy(update={"spacing": spacing}), 0)
    arrays: list[np.ndarray] = [*brain.channels.values(), brain.tissue, brain.regions]
    assert {array.shape for array in arrays} == {shape}
    assert nib.aff2axcodes(brain.affine) == ("R", "A", "S")
    assert np.allclose(brain.affine @ [0, 0, 0, 1], [-90, -126, -72, 1])
    assert np.allclose(np.diag(brain.affine), [spacing, spacing, spacing, 1])


def test_regions_lie_where_anatomy_puts_them() -> None:
    brain = lifetime(25.0)[0]
    centre = {
        name: nib.affines.apply_affine(brain.affine, np.argwhere(brain.regions == 1 + label)).mean(axis=0)
        for label, name in enumerate(REGIONS)
    }
    forward = [centre[name][1] for name in ("frontal", "temporal", "parietal", "occipital")]
    assert forward == sorted(forward, reverse=True)
    assert centre["parietal"][2] > centre["temporal"][2] > centre["cerebellum"][2]
    left_putamen = (brain.regions == 1 + REGIONS.index("putamen"))[:23]  # X runs from left to right
    assert 0.3 < left_putamen.sum() / (brain.regions == 1 + REGIONS.index("putamen")).sum() < 0.7


# background, channels, labels


def test_background_is_exactly_zero_and_brain_is_not() -> None:
    brain = phantom_brain(BOTH, 0)
    stiffness, t1w = brain.channels["stiffness"], brain.channels["t1w"]
    assert np.all(t1w[brain.tissue == 0] == 0)
    assert np.all(t1w[brain.tissue > 0] > 0)
    assert np.all(stiffness[brain.tissue == 0] == 0)
    assert np.mean(stiffness[brain.tissue > 1] > 0) > 0.85  # not where half of the voxel is fluid or bone
    assert np.all(stiffness[[0, -1]] == 0)
    assert np.all(stiffness[:, [0, -1]] == 0)
    assert stiffness.dtype == t1w.dtype == np.float32
    assert brain.tissue.dtype == np.uint8


def test_t1w_orders_the_tissues_by_brightness() -> None:
    brain = phantom_brain(BOTH, 0)
    medians = [np.median(brain.channels["t1w"][brain.tissue == label]) for label in (1, 2, 3)]
    assert medians == sorted(medians)


# stiffness against the published numbers (shared facts: MRE134, Sack 2009 and 2011, Lv 2020, Hiscox 2018)


def test_young_brains_have_the_published_stiffness() -> None:
    people, brains = population()
    young = [brains[index].channels["stiffness"] for index in np.flatnonzero(people["age"] < 32)]
    means = [stiffness[stiffness > 0].mean() for stiffness in young]
    assert np.mean(means) == pytest.approx(2.71, abs=0.05)
    assert np.std(means) == pytest.approx(0.18, abs=0.03)
    assert np.mean([stiffness[stiffness > 0].std() for stiffness in young]) == pytest.approx(0.90, abs=0.07)


def test_texture_is_smooth() -> None:
    stiffness = lifetime(25.0)[0].channels["stiffness"]
    both = (stiffness[1:] > 0) & (stiffness[:-1] > 0)
    assert np.corrcoef(stiffness[1:][both], stiffness[:-1][both])[0, 1] > 0.8  # 4 mm apart; 1.0 for MRE134


@pytest.mark.parametrize(
    ("start", "end", "published", "tolerance"),
    [(18, 30, 0.0, 0.04), (40, 60, -0.35, 0.03), (60, 90, -0.75, 0.05)],
)
def test_whole_brain_softens_at_the_published_pace(
    start: float, end: float, published: float, tolerance: float
) -> None:
    assert percent_per_year(start, end) == pytest.approx(published, abs=tolerance)


def test_regression_over_a_population_finds_the_published_slopes() -> None:
    people, brains = population()
    age, mean = people["age"].to_numpy(), np.array([whole_brain(brain) for brain in brains])
    young = mean[age < 30].mean()
    for start, end, published in ((18, 30, 0.0), (30, 60, -0.35), (60, 90, -0.75)):
        window = (age >= start) & (age <= end)
        (slope, _), covariance = np.polyfit(age[window], mean[window], 1, cov=True)
        error = 100 * np.sqrt(covariance[0, 0]) / young
        assert error < 0.25
        assert abs(100 * slope / young - published) < 3 * error


def test_regions_age_at_their_own_pace() -> None:
    whole = percent_per_year(60, 90)
    assert percent_per_year(60, 90, "frontal") / whole == pytest.approx(1.25, abs=0.12)
    deep = percent_per_year(60, 90, "thalamus", "caudate", "putamen", "pallidum") / whole
    assert deep == pytest.approx(0.6, abs=0.2)  # at 4 mm nuclei share voxels with what surrounds them


def test_hippocampus_is_spared_until_fifty() -> None:
    assert abs(percent_per_year(30, 50, "hippocampus")) < 0.5 * abs(percent_per_year(30, 50, "temporal"))
    assert percent_per_year(60, 90, "hippocampus") == pytest.approx(-0.75, abs=0.25)


def test_sites_shift_stiffness_by_a_constant_of_the_published_size() -> None:
    def offset(index: int, site: int) -> float:
        brain, reference = (make_brain(Person(5, index, 25.0, at), 8.0, ("stiffness",)) for at in (site, 1))
        return whole_brain(brain) - whole_brain(reference)

    assert offset(0, 2) == pytest.approx(offset(1, 2), abs=0.005)
    assert np.std([offset(0, site) for site in range(1, 61)]) == pytest.approx(0.05, abs=0.015)


def test_sex_acts_on_stiffness_only_when_asked() -> None:
    people = phantom_participants(SMALL)
    switched = SMALL.model_copy(update={"sex_effect": 0.05})
    for index, sex in enumerate(people["sex"]):
        ratio = whole_brain(phantom_brain(switched, index)) / whole_brain(phantom_brain(SMALL, index))
        assert ratio == pytest.approx(1.025 if sex == "F" else 0.975, abs=1e-3)
    assert set(people["sex"]) == {"F", "M"}


# tissue volumes against the published medians


def test_tissue_volumes_follow_the_published_medians() -> None:
    people, brains = population()
    age, volumes = people["age"].to_numpy(), pd.DataFrame([brain.volumes_ml for brain in brains])

    head = volumes[["csf_ml", "gm_ml", "wm_ml"]].sum(axis=1)
    assert head.mean() == pytest.approx(1480, rel=0.02)
    assert np.corrcoef(age, head)[0, 1] == pytest.approx(0, abs=0.1)  # skulls do not shrink

    def fitted(values: pd.Series) -> list[float]:
        in_a_median_head = values / head * 1480  # sizes of heads differ by 7 %, which would blur the medians
        return list(np.polyval(np.polyfit(age, in_a_median_head, 1), [40, 90]))

    assert fitted(volumes["gm_ml"] + volumes["wm_ml"]) == pytest.approx([1286, 1154], abs=12)
    assert fitted(volumes["gm_ml"]) == pytest.approx([715, 586], abs=12)
    young, old = (volumes[window].median() for window in (abs(age - 40) < 8, age > 82))
    assert old["ventricle_ml"] > 2 * young["ventricle_ml"]
    assert old["csf_ml"] > young["csf_ml"] + 80


def test_volumes_are_those_of_the_image() -> None:
    for brain in lifetime(25.0)[:3]:
        counted = [(brain.tissue == label).sum() * 0.064 for label in (1, 2, 3)]  # mL of a voxel of 4 mm
        known = [brain.volumes_ml[name] for name in ("csf_ml", "gm_ml", "wm_ml")]
        assert sum(known) == pytest.approx(sum(counted), rel=0.01)
        assert known[1:] == pytest.approx(counted[1:], rel=0.15)  # the larger share takes a whole voxel
        assert brain.volumes_ml["ventricle_ml"] < brain.volumes_ml["csf_ml"]


# who is in it


def test_default_ages_form_two_clusters() -> None:
    age = phantom_participants(PhantomSettings(subjects=1000))["age"]
    young, between, old = ((age < 42).mean(), ((age > 45) & (age < 57)).mean(), (age > 60).mean())
    assert young > 0.35
    assert old > 0.35
    assert between < 0.1
    assert age.between(18, 90).all()


def test_uniform_ages_are_uniform() -> None:
    age = phantom_participants(PhantomSettings(subjects=1000, ages="uniform"))["age"]
    counts, _ = np.histogram(age, bins=8, range=(18, 90))
    assert counts.min() > 90  # 125 expected, SD 10
    assert counts.max() < 160


@pytest.mark.parametrize("ages", ["clusters", "uniform"])
def test_sites_differ_in_age(ages: str) -> None:
    people = phantom_participants(PhantomSettings.model_validate({"subjects": 600, "ages": ages}))
    means = people.groupby("site")["age"].mean()
    assert list(means.index) == ["site-1", "site-2", "site-3"]
    assert means["site-1"] + 5 < means["site-2"] < means["site-3"] - 5


def test_random_fields_have_unit_variance_everywhere() -> None:
    draws = np.random.default_rng(0)
    fields = np.stack([smooth_field(draws, 8.0, 36.0) for _ in range(300)])
    assert fields.std(axis=0).mean() == pytest.approx(1, abs=0.02)
    assert fields.std(axis=0).min() > 0.8


# settings and files


@pytest.mark.parametrize(
    ("field", "value"),
    [("spacing", 3.0), ("subjects", 0), ("channels", ()), ("channels", ("t1w", "t1w")), ("age", 3)],
)
def test_impossible_settings_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValidationError, match=field):
        PhantomSettings.model_validate({field: value})


def test_a_subject_beyond_the_cohort_is_refused() -> None:
    with pytest.raises(UserError, match="no phantom subject 6; they run from 0 to 5"):
        phantom_brain(SMALL, 6)


def test_cohort_on_disk_is_the_phantom(tmp_path: Path) -> None:
    cohort = write_phantom_cohort(tmp_path / "phantom", BOTH)
    assert cohort.description.synthetic
    assert cohort.description.channels == ("stiffness", "t1w")
    assert list(cohort.manifest["subject"]) == [f"sub-{number:04d}" for number in range(1, 7)]
    brain = phantom_brain(BOTH, 4)
    for name, millilitres in brain.volumes_ml.items():
        assert cohort.manifest[name][4] == pytest.approx(millilitres)
    expected = np.stack([brain.channels["stiffness"], brain.channels["t1w"]])
    assert np.allclose(cohort.read([4])[0], expected, rtol=1e-3)  # float16


def test_the_same_cohort_is_reused_and_another_is_not_overwritten(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    first = write_phantom_cohort(tmp_path, SMALL, lambda done, total: calls.append((done, total)))
    again = write_phantom_cohort(tmp_path, SMALL, lambda done, total: calls.append((done, total)))
    assert calls == [(number, 6) for number in range(1, 7)]
    assert again.description.hash == first.description.hash
    with pytest.raises(UserError, match="cohort of other settings"):
        write_phantom_cohort(tmp_path, SMALL.model_copy(update={"seed": 1}))


def test_nifti_tree_holds_the_phantom_in_the_same_bytes_each_time(tmp_path: Path) -> None:
    settings = BOTH.model_copy(update={"subjects": 2})
    one, two = (write_phantom_bids(tmp_path / name, settings) for name in ("one", "two"))
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert {str(path) for path in files} == {
        "dataset_description.json", "participants.tsv",
        "sub-0001/mre/sub-0001_stiffness.nii.gz", "sub-0001/anat/sub-0001_T1w.nii.gz",
        "sub-0002/mre/sub-0002_stiffness.nii.gz", "sub-0002/anat/sub-0002_T1w.nii.gz",
    }  # fmt: skip
    assert all((one / path).read_bytes() == (two / path).read_bytes() for path in files)
    image = nib.Nifti1Image.from_filename(one / "sub-0002/mre/sub-0002_stiffness.nii.gz")
    brain = phantom_brain(settings, 1)
    assert np.array_equal(np.asanyarray(image.dataobj), brain.channels["stiffness"])
    assert np.array_equal(image.affine, brain.affine)
    table = pd.read_csv(one / "participants.tsv", sep="\t")
    assert list(table.columns) == ["participant_id", "age", "sex", "site"]
    assert list(table["participant_id"]) == ["sub-0001", "sub-0002"]


def test_a_map_of_tissues_comes_with_the_same_brains_and_their_volumes(tmp_path):
    """CSF 1, grey matter 2, white matter 3, against the true volumes; the images are those of kind ageing."""
    settings = PhantomSettings(kind="tissue", subjects=3, spacing=4.0)
    cohort = write_phantom_cohort(tmp_path / "tissue", settings)
    plain = write_phantom_cohort(
        tmp_path / "plain", PhantomSettings(subjects=3, spacing=4.0, channels=("t1w",))
    )
    assert cohort.description.channels == ("t1w",)
    np.testing.assert_array_equal(cohort.read_stored(np.arange(3)), plain.read_stored(np.arange(3)))
    maps = cohort.read_map("dseg", np.arange(3))
    for row in range(3):
        for number, name in ((2, "gm_ml"), (3, "wm_ml")):
            found = np.count_nonzero(maps[row] == number) * 4**3 / 1000
            assert found == pytest.approx(cohort.manifest[name].iloc[row], rel=0.15)
    assert set(np.unique(maps)) == {0, 1, 2, 3}
    tree = write_phantom_bids(tmp_path / "bids", settings)
    written = nib.load(tree / "sub-0001" / "anat" / "sub-0001_dseg.nii.gz")
    np.testing.assert_array_equal(np.asarray(written.dataobj), maps[0])
