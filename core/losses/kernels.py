"""Label kernels: how strongly two subjects attract each other, from how far apart their labels are.

Every kernel takes distances |y_i − y_j| (any shape, unit of the label, for instance years) and a width in
the same unit, gives 1 at distance 0 and never rises with distance.

Published kernels that differ are kept under PUBLISHED_KERNELS for the `reference` settings: the `gaussian`
of the released code is a density (not 1 at distance 0), and its `cauchy` takes a width that *narrows* the
kernel as it grows.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Kernel = Callable[[Tensor, float], Tensor]


def _exp_minus(x: Tensor) -> Tensor:
    """exp(−x), exactly 0 towards the end of the normal range, where exp itself is ten times slower."""
    limit = -math.log(torch.finfo(x.dtype).tiny) - 1
    return torch.exp(-x.clamp(max=limit)) * (x < limit)


def equal(distance: Tensor, width: float) -> Tensor:
    """1 where the labels are the same, otherwise 0 (supervised contrastive, arXiv 2004.11362)."""
    return (distance == 0).to(distance.dtype)


def rbf(distance: Tensor, width: float) -> Tensor:
    """exp(−Δ²/2σ²), as in y-Aware (arXiv 2106.08808)."""
    return _exp_minus((distance / width) ** 2 / 2)


def cauchy(distance: Tensor, width: float) -> Tensor:
    """1/(1 + (Δ/γ)²): heavy tails, so that distant ages still attract a little."""
    return 1 / (1 + (distance / width) ** 2)


def laplace(distance: Tensor, width: float) -> Tensor:
    """exp(−|Δ|/width): a cusp at equal labels."""
    return _exp_minus(distance / width)


def epanechnikov(distance: Tensor, width: float) -> Tensor:
    """max(0, 1 − (Δ/width)²): exactly nothing beyond one width."""
    return (1 - (distance / width) ** 2).clamp(min=0)


def published_gaussian(distance: Tensor, width: float) -> Tensor:
    """The normal density, exp(−Δ²/2σ²)/(√(2π)σ); above 1 at distance 0 when σ < 0.399."""
    return rbf(distance, width) / (math.sqrt(2 * math.pi) * width)


def published_cauchy(distance: Tensor, width: float) -> Tensor:
    """1/(1 + γΔ²): γ is an inverse squared width."""
    return 1 / (1 + width * distance**2)


def rbf_to_underflow(distance: Tensor, width: float) -> Tensor:
    """exp(−Δ²/2σ²) down to the last digit before underflow: slow, but the released threshold ranks by it."""
    return torch.exp(-(distance**2) / (2 * width**2))


def gaussian_to_underflow(distance: Tensor, width: float) -> Tensor:
    """The normal density, as `rbf_to_underflow`."""
    return rbf_to_underflow(distance, width) / (math.sqrt(2 * math.pi) * width)


def everyone(distance: Tensor, width: float) -> Tensor:
    """1 whatever the labels: every pair attracts, and only the eligible negatives depend on the labels."""
    return torch.ones_like(distance)


KERNELS: dict[str, Kernel] = {
    "equal": equal,
    "rbf": rbf,
    # Scaled to 1 at distance 0, the gaussian is the rbf.
    "gaussian": rbf,
    "cauchy": cauchy,
    "laplace": laplace,
    "epanechnikov": epanechnikov,
}

PUBLISHED_KERNELS: dict[str, Kernel] = KERNELS | {
    "gaussian": published_gaussian,
    "cauchy": published_cauchy,
}

PUBLISHED_RANKING_KERNELS: dict[str, Kernel] = PUBLISHED_KERNELS | {
    "rbf": rbf_to_underflow,
    "gaussian": gaussian_to_underflow,
}


def label_distance(labels_c: Tensor, labels_b: Tensor, dtype: torch.dtype) -> Tensor:
    """|y_c − y_b| of shape (C, B), in `dtype`.

    The difference is taken in the labels' own precision, so that adding a constant to every label (or
    storing ages as int64 or float64) changes nothing that the data type can represent.
    """
    if not labels_c.is_floating_point():
        labels_c, labels_b = labels_c.long(), labels_b.long()
    elif labels_c.dtype.itemsize < 4:
        labels_c, labels_b = labels_c.float(), labels_b.float()
    return (labels_c[:, None] - labels_b[None, :]).abs().to(dtype)


def without_dust(weights: Tensor) -> Tensor:
    """Weights below the data type's normal range as exactly 0: dividing by their sum would overflow."""
    return weights.masked_fill(weights < torch.finfo(weights.dtype).tiny, 0.0)
