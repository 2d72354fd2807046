"""Losses of self-supervised tasks: anatomical contrast, left–right symmetry, rotation and inpainting.

Anatomical contrast follows Chaitanya et al. (arXiv 2006.10511), as used by Umapathy et al. 2023; the others
are those of symmetry-aware Swin (bitMyron/sa-swin). All are computed in float32 inside autocast, and their
gradients under DDP are those of one process that holds the whole batch; every rank must call.

Shape suffixes: V views of the anchor, U views of the contrasted row, B and C subjects, D embedding.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from core.errors import UserError
from core.losses.gather import gather_batch, mean_over_ranks
from core.losses.members import LossSettings
from core.losses.pairwise import NOTHING, check_batch, log_sum_exp, without_autocast
from core.schedules import Constant, Schedule, with_epochs


class Anatomical(LossSettings):
    """Settings of the anatomical loss: views of a slice attract, slices of its own partition are spared."""

    name: Literal["anatomical"] = "anatomical"
    temperature: Schedule = Field(Constant(value=0.1), description="divides the cosine similarity; above 0")

    def build(self, epochs: int | None = None) -> nn.Module:
        """The loss module, called as loss(embeddings (B, V, D), partitions (B,), progress)."""
        known = self.temperature if epochs is None else with_epochs(self.temperature, epochs)
        return AnatomicalLoss(self.model_copy(update={"temperature": known}))


class Symmetry(LossSettings):
    """Settings of the symmetry loss between a brain and its mirror image.

    cosine_nce: binary cross-entropy of the cosine as a logit. siamese: mean of 1 − c for the healthy and c
    for the others. group: the healthy against all subjects, in one softmax over the batch. margin: squared
    distance for the healthy, squared shortfall from a margin for the others (Hadsell et al. 2006).
    """

    name: Literal["symmetry"] = "symmetry"
    form: Literal["cosine_nce", "siamese", "group", "margin"] = Field(
        "cosine_nce", description="which of the four losses"
    )
    temperature: Schedule | None = Field(None, description="divides the cosine; group only; None: 0.07")
    margin: float | None = Field(None, gt=0, description="distance asked of the others; margin only; None: 2")

    @model_validator(mode="after")
    def _settings_act(self) -> Symmetry:
        for setting, form in (("temperature", "group"), ("margin", "margin")):
            if getattr(self, setting) is not None and self.form != form:
                raise ValueError(f"{setting} acts only with form '{form}', got form '{self.form}'")
        return self

    def build(self, epochs: int | None = None) -> nn.Module:
        """The loss module, called as loss(embeddings (B, 2, D), healthy (B,), progress)."""
        known = self.temperature
        if known is not None and epochs is not None:
            known = with_epochs(known, epochs)
        return SymmetryLoss(self.model_copy(update={"temperature": known}))


class Rotation(LossSettings):
    """Settings of the rotation loss: which quarter turn a volume was given."""

    name: Literal["rotation"] = "rotation"

    def build(self, epochs: int | None = None) -> nn.Module:
        """The loss module, called as loss(logits (B, V, 4), turns (B, V), progress)."""
        return RotationLoss()


class Inpainting(LossSettings):
    """Settings of the inpainting loss: mean absolute error of the restored volume."""

    name: Literal["inpainting"] = "inpainting"

    def build(self, epochs: int | None = None) -> nn.Module:
        """The loss module, called as loss(restored (B, …), original (B, …), progress)."""
        return InpaintingLoss()


class AnatomicalLoss(nn.Module):
    """−log(e^p / (e^p + Σ e^n)) over ordered pairs of views, negatives from other partitions only."""

    def __init__(self, settings: Anatomical) -> None:
        super().__init__()
        self.settings = settings
        self.diagnostics: dict[str, Tensor] = {}

    def forward(self, embeddings: Tensor, partitions: Tensor, progress: float) -> Tensor:
        """The mean over ordered pairs, embeddings (B, V, D) and partitions (B,) as whole numbers.

        Partition g of a slice is where it lies along the body, so two slices of one partition look alike.
        The published loss is 20 times this mean (a sum over two positives, times 10).
        """
        check_batch("anatomical", embeddings, partitions)
        temperature = self.settings.temperature(progress)
        with without_autocast(embeddings):
            z_bvd = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
            z_bvd, gathered = gather_batch(z_bvd, partitions.reshape(-1).to(z_bvd.device))
            partition_b = partitions if gathered is None else gathered
            loss_vbu, used_vb = anatomical_terms(z_bvd.transpose(0, 1), partition_b, temperature)
        pairs = loss_vbu.shape[2] * used_vb.sum()
        self.diagnostics = {
            "anchors_used": used_vb.sum(),
            "anchors_dropped": used_vb.numel() - used_vb.sum(),
            "temperature": z_bvd.detach().new_full((), temperature),
        }
        return (loss_vbu * used_vb[..., None]).sum() / pairs.clamp(min=1)


def anatomical_terms(z_vbd: Tensor, partition_b: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Loss (V, B, V − 1) of every ordered pair of views, and which anchors (V, B) have both kinds of pair."""
    views, subjects, _ = z_vbd.shape
    z_vbd = F.normalize(z_vbd, dim=-1)
    s_vbuc = torch.einsum("vbd,ucd->vbuc", z_vbd, z_vbd) / temperature
    other_bc = partition_b[:, None] != partition_b
    repulsion_vb = log_sum_exp(s_vbuc.masked_fill(~other_bc[None, :, None], NOTHING).flatten(2), 2)
    s_vbu = s_vbuc.diagonal(dim1=1, dim2=3).transpose(1, 2)
    positive_vu = ~torch.eye(views, dtype=torch.bool, device=z_vbd.device)
    order_vu = positive_vu.float().argsort(dim=1, descending=True)[:, : views - 1]
    s_vbp = s_vbu.gather(2, order_vu[:, None].expand(-1, subjects, -1))
    used_vb = other_bc.any(1).expand(views, -1) & (views > 1)
    return F.softplus(repulsion_vb[..., None] - s_vbp), used_vb


class SymmetryLoss(nn.Module):
    """The left–right similarity of a brain, high for the healthy and low for the others."""

    def __init__(self, settings: Symmetry) -> None:
        super().__init__()
        self.settings = settings
        self.diagnostics: dict[str, Tensor] = {}

    def forward(self, embeddings: Tensor, healthy: Tensor, progress: float) -> Tensor:
        """The loss of embeddings (B, 2, D), brain and mirror image, and healthy (B,), 1 or 0.

        If all subjects are healthy, or none is, `group` has nothing to compare and is a zero on the graph.
        """
        check_batch("symmetry", embeddings, healthy)
        if embeddings.shape[1] != 2:
            raise UserError(
                f"symmetry compares two sides, embeddings (B, 2, D), got {tuple(embeddings.shape)}"
            )
        with without_autocast(embeddings):
            z_bvd = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
            h_b = healthy.reshape(-1).to(z_bvd)
            if self.settings.form == "group":
                z_bvd, gathered = gather_batch(z_bvd, h_b)
                h_b = h_b if gathered is None else gathered
                return self._group(F.cosine_similarity(z_bvd[:, 0], z_bvd[:, 1]), h_b, progress)
            loss_b = self._by_subject(z_bvd, h_b)
        self.diagnostics = {"anchors_used": h_b.new_full((), h_b.numel())}
        return mean_over_ranks(loss_b.sum(), h_b.new_full((), h_b.numel()))

    def _by_subject(self, z_bvd: Tensor, h_b: Tensor) -> Tensor:
        if self.settings.form == "margin":
            margin = 2.0 if self.settings.margin is None else self.settings.margin
            apart_b = torch.linalg.vector_norm(z_bvd[:, 0] - z_bvd[:, 1], dim=1)
            loss_b: Tensor = h_b * apart_b**2 + (1 - h_b) * (margin - apart_b).clamp(min=0) ** 2
            return loss_b
        c_b = F.cosine_similarity(z_bvd[:, 0], z_bvd[:, 1])
        if self.settings.form == "siamese":
            return (1 - h_b) * c_b + h_b * (1 - c_b)
        return F.binary_cross_entropy_with_logits(c_b, h_b, reduction="none")

    def _group(self, c_b: Tensor, h_b: Tensor, progress: float) -> Tensor:
        temperature = 0.07 if self.settings.temperature is None else self.settings.temperature(progress)
        self.diagnostics = {"anchors_used": h_b.sum(), "temperature": c_b.detach().new_full((), temperature)}
        if c_b.numel() == 0:
            return c_b.sum()
        s_b = c_b / temperature
        loss = log_sum_exp(s_b, 0) - log_sum_exp(s_b.masked_fill(h_b <= 0, NOTHING), 0)
        return torch.where((h_b > 0).any(), loss, 0.0 * s_b.sum())


class RotationLoss(nn.Module):
    """Cross-entropy of the quarter turn."""

    def forward(self, logits: Tensor, turns: Tensor, progress: float) -> Tensor:
        """The mean over volumes, logits (B, V, 4) and turns (B, V) in 0 … 3."""
        if logits.ndim != 3 or logits.shape[2] != 4 or turns.shape != logits.shape[:2]:
            raise UserError(
                f"rotation: logits must be (B, V, 4) and turns (B, V), got {tuple(logits.shape)} and "
                f"{tuple(turns.shape)}"
            )
        with without_autocast(logits):
            exact = logits if logits.dtype == torch.float64 else logits.float()
            total = F.cross_entropy(exact.flatten(0, 1), turns.flatten().long(), reduction="sum")
        return mean_over_ranks(total, total.new_full((), turns.numel()))


class InpaintingLoss(nn.Module):
    """Mean absolute error against the volume before it was corrupted."""

    def forward(self, restored: Tensor, original: Tensor, progress: float) -> Tensor:
        """The mean over voxels; both of one shape (B, …), original rotated as the input was."""
        if restored.shape != original.shape:
            raise UserError(
                f"inpainting: restored and original must have one shape, got {tuple(restored.shape)} and "
                f"{tuple(original.shape)}"
            )
        with without_autocast(restored):
            exact = restored if restored.dtype == torch.float64 else restored.float()
            total = (exact - original.to(exact.dtype)).abs().sum()
        return mean_over_ranks(total, total.new_full((), restored.numel()))
