"""Sliding-window inference in which every window comes with its counterpart from the other hemisphere."""

from __future__ import annotations

from collections.abc import Callable

import torch
from monai.inferers.utils import sliding_window_inference

from core.volumes.images.mirror import mirror_image

MirroredPredictor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def mirrored_sliding_window(
    volumes_bcxyz: torch.Tensor,
    predictor: MirroredPredictor,
    window: tuple[int, int, int],
    overlap: float = 0.5,
    windows_per_batch: int = 1,
) -> torch.Tensor:
    """Logits (B, classes, X, Y, Z) from windows, blended where they overlap.

    Every window of a volume is given together with the same window of its mirror image (`mirror_image`), so that voxel
    i of one lies at the mirror position of voxel i of the other. Windows weigh by a Gaussian, most in their middle.

    Args:
        volumes_bcxyz: (B, C, X, Y, Z) in RAS order.
        predictor: (windows, mirrored windows), each (b, C, *window) -> logits (b, classes, *window).
        window: size of a window in voxels; smaller volumes are padded with zeros.
        overlap: share of a window that the next one covers again, in [0, 1).
        windows_per_batch: windows in one call of `predictor`.
    """
    channels = volumes_bcxyz.shape[1]

    def predict(pairs: torch.Tensor) -> torch.Tensor:
        return predictor(pairs[:, :channels], pairs[:, channels:])

    # Windows of the mirror image at the same place are the counterparts; as channels they travel together.
    pairs = torch.cat([volumes_bcxyz, mirror_image(volumes_bcxyz)], dim=1)
    logits = sliding_window_inference(
        pairs, window, windows_per_batch, predict, overlap=overlap, mode="gaussian"
    )
    if not isinstance(logits, torch.Tensor):
        raise TypeError(f"the predictor must give one tensor, got {type(logits).__name__}")
    return logits
