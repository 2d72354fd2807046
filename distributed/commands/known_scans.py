"""Whether the model of a run was trained on a scan: told by its voxels, or else by the names in its path."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from core.errors import UserError
from core.files.tables import read_table
from core.run_description import find_cohort
from core.run_names import SPLITS, TRAIN
from core.starts import TRAINED_ON, data_set_of
from core.volumes.cohort.reader import Cohort
from core.volumes.cohort.shards import checksum
from core.volumes.cohort.stored import encode
from core.volumes.ingest.prepare import PreparedScan
from distributed.run.folder import RunFolder

Rows = npt.NDArray[np.int64]
TrainedOn = Literal["yes", "no", "perhaps", "unknown"]

SAME = 0.01
"""Two volumes are of one scan if their difference is at most this part of their size (root mean squares). Rounding, by
the storage or on another machine, is a tenth of it or less; two people differ by a fifth or more at 8 mm."""
BRAIN = "brain_ml"
"""The column of a cohort by which most of its scans need not be read: the volume of the brain in the source."""
MOST_BYTES = 2**30
"""So much of a cohort is read for one scan at most."""
TOGETHER = 64
"""The number of rows that are read together."""


@dataclass(frozen=True)
class Standing:
    """What is known of a scan."""

    trained_on: TrainedOn
    """`perhaps`: only the name is known. `unknown`: the scan could not be compared with those of the training."""
    note: str
    """For people; empty if the scan and its name are new."""


@dataclass(frozen=True)
class KnownScans:
    """The scans of the cohort of a run, and what they were used for."""

    roles: dict[str, str]
    """The role in the splits of the run, by subject."""
    validation: str
    """The role on which a training run was validated; empty for a sweep, whose best model saw all folds."""
    cohort: Cohort | None
    """None if it was not found."""
    channel: str
    """Of the model."""
    trained: frozenset[str] | None = None
    """The people of the cohort that the best model was trained on; None if it does not say (versions before 0.3)."""

    @classmethod
    def of(cls, folder: RunFolder, channel: str) -> KnownScans:
        """The scans of a run, whose model takes this channel."""
        about = folder.about
        try:
            cohort = find_cohort(folder.path, about.cohort)
        except UserError:
            cohort = None
        validation = f"fold {about.sweep.get('fold')}" if about.kind == TRAIN else ""
        return cls(roles_of(folder), validation, cohort, channel, _trained(folder, cohort))

    def standing(self, file: Path, scan: PreparedScan) -> Standing:
        """Whether the model was trained on this scan, prepared from `file` as the cohort was."""
        subject, unknown = self._subject_of(scan)
        if subject is not None:
            trained_on, words = self._use_of(subject)
            return Standing(trained_on, f"this is a scan of {subject}, {words}")
        trained_on = "unknown" if unknown else "no"
        notes = []
        if unknown:
            notes.append(f"whether the model was trained on this scan is not known: {unknown}")
        named = next((word for word in _words(file) if word in self.roles), None)
        if named is not None:
            used, words = self._use_of(named)
            trained_on = "perhaps" if used == "yes" else trained_on
            notes.append(f"its name is that of the subject {named}, {words}")
        return Standing(trained_on, "; ".join(notes))

    def _use_of(self, subject: str) -> tuple[TrainedOn, str]:
        role = self.roles.get(subject)
        if role is None:
            return "no", "who was not used in this run"
        if role == "holdout":
            return "no", "who was held out"
        if role == self.validation:
            return "no", "who was in the validation fold, not in the training"
        if self.trained is not None and subject not in self.trained:
            return "no", "on whom the model was not trained: what it learns is not known of this person"
        return (
            "yes",
            "on whom the model was trained: the prediction is too good, and the interval does not hold",
        )

    def _subject_of(self, scan: PreparedScan) -> tuple[str | None, str]:
        """Whose scan this is, None if it is of nobody in the cohort; and why this is not known, or nothing."""
        if self.cohort is None:
            return None, "the cohort of the run was not found"
        rows = _stored_alike(scan, self.cohort)
        if rows.size == 0:
            rows = _alike(scan, self.cohort, self.channel)
        if rows.size * scan.voxels.nbytes > MOST_BYTES:
            return None, f"{rows.size} scans are too many to be compared"
        try:
            row = _same(scan.voxels[0], self.cohort, rows, self.channel)
        except UserError:
            return None, "the cohort of the run cannot be read"
        return (None if row is None else str(self.cohort.manifest["subject"].iloc[row])), ""


def _trained(folder: RunFolder, cohort: Cohort | None) -> frozenset[str] | None:
    """The people of this cohort in the list of the best model; None if there is none."""
    path = folder.path / "best" / TRAINED_ON
    if cohort is None or not path.exists():
        return None
    known = read_table(path, ("subject", "data_set"))
    return frozenset(known.loc[known["data_set"] == data_set_of(cohort.description), "subject"])


def _stored_alike(scan: PreparedScan, cohort: Cohort) -> Rows:
    """The rows with the checksum that this scan would have in the cohort."""
    try:
        stored = checksum(encode(scan.voxels, cohort.description.dtype)[0])
    except UserError:
        # In other units it may be too large for the type.
        return np.empty(0, dtype=np.int64)
    return np.flatnonzero(cohort.manifest["checksum"] == stored)


def _alike(scan: PreparedScan, cohort: Cohort, channel: str) -> Rows:
    """The rows that may be this scan: those with a brain of its volume, if the cohort knows that."""
    # A brain is measured in the first channel.
    if BRAIN not in cohort.manifest or cohort.description.channels[0] != channel:
        return np.arange(len(cohort))
    brain_n = cohort.manifest[BRAIN].to_numpy(float)
    # A row whose volume is not known may be this scan, too.
    return np.flatnonzero(~(np.abs(brain_n / scan.quality[BRAIN] - 1) > SAME))


def _same(volume: npt.NDArray[np.float32], cohort: Cohort, rows: Rows, channel: str) -> int | None:
    """The row among `rows` with these voxels (X, Y, Z) in `channel`; None if there is none."""
    index = cohort.description.channels.index(channel)
    size = float(np.mean(np.square(volume, dtype=np.float64)))
    for start in range(0, len(rows), TOGETHER):
        several = rows[start : start + TOGETHER]
        difference_n = cohort.read(several)[:, index] - volume
        apart_n = np.mean(np.square(difference_n, dtype=np.float64), axis=(1, 2, 3))
        nearest = int(apart_n.argmin())
        if apart_n[nearest] <= SAME**2 * size:
            return int(several[nearest])
    return None


def roles_of(folder: RunFolder) -> dict[str, str]:
    """The role of every subject in the splits of the run, by name."""
    # One line for each scan; all scans of a subject have one role.
    try:
        splits = read_table(folder.path / SPLITS, ("subject", "role"))
    except FileNotFoundError:
        raise UserError(
            f"{folder.path / SPLITS} is missing, and it says who was held out: put it back from a backup"
        ) from None
    return dict(zip(splits["subject"], splits["role"], strict=True))


def _words(file: Path) -> list[str]:
    """The parts of a path that may be the name of a subject: those of the file first, then folders from the inside."""
    name = file.name
    return [name.split("_")[0].partition(".")[0], name.partition(".")[0], *reversed(file.parts[:-1])]
