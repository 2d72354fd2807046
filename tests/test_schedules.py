"""Schedules against the published tables (spec.md A.4) and the laws of their shapes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from core.errors import UserError
from core.schedules import Schedule, as_schedule, with_epochs

# First epoch of each neighbour count of the released code, 50 epochs, batch 32, 14 at the end (A.4).
PUBLISHED_STAIRCASE = {
    1: {1: 31, 3: 30, 6: 29, 9: 28, 44: 15, 47: 14, 50: 14},
    5: {1: 32, 4: 32, 5: 30, 9: 30, 10: 28, 15: 26, 20: 24, 25: 22, 30: 20, 35: 18, 40: 16, 45: 14, 50: 14},
    10: {1: 32, 9: 32, 10: 27, 19: 27, 20: 23, 30: 18, 40: 14, 50: 14},
    20: {1: 32, 18: 32, 19: 32, 20: 14, 50: 14},
    25: {1: 32, 24: 32, 25: 14, 50: 14},
    50: {1: 32, 50: 32},  # the released code divides by zero here
    60: {1: 32, 50: 32},
}

progress = st.floats(0, 1)
positive = st.floats(1e-6, 1e6)


@pytest.mark.parametrize("step", PUBLISHED_STAIRCASE)
def test_staircase_reproduces_the_published_neighbour_counts(step):
    counts = as_schedule({"shape": "staircase", "start": 32, "end": 14, "step": step, "epochs": 50})
    for epoch, expected in PUBLISHED_STAIRCASE[step].items():
        assert counts(epoch / 50) == expected, f"epoch {epoch}"


@given(st.integers(1, 400), st.integers(1, 60), st.integers(1, 300), st.integers(1, 300))
def test_staircase_follows_the_published_integer_arithmetic(epochs, step, start, end):
    start, end = max(start, end), min(start, end)
    counts = as_schedule({"shape": "staircase", "start": start, "end": end, "step": step, "epochs": epochs})
    stages = epochs // step
    for epoch in range(1, epochs + 1):
        expected = start
        if stages >= 2:
            expected = max(int(start - (start - end) / float(stages - 1) * (epoch // step)), end)
        assert counts(epoch / epochs) == expected


def test_staircase_of_fractions_is_not_truncated_and_may_rise():
    falling = as_schedule({"shape": "staircase", "start": 1.0, "end": 0.5, "step": 1, "epochs": 3})
    assert [falling(epoch / 3) for epoch in (0, 1, 2, 3)] == [1.0, 0.75, 0.5, 0.5]
    rising = as_schedule({"shape": "staircase", "start": 2, "end": 6, "step": 2, "epochs": 6})
    assert [rising(epoch / 6) for epoch in range(1, 7)] == [2, 4, 4, 6, 6, 6]


def test_step_drops_at_epochs_11_and_21():
    rate = as_schedule({"shape": "step", "start": 1e-4, "rate": 0.9, "step": 10, "epochs": 50})
    for epoch in range(1, 51):
        milestones_before = sum(milestone < epoch for milestone in range(10, 60, 10))
        assert rate(epoch / 50) == pytest.approx(1e-4 * 0.9**milestones_before)
    assert rate(0.0) == 1e-4


@given(st.integers(1, 1000), st.integers(1, 1000))
def test_rounding_of_e_over_E_never_starts_the_next_epoch(epochs, step):
    value = as_schedule({"shape": "step", "start": 1.0, "rate": 0.5, "step": step, "epochs": epochs})
    for epoch in {1, epochs // 3 + 1, epochs}:
        assert value(epoch / epochs) == 0.5 ** ((epoch - 1) // step)


@given(progress, positive, positive)
def test_shapes_stay_between_their_ends_and_reach_them(at, start, end):
    for shape in ("linear", "cosine", "exponential"):
        value = as_schedule({"shape": shape, "start": start, "end": end})
        assert value(0) == pytest.approx(start)
        assert value(1) == pytest.approx(end)
        assert min(start, end) * (1 - 1e-9) - 1e-9 <= value(at) <= max(start, end) * (1 + 1e-9) + 1e-9


def test_halfway_by_hand():
    for shape, halfway in {"linear": 5.0, "cosine": 5.0, "exponential": 4.0}.items():
        assert as_schedule({"shape": shape, "start": 2.0, "end": 8.0})(0.5) == pytest.approx(halfway)
    assert as_schedule({"shape": "cosine", "start": 1.0, "end": 0.0})(1 / 3) == pytest.approx(0.75)


@given(progress, st.floats(-1e6, 1e6))
def test_a_number_is_a_constant(at, value):
    assert as_schedule(value)(at) == value


def test_schedule_is_a_pydantic_field_that_survives_json():
    class Settings(BaseModel):
        temperature: Schedule

    for given_value in (0.1, {"shape": "linear", "start": 0.2, "end": 0.05}):
        settings = Settings.model_validate({"temperature": given_value})
        assert Settings.model_validate_json(settings.model_dump_json()) == settings
        assert settings.temperature == as_schedule(given_value)


def test_epochs_are_filled_in_where_missing_only():
    missing = as_schedule({"shape": "step", "start": 1.0, "rate": 0.5, "step": 1})
    with pytest.raises(UserError, match="epochs is None"):
        missing(0.5)
    assert with_epochs(missing, 4)(1.0) == 0.125
    told = as_schedule({"shape": "staircase", "start": 8, "end": 2, "step": 1, "epochs": 7})
    assert with_epochs(told, 99) == told
    assert with_epochs(as_schedule(3.0), 99) == as_schedule(3.0)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"shape": "liner", "start": 1, "end": 2}, "shape must be one of constant, linear"),
        ({"shape": "linear", "start": 1}, "temperature: end: Field required"),
        ({"shape": "linear", "start": 1, "end": 2, "step": 3}, "temperature: step: Extra inputs"),
        ({"shape": "exponential", "start": 0, "end": 1}, "temperature: start: .* greater than 0"),
        ({"shape": "constant", "value": math.nan}, "temperature: value: .* finite"),
        (
            {"shape": "piecewise", "values": []},
            r"temperature: values: must hold at least one number, got \[\]",
        ),
        (
            {"shape": "piecewise", "values": 0.1},
            r"temperature: values: must be a list of numbers, .*, got 0\.1$",
        ),
        (
            {"shape": "piecewise", "values": [1, "x"], "until": [0.5]},
            r"values\.1: .* valid number, .* got 'x'$",
        ),
        (
            {"shape": "piecewise", "values": [1, 2]},
            "until: must hold one number fewer than values, which are 2",
        ),
        (
            {"shape": "piecewise", "values": [1, 2], "until": [1.0]},
            r"until: must rise, .* below 1 .*, got \[1\.0\]$",
        ),
        (
            {"shape": "piecewise", "values": [1, 2, 3], "until": [0.5, 0.4]},
            r"until: must rise, .*got \[0\.5, 0\.4\]$",
        ),
        ("0.1", "must be a number, or a mapping"),
        (True, "must be a number, or a mapping"),
    ],
)
def test_errors_name_the_field_and_the_value(value, message):
    with pytest.raises(UserError, match=message) as caught:
        as_schedule(value, "temperature")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("at", [-0.1, 1.1, math.nan])
def test_progress_outside_0_to_1_is_an_error(at):
    with pytest.raises(UserError, match="progress must lie in"):
        as_schedule({"shape": "linear", "start": 0.0, "end": 1.0})(at)
