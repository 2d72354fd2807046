from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from core.evaluation.classification import calibration_error, classification_metrics, macro_auc


def probabilities(subjects: int, classes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.ones(classes), subjects)


def test_metrics_agree_with_scikit_learn_where_every_class_is_there() -> None:
    scores = probabilities(60, 3)
    classes = np.random.default_rng(1).integers(0, 3, 60)
    metrics = classification_metrics(scores, classes)
    expected = roc_auc_score(classes, scores, multi_class="ovr", average="macro")
    assert metrics["macro_auc"] == pytest.approx(expected)
    recalls = [(scores.argmax(axis=1)[classes == k] == k).mean() for k in range(3)]
    assert metrics["balanced_accuracy"] == pytest.approx(np.mean(recalls))


def test_two_classes_give_the_usual_area() -> None:
    scores = probabilities(40, 2)
    classes = np.random.default_rng(1).integers(0, 2, 40)
    assert macro_auc(scores, classes) == pytest.approx(roc_auc_score(classes, scores[:, 1]))


def test_area_is_the_share_of_pairs_in_order() -> None:
    scores = np.array([[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.2, 0.8]])
    classes = np.array([0, 0, 1, 1])
    # class 1 above class 0: 0.3 > 0.1, not 0.3 > 0.4, 0.8 > both
    assert macro_auc(scores, classes) == pytest.approx(3 / 4)


def test_absent_classes_are_left_out() -> None:
    scores = probabilities(30, 3)
    classes = np.random.default_rng(1).integers(0, 2, 30)
    expected = np.mean([roc_auc_score(classes == k, scores[:, k]) for k in (0, 1)])
    assert macro_auc(scores, classes) == pytest.approx(expected)
    assert np.isnan(macro_auc(scores, np.zeros(30, dtype=int)))


def test_calibration_error_by_hand() -> None:
    scores = np.array([[0.92, 0.08], [0.96, 0.04], [0.25, 0.75], [0.42, 0.58]])
    classes = np.array([0, 1, 1, 0])
    # bin 0.9 to 1: one of two right, confidence 0.94; 0.75 right; 0.58 wrong
    assert calibration_error(scores, classes) == pytest.approx((2 * 0.44 + 0.25 + 0.58) / 4)


def test_certainty_that_is_always_right_is_calibrated() -> None:
    assert calibration_error(np.eye(3), np.arange(3)) == 0
    assert calibration_error(np.eye(3), np.array([1, 2, 0])) == 1


def test_logits_are_refused() -> None:
    with pytest.raises(ValueError, match="apply softmax"):
        classification_metrics(np.random.default_rng(0).normal(size=(4, 3)), np.zeros(4, dtype=int))
    with pytest.raises(ValueError, match=r"got \(4, 3\), \(5,\)"):
        classification_metrics(probabilities(4, 3), np.zeros(5, dtype=int))
    with pytest.raises(ValueError, match=r"from 0 to 2, got \[1 3\]"):
        classification_metrics(probabilities(4, 3), np.array([1, 3, 1, 1]))
