"""How well classes are predicted. Arrays have one row per subject; N subjects, K classes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from core.evaluation import Floats


def classification_metrics(probabilities_nk: Floats, classes_n: npt.NDArray[np.int64]) -> dict[str, float]:
    """`macro_auc`, `balanced_accuracy` and `calibration_error` of predicted probabilities.

    Args:
        probabilities_nk: (N, K), rows sum to one.
        classes_n: (N,) true class of each subject, 0 to K - 1.
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
    return {
        "macro_auc": macro_auc(probabilities_nk, classes_n),
        "balanced_accuracy": float(balanced_accuracy_score(classes_n, probabilities_nk.argmax(axis=1))),
        "calibration_error": calibration_error(probabilities_nk, classes_n),
    }


def macro_auc(scores_nk: Floats, classes_n: npt.NDArray[np.int64]) -> float:
    """Mean over classes of the area under the ROC curve of that class against the rest.

    A class that no subject has, or that every subject has, cannot be ranked and is left out; NaN if none is left.
    """
    of_class = [
        roc_auc_score(classes_n == index, scores_nk[:, index])
        for index in range(scores_nk.shape[1])
        if 0 < (classes_n == index).sum() < len(classes_n)
    ]
    return float(np.mean(of_class)) if of_class else float("nan")


def calibration_error(probabilities_nk: Floats, classes_n: npt.NDArray[np.int64], bins: int = 10) -> float:
    """Expected calibration error (Guo et al. 2017), in [0, 1]: mean |accuracy - confidence| over subjects.

    Subjects are grouped by confidence, the probability of the class predicted, into `bins` of equal width.
    """
    confidence_n = probabilities_nk.max(axis=1)
    right_n = probabilities_nk.argmax(axis=1) == classes_n
    bin_n = np.minimum((confidence_n * bins).astype(int), bins - 1)
    gaps = [abs((right_n[bin_n == index] - confidence_n[bin_n == index]).sum()) for index in range(bins)]
    return float(sum(gaps) / len(classes_n))
