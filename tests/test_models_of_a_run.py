"""Which models predict whom: those that were not trained on a scan, and the mean over several."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from small_cohort import write_small_cohort

from core.config import merge, resolve
from core.errors import UserError
from core.inference import Predictor, mean_answer
from core.starts import data_set_of, scans_of
from core.tasks import find_task
from distributed.commands.models import Model, Models, batches_of
from search_spaces import published


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_small_cohort(tmp_path_factory.mktemp("models") / "cohort", 9)


def predictor(seed):
    settings = resolve(
        merge(
            published("tissue"),
            {"data.classes": ["a=1", "b=5"], "model.width": 0.0625, "data.normalise": "none"},
        )
    )
    torch.manual_seed(seed)
    facts = {"classes": {"a": 1, "b": 5}}
    return Predictor(
        settings, find_task("segmentation").build(settings, 1, facts), None, ("T1w",), None, facts
    )


def model(cohort, rows, seed=0):
    known = (
        None if rows is None else scans_of(cohort.manifest, np.array(rows), data_set_of(cohort.description))
    )
    return Model(Path(f"model-{seed}"), predictor(seed), known)


def with_folds(best, *folds, expected=0):
    models = Models(best, tuple(each.folder for each in folds), expected)
    # Instead of reading them.
    models.__dict__["folds"] = folds
    return models


def chosen(models, cohort, kind="best"):
    """For every row the names of the models that predict it."""
    group, groups = models.unseen(cohort, kind)
    return [tuple(each.folder.name for each in groups[number]) if number >= 0 else None for number in group]


def test_nobody_is_predicted_by_a_model_that_knows_them(cohort):
    """Hold-out 0 to 2, fold 0 3 to 5, fold 1 6 to 8."""
    best = model(cohort, range(3, 9), 9)
    folds = (model(cohort, [6, 7, 8], 0), model(cohort, [3, 4, 5], 1))
    models = with_folds(best, *folds)
    held_out, of_folds = [("model-9",)] * 3, [("model-0",)] * 3 + [("model-1",)] * 3
    assert chosen(models, cohort) == held_out + of_folds
    assert chosen(models, cohort, "folds") == [("model-0", "model-1")] * 3 + of_folds
    assert chosen(Models(best), cohort) == held_out + [None] * 6
    unknown = Models(model(cohort, None, 9))
    assert chosen(unknown, cohort) == [None] * 9
    with pytest.raises(UserError, match="--confirm-seeds 1"):
        Models(best).unseen(cohort, "folds")


def test_an_ensemble_of_some_folds_is_none(cohort):
    models = with_folds(model(cohort, range(3, 9), 9), model(cohort, [6, 7, 8]), expected=2)
    with pytest.raises(UserError, match="1 of 2 models of its folds"):
        models.of_kind("folds")


def test_several_seeds_of_a_fold_are_averaged(cohort):
    folds = tuple(model(cohort, [6, 7, 8] if number < 2 else [3, 4, 5], number) for number in range(4))
    models = with_folds(model(cohort, range(3, 9), 9), *folds)
    assert chosen(models, cohort)[3:] == [("model-0", "model-1")] * 3 + [("model-2", "model-3")] * 3


def test_the_mean_is_that_of_probabilities_and_of_numbers(cohort):
    models = [predictor(seed) for seed in range(3)]
    volumes = cohort.read([0, 1])
    alone = [each.answer(volumes) for each in models]
    together = mean_answer(models, volumes)
    expected = np.mean([each.probabilities["dseg"].values for each in alone], axis=0)
    np.testing.assert_allclose(together.probabilities["dseg"].values, expected, rtol=1e-5)
    assert list(together.probabilities["dseg"].classes.numbers.values()) == [1, 5]
    expected = np.mean([each.table["share_b"] for each in alone], axis=0)
    np.testing.assert_allclose(together.table["share_b"], expected, rtol=1e-5)
    pd.testing.assert_frame_equal(mean_answer(models[:1], volumes).table, alone[0].table)


def test_classes_follow_their_mean_probabilities_and_words_have_no_mean():
    task = find_task("classification")
    facts = {"classes": ["ill", "well"]}
    tables = [
        pd.DataFrame({"predicted": ["ill", "well"], "p_ill": [0.9, 0.4], "p_well": [0.1, 0.6]}),
        pd.DataFrame({"predicted": ["well", "ill"], "p_ill": [0.4, 0.9], "p_well": [0.6, 0.1]}),
        pd.DataFrame({"predicted": ["well", "well"], "p_ill": [0.4, 0.0], "p_well": [0.6, 1.0]}),
    ]
    mean = task.mean_of(tables, facts)
    assert mean["predicted"].tolist() == ["ill", "well"]
    np.testing.assert_allclose(mean["p_ill"], [1.7 / 3, 1.3 / 3])
    with pytest.raises(UserError, match="predicted, which has no mean"):
        find_task("brain_age").mean_of(tables, {})


def test_batches_hold_every_row_of_a_group_once():
    group = np.array([0, 1, -1, 0, 0, 1, 0])
    parts = batches_of(group, 3)
    assert [(number, rows.tolist()) for number, rows in parts] == [(0, [0, 3, 4]), (0, [6]), (1, [1, 5])]
