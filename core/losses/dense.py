"""Constrained contrastive learning: patches attract where they share a cluster of tissue contrast.

Umapathy et al. 2023. Each image is its own batch: an anchor patch is contrasted with the patches nearest
to it in embedding space, those of its cluster attracting and the rest repelling. That is Dynamic Localised
Repulsion at the scale of patches, so the number of nearest follows the same schedules.

Shape suffixes: B images, D embedding, P patches of an image, A anchors, K nearest patches of an anchor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from core.errors import UserError
from core.losses.gather import mean_over_ranks
from core.losses.members import LossSettings
from core.losses.neighbourhood import Neighbours
from core.losses.pairwise import NOTHING, log_sum_exp, without_autocast
from core.schedules import Constant, Schedule, with_epochs

PUBLISHED_EPSILON = 1e-7
SMALLEST_KINSHIP = 1e-4
"""The sum of weights below which an anchor has nobody to attract."""


class ConstrainedContrast(LossSettings):
    """Settings of the constrained contrastive loss; the defaults are the published ones."""

    name: Literal["constrained_contrast"] = "constrained_contrast"
    temperature: Schedule = Field(Constant(value=0.1), description="divides the cosine similarity; above 0")
    form: Literal["pairwise", "setwise"] = Field(
        "pairwise", description="a denominator for each positive, or one numerator summing all positives"
    )
    neighbours: Neighbours = Field(
        Neighbours(start=101, end=101, shape="linear"),
        description="nearest patches an anchor is contrasted with, itself counted; counts or fractions of P",
    )
    anchors: int = Field(20, ge=1, description="foreground patches of each image drawn as anchors")
    patch: int = Field(1, ge=1, description="a patch has this many voxels a side")
    joined: Literal["averaged", "concatenated"] = Field(
        "averaged",
        description="what becomes of the features of its voxels; published: concatenated, for organs",
    )
    bandwidth: Schedule | None = Field(
        None,
        description="width of a Gaussian kernel between the mean intensities of clusters, in SDs of the image: "
        "clusters that look alike attract, too; above 0; none: only the own cluster, as published",
    )
    reference: Literal["ccl"] | None = Field(
        None,
        description="ccl: as published, the anchor is its own positive and 1e-7 is added in the logarithm",
    )

    @model_validator(mode="after")
    def _metric_acts(self) -> ConstrainedContrast:
        if self.neighbours.metric != "cosine":
            raise ValueError(
                f"nearest patches are by cosine similarity, got metric '{self.neighbours.metric}'"
            )
        if self.bandwidth is not None and min(self.bandwidth(0.0), self.bandwidth(1.0)) <= 0:
            raise ValueError("bandwidth must be above 0 from the beginning of the training to its end")
        if self.bandwidth is not None and self.reference is not None:
            raise ValueError("the published loss has no kernel between clusters: give bandwidth or reference")
        return self

    def build(self, epochs: int | None = None) -> nn.Module:
        """The loss module; `epochs` fills in schedules that count epochs and were not told how many."""
        if epochs is None:
            return ConstrainedContrastLoss(self)
        known = {
            "temperature": with_epochs(self.temperature, epochs),
            "neighbours": self.neighbours.with_epochs(epochs),
            "bandwidth": None if self.bandwidth is None else with_epochs(self.bandwidth, epochs),
        }
        return ConstrainedContrastLoss(self.model_copy(update=known))


class ConstrainedContrastLoss(nn.Module):
    """loss(features, clusters, foreground, progress) -> scalar."""

    def __init__(self, settings: ConstrainedContrast) -> None:
        super().__init__()
        self.settings = settings
        self.diagnostics: dict[str, Tensor] = {}

    def forward(
        self,
        features: Tensor,
        clusters: Tensor,
        foreground: Tensor,
        progress: float,
        anchors: Tensor | None = None,
        images: Tensor | None = None,
    ) -> Tensor:
        """The mean over anchors of all images.

        features (B, D, H, W) or (B, D, X, Y, Z); clusters, whole numbers, and foreground, boolean, of shape
        (B, …) on the grid of the features, or on one finer by a whole factor, reduced by majority vote.
        anchors (B, A) are flat patch indices, negative for no anchor; by default they are drawn from the foreground.
        images (B, C, …) on the grid of the clusters are needed for a kernel between these.
        Under torch.distributed every rank must call. Raises UserError for shapes that do not fit.
        """
        settings = self.settings
        _check_shapes(features, clusters, foreground)
        with without_autocast(features):
            features = features if features.dtype == torch.float64 else features.float()
            join = average_patches if settings.joined == "averaged" else concatenate_patches
            pooled = join(features, settings.patch)
            grid = tuple(pooled.shape[2:])
            # The map may be finer than the features, and a patch of them takes whole voxels of it.
            factor = settings.patch * max(1, clusters.shape[1] // features.shape[2])
            cluster_bp = majority_vote(clusters, grid, 1 + int(clusters.max()), factor).flatten(1)
            if anchors is None:
                foreground_bp = majority_vote(foreground.long(), grid, 2, factor).flatten(1) > 0
                anchors = draw_anchors(foreground_bp, settings.anchors)
            nearest = settings.neighbours.count(cluster_bp.shape[1], progress)
            kinship_bkk = None
            if settings.bandwidth is not None:
                if images is None:
                    raise UserError(
                        "constrained_contrast: bandwidth needs the images, of which clusters have means"
                    )
                kinship_bkk = cluster_kernel(images, clusters, foreground, settings.bandwidth(progress))
            loss_ba, used_ba = patch_loss(
                pooled.flatten(2),
                cluster_bp,
                anchors,
                settings,
                nearest,
                settings.temperature(progress),
                kinship_bkk,
            )
            total, used = loss_ba.sum(), used_ba.sum()
        self.diagnostics = {
            "anchors_used": used,
            "anchors_dropped": used_ba.numel() - used,
            "neighbours": total.detach().new_full((), nearest),
            "temperature": total.detach().new_full((), settings.temperature(progress)),
        }
        return mean_over_ranks(total, used)

    def extra_repr(self) -> str:
        """Every setting."""
        return repr(self.settings)


def patch_loss(
    features_bdp: Tensor,
    cluster_bp: Tensor,
    anchor_ba: Tensor,
    settings: ConstrainedContrast,
    nearest: int,
    temperature: float,
    kinship_bkk: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss (B, A) of every anchor and whether it is used: it has a positive among its nearest patches.

    With w the kinship of two clusters (`cluster_kernel`; without it 1 for equal ones and 0 for others), anchor a and
    its nearest patches N have the loss Σ_{p∈N} w_ap ℓ_ap / Σ_{p∈N} w_ap, ℓ_ap = −log e^{s_ap} / (e^{s_ap} +
    Σ_{k∈N} (1 − w_ak) e^{s_ak}); set-wise −log Σ_p w_ap e^{s_ap} / Σ_p e^{s_ap}.
    """
    drawn_ba = anchor_ba >= 0
    anchor_ba = anchor_ba.clamp(min=0)
    s_bap = anchor_similarity(features_bdp, anchor_ba) / temperature
    published = settings.reference == "ccl"
    if not published:
        s_bap = s_bap.scatter(2, anchor_ba[..., None], NOTHING)
    count = min(max(nearest - (not published), 1), s_bap.shape[2])
    s_bak, near_bak = s_bap.topk(count, dim=2, sorted=False)
    anchors_cluster_ba = cluster_bp.gather(1, anchor_ba)
    near_cluster_bak = cluster_bp.gather(1, near_bak.flatten(1)).view_as(near_bak)
    is_patch_bak = s_bak > NOTHING / 2
    if kinship_bkk is not None:
        image_b11 = torch.arange(len(kinship_bkk), device=s_bak.device)[:, None, None]
        weight_bak = kinship_bkk[image_b11, anchors_cluster_ba[..., None], near_cluster_bak] * is_patch_bak
        return _weighted_loss(s_bak, weight_bak, is_patch_bak, drawn_ba, settings.form)
    positive_bak = (near_cluster_bak == anchors_cluster_ba[..., None]) & is_patch_bak
    repulsion_ba = log_sum_exp(s_bak.masked_fill(positive_bak, NOTHING), 2)
    used_ba = drawn_ba & positive_bak.any(2)
    if published and features_bdp.shape[2] <= nearest:
        used_ba = torch.zeros_like(used_ba)
    epsilon = PUBLISHED_EPSILON if published else 0.0
    if settings.form == "setwise":
        attraction_ba = log_sum_exp(s_bak.masked_fill(~positive_bak, NOTHING), 2)
        loss_ba = _minus_log_share(attraction_ba, repulsion_ba, epsilon)
    else:
        loss_bak = _minus_log_share(s_bak, repulsion_ba[..., None], epsilon)
        loss_ba = loss_bak.masked_fill(~positive_bak, 0.0).sum(2) / positive_bak.sum(2).clamp(min=1)
    return loss_ba.masked_fill(~used_ba, 0.0), used_ba


def _weighted_loss(
    s_bak: Tensor, weight_bak: Tensor, is_patch_bak: Tensor, drawn_ba: Tensor, form: str
) -> tuple[Tensor, Tensor]:
    """`patch_loss` with a weight in [0, 1] for every pair."""
    against_bak = (1 - weight_bak) * is_patch_bak
    repulsion_ba = log_sum_exp((s_bak + against_bak.log()).clamp(min=NOTHING), 2)
    total_ba = weight_bak.sum(2)
    # Weights that are nothing but rounding would choose one patch at random.
    used_ba = drawn_ba & (total_ba > SMALLEST_KINSHIP)
    if form == "setwise":
        attraction_ba = log_sum_exp((s_bak + weight_bak.log()).clamp(min=NOTHING), 2)
        loss_ba = _minus_log_share(attraction_ba, repulsion_ba, 0.0)
    else:
        loss_bak = _minus_log_share(s_bak, repulsion_ba[..., None], 0.0)
        loss_ba = (weight_bak * loss_bak).masked_fill(weight_bak == 0, 0.0).sum(2)
        loss_ba = loss_ba / total_ba.clamp(min=SMALLEST_KINSHIP)
    return loss_ba.masked_fill(~used_ba, 0.0), used_ba


@torch.no_grad()
def cluster_kernel(images: Tensor, clusters: Tensor, foreground: Tensor, bandwidth: float) -> Tensor:
    """exp(−d² / 2h²) (B, K, K) of the clusters 0 to K − 1 of every image, 1 of each with itself.

    d is the root mean square over channels of the difference of their mean intensities, in SDs of the image's
    foreground, and h the `bandwidth` in the same unit.

    Raises:
        UserError: the bandwidth is not above 0, or images (B, C, …) and clusters (B, …) differ in their grid.
    """
    if bandwidth <= 0:
        raise UserError(f"constrained_contrast: bandwidth must be above 0, got {bandwidth:g}")
    if images.shape[2:] != clusters.shape[1:]:
        raise UserError(
            f"constrained_contrast: images {tuple(images.shape)} and clusters {tuple(clusters.shape)} must have one "
            "grid"
        )
    values_bcn, cluster_bn = images.flatten(2).float(), clusters.flatten(1)
    inside_b1n = foreground.flatten(1)[:, None].float()
    voxels_b11 = inside_b1n.sum(2, keepdim=True).clamp(min=1)
    mean_bc1 = (values_bcn * inside_b1n).sum(2, keepdim=True) / voxels_b11
    variance_bc1 = ((values_bcn - mean_bc1) ** 2 * inside_b1n).sum(2, keepdim=True) / voxels_b11
    scaled_bcn = (values_bcn - mean_bc1) / variance_bc1.sqrt().clamp(min=1e-6)
    count = 1 + int(clusters.max())
    index_bcn = cluster_bn[:, None].expand_as(scaled_bcn)
    sums_bck = scaled_bcn.new_zeros(*scaled_bcn.shape[:2], count).scatter_add_(2, index_bcn, scaled_bcn)
    members_b1k = scaled_bcn.new_zeros(len(scaled_bcn), 1, count).scatter_add_(
        2, cluster_bn[:, None], torch.ones_like(scaled_bcn[:, :1])
    )
    centre_bkc = (sums_bck / members_b1k.clamp(min=1)).transpose(1, 2)
    squared_bkk = ((centre_bkc[:, :, None] - centre_bkc[:, None]) ** 2).mean(3)
    return torch.exp(-squared_bkk / (2 * bandwidth**2))


class _AnchorSimilarity(torch.autograd.Function):
    """Cosine similarity of anchors with every patch; the backward pass touches the patches twice, not seven times.

    With n = 1/|f| and s_ap = n_a n_p f_a · f_p, the gradient of f_p is Σ_a g_ap (n_p f_a n_a − s_ap n_p² f_p),
    and the same for the anchors, which are patches too.
    """

    @staticmethod
    def forward(context: Any, features_bdp: Tensor, anchor_ba: Tensor) -> Tensor:
        inverse_bp = 1 / (features_bdp * features_bdp).sum(1).sqrt().clamp(min=1e-12)
        index_bda = anchor_ba[:, None].expand(-1, features_bdp.shape[1], -1)
        unit_bda = features_bdp.gather(2, index_bda) * inverse_bp.gather(1, anchor_ba)[:, None]
        s_bap = (unit_bda.transpose(1, 2) @ features_bdp).mul_(inverse_bp[:, None])
        context.save_for_backward(features_bdp, inverse_bp, unit_bda, index_bda, s_bap)
        return s_bap

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient_bap: Tensor) -> tuple[Tensor, None]:
        features_bdp, inverse_bp, unit_bda, index_bda, s_bap = context.saved_tensors
        scaled_bap = gradient_bap * inverse_bp[:, None]
        shared_bap = gradient_bap * s_bap
        result_bdp = unit_bda @ scaled_bap
        result_bdp.addcmul_(features_bdp, (shared_bap.sum(1) * inverse_bp**2)[:, None], value=-1)
        to_anchor_bda = features_bdp @ scaled_bap.transpose(1, 2) - unit_bda * shared_bap.sum(2)[:, None]
        to_anchor_bda = to_anchor_bda * inverse_bp.gather(1, index_bda[:, 0])[:, None]
        return result_bdp.scatter_add_(2, index_bda, to_anchor_bda), None


def anchor_similarity(features_bdp: Tensor, anchor_ba: Tensor) -> Tensor:
    """Cosine similarity (B, A, P) of anchors, by patch index, with the patches of their image."""
    apply: Callable[[Tensor, Tensor], Tensor] = _AnchorSimilarity.apply
    return apply(features_bdp, anchor_ba)


def _minus_log_share(attraction: Tensor, repulsion: Tensor, epsilon: float) -> Tensor:
    """−log(e^a / (e^a + e^r) + ε)."""
    loss = F.softplus(repulsion - attraction)
    return loss if epsilon == 0 else -torch.logaddexp(-loss, torch.full_like(loss, math.log(epsilon)))


@torch.no_grad()
def draw_anchors(foreground_bp: Tensor, count: int) -> Tensor:
    """(B, A) indices of foreground patches, drawn without replacement; −1 where there are too few."""
    score_bp = torch.rand(foreground_bp.shape, device=foreground_bp.device).masked_fill(~foreground_bp, -1.0)
    score_ba, anchor_ba = score_bp.topk(min(count, foreground_bp.shape[1]), dim=1)
    return anchor_ba.masked_fill(score_ba < 0, -1)


def average_patches(features: Tensor, patch: int) -> Tensor:
    """Features (B, D, …) averaged over non-overlapping patches; a remainder at the far side is left out."""
    if patch == 1:
        return features
    return (F.avg_pool2d if features.ndim == 4 else F.avg_pool3d)(features, patch)


def concatenate_patches(features: Tensor, patch: int) -> Tensor:
    """Features (B, D, …) of all voxels of a patch behind each other (B, D patch^n, …); as `average_patches` else."""
    if patch == 1:
        return features
    sides = [side // patch for side in features.shape[2:]]
    cut = features
    for axis, side in enumerate(sides, start=2):
        cut = cut.narrow(axis, 0, side * patch)
    apart = cut.reshape(*features.shape[:2], *(size for side in sides for size in (side, patch)))
    spatial = range(2, apart.ndim)
    within, across = [axis for axis in spatial if axis % 2], [axis for axis in spatial if not axis % 2]
    return apart.permute(0, 1, *within, *across).flatten(1, 1 + len(within))


@torch.no_grad()
def majority_vote(ids: Tensor, grid: tuple[int, ...], classes: int, factor: int) -> Tensor:
    """Ids (B, …) on a grid that is coarser by `factor`: the most frequent id of each patch, the smaller one in a tie.

    A remainder at the far side is left out, as of the features.
    """
    fine = tuple(ids.shape[1:])
    if tuple(size // factor for size in fine) != grid:
        raise UserError(
            f"constrained_contrast: maps must be on the grid of the features {grid} or finer by one whole "
            f"factor, got {fine}"
        )
    if factor == 1:
        return ids
    for axis, side in enumerate(grid, start=1):
        ids = ids.narrow(axis, 0, side * factor)
    pool = F.avg_pool2d if len(grid) == 2 else F.avg_pool3d
    votes = [pool((ids == each).float()[:, None], factor)[:, 0] for each in range(classes)]
    # argmax gives the first of equals.
    return torch.stack(votes).argmax(dim=0)


def _check_shapes(features: Tensor, clusters: Tensor, foreground: Tensor) -> None:
    if features.ndim not in (4, 5):
        raise UserError(
            f"constrained_contrast: features must be (B, D, H, W) or (B, D, X, Y, Z), got {tuple(features.shape)}"
        )
    for what, given in (("clusters", clusters), ("foreground", foreground)):
        if given.ndim != features.ndim - 1 or given.shape[0] != features.shape[0]:
            raise UserError(
                f"constrained_contrast: {what} must have shape (B, …) with {features.ndim - 2} spatial "
                f"dimensions and B = {features.shape[0]}, got {tuple(given.shape)}"
            )
