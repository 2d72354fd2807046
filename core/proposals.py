"""Which searches a cohort allows, by what is known of its people: ages, maps, classes."""

from __future__ import annotations

from collections.abc import Iterator
from shlex import quote

from core.evaluation.splits import known_name
from core.volumes.cohort.describe import columns_of_classes
from core.volumes.cohort.description import numbers_in_maps
from core.volumes.cohort.reader import Cohort

ENOUGH = 5
"""People of each class from which folds and a hold-out can be made."""


def searches_of(cohort: Cohort) -> Iterator[str]:
    """The options of `sweep` for what is known of enough scans of a cohort: ages, maps, classes."""
    manifest = cohort.manifest
    people = manifest.drop_duplicates("subject")
    if people["age"].notna().sum() >= 2 * ENOUGH:
        yield ""
    for name in cohort.map_names:
        numbers = sorted((numbers_in_maps(manifest, name) or set()) - {0, -1})
        if (name, numbers) == ("dseg", [1, 2, 3]):
            yield " --task segmentation"
        elif numbers:
            classes = (
                [f"{name}={numbers[0]}"] if len(numbers) == 1 else [f"class{each}={each}" for each in numbers]
            )
            yield f" --task segmentation --set data.target={name} --set 'data.classes=[{','.join(classes)}]'"
    for column in [*columns_of_classes(manifest), "sex"]:
        members = people[column].map(known_name).value_counts()
        if len(members) > 1 and members.min() >= ENOUGH:
            yield f" --task classification --set {quote(f'data.target={column}')}"
