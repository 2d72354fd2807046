"""What the user sees while a sweep runs: a live display in the terminal, and TensorBoard."""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from ray import tune
from ray.tune.experiment import Trial
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from core.config import flatten
from core.objectives import Metric
from core.report.answer.describe import describe
from distributed.run.assignment import HOLDOUT, Answer, Assignment, is_refit, trial_number
from distributed.search.budget import Budget
from distributed.sweeps.resolve import ResolvedSearch

CUT = "cut by the budget, unfinished,"
SILENCE_S = 30.0
"""Where nobody sees the live display, what runs is told when nothing has been said for so long."""
SCALARS = ("value", "loss", "learning_rate")
"""What the history of every task has; a task adds its own."""


@dataclass(frozen=True)
class _Busy:
    """What a slot is doing."""

    assignment: Assignment
    answer: Answer = field(default_factory=Answer)
    """The last answer; empty before the first one."""


class Display(tune.Callback):
    """The progress of the search: the number of trials done, the best value so far, and the trial of every slot.

    In a terminal the display is live; in a log file it prints one line for every trial that ends.
    """

    def __init__(
        self,
        console: Console,
        trials: int,
        epochs: int,
        budget: Budget,
        objective: Metric,
        what: str = "trials",
    ) -> None:
        self.console, self.trials, self.epochs, self.budget = console, trials, epochs, budget
        self.objective = objective
        self.done = 0
        self.best: tuple[float, str] | None = None
        self.slots: dict[str, _Busy] = {}
        self.said_at = time.monotonic()
        self.overall = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[best]}"), console=console,
        )  # fmt: skip
        self.task = self.overall.add_task(what, total=trials, best="")
        self.live = Live(console=console, get_renderable=self._render, refresh_per_second=4, transient=True)

    def count_earlier(self, finished: int, best: tuple[float, str] | None) -> None:
        """Begin with the trials that earlier sessions have finished, and their best (value, name of the trial)."""
        self.done, self.best = finished, best
        self.overall.update(self.task, completed=finished, best=self._best())

    def __getstate__(self) -> dict[str, object]:
        """Tune pickles its callbacks for a restore that we do not use; a terminal cannot be pickled."""
        return {}

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live.is_started:
            self.live.stop()

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: object) -> None:
        """A slot begins a trial."""
        self.slots[trial.trial_id] = _Busy(trial.config["assignment"])

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, object], **info: object
    ) -> None:
        """An epoch ended."""
        if note := result.get("note"):
            self.console.print(f"note: {note}", highlight=False, soft_wrap=True, markup=False)
        self.slots[trial.trial_id] = _Busy(trial.config["assignment"], cast(Answer, result))
        if not self.console.is_terminal and time.monotonic() - self.said_at > SILENCE_S:
            for slot in list(self.slots.values()):
                self._say(self._slot_line(slot))

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: object) -> None:
        """A trial has finished or was stopped early."""
        self._end(trial, CUT if self.budget.spent else "stopped early")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: object) -> None:
        """The workers of a trial crashed too often."""
        self._end(trial, "crashed")

    def _end(self, trial: Trial, otherwise: str) -> None:
        slot = self.slots.pop(trial.trial_id, None)
        if slot is None:
            return
        assignment, answer = slot.assignment, slot.answer
        name, value = assignment["name"], answer.get("value", math.nan)
        is_trial = trial_number(name) is not None
        how = "finished" if answer.get("finished") else otherwise
        if "failed" in answer:
            how = f"failed: {answer['failed']}"
        # A member of a population has one cell only.
        is_member = assignment.get("keep_every") is not None
        if how == "finished" and is_trial and not is_member and self._is_best(value):
            self.best = (value, name)
        if is_trial and how != CUT:
            self.done += 1
            self.overall.update(self.task, completed=self.done, best=self._best())
        if not self.console.is_terminal:
            shown = "trial" if is_trial else "refit" if is_refit(assignment) else "repeated"
            ended = f"{shown} {name} {how} after {answer.get('epochs', 0)} epochs, {self._value(value)}"
            self._say("  ".join(filter(None, [ended, self._best(), self._left()])))

    def _say(self, line: str) -> None:
        """A line where nobody sees the live display."""
        self.console.print(line, highlight=False, soft_wrap=True, markup=False)
        self.said_at = time.monotonic()

    def _is_best(self, value: float) -> bool:
        sign = self.objective.sign
        return self.best is None or sign * value < sign * self.best[0]

    def _best(self) -> str:
        if self.best is None:
            return ""
        return f"best {self.objective.amount(f'{self.best[0]:.2f}')} (trial {self.best[1]})"

    def _value(self, value: float) -> str:
        return f"{self.objective.title} {self.objective.amount(f'{value:.2f}')}"

    def _left(self) -> str:
        """The rest of the budgets, without the number of trials; empty if no budget was set."""
        left = self.budget.remaining()
        return f"left: {', '.join(left)}" if left else ""

    def _render(self) -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_row(self.overall)
        if not self.slots:
            table.add_row(Text("starting the slots …" if not self.done else "", style="dim"))
        for slot in list(self.slots.values()):
            table.add_row(Text(self._slot_line(slot)))
        trials = max(0, self.trials - self.done)
        left = [f"{trials} trials", *self.budget.remaining()]
        table.add_row(Text(f"left: {', '.join(left)}", style="dim"))
        if self.budget.unlikely:
            table.add_row(Text("further improvement is unlikely: no new trials", style="dim"))
        return table

    def _slot_line(self, slot: _Busy) -> str:
        assignment, answer = slot.assignment, slot.answer
        settings = flatten(assignment["settings"])
        what = describe({name: settings[name] for name in settings.keys() & {"objective.name"}})
        if not answer:
            return f"  {assignment['name']}  {what}  first epoch …"
        where = "refit" if answer["fold"] == HOLDOUT else f"fold {answer['fold']}"
        value = answer.get("value", math.nan)
        shown = "" if math.isnan(value) else f"  {self._value(value)}"
        of = "pre-training, epoch" if "stage" in answer else "epoch"
        total = "" if "stage" in answer else f"/{self.epochs}"
        epoch = f"seed {answer['seed']}, {of} {answer['epoch']}{total}"
        return f"  {assignment['name']}  {what}  {where}, {epoch}{shown}"


class TensorBoard(tune.Callback):
    """Writes the scalars of every trial, and at its end the searched settings with the last and the best value.

    The logger of Ray writes hyperparameters only with the last result, and does not write conditional settings.
    """

    def __init__(self, folder: Path, searched: Collection[str], scalars: Collection[str], sign: int) -> None:
        self.folder, self.searched, self.scalars, self.sign = folder, searched, scalars, sign
        self.writers: dict[str, SummaryWriter] = {}
        self.values: dict[str, list[float]] = {}

    @classmethod
    def of(cls, run: Path, search: ResolvedSearch) -> TensorBoard:
        """Of a search in the folder of a run."""
        of_task = search.about
        scalars = (*SCALARS, of_task.objectives[0], *of_task.course)
        return cls(run / "tensorboard", list(search.profile.settings), scalars, search.about_first.sign)

    def __getstate__(self) -> dict[str, object]:
        """See `Display.__getstate__`."""
        return {}

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, object], **info: object
    ) -> None:
        """Write the epoch's scalars."""
        writer, answer = self._writer(trial), cast(Answer, result)
        # The answer of a slot whose workers ended has no epochs.
        step = answer.get("epochs", 0)
        for name in self.scalars:
            number = result.get(name)
            if isinstance(number, int | float) and math.isfinite(number):
                writer.add_scalar(name, number, step)
        value = answer.get("value", math.nan)
        if math.isfinite(value):
            self.values.setdefault(trial.trial_id, []).append(value)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: object) -> None:
        """Write the settings, the last and the best value, and close the files of the trial."""
        writer, values = self._writer(trial), self.values.pop(trial.trial_id, [])
        settings = flatten(trial.config["assignment"]["settings"])
        # Settings that cannot act in this trial are left out, because TensorBoard needs one type per setting.
        shown = {name: settings[name] for name in self.searched if settings.get(name) is not None}
        if values:
            best = min(values, key=lambda value: self.sign * value)
            metrics = {"final_value": values[-1], "best_value": best}
            # `add_hparams` would open a second file, which takes longer than all else here.
            for summary in hparams(shown, metrics):
                writer._get_file_writer().add_summary(summary)
            for name, number in metrics.items():
                writer.add_scalar(name, number)
        writer.close()
        self.writers.pop(trial.trial_id, None)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: object) -> None:
        """Write the settings of a crashed trial, too."""
        self.on_trial_complete(iteration, trials, trial)

    def _writer(self, trial: Trial) -> SummaryWriter:
        if trial.trial_id not in self.writers:
            name = trial.config["assignment"]["name"]
            self.writers[trial.trial_id] = SummaryWriter(str(self.folder / name))
        return self.writers[trial.trial_id]
