"""How much an embedding still tells of the scanner site, and the OpenBHB score made of it."""

from __future__ import annotations

import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold

from core.evaluation.probes import standardisation

INVERSE_PENALTIES: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0, 100.0)  # C of the OpenBHB challenge


def site_balanced_accuracy(
    training_embeddings_nd: np.ndarray,
    training_sites_n: np.ndarray,
    embeddings_md: np.ndarray,
    sites_m: np.ndarray,
    *,
    seed: int = 0,
    reference: bool = False,
) -> float | None:
    """Balanced accuracy, in [0, 1], of telling the site from the embedding; less is better, chance 1/sites.

    A logistic regression (C of 0.01 to 100 by stratified cross-validation) is fitted on training subjects and
    scored on evaluation subjects, as in the OpenBHB challenge (Dufumier et al. 2022).

    Args:
        training_embeddings_nd: (N, D).
        training_sites_n: (N,) site names; "" or missing is unknown, and such subjects are left out.
        embeddings_md: evaluation subjects' embeddings (M, D).
        sites_m: (M,) their sites; subjects of a site without training subjects are left out.
        seed: order of the folds and of saga's steps.
        reference: as published: embeddings as they are and 150 iterations of saga. Otherwise embeddings are
            standardised on the training subjects and lbfgs finds the same optimum, 5 to 30 times sooner.

    Returns:
        None where the question has no meaning: fewer than two sites among the usable subjects, training or
        evaluation.
    """
    known_n, known_m = _known(training_sites_n), _known(sites_m)
    known_m &= np.isin(sites_m, np.asarray(training_sites_n)[known_n])
    train_nd = np.asarray(training_embeddings_nd, dtype=np.float64)[known_n]
    evaluate_md = np.asarray(embeddings_md, dtype=np.float64)[known_m]
    training_sites_n = np.asarray(training_sites_n)[known_n].astype(str)
    sites_m = np.asarray(sites_m)[known_m].astype(str)
    if len(np.unique(training_sites_n)) < 2 or len(np.unique(sites_m)) < 2:
        return None
    mean_d, scale_d = (0.0, 1.0) if reference else standardisation(train_nd)
    with warnings.catch_warnings():
        # 150 iterations are the published definition; sites of fewer subjects than folds are common.
        warnings.simplefilter("ignore", category=ConvergenceWarning)
        warnings.simplefilter("ignore", category=UserWarning)
        classifier = _site_classifier(training_sites_n, seed, reference)
        classifier.fit((train_nd - mean_d) / scale_d, training_sites_n)
        predicted_m = classifier.predict((evaluate_md - mean_d) / scale_d)
        return float(balanced_accuracy_score(sites_m, predicted_m))


def _known(sites_n: np.ndarray) -> np.ndarray:
    return np.array(
        [isinstance(site, str) and site.strip() not in ("", "n/a") for site in sites_n], dtype=bool
    )


def _site_classifier(sites_n: np.ndarray, seed: int, reference: bool) -> GridSearchCV | LogisticRegression:
    solver, iterations = ("saga", 150) if reference else ("lbfgs", 1000)
    regression = LogisticRegression(solver=solver, max_iter=iterations, random_state=seed)
    _, counts = np.unique(sites_n, return_counts=True)
    if counts.max() < 2:  # one subject a site: nothing can be left out
        return regression
    folds = StratifiedKFold(int(np.clip(counts.min(), 2, 5)), shuffle=True, random_state=seed)
    return GridSearchCV(regression, {"C": INVERSE_PENALTIES}, scoring="balanced_accuracy", cv=folds)


def openbhb_score(site_accuracy: float | None, external_mae: float) -> float | None:
    """Site balanced accuracy ** 0.3 · MAE on external sites (years); less is better, None without sites."""
    return None if site_accuracy is None else site_accuracy**0.3 * external_mae
