"""A class for every voxel: tissues (system B), lesions and tumours; whole volumes or patches in 3D.

What is judged is every case by itself: overlap, distance of surfaces and volumes, class by class. A class that is in
neither map tells nothing about a case: it is left out of its mean, and counted. All this is on the grid of the cohort;
`predict` writes maps on the grid of the scan.

Shape suffixes: B scans of a batch, N scans, V views, C channels, K classes with the background, X, Y, Z.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, cast

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from monai.inferers.utils import sliding_window_inference
from pydantic import Field
from torch import nn

from core.errors import UserError
from core.evaluation import Floats, Names
from core.evaluation.by_subject import subject_means
from core.evaluation.segmentation import compare_maps, dice_of
from core.evaluation.splits import Rows
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
from core.volumes.cohort.description import has_map
from core.volumes.ingest.prepare import MOST_CLASSES
from core.volumes.views import ViewSettings, make_views_with_maps

PREDICTED_MAP = "predicted_map"
PLANES = ("sagittal", "coronal", "axial")
"""The slices across X, Y and Z."""
COUNTS, DISTANCES, PROBABILITIES, DICE = "counts", "distances", "probabilities", "dice"
BOTH, PREDICTED, REFERENCE = range(3)
"""The columns of counts of voxels: in both maps, in the predicted one, in the reference."""
WINDOWS_TOGETHER = 4
"""Windows of a sliding window in one call of the network."""


class SegmentationData(DataSettings):
    """What is taken from the cohort: also which map, and what its numbers mean."""

    target: str = Field("dseg", description="map of the cohort with the class of every voxel")
    classes: tuple[Annotated[str, Field(pattern=r"^[A-Za-z][\w-]*=\d+$")], ...] = Field(
        ("csf=1", "gm=2", "wm=3"),
        min_length=1,
        description="NAME=NUMBER of every class in the map; all else is background, and -1 is not known",
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
        names, of_all = list(classes_of(settings)), self.about.metrics
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
        """Refuse classes that are no different numbers, and patches of a network that needs the other half."""
        numbers, names = list(classes_of(settings).values()), list(classes_of(settings))
        is_unique = len(set(numbers)) == len(numbers) and len(names) == len(settings.data.classes)
        if not is_unique or min(numbers) < 1 or max(numbers) > MOST_CLASSES:
            raise UserError(
                f"data.classes={','.join(settings.data.classes)}: every class needs a name and a number of its own, "
                f"from 1 to {MOST_CLASSES}: 0 is the background"
            )
        if settings.views.crop_size is not None and isinstance(settings.model, SymmetrySwinUNETRSettings):
            raise UserError(
                f"model.name={settings.model.name} compares a brain with its mirror image, so it takes whole volumes: "
                "remove views.crop_size"
            )
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
        return {"classes": cast(Any, classes_of(settings))}

    def targets(self, labels: Labels, facts: Facts) -> npt.NDArray[np.generic]:
        """The truth is in the maps."""
        return np.zeros(len(labels), dtype=np.float32)

    def build(self, settings: SegmentationSettings, in_channels: int, facts: Facts) -> Segmenter:
        """The model of `settings`, on the CPU, with PyTorch's current random state."""
        return build_segmenter(settings.model, in_channels, 1 + len(classes_of(settings)))

    def objective(self, settings: SegmentationSettings, facts: Facts) -> nn.Module:
        """The loss of `settings`."""
        return settings.objective.build(settings.training.rounds)

    def views_with_maps(
        self,
        settings: SegmentationSettings,
        volumes_bcxyz: torch.Tensor,
        maps: Mapping[str, torch.Tensor],
        rows: Rows,
        epoch: int,
        seed: int,
    ) -> torch.Tensor:
        """(B, V, C + 1, X, Y, Z): views, or patches, with the places of classes as their last channel."""
        places_bxyz = places_of(maps[settings.data.target], settings)
        seen = make_views_with_maps(volumes_bcxyz, places_bxyz[:, None], rows, epoch, seed, settings.views)
        return torch.cat([seen.volumes, seen.maps.to(seen.volumes.dtype)], dim=2)

    def step(
        self,
        model: nn.Module,
        objective: nn.Module,
        views_bvcxyz: torch.Tensor,
        targets_b: torch.Tensor,
        progress: float,
    ) -> Step:
        """The loss of one batch."""
        volumes_ncxyz, places_nxyz = (
            views_bvcxyz[:, :, :-1].flatten(0, 1),
            views_bvcxyz[:, :, -1].flatten(0, 1),
        )
        scores = model(volumes_ncxyz)
        loss = _over_depths(objective, scores, places_nxyz.round().long(), progress)
        noted = cast(dict[str, torch.Tensor], objective.diagnostics)
        absent = torch.tensor(math.nan)
        return Step(loss, {name: noted.get(name, absent) for name in self.about.course})

    def observe(
        self, settings: SegmentationSettings, model: nn.Module, volumes_bcxyz: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The probabilities (B, K, X, Y, Z), and as `embedding` the share of every class (B, K)."""
        probabilities = self._scores(settings, model, volumes_bcxyz).float().softmax(dim=1)
        shares = torch.stack(
            [
                (probabilities.argmax(1) == place).flatten(1).float().mean(1)
                for place in range(probabilities.shape[1])
            ],
            dim=1,
        )
        return {"embedding": shares, PROBABILITIES: probabilities}

    def observe_with_maps(
        self, settings: SegmentationSettings, model: nn.Module, volumes_bcxyz: torch.Tensor, beside: Beside
    ) -> dict[str, torch.Tensor]:
        """Counts of voxels (B, K - 1, 3), and after the last epoch distances and surface Dice (B, K - 1, 2)."""
        seen = self.observe(settings, model, volumes_bcxyz)
        found = self.observe_maps(settings, seen.pop(PROBABILITIES).argmax(dim=1).cpu(), beside)
        if beside.final:
            reference_bxyz = places_of(beside.maps[settings.data.target], settings).cpu()
            found |= _slices(volumes_bcxyz[:, 0].cpu(), found.pop(PREDICTED_MAP), reference_bxyz)
        return {name: values for name, values in (seen | found).items() if name != PREDICTED_MAP}

    def observe_maps(
        self, settings: SegmentationSettings, predicted_bxyz: torch.Tensor, beside: Beside
    ) -> dict[str, torch.Tensor]:
        """See `Task`: places of classes, 0 the background."""
        reference_bxyz = places_of(beside.maps[settings.data.target], settings).cpu().numpy()
        count, edges = 1 + len(classes_of(settings)), np.array(beside.edges)
        tolerance = settings.evaluation.tolerance if beside.final else None
        cases = [
            compare_maps(predicted, reference, range(1, count), edges, tolerance=tolerance, unknown=IGNORED)
            for predicted, reference in zip(predicted_bxyz.numpy(), reference_bxyz, strict=True)
        ]
        shares = [(predicted_bxyz == place).flatten(1).float().mean(1) for place in range(count)]
        # A checkpoint and the workers exchange tensors.
        return {
            "embedding": torch.stack(shares, dim=1),
            COUNTS: torch.from_numpy(np.stack([case.counts_k3 for case in cases])),
            DISTANCES: torch.from_numpy(np.stack([case.distances_k2 for case in cases])),
            "voxel": beside.voxel_ml.cpu(),
            PREDICTED_MAP: predicted_bxyz.to(torch.int16),
        }

    def atlas(
        self, settings: SegmentationSettings, maps: Iterable[Beside], one_class: bool
    ) -> npt.NDArray[np.int16]:
        """See `Task`."""
        count, total_kxyz = 1 + len(classes_of(settings)), None
        for beside in maps:
            places_bxyz = places_of(beside.maps[settings.data.target], settings)
            counts_kxyz = torch.stack([(places_bxyz == place).sum(dim=0) for place in range(count)])
            total_kxyz = counts_kxyz if total_kxyz is None else total_kxyz + counts_kxyz
        assert total_kxyz is not None
        if one_class:
            most = 1 + int(total_kxyz[1:].flatten(1).sum(dim=1).argmax())
            return np.full(total_kxyz.shape[1:], most, dtype=np.int16)
        return total_kxyz.argmax(dim=0).numpy().astype(np.int16)

    def _scores(
        self, settings: SegmentationSettings, model: nn.Module, volumes_bcxyz: torch.Tensor
    ) -> torch.Tensor:
        """The scores of whole volumes, for patches by a sliding window whose middle weighs most."""
        size = settings.views.crop_size
        if size is None:
            whole: torch.Tensor = model(volumes_bcxyz)
            return whole
        window = (size, size, size) if isinstance(size, int) else size
        scores = sliding_window_inference(
            volumes_bcxyz,
            window,
            WINDOWS_TOGETHER,
            model,
            overlap=settings.evaluation.overlap,
            mode="gaussian",
        )
        return cast(torch.Tensor, scores)

    def judge(
        self, settings: SegmentationSettings, training: Observed, evaluation: Observed, judging: Judging
    ) -> Outcome:
        """Measure every case, then the mean over people; nothing is fitted."""
        of_cases = _columns(
            classes_of(settings), evaluation.outputs[COUNTS], evaluation.outputs[DISTANCES],
            evaluation.outputs["voxel"],
        )  # fmt: skip
        table = pd.concat(
            [
                pd.DataFrame({"predicted": 1 - evaluation.embeddings[:, 0], "error": 1 - of_cases[DICE]}),
                of_cases,
            ],
            axis=1,
        ).drop(columns=DICE)
        metrics = _measured(classes_of(settings), of_cases, evaluation.subjects)
        return Outcome(metrics, table, pictures=_typical(of_cases[DICE].to_numpy(float), evaluation.outputs))

    def segmented_classes(self, settings: SegmentationSettings) -> tuple[str, ...]:
        """See `Task`."""
        return tuple(classes_of(settings))

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
            classes_xyz, reference_xyz, list(classes.values()), np.array(edges),
            tolerance=settings.evaluation.tolerance, unknown=IGNORED,
        )  # fmt: skip
        columns = _columns(classes, found.counts_k3[None], found.distances_k2[None], np.array([voxel_ml]))
        return {str(name): float(value) for name, value in columns.iloc[0].items()}

    def predictions(
        self, settings: SegmentationSettings, outputs: Mapping[str, Floats], fitted: str | None, facts: Facts
    ) -> pd.DataFrame:
        """The share of the voxels of a scan that every class has."""
        shares_nk = outputs["embedding"]
        table = pd.DataFrame({"predicted": 1 - shares_nk[:, 0]})
        for place, name in enumerate(cast(dict[str, int], facts["classes"]), start=1):
            table[f"share_{name}"] = shares_nk[:, place]
        return table

    def probability_maps(
        self, settings: SegmentationSettings, outputs: Mapping[str, Floats], facts: Facts
    ) -> dict[str, ClassProbabilities]:
        """The probabilities of the background and every class."""
        known = cast(dict[str, int], facts["classes"])
        made = ClassProbabilities(outputs[PROBABILITIES], tuple(known), tuple(known.values()))
        return {settings.data.target: made}

    def present(
        self, predictions: pd.DataFrame, truth: Labels | None, calibration: str | None, facts: Facts
    ) -> Prediction:
        """The share of every class."""
        shown = pd.DataFrame(index=predictions.index)
        for name in cast(dict[str, int], facts["classes"]):
            column = f"share_{name}"
            shown[f"{name}, share of the field"] = [f"{value:.3f}" for value in predictions[column]]
        return Prediction(
            predictions, shown, "Shares are of all voxels of the prepared scan. The maps say where."
        )

    def measure(
        self, presented: pd.DataFrame, truth: Truth, internal: Mapping[str, float]
    ) -> dict[str, float | str]:
        """Overlap, distances and volumes where maps were compared; else only shares are known."""
        classes = {str(name).removeprefix("dice_"): 0 for name in presented if str(name).startswith("dice_")}
        if classes:
            found: dict[str, float | str] = dict(_measured(classes, presented, truth.subjects))
            return found
        names = [str(name) for name in presented.columns if str(name).startswith("share_")]
        return {f"mean {name}": float(presented[name].mean()) for name in names}


def classes_of(settings: SegmentationSettings) -> dict[str, int]:
    """The number of every class in the map, by name."""
    return {name: int(number) for name, number in (each.split("=") for each in settings.data.classes)}


def places_of(map_bxyz: torch.Tensor, settings: SegmentationSettings) -> torch.Tensor:
    """The place of every voxel's class, int16: 0 for the background, `IGNORED` where the map has -1."""
    places_bxyz = torch.zeros_like(map_bxyz)
    for place, number in enumerate(classes_of(settings).values(), start=1):
        places_bxyz[map_bxyz == number] = place
    places_bxyz[map_bxyz == IGNORED] = IGNORED
    return places_bxyz


def _slices(
    volumes_bxyz: torch.Tensor, predicted_bxyz: torch.Tensor, reference_bxyz: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Three planes (B, 3, …) uint8 through the largest part of every reference: image, predicted and true places."""
    planes: dict[str, list[torch.Tensor]] = {name: [] for name in PLANES}
    for volume, predicted, reference in zip(volumes_bxyz, predicted_bxyz, reference_bxyz, strict=True):
        inside = volume[volume != 0]
        low, high = np.percentile(inside.numpy(), [1, 99]) if inside.numel() else (0.0, 1.0)
        grey = ((volume - low) / max(float(high - low), 1e-6)).clamp(0, 1) * 230 + 25
        image = torch.where(volume != 0, grey, torch.zeros(())).to(torch.uint8)
        known = reference.clamp(min=0)
        for axis, name in enumerate(PLANES):
            others = [other for other in range(3) if other != axis]
            cut = int((known > 0).sum(dim=others).argmax())
            several = [each.select(axis, cut).to(torch.uint8) for each in (image, predicted, known)]
            planes[name].append(torch.stack(several))
    return {name: torch.stack(several) for name, several in planes.items()}


def _typical(dice_n: Floats, outputs: Mapping[str, Floats]) -> dict[str, npt.NDArray[np.generic]]:
    """The planes of the best, the median and the worst case, and their Dice; {} where none were kept."""
    if PLANES[0] not in outputs:
        return {}
    order = np.argsort(-dice_n, kind="stable")
    order = order[: np.count_nonzero(~np.isnan(dice_n))]
    if not order.size:
        return {}
    chosen = np.array(list(dict.fromkeys([order[0], order[(len(order) - 1) // 2], order[-1]])))
    planes = {name: np.asarray(outputs[name][chosen], dtype=np.uint8) for name in PLANES}
    return {**planes, "place": chosen, DICE: dice_n[chosen]}


def _over_depths(
    objective: nn.Module, scores: torch.Tensor, places: torch.Tensor, progress: float
) -> torch.Tensor:
    """The loss; of several depths (B, D, K, …) their mean with the weights 1, 1/2, 1/4, as in nnU-Net."""
    if scores.ndim == places.ndim + 1:
        loss: torch.Tensor = objective(scores, places, progress)
        return loss
    weights = [2.0**-depth for depth in range(scores.shape[1])]
    # The last call is that of the full depth, whose parts are noted.
    losses = [
        weights[depth] * objective(scores[:, depth], places, progress)
        for depth in reversed(range(len(weights)))
    ]
    return torch.stack(losses).sum() / sum(weights)


def _mean_of_defined(values_nk: Floats) -> Floats:
    """The mean over the classes that are defined (N,); NaN where none is."""
    defined_nk = ~np.isnan(values_nk)
    counts_n = defined_nk.sum(axis=1)
    totals_n = np.where(defined_nk, values_nk, 0.0).sum(axis=1)
    means: Floats = np.where(counts_n > 0, totals_n / np.maximum(counts_n, 1), math.nan)
    return means


def _columns(
    classes: Mapping[str, int], counts_nk3: Floats, distances_nk2: Floats, voxel_ml_n: Floats
) -> pd.DataFrame:
    """One row per case: the mean `dice`, and of every class Dice, distances, and both volumes in mL."""
    dice_nk = dice_of(counts_nk3)
    table = {DICE: _mean_of_defined(dice_nk)}
    for place, name in enumerate(classes):
        table |= {
            f"dice_{name}": dice_nk[:, place],
            f"ml_{name}": counts_nk3[:, place, PREDICTED] * voxel_ml_n,
            f"reference_ml_{name}": counts_nk3[:, place, REFERENCE] * voxel_ml_n,
            f"hausdorff95_{name}": distances_nk2[:, place, 0],
            f"surface_dice_{name}": distances_nk2[:, place, 1],
        }
    return pd.DataFrame(table)


def _measured(classes: Mapping[str, int], cases: pd.DataFrame, subjects: Names) -> dict[str, float]:
    """The metrics of the description, of cases as `_columns` gives them; one that tells nothing is in no mean."""

    def of_all(column: str) -> Floats:
        return np.stack([cases[f"{column}_{name}"].to_numpy(float) for name in classes], axis=1)

    dice_nk, wrong_nk = of_all("dice"), np.abs(of_all("ml") - of_all("reference_ml"))
    # Of a class in neither map nothing can be wrong.
    wrong_nk = np.where(np.isnan(dice_nk), math.nan, wrong_nk)
    surface_nk, far_nk = of_all("surface_dice"), of_all("hausdorff95")
    metrics = {
        "dice": _over_people(cases[DICE].to_numpy(float), subjects),
        "hausdorff95": _median(far_nk),
        "surface_dice": _over_people(_mean_of_defined(surface_nk), subjects),
        "volume_error": _over_people(_mean_of_defined(wrong_nk), subjects),
        "undefined": float(np.isnan(dice_nk).sum()),
    }
    for place, name in enumerate(classes):
        metrics |= {
            f"dice_{name}": _over_people(dice_nk[:, place], subjects),
            f"hausdorff95_{name}": _median(far_nk[:, place]),
            f"surface_dice_{name}": _over_people(surface_nk[:, place], subjects),
            f"volume_error_{name}": _over_people(wrong_nk[:, place], subjects),
        }
    return metrics


def _over_people(values_n: Floats, subjects: Names) -> float:
    """The mean over people of scans whose value is defined; NaN if there is none."""
    defined = ~np.isnan(values_n)
    if not defined.any():
        return math.nan
    return float(np.mean(subject_means(values_n[defined], subjects[defined])))


def _median(values_nk: Floats) -> float:
    """The median of the defined values; a class that is in one map only is infinitely far."""
    defined = values_nk[~np.isnan(values_nk)]
    return float(np.median(defined)) if defined.size else math.nan
