"""Pictures of a few judged cases of a segmentation: the best, the median and the worst one in three planes.

Shape suffixes: B scans of a batch, N cases, X, Y, Z.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from core.evaluation import Floats

PLANES = ("sagittal", "coronal", "axial")
"""The slices across X, Y and Z."""
DICE = "dice"


def planes_of(
    volumes_bxyz: torch.Tensor, predicted_bxyz: torch.Tensor, reference_bxyz: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Three planes (B, 3, …) uint8 through the largest part of every reference: image, predicted and true places."""
    planes: dict[str, list[torch.Tensor]] = {name: [] for name in PLANES}
    for volume, predicted, reference in zip(volumes_bxyz, predicted_bxyz, reference_bxyz, strict=True):
        inside = volume[volume != 0]
        low, high = np.percentile(inside.numpy(), [1, 99]) if inside.numel() else (0.0, 1.0)
        grey = ((volume - low) / max(float(high - low), 1e-6)).clamp(0, 1) * 230 + 25
        image = torch.where(volume != 0, grey, torch.zeros(())).to(torch.uint8)
        known = reference.clamp(min=0)
        for axis, name in enumerate(PLANES):
            others = [other for other in range(3) if other != axis]
            cut = int((known > 0).sum(dim=others).argmax())
            several = [each.select(axis, cut).to(torch.uint8) for each in (image, predicted, known)]
            planes[name].append(torch.stack(several))
    return {name: torch.stack(several) for name, several in planes.items()}


def typical_cases(dice_n: Floats, outputs: Mapping[str, Floats]) -> dict[str, npt.NDArray[np.generic]]:
    """The planes of the best, the median and the worst case, and their Dice; {} where none were kept."""
    if PLANES[0] not in outputs:
        return {}
    order = np.argsort(-dice_n, kind="stable")
    order = order[: np.count_nonzero(~np.isnan(dice_n))]
    if not order.size:
        return {}
    chosen = np.array(list(dict.fromkeys([order[0], order[(len(order) - 1) // 2], order[-1]])))
    planes = {name: np.asarray(outputs[name][chosen], dtype=np.uint8) for name in PLANES}
    return {**planes, "place": chosen, DICE: dice_n[chosen]}
