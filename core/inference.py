"""Predictions of a trained model: what `predict` and `evaluate` use, without Ray and without pickled code.

A model folder holds `settings.json`, `model.safetensors`, `probe.json` (what was fitted on the embeddings of the
training subjects, or null) and `input.json` (channels, the intensity statistics of the training subjects, and facts
about their labels). `best/` of a run also has `calibration.json`, if its task makes one of out-of-fold predictions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save
from torch import nn

from core.config import resolve, task_of
from core.errors import UserError
from core.evaluation import Floats
from core.files.writing import write_text
from core.models.weights import weights_of
from core.run_settings import RunSettings
from core.tasks import TASKS, find_task
from core.tasks.task import ClassProbabilities, Facts, Labels, Prediction
from core.volumes.images.preprocess import IntensityStatistics, normalise
from core.volumes.sources.listing import ImageFile, Scan

CALIBRATION = "calibration.json"
BATCH = 16
FAR = 4.0
"""A distance between two means, in voxel SDs, that differences between people do not explain."""


class Predicted(NamedTuple):
    """What models say of n scans."""

    table: pd.DataFrame
    """One row per scan; see `Task.predictions`."""
    maps: dict[str, npt.NDArray[np.int16]]
    """(n, X, Y, Z) by name; see `Task.maps`."""
    probabilities: dict[str, ClassProbabilities]
    """By name; see `Task.probability_maps`."""
    embeddings: Floats | None = None
    """(n, E) of one model; those of several have no mean."""


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
        return self.answer(volumes).table

    def answer(self, volumes: Floats) -> Predicted:
        """All that the task says of volumes (n, C, X, Y, Z)."""
        outputs, task = self.observe(volumes), find_task(self.settings.task)
        return Predicted(
            task.predictions(self.settings, outputs, self.fitted, self.facts),
            task.maps(self.settings, outputs, self.facts),
            task.probability_maps(self.settings, outputs, self.facts),
            outputs["embedding"],
        )

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
    # A plain write, so that a full disk is an OSError.
    (folder / "model.safetensors").write_bytes(save(weights_of(predictor.model)))
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


def scan_of(file: Path, mask: Path | None = None) -> Scan:
    """One NIfTI file as a scan, with its brain mask, which is needed where the cohort was made with masks."""
    return Scan(subject=file.name, images=(ImageFile(file),), mask=None if mask is None else ImageFile(mask))


def mean_answer(models: Sequence[Predictor], volumes: Floats) -> Predicted:
    """The mean of what several models of one configuration say of volumes (n, C, X, Y, Z).

    Raises:
        UserError: their task says something that has no mean.
    """
    answers = [model.answer(volumes) for model in models]
    first = answers[0]
    if len(answers) == 1:
        return first
    if first.maps:
        raise UserError(
            f"the task {models[0].settings.task} gives the map {next(iter(first.maps))} of classes without their "
            "probabilities, which has no mean over models; use one model"
        )
    table = find_task(models[0].settings.task).mean_of([answer.table for answer in answers], models[0].facts)
    probabilities = {
        name: each._replace(
            values=np.mean(
                [answer.probabilities[name].values for answer in answers], axis=0, dtype=np.float32
            )
        )
        for name, each in first.probabilities.items()
    }
    return Predicted(table, {}, probabilities)
