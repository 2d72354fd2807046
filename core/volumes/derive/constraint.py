"""Constraint maps: the voxels of a brain in clusters of like contrast, which guide a pre-training (system D).

Umapathy et al. 2023 (spec.md D.1): principal components of the contrasts of every voxel, on one scale, smoothed by
total variation so that a cluster is a region, and k-means. All is of one subject, so nothing leaks between subjects.

Shape suffixes: C contrasts, P voxels inside the brain, K components.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field
from skimage.restoration import denoise_tv_bregman
from sklearn.cluster import MiniBatchKMeans
from sklearn.decomposition import PCA

from core.errors import UserError

BATCH = 4096
"""Voxels of a step of k-means."""


class ConstraintSettings(BaseModel):
    """How a constraint map is made; the defaults are the published ones."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    contrasts: tuple[str, ...] = Field(default=(), description="channels of the cohort; all if absent")
    components: int = Field(default=4, ge=1, description="principal components, of as many contrasts at most")
    clusters: int = Field(default=20, ge=2, le=1000, description="clusters inside the brain")
    tv: float = Field(
        default=40.0,
        gt=0,
        description="weight of the total variation: the larger, the closer to the contrasts",
    )
    seed: int = Field(default=0, ge=0, description="of k-means")


def constraint_map(
    volume_cxyz: npt.NDArray[np.float32], settings: ConstraintSettings
) -> npt.NDArray[np.int16]:
    """The cluster of every voxel (X, Y, Z): 0 outside the brain, else 1 and up, in the order of the first component.

    Args:
        volume_cxyz: the chosen contrasts (C, X, Y, Z), 0 outside the brain.
        settings: how.

    Raises:
        UserError: there are fewer voxels in the brain than clusters.
    """
    inside = (volume_cxyz != 0).any(axis=0)
    count = int(np.count_nonzero(inside))
    if count <= settings.clusters:
        raise UserError(f"{count} voxels of brain cannot be divided into {settings.clusters} clusters")
    values_pc = volume_cxyz[:, inside].T.astype(np.float64)
    # Contrasts have scales of their own.
    spread_c = values_pc.std(axis=0)
    values_pc = (values_pc - values_pc.mean(axis=0)) / np.where(spread_c > 0, spread_c, 1)
    kept = min(settings.components, len(volume_cxyz))
    found_pk = PCA(kept, svd_solver="full").fit_transform(values_pc)
    low, high = found_pk.min(), found_pk.max()
    found_pk = (found_pk - low) / max(high - low, np.finfo(np.float64).tiny)
    smooth_pk = np.stack([_smooth(found_pk[:, place], inside, settings.tv) for place in range(kept)], axis=1)
    model = MiniBatchKMeans(settings.clusters, batch_size=BATCH, n_init=3, random_state=settings.seed)
    cluster_p = model.fit_predict(smooth_pk)
    # k-means numbers clusters by chance; in this order neighbours in number are neighbours in contrast.
    rank = np.argsort(np.argsort(model.cluster_centers_[:, 0], kind="stable"), kind="stable")
    made = np.zeros(inside.shape, dtype=np.int16)
    made[inside] = 1 + rank[cluster_p]
    return made


def _smooth(
    values_p: npt.NDArray[np.float64], inside: npt.NDArray[np.bool_], weight: float
) -> npt.NDArray[np.float64]:
    """A component smoothed by total variation (split Bregman), on its mean outside the brain."""
    image = np.full(inside.shape, values_p.mean())
    image[inside] = values_p
    found: npt.NDArray[np.float64] = denoise_tv_bregman(image, weight=weight)[inside]
    return found


def explained_by(clusters: npt.NDArray[np.int16], values: npt.NDArray[np.float32]) -> float:
    """The share (eta squared) of the variance of a contrast (X, Y, Z) inside the brain that its clusters explain."""
    inside = clusters > 0
    numbers, grey = clusters[inside], values[inside].astype(np.float64)
    counts = np.bincount(numbers)
    means = np.bincount(numbers, weights=grey) / np.maximum(counts, 1)
    whole = float(((grey - grey.mean()) ** 2).sum())
    return float((counts * (means - grey.mean()) ** 2)[1:].sum() / whole) if whole else 0.0
