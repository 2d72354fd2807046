"""Losses on the scores of classes, called like every other loss: loss(scores (B, V, K), classes (B,), progress).

Scores are logits. The loss is that of the whole batch over all workers (`core.losses.gather`).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from core.errors import UserError
from core.losses.gather import gather_batch
from core.losses.members import LossSettings
from core.losses.pairwise import without_autocast

ClassWeights = Literal["none", "balanced"]


class ClassLoss(nn.Module):
    """Cross-entropy, or focal loss (Lin et al., ICCV 2017, equation 5) with `gamma` above 0, over K classes.

    A view i of class c costs w_c (1 - p_c)^gamma · (-log p_c), smoothed as in Szegedy et al. (2016), and the loss is
    Σ over views / Σ of their w_c. As published for system C (`by_number`), it is Σ over views / their number.
    """

    weights: Tensor | None

    def __init__(self, gamma: float, smoothing: float, weighs: ClassWeights, *, by_number: bool) -> None:
        super().__init__()
        self.gamma, self.smoothing, self.weighs, self.by_number = gamma, smoothing, weighs, by_number
        self.register_buffer("weights", None)
        self.diagnostics: dict[str, Tensor] = {}

    def weigh(self, subjects_of_class: Tensor) -> None:
        """Weigh the K classes by the numbers of their training subjects (K,): N / (K n_c), if weights are balanced."""
        if self.weighs == "balanced":
            counts = subjects_of_class.double()
            self.weights = (counts.sum() / (len(counts) * counts)).float()

    def forward(self, scores: Tensor, classes: Tensor | None, progress: float) -> Tensor:
        """The loss; UserError for scores that are not (B, V, K), or without classes."""
        if scores.ndim != 3 or classes is None:
            raise UserError(
                f"a loss of classes compares scores (B, V, K) with classes (B,), got {tuple(scores.shape)}"
            )
        with without_autocast(scores):
            gathered, labels = gather_batch(scores.float(), classes.detach().reshape(-1))
            if labels is None:
                raise UserError("a loss of classes needs classes")
            views = gathered.shape[1]
            log_nk = F.log_softmax(gathered.flatten(0, 1), dim=1)
            target_n = labels.to(log_nk.device).long().repeat_interleave(views)
            kinds = log_nk.shape[1]
            weights_k = log_nk.new_ones(kinds) if self.weights is None else self.weights
            target_nk = F.one_hot(target_n, kinds).to(log_nk.dtype)
            smoothed_nk = target_nk * (1 - self.smoothing) + self.smoothing / kinds
            cost_n = -(weights_k * smoothed_nk * log_nk).sum(dim=1)
            if self.gamma > 0:
                certain_n = log_nk.exp().gather(1, target_n[:, None])[:, 0]
                cost_n = cost_n * (1 - certain_n) ** self.gamma
            over = cost_n.new_tensor(float(len(cost_n))) if self.by_number else weights_k[target_n].sum()
        return cost_n.sum() / over.clamp(min=torch.finfo(cost_n.dtype).tiny)


class _ClassSettings(LossSettings):
    """What every loss of classes can be given."""

    class_weights: ClassWeights = Field(
        "none",
        description="balanced: a class weighs as much as all others, by its number of training subjects",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="share of the target that all classes divide among them"
    )
    reference: Literal["soft_targets"] | None = Field(
        None,
        description="soft_targets: as published for system C, the weighted sum is divided by the number of views and "
        "not by the sum of their weights; None: the formula",
    )


class CrossEntropy(_ClassSettings):
    """Cross-entropy of the true class."""

    name: Literal["cross_entropy"] = "cross_entropy"

    def build(self, epochs: int | None = None) -> ClassLoss:
        """The loss module."""
        by_number = self.reference is not None
        return ClassLoss(0.0, self.label_smoothing, self.class_weights, by_number=by_number)


class Focal(_ClassSettings):
    """Focal loss: what is predicted well already counts less."""

    name: Literal["focal"] = "focal"
    gamma: float = Field(2.0, gt=0, le=10, description="how much less; 2 is published")

    def build(self, epochs: int | None = None) -> ClassLoss:
        """The loss module."""
        by_number = self.reference is not None
        return ClassLoss(self.gamma, self.label_smoothing, self.class_weights, by_number=by_number)
