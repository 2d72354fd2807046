"""The figures of a segmentation, from the predictions of held-out people."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from core.report.answer.overlap import agreement_in_words, cases_of, classes_of, overlap_in_words
from core.report.answer.record import NothingToShow, RunRecord
from core.report.figures.overlap import overlap_by_class, volume_agreement
from core.run_names import PUBLISHED, WINNER


def record_of(predictions):
    return RunRecord(folder=Path("run"), predictions=predictions)


@pytest.fixture
def predictions():
    """Nine people, two refits; nobody knows a lesion of the first one."""
    draws, rows = np.random.default_rng(0), []
    for method in (WINNER, PUBLISHED):
        for seed in (0, 1):
            for person in range(9):
                volume = 500 + 20 * person
                rows.append(
                    {
                        "method": method, "seed": seed, "subject": f"sub-{person}", "error": 0.2,
                        "dice_gm": 0.8 + 0.1 * draws.random(), "dice_lesion": np.nan if person == 0 else draws.random(),
                        "ml_gm": volume + 10 + seed, "reference_ml_gm": volume, "ml_lesion": 3.0 + person,
                        "reference_ml_lesion": 3.0,
                    }
                )  # fmt: skip
    return pd.DataFrame(rows)


def test_every_case_is_a_mark_and_an_undefined_one_is_left_out(predictions):
    cases = cases_of(record_of(predictions))
    assert classes_of(cases) == ["gm", "lesion"]
    assert len(cases) == 9
    figure = overlap_by_class(record_of(predictions))
    marks = [
        len(line.get_xdata()) for line in figure.axes[0].lines if line.get_marker() not in ("None", None, "")
    ]
    assert sorted(marks) == [8, 9]
    words = overlap_in_words(record_of(predictions))
    assert f"gm median {cases['dice_gm'].median():.2f} of 9" in words
    assert "of 8" in words


def test_volumes_agree_as_bland_and_altman_say(predictions):
    figure = volume_agreement(record_of(predictions))
    # Of grey matter the difference is 10 and 11, so 10.5 of everybody.
    assert "gm +10.5 mL" in agreement_in_words(record_of(predictions))
    means = [line.get_ydata()[0] for line in figure.axes[0].lines if len(set(line.get_ydata())) == 1]
    assert any(np.isclose(mean, 10.5) for mean in means)
    of_lesion = np.arange(9)
    limits = of_lesion.mean() + np.array([-1, 1]) * 1.96 * of_lesion.std(ddof=1)
    assert all(any(np.isclose(mean, limit) for mean in means) for limit in limits)


def test_without_predictions_a_reason_is_given(predictions):
    empty = record_of(predictions.iloc[:0])
    for draw in (overlap_by_class, volume_agreement):
        with pytest.raises(NothingToShow, match="no predictions of the winner"):
            draw(empty)
    assert "no predictions" in overlap_in_words(empty)
