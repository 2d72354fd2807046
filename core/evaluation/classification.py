"""How well classes are predicted. Arrays have one row per scan; N scans, K classes. A person counts once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score

from core.evaluation import Floats, Names
from core.files.tables import PROBABILITY

Indices = npt.NDArray[np.int64]
SMALLEST = 1e-6
"""A probability below this costs as much as this: a single prediction cannot make a mean infinite."""
"""Before the name of a class: the column of its probability in a table of predictions."""


def predicted_classes(predictions: pd.DataFrame) -> list[str]:
    """The classes that have a column of probabilities, in the order of the columns."""
    return [
        str(name).removeprefix(PROBABILITY)
        for name in predictions.columns
        if str(name).startswith(PROBABILITY)
    ]


def classification_metrics(
    probabilities_nk: Floats, classes_n: Indices, subjects_n: Names | None = None
) -> dict[str, float]:
    """What predicted probabilities are worth.

    Of a person with several scans of one class the probabilities are averaged first.

    Args:
        probabilities_nk: (N, K), rows sum to one.
        classes_n: (N,) true class of each scan, 0 to K - 1.
        subjects_n: whose the scans are (N,); each of another person if None.

    Returns:
        `macro_auc`, `balanced_accuracy`, `f1` (macro), `log_loss`, `brier` (Brier 1950: the sum over classes, from 0 to
        2) and `calibration_error`.
    """
    probabilities_nk, classes_n = np.asarray(probabilities_nk, dtype=np.float64), np.asarray(classes_n)
    if probabilities_nk.ndim != 2 or classes_n.shape != probabilities_nk.shape[:1]:
        raise ValueError(
            f"probabilities must be (n, k) and classes (n,), got {probabilities_nk.shape}, {classes_n.shape}"
        )
    if not np.allclose(probabilities_nk.sum(axis=1), 1, atol=1e-4) or (probabilities_nk < 0).any():
        raise ValueError("probabilities must not be negative and rows must sum to 1; apply softmax to logits")
    if not np.isin(classes_n, range(probabilities_nk.shape[1])).all():
        raise ValueError(
            f"classes must be whole numbers from 0 to {probabilities_nk.shape[1] - 1}, got {np.unique(classes_n)}"
        )
    if subjects_n is not None:
        probabilities_nk, classes_n = by_person(probabilities_nk, classes_n, subjects_n)
    likeliest_n = probabilities_nk.argmax(axis=1)
    one_hot_nk = np.eye(probabilities_nk.shape[1])[classes_n]
    return {
        "macro_auc": macro_auc(probabilities_nk, classes_n),
        "balanced_accuracy": float(balanced_accuracy_score(classes_n, likeliest_n)),
        "f1": float(
            f1_score(classes_n, likeliest_n, labels=np.unique(classes_n), average="macro", zero_division=0)
        ),
        "log_loss": float(log_losses(probabilities_nk, classes_n).mean()),
        "brier": float(((probabilities_nk - one_hot_nk) ** 2).sum(axis=1).mean()),
        "calibration_error": calibration_error(probabilities_nk, classes_n),
    }


def by_person(
    probabilities_nk: Floats, classes_n: Indices, subjects_n: Names
) -> tuple[npt.NDArray[np.float64], Indices]:
    """The mean probabilities (P, K) and the class (P,) of each of P people; one of two classes is two people."""
    pairs = np.char.add(np.char.add(np.asarray(subjects_n, dtype=str), "\0"), classes_n.astype(str))
    _, first, person_n = np.unique(pairs, return_index=True, return_inverse=True)
    sums_pk = np.zeros((len(first), probabilities_nk.shape[1]))
    np.add.at(sums_pk, person_n, probabilities_nk)
    order = np.argsort(first)
    return (sums_pk / np.bincount(person_n)[:, None])[order], classes_n[first][order]


def log_losses(probabilities_nk: Floats, classes_n: Indices) -> npt.NDArray[np.float64]:
    """-log of the probability of the true class (N,)."""
    of_truth_n = probabilities_nk[np.arange(len(classes_n)), classes_n].astype(np.float64)
    losses_n: npt.NDArray[np.float64] = -np.log(np.maximum(of_truth_n, SMALLEST))
    return losses_n


def macro_auc(scores_nk: Floats, classes_n: Indices) -> float:
    """Mean over classes of the area under the ROC curve of that class against the rest.

    A class that no subject has, or that every subject has, cannot be ranked and is left out; NaN if none is left.
    """
    of_class = [
        roc_auc_score(classes_n == index, scores_nk[:, index])
        for index in range(scores_nk.shape[1])
        if 0 < (classes_n == index).sum() < len(classes_n)
    ]
    return float(np.mean(of_class)) if of_class else float("nan")


def calibration_error(probabilities_nk: Floats, classes_n: Indices, bins: int = 10) -> float:
    """Expected calibration error (Guo et al. 2017), in [0, 1]: mean |accuracy - confidence| over subjects.

    Subjects are grouped by confidence, the probability of the class predicted, into `bins` of equal width.
    """
    confidence_n = probabilities_nk.max(axis=1)
    right_n = probabilities_nk.argmax(axis=1) == classes_n
    bin_n = np.minimum((confidence_n * bins).astype(int), bins - 1)
    gaps = [abs((right_n[bin_n == index] - confidence_n[bin_n == index]).sum()) for index in range(bins)]
    return float(sum(gaps) / len(classes_n))
