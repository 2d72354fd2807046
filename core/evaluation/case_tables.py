"""The table of judged cases of a segmentation, and its metrics. N cases, K classes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from core.evaluation import Floats, Names
from core.evaluation.by_subject import subject_means
from core.evaluation.segmentation import dice_of

DICE = "dice"
PREDICTED, REFERENCE = 1, 2
"""The columns of counts of voxels, behind those in both maps; see `segmentation.Agreement`."""


def _mean_of_defined(values_nk: Floats) -> Floats:
    """The mean over the classes that are defined (N,); NaN where none is."""
    defined_nk = ~np.isnan(values_nk)
    counts_n = defined_nk.sum(axis=1)
    totals_n = np.where(defined_nk, values_nk, 0.0).sum(axis=1)
    means: Floats = np.where(counts_n > 0, totals_n / np.maximum(counts_n, 1), math.nan)
    return means


def case_table(
    classes: Sequence[str], counts_nk3: Floats, distances_nk2: Floats, voxel_ml_n: Floats
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


def measured_cases(classes: Sequence[str], cases: pd.DataFrame, subjects: Names) -> dict[str, float]:
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
