"""A linear probe of voxels: logistic regression on frozen features, judged on a weighted sample of every scan.

Shape suffixes: B, N scans, D features, S sampled voxels, K classes behind the background.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from core.evaluation import Floats
from core.evaluation.label_sets import LabelSets

MOST_VOXELS = 60_000
"""On which a probe is fitted."""
STEPS = 300
UNKNOWN = -1


def sample_voxels(
    features_bdxyz: torch.Tensor, volumes_bcxyz: torch.Tensor, places_bxyz: torch.Tensor, count: int
) -> dict[str, torch.Tensor]:
    """Voxels of the brain of every scan, half of them of classes where there are any: always the same ones.

    Args:
        features_bdxyz: features (B, D, x, y, z), on the grid of the volumes or a coarser one.
        volumes_bcxyz: volumes (B, C, X, Y, Z), 0 outside the brain.
        places_bxyz: places of classes (B, X, Y, Z), 0 the background, negative where unknown.
        count: S.

    Returns:
        voxels (B, S, D); classes (B, S), -1 where there are fewer voxels; weights (B, S): how many each stands for.
    """
    grid, coarse = volumes_bcxyz.shape[2:], features_bdxyz.shape[2:]
    voxels, classes, weights = [], [], []
    for features_dxyz, volume_cxyz, places_xyz in zip(
        features_bdxyz, volumes_bcxyz, places_bxyz.cpu(), strict=True
    ):
        inside = ((volume_cxyz != 0).any(dim=0).cpu() & (places_xyz >= 0)).numpy()
        draws = np.random.default_rng(0)
        chosen, weight = _stratified(places_xyz.numpy(), inside, count, draws)
        where = np.unravel_index(chosen, grid)
        at = tuple(
            torch.from_numpy(np.minimum(axis * few // many, few - 1))
            for axis, few, many in zip(where, coarse, grid, strict=True)
        )
        found_sd = features_dxyz.cpu()[:, at[0], at[1], at[2]].T
        missing = count - len(chosen)
        voxels.append(torch.cat([found_sd, found_sd.new_zeros(missing, found_sd.shape[1])]))
        known = torch.from_numpy(places_xyz.numpy()[where].astype(np.float32))
        classes.append(torch.cat([known, torch.full((missing,), float(UNKNOWN))]))
        weights.append(torch.cat([torch.from_numpy(weight), torch.zeros(missing)]))
    return {"voxels": torch.stack(voxels), "classes": torch.stack(classes), "weights": torch.stack(weights)}


def _stratified(
    places_xyz: npt.NDArray[np.generic], inside: npt.NDArray[np.bool_], count: int, draws: np.random.Generator
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Flat indices of at most `count` voxels, and how many voxels each stands for."""
    flat, within = places_xyz.ravel(), np.flatnonzero(inside.ravel())
    present = [int(each) for each in np.unique(flat[within]) if each > 0]
    share = count // 2 // max(len(present), 1)
    chosen, weights = [], []
    for place in present:
        having = within[flat[within] == place]
        taken = draws.permutation(having)[:share]
        chosen.append(taken)
        weights.append(np.full(len(taken), len(having) / len(taken), dtype=np.float32))
    rest = within[flat[within] == 0]
    taken = draws.permutation(rest)[: count - sum(map(len, chosen))]
    chosen.append(taken)
    weights.append(np.full(len(taken), len(rest) / max(len(taken), 1), dtype=np.float32))
    return np.concatenate(chosen), np.concatenate(weights)


@dataclass(frozen=True)
class DenseProbe:
    """What reads the class of a voxel from its features."""

    model: Pipeline | None
    only: int
    """The class of every voxel, if the training scans have no other."""

    def counts(
        self, voxels_nsd: Floats, classes_ns: Floats, weights_ns: Floats, classes: LabelSets
    ) -> Floats:
        """Voxels in both, in the predicted, in the true class: (N, K, 3), weighted; see `segmentation.Agreement`.

        A region holds the voxels of the smaller ones in it.
        """
        numbers = np.array([0, *(classes.numbers[name] for name in classes.sets)])
        found = np.zeros((len(voxels_nsd), len(classes.sets), 3))
        for scan, (voxels, places, weights) in enumerate(
            zip(voxels_nsd, classes_ns, weights_ns, strict=True)
        ):
            known = places >= 0
            truth, weight = places[known].astype(int), weights[known]
            said = np.full(len(truth), self.only) if self.model is None else self.model.predict(voxels[known])
            pairs = zip(classes.masks(numbers[said]), classes.masks(numbers[truth]), strict=True)
            for place, (predicted, true) in enumerate(pairs):
                found[scan, place] = [
                    weight[predicted & true].sum(), weight[predicted].sum(), weight[true].sum(),
                ]  # fmt: skip
        return found


def fit_dense_probe(voxels_nsd: Floats, classes_ns: Floats) -> DenseProbe:
    """Fit the probe on the sampled voxels (N, S, D) of training scans, of which the classes (N, S) are known."""
    known_ns = classes_ns >= 0
    values, truth = voxels_nsd[known_ns], classes_ns[known_ns].astype(int)
    if len(truth) > MOST_VOXELS:
        kept = np.random.default_rng(0).permutation(len(truth))[:MOST_VOXELS]
        values, truth = values[kept], truth[kept]
    if len(np.unique(truth)) < 2:
        return DenseProbe(None, int(truth[0]) if len(truth) else 0)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=STEPS))
    with warnings.catch_warnings():
        # Where it stops after so many steps, it stops for every configuration.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(values, truth)
    return DenseProbe(model, 0)
