"""The quality page of a cohort: a picture of every scan, the unusual ones first, in one offline HTML file."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from markupsafe import Markup

from core.files.tables import read_table
from core.report.answer.describe import number
from core.report.figures.style import as_svg
from core.report.html import load_page, write_page
from core.report.quality.figures import histograms, strip
from core.report.quality.measures import (
    FEWEST,
    UNUSUAL,
    Measured,
    Reason,
    identity,
    measure,
    reasons,
    scores,
)
from core.report.quality.pictures import thumbnail
from core.volumes.cohort.description import read_file, spacing_in_words
from core.volumes.cohort.reader import Cohort

REJECTS = "rejects.csv"
STRIPS = ("coverage", "template_overlap", "brain_ml", "likeness", "intensity_median", "registration_stretch")
MOST_LISTED = 60  # outliers and rejects written out as table rows; the rest are counted


@dataclass(frozen=True)
class Card:
    """One scan on the page."""

    row: int
    name: str
    facts: str
    picture: str
    """Data URL."""
    reasons: tuple[Reason, ...]
    worst: int
    """Place when the most unusual come first."""
    order: int
    """Place in order of subject."""


def write_quality_page(cohort: Cohort, path: str | Path) -> Path:
    """Write the page to `path` and return it. Reads every volume twice, one at a time.

    A scan stands out where a measure's robust z-score is above 3.5 (0.6745 |x - median| / MAD), on the side
    that is suspicious, and by more than a trifle. With fewer than 8 scans nothing is judged.

    Raises:
        UserError: a damaged volume, or the page cannot be written there.
    """
    return write_page(render(cohort), Path(path), "quality page")


def render(cohort: Cohort) -> str:
    """The page as HTML text."""
    measured = measure(cohort)
    z = scores(measured)
    why = reasons(measured, z)
    cards = _cards(cohort, measured, z, why)
    rejects = _rejects(cohort)
    unusual = [card for card in sorted(cards, key=lambda card: card.worst) if card.reasons]
    channels = cohort.description.channels
    return load_page("quality.html").render(
        name=cohort.description.name,
        synthetic=cohort.description.synthetic,
        headline=_headline(cards, rejects, z),
        judged=len(cards) >= FEWEST,
        fewest=FEWEST,
        limit=UNUSUAL,
        cards=cards,
        unusual=unusual[:MOST_LISTED],
        more_unusual=max(0, len(unusual) - MOST_LISTED),
        rejects=rejects[:MOST_LISTED],
        more_rejects=max(0, len(rejects) - MOST_LISTED),
        channels=channels,
        card_width=200 if len(channels) == 1 else 230,
        labels=bool(cohort.description.map_names),
        histograms=_histograms(measured, channels, z, why),
        strips=_strips(measured, z, channels),
        facts=_facts(cohort),
    )


def _cards(
    cohort: Cohort, measured: Measured, z: pd.DataFrame, why: Sequence[Sequence[Reason]]
) -> list[Card]:
    manifest = cohort.manifest
    judged = z.abs().max(axis=1).to_numpy() if len(manifest) >= FEWEST else np.zeros(len(manifest))
    # equal scores keep the order of subjects
    worst = np.argsort(np.argsort(-judged, kind="stable"), kind="stable")
    cards = []
    for row in range(len(manifest)):
        drawn = next((name for name in cohort.description.map_names if cohort.has_map(name)[row]), None)
        label = None if drawn is None else cohort.read_map(drawn, [row])[0]
        picture = thumbnail(cohort.read([row])[0], label, measured.box, measured.shown)
        facts = manifest.iloc[row]
        cards.append(
            Card(row, identity(facts), _caption(facts), picture, tuple(why[row]), int(worst[row]), row)
        )
    return cards


def _caption(facts: pd.Series) -> str:
    age = f"{facts['age']:.3g} y" if pd.notna(facts["age"]) else ""
    return " · ".join(part for part in (age, str(facts["sex"] or ""), str(facts["site"] or "")) if part)


def _headline(cards: Sequence[Card], rejects: Sequence[dict[str, str]], z: pd.DataFrame) -> str:
    left_out = f"; {_counted(len(rejects), 'was', 'were')} left out at ingest" if rejects else ""
    scans = "1 scan" if len(cards) == 1 else f"{len(cards)} scans"
    if len(cards) < FEWEST:
        return f"{scans}, too few to say which is unusual{left_out}"
    unusual = sum(bool(card.reasons) for card in cards)
    verb = "stands" if unusual == 1 else "stand"
    return f"{unusual or 'None'} of {scans} {verb} out in at least one of {len(z.columns)} measures{left_out}"


def _counted(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


def _histograms(
    measured: Measured, channels: Sequence[str], z: pd.DataFrame, why: Sequence[Sequence[Reason]]
) -> list[tuple[str, Markup]]:
    drawn = []
    for index, name in enumerate(channels):
        ending = "" if index == 0 else f"_{index + 1}"
        of_channel = [
            c for c in (f"histogram{ending}", f"intensity_median{ending}", f"intensity_p99{ending}") if c in z
        ]
        unusual = (z[of_channel].abs() > UNUSUAL).any(axis=1).to_numpy() & np.array(
            [bool(each) for each in why]
        )
        figure = histograms(measured, index, name, unusual)
        said = f"{name}: histograms of {len(unusual)} scans, {unusual.sum()} of them unusual"
        drawn.append((name, Markup(as_svg(figure, f"histogram-{index}", said))))
    return drawn


def _strips(measured: Measured, z: pd.DataFrame, channels: Sequence[str]) -> list[tuple[str, Markup]]:
    wanted = (*STRIPS, *(f"intensity_median_{index + 1}" for index in range(1, min(4, len(channels)))))
    drawn = []
    for each in measured.measures:
        if each.column in wanted:
            unusual = (z[each.column].abs() > UNUSUAL).to_numpy() & (len(z) >= FEWEST)
            said = f"{each.title} by site, {unusual.sum()} of {len(z)} scans unusual"
            drawn.append(
                (each.title, Markup(as_svg(strip(measured.table, each, unusual), each.column, said)))
            )
    return drawn


def _rejects(cohort: Cohort) -> list[dict[str, str]]:
    """Subjects that ingest left out; a cohort that was not ingested has no such list."""
    try:
        text = read_file(cohort.location, REJECTS)
    except OSError:
        return []
    table = read_table(io.BytesIO(text), ())
    return [{str(name): str(value) for name, value in row.items()} for row in table.to_dict("records")]


def _facts(cohort: Cohort) -> list[tuple[str, str]]:
    """Facts about the cohort, as (name, value) pairs."""
    description, manifest = cohort.description, cohort.manifest
    ages = manifest["age"].dropna()
    sexes, sites = (manifest[name].replace("", "unknown").value_counts() for name in ("sex", "site"))
    facts = {
        "Cohort": description.name,
        "Location": cohort.location,
        "Source": description.source,
        "Scans": f"{len(manifest)} of {manifest['subject'].nunique()} subjects",
        "Ages": f"{ages.min():.3g} to {ages.max():.3g} years, median {ages.median():.3g}"
        if len(ages)
        else "none",
        "Sexes": ", ".join(f"{name} {count}" for name, count in sexes.items()),
        "Sites": ", ".join(f"{name} {count}" for name, count in sites.items()),
        "Channels": ", ".join(description.channels),
        "Grid": f"{' × '.join(map(str, description.shape))} voxels of {spacing_in_words(description.spacing)}",
        "Stored as": description.dtype,
        "Preprocessing": ", ".join(
            f"{name} {number(value)}" for name, value in description.preprocessing.items()
        ),
        "Hash": description.hash,
    }
    return [(what, str(value)) for what, value in facts.items() if value not in ("", None)]
