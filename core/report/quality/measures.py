"""Measures of every scan of a cohort, and which scans differ from the others."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from core.report.quality.pictures import Box
from core.volumes.cohort.reader import Cohort

UNUSUAL = 3.5
"""Robust z-score above which a value is an outlier (Iglewicz and Hoaglin, How to Detect and Handle Outliers, 1993)."""
FEWEST = 8  # scans; among fewer, no scan can be called unusual
SAMPLE = 20_000  # voxels of the brain per channel, evenly spaced in storage order
BINS = 64
COARSE_MM = 8.0  # voxels on which brains are compared with their mean


@dataclass(frozen=True)
class Measure:
    """One number per scan, and when it counts as unusual."""

    column: str
    title: str
    short: str
    """A word or two for under a picture."""
    bad: Literal["low", "high", "both"]
    """Which side is suspicious."""
    least: float
    """Difference from the median below which a value is never unusual, in the measure's unit."""
    relative: bool = False
    """Whether `least` is a fraction of the median."""
    unit: str = ""


PER_SCAN = (
    Measure("coverage", "brain inside the grid", "coverage", "low", 0.01),
    Measure("template_overlap", "overlap with MNI152 (Dice)", "overlap", "low", 0.02),
    Measure("brain_ml", "brain volume", "volume", "both", 0.02, relative=True, unit="ml"),
    Measure("likeness", "likeness to the mean of all others (r)", "likeness", "low", 0.02),
    Measure("registration_metric", "mutual information with MNI152", "mutual inf.", "low", 0.02),
    Measure("registration_stretch", "stretch in registration", "stretch", "high", 0.05),
    Measure("midline_angle", "turned to the midline", "turned", "high", 3.0, unit="°"),
    Measure("midline_residual_angle", "angle left to the mirror image", "left", "high", 0.2, unit="°"),
    Measure("midline_residual_offset", "offset left to the mirror image", "left", "high", 0.2, unit="mm"),
    Measure("midline_likeness", "likeness to the mirror image (r)", "mirror", "low", 0.02),
)
"""Measures without a column in the manifest are left out, except brain_ml and likeness, which are measured here."""


class Measured(NamedTuple):
    """The measures of every scan of a cohort."""

    table: pd.DataFrame
    """The manifest with a column for every measure."""
    measures: tuple[Measure, ...]
    densities: npt.NDArray[np.float64]
    """(N, C, BINS) share of the brain's voxels per bin, of the stored values."""
    edges: npt.NDArray[np.float64]
    """(C, BINS + 1): limits of the bins; values beyond are in the outermost."""
    shown: tuple[tuple[float, float], ...]
    """(C) pairs: values drawn as black and as white."""
    box: Box
    """The part of the grid that holds anything in any scan."""


def measure(cohort: Cohort) -> Measured:
    """Read every scan once, one at a time, and measure it."""
    channels = cohort.description.channels
    table = cohort.manifest.copy()
    samples: list[list[npt.NDArray[np.float32]]] = []
    coarse, voxels = [], []
    occupied = [np.zeros(size, dtype=bool) for size in cohort.description.shape]
    for volume in volumes(cohort):
        inside = volume != 0
        samples.append([_sample(channel[mask]) for channel, mask in zip(volume, inside, strict=True)])
        somewhere = inside.any(axis=0)
        voxels.append(np.count_nonzero(somewhere))
        for axis, seen in enumerate(occupied):
            seen |= somewhere.any(axis=tuple(other for other in range(3) if other != axis))
        coarse.append(_coarse(volume, max(1, round(COARSE_MM / min(cohort.description.edges)))))
    if "brain_ml" not in table:
        table["brain_ml"] = np.array(voxels) * math.prod(cohort.description.edges) / 1000
    table["likeness"] = _likeness(np.stack(coarse))
    edges = np.stack([_edges([scan[index] for scan in samples]) for index in range(len(channels))])
    densities = np.array([[_density(s, e) for s, e in zip(scan, edges, strict=True)] for scan in samples])
    for index in range(len(channels)):
        table[f"histogram{_ending(index)}"] = _distances([scan[index] for scan in samples])
    measures = (
        *PER_SCAN,
        *(m for index, name in enumerate(channels) for m in _of_channel(index, name, len(channels))),
    )
    return Measured(
        table,
        tuple(each for each in measures if each.column in table and table[each.column].notna().any()),
        densities,
        edges,
        tuple((float(low), float(high)) for low, high in edges[:, [0, -1]]),
        (_occupied_part(occupied[0]), _occupied_part(occupied[1]), _occupied_part(occupied[2])),
    )


def _occupied_part(seen: npt.NDArray[np.bool_]) -> slice[int, int]:
    """From the first to the last True of a line; all of a line that has none."""
    places = np.flatnonzero(seen)
    return slice(int(places[0]), int(places[-1]) + 1) if places.size else slice(0, seen.size)


def volumes(cohort: Cohort) -> Iterator[npt.NDArray[np.float32]]:
    """Every scan (C, X, Y, Z), in the manifest's order."""
    for row in range(len(cohort)):
        yield cohort.read([row])[0]


def robust_z(values: npt.ArrayLike, least: float = 0.0) -> npt.NDArray[np.float64]:
    """0.6745 (x - median) / MAD of every value; NaN stays NaN and counts for nothing.

    `least` is the smallest difference that can reach `UNUSUAL`: where most values are equal, the MAD is 0
    and the smallest difference would be infinitely unusual.
    """
    x = np.asarray(values, dtype=np.float64)
    known = x[np.isfinite(x)]
    if known.size == 0:
        return np.full(x.shape, np.nan)
    away = x - np.median(known)
    spread = max(float(np.median(np.abs(known - np.median(known)))), 0.6745 * least / UNUSUAL)
    return 0.6745 * away / spread if spread > 0 else np.where(away == 0, 0.0, np.copysign(np.inf, away))


def scores(measured: Measured) -> pd.DataFrame:
    """(N, measures) robust z-scores, 0 on the side that is not suspicious."""
    columns = {}
    for each in measured.measures:
        values = measured.table[each.column].to_numpy(dtype=float)
        least = each.least * (abs(float(np.nanmedian(values))) if each.relative else 1)
        z = robust_z(values, least)
        if each.bad != "both":
            z = np.clip(z, 0, None) if each.bad == "high" else np.clip(z, None, 0)
        columns[each.column] = np.nan_to_num(z, nan=0.0)
    return pd.DataFrame(columns, index=measured.table.index)


@dataclass(frozen=True)
class Reason:
    """Why a scan is unusual."""

    short: str
    full: str


def reasons(measured: Measured, z: pd.DataFrame) -> list[list[Reason]]:
    """Why each scan is unusual, the most unusual measure first; no reasons where there are too few scans."""
    if len(measured.table) < FEWEST:
        return [[] for _ in range(len(measured.table))]
    return [_reasons(measured, z, row) for row in range(len(measured.table))]


def _reasons(measured: Measured, z: pd.DataFrame, row: int) -> list[Reason]:
    unusual = [each for each in measured.measures if abs(z[each.column].iloc[row]) > UNUSUAL]
    unusual.sort(key=lambda each: -abs(z[each.column].iloc[row]))
    return [
        _reason(each, measured.table[each.column], row, float(z[each.column].iloc[row])) for each in unusual
    ]


def _reason(each: Measure, values: pd.Series[float], row: int, z: float) -> Reason:
    unit = f" {each.unit}" if each.unit else ""
    value, median = _figure(float(values.iloc[row])), _figure(float(values.median()))
    how = f"z {z:+.1f}" if math.isfinite(z) else "all others are alike"
    return Reason(f"{each.short} {value} ({how})", f"{each.title} {value}{unit} (median {median}, {how})")


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _of_channel(index: int, name: str, count: int) -> tuple[Measure, ...]:
    ending, what = _ending(index), f"{name} " if count > 1 else ""
    return (
        Measure(
            f"intensity_median{ending}", f"{what}median before scaling", f"{what}median", "both", 0.02, True
        ),
        Measure(
            f"intensity_p99{ending}",
            f"{what}99th percentile before scaling",
            f"{what}p99",
            "both",
            0.02,
            True,
        ),
        Measure(
            f"histogram{ending}", f"{what}distance to the typical histogram", f"{what}histogram", "high", 0.0
        ),
    )


def _ending(index: int) -> str:
    """The ending that `prepare_scan` gives the measures of further channels."""
    return "" if index == 0 else f"_{index + 1}"


def _sample(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.sort(values[:: max(1, values.size // SAMPLE)])


def _edges(samples: list[npt.NDArray[np.float32]]) -> npt.NDArray[np.float64]:
    """Bins from the typical scan's 0.5th to its 99.5th percentile, and a quarter beyond, if values go there."""
    filled = [sample for sample in samples if sample.size]
    if not filled:
        return np.linspace(0, 1, BINS + 1)
    low, high = np.median([np.percentile(sample, [0.5, 99.5]) for sample in filled], axis=0)
    margin = (high - low) / 4
    least, most = min(sample[0] for sample in filled), max(sample[-1] for sample in filled)
    low, high = max(low - margin, float(least)), min(high + margin, float(most))
    return np.linspace(low, high if high > low else low + 1, BINS + 1)


def _density(sample: npt.NDArray[np.float32], edges: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    counts = np.histogram(np.clip(sample, edges[0], edges[-1]), edges)[0]
    return np.asarray(counts / max(1, sample.size))


def _distances(samples: list[npt.NDArray[np.float32]]) -> npt.NDArray[np.float64]:
    """Earth mover's distance of every scan's values to the typical scan's: mean difference of their quantiles.

    The typical scan has at every quantile the median of all scans. NaN for a channel without a voxel.
    """
    points = (np.arange(200) + 0.5) / 200
    quantiles = np.array([np.quantile(s, points) if s.size else np.full(200, np.nan) for s in samples])
    if not np.isfinite(quantiles).any():
        return np.full(len(samples), np.nan)
    return np.asarray(np.abs(quantiles - np.nanmedian(quantiles, axis=0)).mean(axis=1))


def _coarse(volume: npt.NDArray[np.float32], factor: int) -> npt.NDArray[np.float32]:
    """(C, voxels): means over blocks of `factor` voxels a side, without the remainder at the far sides."""
    sides = [max(1, size // factor) for size in volume.shape[1:]]
    steps = [min(factor, size) for size in volume.shape[1:]]
    cut = volume[:, : sides[0] * steps[0], : sides[1] * steps[1], : sides[2] * steps[2]]
    blocks = cut.reshape(len(volume), sides[0], steps[0], sides[1], steps[1], sides[2], steps[2])
    return np.asarray(blocks.mean(axis=(2, 4, 6))).reshape(len(volume), -1)


def _likeness(coarse: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """(N,) Pearson correlation of every scan with the mean of all others, over the voxels that are brain in
    at least half of all scans; the mean over channels. NaN where it is not defined."""
    scans, channels, _ = coarse.shape
    result = np.full((scans, channels), np.nan)
    for channel in range(channels if scans > 1 else 0):
        values = coarse[:, channel].astype(np.float64)
        values = values[:, (values != 0).mean(axis=0) >= 0.5]
        if values.shape[1] < 2:
            continue
        others = (values.sum(axis=0) - values) / (scans - 1)
        a, b = (each - each.mean(axis=1, keepdims=True) for each in (values, others))
        norm = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
        result[:, channel] = np.divide((a * b).sum(axis=1), norm, out=np.full(scans, np.nan), where=norm > 0)
    return np.asarray(result.mean(axis=1))


def identity(row: pd.Series) -> str:
    """How a person names a scan: subject, and the session where there are several."""
    return f"{row['subject']} {row['session']}".strip() if row.get("session") else str(row["subject"])
