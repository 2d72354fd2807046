"""Regression baselines: the loss on a predicted label, called like every other loss."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.errors import UserError
from core.losses.gather import gather_batch
from core.losses.pairwise import check_batch, without_autocast


class RegressionLoss(nn.Module):
    """Mean absolute (`l1`) or squared (`mse`) error of embeddings (B, V, 1) against labels (B,)."""

    def __init__(self, name: Literal["l1", "mse"]) -> None:
        super().__init__()
        self.name = name
        self.diagnostics: dict[str, Tensor] = {}

    def forward(self, embeddings: Tensor, labels: Tensor | None, progress: float) -> Tensor:
        """The error in the unit of the label (squared for mse), averaged over subjects and views.

        Raises UserError for embeddings that are not (B, V, 1) or for missing labels.
        """
        check_batch(self.name, embeddings, labels)
        if labels is None or embeddings.shape[2] != 1:
            raise UserError(
                f"{self.name} compares predictions of shape (B, V, 1) with labels (B,), got embeddings "
                f"{tuple(embeddings.shape)} and {'no labels' if labels is None else 'labels'}"
            )
        with without_autocast(embeddings):
            predicted = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
            predicted, gathered = gather_batch(predicted, labels.detach().reshape(-1).to(predicted.dtype))
            truth = predicted.new_zeros(0) if gathered is None else gathered.to(predicted.device)
            truth = truth[:, None, None].expand_as(predicted)
            error = (F.l1_loss if self.name == "l1" else F.mse_loss)(predicted, truth, reduction="sum")
        used = predicted.shape[0] * predicted.shape[1]
        self.diagnostics = {"anchors_used": predicted.new_full((), used)}
        return error / max(used, 1)
