"""Losses of voxels: loss(scores (B, K, X, Y, Z), classes (B, X, Y, Z), progress); class `IGNORED` counts nowhere.

All but the cross-entropy are MONAI's, on probabilities and targets from which ignored voxels are taken out. Scores are
logits; class 0 is the background. Of regions that overlap the targets are 0 and 1 of each (B, K, X, Y, Z), without a
background, and every region has a probability of its own. They are computed in float32, and each is a mean over the
volumes of a batch.
"""

from __future__ import annotations

import copy
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from monai.losses.dice import DiceLoss
from monai.losses.focal_loss import FocalLoss
from monai.losses.tversky import TverskyLoss
from pydantic import Field
from torch import Tensor, nn

from core.errors import UserError
from core.losses.members import LossSettings
from core.losses.pairwise import without_autocast

IGNORED = -1
"""The class of voxels of which nothing is known."""
ClassWeights = Annotated[
    tuple[Annotated[float, Field(ge=0)], ...] | None,
    Field(description="of the background and every class, in order; all alike if absent"),
]
Background = Annotated[
    bool, Field(description="whether the overlap of the background counts, too, as that of a class")
]


class CrossEntropy(LossSettings):
    """Mean over voxels of -log p of their class, the published loss of system B."""

    name: Literal["cross_entropy"] = "cross_entropy"
    class_weights: ClassWeights = None
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target that all classes share")

    def build(self, epochs: int | None = None) -> nn.Module:
        """The loss module."""
        return VoxelLoss(cross_entropy=self)


class Dice(LossSettings):
    """1 - 2 Σ p t / (Σ p + Σ t), mean over classes; `squared` has p^2 and t^2 below (Milletari et al. 2016)."""

    name: Literal["dice"] = "dice"
    squared: bool = Field(False, description="squares in the denominator")
    background: Background = False

    def build(self, epochs: int | None = None) -> nn.Module:
        """The loss module."""
        return VoxelLoss(overlap=DiceLoss(include_background=self.background, squared_pred=self.squared))


class DiceCrossEntropy(LossSettings):
    """Dice and cross-entropy together, the loss of nnU-Net."""

    name: Literal["dice_cross_entropy"] = "dice_cross_entropy"
    dice_weight: float = Field(1.0, gt=0, description="of Dice; the cross-entropy has 1")
    squared: bool = Field(False, description="squares in the denominator")
    background: Background = False
    class_weights: ClassWeights = None
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="of the cross-entropy")

    def build(self, epochs: int | None = None) -> nn.Module:
        """The loss module."""
        entropy = CrossEntropy(class_weights=self.class_weights, label_smoothing=self.label_smoothing)
        dice = DiceLoss(include_background=self.background, squared_pred=self.squared)
        return VoxelLoss(cross_entropy=entropy, overlap=dice, weight=self.dice_weight)


class Tversky(LossSettings):
    """1 - TP / (TP + α FP + (1 - α) FN), mean over classes (Salehi et al. 2017); α = 0.5 is Dice."""

    name: Literal["tversky"] = "tversky"
    alpha: float = Field(0.3, gt=0, lt=1, description="of false positives; false negatives have the rest")
    background: Background = False

    def build(self, epochs: int | None = None) -> nn.Module:
        """The loss module."""
        return VoxelLoss(
            overlap=TverskyLoss(include_background=self.background, alpha=self.alpha, beta=1 - self.alpha)
        )


class Focal(LossSettings):
    """Mean over voxels of (1 - p)^γ · -log p (Lin et al. 2017): what is predicted well already counts less."""

    name: Literal["focal"] = "focal"
    gamma: float = Field(2.0, gt=0, le=10, description="how much less; 2 is published")

    def build(self, epochs: int | None = None) -> nn.Module:
        """The loss module."""
        return VoxelLoss(focal=FocalLoss(gamma=self.gamma, use_softmax=True, reduction="none"))


SegmentationLoss = Annotated[
    CrossEntropy | Dice | DiceCrossEntropy | Tversky | Focal, Field(discriminator="name")
]


class VoxelLoss(nn.Module):
    """The sum of its parts, each of which leaves ignored voxels out."""

    class_weights: Tensor | None

    def __init__(
        self,
        *,
        cross_entropy: CrossEntropy | None = None,
        overlap: nn.Module | None = None,
        focal: FocalLoss | None = None,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.cross_entropy, self.overlap, self.focal, self.weight = cross_entropy, overlap, focal, weight
        # Regions have no background that could be left out, and probabilities that do not compete.
        self.overlap_of_regions = _without_background(overlap)
        self.focal_of_regions = None if focal is None else FocalLoss(gamma=focal.gamma, reduction="none")
        given = None if cross_entropy is None else cross_entropy.class_weights
        self.register_buffer("class_weights", None if given is None else torch.tensor(given))
        self.diagnostics: dict[str, Tensor] = {}

    def forward(self, scores: Tensor, classes: Tensor, progress: float) -> Tensor:
        """The loss; its parts are in `diagnostics`. 0 if every voxel is ignored.

        Raises:
            UserError: another number of class weights than of classes.
        """
        kinds, are_regions = scores.shape[1], classes.ndim == scores.ndim
        if self.class_weights is not None and len(self.class_weights) != kinds:
            among = "" if are_regions else ", the background among them"
            raise UserError(
                f"objective.class_weights has {len(self.class_weights)} weights for {kinds} classes{among}"
            )
        with without_autocast(scores):
            exact = scores.float()
            target = classes.long()
            known = target != IGNORED
            parts = {}
            if self.cross_entropy is not None:
                parts["cross_entropy"] = (self._of_regions if are_regions else self._cross_entropy)(
                    exact, target, known
                )
            if self.overlap is not None or self.focal is not None:
                inside = (known if are_regions else known[:, None]).to(exact.dtype)
                hot = target if are_regions else F.one_hot(target.clamp(min=0), kinds).movedim(-1, 1)
                one_hot = hot.to(exact.dtype) * inside
            overlap = self.overlap_of_regions if are_regions else self.overlap
            if overlap is not None:
                probabilities = exact.sigmoid() if are_regions else exact.softmax(dim=1)
                parts["overlap"] = self.weight * overlap(probabilities * inside, one_hot)
            focal = self.focal_of_regions if are_regions else self.focal
            if focal is not None:
                cost = focal(exact, one_hot) * inside
                parts["focal"] = cost.sum() / inside.sum().clamp(min=1)
        self.diagnostics = {name: part.detach() for name, part in parts.items()} if len(parts) > 1 else {}
        return torch.stack(list(parts.values())).sum()

    def _of_regions(self, scores: Tensor, target: Tensor, known: Tensor) -> Tensor:
        """The mean over regions and voxels of -log p of being inside, or outside."""
        assert self.cross_entropy is not None
        smoothing = self.cross_entropy.label_smoothing
        wanted = target.clamp(min=0).to(scores.dtype) * (1 - smoothing) + smoothing / 2
        weights = torch.ones(scores.shape[1], device=scores.device)
        if self.class_weights is not None:
            weights = self.class_weights.to(scores)
        weights_bkxyz = weights.view(1, -1, 1, 1, 1) * known
        cost = F.binary_cross_entropy_with_logits(scores, wanted, reduction="none") * weights_bkxyz
        return cost.sum() / weights_bkxyz.sum().clamp(min=1e-6)

    def _cross_entropy(self, scores: Tensor, target: Tensor, known: Tensor) -> Tensor:
        assert self.cross_entropy is not None
        if not known.any():
            return scores.sum() * 0
        return F.cross_entropy(
            scores,
            target,
            self.class_weights,
            ignore_index=IGNORED,
            label_smoothing=self.cross_entropy.label_smoothing,
        )


def _without_background(overlap: nn.Module | None) -> nn.Module | None:
    """The same overlap, whose first channel counts."""
    if overlap is None:
        return None
    of_regions = copy.deepcopy(overlap)
    of_regions.include_background = True  # type: ignore[assignment]
    return of_regions
