"""k-nearest-neighbour probe: age of a subject from the training subjects that lie next to it."""

from __future__ import annotations

from typing import Literal

from sklearn.neighbors import KNeighborsRegressor

from core.evaluation import Floats


def nearest_ages(
    training_embeddings_nd: Floats,
    training_ages_n: Floats,
    embeddings_md: Floats,
    neighbours: int = 5,
    metric: Literal["cosine", "euclidean", "manhattan"] = "cosine",
) -> Floats:
    """Ages (M,) in years: the mean of the `neighbours` nearest training subjects, all N if there are fewer.

    It fits no parameters, so it shows the geometry that the objective made, and it cannot overfit the
    embeddings of training subjects as a linear probe can.

    Args:
        training_embeddings_nd: (N, D).
        training_ages_n: (N,) in years.
        embeddings_md: (M, D).
        neighbours: how many are averaged.
        metric: distance; on unit embeddings cosine and Euclidean give the same order.
    """
    count = min(neighbours, len(training_ages_n))
    regressor = KNeighborsRegressor(n_neighbors=count, metric=metric)
    ages_m: Floats = regressor.fit(training_embeddings_nd, training_ages_n).predict(embeddings_md)
    return ages_m
