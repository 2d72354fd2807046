"""The scans of one cell: who is trained on, who is in an inner split, who is judged, and their volumes on one scale."""

from __future__ import annotations

import numpy as np
import torch

from core.errors import UserError
from core.evaluation.splits import make_splits
from core.run_settings import RunSettings
from core.tasks import find_task
from core.volumes.cohort.moments import pooled_statistics
from core.volumes.images.preprocess import IntensityStatistics, normalise
from distributed.batches.plan import Rows
from distributed.run.assignment import Cell
from distributed.training.subjects import Labelled, Place, Subjects, rows_without_judged


class CellData:
    """The scans of one cell, as every method on it gets them: whose they are, and on which scale."""

    def __init__(
        self, settings: RunSettings, subjects: Subjects, cell: Cell, place: Place, rows: Rows | None = None
    ) -> None:
        self.settings, self.subjects, self.cell, self.place = settings, subjects, cell, place
        self.task = find_task(settings.task)
        self.labelled = Labelled.of(subjects, settings)
        known, self.evaluation_rows = self.labelled.rows_of(cell.fold)
        if rows is not None:
            known, self.evaluation_rows = rows, rows[:0]
        else:
            known = self.labelled.within_budget(settings, known, cell)
        self.without_label = self._beyond_budget(rows)
        """Rows whose label is known, and is not to be used: the budget of labels is smaller."""
        self.labelled_rows, self.inner_rows = known, known[:0]
        """Those of the training rows on which what judges is fitted; those of an inner split of them."""
        needs_truth = self.task.needs_truth(settings)
        if settings.training.keep == "best" or (needs_truth and self.watches_inner):
            self.labelled_rows, self.inner_rows = self._without_inner(known)
        self.training_rows = self.labelled_rows
        if rows is None and not needs_truth:
            people = subjects.names
            every = rows_without_judged(self.labelled, cell)
            self.training_rows = every[~np.isin(people[every], people[self.inner_rows])]
        if self.watches_inner and not self.inner_rows.size:
            self.training_rows, self.inner_rows = self._without_inner(self.training_rows, by_truth=False)
        self.channels = _channel_indices(settings, subjects.channels)
        self.maps, self.maps_to_judge = self.task.needed_maps(settings), self.task.maps_to_judge(settings)
        self.statistics = self._fit_statistics()

    @property
    def evaluation_subjects(self) -> int:
        """How many people the cell is judged on."""
        return len(np.unique(self.subjects.names[self.evaluation_rows]))

    def prepare(self, rows: Rows, stored: torch.Tensor) -> torch.Tensor:
        """Normalised volumes (n, C, X, Y, Z), float32, on the device, from the `stored` volumes with all channels."""
        self.subjects.note(rows, self.cell)
        volumes = stored[:, self.channels].to(self.place.device).float()
        if self.subjects.scales is not None:
            scales = torch.as_tensor(self.subjects.scales[rows][:, self.channels], device=self.place.device)
            volumes = volumes * scales[:, :, None, None, None]
        return normalise(volumes, self.settings.data.normalise, self.statistics)

    def _beyond_budget(self, rows: Rows | None) -> Rows:
        """The rows of the cell that are in no budget of labels."""
        if rows is not None:
            return rows[:0]
        known = self.labelled.rows_of(self.cell.fold)[0]
        return np.setdiff1d(known, self.labelled.within_budget(self.settings, known, self.cell))

    @property
    def watches_inner(self) -> bool:
        """Whether a plateau of the learning rate follows the loss of an inner split."""
        plateau = self.settings.optimiser.plateau
        return plateau is not None and plateau.watches == "inner"

    def _without_inner(self, rows: Rows, *, by_truth: bool = True) -> tuple[Rows, Rows]:
        """The rows to train on, and those of the inner split: whole subjects, chosen by the seed of the cell."""
        training = self.settings.training
        seed = derive_seed(self.cell, "inner split")
        manifest = self.subjects.manifest.iloc[rows].reset_index(drop=True)
        by = self.task.balanced_by(self.settings)
        # Alike in what the folds are alike in, so that a rare class is on both sides.
        try:
            inner = rows[make_splits(manifest, 2, training.inner, seed, by).holdout]
        except UserError:
            # Too few are left.
            inner = rows
        rest = np.setdiff1d(rows, inner)
        labels = self.labelled.labels
        is_whole = not by_truth or labels.dtype != object or len(set(labels[inner])) == len(set(labels[rest]))
        if min(len(inner), len(rest)) < 2 or not is_whole:
            raise UserError(
                f"training.inner={training.inner:g} makes an inner split of {len(inner)} of {len(rows)} training scans"
                f"{'' if is_whole else ', and a class is on one side only'}; use another share, or training.keep=last "
                "and optimiser.plateau.watches=training, which need none"
            )
        return rest, inner

    def _fit_statistics(self) -> IntensityStatistics | None:
        """Intensity statistics of this cell's training subjects."""
        if self.settings.data.normalise != "training":
            return None
        self.subjects.note(self.training_rows, self.cell)
        return pooled_statistics(self.subjects.volumes.moments(self.training_rows)[:, self.channels])


def _channel_indices(settings: RunSettings, available: tuple[str, ...]) -> list[int]:
    wanted = settings.data.channels or available
    for channel in wanted:
        if channel not in available:
            raise UserError(f"data.channels asks for '{channel}', but the cohort has {', '.join(available)}")
    return [available.index(channel) for channel in wanted]


def derive_seed(cell: Cell, purpose: str) -> int:
    """A seed for one purpose in one cell; different purposes have independent streams."""
    words = (cell.seed, cell.fold + 1, *purpose.encode())
    return int(np.random.SeedSequence(words).generate_state(1)[0])
