"""A trial: a configuration on its cells, continued from where it stands. Only `make_runner` asks Ray.

A *cell* is one (fold, seed) that a configuration is trained and judged on. Every trial visits the same cells in
the same order, and says after every epoch how it stands.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray import train
from ray.train.torch import get_device

from core.config import resolve
from core.errors import UserError
from core.files.writing import replacing, writing_to
from core.objectives import OBJECTIVES, mean_of, measure
from core.tasks.brain_age import Outcome
from distributed.run.assignment import (
    CHECKPOINT,
    HOLDOUT,
    PROGRESS,
    PRUNABLE_EPOCHS,
    Assignment,
    Cell,
    forget_checkpoint,
    kept_checkpoint,
)
from distributed.run.working_copy import bring, send
from distributed.training.loop import CellTraining, DivergedError
from distributed.training.out_of_memory import out_of_memory
from distributed.training.subjects import Place, Subjects


class Runner:
    """Runs one epoch of whatever trial it is assigned; lives as long as its worker."""

    def __init__(self, subjects: Subjects, place: Place | None = None) -> None:
        self.subjects = subjects
        self.place = place or Place()
        self.trial: Trial | None = None

    def __call__(self, assignment: dict[str, Any]) -> dict[str, Any]:
        """One epoch of `assignment` (see `Assignment`); what fails by its own doing is answered."""
        try:
            if self.trial is None or dataclasses.asdict(self.trial.assignment) != assignment:
                self._drop_trial()  # free the last trial's memory first
                self.trial = Trial(Assignment(**assignment), self.subjects, self.place)
            return self.trial.run_epoch()
        except (DivergedError, UserError) as failure:
            answer = self._give_up(str(failure))
            # no trial is to blame for its storage, and the next one would fail alike
            return answer | ({"storage": True} if isinstance(failure.__cause__, OSError) else {})
        except (MemoryError, RuntimeError) as failure:
            reason = out_of_memory(failure)
            if reason is None or self.place.workers > 1:
                raise  # the other workers wait for this one in a collective: only its end wakes them
            return self._give_up(reason)

    def _give_up(self, reason: str) -> dict[str, Any]:
        clock = self.trial.clock if self.trial else {"epochs": 0}
        self._drop_trial()
        return clock | failed(reason)

    def _drop_trial(self) -> None:
        if self.trial is not None:
            self.trial.close()
        self.trial = None


def failed(reason: str) -> dict[str, Any]:
    """The answer of a trial that cannot go on."""
    return {"value": math.nan, "failed": reason, "finished": False, "done": True}


def make_runner(subjects: Subjects) -> Runner:
    """The runner of a slot's worker, placed where Ray Train put it."""
    context = train.get_context()
    return Runner(subjects, Place(get_device(), context.get_world_rank(), context.get_world_size()))


class Trial:
    """One configuration on its cells, continued from its folder's checkpoint where there is one."""

    def __init__(self, assignment: Assignment, subjects: Subjects, place: Place) -> None:
        self.assignment, self.subjects, self.place = assignment, subjects, place
        self.settings = resolve(assignment.settings)
        self.cells = [Cell(**cell) for cell in assignment.cells]
        self.folder = Path(assignment.folder)
        self.history: list[dict[str, Any]] = []
        self.finished: list[dict[str, Any]] = []
        self.answer: dict[str, Any] | None = None
        self.training: CellTraining | None = None
        self._restore()

    @property
    def epochs(self) -> int:
        """Epochs done, over all cells."""
        return len(self.history)

    def run_epoch(self) -> dict[str, Any]:
        """Train one epoch of the current cell, judge it where that is due, save, and say how it stands."""
        if self.answer is not None:  # finished before; the one who asked did not live to hear it
            return self.answer
        started = time.perf_counter()
        training = self._current_cell()
        row = training.run_epoch()
        last_epoch = training.epoch == self.settings.training.epochs
        sites = last_epoch or OBJECTIVES[self.assignment.metric].needs_sites
        outcome = training.judge(sites=sites) if last_epoch or self._judges_every_epoch else None
        row["mae"] = outcome.metrics["mae"] if outcome else math.nan
        value = measure(self.assignment.metric, outcome.metrics) if outcome else math.nan
        row["spent_seconds"] = time.perf_counter() - started
        self.history.append(row)
        if outcome and last_epoch:
            self._finish_cell(training, outcome)
        answer = row | self.clock | self._standing(value)
        if answer["done"]:
            self.answer = answer
        self._save()
        return answer

    @property
    def clock(self) -> dict[str, int]:
        """Epochs done; said once more as `PRUNABLE_EPOCHS`, which schedulers look for, where a trial may be stopped."""
        is_prunable = self.assignment.prunable and not self.assignment.is_refit
        return {"epochs": self.epochs} | ({PRUNABLE_EPOCHS: self.epochs} if is_prunable else {})

    @property
    def _judges_every_epoch(self) -> bool:
        """Pruning looks at every epoch of the first cell, then at whole cells; the hold-out is seen once."""
        return not self.finished and not self.assignment.is_refit

    def _standing(self, value: float) -> dict[str, Any]:
        """The trial's value: of the epoch in its first cell, then the mean of its finished cells."""
        metric = self.assignment.metric
        values = [measure(metric, cell) for cell in self.finished]
        finished = len(self.finished) == len(self.cells)
        return {
            "name": self.assignment.name,
            "value": mean_of(metric, self.finished) if values else value,
            "sd": float(np.std(values, ddof=1)) if len(values) > 1 else math.nan,
            "n": len(values),
            "cells": list(self.finished),
            "spent_seconds": self.assignment.spent_before + sum(row["spent_seconds"] for row in self.history),
            "finished": finished,
            "done": finished,
        }

    def close(self) -> None:
        """Stop reading ahead, where the trial is left before its end."""
        if self.training is not None:
            self.training.close()

    def _current_cell(self) -> CellTraining:
        if self.training is None:
            cell = self.cells[len(self.finished)]
            self.training = CellTraining(self.settings, self.subjects, cell, self.place)
        return self.training

    def _finish_cell(self, training: CellTraining, outcome: Outcome) -> None:
        cell = training.cell
        self.finished.append(
            {"fold": cell.fold, "seed": cell.seed, "n": len(training.evaluation_rows)} | outcome.metrics
        )
        if self.place.rank == 0:
            with writing_to(self.folder):
                if cell.fold == HOLDOUT:
                    training.write_predictions(outcome, self.folder / f"predictions-{cell.seed}.csv")
                if self.assignment.keep_model:
                    training.write_model(outcome, self.folder / f"model-{cell.seed}")
        training.close()
        self.training = None

    def _save(self) -> None:
        """Rank 0 writes the checkpoint, then what people and the driver read; each replaces its file whole."""
        if self.place.rank == 0:
            with writing_to(self.folder):
                self._write()

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.answer is None:
            state = self.training.state_dict() if self.training else None
            saved = {
                "cell": len(self.finished),
                "state": state,
                "history": self.history,
                "finished": self.finished,
                "begin": self.assignment.begin,
            }
            content = _serialised(saved)
            with replacing(self.folder / CHECKPOINT) as path:
                path.write_bytes(content)
            if self.assignment.keep_every and self.epochs % self.assignment.keep_every == 0:
                with replacing(kept_checkpoint(self.folder, self.epochs)) as path:
                    path.write_bytes(content)
        progress = {"history": self.history, "cells": self.finished, "answer": self.answer}
        with replacing(self.folder / PROGRESS) as path:
            path.write_text(json.dumps(progress))
        send(self.folder)
        if self.answer is not None:
            forget_checkpoint(self.folder)

    def _restore(self) -> None:
        try:
            bring(self.folder)
        except OSError as error:
            raise UserError(str(error)) from error
        progress = self.folder / PROGRESS
        if progress.exists():
            self.answer = json.loads(progress.read_text())["answer"]
        if self.answer is not None:
            return
        saved = self._own_checkpoint()
        if saved is None and self.assignment.begin is not None:
            saved = _read_checkpoint(Path(self.assignment.begin))
        if saved is None:
            return
        self.history, self.finished = saved["history"], saved["finished"]
        if saved["state"] is not None:
            self._current_cell().load_state_dict(saved["state"])

    def _own_checkpoint(self) -> dict[str, Any] | None:
        """What this trial saved last; None where that was before it was to begin from something else."""
        checkpoint = self.folder / CHECKPOINT
        if not checkpoint.exists():
            return None
        saved = _read_checkpoint(checkpoint)
        return saved if saved.get("begin") == self.assignment.begin else None


def _read_checkpoint(path: Path) -> dict[str, Any]:
    """What `_write` saved; UserError where it is damaged, or holds more than tensors and plain values."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)  # runs no pickled code
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path} to begin from") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        first = str(error).strip().partition("\n")[0][:160]
        raise UserError(f"checkpoint {path} is damaged or was not written by a sweep: {first}") from None


def _serialised(saved: dict[str, Any]) -> bytes:
    """As torch.save writes it; onto a full disk torch itself raises what says nothing of the disk."""
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    return buffer.getvalue()
