"""Symmetry-aware pre-training: a head is compared with its mirror image (system C), in a mixture of pretext losses.

Rotation, contrast, inpainting and symmetry are those of symmetry-aware Swin (bitMyron/sa-swin, spec.md C.1 to C.3);
masked autoencoding can join them. Each part is on or off, has a weight that may change over the training, and costs
nothing while it is off. What counts is what the features are good for, which probes of several columns say together.

Shape suffixes: B scans, V views, S sides (a head, then its mirror image), N = B x V, C channels, X, Y, Z, E embedding,
D projection.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from sklearn.metrics import roc_auc_score
from torch import nn

from core.errors import UserError
from core.evaluation import Floats
from core.evaluation.by_subject import subject_means
from core.evaluation.splits import Rows, Splits
from core.lookup import did_you_mean
from core.losses.members import SimCLR
from core.losses.pretext import Inpainting, Rotation, Symmetry
from core.models import Encoder, build_encoder
from core.models.heads import ClassHead, ProjectionHead
from core.models.reconstruction import ReconstructionDecoder, check_doublings
from core.models.settings import ModelSettings, SymmetrySwinSettings
from core.models.swin import SymmetrySwinEncoder, pool
from core.objectives import Metric
from core.run_settings import DataSettings, Frozen
from core.schedules import Constant, Schedule, with_epochs
from core.task_description import TaskDescription
from core.tasks.classification import class_name
from core.tasks.masked_pretraining import DecoderSettings, ReconstructionError, ReconstructionSettings
from core.tasks.pretraining import (
    PROBES,
    Pretraining,
    PretrainingSettings,
    ProbesSettings,
    describe_loss,
    probes_of,
)
from core.tasks.task import Facts, Judging, Labels, Observed, Outcome, Prediction, Step, Truth
from core.volumes.images.mirror import mirror_image
from core.volumes.views import ViewSettings, make_views
from core.volumes.views.masks import MaskSettings, hide_blocks
from core.volumes.views.patches import PatchSettings, corrupt
from core.volumes.views.turns import quarter_turns

HEALTHY, JUDGED, ASYMMETRY, ASYMMETRY_AUC = "healthy", "healthy to judge", "asymmetry", "asymmetry_auc"
OWN, MIRROR = range(2)
"""The two sides."""
ROTATION, CONTRAST, INPAINTING, SYMMETRY, MASKED = "rotation", "contrast", "inpainting", "symmetry", "masked"
PROJECTION = 512
"""Length of the projections of system C."""
Weight = Field(Constant(value=1.0), description="factor of this loss in the sum; 0 is off, and costs nothing")


class SymmetryData(DataSettings):
    """What is taken from the cohort: also who is healthy."""

    diagnosis: str = Field(
        "", description="column that says who is healthy; if it is not given, everyone is taken to be"
    )
    healthy: tuple[str, ...] = Field(
        ("healthy",), min_length=1, description="the values of it that mean healthy"
    )


class AsymmetrySettings(ProbesSettings):
    """How the features are judged: also by the asymmetry of people who are ill."""

    disease: str = Field(
        "",
        description="column that says who is healthy (data.healthy), for the AUC of the asymmetry alone: nothing is "
        "trained on it",
    )


class RotationPart(Rotation):
    """Which quarter turn a head was given."""

    weight: Schedule = Weight


class ContrastPart(SimCLR):
    """NT-Xent between two views of every head."""

    weight: Schedule = Weight
    temperature: Schedule = Field(Constant(value=0.5), description="divides the cosine similarity; above 0")


class InpaintingPart(Inpainting):
    """The head before blocks of it were replaced."""

    weight: Schedule = Weight


class SymmetryPart(Symmetry):
    """How alike a head and its mirror image are: the mean over views, the published 0.5 times the sum over two."""

    weight: Schedule = Weight


class MaskedPart(ReconstructionSettings):
    """Masked autoencoding: blocks of a view of its own are hidden, in both sides alike."""

    weight: Schedule = Weight
    blocks: MaskSettings = MaskSettings()


class MixtureSettings(Frozen):
    """The pretext losses, each absent if it is off (null)."""

    rotation: RotationPart | None = RotationPart()
    contrast: ContrastPart | None = ContrastPart()
    inpainting: InpaintingPart | None = InpaintingPart()
    symmetry: SymmetryPart | None = SymmetryPart()
    masked: MaskedPart | None = None

    @model_validator(mode="after")
    def _one_is_on(self) -> MixtureSettings:
        if not self.parts:
            raise ValueError(f"no loss is on; set one of {', '.join(type(self).model_fields)}")
        return self

    @property
    def parts(self) -> dict[str, Any]:
        """The losses that are on, by name."""
        given = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: part for name, part in given.items() if part is not None}


class SymmetrySettings(PretrainingSettings):
    """The settings of symmetry-aware pre-training; the defaults are those of system C."""

    task: str = "symmetry_pretraining"
    data: SymmetryData = SymmetryData()
    views: ViewSettings = ViewSettings(count=1)
    patches: PatchSettings = PatchSettings()
    model: ModelSettings = SymmetrySwinSettings()
    decoder: DecoderSettings = DecoderSettings(kind="interpolated")
    objective: MixtureSettings = MixtureSettings()
    evaluation: AsymmetrySettings = AsymmetrySettings()


class SymmetryModel(nn.Module):
    """An encoder of a head and of its mirror image, a head for each loss that is on, and a decoder.

    Args:
        encoder: with attention to the mirror image, or without.
        channels: C.
        parts: names of the losses that are on.
        decoder: its kind.
    """

    def __init__(
        self, encoder: Encoder, channels: int, parts: frozenset[str], decoder: DecoderSettings
    ) -> None:
        super().__init__()
        self.encoder = encoder
        wide = encoder.embedding_dim
        heads: dict[str, nn.Module] = {}
        if ROTATION in parts:
            heads[ROTATION] = ClassHead(wide, 4)
        for name in parts & {CONTRAST, SYMMETRY}:
            heads[name] = ProjectionHead(wide, PROJECTION, "linear")
        self.heads = nn.ModuleDict(dict(sorted(heads.items())))
        paints = bool(parts & {INPAINTING, MASKED})
        self.decoder = ReconstructionDecoder(wide, channels, decoder.kind) if paints else None

    def forward(
        self, own_ncxyz: torch.Tensor, mirrored_ncxyz: torch.Tensor, wanted: frozenset[str]
    ) -> dict[str, torch.Tensor]:
        """What the losses `wanted` need of heads and their mirror images (N, C, X, Y, Z), by their names.

        rotation (N, 4), contrast (N, D), symmetry (N, 2, D), inpainting and masked (N, C, X, Y, Z).
        """
        own_nexyz, other_nexyz = self._features(own_ncxyz, mirrored_ncxyz, both=SYMMETRY in wanted)
        found: dict[str, torch.Tensor] = {}
        if SYMMETRY in wanted:
            assert other_nexyz is not None
            # Features that have not seen the other side: with attention between them both sides would look alike.
            sides = [self.heads[SYMMETRY](self._pooled(each, 1)) for each in (own_nexyz, other_nexyz)]
            found[SYMMETRY] = torch.stack(sides, dim=1)
        if not wanted - {SYMMETRY}:
            return found
        seen_nexyz = own_nexyz
        if isinstance(self.encoder, SymmetrySwinEncoder):
            assert other_nexyz is not None
            seen_nexyz = self.encoder.attention(own_nexyz, other_nexyz)
        if ROTATION in wanted:
            found[ROTATION] = self.heads[ROTATION](self._pooled(seen_nexyz, 0))
        if CONTRAST in wanted:
            found[CONTRAST] = self.heads[CONTRAST](self._pooled(seen_nexyz, 1))
        for name in wanted & {INPAINTING, MASKED}:
            assert self.decoder is not None
            x, y, z = own_ncxyz.shape[2:]
            found[name] = self.decoder(seen_nexyz, (x, y, z))
        return found

    def sides(self, own_bcxyz: torch.Tensor, mirrored_bcxyz: torch.Tensor) -> torch.Tensor:
        """What is compared of a head and its mirror image (B, 2, D): projections, or features if none is trained."""
        own_bexyz, other_bexyz = self._features(own_bcxyz, mirrored_bcxyz, both=True)
        assert other_bexyz is not None
        pooled = [self._pooled(each, 1).float() for each in (own_bexyz, other_bexyz)]
        head = self.heads[SYMMETRY] if SYMMETRY in self.heads else nn.Identity()
        return torch.stack([head(each) for each in pooled], dim=1)

    def embed(self, own_bcxyz: torch.Tensor, mirrored_bcxyz: torch.Tensor) -> torch.Tensor:
        """The embedding (B, E) of whole heads."""
        if isinstance(self.encoder, SymmetrySwinEncoder):
            seen_be: torch.Tensor = self.encoder(own_bcxyz, mirrored_bcxyz)
            return seen_be
        plain_be: torch.Tensor = self.encoder(own_bcxyz)
        return plain_be

    def _features(
        self, own_ncxyz: torch.Tensor, mirrored_ncxyz: torch.Tensor, *, both: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Features (N, E, x, y, z) of both sides; of the mirror image only where something needs them."""
        if isinstance(self.encoder, SymmetrySwinEncoder):
            return self.encoder.feature_maps(own_ncxyz, mirrored_ncxyz)
        if not both:
            return self.encoder.feature_map(own_ncxyz), None
        features = self.encoder.feature_map(torch.cat([own_ncxyz, mirrored_ncxyz]))
        return features[: len(own_ncxyz)], features[len(own_ncxyz) :]

    def _pooled(self, features_nexyz: torch.Tensor, token: int) -> torch.Tensor:
        """(N, E): the mean, or the published token of a head: 0 of rotation, 1 of contrast and symmetry."""
        swin = self.encoder.swin if isinstance(self.encoder, SymmetrySwinEncoder) else self.encoder
        return pool(features_nexyz, getattr(swin, "pooling", "mean"), token)


class Mixture(nn.Module):
    """The losses that are on, and their weights."""

    def __init__(self, settings: MixtureSettings, rounds: int) -> None:
        super().__init__()
        self.weights = {name: with_epochs(part.weight, rounds) for name, part in settings.parts.items()}
        self.losses = nn.ModuleDict(
            {
                name: ReconstructionError(part) if isinstance(part, MaskedPart) else part.build(rounds)
                for name, part in settings.parts.items()
            }
        )

    def on(self, progress: float) -> dict[str, float]:
        """The weight of every loss that is on at this progress."""
        weights = {name: weight(progress) for name, weight in self.weights.items()}
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # Parallel training wants a gradient of every parameter in every step.
            return weights
        return {name: weight for name, weight in weights.items() if weight != 0}


class SymmetryPretraining(Pretraining[SymmetrySettings]):
    """See the top of this file."""

    about = describe_loss("symmetry_pretraining", "pretext loss").model_copy(
        update={"course": (ROTATION, CONTRAST, INPAINTING, SYMMETRY, MASKED)}
    )
    settings = SymmetrySettings

    def describe(self, settings: SymmetrySettings) -> TaskDescription:
        """With the area under the ROC curve of the asymmetry, where someone is known to be ill."""
        about, diagnosis = super().describe(settings), settings.data.diagnosis
        if not diagnosis and settings.objective.symmetry is not None:
            caveat = "No column says who is healthy (data.diagnosis): the symmetry loss took everyone to be."
            about = about.model_copy(update={"caveats": (*about.caveats, caveat)})
        if not (settings.evaluation.disease or diagnosis):
            return about
        supervised = diagnosis and settings.objective.symmetry is not None
        title = "AUC of the asymmetry for disease" + (", on which it was trained" if supervised else "")
        metric = Metric(title=title, better="high")
        return about.model_copy(
            update={
                "metrics": about.metrics | {ASYMMETRY_AUC: metric},
                "objectives": (*about.objectives, ASYMMETRY_AUC),
                "shown": (*about.shown, ASYMMETRY_AUC),
            }
        )

    def check(self, settings: SymmetrySettings) -> None:
        """Refuse what cannot act together."""
        super().check(settings)
        parts = frozenset(settings.objective.parts)
        if parts & {INPAINTING, MASKED}:
            check_doublings(settings.model, self.about.name)
        if settings.views.count > 1 and settings.objective.contrast is None:
            raise UserError(
                f"views.count={settings.views.count} cannot act without objective.contrast: a head is seen once; set "
                "views.count=1"
            )
        if settings.views.count > 2:
            raise UserError(f"views.count={settings.views.count}: the contrast is of two views; use 1 (both of one "
                            "crop, as published) or 2 (a crop each)")  # fmt: skip
        if settings.views.quarter_turns is not None:
            raise UserError(
                "views.quarter_turns cannot act: objective.rotation turns heads itself, and has to know how far"
            )
        if isinstance(settings.model, SymmetrySwinSettings) and parts == {SYMMETRY}:
            raise UserError(
                "objective.symmetry compares features from before the cross-attention, which nothing would train; use "
                "model.name=swin, or add another loss"
            )

    def check_grid(self, settings: SymmetrySettings, grid: tuple[int, int, int]) -> list[str]:
        """Refuse volumes of which one voxel of features is left; say what is padded."""
        size = settings.views.crop_size
        kept = grid if size is None else (size,) * 3 if isinstance(size, int) else size
        x, y, z = (min(side, whole) for side, whole in zip(kept, grid, strict=True))
        notes = []
        if settings.objective.rotation is not None and y != z:
            notes.append(
                f"heads of {x} x {y} x {z} voxels are padded to {x} x {max(y, z)} x {max(y, z)}: quarter turns need "
                "equal front-back and up-down sides"
            )
            y = z = max(y, z)
        coarse = [-(-side // 32) for side in (x, y, z)]
        paints = {INPAINTING, MASKED} & set(settings.objective.parts)
        if paints and settings.decoder.kind == "interpolated" and math.prod(coarse) == 1:
            raise UserError(
                f"volumes of {x} x {y} x {z} voxels leave one voxel of features, which decoder.kind=interpolated "
                "cannot normalise; use decoder.kind=transposed, larger patches (views.crop_size) or a finer cohort"
            )
        if getattr(settings.model, "pooling", "mean") == "corner" and math.prod(coarse) == 1:
            raise UserError(
                f"volumes of {x} x {y} x {z} voxels leave one token of features, and model.pooling=corner reads two; "
                "use model.pooling=mean"
            )
        if any(side % 32 for side in (x, y, z)):
            notes.append(
                f"{settings.model.name} halves volumes five times: {x} x {y} x {z} voxels are padded with zeros inside "
                f"it to {' x '.join(str(32 * side) for side in coarse)}"
            )
        return notes

    def more_labels(self, settings: SymmetrySettings, manifest: pd.DataFrame) -> dict[str, Labels]:
        """Also who is healthy (1), ill (0) or not known (NaN), for the loss and for the AUC of the asymmetry."""
        diagnosis = settings.data.diagnosis
        return {
            **super().more_labels(settings, manifest),
            HEALTHY: healthy_of(settings, manifest, diagnosis),
            JUDGED: healthy_of(settings, manifest, settings.evaluation.disease or diagnosis),
        }

    def check_cohort(self, settings: SymmetrySettings, manifest: pd.DataFrame, splits: Splits) -> None:
        """Refuse a training by itself of which nothing can be judged."""
        super().check_cohort(settings, manifest, splits)
        if set(settings.objective.parts) == {CONTRAST} and not probes_of(settings):
            raise UserError(
                "the contrast of one scan by itself has no loss to judge by: name what is read from the features "
                f"({PROBES}), or add another loss"
            )

    def targets(self, truth: Truth, facts: Facts) -> npt.NDArray[np.generic]:
        """Who is healthy (N,): 1, 0, or NaN where it is not known."""
        return truth.more[HEALTHY].astype(np.float32)

    def build(self, settings: SymmetrySettings, in_channels: int, facts: Facts) -> SymmetryModel:
        """The model of `settings`, on the CPU, with PyTorch's current random state."""
        parts = frozenset(settings.objective.parts)
        encoder = build_encoder(settings.model, in_channels)
        return SymmetryModel(encoder, in_channels, parts, settings.decoder)

    def objective(self, settings: SymmetrySettings, facts: Facts) -> nn.Module:
        """The losses that are on."""
        return Mixture(settings.objective, settings.training.rounds)

    def views(
        self, settings: SymmetrySettings, volumes_bcxyz: torch.Tensor, rows: Rows, epoch: int, seed: int
    ) -> dict[str, torch.Tensor]:
        """Heads and their mirror images, of what the losses that are on need.

        input (B, V, 2, C, X, Y, Z): turned and corrupted; original (B, V, C, X, Y, Z): turned only; turns (B, V);
        masked (B, 3, C, X, Y, Z): hidden, and its mirror image, and not hidden; hidden (B, 1, X, Y, Z).
        """
        pairs_bvscxyz = self._pairs(settings, volumes_bcxyz, rows, epoch, seed)
        parts, count = settings.objective, 1 if settings.objective.contrast is None else 2
        inputs, originals, turns = [], [], []
        for view in range(count):
            pair_bscxyz = pairs_bvscxyz[:, min(view, pairs_bvscxyz.shape[1] - 1)]
            turn_b = torch.zeros(len(rows), dtype=torch.int64, device=volumes_bcxyz.device)
            if parts.rotation is not None:
                pair_bscxyz, turn_b = quarter_turns(pair_bscxyz, rows, epoch, seed, view=view)
            originals.append(pair_bscxyz[:, OWN])
            turns.append(turn_b)
            inputs.append(_corrupted(settings.patches, pair_bscxyz, rows, epoch, seed, view))
        seen = {
            "input": torch.stack(inputs, 1), "original": torch.stack(originals, 1), "turns": torch.stack(turns, 1),
        }  # fmt: skip
        if parts.masked is not None:
            seen |= _hidden(parts.masked, pairs_bvscxyz[:, 0], rows, epoch, seed)
        return seen

    def _pairs(
        self, settings: SymmetrySettings, volumes_bcxyz: torch.Tensor, rows: Rows, epoch: int, seed: int
    ) -> torch.Tensor:
        """Crops of heads and the same crops of their mirror images (B, V, 2, C, X, Y, Z), changed alike."""
        channels = volumes_bcxyz.shape[1]
        # As channels both sides are cropped, moved and recoloured together.
        both_bcxyz = torch.cat([volumes_bcxyz, mirror_image(volumes_bcxyz)], dim=1)
        seen_bvcxyz = make_views(both_bcxyz, rows, epoch, seed, settings.views)
        pairs = torch.stack([seen_bvcxyz[:, :, :channels], seen_bvcxyz[:, :, channels:]], dim=2)
        return _with_equal_sides(pairs) if settings.objective.rotation is not None else pairs

    def step(
        self,
        model: nn.Module,
        objective: nn.Module,
        seen: Mapping[str, torch.Tensor],
        targets_b: torch.Tensor,
        progress: float,
    ) -> Step:
        """The weighted sum of the losses that are on."""
        losses = self._losses(model, cast(Mixture, objective), seen, targets_b, progress)
        weights = cast(Mixture, objective).on(progress)
        total = torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()
        off = total.detach().new_full((), math.nan)
        return Step(
            total, {name: losses[name].detach() if name in losses else off for name in self.about.course}
        )

    def _losses(
        self,
        model: nn.Module,
        mixture: Mixture,
        seen: Mapping[str, torch.Tensor],
        healthy_b: torch.Tensor,
        progress: float,
    ) -> dict[str, torch.Tensor]:
        """Every loss that is on, without its weight."""
        wanted, losses = frozenset(mixture.on(progress)), mixture.losses
        scans, views = seen["input"].shape[:2]
        found: dict[str, torch.Tensor] = {}
        of_views = wanted - {MASKED}
        if of_views:
            inputs_nscxyz = seen["input"].flatten(0, 1)
            given = model(inputs_nscxyz[:, OWN], inputs_nscxyz[:, MIRROR], of_views)
            if ROTATION in given:
                found[ROTATION] = losses[ROTATION](
                    given[ROTATION].view(scans, views, -1), seen["turns"], progress
                )
            if CONTRAST in given:
                found[CONTRAST] = losses[CONTRAST](given[CONTRAST].view(scans, views, -1), None, progress)
            if INPAINTING in given:
                found[INPAINTING] = losses[INPAINTING](
                    given[INPAINTING], seen["original"].flatten(0, 1), progress
                )
            if SYMMETRY in given:
                healthy_n = healthy_b[:, None].expand(scans, views).flatten()
                known_n = ~torch.isnan(healthy_n)
                found[SYMMETRY] = losses[SYMMETRY](given[SYMMETRY][known_n], healthy_n[known_n], progress)
        if MASKED in wanted:
            hidden, mirrored, original = seen[MASKED].unbind(1)
            painted = model(hidden, mirrored, frozenset([MASKED]))[MASKED]
            found[MASKED] = losses[MASKED](painted, original, seen["hidden"]).mean()
        return found

    def losses(
        self, settings: SymmetrySettings, model: nn.Module, volumes_bcxyz: torch.Tensor
    ) -> torch.Tensor:
        """The loss (B,) of every scan by itself, at the weights of the end; not the contrast, which needs others.

        Everyone is taken to be healthy: of the symmetry the loss says how alike both sides are.
        """
        alone = settings.model_copy(
            update={
                "views": ViewSettings(count=1),
                "patches": settings.patches.model_copy(update={"swap": 0.0}),
                "objective": settings.objective.model_copy(update={CONTRAST: None}),
            }
        )
        if not alone.objective.parts:
            return torch.zeros(len(volumes_bcxyz), device=volumes_bcxyz.device)
        mixture = Mixture(alone.objective, 1).to(volumes_bcxyz.device)
        weights = mixture.on(1.0)
        found = []
        for volume_cxyz in volumes_bcxyz:
            seen = self.views(alone, volume_cxyz[None], np.zeros(1, dtype=np.int64), 0, 0)
            healthy = torch.ones(1, device=volumes_bcxyz.device)
            losses = self._losses(model, mixture, seen, healthy, 1.0)
            parts = [weights[name] * loss.float() for name, loss in losses.items()]
            found.append(torch.stack(parts).sum() if parts else torch.zeros((), device=volumes_bcxyz.device))
        return torch.stack(found)

    def embed(
        self, settings: SymmetrySettings, model: nn.Module, volumes_bcxyz: torch.Tensor
    ) -> torch.Tensor:
        """The embedding (B, E) of whole heads, of which nothing is changed."""
        return cast(SymmetryModel, model).embed(volumes_bcxyz, mirror_image(volumes_bcxyz))

    def observe(
        self, settings: SymmetrySettings, model: nn.Module, volumes_bcxyz: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Also the asymmetry (1 - c) / 2 of every head (B,), with c the cosine between both sides."""
        seen = super().observe(settings, model, volumes_bcxyz)
        sides_bsd = cast(SymmetryModel, model).sides(volumes_bcxyz, mirror_image(volumes_bcxyz))
        cosine_b = F.cosine_similarity(sides_bsd[:, OWN].float(), sides_bsd[:, MIRROR].float())
        return {**seen, ASYMMETRY: (1 - cosine_b) / 2}

    def judge(
        self, settings: SymmetrySettings, training: Observed, evaluation: Observed, judging: Judging
    ) -> Outcome:
        """The probes, and how well the asymmetry by itself tells who is ill."""
        found = super().judge(settings, training, evaluation, judging)
        scores = np.asarray(evaluation.outputs[ASYMMETRY], dtype=np.float64)
        if settings.evaluation.disease or settings.data.diagnosis:
            found.metrics[ASYMMETRY_AUC] = _area(scores, evaluation)
        found.predictions[ASYMMETRY] = scores
        return found

    def predictions(
        self, settings: SymmetrySettings, outputs: Mapping[str, Floats], fitted: str | None, facts: Facts
    ) -> pd.DataFrame:
        """The asymmetry, and what the first probe predicts, if there is one."""
        if not probes_of(settings):
            return pd.DataFrame({ASYMMETRY: np.asarray(outputs[ASYMMETRY], dtype=np.float64)})
        table = super().predictions(settings, outputs, fitted, facts)
        return table.assign(**{ASYMMETRY: np.asarray(outputs[ASYMMETRY], dtype=np.float64)})

    def present(
        self, predictions: pd.DataFrame, truth: Labels | None, calibration: str | None, facts: Facts
    ) -> Prediction:
        """What the first probe predicts, for people, and the asymmetry."""
        shown = pd.DataFrame({ASYMMETRY: [f"{value:.4f}" for value in predictions[ASYMMETRY]]})
        words = "The asymmetry is 0 where a head and its mirror image have the same features, and 1 at most."
        if "predicted" not in predictions:
            return Prediction(predictions, shown, words)
        of_probe = super().present(predictions.drop(columns=ASYMMETRY), truth, calibration, facts)
        return Prediction(
            of_probe.table.assign(**{ASYMMETRY: predictions[ASYMMETRY]}),
            pd.concat([of_probe.shown, shown], axis=1),
            f"{of_probe.how_to_read} {words}",
            of_probe.lacks,
        )

    def measure(
        self, presented: pd.DataFrame, truth: Truth, internal: Mapping[str, float]
    ) -> dict[str, float | str]:
        """How well the first probe predicts; without one how asymmetric people are."""
        if "predicted" in presented:
            return super().measure(presented, truth, internal)
        values = subject_means(presented[ASYMMETRY].to_numpy(float), truth.subjects)
        return {f"mean {ASYMMETRY}": float(values.mean())}


def healthy_of(settings: SymmetrySettings, manifest: pd.DataFrame, column: str) -> Labels:
    """Who is healthy (N,) by a column: 1, 0, or NaN where nobody knows; 1 for all without a column.

    Raises:
        UserError: there is no such column, or it has none of the values that mean healthy.
    """
    if not column:
        return np.ones(len(manifest))
    if column not in manifest:
        known = did_you_mean(column, map(str, manifest.columns))
        raise UserError(f"data.diagnosis, evaluation.disease: the cohort has no column '{column}'; {known}")
    names = [class_name(value) for value in manifest[column]]
    found = sorted({name for name in names if name is not None})
    if not set(settings.data.healthy) & set(found):
        raise UserError(
            f"data.healthy={','.join(settings.data.healthy)}: nobody has this in {column}, which has "
            f"{', '.join(found[:8]) or 'no value'}"
        )
    return np.array([math.nan if name is None else float(name in settings.data.healthy) for name in names])


def _corrupted(
    settings: PatchSettings, pair_bscxyz: torch.Tensor, rows: Rows, epoch: int, seed: int, view: int
) -> torch.Tensor:
    """The pair with replaced blocks, if any are to be replaced."""
    if settings.drop == 0 and settings.swap == 0:
        return pair_bscxyz
    if len(rows) == 1:
        # The last batch of an epoch may have one scan, which has nobody to take from.
        settings = settings.model_copy(update={"swap": 0.0})
    return corrupt(pair_bscxyz, rows, epoch, seed, settings, view=view)[0]


def _hidden(
    part: MaskedPart, pair_bscxyz: torch.Tensor, rows: Rows, epoch: int, seed: int
) -> dict[str, torch.Tensor]:
    """Blocks are hidden at the same places of both sides: so nothing can be copied from the mirror image."""
    own_bcxyz, mirrored_bcxyz = pair_bscxyz[:, OWN], pair_bscxyz[:, MIRROR]
    seen_bcxyz, where_b1xyz = hide_blocks(own_bcxyz, rows, epoch, seed, part.blocks)
    beside_bcxyz = mirrored_bcxyz.masked_fill(where_b1xyz, 0)
    return {MASKED: torch.stack([seen_bcxyz, beside_bcxyz, own_bcxyz], 1), "hidden": where_b1xyz}


def _with_equal_sides(pairs: torch.Tensor) -> torch.Tensor:
    """Zeros around the shorter of Y and Z (…, X, Y, Z), so that quarter turns about X are possible."""
    y, z = pairs.shape[-2:]
    more_y, more_z = max(z - y, 0), max(y - z, 0)
    if not more_y and not more_z:
        return pairs
    return F.pad(pairs, (more_z // 2, more_z - more_z // 2, more_y // 2, more_y - more_y // 2))


def _area(scores: Floats, evaluation: Observed) -> float:
    """The area under the ROC curve of the asymmetry for disease, over people; NaN if all are alike."""
    healthy = evaluation.more[JUDGED].astype(np.float64)
    known = ~np.isnan(healthy)
    people = evaluation.subjects[known]
    ill = 1 - np.asarray(subject_means(healthy[known], people))
    if len(np.unique(ill)) < 2:
        return math.nan
    return float(roc_auc_score(ill > 0.5, subject_means(scores[known], people)))
