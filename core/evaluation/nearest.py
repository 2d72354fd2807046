"""k-nearest-neighbour probe: age of a subject from the training subjects that lie next to it."""

from __future__ import annotations

from typing import Literal

import numpy as np
from sklearn.neighbors import KNeighborsRegressor


def nearest_ages(
    training_embeddings_nd: np.ndarray,
    training_ages_n: np.ndarray,
    embeddings_md: np.ndarray,
    neighbours: int = 5,
    metric: Literal["cosine", "euclidean", "manhattan"] = "cosine",
) -> np.ndarray:
    """Ages (M,) in years: the mean of the `neighbours` nearest training subjects, all N if there are fewer.

    It fits nothing, so it shows the geometry that the objective made, and does not overfit embeddings of
    training subjects as a linear probe can.

    Args:
        training_embeddings_nd: (N, D).
        training_ages_n: (N,) in years.
        embeddings_md: (M, D).
        neighbours: how many are averaged.
        metric: distance; on unit embeddings cosine and Euclidean give the same order.
    """
    count = min(neighbours, len(training_ages_n))
    regressor = KNeighborsRegressor(n_neighbors=count, metric=metric)
    return regressor.fit(training_embeddings_nd, training_ages_n).predict(embeddings_md)
