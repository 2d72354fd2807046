"""How much an embedding still tells about the scanner site, and the OpenBHB score, which uses it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from sklearn.metrics import balanced_accuracy_score

from core.evaluation import Floats, Names
from core.evaluation.by_subject import subject_weights
from core.evaluation.logistic import fit_logistic_probe


def site_balanced_accuracy(
    training_embeddings_nd: Floats,
    training_sites_n: Names,
    embeddings_md: Floats,
    sites_m: Names,
    training_subjects_n: Names | None = None,
    subjects_m: Names | None = None,
    *,
    seed: int = 0,
    reference: bool = False,
) -> float | None:
    """Balanced accuracy, in [0, 1], of telling the site from the embedding; less is better, chance 1/sites.

    A logistic probe is fitted on training subjects and scored on evaluation subjects, as in the OpenBHB
    challenge (Dufumier et al. 2022).

    Args:
        training_embeddings_nd: (N, D).
        training_sites_n: (N,) site names; "" or missing is unknown, and such subjects are left out.
        embeddings_md: evaluation subjects' embeddings (M, D).
        sites_m: (M,) their sites; subjects of a site without training subjects are left out.
        training_subjects_n: (N,) whose the training scans are; each of another subject if None.
        subjects_m: (M,) whose the evaluation scans are; a subject counts once.
        seed: of the probe.
        reference: the probe with the published settings, see `fit_logistic_probe`.

    Returns:
        None where the question has no meaning: fewer than two sites among the usable subjects, training or
        evaluation.
    """
    training_sites_n, sites_m = np.asarray(training_sites_n), np.asarray(sites_m)
    known_n = _known(training_sites_n)
    known_m = _known(sites_m) & np.isin(sites_m, training_sites_n[known_n])
    if len(np.unique(training_sites_n[known_n])) < 2 or len(np.unique(sites_m[known_m])) < 2:
        return None
    probe = fit_logistic_probe(
        np.asarray(training_embeddings_nd)[known_n],
        training_sites_n[known_n].astype(str),
        None if training_subjects_n is None else np.asarray(training_subjects_n)[known_n],
        seed=seed,
        reference=reference,
    )
    predicted_m = probe.predict(np.asarray(embeddings_md)[known_m])
    weights_m = None if subjects_m is None else subject_weights(np.asarray(subjects_m)[known_m])
    score = balanced_accuracy_score(sites_m[known_m].astype(str), predicted_m, sample_weight=weights_m)
    return float(score)


def _known(sites_n: Names) -> npt.NDArray[np.bool_]:
    return np.array(
        [isinstance(site, str) and site.strip() not in ("", "n/a") for site in sites_n], dtype=bool
    )


def openbhb_score(site_accuracy: float | None, external_mae: float) -> float | None:
    """Site balanced accuracy ** 0.3 · MAE on external sites (years); less is better, None without sites."""
    return None if site_accuracy is None else site_accuracy**0.3 * external_mae
