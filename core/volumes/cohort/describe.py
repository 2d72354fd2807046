"""The facts about a cohort that a user needs before training on it."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from core.files.places import shown
from core.volumes.cohort.reader import COLUMNS, Cohort
from core.volumes.images.preprocess import fit_intensity_statistics

SAMPLE = 200
MOST_CLASSES = 20


def describe(cohort: Cohort) -> dict[str, object]:
    """Facts about a cohort as plain values; intensities and brain volumes from at most `SAMPLE` scans.

    `median_age_mae` is the error in years of always answering the median age: a model that does not beat
    it has learnt nothing about age. `brain_volume_age_r` (Pearson, over the sample) shows how much of age
    the size of the brain alone explains; NaN where it is not defined.
    """
    description, manifest = cohort.description, cohort.manifest
    # Of every subject, the mean over the person's scans.
    age = manifest.groupby("subject")["age"].mean().dropna().to_numpy(dtype=float)
    return {
        "name": description.name,
        "folder": shown(cohort.location),
        "source": description.source,
        "synthetic": description.synthetic,
        "subjects": int(manifest["subject"].nunique()),
        "scans": len(cohort),
        "channels": list(description.channels),
        "shape": list(description.shape),
        "spacing_mm": list(description.spacing)
        if isinstance(description.spacing, tuple)
        else description.spacing,
        "dtype": description.dtype,
        "storage": description.storage,
        "compression": description.compression,
        "maps": {name: int(cohort.has_map(name).sum()) for name in cohort.map_names},
        "bytes_on_disk": cohort.size(),
        "preprocessing": description.preprocessing,
        "hash": description.hash,
        "subjects_with_an_age": len(age),
        **(_ages(age) if len(age) else {}),
        "sexes": _counts(manifest["sex"]),
        "sites": _counts(manifest["site"]),
        **{f"classes of {column}": _counts(manifest[column]) for column in columns_of_classes(manifest)},
        **_voxel_facts(cohort, manifest["age"].to_numpy(dtype=float)),
    }


def _ages(age: npt.NDArray[np.float64]) -> dict[str, object]:
    return {
        "age_mean": float(age.mean()),
        "age_sd": float(age.std(ddof=1)) if len(age) > 1 else 0.0,
        "age_min": float(age.min()),
        "age_median": float(np.median(age)),
        "age_max": float(age.max()),
        "median_age_mae": float(np.abs(age - np.median(age)).mean()),
    }


def columns_of_classes(manifest: pd.DataFrame) -> list[str]:
    """Columns of the source with few different words or whole numbers, by which scans could be classified."""
    found = []
    for column in map(str, manifest.columns):
        if column in (*COLUMNS, "sex", "site", "split", "list", "fold") or column.startswith(
            ("source_", "map_", "offset")
        ):
            continue
        is_list = manifest[column].map(lambda value: isinstance(value, list | np.ndarray)).any()
        if is_list or pd.api.types.is_float_dtype(manifest[column]):
            continue
        values = manifest[column].replace("", pd.NA).dropna()
        if 2 <= values.nunique() <= MOST_CLASSES:
            found.append(column)
    return found


def _counts(labels: pd.Series[str]) -> dict[str, int]:
    """How often each label occurs, the most frequent first; an empty label counts as "unknown"."""
    counts = labels.replace("", "unknown").value_counts()
    return {str(label): int(count) for label, count in counts.items()}


def _voxel_facts(cohort: Cohort, age: npt.NDArray[np.float64]) -> dict[str, object]:
    """Intensity per channel, and the volume of non-zero voxels in millilitres with its relation to age."""
    rows = np.unique(np.linspace(0, len(cohort) - 1, min(SAMPLE, len(cohort))).round().astype(int))
    voxels = np.array([np.count_nonzero(cohort.read([row])[0].any(axis=0)) for row in rows])
    statistics = fit_intensity_statistics(cohort.read([row])[0] for row in rows)
    millilitres = voxels * math.prod(cohort.description.edges) / 1000
    known = ~np.isnan(age[rows])
    correlated = known.sum() > 2 and np.ptp(millilitres[known]) > 0 and np.ptp(age[rows][known]) > 0
    return {
        "sampled_scans": len(rows),
        "intensity_mean": dict(zip(cohort.description.channels, statistics.mean, strict=True)),
        "intensity_sd": dict(zip(cohort.description.channels, statistics.sd, strict=True)),
        "brain_volume_ml_mean": float(millilitres.mean()),
        "brain_volume_ml_sd": float(millilitres.std(ddof=1)) if len(rows) > 1 else 0.0,
        "brain_volume_age_r": float(stats.pearsonr(millilitres[known], age[rows][known])[0])
        if correlated
        else float("nan"),
    }
