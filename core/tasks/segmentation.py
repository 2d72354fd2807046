"""A class for every voxel: tissues (system B), lesions and tumours; whole volumes or patches in 3D.

What is judged is every case by itself: overlap, distance of surfaces and volumes, class by class. A class that is in
neither map tells nothing about a case: it is left out of its mean, and counted. All this is on the grid of the cohort;
`predict` writes maps on the grid of the scan.

Shape suffixes: B scans of a batch, N scans, V views, C channels, K classes with the background, X, Y, Z.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, cast

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from monai.inferers.utils import sliding_window_inference
from pydantic import BeforeValidator, Field
from torch import nn

from core.errors import UserError
from core.evaluation import Floats
from core.evaluation.case_pictures import planes_of, typical_cases
from core.evaluation.case_tables import DICE, case_table, measured_cases
from core.evaluation.label_sets import REGIONS, LabelSets
from core.evaluation.segmentation import compare_maps
from core.evaluation.sliding_window import mirrored_sliding_window
from core.evaluation.splits import Rows, Splits
from core.losses.segmentation import IGNORED, CrossEntropy, SegmentationLoss
from core.models.segmenter import Segmenter, build_segmenter
from core.models.settings import ResUNetSettings, SegmenterSettings, SymmetrySwinUNETRSettings
from core.objectives import Metric
from core.run_settings import DataSettings, Frozen, RunSettings
from core.task_description import Rival, TaskDescription
from core.tasks.task import (
    Beside,
    ClassProbabilities,
    Facts,
    Judging,
    Labels,
    Observed,
    Outcome,
    Prediction,
    Step,
    Task,
    Truth,
)
from core.volumes.cohort.description import has_map, numbers_in_maps
from core.volumes.images.mirror import mirror_image
from core.volumes.ingest.prepare import MOST_CLASSES
from core.volumes.views import ViewSettings, make_views_with_maps

PREDICTED_MAP = "predicted_map"
COUNTS, DISTANCES, PROBABILITIES = "counts", "distances", "probabilities"
NETWORK_AXES = 5
"""Of scores (B, K, X, Y, Z); those of several depths have one more."""
WINDOWS_TOGETHER = 4
"""Windows of a sliding window in one call of the network."""


def _by_name(classes: object) -> object:
    """The classes of well-known maps have a name."""
    known = REGIONS.get(classes) if isinstance(classes, str) else None
    if isinstance(classes, str) and known is None:
        raise ValueError(f"classes must be a list such as [csf=1,gm=2], or {' or '.join(REGIONS)}")
    return known or classes


ClassesOfMap = Annotated[
    tuple[Annotated[str, Field(pattern=r"^[A-Za-z][\w-]*=\d+(\+\d+)*$")], ...],
    BeforeValidator(_by_name),
    Field(min_length=1),
]
"""NAME=NUMBER of every class, or the name of a well-known map."""


class SegmentationData(DataSettings):
    """What is taken from the cohort: also which map, and what its numbers mean."""

    target: str = Field("dseg", description="map of the cohort with the class of every voxel")
    classes: ClassesOfMap = Field(
        ("csf=1", "gm=2", "wm=3"),
        description="NAME=NUMBER of every class in the map, or NAME=NUMBER+NUMBER; all else is background, and -1 is "
        "not known. With a number in two of them they are regions, found one by one, such as brats2021 or brats2023",
    )
    balanced: str = Field("site", description="column of the cohort in which folds are alike")


class OverlapSettings(Frozen):
    """How a segmentation is judged."""

    overlap: float = Field(
        0.5, ge=0, lt=1, description="share of a window that the next one covers again, for patches"
    )
    tolerance: float = Field(2.0, gt=0, description="mm that a surface may be off, for the surface Dice")


class SegmentationSettings(RunSettings):
    """The settings of segmentation; the defaults are those of system B."""

    task: str = "segmentation"
    data: SegmentationData = SegmentationData()
    views: ViewSettings = ViewSettings(count=1)
    model: SegmenterSettings = ResUNetSettings()
    objective: SegmentationLoss = CrossEntropy()
    evaluation: OverlapSettings = OverlapSettings()


class Segmentation(Task[SegmentationSettings]):
    """See the top of this file."""

    about = TaskDescription(
        name="segmentation",
        metrics={
            "dice": Metric(title="Dice", better="high"),
            "surface_dice": Metric(title="surface Dice", better="high"),
            "hausdorff95": Metric(title="median 95 % Hausdorff distance", unit="mm"),
            "volume_error": Metric(title="volume error", unit="mL"),
            "undefined": Metric(title="classes in neither map"),
        },
        objectives=("dice", "surface_dice", "hausdorff95", "volume_error"),
        shown=("dice", "surface_dice", "hausdorff95", "volume_error", "undefined"),
        error=Metric(title="1 - Dice"),
        interval="complement",
        truth="map",
        voxels=Rival(folder="atlas", method="atlas", words="an atlas of the training people"),
        simplest=Rival(
            folder="majority",
            method="majority class",
            words="calling all of a brain by the most frequent class",
        ),
        nothing_found="no class has been found beyond where it usually lies",
        caveats=(
            "All is measured on the grid of the cohort. Labels that were brought there have lost detail already, and "
            "lose more when they go back, so these numbers are not those of the scan's own grid; of registered brains "
            "distances are those in the template.",
        ),
        figures=("overlap", "agreement", "cases"),
        course=("cross_entropy", "overlap"),
    )
    reads_training = False
    settings = SegmentationSettings

    def describe(self, settings: SegmentationSettings) -> TaskDescription:
        """With what is measured of every class."""
        names, of_all = list(classes_of(settings).sets), self.about.metrics
        of_class = {f"dice_{name}": Metric(title=f"Dice of {name}", better="high") for name in names}
        others = {
            f"{metric}_{name}": of_all[metric].model_copy(
                update={"title": f"{of_all[metric].title} of {name}"}
            )
            for metric in ("hausdorff95", "surface_dice", "volume_error")
            for name in names
        }
        shown = ("dice", *of_class, *(name for name in self.about.shown if name != "dice"))
        return self.about.model_copy(
            update={
                "metrics": of_all | of_class | others,
                "objectives": (*self.about.objectives, *of_class),
                "shown": shown,
            }
        )

    def check(self, settings: SegmentationSettings) -> None:
        """Refuse classes that cannot be told, and crops of another task."""
        classes_of(settings)
        if settings.views.crop is not None:
            raise UserError(
                "views.crop is for whole volumes of another task; patches are given by views.crop_size"
            )

    def balanced_by(self, settings: SegmentationSettings) -> str:
        """Folds are alike in a column that the user names."""
        return settings.data.balanced

    def needed_maps(self, settings: SegmentationSettings) -> tuple[str, ...]:
        """The map with the classes."""
        return (settings.data.target,)

    def labels(self, settings: SegmentationSettings, manifest: pd.DataFrame) -> Labels:
        """The name of the map (N,) where a scan has it, and None where it has none."""
        having = has_map(manifest, settings.data.target)
        return np.where(having, settings.data.target, np.array(None, dtype=object))

    def learn(self, settings: SegmentationSettings, training: Truth) -> Facts:
        """The numbers of the classes, by name."""
        return {"classes": cast(Any, {name: list(each) for name, each in classes_of(settings).sets.items()})}

    def check_cohort(self, settings: SegmentationSettings, manifest: pd.DataFrame, splits: Splits) -> None:
        """Refuse classes that no map of the cohort has.

        Raises:
            UserError: naming the class, and the numbers that there are.
        """
        held = numbers_in_maps(manifest, settings.data.target)
        if held is None:
            return
        for name, numbers in classes_of(settings).sets.items():
            absent = [number for number in numbers if number not in held]
            if absent and (len(absent) == len(numbers) or classes_of(settings).overlap):
                raise UserError(
                    f"data.classes: {name} is {'+'.join(map(str, numbers))}, and no map {settings.data.target} of the "
                    f"cohort holds {absent[0]}; they hold {', '.join(map(str, sorted(held)))}"
                )

    def targets(self, truth: Truth, facts: Facts) -> npt.NDArray[np.generic]:
        """The truth is in the maps."""
        return np.zeros(len(truth.labels), dtype=np.float32)

    def build(self, settings: SegmentationSettings, in_channels: int, facts: Facts) -> Segmenter:
        """The model of `settings`, on the CPU, with PyTorch's current random state."""
        classes = classes_of(settings)
        # Regions overlap, so the background is no class beside them.
        return build_segmenter(settings.model, in_channels, len(classes.sets) + (not classes.overlap))

    def objective(self, settings: SegmentationSettings, facts: Facts) -> nn.Module:
        """The loss of `settings`."""
        return LossOfClasses(settings.objective.build(settings.training.rounds), classes_of(settings))

    def views_with_maps(
        self,
        settings: SegmentationSettings,
        volumes_bcxyz: torch.Tensor,
        maps: Mapping[str, torch.Tensor],
        rows: Rows,
        epoch: int,
        seed: int,
    ) -> dict[str, torch.Tensor]:
        """`volumes` (B, V, C, X, Y, Z), whole or patches, `mirrored` if the network asks, and `map` (B, V, X, Y, Z)."""
        channels = volumes_bcxyz.shape[1]
        sees_mirror = isinstance(settings.model, SymmetrySwinUNETRSettings)
        if sees_mirror:
            # As further channels the other side is cropped and moved alike: a patch comes with its counterpart.
            volumes_bcxyz = torch.cat([volumes_bcxyz, mirror_image(volumes_bcxyz)], dim=1)
        map_bxyz = target_map(maps[settings.data.target], classes_of(settings))
        seen = make_views_with_maps(volumes_bcxyz, map_bxyz[:, None], rows, epoch, seed, settings.views)
        found = {"volumes": seen.volumes[:, :, :channels], "map": seen.maps[:, :, 0]}
        return found | ({"mirrored": seen.volumes[:, :, channels:]} if sees_mirror else {})

    def step(
        self,
        model: nn.Module,
        objective: nn.Module,
        seen: Mapping[str, torch.Tensor],
        targets_b: torch.Tensor,
        progress: float,
    ) -> Step:
        """The loss of one batch."""
        mirrored = [seen["mirrored"].flatten(0, 1)] if "mirrored" in seen else []
        scores = model(seen["volumes"].flatten(0, 1), *mirrored)
        losses = cast(LossOfClasses, objective)
        loss = _over_depths(losses.loss, scores, losses.target(seen["map"].flatten(0, 1)), progress)
        noted = cast(dict[str, torch.Tensor], losses.loss.diagnostics)
        absent = loss.detach().new_full((), math.nan)
        return Step(loss, {name: noted.get(name, absent) for name in self.about.course})

    def observe(
        self, settings: SegmentationSettings, model: nn.Module, volumes_bcxyz: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The probabilities (B, 1 + K, X, Y, Z), and as `embedding` the share of every class (B, 1 + K)."""
        scores_bkxyz = self._scores(settings, model, volumes_bcxyz).float()
        if classes_of(settings).overlap:
            regions_bkxyz = scores_bkxyz.sigmoid()
            outside_b1xyz = 1 - regions_bkxyz.amax(dim=1, keepdim=True)
            probabilities = torch.cat([outside_b1xyz, regions_bkxyz], dim=1)
        else:
            probabilities = scores_bkxyz.softmax(dim=1)
        found = self._painted(settings, probabilities)
        return {"embedding": _shares(found, classes_of(settings)), PROBABILITIES: probabilities}

    def observe_with_maps(
        self, settings: SegmentationSettings, model: nn.Module, volumes_bcxyz: torch.Tensor, beside: Beside
    ) -> dict[str, torch.Tensor]:
        """Counts of voxels (B, K, 3), and after the last epoch distances and surface Dice (B, K, 2)."""
        seen = self.observe(settings, model, volumes_bcxyz)
        found = self._compared(settings, self._painted(settings, seen.pop(PROBABILITIES)), beside)
        if beside.final:
            classes = classes_of(settings)
            places = [
                places_in(each, classes)
                for each in (found.pop(PREDICTED_MAP), beside.maps[settings.data.target].cpu())
            ]
            found |= planes_of(volumes_bcxyz[:, 0].cpu(), *places)
        return {name: values for name, values in (seen | found).items() if name != PREDICTED_MAP}

    def observe_maps(
        self, settings: SegmentationSettings, predicted_bxyz: torch.Tensor, beside: Beside
    ) -> dict[str, torch.Tensor]:
        """See `Task`."""
        return self._compared(settings, predicted_bxyz, beside)

    def _painted(self, settings: SegmentationSettings, probabilities: torch.Tensor) -> torch.Tensor:
        """The maps (B, X, Y, Z) int16 of probabilities."""
        classes = classes_of(settings)
        return torch.from_numpy(np.stack([classes.paint(each) for each in probabilities.cpu().numpy()]))

    def _compared(
        self, settings: SegmentationSettings, predicted_bxyz: torch.Tensor, beside: Beside
    ) -> dict[str, torch.Tensor]:
        """Maps (B, X, Y, Z) of numbers beside the true ones."""
        classes, edges = classes_of(settings), np.array(beside.edges)
        reference_bxyz = beside.maps[settings.data.target].cpu().numpy()
        tolerance = settings.evaluation.tolerance if beside.final else None
        cases = [
            compare_maps(
                predicted, reference, list(classes.sets.values()), edges, tolerance=tolerance, unknown=IGNORED
            )
            for predicted, reference in zip(predicted_bxyz.numpy(), reference_bxyz, strict=True)
        ]
        # A checkpoint and the workers exchange tensors.
        return {
            "embedding": _shares(predicted_bxyz, classes),
            COUNTS: torch.from_numpy(np.stack([case.counts_k3 for case in cases])),
            DISTANCES: torch.from_numpy(np.stack([case.distances_k2 for case in cases])),
            "voxel": beside.voxel_ml.cpu(),
            PREDICTED_MAP: predicted_bxyz.to(torch.int16),
        }

    def atlas(
        self, settings: SegmentationSettings, maps: Iterable[Beside], one_class: bool
    ) -> npt.NDArray[np.int16]:
        """See `Task`: of every voxel what is most frequent there, of regions the share of people who have each."""
        classes, total_kxyz, people = classes_of(settings), None, 0
        for beside in maps:
            for map_xyz in beside.maps[settings.data.target].cpu().numpy():
                masks_kxyz = classes.masks(map_xyz)
                outside_xyz = ~masks_kxyz.any(axis=0) & (map_xyz != IGNORED)
                counts_kxyz = np.concatenate([outside_xyz[None], masks_kxyz]).astype(np.float64)
                total_kxyz = counts_kxyz if total_kxyz is None else total_kxyz + counts_kxyz
                people += 1
        assert total_kxyz is not None
        if one_class:
            most = int(total_kxyz[1:].sum(axis=(1, 2, 3)).argmax())
            number = classes.numbers[list(classes.sets)[most]]
            return np.full(total_kxyz.shape[1:], number, dtype=np.int16)
        return classes.paint(total_kxyz / people)

    def _scores(
        self, settings: SegmentationSettings, model: nn.Module, volumes_bcxyz: torch.Tensor
    ) -> torch.Tensor:
        """The scores of whole volumes, for patches by a sliding window whose middle weighs most."""
        size = settings.views.crop_size
        if size is None:
            whole: torch.Tensor = model(volumes_bcxyz)
            return whole
        window = (size, size, size) if isinstance(size, int) else size
        overlap = settings.evaluation.overlap
        if isinstance(settings.model, SymmetrySwinUNETRSettings):
            return mirrored_sliding_window(volumes_bcxyz, model, window, overlap, WINDOWS_TOGETHER)
        scores = sliding_window_inference(
            volumes_bcxyz, window, WINDOWS_TOGETHER, model, overlap=overlap, mode="gaussian"
        )
        return cast(torch.Tensor, scores)

    def judge(
        self, settings: SegmentationSettings, training: Observed, evaluation: Observed, judging: Judging
    ) -> Outcome:
        """Measure every case, then the mean over people; nothing is fitted."""
        names = list(classes_of(settings).sets)
        of_cases = case_table(
            names, evaluation.outputs[COUNTS], evaluation.outputs[DISTANCES], evaluation.outputs["voxel"]
        )
        table = pd.concat(
            [
                pd.DataFrame({"predicted": 1 - evaluation.embeddings[:, 0], "error": 1 - of_cases[DICE]}),
                of_cases,
            ],
            axis=1,
        ).drop(columns=DICE)
        metrics = measured_cases(names, of_cases, evaluation.subjects)
        pictures = typical_cases(of_cases[DICE].to_numpy(float), evaluation.outputs)
        return Outcome(metrics, table, pictures=pictures)

    def segmented_classes(self, settings: SegmentationSettings) -> LabelSets:
        """See `Task`."""
        return classes_of(settings)

    def judge_map(
        self,
        settings: SegmentationSettings,
        classes_xyz: npt.NDArray[np.int16],
        reference_xyz: npt.NDArray[np.int16],
        edges: tuple[float, float, float],
        voxel_ml: float,
    ) -> dict[str, float]:
        """See `Task`."""
        classes = classes_of(settings)
        found = compare_maps(
            classes_xyz, reference_xyz, list(classes.sets.values()), np.array(edges),
            tolerance=settings.evaluation.tolerance, unknown=IGNORED,
        )  # fmt: skip
        columns = case_table(
            list(classes.sets), found.counts_k3[None], found.distances_k2[None], np.array([voxel_ml])
        )
        return {str(name): float(value) for name, value in columns.iloc[0].items()}

    def predictions(
        self, settings: SegmentationSettings, outputs: Mapping[str, Floats], fitted: str | None, facts: Facts
    ) -> pd.DataFrame:
        """The share of the voxels of a scan that every class has."""
        shares_nk = outputs["embedding"]
        table = pd.DataFrame({"predicted": 1 - shares_nk[:, 0]})
        for place, name in enumerate(classes_in(facts).sets, start=1):
            table[f"share_{name}"] = shares_nk[:, place]
        return table

    def probability_maps(
        self, settings: SegmentationSettings, outputs: Mapping[str, Floats], facts: Facts
    ) -> dict[str, ClassProbabilities]:
        """The probabilities of the background and every class."""
        return {settings.data.target: ClassProbabilities(outputs[PROBABILITIES], classes_in(facts))}

    def present(
        self, predictions: pd.DataFrame, truth: Labels | None, calibration: str | None, facts: Facts
    ) -> Prediction:
        """The share of every class."""
        shown = pd.DataFrame(index=predictions.index)
        for name in classes_in(facts).sets:
            column = f"share_{name}"
            shown[f"{name}, share of the field"] = [f"{value:.3f}" for value in predictions[column]]
        return Prediction(
            predictions, shown, "Shares are of all voxels of the prepared scan. The maps say where."
        )

    def measure(
        self, presented: pd.DataFrame, truth: Truth, internal: Mapping[str, float]
    ) -> dict[str, float | str]:
        """Overlap, distances and volumes where maps were compared; else only shares are known."""
        classes = [str(name).removeprefix("dice_") for name in presented if str(name).startswith("dice_")]
        if classes:
            found: dict[str, float | str] = dict(measured_cases(classes, presented, truth.subjects))
            return found
        names = [str(name) for name in presented.columns if str(name).startswith("share_")]
        return {f"mean {name}": float(presented[name].mean()) for name in names}


class LossOfClasses(nn.Module):
    """The loss, and what it wants of a map."""

    def __init__(self, loss: nn.Module, classes: LabelSets) -> None:
        super().__init__()
        self.loss, self.classes = loss, classes

    def target(self, map_nxyz: torch.Tensor) -> torch.Tensor:
        """Places of classes (N, X, Y, Z); of regions that overlap 1 inside and 0 outside each of them (N, K, X, Y, Z).

        `IGNORED` where nothing is known.
        """
        if not self.classes.overlap:
            return map_nxyz.long()
        regions = [torch.isin(map_nxyz, _numbers(each, map_nxyz)) for each in self.classes.sets.values()]
        inside_nkxyz = torch.stack(regions, dim=1).long()
        return inside_nkxyz.masked_fill((map_nxyz == IGNORED)[:, None], IGNORED)


def classes_of(settings: SegmentationSettings) -> LabelSets:
    """The classes of the map."""
    return LabelSets.parse(settings.data.classes, MOST_CLASSES)


def classes_in(facts: Facts) -> LabelSets:
    """The classes of a model; those of version 0.3 have one number each."""
    known = cast(dict[str, int | list[int]], facts["classes"])
    return LabelSets(
        {name: (each,) if isinstance(each, int) else tuple(each) for name, each in known.items()}
    )


def target_map(map_bxyz: torch.Tensor, classes: LabelSets) -> torch.Tensor:
    """What a training takes of a map (B, X, Y, Z): places of classes, or numbers of regions; else 0, and -1."""
    if not classes.overlap:
        return places_in(map_bxyz, classes)
    inside = torch.isin(
        map_bxyz, _numbers([number for each in classes.sets.values() for number in each], map_bxyz)
    )
    return torch.where(inside | (map_bxyz == IGNORED), map_bxyz, 0).to(torch.int16)


def places_in(map_bxyz: torch.Tensor, classes: LabelSets) -> torch.Tensor:
    """The place of every voxel's class, of regions that of the smallest one; 0 background, `IGNORED` not known."""
    places_bxyz = torch.zeros_like(map_bxyz)
    for place, name in enumerate(classes.sets, start=1):
        numbers = classes.sets[name] if not classes.overlap else (classes.numbers[name],)
        places_bxyz[torch.isin(map_bxyz, _numbers(numbers, map_bxyz))] = place
    places_bxyz[map_bxyz == IGNORED] = IGNORED
    return places_bxyz


def _numbers(numbers: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(numbers, dtype=like.dtype, device=like.device)


def _shares(map_bxyz: torch.Tensor, classes: LabelSets) -> torch.Tensor:
    """The share of the voxels that are background, and of every class (B, 1 + K)."""
    masks = [np.concatenate([(each == 0)[None], classes.masks(each)]) for each in map_bxyz.numpy()]
    return torch.from_numpy(np.stack([each.mean(axis=(1, 2, 3), dtype=np.float64) for each in masks])).float()


def _over_depths(
    objective: nn.Module, scores: torch.Tensor, places: torch.Tensor, progress: float
) -> torch.Tensor:
    """The loss; of several depths (B, D, K, …) their mean with the weights 1, 1/2, 1/4, as in nnU-Net."""
    if scores.ndim == NETWORK_AXES:
        loss: torch.Tensor = objective(scores, places, progress)
        return loss
    weights = [2.0**-depth for depth in range(scores.shape[1])]
    # The last call is that of the full depth, whose parts are noted.
    losses = [
        weights[depth] * objective(scores[:, depth], places, progress)
        for depth in reversed(range(len(weights)))
    ]
    return torch.stack(losses).sum() / sum(weights)
