from __future__ import annotations

import numpy as np
import pytest

from core.errors import UserError
from core.volumes.images.intensity import (
    FAINTEST,
    WINDOWS,
    Intensity,
    foreground,
    parse_intensity,
    scale,
)


def brain(seed: int = 0, offset: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    voxels = np.random.default_rng(seed).normal(100, 30, (12, 11, 10)).astype(np.float32) + np.float32(offset)
    inside = np.zeros(voxels.shape, dtype=bool)
    inside[2:10, 2:9, 1:8] = True
    return voxels, inside


@pytest.mark.parametrize(
    ("text", "meaning", "written"),
    [
        ("raw", Intensity("raw"), "raw"),
        (" zscore ", Intensity("zscore"), "zscore"),
        ("percentile", Intensity("percentile", 0.01, 99.9), "percentile:0.01,99.9"),
        ("percentile:0.5,99.5", Intensity("percentile", 0.5, 99.5), "percentile:0.5,99.5"),
        ("window:ct", Intensity("window", -1000, 1000), "window:-1000,1000"),
        ("window:ct_brain", Intensity("window", 0, 80), "window:0,80"),
        ("window:stiffness", Intensity("window", 0, 10000), "window:0,10000"),
        ("window:mri", Intensity("percentile", 0.01, 99.9), "percentile:0.01,99.9"),
        ("window: -5 , 2.5e1", Intensity("window", -5, 25), "window:-5,25"),
    ],
)
def test_every_setting_is_read_and_written_back(text, meaning, written):
    parsed = parse_intensity(text)
    # NaN is not equal to itself
    assert (parsed.kind, str(parsed)) == (meaning.kind, written)
    np.testing.assert_equal((parsed.low, parsed.high), (meaning.low, meaning.high))
    assert str(parse_intensity(written)) == written


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("log", "unknown intensity 'log'"),
        ("zscor", "did you mean 'zscore'"),
        ("", "unknown intensity ''"),
        ("zscore:1,2", "unknown intensity 'zscore:1,2'"),
        ("percentile:5", "two numbers are needed"),
        ("percentile:-1,99", "percentiles must be 0 to 100"),
        ("percentile:90,10", "the lower one first"),
        ("percentile:1,101", "percentiles must be 0 to 100"),
        ("window:bone", "or one of mri, ct, ct_brain, stiffness"),
        ("window:", "two numbers are needed"),
        ("window:80,0", "the lower end of a window comes first"),
        ("window:3,3", "the lower end of a window comes first"),
        ("window:nan,3", "must be finite"),
        ("window:0,inf", "must be finite"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(text, said):
    with pytest.raises(UserError, match=said) as refused:
        parse_intensity(text)
    assert "\n" not in str(refused.value)


def test_zscore_is_over_the_mask_alone():
    voxels, inside = brain()
    result = scale(voxels, inside, Intensity("zscore"))
    values = [float(value) for value in voxels[inside]]
    mean = sum(values) / len(values)
    sd = (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5
    np.testing.assert_allclose(result[inside], [(value - mean) / sd for value in values], atol=1e-4)
    assert (result[~inside] == 0).all()


def test_percentiles_become_0_and_1_and_the_rest_is_cut_off():
    voxels, inside = brain()
    result = scale(voxels, inside, parse_intensity("percentile:10,90"))
    ranked = np.sort(voxels[inside])
    place = (ranked.size - 1) * 0.1
    low = ranked[int(place)] + (place % 1) * (ranked[int(place) + 1] - ranked[int(place)])
    assert np.mean(voxels[inside] <= low) == pytest.approx(0.1, abs=0.005)
    assert (result[inside & (voxels < low)] == np.float32(FAINTEST)).all()
    assert np.mean(result[inside] == 1) == pytest.approx(0.1, abs=0.005)
    between = inside & (result > FAINTEST) & (result < 1)
    # a straight line: equal differences stay in proportion
    slope, start = np.polyfit(voxels[between].astype(float), result[between].astype(float), 1)
    np.testing.assert_allclose(result[between], slope * voxels[between] + start, atol=1e-5)
    assert slope * low + start == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_map_their_ends_to_0_and_1(name):
    low, high = WINDOWS[name]
    width = high - low
    voxels = np.array([low - width, low, low + width / 4, high, high + width], dtype=np.float32)
    result = scale(voxels[:, None, None], np.ones((5, 1, 1), bool), parse_intensity(f"window:{name}"))
    np.testing.assert_allclose(result.ravel(), [FAINTEST, FAINTEST, 0.25, 1, 1])


@pytest.mark.parametrize("setting", ["raw", "zscore", "percentile:0,100", "window:0,200", "window:-100,100"])
def test_no_voxel_of_the_brain_is_0_even_as_float16_and_all_others_are(setting):
    voxels, inside = brain(offset=-100)
    voxels[3:6, 3:6, 3:6] = 0
    voxels[4, 4, 4] = voxels[inside].mean()  # whose z-score is about 0
    for _ in range(3):  # the mean moves a little with each of these
        voxels[4, 4, 4] = voxels[inside].mean()
    result = scale(voxels, inside, parse_intensity(setting)).astype(np.float16)
    np.testing.assert_array_equal(result != 0, inside)


def test_a_raw_zero_stays_fainter_than_anything_else():
    voxels, inside = brain()
    voxels = voxels * np.float32(1e-7)  # in some unit in which the whole brain is tiny
    voxels[4, 4, 4] = 0
    result = scale(voxels, inside, Intensity("raw"))
    others = inside.copy()
    others[4, 4, 4] = False
    np.testing.assert_array_equal(result[others], voxels[others])
    assert 0 < result[4, 4, 4] <= np.abs(voxels[others]).min()


def test_values_that_do_not_differ_are_refused_where_the_scale_needs_a_difference():
    voxels, inside = brain()
    flat = np.full_like(voxels, 5)
    with pytest.raises(UserError, match="all alike"):
        scale(flat, inside, Intensity("zscore"))
    with pytest.raises(UserError, match="both 5"):
        scale(flat, inside, parse_intensity("percentile"))
    with pytest.raises(UserError, match="no voxel is inside"):
        scale(voxels, np.zeros_like(inside), Intensity("raw"))
    assert (scale(flat, inside, parse_intensity("window:0,10"))[inside] == 0.5).all()


def test_what_is_background_depends_on_the_unit():
    voxels, inside = brain()
    stripped = np.where(inside, np.abs(voxels), 0)
    for setting in ("raw", "zscore", "percentile", "window:stiffness"):
        np.testing.assert_array_equal(foreground(stripped, parse_intensity(setting)), stripped != 0)
    hounsfield = np.where(inside, np.float32(0), np.float32(-1000))  # water in air
    np.testing.assert_array_equal(foreground(hounsfield, parse_intensity("window:ct")), inside)
    # a CT without its skull: 0 around it, and nothing as dark as air
    np.testing.assert_array_equal(foreground(stripped, parse_intensity("window:ct")), stripped != 0)
