"""A person counts once, however often the person was scanned."""

from __future__ import annotations

import numpy as np

from core.evaluation import Floats, Names


def subject_weights(subjects_n: Names) -> Floats | None:
    """For each scan (N,) one part of its subject, which counts 1 in all.

    None where every subject has one scan: then nothing is weighted, to the last digit.
    """
    _, subject_n, scans = np.unique(
        np.asarray(subjects_n, dtype=str), return_inverse=True, return_counts=True
    )
    if scans.max(initial=0) <= 1:
        return None
    weights_n: Floats = 1.0 / scans[subject_n]
    return weights_n


def subject_means(values_n: Floats, subjects_n: Names) -> Floats:
    """The mean of every subject's values (S,), in the order of the subjects' first scans."""
    names, first, subject_n = np.unique(
        np.asarray(subjects_n, dtype=str), return_index=True, return_inverse=True
    )
    means = np.bincount(subject_n, weights=values_n) / np.bincount(subject_n)
    ordered: Floats = means[np.argsort(first)]
    return ordered if len(names) < len(values_n) else np.asarray(values_n, dtype=np.float64)
