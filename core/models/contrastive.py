"""An encoder with a projection head, as every contrastive objective trains it. Shapes: B volumes, E embedding."""

from __future__ import annotations

import torch
from torch import nn


class ContrastiveModel(nn.Module):
    """Encoder and projection head; `readout` says which of the two a probe sees."""

    def __init__(self, encoder: nn.Module, head: nn.Module, readout: str) -> None:
        super().__init__()
        self.encoder, self.head, self.readout = encoder, head, readout

    def forward(self, volumes_bcxyz: torch.Tensor) -> torch.Tensor:
        """Projections (B, D) on the unit sphere."""
        projection_bd: torch.Tensor = self.head(self.encoder(volumes_bcxyz))
        return projection_bd

    def embed(self, volumes_bcxyz: torch.Tensor) -> torch.Tensor:
        """What the probe reads, (B, E)."""
        embedding_be: torch.Tensor = self.encoder(volumes_bcxyz)
        if self.readout == "encoder":
            return embedding_be
        projection_bd: torch.Tensor = self.head(embedding_be)
        return projection_bd
