from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from core.errors import UserError
from core.evaluation.logistic import INVERSE_PENALTIES, fit_logistic_probe


def classes_and_embeddings(subjects: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, 3, subjects)
    return classes, rng.normal(size=(subjects, 5)) + 1.5 * np.eye(5)[classes]


@pytest.mark.parametrize("reference", [False, True])
def test_logistic_probe_is_a_logistic_regression_with_a_penalty_of_the_grid(reference: bool) -> None:
    classes, embeddings = classes_and_embeddings(90)
    embeddings = embeddings * 100 + 7  # where standardising matters
    probe = fit_logistic_probe(embeddings, classes, reference=reference)
    penalty = probe.classifier.best_params_["C"]
    assert penalty in INVERSE_PENALTIES
    if not reference:
        standard = (embeddings - embeddings.mean(axis=0)) / embeddings.std(axis=0)
        expected = LogisticRegression(C=penalty, max_iter=5000, tol=1e-8).fit(standard, classes)
        np.testing.assert_allclose(
            probe.probabilities(embeddings), expected.predict_proba(standard), atol=1e-3
        )
    assert probe.classes.tolist() == [0, 1, 2]
    assert (probe.predict(embeddings) == probe.probabilities(embeddings).argmax(axis=1)).all()


def test_logistic_probe_tells_classes_of_unseen_subjects() -> None:
    classes, embeddings = classes_and_embeddings(200)
    probe = fit_logistic_probe(embeddings[:120], classes[:120])
    assert (probe.predict(embeddings[120:]) == classes[120:]).mean() > 0.6


def test_one_class_cannot_be_told_apart() -> None:
    with pytest.raises(UserError, match=r"two classes or more, got only \[2\]"):
        fit_logistic_probe(np.zeros((3, 2)), np.array([2, 2, 2]))
