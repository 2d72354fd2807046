"""The figures of the quality page: histograms of all scans, and measures by site."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from core.report.figures.style import ACCENT, GRID, INK, MUTED, PAPER, SECOND, new_figure, styled
from core.report.quality.measures import Measure, Measured, identity

MOST_SITES = 12
NAMED = 4  # outliers written out in a strip plot
NO_SITE = "no site"


@styled
def histograms(measured: Measured, channel: int, name: str, unusual: npt.NDArray[np.bool_]) -> Figure:
    """Distribution of the stored values of one channel inside the brain, a line per scan."""
    figure, axes = new_figure(3.0)
    edges = measured.edges[channel]
    centres = (edges[:-1] + edges[1:]) / 2
    curves = measured.densities[:, channel] * 100
    for which, colour, width, alpha in ((~unusual, MUTED, 0.7, 0.45), (unusual, SECOND, 1.3, 0.9)):
        lines = [np.column_stack([centres, curve]) for curve in curves[which]]
        axes.add_collection(LineCollection(lines, colors=colour, linewidths=width, alpha=alpha))
    axes.plot(centres, np.median(curves, axis=0), color=ACCENT, lw=2)
    axes.set(
        xlim=edges[[0, -1]],
        ylim=(0, 1.05 * max(curves[:, 1:-1].max(), 1e-9)),
        xlabel=f"{name}, stored value",
        ylabel="brain voxels per bin (%)",
    )
    return figure


@styled
def strip(table: pd.DataFrame, each: Measure, unusual: npt.NDArray[np.bool_]) -> Figure:
    """One measure of every scan, by site; outliers in this measure are coloured, the furthest ones are named."""
    values = table[each.column].to_numpy(dtype=float)
    sites = _sites(table)
    names = sorted(set(sites), key=lambda site: (-np.sum(sites == site), site))
    figure, axes = new_figure(0.75 + 0.42 * len(names))
    rank = np.array([names.index(site) for site in sites])
    # spread in a fixed pattern, so that the same cohort gives the same picture
    across = rank + 0.28 * np.sin(2.4 * np.arange(len(values)))
    axes.axvline(np.nanmedian(values), color=INK, lw=1)
    axes.plot(values[~unusual], across[~unusual], "o", color=ACCENT, mec=PAPER, mew=0.4, ms=5, alpha=0.75)
    axes.plot(values[unusual], across[unusual], "D", color=SECOND, mec=PAPER, mew=0.4, ms=6.5)
    furthest = [row for row in np.argsort(-np.abs(values - np.nanmedian(values))) if unusual[row]][:NAMED]
    low, high = np.nanmin(values), np.nanmax(values)
    for row in furthest:
        on_the_right = values[row] > (low + high) / 2
        axes.annotate(
            identity(table.iloc[row]),
            (values[row], across[row]),
            xytext=(-6 if on_the_right else 6, 0),
            textcoords="offset points",
            ha="right" if on_the_right else "left",
            va="center",
            fontsize=8,
            color=INK,
        )
    axes.set_yticks(range(len(names)), [f"{_short(site)} ({np.sum(sites == site)})" for site in names])
    axes.set(ylim=(len(names) - 0.5, -0.5), xlabel=f"{each.title}{f' ({each.unit})' if each.unit else ''}")
    axes.grid(visible=False, axis="y")
    for border in np.arange(len(names) - 1) + 0.5:
        axes.axhline(border, color=GRID, lw=0.8)
    return figure


def _sites(table: pd.DataFrame) -> npt.NDArray[np.object_]:
    sites = table["site"].fillna("").astype(str).replace("", NO_SITE)
    frequent = sites.value_counts().index[: MOST_SITES - 1]
    if sites.nunique() > MOST_SITES:
        sites = sites.where(sites.isin(frequent), "other sites")
    return sites.to_numpy(dtype=object)


def _short(site: str) -> str:
    return site if len(site) <= 18 else site[:17] + "…"
