"""Contrast-guided pre-training: patches attract where they share a cluster of tissue contrast (system D).

In slices (2D, published) or in patches of volumes (3D), for every network that segments. The clusters are those of a
constraint map that `derive --constraint` makes. Before, or instead of it, whole slices can be contrasted: SimCLR, or
anatomical contrast, whose negatives lie in other parts of the body. What the features are good for says a linear probe
of voxels, or a training that begins with them.

Shape suffixes: B scans, P slices or patches of each, V views, N = B x P images, C channels, H, W sides of a slice, X,
Y, Z, D features, S sampled voxels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from pydantic import Field
from torch import nn

from core.errors import UserError
from core.evaluation import Floats
from core.evaluation.case_tables import DICE, case_table, measured_cases
from core.evaluation.dense_probe import fit_dense_probe, sample_voxels
from core.evaluation.label_sets import LabelSets
from core.evaluation.splits import Rows, Splits
from core.losses.dense import ConstrainedContrast
from core.losses.members import SimCLR
from core.losses.pretext import Anatomical
from core.models.dense import DenseModel, build_dense_model, mean_inside
from core.models.settings import GroupNormUNetSettings, SegmenterSettings
from core.objectives import Metric
from core.run_settings import DataSettings, Frozen
from core.task_description import TaskDescription
from core.tasks.pretraining import (
    LOSS,
    PROBES,
    Pretraining,
    PretrainingSettings,
    ProbesSettings,
    describe_loss,
    probes_of,
)
from core.tasks.segmentation import ClassesOfMap, SegmentationData, places_in
from core.tasks.task import Beside, Facts, Judging, Labels, Observed, Outcome, Step, Truth, is_known
from core.volumes.cohort.description import has_map
from core.volumes.ingest.prepare import MOST_CLASSES
from core.volumes.views import ViewSettings, make_views_with_maps
from core.volumes.views.slices import SliceViewSettings, partition_slices, slice_views

CONSTRAINED, MOST_PICTURES = "constrained_contrast", 3
VOXELS, CLASSES, WEIGHTS, NAMES = "voxels", "classes", "weights", ("image", "clusters", "colours")


class ContrastData(DataSettings):
    """What is taken from the cohort: also the map that guides."""

    constraint: str = Field("", description="map of clusters, such as `derive --constraint` makes")


class SliceSettings(Frozen):
    """Which slices of a volume are images, for networks in 2D."""

    count: int = Field(
        4, ge=1, description="axial slices of every volume in a batch, one of each of as many parts"
    )


class FeatureSettings(Frozen):
    """The features of a voxel that are contrasted."""

    dimension: int = Field(64, ge=4, le=1024, multiple_of=4, description="their number, a multiple of 4")
    levels: int = Field(
        5,
        ge=1,
        le=5,
        description="steps of the decoder of groupnorm_unet: 5 is all of it, 3 published as partial",
    )


class WarmStartSettings(Frozen):
    """A global contrast of whole slices or patches before the constrained one, in the same training."""

    share: float = Field(0.2, gt=0, lt=1, description="of the training")
    objective: Annotated[SimCLR | Anatomical, Field(discriminator="name")] = SimCLR()


class DenseProbesSettings(ProbesSettings):
    """How the features are judged: by columns that are read from the embedding, or by a linear probe of voxels."""

    target: str = Field(
        "", description="map of classes that a linear probe reads from the features of voxels"
    )
    classes: ClassesOfMap = Field(
        SegmentationData().classes, description="NAME=NUMBER of every class in it; see data.classes"
    )
    voxels: int = Field(
        2048, ge=64, description="voxels of every scan that the probe is fitted, and judged, on"
    )


class ContrastSettings(PretrainingSettings):
    """The settings of contrast-guided pre-training; the defaults are those of system D."""

    task: str = "contrast_pretraining"
    data: ContrastData = ContrastData()
    slices: SliceSettings = SliceSettings()
    slice_views: SliceViewSettings = SliceViewSettings(count=2)
    views: ViewSettings = ViewSettings(count=1)
    model: SegmenterSettings = GroupNormUNetSettings()
    features: FeatureSettings = FeatureSettings()
    objective: Annotated[ConstrainedContrast | SimCLR | Anatomical, Field(discriminator="name")] = (
        ConstrainedContrast()
    )
    warm_start: WarmStartSettings | None = Field(
        None, description="a contrast of whole images before the constrained one; none: without"
    )
    evaluation: DenseProbesSettings = DenseProbesSettings()


class TwoPhases(nn.Module):
    """The losses of the training, one after the other."""

    def __init__(self, settings: ContrastSettings) -> None:
        super().__init__()
        rounds = settings.training.rounds
        warm = settings.warm_start
        self.share = 0.0 if warm is None else warm.share
        self.warm = None if warm is None else warm.objective.build(rounds)
        self.main = settings.objective.build(rounds)
        self.names = (None if warm is None else warm.objective.name, settings.objective.name)

    def at(self, progress: float) -> tuple[str, nn.Module, float]:
        """The name of the loss at this progress, the loss, and how far its own phase is."""
        if self.warm is not None and progress <= self.share:
            return cast(str, self.names[0]), self.warm, progress / self.share
        return cast(str, self.names[1]), self.main, (progress - self.share) / (1 - self.share)


class ContrastPretraining(Pretraining[ContrastSettings]):
    """See the top of this file."""

    about = describe_loss("contrast_pretraining", "contrastive loss").model_copy(
        update={"course": ("temperature", "neighbours", "anchors_used"), "figures": ("features",)}
    )
    settings = ContrastSettings

    def describe(self, settings: ContrastSettings) -> TaskDescription:
        """With the Dice of the dense probe, where a map is to be read."""
        about = super().describe(settings)
        about = about.model_copy(
            update={"course": self.about.course, "figures": (*about.figures, "features")}
        )
        if not settings.evaluation.target:
            return about
        dice = {"dice": Metric(title="Dice of a linear probe", better="high")}
        dice |= {
            f"dice_{name}": Metric(title=f"Dice of {name}", better="high")
            for name in classes_of(settings).sets
        }
        if probes_of(settings):
            return about.model_copy(
                update={
                    "metrics": about.metrics | dice,
                    "objectives": (*about.objectives, *dice),
                    "shown": (*about.shown, *dice),
                }
            )
        return about.model_copy(
            update={
                "metrics": dice | about.metrics,
                "objectives": (*dice, *about.objectives),
                "shown": tuple(dice),
                "error": Metric(title="1 - Dice"),
                "interval": "complement",
                "truth": "map",
                "caveats": (
                    f"The probe is judged on {settings.evaluation.voxels} voxels of every scan, weighted by how many "
                    "they stand for. It reads features that were not trained for it; a training that starts from "
                    "them may rank pre-trainings in another order.",
                ),
            }
        )

    def check(self, settings: ContrastSettings) -> None:
        """Refuse what cannot act together."""
        super().check(settings)
        objective, is_2d = settings.objective, isinstance(settings.model, GroupNormUNetSettings)
        if objective.name == CONSTRAINED and not settings.data.constraint:
            raise UserError(
                "data.constraint is not given: --set data.constraint=NAME names a map of clusters, which `brainsweep "
                "derive COHORT --constraint NAME` makes"
            )
        if objective.name != CONSTRAINED and settings.warm_start is not None:
            raise UserError(
                f"warm_start cannot act with objective.name={objective.name}, which contrasts whole images itself"
            )
        warm, training = settings.warm_start, settings.training
        if warm is not None and training.steps is None and warm.share * training.epochs < 1:
            raise UserError(
                f"warm_start.share={warm.share:g} of {training.epochs} epochs is less than one; use a larger share"
            )
        kinds = [objective.name] + (
            [] if settings.warm_start is None else [settings.warm_start.objective.name]
        )
        if "anatomical" in kinds and not is_2d:
            raise UserError(
                "the anatomical contrast is of slices in partitions of the body: use model.name=groupnorm_unet, or "
                "simclr"
            )
        if "anatomical" in kinds and settings.slices.count < 2:
            raise UserError("the anatomical contrast needs slices.count of 2 or more partitions")
        views = settings.slice_views.count + settings.slice_views.original if is_2d else settings.views.count
        if set(kinds) - {CONSTRAINED} and views < 2:
            where = "slice_views.count" if is_2d else "views.count"
            raise UserError(
                f"{where}={views}: whole images are contrasted with another view of theirs; set it to 2"
            )
        if not is_2d and settings.features.levels != 5:
            raise UserError("features.levels acts with model.name=groupnorm_unet only")
        if settings.evaluation.target:
            classes_of(settings)

    def needed_maps(self, settings: ContrastSettings) -> tuple[str, ...]:
        """The clusters, if they guide."""
        return (settings.data.constraint,) if settings.objective.name == CONSTRAINED else ()

    def maps_to_judge(self, settings: ContrastSettings) -> tuple[str, ...]:
        """Also the map that the probe reads."""
        target = settings.evaluation.target
        return (*self.needed_maps(settings), *((target,) if target else ()))

    def labels(self, settings: ContrastSettings, manifest: pd.DataFrame) -> Labels:
        """The map that the probe reads, where a scan has it; else as the other probes have it."""
        if not settings.evaluation.target or probes_of(settings):
            return super().labels(settings, manifest)
        having = has_map(manifest, settings.evaluation.target)
        return np.where(having, settings.evaluation.target, np.array(None, dtype=object))

    def check_cohort(self, settings: ContrastSettings, manifest: pd.DataFrame, splits: Splits) -> None:
        """Refuse a cohort without the maps."""
        super().check_cohort(settings, manifest, splits)
        target, probes = settings.evaluation.target, probes_of(settings)
        if settings.objective.name != CONSTRAINED and not target and not probes:
            raise UserError(
                f"the contrast of whole images has no loss of one scan to judge by: name a map (evaluation.target) or "
                f"columns ({PROBES}) that are read from the features"
            )
        subject = manifest["subject"].to_numpy(str)
        if settings.objective.name == CONSTRAINED:
            having = has_map(manifest, settings.data.constraint)
            if not having.all():
                raise UserError(
                    f"{subject[~having][0]} has no map {settings.data.constraint}; `brainsweep derive` makes it for "
                    "every scan"
                )
        if target and probes:
            lacking = is_known(self.labels(settings, manifest)) & ~has_map(manifest, target)
            if lacking.any():
                raise UserError(
                    f"{int(lacking.sum())} scans that {probes[0].column} is read from have no map {target}, such as "
                    f"{subject[lacking][0]}: judge by one of both"
                )

    def learn(self, settings: ContrastSettings, training: Truth) -> Facts:
        """What the probes must know."""
        return super().learn(settings, training)

    def build(self, settings: ContrastSettings, in_channels: int, facts: Facts) -> DenseModel:
        """The model of `settings`, on the CPU, with PyTorch's current random state."""
        kinds = {settings.objective.name} | (
            set() if settings.warm_start is None else {settings.warm_start.objective.name}
        )
        return build_dense_model(
            settings.model, in_channels, settings.features.dimension, settings.features.levels,
            is_global=bool(kinds - {CONSTRAINED}),
        )  # fmt: skip

    def objective(self, settings: ContrastSettings, facts: Facts) -> nn.Module:
        """The losses of both phases."""
        return TwoPhases(settings)

    def views_with_maps(
        self,
        settings: ContrastSettings,
        volumes_bcxyz: torch.Tensor,
        maps: Mapping[str, torch.Tensor],
        rows: Rows,
        epoch: int,
        seed: int,
    ) -> dict[str, torch.Tensor]:
        """Slices or patches `images` (B, P, C, …), their `clusters` (B, P, …), and `views` of them (B, P, V, C, …).

        `partitions` (B, P) says which part of the body a slice is of.
        """
        guide = maps.get(settings.data.constraint)
        clusters = torch.zeros_like(volumes_bcxyz[:, 0]) if guide is None else guide
        if not isinstance(settings.model, GroupNormUNetSettings):
            seen = make_views_with_maps(
                volumes_bcxyz, clusters[:, None].to(torch.int16), rows, epoch, seed, settings.views
            )
            return {
                "images": seen.volumes, "clusters": seen.maps[:, :, 0], "views": seen.volumes[:, None],
                "partitions": torch.zeros(len(rows), 1, dtype=torch.int64, device=volumes_bcxyz.device),
            }  # fmt: skip
        both = torch.cat([volumes_bcxyz, clusters[:, None].to(volumes_bcxyz.dtype)], dim=1)
        found = partition_slices(both, rows, epoch, seed, settings.slices.count)
        h, w = found.slices_bpchw.shape[-2:]
        # The network halves both sides five times, and patches of features lie over whole voxels of the map.
        padded = torch.nn.functional.pad(found.slices_bpchw, (0, -w % 32, 0, -h % 32))
        images = padded[:, :, :-1]
        given = {
            "images": images,
            "clusters": padded[:, :, -1].round().long(),
            "partitions": found.partition_bp,
        }
        if settings.objective.name != CONSTRAINED or settings.warm_start is not None:
            given["views"] = slice_views(images, rows, epoch, seed, settings.slice_views)
        return given

    def step(
        self,
        model: nn.Module,
        objective: nn.Module,
        seen: Mapping[str, torch.Tensor],
        targets_b: torch.Tensor,
        progress: float,
    ) -> Step:
        """The loss of one batch."""
        loss, noted = _loss(model, cast(TwoPhases, objective), seen, progress)
        off = torch.tensor(float("nan"))
        return Step(loss, {name: noted.get(name, off) for name in self.about.course})

    def losses(
        self, settings: ContrastSettings, model: nn.Module, volumes_bcxyz: torch.Tensor
    ) -> torch.Tensor:
        """Without maps there is none of a constrained contrast; see `observe_with_maps`."""
        return torch.full((len(volumes_bcxyz),), float("nan"), device=volumes_bcxyz.device)

    def embed(
        self, settings: ContrastSettings, model: nn.Module, volumes_bcxyz: torch.Tensor
    ) -> torch.Tensor:
        """The mean features (B, D) of the brain."""
        return mean_inside(
            cast(DenseModel, model).of_volumes(volumes_bcxyz, _trained(settings)).float(), volumes_bcxyz
        )

    def observe_with_maps(
        self, settings: ContrastSettings, model: nn.Module, volumes_bcxyz: torch.Tensor, beside: Beside
    ) -> dict[str, torch.Tensor]:
        """The embedding, the loss with fixed slices and anchors, and what the probe of voxels reads."""
        features = cast(DenseModel, model).of_volumes(volumes_bcxyz, _trained(settings)).float()
        found = {
            "embedding": mean_inside(features, volumes_bcxyz),
            LOSS: self._validation_loss(settings, model, volumes_bcxyz, beside.maps),
        }
        target = settings.evaluation.target
        if target:
            places_bxyz = places_in(beside.maps[target], classes_of(settings))
            found |= sample_voxels(features, volumes_bcxyz, places_bxyz, settings.evaluation.voxels)
        if beside.final:
            found |= _pictures(features, volumes_bcxyz, beside.maps.get(settings.data.constraint))
        return found

    def _validation_loss(
        self,
        settings: ContrastSettings,
        model: nn.Module,
        volumes_bcxyz: torch.Tensor,
        maps: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """The loss (B,) of every scan by itself, always of the same slices and anchors; of whole images none."""
        if settings.objective.name != CONSTRAINED:
            return torch.zeros(len(volumes_bcxyz), device=volumes_bcxyz.device)
        phases = TwoPhases(settings.model_copy(update={"warm_start": None})).to(volumes_bcxyz.device)
        devices = [volumes_bcxyz.device] if volumes_bcxyz.device.type == "cuda" else []
        found = []
        for row in range(len(volumes_bcxyz)):
            of_scan = {name: each[row : row + 1].to(volumes_bcxyz.device) for name, each in maps.items()}
            alike = np.zeros(1, dtype=np.int64)
            seen = self.views_with_maps(settings, volumes_bcxyz[row : row + 1], of_scan, alike, 0, 0)
            with torch.random.fork_rng(devices):
                # For the anchors, which the loss draws itself.
                torch.manual_seed(0)
                found.append(_loss(model, phases, seen, 1.0)[0].float())
        return torch.stack(found)

    def judge(
        self, settings: ContrastSettings, training: Observed, evaluation: Observed, judging: Judging
    ) -> Outcome:
        """The probes of columns, and the linear probe of voxels."""
        found = super().judge(settings, training, evaluation, judging)
        found = Outcome(
            found.metrics, found.predictions, found.fitted, found.kept, _kept_pictures(evaluation.outputs)
        )
        if not settings.evaluation.target:
            return found
        classes = classes_of(settings)
        names = list(classes.sets)
        probe = fit_dense_probe(training.outputs[VOXELS], training.outputs[CLASSES])
        counts_nk3 = probe.counts(
            evaluation.outputs[VOXELS], evaluation.outputs[CLASSES], evaluation.outputs[WEIGHTS], classes
        )
        of_cases = case_table(
            names, counts_nk3, np.full((*counts_nk3.shape[:2], 2), np.nan), np.ones(len(counts_nk3))
        )
        measured = measured_cases(names, of_cases, evaluation.subjects)
        found.metrics.update({name: measured[name] for name in ("dice", *(f"dice_{each}" for each in names))})
        if probes_of(settings):
            return found
        shares = counts_nk3[:, :, 1].sum(axis=1) / np.asarray(evaluation.outputs[WEIGHTS]).sum(axis=1)
        kept = of_cases[[f"dice_{name}" for name in names]]
        table = pd.DataFrame({"predicted": shares, "error": 1 - of_cases[DICE]})
        return Outcome(found.metrics, pd.concat([table, kept], axis=1), pictures=found.pictures)


def classes_of(settings: ContrastSettings) -> LabelSets:
    """The classes of the map that the probe reads."""
    return LabelSets.parse(settings.evaluation.classes, MOST_CLASSES)


def _loss(
    model: nn.Module, phases: TwoPhases, seen: Mapping[str, torch.Tensor], progress: float
) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
    """The loss of the phase, and what it notes."""
    name, loss, within = phases.at(progress)
    module = cast(Any, loss)
    if name == CONSTRAINED:
        images = seen["images"].flatten(0, 1)
        features = model(images, "dense")
        foreground = (images != 0).any(dim=1)
        clusters = seen["clusters"].flatten(0, 1).long()
        value = module(features, clusters, foreground, within, images=images)
    else:
        # Slices of a volume are images of their own; a volume in 3D has its views in one place.
        views_bpvc = seen["views"]
        scans, parts, views = views_bpvc.shape[:3]
        vectors = model(views_bpvc.flatten(0, 2), "global").view(scans * parts, views, -1)
        labels = seen["partitions"].flatten() if name == "anatomical" else None
        value = module(vectors, labels, within)
    return value, {key: torch.as_tensor(each).float() for key, each in module.diagnostics.items()}


def _trained(settings: ContrastSettings) -> Literal["dense", "encoder"]:
    """Whose features a probe reads: those of the decoder, or of the encoder where nothing else is trained."""
    return "dense" if settings.objective.name == CONSTRAINED else "encoder"


def _pictures(
    features_bdxyz: torch.Tensor, volumes_bcxyz: torch.Tensor, clusters_bxyz: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """The slice across the middle of Z of every scan: image, clusters, three components of its features as colours."""
    middle = volumes_bcxyz.shape[-1] // 2
    images, clusters, colours = [], [], []
    for row, (features_dxyz, volume_cxyz) in enumerate(zip(features_bdxyz, volumes_bcxyz, strict=True)):
        image = volume_cxyz[0, :, :, middle].cpu()
        inside = image != 0
        shown = torch.zeros(*image.shape, 3, dtype=torch.uint8)
        slice_dxy = features_dxyz[:, :, :, middle].cpu()[None]
        fine_dxy = torch.nn.functional.interpolate(slice_dxy, size=image.shape, mode="nearest")[0]
        values_nd = fine_dxy[:, inside].T
        if len(values_nd) > 3:
            values_nd = values_nd - values_nd.mean(dim=0)
            _, _, axes = torch.linalg.svd(values_nd, full_matrices=False)
            found_n3 = values_nd @ axes[:3].T
            low, high = found_n3.quantile(0.02, dim=0), found_n3.quantile(0.98, dim=0)
            scaled = ((found_n3 - low) / (high - low).clamp(min=1e-9)).clamp(0, 1)
            shown[inside, : scaled.shape[1]] = (255 * scaled).to(torch.uint8)
        images.append(image.float())
        guide = torch.zeros_like(image) if clusters_bxyz is None else clusters_bxyz[row, :, :, middle].cpu()
        clusters.append(guide.float())
        colours.append(shown)
    return dict(zip(NAMES, (torch.stack(images), torch.stack(clusters), torch.stack(colours)), strict=True))


def _kept_pictures(outputs: Mapping[str, Floats]) -> dict[str, npt.NDArray[np.generic]]:
    """Those of a few scans, evenly over all of them; {} where none were made."""
    if NAMES[0] not in outputs:
        return {}
    count = len(outputs[NAMES[0]])
    chosen = np.unique(np.linspace(0, count - 1, min(MOST_PICTURES, count)).round().astype(int))
    kept: dict[str, npt.NDArray[np.generic]] = {"place": chosen, "image": outputs["image"][chosen]}
    kept["clusters"] = np.asarray(outputs["clusters"][chosen], dtype=np.int16)
    kept["colours"] = np.asarray(outputs["colours"][chosen], dtype=np.uint8)
    return kept
