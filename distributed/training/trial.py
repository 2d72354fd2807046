"""A trial: a configuration on its cells, continued from its last epoch. Only `make_runner` uses Ray.

A *cell* is one (fold, seed) on which a configuration is trained and judged. Every trial visits the same cells in the
same order, and gives an answer after every epoch.
"""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from ray import train
from ray.train.torch import get_device

from core.config import resolve
from core.errors import UserError
from core.evaluation import Floats
from core.files.pictures import pictures_of, write_pictures
from core.files.writing import replacing, write_text, writing_to
from core.objectives import measure
from core.run_names import CHECKPOINT, PROGRESS, STAGES
from core.tasks import find_task
from core.tasks.task import JudgedCell, Outcome
from distributed.run.assignment import (
    HOLDOUT,
    Answer,
    Assignment,
    Cell,
    CellRow,
    EpochRow,
    Progress,
    are_rows,
    clock,
    failed,
    forget_checkpoint,
    identity,
    is_refit,
    kept_checkpoint,
    kept_model,
    out_of_fold_predictions,
    read_progress,
)
from distributed.run.quiet import quiet
from distributed.run.standing import standing
from distributed.run.working_copy import DAMAGED, bring, send, set_aside
from distributed.training.atlas import AtlasCell
from distributed.training.first_stage import STAGE, FirstStage
from distributed.training.loop import CellTraining, DivergedError, TrainingState
from distributed.training.out_of_memory import out_of_memory
from distributed.training.subjects import Labelled, Place, Subjects
from distributed.training.table import TableCell
from distributed.training.voxels import VoxelCell

Kept = TypeVar("Kept")
AnyCell = CellTraining | VoxelCell | AtlasCell | TableCell


KeptCell = dict[str, Any]
"""What a finished cell keeps for other ones: its `fold`, and tensors by the names in `core.tasks.task.Task.keeps`."""
FOLD = "fold"


class Saved(TypedDict):
    """A checkpoint: tensors and plain values only."""

    cell: int
    """The number of finished cells."""
    state: TrainingState | None
    """The state of the cell in training; None between two cells."""
    history: list[EpochRow]
    finished: list[CellRow]
    judged: list[KeptCell]
    """Of every finished cell; empty where cells choose nothing together."""
    after_cells: list[list[float]]
    """See `Answer`."""
    begin: str | None
    """See `Assignment`. A checkpoint with another `begin` is older than the exchange, and the trial does not use it."""
    of: str
    """What the trial is; see `identity`."""


class Runner:
    """Runs one epoch of the trial that it is assigned; it lives as long as its worker."""

    def __init__(self, subjects: Subjects, place: Place | None = None, stages: Path | None = None) -> None:
        self.subjects = subjects
        self.place = place or Place()
        self.stages = stages
        """Where first stages lie; in the run of the trial if None."""
        self.trial: Trial | None = None

    def __call__(self, assignment: Assignment) -> Answer:
        """Run one epoch of `assignment`; a failure that the trial itself caused becomes its answer."""
        try:
            if self.trial is None or self.trial.assignment != assignment:
                # Free the memory of the last trial first.
                self._drop_trial()
                self.trial = Trial(assignment, self.subjects, self.place, self.stages)
            return self.trial.run_epoch()
        except (DivergedError, UserError) as failure:
            answer = self._give_up(str(failure))
            if isinstance(failure.__cause__, OSError):
                answer["storage"] = True
            return answer
        except (MemoryError, RuntimeError) as failure:
            reason = out_of_memory(failure)
            if reason is None or self.place.workers > 1:
                # The other workers wait for this one in a collective operation, which only its end breaks off.
                raise
            return self._give_up(reason)

    def _give_up(self, reason: str) -> Answer:
        done = clock(self.trial.assignment, self.trial.history) if self.trial else Answer(epochs=0)
        self._drop_trial()
        return done | failed(reason)

    def _drop_trial(self) -> None:
        if self.trial is not None:
            self.trial.close()
        self.trial = None


def make_runner(subjects: Subjects, stages: Path | None = None) -> Runner:
    """The runner of a worker of a slot, on the device that Ray Train gave the worker."""
    quiet()
    context = train.get_context()
    place = Place(get_device(), context.get_world_rank(), context.get_world_size())
    return Runner(subjects, place, stages)


class Trial:
    """One configuration on its cells, continued from the checkpoint in its folder if there is one."""

    def __init__(
        self, assignment: Assignment, subjects: Subjects, place: Place, stages: Path | None = None
    ) -> None:
        self.assignment, self.subjects, self.place = assignment, subjects, place
        self.settings = resolve(assignment["settings"])
        self.task = find_task(self.settings.task)
        self.labelled = Labelled.of(subjects, self.settings)
        self.cells = [Cell(**cell, trial=assignment["name"]) for cell in assignment["cells"]]
        self.folder = Path(assignment["folder"])
        self.stages = stages or self.folder.parent.parent / STAGES
        self.history: list[EpochRow] = []
        self.finished: list[CellRow] = []
        self.judged: list[KeptCell] = []
        self.after_cells: list[list[float]] = []
        self.answer: Answer | None = None
        self.training: AnyCell | None = None
        self.stage: FirstStage | None = None
        """The first stage of the current cell, while it is trained."""
        self.earlier: Mapping[str, torch.Tensor] | None = None
        """The weights of a finished first stage, until the second one begins."""
        self.identity = identity(assignment)
        self.notes: list[str] = []
        """What the next answer tells the user about the files of this trial."""
        self._restore()

    @property
    def epochs(self) -> int:
        """Epochs done, over all cells."""
        return len(self.history)

    def run_epoch(self) -> Answer:
        """Train one epoch of the current cell, judge it if that is due, save, and answer.

        Cells without a network take milliseconds: all that are left are one epoch here.
        """
        # The trial was finished before, but the process that asked for it ended before it got the answer.
        if self.answer is not None:
            return self.answer | self._told()
        answer = self._run_epoch()
        while self._is_quick and not answer["done"]:
            answer = self._run_epoch()
        self._save()
        return answer | self._told()

    def _run_epoch(self) -> Answer:
        stage = self._first_stage()
        if stage is not None:
            return self._advance(stage)
        started = time.perf_counter()
        training = self._current_cell()
        row = training.run_epoch()
        last_epoch = training.epoch == training.rounds
        metric, of_task = self.assignment["metric"], self.task.describe(self.settings)
        sites = last_epoch or of_task.objective(metric).needs_sites
        outcome = None
        if last_epoch or self._judges_every_epoch:
            # A refit has the penalty that its configuration had in the search; the cells of a trial find it.
            in_search = last_epoch and not is_refit(self.assignment)
            outcome = training.judge(sites=sites, penalty=self.assignment.get("penalty"), in_search=in_search)
        followed = of_task.objectives[0]
        noted: Any = {followed: outcome.metrics[followed] if outcome else math.nan}
        row.update(noted)
        value = measure(metric, outcome.metrics) if outcome else math.nan
        row["spent_seconds"] = time.perf_counter() - started
        self.history.append(row)
        if outcome and last_epoch:
            self._finish_cell(training, outcome)
        answer = cast(Answer, row) | standing(self.assignment, self.history, self.finished, value)
        row["value"] = answer["value"]
        if answer["done"]:
            self.answer = answer | self._found_penalty() | Answer(after_cells=self.after_cells)
            answer = self.answer
        return answer

    def _first_stage(self) -> FirstStage | None:
        """The first stage of the current cell; None if there is none, or it is done."""
        is_over = self.training is not None or self.earlier is not None or self.assignment.get("on_voxels")
        if self.settings.pretraining is None or is_over:
            return None
        if self.stage is None:
            cell = self.cells[len(self.finished)]
            known = sum(row.get("stage") == STAGE and _is_of(row, cell) for row in self.history)
            self.stage = FirstStage(self.settings, self.subjects, cell, self.place, self.stages, known)
        return self.stage

    def _advance(self, stage: FirstStage) -> Answer:
        """An epoch of the first stage, or all of them if another trial has trained it: nothing is judged in it."""
        rows = stage.advance()
        while not rows and not stage.is_done:
            # It has to be trained again: its folder is gone, or the code has changed.
            rows = stage.advance()
        self.history += rows
        if stage.is_done:
            self.earlier, self.stage = stage.weights(), None
        if not rows:
            # All of them were known: this trial was interrupted between its two stages.
            return self._run_epoch()
        return cast(Answer, rows[-1]) | standing(self.assignment, self.history, self.finished, math.nan)

    def _told(self) -> Answer:
        told, self.notes = self.notes, []
        return Answer(note="; ".join(told)) if told else Answer()

    @property
    def _judges_every_epoch(self) -> bool:
        """Pruning uses every epoch of the first cell, and later whole cells; a refit looks at the hold-out once."""
        return not self.finished and not is_refit(self.assignment)

    def close(self) -> None:
        """Stop reading ahead, if the trial stops before its end."""
        if self.training is not None:
            self.training.close()
        if self.stage is not None:
            self.stage.close()

    @property
    def _is_quick(self) -> bool:
        return self._features is not None and not self.assignment.get("on_voxels")

    @cached_property
    def _features(self) -> Floats | None:
        """What a task without a network is fitted on."""
        return self.task.features(self.settings, self.subjects.manifest)

    def _current_cell(self) -> AnyCell:
        if self.training is None:
            cell = self.cells[len(self.finished)]
            if self.assignment.get("on_voxels"):
                self.training = self._baseline(cell)
            elif self._features is not None:
                self.training = TableCell(self.settings, self.subjects, cell, self.labelled, self._features)
            else:
                self.training = CellTraining(
                    self.settings, self.subjects, cell, self.place, earlier=self.earlier
                )
                self.earlier = None
        return self.training

    def _baseline(self, cell: Cell) -> VoxelCell | AtlasCell:
        """The baseline on voxels that the assignment names."""
        if not self.task.needed_maps(self.settings):
            return VoxelCell(self.settings, self.subjects, cell, self.place)
        simplest = self.task.about.simplest
        one_class = simplest is not None and self.assignment["name"] == simplest.folder
        return AtlasCell(self.settings, self.subjects, cell, self.place, one_class=one_class)

    def _finish_cell(self, training: AnyCell, outcome: Outcome) -> None:
        cell = training.cell
        self.finished.append(
            {"fold": cell.fold, "seed": cell.seed, "n": training.evaluation_subjects, **outcome.metrics}
        )
        if self.place.rank == 0:
            with writing_to(self.folder):
                if cell.fold == HOLDOUT:
                    path = self.folder / f"predictions-{cell.seed}.csv"
                else:
                    path = out_of_fold_predictions(self.folder, cell.fold, cell.seed)
                self.labelled.write_predictions(cell.fold, outcome.predictions, path)
                if outcome.pictures and is_refit(self.assignment):
                    write_pictures(pictures_of(self.folder, cell.seed), self._named(outcome, cell))
                if self.assignment["keep_model"]:
                    training.write_model(outcome, kept_model(self.folder, cell.fold, cell.seed))
        if outcome.kept:
            self.judged.append(
                {FOLD: cell.fold} | {name: _as_tensors(outcome.kept[name]) for name in self.task.keeps}
            )
            self._judge_together()
        self.after_cells.append(self._values())
        training.close()
        self.training = None

    def _named(self, outcome: Outcome, cell: Cell) -> dict[str, npt.NDArray[np.generic]]:
        """The pictures of an outcome, and whose they are."""
        people = self.labelled.truth(self.labelled.rows_of(cell.fold)[1]).subjects
        places = outcome.pictures["place"].astype(int)
        return {**outcome.pictures, "subject": people[places]}

    def _values(self) -> list[float]:
        """The objective in every finished cell."""
        return [measure(self.assignment["metric"], cell) for cell in self.finished]

    def _judge_together(self) -> None:
        """Judge every finished cell anew, with what the cells of other folds choose for it."""
        if len(self.judged) < len(self.finished):
            # This trial was begun by version 0.2, which kept no predictions.
            return
        made = self.task.judge_together(self._judged_cells())
        for row, (metrics, predictions) in zip(self.finished, made, strict=bool(made)):
            row.update(metrics)
            if self.place.rank == 0:
                fold, seed = int(row["fold"]), int(row["seed"])
                path = out_of_fold_predictions(self.folder, fold, seed)
                with writing_to(self.folder):
                    self.labelled.write_predictions(fold, predictions, path)

    def _found_penalty(self) -> Answer:
        """The penalty for a refit of this configuration, as its cells found it.

        Nothing if its task finds none, or if an older version did not keep every cell.
        """
        if is_refit(self.assignment) or not self.judged or len(self.judged) < len(self.finished):
            return Answer()
        penalty = self.task.penalty_of(self._judged_cells())
        return Answer() if penalty is None else Answer(penalty=penalty)

    def _judged_cells(self) -> list[JudgedCell]:
        return [
            JudgedCell(
                cell[FOLD],
                self.labelled.truth(self.labelled.rows_of(cell[FOLD])[1]),
                {name: _as_arrays(cell[name]) for name in self.task.keeps},
                metrics,
            )
            for cell, metrics in zip(self.judged, self.finished, strict=True)
        ]

    def _save(self) -> None:
        """Rank 0 writes the checkpoint, then the file for people and the driver; each is replaced in one step."""
        if self.place.rank == 0:
            with writing_to(self.folder):
                self._write()

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.answer is None:
            state = self.training.state_dict() if self.training else None
            saved = Saved(
                cell=len(self.finished), state=state, history=self.history, finished=self.finished, judged=self.judged,
                after_cells=self.after_cells, begin=self.assignment["begin"], of=self.identity,
            )  # fmt: skip
            content = _serialised(saved)
            with replacing(self.folder / CHECKPOINT) as path:
                path.write_bytes(content)
            if self.assignment["keep_every"] and self.epochs % self.assignment["keep_every"] == 0:
                with replacing(kept_checkpoint(self.folder, self.epochs)) as path:
                    path.write_bytes(content)
        progress = Progress(of=self.identity, history=self.history, cells=self.finished, answer=self.answer)
        write_text(self.folder / PROGRESS, json.dumps(progress))
        send(self.folder)
        if self.answer is not None:
            forget_checkpoint(self.folder)

    def _restore(self) -> None:
        try:
            bring(self.folder)
        except OSError as error:
            raise UserError(str(error)) from error
        progress = self._own(PROGRESS, read_progress)
        saved = self._own(CHECKPOINT, lambda folder: _read_checkpoint(folder / CHECKPOINT))
        if self._is_of_another(progress) or self._is_of_another(saved):
            # What a member of a population has kept is of use to other members, so its folder stays where it is.
            if self.assignment["begin"] is None:
                self._set_aside()
            progress, saved = None, None
        self.answer = progress["answer"] if progress else None
        if self.answer is not None:
            return
        if saved is not None and saved.get("begin") != self.assignment["begin"]:
            # It is older than the last exchange.
            saved = None
        if saved is None and self.assignment["begin"] is not None:
            saved = _read_checkpoint(Path(self.assignment["begin"]))
        if saved is None:
            return
        self.history, self.finished = saved["history"], saved["finished"]
        # Version 0.2 kept none: then these cells, and all later ones of the trial, keep what they chose alone. Versions
        # before 0.3 was released chose together, and kept not all of it: the finished cells stay so.
        self.judged = [cell for cell in saved.get("judged", []) if cell.keys() >= set(self.task.keeps)]
        # Before version 0.3 no later cell changed the value of an earlier one.
        earlier = self._values()
        before = [earlier[: count + 1] for count in range(len(earlier))]
        self.after_cells = saved.get("after_cells", before)
        if saved["state"] is not None:
            # Also where a first stage came before: its weights are among these.
            self._current_cell().load_state_dict(saved["state"])

    def _own(self, name: str, read: Callable[[Path], Kept]) -> Kept | None:
        """What `read` finds in the folder; None if the file `name` is absent, or damaged: then it is set aside."""
        path = self.folder / name
        if not path.exists():
            return None
        try:
            return read(self.folder)
        except UserError as error:
            # Another worker has moved it away meanwhile.
            if not path.exists():
                return None
            if self.place.rank == 0:
                with writing_to(self.folder):
                    path.rename(path.with_name(f"{name}{DAMAGED}"))
            self.notes.append(f"{error}; {path.name} was set aside, and the trial goes on without it")
            return None

    def _is_of_another(self, kept: Progress | Saved | None) -> bool:
        """Whether a file is of another configuration: one that had this number in a study that has lost its end, or the
        one that a member of a population had before an exchange."""
        known = kept.get("of") if kept else None
        return known not in (None, self.identity)

    def _set_aside(self) -> None:
        """Rename the folder, so that nothing of it is taken for this trial."""
        if self.place.rank == 0:
            with writing_to(self.folder):
                aside = set_aside(self.folder, f"{self.folder.name}-set-aside")
            self.notes.append(
                f"{self.folder} held another configuration, perhaps because the study has lost its end; it is now "
                f"{aside.name}"
            )


def _is_of(row: EpochRow, cell: Cell) -> bool:
    """Whether an epoch is of this cell."""
    return (row["fold"], row["seed"]) == (cell.fold, cell.seed)


def _as_tensors(kept: Any) -> Any:
    """What an outcome keeps, as tensors: a checkpoint holds nothing else."""
    if isinstance(kept, Mapping):
        return {key: torch.as_tensor(values) for key, values in kept.items()}
    return torch.as_tensor(kept)


def _as_arrays(kept: Any) -> Any:
    """The inverse of `_as_tensors`."""
    return (
        {key: values.numpy() for key, values in kept.items()} if isinstance(kept, Mapping) else kept.numpy()
    )


def _read_checkpoint(path: Path) -> Saved:
    """The checkpoint that `_write` saved; UserError if it is damaged, or holds more than tensors and plain values."""
    try:
        # With `weights_only` no pickled code is executed.
        saved: Saved = torch.load(path, map_location="cpu", weights_only=True)
        absent = {"state", "history", "finished"} - saved.keys()
        if absent:
            raise ValueError(f"it has no {min(absent)}")
        if not (are_rows(saved["history"]) and are_rows(saved["finished"])):
            raise ValueError("its history is none")
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path} to begin from") from None
    # A damaged file makes torch.load raise nearly anything.
    except Exception as error:
        if isinstance(error, OSError):
            raise
        first = str(error).strip().partition("\n")[0][:160]
        raise UserError(f"checkpoint {path} is damaged or was not written by a sweep: {first}") from None
    return saved


def _serialised(saved: Saved) -> bytes:
    """The bytes that torch.save writes; onto a full disk, torch.save raises an error that does not name the disk."""
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    return buffer.getvalue()
