"""Logistic probe: which class can be read linearly from an embedding. N subjects, D features, K classes."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold, StratifiedKFold

from core.errors import UserError
from core.evaluation import Classes, Floats, Names
from core.evaluation.by_subject import subject_weights
from core.evaluation.class_probe import ClassProbe, class_probe_of
from core.evaluation.probes import standardisation

INVERSE_PENALTIES: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0, 100.0)
"""C of the OpenBHB challenge."""


@dataclass(frozen=True, eq=False)
class LogisticProbe:
    """A fitted logistic regression and the standardisation that it was fitted with."""

    classifier: GridSearchCV | LogisticRegression
    mean: Floats
    """(D,)"""
    scale: Floats
    """(D,)"""

    @property
    def classes(self) -> Classes:
        """(K,) sorted, the order of the columns of `probabilities`."""
        classes_k: Classes = self.classifier.classes_
        return classes_k

    def predict(self, embeddings_nd: Floats) -> Classes:
        """(N, D) -> the likeliest class of each subject (N,)."""
        classes_n: Classes = self.classifier.predict((embeddings_nd - self.mean) / self.scale)
        return classes_n

    def as_class_probe(self) -> ClassProbe:
        """The same map as plain numbers; its classes are 0 to K - 1."""
        fitted = getattr(self.classifier, "best_estimator_", self.classifier)
        return class_probe_of(fitted, self.mean, self.scale)

    def probabilities(self, embeddings_nd: Floats) -> Floats:
        """(N, D) -> (N, K)."""
        probabilities_nk: Floats = self.classifier.predict_proba((embeddings_nd - self.mean) / self.scale)
        return probabilities_nk


def fit_logistic_probe(
    embeddings_nd: Floats,
    classes_n: Classes,
    subjects_n: Names | None = None,
    *,
    seed: int = 0,
    reference: bool = False,
) -> LogisticProbe:
    """Logistic regression whose penalty is chosen by stratified cross-validation inside these subjects.

    The score is balanced accuracy, over up to five folds, fewer where the rarest class has fewer subjects; the
    penalty is 1 where a fold would have one class only. All scans of a subject are in one fold, and a subject counts
    once.

    Args:
        embeddings_nd: training subjects' embeddings (N, D).
        classes_n: their classes (N,), two or more different ones.
        subjects_n: whose they are (N,); each of another subject if None.
        seed: order of the folds and of saga's steps.
        reference: as the OpenBHB challenge has it: embeddings as they are and 150 iterations of saga.
            Otherwise embeddings are standardised and lbfgs finds the same optimum, 5 to 30 times sooner.
    """
    embeddings_nd = np.asarray(embeddings_nd, dtype=np.float64)
    subjects_n = np.arange(len(embeddings_nd)).astype(str) if subjects_n is None else subjects_n
    weights_n = subject_weights(subjects_n)
    present = np.unique(classes_n)
    people = np.array([len(np.unique(subjects_n[classes_n == each])) for each in present])
    if len(present) < 2:
        raise UserError(f"a logistic probe needs two classes or more, got only {present.tolist()}")
    mean_d: Floats = np.zeros(embeddings_nd.shape[1])
    scale_d: Floats = np.ones(embeddings_nd.shape[1])
    if not reference:
        mean_d, scale_d = standardisation(embeddings_nd)
    groups_n = None if weights_n is None else subjects_n
    classifier = _classifier(classes_n, people, seed, reference, groups_n)
    options: dict[str, Floats | Names] = {} if weights_n is None else {"sample_weight": weights_n}
    if isinstance(classifier, GridSearchCV) and weights_n is not None:
        options["groups"] = subjects_n
    with warnings.catch_warnings():
        # 150 iterations are the published definition; classes of fewer subjects than folds are common.
        warnings.simplefilter("ignore", category=ConvergenceWarning)
        warnings.simplefilter("ignore", category=UserWarning)
        classifier.fit((embeddings_nd - mean_d) / scale_d, classes_n, **options)
    return LogisticProbe(classifier, mean_d, scale_d)


def _classifier(
    classes_n: Classes, people: npt.NDArray[np.intp], seed: int, reference: bool, groups_n: Names | None
) -> GridSearchCV | LogisticRegression:
    solver, iterations = ("saga", 150) if reference else ("lbfgs", 1000)
    regression = LogisticRegression(solver=solver, max_iter=iterations, random_state=seed)
    # With one subject in every class, no subject can be left out.
    if people.max() < 2:
        return regression
    kind = StratifiedKFold if groups_n is None else StratifiedGroupKFold
    folds = kind(int(np.clip(people.min(), 2, 5)), shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=UserWarning)
        parts = [classes_n[training] for training, _ in folds.split(classes_n, classes_n, groups_n)]
    # Where one of two classes is a single subject, the folds without it have nothing to tell apart.
    if min(len(np.unique(part)) for part in parts) < 2:
        return regression
    return GridSearchCV(regression, {"C": INVERSE_PENALTIES}, scoring="balanced_accuracy", cv=folds)
