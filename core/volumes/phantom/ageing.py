"""Published relations between age, stiffness and tissue volumes, as numbers and small functions.

Stiffness: shear stiffness at 50 Hz of 134 young adults (MRE134, Hiscox et al. 2020, doi
10.1002/hbm.25192) and its decline with age (Sack 2009 and 2011, Hiscox 2018, Lv 2020, Delgorio 2021).
Volumes: medians of large normative samples at 40 and 90 years.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Young-adult shear stiffness in kPa. Lobes are cortical grey matter; the order is that of the label maps.
REGION_STIFFNESS_KPA = {
    "frontal": 2.35,
    "temporal": 2.57,
    "parietal": 2.34,
    "occipital": 2.61,
    "cerebellum": 2.40,
    "thalamus": 3.40,
    "caudate": 3.15,
    "putamen": 3.88,
    "pallidum": 3.83,
    "hippocampus": 2.98,
    "amygdala": 3.32,
}
REGIONS = tuple(REGION_STIFFNESS_KPA)
DEEP_GREY = ("thalamus", "caudate", "putamen", "pallidum")
NUCLEI = (*DEEP_GREY, "hippocampus", "amygdala")  # one value for all their tissue, grey or white
OTHER_GREY_KPA = 2.53  # grey matter outside every region (brain stem, midline)
WHITE_KPA = 3.01
WHOLE_BRAIN_KPA = 2.71
# Regions that lose stiffness at their own pace; the rest of the brain is the last group.
GROUPS = ("frontal", "deep grey", "hippocampus", "rest")
FRONTAL_FACTOR, DEEP_GREY_FACTOR = 1.25, 0.6  # decline relative to the whole brain
REST_FACTOR = 0.87  # leaves the whole brain, a third of it frontal, at its published pace
HIPPOCAMPUS_SPARED_UNTIL = 50.0  # years


def _group(region: str) -> str:
    return "deep grey" if region in DEEP_GREY else region if region in GROUPS else "rest"


def _tabulate_stiffness() -> NDArray[np.float32]:
    own = [
        (region, kpa, kpa if region in NUCLEI else WHITE_KPA) for region, kpa in REGION_STIFFNESS_KPA.items()
    ]
    table = np.zeros((len(GROUPS), 1 + 2 * LABELS), dtype=np.float32)
    for label, (region, grey, white) in enumerate([("", OTHER_GREY_KPA, WHITE_KPA), *own]):
        table[GROUPS.index(_group(region)), [1 + label, 1 + label + LABELS]] = grey, white
    return table


LABELS = 1 + len(REGIONS)  # region labels: 0 for tissue outside every region, else 1 + place in REGIONS
# (G, kinds) kPa of each kind of voxel in the group it belongs to, 0 in the others. Kinds: 0 for no tissue,
# 1 + label for grey matter, 1 + label + LABELS for white.
KPA_OF_KIND = _tabulate_stiffness()

SUBJECT_SD_KPA = 0.18
SITE_SD_KPA = 0.05
VOXEL_SD_KPA = 0.90

INTRACRANIAL_ML = 1480.0  # median; does not change with age
INTRACRANIAL_SD = 0.075  # of the median


def whole_brain_decline(age: ArrayLike) -> NDArray[np.float64]:
    """Fraction of young-adult stiffness lost at `age`: none to 30 y, 0.35 %/y to 60 y, then 0.75 %/y."""
    age = np.asarray(age, dtype=float)
    return np.asarray(0.0035 * np.clip(age - 30, 0, 30) + 0.0075 * np.clip(age - 60, 0, None))


def decline_by_group(age: float) -> NDArray[np.float64]:
    """(G,) fraction of young-adult stiffness that each of GROUPS has lost at `age` (years)."""
    whole = float(whole_brain_decline(age))
    since_spared = max(0.0, whole - float(whole_brain_decline(HIPPOCAMPUS_SPARED_UNTIL)))
    return np.array([FRONTAL_FACTOR * whole, DEEP_GREY_FACTOR * whole, since_spared, REST_FACTOR * whole])


def median_brain_ml(age: ArrayLike) -> NDArray[np.float64]:
    """Median grey + white matter in mL: the line through 1286 mL at 40 y and 1154 mL at 90 y."""
    return 1286.0 + (1154.0 - 1286.0) / 50.0 * (np.asarray(age, dtype=float) - 40.0)


def median_grey_ml(age: ArrayLike) -> NDArray[np.float64]:
    """Median grey matter in mL: the line through 715 mL at 40 y and 586 mL at 90 y."""
    return 715.0 + (586.0 - 715.0) / 50.0 * (np.asarray(age, dtype=float) - 40.0)


def median_ventricle_ml(age: ArrayLike) -> NDArray[np.float64]:
    """Median lateral and third ventricles in mL: 18 at 40 y, 50 at 90 y, the same growth in % each year.

    The two end points are this phantom's assumption, of the size that normative charts show.
    """
    return 18.0 * (50.0 / 18.0) ** ((np.asarray(age, dtype=float) - 40.0) / 50.0)
