"""Masked autoencoding: blocks of a brain are hidden, and the network paints them back.

After He et al. 2022 (arXiv 2111.06377). For convolutions hidden voxels are 0, as in SparK (Tian et al. 2023, arXiv
2301.03580) without its sparse arithmetic; 0 is the mean of normalised brains. After an encoder the decoder is light, so
that what is learnt is in the encoder; a U-Net paints by its own decoder, which a segmentation can begin with, too.

Shape suffixes: B subjects, V views, C channels, X, Y, Z, E embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, cast

import numpy as np
import torch
from pydantic import Field
from torch import nn

from core.errors import UserError
from core.evaluation.splits import Rows
from core.models import Encoder, build_encoder
from core.models.dense import DenseModel, build_dense_model, mean_inside
from core.models.reconstruction import ReconstructionDecoder, ReconstructionKind, check_doublings
from core.models.settings import EncoderOrUNetSettings, SwinSettings, UNetSettings
from core.run_settings import Frozen
from core.tasks.pretraining import Pretraining, PretrainingSettings, describe_loss
from core.tasks.task import Facts, Step
from core.volumes.views import ViewSettings, make_views
from core.volumes.views.masks import MaskSettings, hide_blocks

FEATURES, LEVELS = 64, 5
"""Features of a voxel from which a U-Net paints it, and steps of its decoder: all."""


class DecoderSettings(Frozen):
    """What paints the volume back from the features."""

    kind: ReconstructionKind = Field(
        "transposed",
        description="transposed: five doublings, the lightest; interpolated: with instance norm, as in Swin UNETR; "
        "large_kernel: one step of 32 voxels",
    )


class ReconstructionSettings(Frozen):
    """What is asked of the painted volume."""

    name: Literal["masked"] = "masked"
    voxels: Literal["hidden", "brain"] = Field(
        "hidden", description="which voxels count: those that were hidden, or all of the brain"
    )
    norm: Literal["l1", "l2"] = Field("l2", description="absolute or squared differences")


class MaskedSettings(PretrainingSettings):
    """The settings of masked autoencoding."""

    task: str = "masked_pretraining"
    views: ViewSettings = ViewSettings(count=1)
    masks: MaskSettings = MaskSettings()
    model: EncoderOrUNetSettings = SwinSettings()
    decoder: DecoderSettings = DecoderSettings()
    objective: ReconstructionSettings = ReconstructionSettings()


class MaskedModel(nn.Module):
    """Encoder and decoder."""

    def __init__(self, encoder: Encoder, decoder: ReconstructionDecoder) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, volumes_bcxyz: torch.Tensor) -> torch.Tensor:
        """(B, C, X, Y, Z) -> the painted volumes (B, C, X, Y, Z)."""
        x, y, z = volumes_bcxyz.shape[2:]
        painted_bcxyz: torch.Tensor = self.decoder(self.encoder.feature_map(volumes_bcxyz), (x, y, z))
        return painted_bcxyz

    def embed(self, volumes_bcxyz: torch.Tensor) -> torch.Tensor:
        """The embedding (B, E) of the encoder."""
        embedding_be: torch.Tensor = self.encoder(volumes_bcxyz)
        return embedding_be


class MaskedUNet(nn.Module):
    """A U-Net that paints from the features of every voxel."""

    def __init__(self, dense: DenseModel, channels: int) -> None:
        super().__init__()
        self.dense = dense
        self.paint = nn.Conv3d(FEATURES, channels, kernel_size=1)
        self.parts = {part: tuple(f"dense.{name}" for name in names) for part, names in dense.parts.items()}

    def forward(self, volumes_bcxyz: torch.Tensor) -> torch.Tensor:
        """(B, C, X, Y, Z) -> the painted volumes (B, C, X, Y, Z)."""
        # In one call, which parallel training counts.
        together = volumes_bcxyz.shape[0] * volumes_bcxyz.shape[-1]
        painted_bcxyz: torch.Tensor = self.paint(self.dense.of_volumes(volumes_bcxyz, "dense", together))
        return painted_bcxyz

    def embed(self, volumes_bcxyz: torch.Tensor) -> torch.Tensor:
        """The mean deepest features of the brain (B, E)."""
        return mean_inside(self.dense.of_volumes(volumes_bcxyz, "encoder").float(), volumes_bcxyz)


class ReconstructionError(nn.Module):
    """The mean difference over the voxels that count; background, which is exactly 0, never counts."""

    def __init__(self, settings: ReconstructionSettings) -> None:
        super().__init__()
        self.settings = settings

    def forward(
        self, painted_bcxyz: torch.Tensor, original_bcxyz: torch.Tensor, hidden_b1xyz: torch.Tensor
    ) -> torch.Tensor:
        """(B, C, X, Y, Z) twice, and (B, 1, X, Y, Z) bool -> (B,); 0 for a volume of which no voxel counts."""
        counts = original_bcxyz != 0
        if self.settings.voxels == "hidden":
            counts = counts & hidden_b1xyz
        difference = painted_bcxyz.float() - original_bcxyz.float()
        size = difference.abs() if self.settings.norm == "l1" else difference.square()
        total_b = (size * counts).flatten(1).sum(1)
        return total_b / counts.flatten(1).sum(1).clamp(min=1)


class MaskedPretraining(Pretraining[MaskedSettings]):
    """See the top of this file."""

    about = describe_loss("masked_pretraining", "reconstruction loss")
    settings = MaskedSettings

    def check(self, settings: MaskedSettings) -> None:
        """Refuse encoders whose features are not 32 times coarser than the volume."""
        super().check(settings)
        if not isinstance(settings.model, UNetSettings):
            check_doublings(settings.model, self.about.name)
        elif settings.decoder != DecoderSettings():
            raise UserError(
                f"decoder.kind={settings.decoder.kind} cannot act: {settings.model.name} paints by its own decoder; "
                "remove it, or use an encoder such as swin"
            )
        if settings.views.count != 1:
            raise UserError(
                f"views.count={settings.views.count} cannot act: masked_pretraining hides one view of every scan; set "
                "views.count=1"
            )

    def build(self, settings: MaskedSettings, in_channels: int, facts: Facts) -> MaskedModel | MaskedUNet:
        """The model of `settings`, on the CPU, with PyTorch's current random state."""
        if isinstance(settings.model, UNetSettings):
            dense = build_dense_model(settings.model, in_channels, FEATURES, LEVELS, is_global=False)
            return MaskedUNet(dense, in_channels)
        encoder = build_encoder(settings.model, in_channels)
        return MaskedModel(
            encoder, ReconstructionDecoder(encoder.embedding_dim, in_channels, settings.decoder.kind)
        )

    def objective(self, settings: MaskedSettings, facts: Facts) -> nn.Module:
        """What is asked of the painted volume."""
        return ReconstructionError(settings.objective)

    def views(
        self, settings: MaskedSettings, volumes_bcxyz: torch.Tensor, rows: Rows, epoch: int, seed: int
    ) -> dict[str, torch.Tensor]:
        """A view `original` (B, C, X, Y, Z), `hidden` in blocks, and `where` it is (B, 1, X, Y, Z) bool."""
        original_bcxyz = make_views(volumes_bcxyz, rows, epoch, seed, settings.views)[:, 0]
        hidden_bcxyz, where_b1xyz = hide_blocks(original_bcxyz, rows, epoch, seed, settings.masks)
        return {"hidden": hidden_bcxyz, "original": original_bcxyz, "where": where_b1xyz}

    def step(
        self,
        model: nn.Module,
        objective: nn.Module,
        seen: Mapping[str, torch.Tensor],
        targets_b: torch.Tensor,
        progress: float,
    ) -> Step:
        """The loss of one batch."""
        losses_b: torch.Tensor = objective(model(seen["hidden"]), seen["original"], seen["where"])
        return Step(losses_b.mean())

    def losses(self, settings: MaskedSettings, model: nn.Module, volumes_bcxyz: torch.Tensor) -> torch.Tensor:
        """The loss (B,) of every scan, all hidden at the same places."""
        alike = np.zeros(len(volumes_bcxyz), dtype=np.int64)
        hidden_bcxyz, where_b1xyz = hide_blocks(volumes_bcxyz, alike, 0, 0, settings.masks)
        painted_bcxyz = model(hidden_bcxyz)
        losses_b: torch.Tensor = ReconstructionError(settings.objective)(
            painted_bcxyz, volumes_bcxyz, where_b1xyz
        )
        return losses_b

    def embed(self, settings: MaskedSettings, model: nn.Module, volumes_bcxyz: torch.Tensor) -> torch.Tensor:
        """The embedding (B, E) of the encoder, of which nothing is hidden."""
        return cast(MaskedModel | MaskedUNet, model).embed(volumes_bcxyz)
