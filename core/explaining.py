"""Where in a volume a model looks: what is predicted when a part of it is hidden (Zeiler and Fergus 2014).

By MONAI's occlusion sensitivity, with whatever a task predicts for a scan. A map means something only beside that of
the same model with random weights (Adebayo et al. 2018): parts that matter to both are of the network and not of what
it has learnt.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from monai.visualize.occlusion_sensitivity import OcclusionSensitivity
from scipy.stats import spearmanr
from torch import nn

from core.errors import UserError
from core.evaluation import Floats
from core.files.tables import PROBABILITY
from core.inference import Predictor
from core.tasks import find_task
from core.volumes.images.mirror import mirror_image, opposite_voxels
from core.volumes.images.preprocess import normalise

OVERLAP = 0.5
"""Share of a hidden cube that the next one hides again."""
TOGETHER = 16
OnProgress = Callable[[int, int], None]
"""Called with (volumes done, volumes in all)."""


class Explained(NamedTuple):
    """Mean maps over scans, all (X, Y, Z) on the grid of the cohort."""

    brain: npt.NDArray[np.float32]
    """The mean of the volumes, first channel."""
    trained: npt.NDArray[np.float32]
    """By how much what is predicted changes where a voxel is hidden."""
    random: npt.NDArray[np.float32]
    """The same of random weights."""
    difference: npt.NDArray[np.float32]
    """`trained` minus its mirror image about the middle of the mean brain: which side matters more."""
    what: str
    """What changes: the unit of the maps."""
    likeness: float
    """Spearman's correlation of `trained` and `random` inside the brain."""
    scans: int


class _Asked(nn.Module):
    """What a predictor says of normalised volumes, as a network that MONAI can ask."""

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        self.network, self.predictor = predictor.model, predictor

    def forward(self, volumes_bcxyz: torch.Tensor) -> torch.Tensor:
        """(B, C, X, Y, Z) -> (B, K): the probabilities of classes, or the number that is predicted (K = 1)."""
        settings, task = self.predictor.settings, find_task(self.predictor.settings.task)
        with torch.no_grad():
            seen = task.observe(settings, self.predictor.model, torch.as_tensor(volumes_bcxyz).float())
        outputs = {name: values.numpy() for name, values in seen.items()}
        table = task.predictions(settings, outputs, self.predictor.fitted, self.predictor.facts)
        return torch.tensor(_answers(table).to_numpy(np.float32))


def explain(
    predictor: Predictor, volumes: Sequence[Floats], side: int, on_progress: OnProgress | None = None
) -> Explained:
    """The mean occlusion maps of a model over volumes (C, X, Y, Z) as a cohort stores them.

    Args:
        predictor: the model.
        volumes: of scans that it was not trained on.
        side: of the cube that is hidden, in voxels.
        on_progress: hears of every volume.

    Raises:
        UserError: its task has no single answer for a scan, or the cube is larger than a volume.
    """
    task = find_task(predictor.settings.task)
    if task.segmented_classes(predictor.settings) is not None:
        raise UserError(
            f"the task {task.about.name} answers for every voxel, so there is nothing to explain by hiding parts; look "
            "at its maps"
        )
    if side > min(volumes[0].shape[1:]):
        raise UserError(
            f"a hidden cube of {side} voxels does not fit into volumes of "
            f"{' x '.join(map(str, volumes[0].shape[1:]))}; make it smaller"
        )
    torch.manual_seed(0)
    untrained = task.build(predictor.settings, len(predictor.channels), predictor.facts)
    both = (predictor, replace(predictor, model=untrained))
    sums = [np.zeros(volumes[0].shape[1:]) for _ in range(3)]
    words = ""
    for done, volume_cxyz in enumerate(volumes, start=1):
        given = torch.as_tensor(np.asarray(volume_cxyz, dtype=np.float32))[None]
        ready = normalise(given, predictor.settings.data.normalise, predictor.statistics)
        sums[0] += np.asarray(volume_cxyz[0], dtype=np.float64)
        for total, each in zip(sums[1:], both, strict=True):
            changed, words = _changes(each, ready, side)
            total += changed
        if on_progress is not None:
            on_progress(done, len(volumes))
    brain, trained, random = (np.asarray(total / len(volumes), dtype=np.float32) for total in sums)
    inside = brain != 0
    likeness = _likeness(trained[inside], random[inside])
    middle = opposite_voxels(torch.from_numpy(brain)[None, None])
    mirrored = mirror_image(torch.from_numpy(trained)[None, None], middle)[0, 0].numpy()
    return Explained(
        brain, trained * inside, random * inside, (trained - mirrored) * inside, words, likeness, len(volumes)
    )


def _likeness(one_p: npt.NDArray[np.float32], other_p: npt.NDArray[np.float32]) -> float:
    """Spearman's correlation; 0 where one of both is the same everywhere."""
    if np.ptp(one_p) == 0 or np.ptp(other_p) == 0:
        return 0.0
    return float(spearmanr(one_p, other_p).statistic)


def _changes(
    predictor: Predictor, ready_1cxyz: torch.Tensor, side: int
) -> tuple[npt.NDArray[np.float64], str]:
    """What hiding a cube around every voxel changes (X, Y, Z), and in words what it is."""
    asked = _Asked(predictor).eval()
    whole = asked(ready_1cxyz)[0]
    # Hidden voxels have the mean of the brain: whatever the scale is, it is no hole and no lesion.
    mean = float(ready_1cxyz[ready_1cxyz != 0].mean()) if ready_1cxyz.any() else 0.0
    method = OcclusionSensitivity(
        asked, mask_size=side, n_batch=TOGETHER, verbose=False, mode=mean, overlap=OVERLAP, activate=False
    )
    with warnings.catch_warnings():
        # Of torch about MONAI's way of indexing, several for every cube.
        warnings.filterwarnings("ignore", "Using a non-tuple sequence", UserWarning)
        maps, _ = method(ready_1cxyz)
    found = np.asarray(maps)[0].astype(np.float64)
    if len(whole) == 1:
        return np.abs(found[0] - float(whole[0])), "absolute change of what is predicted"
    likeliest = int(whole.argmax())
    return float(whole[likeliest]) - found[likeliest], "fall of the probability of the likeliest class"


def _answers(table: pd.DataFrame) -> pd.DataFrame:
    """The probabilities of classes; else the number that is predicted, or the first one."""
    probabilities = table.filter(regex=f"^{PROBABILITY}")
    if len(probabilities.columns):
        return probabilities
    return table[["predicted"]] if "predicted" in table else table.select_dtypes("number").iloc[:, :1]
