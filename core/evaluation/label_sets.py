"""What the numbers in a map of classes mean: every class is a set of numbers, and classes may overlap as regions do."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from core.errors import UserError
from core.evaluation import Floats

REGIONS: dict[str, tuple[str, ...]] = {
    # Tumour core, whole tumour, enhancing tumour: of necrosis 1, oedema 2, and enhancing 4 (3 since 2023).
    "brats2021": ("tc=1+4", "wt=1+2+4", "et=4"),
    "brats2023": ("tc=1+3", "wt=1+2+3", "et=3"),
}
"""The classes of well-known maps, by name."""
CERTAIN = 0.5
"""From which probability on a region is painted."""


@dataclass(frozen=True)
class LabelSets:
    """The classes of a map, by name: the numbers of each."""

    sets: Mapping[str, tuple[int, ...]]

    @classmethod
    def parse(cls, classes: Sequence[str], most: int) -> LabelSets:
        """From NAME=NUMBER or NAME=NUMBER+NUMBER of every class.

        Raises:
            UserError: two classes are alike, a number is not from 1 to `most`, or regions cannot be told in one map.
        """
        given = [text.partition("=")[::2] for text in classes]
        sets = {name: tuple(int(number) for number in numbers.split("+")) for name, numbers in given}
        found, text = cls(sets), ",".join(classes)
        numbers = [number for each in sets.values() for number in each]
        alike = len(sets) < len(given) or len({frozenset(each) for each in sets.values()}) < len(sets)
        if alike or min(numbers) < 1 or max(numbers) > most:
            raise UserError(
                f"data.classes={text}: every class needs a name and numbers of its own, from 1 to {most}: 0 is the "
                "background"
            )
        if found.overlap:
            own = found.numbers
            absent = next((name for name in sets if name not in own), None)
            if absent is not None:
                raise UserError(
                    f"data.classes={text}: the regions overlap so that no number, or more than one, is of {absent} and "
                    "of no smaller region: a map cannot tell them"
                )
        return found

    @property
    def overlap(self) -> bool:
        """Whether a voxel can be of several classes, which are called regions then."""
        numbers = [number for each in self.sets.values() for number in each]
        return len(set(numbers)) < len(numbers)

    @functools.cached_property
    def numbers(self) -> dict[str, int]:
        """By which a predicted map tells the classes: of several the first; of a region what no smaller one has."""
        if not self.overlap:
            return {name: numbers[0] for name, numbers in self.sets.items()}
        order, found = self._from_large_to_small, {}
        for place, name in enumerate(order):
            smaller = {number for other in order[place + 1 :] for number in self.sets[other]}
            own = [number for number in self.sets[name] if number not in smaller]
            if len(own) == 1:
                found[name] = own[0]
        return {name: found[name] for name in self.sets if name in found}

    @property
    def _from_large_to_small(self) -> list[str]:
        return sorted(self.sets, key=lambda name: -len(self.sets[name]))

    def masks(self, map_xyz: npt.NDArray[np.generic]) -> npt.NDArray[np.bool_]:
        """Where a map (X, Y, Z) has each of the K classes: (K, X, Y, Z)."""
        return np.stack([np.isin(map_xyz, numbers) for numbers in self.sets.values()])

    def paint(self, probabilities_kxyz: Floats) -> npt.NDArray[np.int16]:
        """The map (X, Y, Z) of probabilities (1 + K, X, Y, Z), the background first.

        The number of the likeliest class; of regions the number of the smallest one that is likely enough.
        """
        names = list(self.sets)
        if not self.overlap:
            numbers = np.array([0, *(self.numbers[name] for name in names)], dtype=np.int16)
            return np.asarray(numbers[probabilities_kxyz.argmax(axis=0)])
        painted = np.zeros(probabilities_kxyz.shape[1:], dtype=np.int16)
        for name in self._from_large_to_small:
            painted[probabilities_kxyz[1 + names.index(name)] >= CERTAIN] = self.numbers[name]
        return painted
