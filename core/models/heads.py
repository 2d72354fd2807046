"""Heads: what follows an encoder in training. Shape suffixes: B subjects or views, E embedding, D output."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

HeadKind = Literal["mlp", "linear", "none"]


class ProjectionHead(nn.Module):
    """Embeddings (B, embedding_dim) -> points on the unit sphere (B, dimension), always float32.

    Args:
        embedding_dim: length E of the encoder's output.
        dimension: length D of the projection; ignored by kind "none", which keeps E.
        kind: "mlp" is Linear(E, E)-ReLU-Linear(E, D) (Chen et al. 2020, SimCLR), "linear" one layer,
            "none" normalises the embedding itself.
    """

    def __init__(self, embedding_dim: int, dimension: int = 128, kind: HeadKind = "mlp") -> None:
        super().__init__()
        self.dimension = embedding_dim if kind == "none" else dimension
        self.layers = _projection(embedding_dim, dimension, kind)

    def forward(self, embedding_be: torch.Tensor) -> torch.Tensor:
        """(B, E) -> (B, D) with rows of Euclidean norm 1."""
        # Norms and the losses that follow are taken in float32: e^{1/0.07} does not fit in float16.
        return F.normalize(self.layers(embedding_be).float(), dim=-1)


def _projection(embedding_dim: int, dimension: int, kind: HeadKind) -> nn.Module:
    if kind == "none":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(embedding_dim, dimension)
    if kind == "mlp":
        return nn.Sequential(
            nn.Linear(embedding_dim, embedding_dim), nn.ReLU(), nn.Linear(embedding_dim, dimension)
        )
    raise ValueError(f"kind must be 'mlp', 'linear' or 'none', got '{kind}'")


class RegressionHead(nn.Module):
    """Embeddings (B, embedding_dim) -> one number each (B,), in the units of the target (years for age)."""

    def __init__(self, embedding_dim: int) -> None:
        super().__init__()
        self.layer = nn.Linear(embedding_dim, 1)

    def forward(self, embedding_be: torch.Tensor) -> torch.Tensor:
        """(B, E) -> (B,) float32."""
        output_b1: torch.Tensor = self.layer(embedding_be)
        return output_b1.float().squeeze(-1)


class ClassHead(nn.Module):
    """Embeddings (B, embedding_dim) -> scores of K classes (B, K), always float32."""

    def __init__(self, embedding_dim: int, classes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(embedding_dim, classes)

    def forward(self, embedding_be: torch.Tensor) -> torch.Tensor:
        """(B, E) -> (B, K)."""
        scores_bk: torch.Tensor = self.layer(embedding_be)
        return scores_bk.float()
