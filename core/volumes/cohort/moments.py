"""Intensity statistics of any fold from the moments of its volumes, without reading a voxel again.

A pooled mean and standard deviation need only the count, mean and sum of squared deviations of the non-zero
voxels of each volume. They are computed once for a cohort; the statistics of a fold merge those of its rows.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from core.errors import UserError
from core.volumes.cohort.stored import StoredVoxels
from core.volumes.images.preprocess import IntensityStatistics

Moments = npt.NDArray[np.float64]
"""(…, C, 3): count, mean and sum of squared deviations of the non-zero voxels, in float64."""


def volume_moments(volume: StoredVoxels, scale: npt.NDArray[np.float32] | None = None) -> Moments:
    """Moments (C, 3) of one volume (C, X, Y, Z) as stored; `scale` (C,) makes real values of int16 ones."""
    moments = np.zeros((len(volume), 3))
    for index, channel in enumerate(volume):
        values = channel[channel != 0].astype(np.float64)
        if values.size:
            mean = values.mean()
            values -= mean
            moments[index] = values.size, mean, values @ values
    if scale is not None:
        moments[:, 1] *= scale
        moments[:, 2] *= np.square(scale, dtype=np.float64)
    return moments


def pooled_statistics(moments: Moments) -> IntensityStatistics:
    """Mean and SD, per channel, of the non-zero voxels of all volumes with `moments` (n, C, 3) together.

    The sum of squares within volumes plus that between their means, each around a mean: there is no
    cancellation where the mean is far larger than the SD (Chan, Golub and LeVeque 1979). UserError where no volume is
    given, or the voxels of a channel do not differ.
    """
    count, mean, within = np.moveaxis(moments, -1, 0)
    total = np.maximum(count.sum(axis=0), 1)
    pooled = (count * mean).sum(axis=0) / total
    sd = np.sqrt((within + count * (mean - pooled) ** 2).sum(axis=0) / total)
    if sd.size == 0 or len(moments) == 0 or (sd == 0).any():
        raise UserError("intensity statistics need volumes whose non-zero voxels differ in every channel")
    return IntensityStatistics(tuple(pooled.tolist()), tuple(sd.tolist()))
