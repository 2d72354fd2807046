"""A probe that reads classes from embeddings, as plain numbers. N and M scans, D features, K classes, P penalties."""

from __future__ import annotations

import base64
import json
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from core.evaluation import Floats, Names
from core.evaluation.by_subject import subject_weights
from core.evaluation.classification import Indices
from core.evaluation.probes import standardisation

PENALTIES: tuple[float, ...] = tuple(float(penalty) for penalty in np.logspace(-2, 4, 13))
"""Of squared coefficients on standardised features, 1 / C of scikit-learn; the largest leaves the shares of classes."""


@dataclass(frozen=True)
class ClassProbe:
    """Scores = embedding · coefficients + intercept; their softmax are the probabilities of the classes."""

    coefficients: tuple[tuple[float, ...], ...]
    """(D, K), on embeddings as the encoder gives them."""
    intercept: tuple[float, ...]
    """(K,)"""
    penalty: float

    def probabilities(self, embeddings_nd: Floats) -> npt.NDArray[np.float64]:
        """(N, D) -> (N, K)."""
        scores_nk = np.asarray(embeddings_nd, np.float64) @ np.array(self.coefficients) + np.array(
            self.intercept
        )
        return softmax(scores_nk)

    def to_json(self) -> str:
        """Plain numbers, which `read_probe` reads back exactly."""
        return json.dumps(asdict(self))


@dataclass(frozen=True, eq=False)
class NeighbourProbe:
    """The share of every class among the nearest training scans, by the cosine of embeddings."""

    embeddings: npt.NDArray[np.float32]
    """(N, D)"""
    classes: Indices
    """(N,)"""
    count: int
    """K."""
    neighbours: int

    def probabilities(self, embeddings_nd: Floats) -> npt.NDArray[np.float64]:
        """(M, D) -> (M, K)."""
        nearest = KNeighborsClassifier(min(self.neighbours, len(self.classes)), metric="cosine")
        found_mk = nearest.fit(self.embeddings, self.classes).predict_proba(embeddings_nd)
        whole_mk = np.zeros((len(embeddings_nd), self.count))
        whole_mk[:, nearest.classes_] = found_mk
        return whole_mk

    def to_json(self) -> str:
        """The embeddings as text, which `read_probe` reads back exactly."""
        return json.dumps(
            {
                "embeddings": base64.b64encode(self.embeddings.tobytes()).decode(),
                "classes": self.classes.tolist(),
                "count": self.count,
                "neighbours": self.neighbours,
            }
        )


def read_probe(text: str) -> ClassProbe | NeighbourProbe:
    """The probe that `to_json` wrote; KeyError, TypeError or ValueError if it wrote none."""
    fields: dict[str, Any] = json.loads(text)
    if "embeddings" not in fields:
        rows = tuple(map(tuple, fields["coefficients"]))
        return ClassProbe(rows, tuple(fields["intercept"]), fields["penalty"])
    classes = np.array(fields["classes"], dtype=np.int64)
    embeddings = np.frombuffer(base64.b64decode(fields["embeddings"]), np.float32).reshape(len(classes), -1)
    return NeighbourProbe(embeddings, classes, fields["count"], fields["neighbours"])


def fit_class_probe(
    embeddings_nd: Floats, classes_n: Indices, subjects_n: Names, penalty: float
) -> ClassProbe:
    """Multinomial logistic regression on standardised features; a person counts once.

    Args:
        embeddings_nd: of the training scans (N, D).
        classes_n: their classes (N,), 0 to K - 1; every class has one.
        subjects_n: whose the scans are (N,).
        penalty: of squared coefficients.
    """
    mean_d, scale_d = standardisation(np.asarray(embeddings_nd, np.float64))
    standard_nd = (np.asarray(embeddings_nd, np.float64) - mean_d) / scale_d
    regression = LogisticRegression(C=1 / penalty, max_iter=2000, tol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=ConvergenceWarning)
        regression.fit(standard_nd, classes_n, sample_weight=subject_weights(subjects_n))
    return class_probe_of(regression, mean_d, scale_d)


def class_probe_of(regression: LogisticRegression, mean_d: Floats, scale_d: Floats) -> ClassProbe:
    """The probe of a fitted regression on (embedding - mean) / scale."""
    slopes_kd, intercept_k = regression.coef_, regression.intercept_
    if len(slopes_kd) == 1:
        # Of two classes scikit-learn has the difference of their scores.
        slopes_kd = np.concatenate([-slopes_kd, slopes_kd]) / 2
        intercept_k = np.concatenate([-intercept_k, intercept_k]) / 2
    coefficients_dk = (slopes_kd / scale_d).T
    moved_k = intercept_k - mean_d @ coefficients_dk
    rows = tuple(tuple(float(value) for value in row) for row in coefficients_dk)
    return ClassProbe(rows, tuple(float(value) for value in moved_k), 1 / float(regression.C))


def probabilities_by_penalty(
    embeddings_nd: Floats, classes_n: Indices, subjects_n: Names, unseen_md: Floats
) -> npt.NDArray[np.float64]:
    """(P, M, K): what the probe predicts for other scans with each of `PENALTIES`; see `fit_class_probe`."""
    return np.stack(
        [
            fit_class_probe(embeddings_nd, classes_n, subjects_n, penalty).probabilities(unseen_md)
            for penalty in PENALTIES
        ]
    )


def softmax(scores_nk: Floats) -> npt.NDArray[np.float64]:
    """Scores (N, K) -> probabilities (N, K)."""
    raised_nk = np.exp(np.asarray(scores_nk, np.float64) - np.max(scores_nk, axis=1, keepdims=True))
    shares_nk: npt.NDArray[np.float64] = raised_nk / raised_nk.sum(axis=1, keepdims=True)
    return shares_nk
