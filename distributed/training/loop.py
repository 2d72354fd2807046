"""The loop of one worker: a model is trained on one cell, epoch by epoch. Plain PyTorch, to read from top to bottom.

Everything random is a function of (seed, fold, epoch, subject). So a run that is interrupted and continued from its
checkpoint ends with the same numbers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from core.errors import UserError
from core.files.tables import write_table
from core.inference import Predictor, save_predictor
from core.lookup import look_up
from core.models.weights import freeze, load_part, train_unfrozen
from core.run_settings import RunSettings
from core.starts import TRAINED_ON, scans_of
from core.tasks.task import Judging, Observed, Outcome, Seen, Step
from distributed.batches.hold import Batch, Batches, batches, read_ahead
from distributed.batches.plan import Part, Plan, Rows, chunks, share
from distributed.run.assignment import Cell, EpochRow
from distributed.training.batch_norm import synchronise_batch_norm
from distributed.training.cell_data import CellData, derive_seed
from distributed.training.optimiser import build_optimiser, plateau_factor, set_rates, warm_up
from distributed.training.subjects import (
    Place,
    Subjects,
    rows_of_first_stage,
    without_labels,
)


class DivergedError(RuntimeError):
    """Training produced numbers that are not finite; the message says in which epoch and cell."""


class BestEpoch(TypedDict):
    """The epoch that was best on the inner split of a cell."""

    epoch: int
    value: float
    model: dict[str, torch.Tensor]


class TrainingState(TypedDict):
    """The state from which the training of a cell is continued. Versions before 0.3 wrote the first three."""

    epoch: int
    """The epochs done in this cell."""
    model: dict[str, torch.Tensor]
    optimiser: dict[str, object]
    losses: NotRequired[list[float]]
    """The loss of every epoch that a plateau watches."""
    scaler: NotRequired[dict[str, object]]
    """Of the loss, in float16."""
    best: NotRequired[BestEpoch | None]


class CellTraining(CellData):
    """The training of one model on one cell.

    Args:
        settings: of the trial, or of its first stage.
        subjects: of the cohort.
        cell: the fold and the seed.
        place: where this worker runs.
        rows: what is trained on instead of the rows of the cell; then nobody is judged.
        earlier: weights of a first stage to start from; those that the settings name if None.
        without_label: rows of a first stage whose labels are beyond the budget of the trial.
    """

    def __init__(
        self,
        settings: RunSettings,
        subjects: Subjects,
        cell: Cell,
        place: Place,
        rows: Rows | None = None,
        earlier: Mapping[str, torch.Tensor] | None = None,
        without_label: Rows | None = None,
    ) -> None:
        super().__init__(settings, subjects, cell, place, rows)
        if without_label is not None:
            self.without_label = without_label
        _check_shares(settings, len(self.training_rows), place)
        torch.manual_seed(derive_seed(cell, "initialisation"))
        self.facts = self.task.learn(settings, self.labelled.truth(self.labelled_rows))
        everyone = self.labelled.truth(np.arange(len(subjects.manifest)))
        self.targets = self.task.targets(without_labels(everyone, self.without_label), self.facts)
        self.model: nn.Module = self.task.build(settings, len(self.channels), self.facts).to(place.device)
        self._begin(earlier)
        if place.workers > 1:
            synchronise_batch_norm(self.model, place.device)
        freeze(self.model, settings.begin.freeze)
        self.trained = self._shared()
        self.objective = self.task.objective(settings, self.facts).to(place.device)
        self.optimiser = build_optimiser(settings, self.model)
        self.scaler = torch.amp.GradScaler(
            place.device.type, enabled=settings.training.precision == "float16"
        )
        self.epoch = 0
        self.losses: list[float] = []
        self.best: BestEpoch | None = None
        self._reading: Batches | None = None

    def _begin(self, earlier: Mapping[str, torch.Tensor] | None) -> None:
        """Load the weights of the first stage, or those that the settings start from."""
        begin = self.settings.begin
        if earlier is not None:
            load_part(self.model, earlier, begin.take)
        if earlier is not None or begin.weights is None:
            return
        start = look_up(self.subjects.starts, begin.weights, "start of this run")
        load_part(self.model, start.tensors, begin.take, begin.rename)

    def _shared(self) -> nn.Module:
        """The model as it is trained: with the gradients of all workers."""
        return DistributedDataParallel(self.model) if self.place.workers > 1 else self.model

    def _thaw(self, progress: float) -> None:
        """From `begin.thaw` on train the frozen parts, too. Parallel training looks only once at what is trained."""
        thaw = self.settings.begin.thaw
        if thaw is None or progress <= thaw or all(each.requires_grad for each in self.model.parameters()):
            return
        self.model.requires_grad_(True)
        self.trained = self._shared()

    @property
    def rounds(self) -> int:
        """The epochs of the cell."""
        return self.settings.training.rounds

    def run_epoch(self) -> EpochRow:
        """Train one epoch, and return its row of the history."""
        started = time.time()
        self.epoch += 1
        progress = self.epoch / self.settings.training.rounds
        lowered = plateau_factor(self.settings.optimiser.plateau, self.losses)
        rate = set_rates(self.settings, self.optimiser, self.epoch, lowered)
        # For dropout alone: views have seeds of their own, and no objective draws anything.
        own = f" of worker {self.place.rank}" if self.place.rank else ""
        torch.manual_seed(derive_seed(self.cell, f"epoch {self.epoch}{own}"))
        self._thaw(progress)
        train_unfrozen(self.trained)
        # One stream of batches for all epochs that are left.
        if self._reading is None:
            self._reading = batches(self.subjects.volumes, self._plan, self.place.device, self.maps)
        losses: list[torch.Tensor] = []
        noted: dict[str, list[torch.Tensor]] = {}
        plan = self._plan
        ordered = list(zip(plan.epoch(self.epoch), plan.passes(self.epoch), strict=True))
        together = self.settings.training.accumulate
        steps = math.ceil(len(ordered) / together)
        for index, (rows, passed) in enumerate(ordered):
            of_step = min(together, len(ordered) - index // together * together)
            is_first, is_last = (
                index % together == 0,
                (index + 1) % together == 0 or index + 1 == len(ordered),
            )
            if is_first:
                self.optimiser.zero_grad(set_to_none=True)
                steps_before = (self.epoch - 1) * steps + index // together
                if self.settings.training.steps is not None:
                    # Few judgements must not mean few values of a schedule.
                    epoch = (steps_before + 1) / steps
                    progress = epoch / self.settings.training.rounds
                    rate = set_rates(self.settings, self.optimiser, epoch, lowered, steps_before / steps)
                warm_up(self.settings, self.optimiser, steps_before, rate)
            step = self._gradients(rows, next(self._reading), passed, progress, of_step)
            if is_last:
                self._take_step()
            losses.append(step.loss.detach())
            for name, number in step.noted.items():
                noted.setdefault(name, []).append(number)
        loss = _mean_over_workers(torch.stack(losses).mean(), self.place)
        if not math.isfinite(loss):
            raise DivergedError(
                f"loss became {loss} in epoch {self.epoch} of fold {self.cell.fold}, seed {self.cell.seed}"
            )
        watched = self._inner_loss(progress)
        self.losses.append(loss if watched is None else watched)
        self._keep_best()
        row: dict[str, float] = {
            "fold": self.cell.fold, "seed": self.cell.seed, "epoch": self.epoch, "progress": progress, "loss": loss,
            "learning_rate": rate, **self.task.course(self.settings, self.objective, progress),
            **{name: float(torch.stack(numbers).nanmean()) for name, numbers in noted.items()},
            **({} if watched is None else {"inner_loss": watched}),
            "first_step_at": started, "seconds": time.time() - started,
        }  # fmt: skip
        return cast(EpochRow, row)

    def judge(self, *, sites: bool = True, penalty: float | None = None, in_search: bool = False) -> Outcome:
        """Judge the model on the evaluation subjects, with what the task fits on the training subjects.

        Args:
            sites: see `Judging`.
            penalty: see `Judging`.
            in_search: whether the outcome holds what the cells of one trial choose from together.
        """
        if self.best is not None and self.epoch == self.settings.training.rounds:
            # From here on the model of this cell is that of its best epoch.
            self.model.load_state_dict(self.best["model"])
        fitted_on = self.labelled_rows if self.task.reads_training else self.labelled_rows[:0]
        training, evaluation = self._observe(fitted_on), self._observe(self.evaluation_rows)
        for observed in (training, evaluation):
            if not np.isfinite(observed.embeddings).all():
                raise DivergedError(
                    f"embeddings are not finite after epoch {self.epoch} of fold {self.cell.fold}"
                )
        folds = self.subjects.splits.fold_of(self.labelled_rows) if in_search else None
        return self.task.judge(self.settings, training, evaluation, Judging(sites, penalty, folds))

    def state_dict(self) -> TrainingState:
        """Everything that is needed to continue; tensors and plain numbers only."""
        return TrainingState(
            epoch=self.epoch,
            model=self.model.state_dict(),
            optimiser=self.optimiser.state_dict(),
            losses=self.losses,
            scaler=self.scaler.state_dict(),
            best=self.best,
        )

    def load_state_dict(self, state: TrainingState) -> None:
        """Continue after `state["epoch"]`."""
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.epoch = state["epoch"]
        self.losses, self.best = list(state.get("losses", [])), state.get("best")
        if state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])

    def write_model(self, outcome: Outcome, folder: Path) -> None:
        """Write everything that prediction needs; see `core.inference`."""
        channels = tuple(self.subjects.channels[index] for index in self.channels)
        predictor = Predictor(
            self.settings, self.model, outcome.fitted, channels, self.statistics, self.facts
        )
        save_predictor(folder, predictor)
        known = self.trained_on
        if known is not None:
            write_table(known, folder / TRAINED_ON)

    @property
    def trained_on(self) -> pd.DataFrame | None:
        """The scans that the weights know, also from a first stage, or from what they started with; None if unknown."""
        start = self.subjects.starts.get(self.settings.begin.weights or "")
        if start is not None and start.trained_on is None:
            return None
        rows = [self.training_rows, self.inner_rows]
        if self.settings.pretraining is not None:
            rows.append(rows_of_first_stage(self.settings, self.subjects, self.cell))
        mine = scans_of(self.subjects.manifest, np.unique(np.concatenate(rows)), self.subjects.data_set)
        earlier = [] if start is None or start.trained_on is None else [start.trained_on]
        return pd.concat([*earlier, mine], ignore_index=True).drop_duplicates()

    def close(self) -> None:
        """Stop reading ahead, if the cell ends before its last epoch."""
        if self._reading is not None:
            self._reading.close()

    @property
    def _plan(self) -> Plan:
        """The plan of the epochs that are left, beginning with the current one."""
        return Plan(
            self.training_rows,
            self.settings.training.batch_size,
            derive_seed(self.cell, "order"),
            range(self.epoch, self.settings.training.rounds + 1),
            self.place.rank,
            self.place.workers,
            self.settings.training.drop_last,
            self._batches_per_epoch,
        )

    @property
    def _batches_per_epoch(self) -> int | None:
        training = self.settings.training
        return None if training.judge_every is None else training.judge_every * training.accumulate

    def _gradients(self, rows: Rows, read: Batch, passed: int, progress: float, of_step: int) -> Step:
        """Add the gradients of this worker's part of a batch, of which a step has `of_step`; its numbers stay on the
        device."""
        views, targets = self._seen(rows, read, passed)
        with autocast(self.settings, self.place.device):
            step = self.task.step(self.trained, self.objective, views, targets, progress)
        self.scaler.scale(step.loss / of_step if of_step > 1 else step.loss).backward()
        return step

    def _take_step(self) -> None:
        """One step of the optimiser, with the gradients that were added up."""
        clip = self.settings.training.gradient_clip
        if clip is not None:
            self.scaler.unscale_(self.optimiser)
            nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self.scaler.step(self.optimiser)
        self.scaler.update()

    @torch.no_grad()
    def _inner_loss(self, progress: float) -> float | None:
        """The loss of the inner split, if a plateau watches it: views and anchors are drawn alike in every epoch.

        Otherwise luck in drawing would count as an epoch without improvement.
        """
        if not self.watches_inner:
            return None
        self.trained.eval()
        torch.manual_seed(derive_seed(self.cell, "inner loss"))
        parts = [Part(part) for part in self._inner_parts()]
        reading = read_ahead(self.subjects.volumes, parts, self.place.device, self.maps)
        losses = []
        for part, read in zip(parts, reading, strict=True):
            views, targets = self._seen(part.rows, read, passed=0)
            with autocast(self.settings, self.place.device):
                step = self.task.step(self.trained, self.objective, views, targets, progress)
            losses += [step.loss.detach().float()] * len(part.rows)
        return _mean_over_workers(torch.stack(losses).nanmean(), self.place)

    def _inner_parts(self) -> Iterator[Rows]:
        """This worker's part of every batch of the inner split, all of it where there are more workers than scans.

        Losses that gather over workers would take a scan that two workers have for two people.
        """
        for batch in chunks(self.inner_rows, self.settings.training.batch_size):
            is_shared = len(batch) >= self.place.workers
            yield share(batch, self.place.rank, self.place.workers) if is_shared else batch

    def _seen(self, rows: Rows, read: Batch, passed: int) -> tuple[Seen, torch.Tensor]:
        """The views of a batch in one pass over the scans, and the targets."""
        volumes, seed = self.prepare(rows, read.volumes), self.cell.seed
        views = self.task.views_with_maps(self.settings, volumes, read.maps, rows, passed, seed)
        return views, torch.as_tensor(self.targets[rows], device=self.place.device)

    def _keep_best(self) -> None:
        """Keep the weights of this epoch if it is the best one on the inner split so far."""
        if self.settings.training.keep == "last":
            return
        of_task = self.task.describe(self.settings)
        metric = of_task.objectives[0]
        fitted_on = self.labelled_rows if self.task.reads_training else self.labelled_rows[:0]
        training, inner = self._observe(fitted_on), self._observe(self.inner_rows)
        outcome = self.task.judge(self.settings, training, inner, Judging(sites=False))
        value = outcome.metrics[metric]
        sign = of_task.metrics[metric].sign
        if not math.isfinite(value):
            raise UserError(
                f"training.keep=best cannot act: {of_task.metrics[metric].title} of the inner split is not "
                f"defined ({len(inner.labels)} scans); use a larger training.inner, or training.keep=last"
            )
        if self.best is None or sign * value < sign * self.best["value"]:
            weights = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
            self.best = BestEpoch(epoch=self.epoch, value=value, model=weights)

    @torch.no_grad()
    def _observe(self, rows: Rows) -> Observed:
        """What the model sees in `rows` without augmentation, in evaluation mode; every worker computes a part."""
        self.trained.eval()
        mine: dict[str, list[np.ndarray]] = {}
        mine_only = share(rows, self.place.rank, self.place.workers)
        parts = [Part(part) for part in chunks(mine_only, self.settings.training.batch_size)]
        reading = read_ahead(self.subjects.volumes, parts, self.place.device, self.maps_to_judge)
        for part, read in zip(parts, reading, strict=True):
            volumes = self.prepare(part.rows, read.volumes)
            beside = self.subjects.beside(read.maps, part.rows, final=self.epoch == self.rounds)
            with autocast(self.settings, self.place.device):
                seen = self.task.observe_with_maps(self.settings, self.model, volumes, beside)
            for name, values in seen.items():
                mine.setdefault(name, []).append(values.float().cpu().numpy())
        outputs = _gather(mine, self.place)
        truth = self.labelled.truth(rows)
        # Of no scans nothing is seen.
        embeddings = outputs.pop("embedding", np.empty((0, 0)))
        return Observed(truth.labels, truth.sites, truth.subjects, embeddings, outputs, more=truth.more)


def autocast(settings: RunSettings, device: torch.device) -> torch.autocast:
    """The arithmetic of `settings.training.precision` on `device`.

    Raises:
        UserError: bfloat16 on a CPU. There the weight gradient of small 3D convolutions is wrong, or NaN
            (torch 2.13 with oneDNN, maps with sides of 2 voxels, as in the last stage of a ResNet at 4 mm).
    """
    wanted = settings.training.precision
    if wanted == "bfloat16" and device.type == "cpu":
        raise UserError("training.precision=bfloat16 gives wrong gradients on a CPU; use auto or float32")
    if wanted == "float16":
        if device.type == "cpu":
            raise UserError("training.precision=float16 is for GPUs; use auto or float32")
        return torch.autocast(device.type, torch.float16)
    on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted != "float32" and on_gpu)


def _check_shares(settings: RunSettings, training_subjects: int, place: Place) -> None:
    """UserError if a batch is too small for every worker to have a part of it."""
    smallest = min(settings.training.batch_size, training_subjects)
    if smallest < place.workers:
        raise UserError(
            f"{place.workers} workers cannot share a batch of {smallest} subjects; use fewer workers, or a larger "
            "training.batch_size"
        )


def _mean_over_workers(value: torch.Tensor, place: Place) -> float:
    """The mean over workers: the same number on every worker, so that all of them notice a divergence."""
    if place.workers > 1:
        torch.distributed.all_reduce(value)
        value = value / place.workers
    return float(value)


def _gather(mine: dict[str, list[np.ndarray]], place: Place) -> dict[str, np.ndarray]:
    """The arrays of all workers by name, joined in their order; a worker may have none."""
    parts: list[Any] = [mine]
    if place.workers > 1:
        parts = [None] * place.workers
        torch.distributed.all_gather_object(parts, mine)
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: np.concatenate([array for part in parts for array in part.get(name, [])]) for name in names}
