"""Predictions of a trained model: what `predict` and `evaluate` use, without Ray and without pickled code.

A model folder holds `settings.json`, `model.safetensors`, `probe.json` (what was fitted on the embeddings of the
training subjects, or null) and `input.json` (channels, the intensity statistics of the training subjects, and facts
about their labels). `best/` of a run also has `calibration.json`, if its task makes one of out-of-fold predictions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, cast

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save
from scipy import ndimage
from torch import nn

from core.config import resolve, task_of
from core.errors import UserError
from core.evaluation import Floats
from core.files.writing import write_text
from core.run_settings import RunSettings
from core.tasks import TASKS, find_task
from core.tasks.task import ClassProbabilities, Facts, Labels, Prediction
from core.volumes.images.preprocess import IntensityStatistics, Preprocessing, normalise
from core.volumes.images.resample import resample_labels
from core.volumes.ingest.prepare import PreparedScan, prepare_scan
from core.volumes.sources.listing import ImageFile, Scan

CALIBRATION = "calibration.json"
BATCH = 16
FAR = 4.0
"""A distance between two means, in voxel SDs, that differences between people do not explain."""


@dataclass(frozen=True)
class Predictor:
    """A trained model with everything it needs to turn stored volumes into predictions."""

    settings: RunSettings
    model: nn.Module
    fitted: str | None
    """What was fitted on the embeddings of its training subjects; see `core.tasks.task.Outcome`."""
    channels: tuple[str, ...]
    statistics: IntensityStatistics | None
    facts: Facts
    """See `core.tasks.task.Task.learn`."""
    calibration: str | None = None
    """From out-of-fold predictions; None in a run of version 0.2 or before, which kept none."""

    def predict(self, volumes: Floats) -> pd.DataFrame:
        """What the task predicts for volumes (n, C, X, Y, Z) as a cohort stores them, channels as in `channels`."""
        return self.predictions(self.observe(volumes))

    def predictions(self, outputs: Mapping[str, Floats]) -> pd.DataFrame:
        """What the task makes of what was observed."""
        return find_task(self.settings.task).predictions(self.settings, outputs, self.fitted, self.facts)

    def maps(self, outputs: Mapping[str, Floats]) -> dict[str, npt.NDArray[np.int16]]:
        """The maps of classes (n, X, Y, Z) that the task makes of it, by name."""
        return find_task(self.settings.task).maps(self.settings, outputs, self.facts)

    def probability_maps(self, outputs: Mapping[str, Floats]) -> dict[str, ClassProbabilities]:
        """The probabilities of classes that the task makes of it, by name."""
        return find_task(self.settings.task).probability_maps(self.settings, outputs, self.facts)

    @torch.no_grad()
    def observe(self, volumes: Floats) -> dict[str, Floats]:
        """What the model gives for volumes (n, C, X, Y, Z) as a cohort stores them; see `Task.observe`."""
        self.model.eval()
        task = find_task(self.settings.task)
        seen: dict[str, list[Floats]] = {}
        for start in range(0, len(volumes), BATCH):
            tensor = torch.as_tensor(np.asarray(volumes[start : start + BATCH], dtype=np.float32))
            tensor = normalise(tensor, self.settings.data.normalise, self.statistics)
            for name, values in task.observe(self.settings, self.model, tensor).items():
                seen.setdefault(name, []).append(values.numpy())
        return {name: np.concatenate(parts) for name, parts in seen.items()}

    def present(self, predictions: pd.DataFrame, truth: Labels | None) -> Prediction:
        """The predictions for people, with the truth (n,) where it is known."""
        return find_task(self.settings.task).present(predictions, truth, self.calibration, self.facts)

    def unfamiliar(self, volumes: Floats) -> str | None:
        """A warning if the volumes (n, C, X, Y, Z) are far brighter or darker than those of the training."""
        if self.statistics is None:
            return None
        for index, channel in enumerate(self.channels):
            voxels = volumes[:, index][volumes[:, index] != 0]
            mean, sd = self.statistics.mean[index], self.statistics.sd[index]
            if voxels.size and abs(voxels.mean() - mean) > FAR * sd:
                return (
                    f"mean {channel} is {voxels.mean():.4g}, in training it was {mean:.4g} ± {sd:.2g} per voxel: "
                    "are they in other units? Then the predictions mean nothing"
                )
        return None


def save_predictor(folder: Path, predictor: Predictor) -> None:
    """Write a model folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.json").write_text(predictor.settings.model_dump_json(indent=2))
    weights = {name: tensor.contiguous() for name, tensor in predictor.model.state_dict().items()}
    # A plain write, so that a full disk is an OSError.
    (folder / "model.safetensors").write_bytes(save(weights))
    (folder / "probe.json").write_text(predictor.fitted or "null")
    statistics = predictor.statistics._asdict() if predictor.statistics else None
    inputs = {"channels": predictor.channels, "statistics": statistics, "facts": predictor.facts}
    (folder / "input.json").write_text(json.dumps(inputs))


def save_calibration(folder: Path, calibration: str) -> None:
    """Add the calibration to a model folder."""
    write_text(folder / CALIBRATION, calibration)


def load_predictor(folder: Path, task: str | None = None) -> Predictor:
    """Read a model folder.

    Args:
        folder: of the model.
        task: the task of the run, whose file may be executed if it has one.

    Raises:
        UserError: there is no model, it is damaged, or it is of another task.
    """
    try:
        raw = json.loads((folder / "settings.json").read_text())
        if (name := task_of(raw)) not in TASKS and name != task:
            raise UserError(
                f"{folder}/settings.json names the task {name}, and the run is of {task or 'no such task'}: this is "
                "damage or an attack; put the file back from a backup"
            )
        settings, of_task = resolve(raw), find_task(name)
        inputs = json.loads((folder / "input.json").read_text())
        fitted_text = (folder / "probe.json").read_text()
        fitted = None if fitted_text.strip() == "null" else fitted_text
        of_task.check_fitted(fitted)
        facts: Facts = dict(inputs.get("facts") or {})
        model = of_task.build(settings, len(inputs["channels"]), facts)
        load_model(model, str(folder / "model.safetensors"))
        path, statistics = folder / CALIBRATION, inputs["statistics"]
        calibration = path.read_text() if path.exists() else None
        if calibration is not None:
            of_task.check_calibration(calibration)
        intensity = (
            IntensityStatistics(tuple(statistics["mean"]), tuple(statistics["sd"])) if statistics else None
        )
    except FileNotFoundError as error:
        raise UserError(
            f"no trained model in {folder}: {Path(error.filename or '').name} is missing"
        ) from None
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RuntimeError,
        SafetensorError,
    ) as error:
        raise UserError(
            f"the model in {folder} cannot be read: {' '.join(str(error).split())[:200]}; put it back from a backup, "
            "or from refits/winner/model-SEED of a sweep"
        ) from None
    return Predictor(settings, model, fitted, tuple(inputs["channels"]), intensity, facts, calibration)


def prepare_file(file: Path, preprocessing: Preprocessing, mask: Path | None = None) -> PreparedScan:
    """One NIfTI file, prepared as the training cohort was (registration included), with its measures of quality.

    `mask` is its brain mask, needed where the cohort was made with them. UserError names the file.
    """
    scan = Scan(subject=file.name, images=(ImageFile(file),))
    return prepare_scan(scan if mask is None else replace(scan, mask=ImageFile(mask)), preprocessing)


def on_own_grid(classes: npt.NDArray[np.int16], scan: PreparedScan, file: Path) -> nib.Nifti1Image:
    """A map of classes (X, Y, Z) on the grid of a cohort as a map on the voxels of the file that `scan` was made from.

    Every voxel has the class of the nearest voxel of the grid, and 0 beyond it.
    """
    own = cast(nib.Nifti1Image, nib.load(file))
    return _as_image(resample_labels(classes, scan.affine, own.affine, _grid_of(own)), own)


class OnOwnGrid(NamedTuple):
    """What a scan is segmented into, on its own voxels."""

    classes: nib.Nifti1Image
    """The number of every voxel's likeliest class, int16."""
    probabilities: nib.Nifti1Image
    """(X, Y, Z, K - 1) of all classes but the background, float32."""
    milliliters: dict[str, float]
    """The volume of every class, by name."""


def segmented(given: ClassProbabilities, scan: PreparedScan, file: Path) -> OnOwnGrid:
    """The segmentation of one scan on the voxels of the file that `scan` was made from.

    Probabilities are interpolated linearly, then the likeliest class is taken; beyond the grid of the cohort all is
    background. Affine, codes and trailing axes are those of the file.

    Args:
        given: of this scan alone, N = 1.
        scan: how it was prepared.
        file: its NIfTI file.
    """
    own = cast(nib.Nifti1Image, nib.load(file))
    shape, to_grid = _grid_of(own), np.linalg.inv(scan.affine) @ own.affine
    placed_kxyz = np.stack(
        [
            ndimage.affine_transform(
                values_xyz.astype(np.float32), to_grid, output_shape=shape, order=1, mode="grid-constant",
                cval=float(place == 0),
            )
            for place, values_xyz in enumerate(given.values[0])
        ]
    )  # fmt: skip
    classes_xyz = np.array([0, *given.numbers], dtype=np.int16)[placed_kxyz.argmax(axis=0)]
    voxel = abs(float(np.linalg.det(own.affine[:3, :3]))) / 1000
    volumes = {
        name: int(np.count_nonzero(classes_xyz == number)) * voxel
        for name, number in zip(given.names, given.numbers, strict=True)
    }
    probabilities = nib.Nifti1Image(np.moveaxis(placed_kxyz[1:], 0, -1), own.affine)
    return OnOwnGrid(_as_image(classes_xyz, own), _with_codes(probabilities, own), volumes)


def _grid_of(own: nib.Nifti1Image) -> tuple[int, int, int]:
    shape = own.shape[:3]
    return shape[0], shape[1], shape[2]


def _as_image(classes_xyz: npt.NDArray[np.int16], own: nib.Nifti1Image) -> nib.Nifti1Image:
    """A map as an image like `own`, with its trailing axes of length 1."""
    trailing = own.shape[3:] if all(side == 1 for side in own.shape[3:]) else ()
    return _with_codes(nib.Nifti1Image(classes_xyz.reshape(*classes_xyz.shape, *trailing), own.affine), own)


def _with_codes(image: nib.Nifti1Image, own: nib.Nifti1Image) -> nib.Nifti1Image:
    """The image with both transforms of `own`, and what they mean; scanner-based where neither is known."""
    codes = [int(own.header[name]) for name in ("qform_code", "sform_code")]
    image.set_qform(own.get_qform(), codes[0])
    image.set_sform(own.affine, codes[1] if any(codes) else 1)
    return image
