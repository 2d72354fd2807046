"""Changes of intensity inside the brain. Suffixes: C channels, … two or three spatial axes."""

from __future__ import annotations

import torch


def recolour(
    image_c: torch.Tensor,
    *,
    scale: float = 1.0,
    shift: float = 0.0,
    contrast: float = 1.0,
    gamma: float = 1.0,
) -> torch.Tensor:
    """An image (C, …) with other intensities, new; voxels that are exactly 0 stay 0 and are not counted.

    In this order, for each channel over its non-zero voxels:

    - gamma: low + (high - low) · ((x - low) / (high - low))^γ between lowest and highest intensity;
    - contrast: mean + contrast · (x - mean);
    - scale: scale · x;
    - shift: x + shift.

    One image at a time: the last bits of a sum over a batch differ from those of a sum over one of its images, and
    a view must not depend on its batch.
    """
    if shift == 0 and contrast == 1 and gamma == 1:
        return image_c * scale
    brain = image_c.sign().abs_()  # 1 and 0, several times as fast as a comparison
    spatial = tuple(range(1, image_c.ndim))
    if gamma != 1:
        limit = torch.finfo(image_c.dtype)
        low = image_c.addcmul(brain - 1, brain.new_tensor(-limit.max)).amin(spatial, keepdim=True)
        high = image_c.addcmul(brain - 1, brain.new_tensor(limit.max)).amax(spatial, keepdim=True)
        room = (high - low).clamp(min=limit.tiny)
        image_c = ((image_c - low) / room).clamp_(0, 1).pow_(gamma).mul_(room).add_(low).mul_(brain)
    offset = brain.new_full((1,) * brain.ndim, shift)
    if contrast != 1:  # the background's zeros add nothing to the sum
        wide = torch.promote_types(image_c.dtype, torch.float32)
        sum_c, voxels_c = (part.sum(spatial, keepdim=True, dtype=wide) for part in (image_c, brain))
        mean_c = sum_c / voxels_c.clamp(min=1)
        offset = (mean_c * ((1 - contrast) * scale) + shift).to(image_c.dtype)
    return (image_c * (contrast * scale)).addcmul_(brain, offset)
