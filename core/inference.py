"""Ages from a trained model: what `predict` and `evaluate` use, without Ray and without pickled code.

A model folder holds `settings.json`, `model.safetensors`, `probe.json` (null for direct regression) and
`input.json` (channels, and the intensity statistics of the training subjects). `best/` of a run also has
`calibration.json` (age bias and prediction interval, from out-of-fold predictions).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save

from core.config import RunSettings, resolve
from core.errors import UserError
from core.evaluation import Floats
from core.evaluation.calibration import Calibration
from core.evaluation.probes import AgeProbe
from core.files.writing import write_text
from core.tasks import TASKS
from core.tasks.brain_age import AgeModel
from core.volumes.images.preprocess import IntensityStatistics, Preprocessing, normalise
from core.volumes.ingest.prepare import PreparedScan, prepare_scan
from core.volumes.sources.listing import ImageFile, Scan

CALIBRATION = "calibration.json"
BATCH = 16
FAR = 4.0
"""A distance between two means, in voxel SDs, that differences between people do not explain."""


@dataclass(frozen=True)
class Predictor:
    """A trained model with everything it needs to turn stored volumes into ages."""

    settings: RunSettings
    model: AgeModel
    probe: AgeProbe | None
    channels: tuple[str, ...]
    statistics: IntensityStatistics | None
    calibration: Calibration | None = None
    """From out-of-fold predictions; None in a run of version 0.2 or before, which kept none."""

    @torch.no_grad()
    def predict(self, volumes: Floats) -> npt.NDArray[np.float64]:
        """Ages (n,) in years of volumes (n, C, X, Y, Z) as a cohort stores them, channels as in `channels`."""
        self.model.eval()
        ages = [
            self._predict_batch(volumes[start : start + BATCH]) for start in range(0, len(volumes), BATCH)
        ]
        return np.concatenate(ages).astype(np.float64)

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

    def _predict_batch(self, volumes: Floats) -> Floats:
        tensor = torch.as_tensor(np.asarray(volumes, dtype=np.float32))
        tensor = normalise(tensor, self.settings.data.normalise, self.statistics)
        if self.probe is None:
            ages: torch.Tensor = self.model(tensor)
            return ages.squeeze(-1).numpy()
        return self.probe.predict(self.model.embed(tensor).numpy())


def save_predictor(folder: Path, predictor: Predictor) -> None:
    """Write a model folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.json").write_text(predictor.settings.model_dump_json(indent=2))
    weights = {name: tensor.contiguous() for name, tensor in predictor.model.state_dict().items()}
    # A plain write, so that a full disk is an OSError.
    (folder / "model.safetensors").write_bytes(save(weights))
    (folder / "probe.json").write_text(predictor.probe.to_json() if predictor.probe else "null")
    statistics = predictor.statistics._asdict() if predictor.statistics else None
    (folder / "input.json").write_text(json.dumps({"channels": predictor.channels, "statistics": statistics}))


def save_calibration(folder: Path, calibration: Calibration) -> None:
    """Add the calibration to a model folder."""
    write_text(folder / CALIBRATION, calibration.to_json())


def _read_calibration(folder: Path) -> Calibration | None:
    path = folder / CALIBRATION
    return Calibration.from_json(path.read_text()) if path.exists() else None


def load_predictor(folder: Path) -> Predictor:
    """Read a model folder; UserError where there is none, or it is damaged."""
    try:
        settings = resolve(json.loads((folder / "settings.json").read_text()))
        inputs = json.loads((folder / "input.json").read_text())
        probe_text = (folder / "probe.json").read_text()
        probe = None if probe_text.strip() == "null" else AgeProbe.from_json(probe_text)
        model = TASKS[settings.task].build_model(settings, len(inputs["channels"]), np.zeros(1))
        load_model(model, str(folder / "model.safetensors"))
        calibration, statistics = _read_calibration(folder), inputs["statistics"]
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
    return Predictor(
        settings=settings,
        model=model,
        probe=probe,
        channels=tuple(inputs["channels"]),
        statistics=intensity,
        calibration=calibration,
    )


def prepare_files(
    files: Sequence[Path], preprocessing: Preprocessing, masks: Sequence[Path] | None = None
) -> npt.NDArray[np.float32]:
    """Volumes (n, 1, X, Y, Z) of NIfTI files, prepared as the training cohort was, registration included.

    `masks` are their brain masks, needed where the cohort was made with them. UserError names the file.
    """
    given = [None] * len(files) if masks is None else masks
    return np.stack(
        [prepare_file(file, preprocessing, mask).voxels for file, mask in zip(files, given, strict=True)]
    )


def prepare_file(file: Path, preprocessing: Preprocessing, mask: Path | None = None) -> PreparedScan:
    """One NIfTI file as `prepare_files` prepares it, with its measures of quality."""
    scan = Scan(subject=file.name, images=(ImageFile(file),))
    return prepare_scan(scan if mask is None else replace(scan, mask=ImageFile(mask)), preprocessing)
