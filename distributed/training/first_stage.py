"""The first stage of a cell: a pre-training that several trials share.

    RUN/stages/KEY/   lease        who trains an epoch of it now
                      checkpoint.pt  weights and history after every epoch, in one file
                      history.json, model.safetensors   once it is done, and nothing of them before

KEY says what the weights depend on: the settings of the stage, the cell, its rows, the cohort, its maps, what the
weights start from, the number of workers, and the code. The first trial that needs a stage trains it; others wait, and
begin with its weights. If the trial is stopped or its process dies, the next one continues from the last epoch. Every
trial is charged all epochs of the stage, as if it had trained them, so that configurations are compared by what they
cost.
"""

from __future__ import annotations

import functools
import io
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TypedDict, cast

import numpy as np
import torch
from safetensors.torch import load, save
from torch import distributed as dist

from core.errors import UserError
from core.files.fingerprint import fingerprint
from core.files.writing import replacing, write_text, writing_to
from core.models.weights import weights_of
from core.run_names import CHECKPOINT
from core.run_settings import RunSettings
from core.starts import MODEL
from core.tasks import find_task
from core.volumes.cohort.shards import map_column
from distributed.run.assignment import Cell, EpochRow, are_rows
from distributed.run.code import code_version
from distributed.training.lease import Lease
from distributed.training.loop import CellTraining, TrainingState
from distributed.training.subjects import (
    Labelled,
    Place,
    Subjects,
    beyond_budget,
    rows_of_first_stage,
    without_labels,
)

HISTORY, LEASE = "history.json", "lease"
LOOK_S = 0.2
"""How often a trial that waits looks whether the stage is done."""
STAGE = "pretraining"
"""What an epoch of a first stage is called in the history, and in the records of access."""


class _Saved(TypedDict):
    """An unfinished stage."""

    state: TrainingState
    history: list[EpochRow]


class FirstStage:
    """The pre-training of one cell, as the trial that needs it sees it."""

    def __init__(
        self, settings: RunSettings, subjects: Subjects, cell: Cell, place: Place, folder: Path, known: int
    ) -> None:
        assert settings.pretraining is not None
        # What a training starts from is of the whole trial; the stage is its first part.
        begin = settings.begin.model_copy(
            update={"freeze": "none", "thaw": None, "rate": 1.0, "layer_decay": 1.0}
        )
        self.settings = settings.pretraining.model_copy(update={"begin": begin})
        self.subjects, self.place = subjects, place
        self.cell = replace(cell, trial=f"{cell.trial}-{STAGE}")
        self.rows = rows_of_first_stage(settings, subjects, cell)
        self.without_label = beyond_budget(settings, subjects, cell)
        self.folder = folder / self._key()
        self.lease = Lease(self.folder / LEASE)
        self.known = known
        """How many of its epochs the trial has in its history."""
        self.history: list[EpochRow] = []
        self.training: CellTraining | None = None
        self.written: tuple[int, int] | None = None
        """Which checkpoint this worker wrote last."""
        self.is_done = False

    def advance(self) -> list[EpochRow]:
        """Train an epoch, or take what another trial has trained: the epochs that the trial does not have yet.

        The lease is held during an epoch and not between two of them, so a trial that is stopped blocks nobody.
        """
        if self._decide() == "done":
            self._drop()
            self.is_done = True
            self.history = self._finished_history()
            # The weights know them, whoever has trained.
            self.subjects.note(self.rows, self.cell)
            return self._fresh()
        try:
            training = self._newest()
            started = time.perf_counter()
            row = training.run_epoch()
            row["spent_seconds"] = time.perf_counter() - started
            row["stage"] = STAGE
            self.history.append(row)
            self.is_done = training.epoch == training.rounds
            if self.place.rank == 0:
                with writing_to(self.folder):
                    self._write(training)
                self.written = self._mark()
            if self.place.workers > 1:
                # The others read what the first one has written.
                dist.barrier()
        finally:
            self.lease.release()
        if self.is_done:
            self._drop()
        return self._fresh()

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights of the stage, once it is done.

        Raises:
            UserError: they are damaged.
        """
        try:
            return load((self.folder / MODEL).read_bytes())
        except Exception as error:
            reason = str(error).partition("\n")[0][:160]
            raise UserError(f"{self.folder}/{MODEL} is damaged ({reason}); delete {self.folder}") from None

    def close(self) -> None:
        """Stop training; whoever needs the stage next continues it."""
        self._drop()
        self.lease.release()

    def _drop(self) -> None:
        if self.training is not None:
            self.training.close()
        self.training = None

    def _decide(self) -> str:
        """Wait until the stage is done or nobody trains it; the workers of a trial decide together."""
        while True:
            decided: list[str] = [self._look() if self.place.rank == 0 else ""]
            if self.place.workers > 1:
                # Again and again, because a collective operation must not wait for as long as a stage takes.
                dist.broadcast_object_list(decided)
            if decided[0]:
                return decided[0]
            time.sleep(LOOK_S)

    def _look(self) -> str:
        """Whether the stage is "done", or "mine" to train; "" if another trains it."""
        if (self.folder / MODEL).exists():
            return "done"
        if not self.lease.take():
            return ""
        # It may have been finished in between.
        if (self.folder / MODEL).exists():
            self.lease.release()
            return "done"
        return "mine"

    def _mark(self) -> tuple[int, int] | None:
        """What tells one checkpoint from another."""
        try:
            found = (self.folder / CHECKPOINT).stat()
        except FileNotFoundError:
            return None
        return found.st_mtime_ns, found.st_ino

    def _newest(self) -> CellTraining:
        """The training as it was left by whoever trained its last epoch."""
        is_mine: list[bool] = [self.training is not None and self._mark() == self.written]
        if self.place.workers > 1:
            dist.broadcast_object_list(is_mine)
        if self.training is not None and is_mine[0]:
            return self.training
        self._drop()
        self.training = CellTraining(
            self.settings,
            self.subjects,
            self.cell,
            self.place,
            rows=self.rows,
            without_label=self.without_label,
        )
        saved = self._saved()
        self.history = []
        if saved is not None:
            self.training.load_state_dict(saved["state"])
            self.history = saved["history"]
        return self.training

    def _saved(self) -> _Saved | None:
        path = self.folder / CHECKPOINT
        if not path.exists():
            return None
        try:
            saved: _Saved = torch.load(path, map_location="cpu", weights_only=True)
            return saved if saved["state"]["epoch"] == len(saved["history"]) else None
        # A damaged file makes torch.load raise nearly anything; then the stage is trained anew.
        except Exception:
            return None

    def _finished_history(self) -> list[EpochRow]:
        path = self.folder / HISTORY
        try:
            rows = json.loads(path.read_text())
            if are_rows(rows):
                return cast("list[EpochRow]", rows)
        except (FileNotFoundError, ValueError):
            pass
        raise UserError(f"{path} is damaged; delete {self.folder}")

    def _fresh(self) -> list[EpochRow]:
        rows = self.history[self.known :]
        self.known += len(rows)
        return rows

    def _write(self, training: CellTraining) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.is_done:
            write_text(self.folder / HISTORY, json.dumps(self.history))
            with replacing(self.folder / MODEL) as path:
                path.write_bytes(save(weights_of(training.model)))
            (self.folder / CHECKPOINT).unlink(missing_ok=True)
            return
        buffer = io.BytesIO()
        torch.save(_Saved(state=training.state_dict(), history=self.history), buffer)
        with replacing(self.folder / CHECKPOINT) as path:
            path.write_bytes(buffer.getvalue())

    def _hidden(self) -> list[int]:
        """The rows on which the stage would train otherwise if the budget of the trial had left their label.

        Most stages train on no label, and then theirs are the weights of every budget.
        """
        hidden = np.intersect1d(self.rows, self.without_label)
        if not hidden.size:
            return []
        task = find_task(self.settings.task)
        truth = Labelled.of(self.subjects, self.settings).truth(hidden)
        facts = task.learn(self.settings, truth)
        known, left = (
            task.targets(each, facts) for each in (truth, without_labels(truth, np.arange(len(hidden))))
        )
        differs = [
            not np.array_equal(one, other, equal_nan=True) for one, other in zip(known, left, strict=True)
        ]
        return [int(row) for row in hidden[differs]]

    def _key(self) -> str:
        maps = [
            f"{map_column(name)}_checksum"
            for name in find_task(self.settings.task).needed_maps(self.settings)
        ]
        columns = ["subject", "checksum", *(name for name in maps if name in self.subjects.manifest)]
        people = self.subjects.manifest[columns].iloc[self.rows]
        return fingerprint(
            {
                "settings": self.settings.model_dump(mode="json"),
                "cell": [self.cell.fold, self.cell.seed],
                "rows": self.rows.tolist(),
                "without label": self._hidden(),
                "people": people.to_numpy(str).tolist(),
                "workers": self.place.workers,
                "code": _sources(),
            }
        )[:16]


@functools.cache
def _sources() -> str:
    return code_version().sources
