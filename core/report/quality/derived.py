"""The quality page of an overlay of volumes: every class by site, and pictures of the scans that stand out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from markupsafe import Markup

from core.report.answer.tables import count
from core.report.figures.style import as_svg
from core.report.html import load_page, write_page
from core.report.quality.figures import strip
from core.report.quality.measures import FEWEST, UNUSUAL, Measure, identity, robust_z
from core.report.quality.pictures import thumbnail
from core.volumes.cohort.overlay import OverlayDescription
from core.volumes.cohort.reader import Cohort
from core.volumes.images.resample import bounding_box

MOST_DRAWN, ORDINARY = 24, 4
"""Unusual scans that are drawn, and ordinary ones beside them."""
LEAST = 0.02
"""A difference from the median, as a part of it, below which no volume is unusual."""


@dataclass(frozen=True)
class _Card:
    name: str
    why: str
    picture: str


def write_derived_page(
    cohort: Cohort,
    description: OverlayDescription,
    values: pd.DataFrame,
    seen: npt.NDArray[np.bool_],
    classes_of: Callable[[int], npt.NDArray[np.int16]],
    path: Path,
) -> Path:
    """Write the page to `path` and return it.

    Args:
        cohort: what the overlay belongs to.
        description: of the overlay.
        values: (N rows) of its columns.
        seen: (N,); see `Overlay`.
        classes_of: the segmentation (X, Y, Z) of a row on the grid of the cohort, asked for those that are drawn.
        path: the file.
    """
    table = pd.concat([cohort.manifest[["subject", "session", "site"]], values], axis=1)
    measures = [
        Measure(name, name.replace("_", " "), name, "both", LEAST, relative=True, unit=_unit(name))
        for name in description.columns
    ]
    z = pd.DataFrame(
        {
            each.column: robust_z(table[each.column], LEAST * abs(float(table[each.column].median())))
            for each in measures
        }
    )
    # Among few scans none can be called unusual.
    worst = z.abs().max(axis=1).fillna(0).to_numpy() if len(table) >= FEWEST else np.zeros(len(table))
    unusual = np.flatnonzero(worst > UNUSUAL)
    unusual = unusual[np.argsort(-worst[unusual], kind="stable")]
    ordinary = np.argsort(worst, kind="stable")[:ORDINARY]
    drawn = []
    for each in measures:
        if table[each.column].notna().any():
            figure = strip(table, each, np.abs(z[each.column].to_numpy()) > UNUSUAL)
            drawn.append(Markup(as_svg(figure, each.column, f"{each.title} of every scan, by site")))
    headline = (
        f"{count(len(unusual), 'scan')} of {len(table)} have unusual volumes"
        if len(table) >= FEWEST
        else f"volumes of {count(len(table), 'scan')}: too few to call one unusual"
    )
    if seen.any():
        headline += f"; {count(int(seen.sum()), 'scan')} had been seen by the model"
    page = load_page("derived.html").render(
        name=f"{cohort.description.name} · {description.name}",
        headline=headline,
        made_by=description.made_by,
        command=description.command,
        strips=drawn,
        unusual=[_card(cohort, table, z, int(row), classes_of) for row in unusual[:MOST_DRAWN]],
        more=max(0, len(unusual) - MOST_DRAWN),
        ordinary=[_card(cohort, table, z, int(row), classes_of) for row in ordinary],
        limit=UNUSUAL,
        seen=int(seen.sum()),
    )
    return write_page(page, path, "quality page")


def _unit(name: str) -> str:
    return "mL" if name.endswith("_ml") else ""


def _card(
    cohort: Cohort,
    table: pd.DataFrame,
    z: pd.DataFrame,
    row: int,
    classes_of: Callable[[int], npt.NDArray[np.int16]],
) -> _Card:
    volume, classes = cohort.read([row])[0], classes_of(row)
    inside = volume[volume != 0]
    shown = tuple((float(low), float(high)) for low, high in [np.percentile(inside, [1, 99])] * len(volume))
    of_row = z.iloc[row].abs().sort_values(ascending=False)
    why = [
        f"{str(name).replace('_', ' ')} {table[name].iloc[row]:.4g}" + (f" (z {z[name].iloc[row]:+.1f})")
        for name, size in of_row.items()
        if size > UNUSUAL
    ]
    return _Card(
        identity(table.iloc[row]),
        "; ".join(why),
        thumbnail(volume, classes, bounding_box((volume != 0).any(0)), shown),
    )
