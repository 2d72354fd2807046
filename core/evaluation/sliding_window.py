"""Sliding-window inference in which every window comes with its counterpart from the other hemisphere."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from monai.inferers.utils import sliding_window_inference

from core.volumes.images.mirror import RAS, mirror

MirroredPredictor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def mirrored_sliding_window(
    volumes_bcxyz: torch.Tensor,
    predictor: MirroredPredictor,
    window: tuple[int, int, int],
    overlap: float = 0.5,
    windows_per_batch: int = 1,
    affine: npt.NDArray[np.float64] = RAS,
) -> torch.Tensor:
    """Logits (B, classes, X, Y, Z) from windows, blended where they overlap.

    The window [a, b) along left-right is given together with [X-b, X-a) mirrored, so that voxel i of one lies
    at the mirror position of voxel i of the other.

    Args:
        volumes_bcxyz: (B, C, X, Y, Z).
        predictor: (windows, mirrored windows), each (b, C, *window) -> logits (b, classes, *window).
        window: size of a window in voxels; smaller volumes are padded with zeros.
        overlap: share of a window that the next one covers again, in [0, 1).
        windows_per_batch: windows in one call of `predictor`.
        affine: 4x4 voxel-to-world of the volumes, which says where left and right are.
    """
    channels = volumes_bcxyz.shape[1]

    def predict(pairs: torch.Tensor) -> torch.Tensor:
        return predictor(pairs[:, :channels], pairs[:, channels:])

    # Windows of the mirror image at the same place are the counterparts; as channels they travel together.
    pairs = torch.cat([volumes_bcxyz, mirror(volumes_bcxyz, affine)], dim=1)
    logits = sliding_window_inference(pairs, window, windows_per_batch, predict, overlap=overlap)
    if not isinstance(logits, torch.Tensor):
        raise TypeError(f"the predictor must give one tensor, got {type(logits).__name__}")
    return logits
