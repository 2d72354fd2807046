"""The loop of one worker: a model is trained on one cell, epoch by epoch. Plain PyTorch, to read from top to bottom.

Everything random is a function of (seed, fold, epoch, subject). So a run that is interrupted and continued from its
checkpoint ends with the same numbers.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from core.config import RunSettings, SgdSettings
from core.errors import UserError
from core.evaluation.by_subject import subject_means
from core.inference import Predictor, save_predictor
from core.schedules import at, with_epochs
from core.tasks import TASKS
from core.tasks.brain_age import Embedded, Outcome
from core.volumes.cohort.moments import pooled_statistics
from core.volumes.images.preprocess import IntensityStatistics, normalise
from core.volumes.views import make_views
from distributed.batches.hold import Batches, batches, read_ahead
from distributed.batches.plan import Plan, Rows, chunks, share
from distributed.run.assignment import Cell, EpochRow
from distributed.training.batch_norm import synchronise_batch_norm
from distributed.training.subjects import Place, Subjects


class DivergedError(RuntimeError):
    """Training produced numbers that are not finite; the message says in which epoch and cell."""


class TrainingState(TypedDict):
    """The state from which the training of a cell is continued."""

    epoch: int
    """The epochs done in this cell."""
    model: dict[str, torch.Tensor]
    optimiser: dict[str, object]


class CellTraining:
    """The training of one model on one cell."""

    def __init__(self, settings: RunSettings, subjects: Subjects, cell: Cell, place: Place) -> None:
        self.settings, self.subjects, self.cell, self.place = settings, subjects, cell, place
        self.task = TASKS[settings.task]
        self.training_rows, self.evaluation_rows = subjects.rows_of(cell.fold)
        _check_shares(settings, len(self.training_rows), place)
        self.ages = subjects.manifest["age"].to_numpy(float)
        self.channels = _channel_indices(settings, subjects.channels)
        self.statistics = self._fit_statistics()
        torch.manual_seed(_derive_seed(cell, "initialisation"))
        of_training = subjects.manifest["subject"].to_numpy(str)[self.training_rows]
        training_ages = subject_means(self.ages[self.training_rows], of_training)
        self.model = self.task.build_model(settings, len(self.channels), training_ages).to(place.device)
        if place.workers > 1:
            synchronise_batch_norm(self.model, place.device)
        self.trained = DistributedDataParallel(self.model) if place.workers > 1 else self.model
        self.objective = self.task.build_objective(settings)
        self.optimiser = build_optimiser(settings, self.model)
        self.epoch = 0
        self._reading: Batches | None = None

    def run_epoch(self) -> EpochRow:
        """Train one epoch, and return its row of the history."""
        started = time.time()
        self.epoch += 1
        progress = self.epoch / self.settings.training.epochs
        rate = set_rates(self.settings, self.optimiser, self.epoch)
        # For dropout alone: views have seeds of their own, and the objective draws nothing.
        own = f" of worker {self.place.rank}" if self.place.rank else ""
        torch.manual_seed(_derive_seed(self.cell, f"epoch {self.epoch}{own}"))
        self.trained.train()
        # One stream of batches for all epochs that are left.
        if self._reading is None:
            self._reading = batches(self.subjects.volumes, self._plan, self.place.device)
        losses, neighbours = [], []
        for rows in self._plan.epoch(self.epoch):
            losses.append(self._step(rows, next(self._reading), progress))
            neighbours.append(self.objective.diagnostics.get("neighbours", torch.tensor(math.nan)))
        loss = _mean_over_workers(torch.stack(losses).mean(), self.place)
        if not math.isfinite(loss):
            raise DivergedError(
                f"loss became {loss} in epoch {self.epoch} of fold {self.cell.fold}, seed {self.cell.seed}"
            )
        return EpochRow(
            fold=self.cell.fold, seed=self.cell.seed, epoch=self.epoch, progress=progress, loss=loss,
            learning_rate=rate, temperature=self._temperature(progress), width=self._width(progress),
            neighbours=float(torch.stack(neighbours).mean()), first_step_at=started,
            seconds=time.time() - started,
        )  # fmt: skip

    @property
    def evaluation_subjects(self) -> int:
        """How many people the cell is judged on."""
        return int(self.subjects.manifest["subject"].iloc[self.evaluation_rows].nunique())

    def judge(self, *, sites: bool = True, penalty: float | None = None, in_search: bool = False) -> Outcome:
        """Fit a probe on the training subjects, and measure it on the evaluation subjects.

        Args:
            sites: see the task.
            penalty: see the task.
            in_search: whether the outcome holds what the cells of one trial choose a penalty from.
        """
        training, evaluation = self._embed(self.training_rows), self._embed(self.evaluation_rows)
        for embedded in (training, evaluation):
            if not np.isfinite(embedded.embeddings).all():
                raise DivergedError(
                    f"embeddings are not finite after epoch {self.epoch} of fold {self.cell.fold}"
                )
        outcome: Outcome = self.task.judge(
            training,
            evaluation,
            sites=sites,
            penalty=penalty,
            folds=self.subjects.splits.fold_of(self.training_rows) if in_search else None,
        )
        return outcome

    def state_dict(self) -> TrainingState:
        """Everything that is needed to continue; tensors and plain numbers only."""
        return TrainingState(
            epoch=self.epoch, model=self.model.state_dict(), optimiser=self.optimiser.state_dict()
        )

    def load_state_dict(self, state: TrainingState) -> None:
        """Continue after `state["epoch"]`."""
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.epoch = state["epoch"]

    def write_model(self, outcome: Outcome, folder: Path) -> None:
        """Write everything that prediction needs; see `core.inference`."""
        channels = tuple(self.subjects.channels[index] for index in self.channels)
        save_predictor(folder, Predictor(self.settings, self.model, outcome.probe, channels, self.statistics))

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
            _derive_seed(self.cell, "order"),
            range(self.epoch, self.settings.training.epochs + 1),
            self.place.rank,
            self.place.workers,
            self.settings.training.drop_last,
        )

    def _step(self, rows: Rows, stored: torch.Tensor, progress: float) -> torch.Tensor:
        """One optimiser step on the part of this worker in a batch; returns the loss, detached, on the device."""
        volumes = self._prepare(rows, stored)
        views = make_views(volumes, rows, self.epoch, self.cell.seed, self.settings.views)
        ages = torch.as_tensor(self.ages[rows], dtype=torch.float32, device=self.place.device)
        self.optimiser.zero_grad(set_to_none=True)
        with autocast(self.settings, self.place.device):
            loss: torch.Tensor = self.task.training_loss(self.trained, self.objective, views, ages, progress)
        loss.backward()
        clip = self.settings.training.gradient_clip
        if clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self.optimiser.step()
        return loss.detach()

    def _prepare(self, rows: Rows, stored: torch.Tensor) -> torch.Tensor:
        """Normalised volumes (n, C, X, Y, Z), float32, on the device, from the `stored` volumes with all channels."""
        self.subjects.note(rows, self.cell)
        volumes = stored[:, self.channels].to(self.place.device).float()
        if self.subjects.scales is not None:
            scales = torch.as_tensor(self.subjects.scales[rows][:, self.channels], device=self.place.device)
            volumes = volumes * scales[:, :, None, None, None]
        return normalise(volumes, self.settings.data.normalise, self.statistics)

    @torch.no_grad()
    def _embed(self, rows: Rows) -> Embedded:
        """Embeddings of `rows` without augmentation, in evaluation mode; every worker computes a part."""
        self.trained.eval()
        mine, predicted = [], []
        parts = list(
            chunks(share(rows, self.place.rank, self.place.workers), self.settings.training.batch_size)
        )
        reading = read_ahead(self.subjects.volumes, parts, self.place.device)
        for part, stored in zip(parts, reading, strict=True):
            with autocast(self.settings, self.place.device):
                volumes = self._prepare(part, stored)
                mine.append(self.model.embed(volumes).float().cpu().numpy())
                if self.task.is_regression(self.settings):
                    predicted.append(self.model(volumes).squeeze(-1).float().cpu().numpy())
        embeddings = _gather(mine, self.place)
        sites = self.subjects.manifest["site"].to_numpy(str)
        ages = _gather(predicted, self.place) if self.task.is_regression(self.settings) else None
        subjects = self.subjects.manifest["subject"].to_numpy(str)
        return Embedded(embeddings, self.ages[rows], sites[rows], subjects[rows], ages)

    def _fit_statistics(self) -> IntensityStatistics | None:
        """Intensity statistics of this cell's training subjects."""
        if self.settings.data.normalise != "training":
            return None
        self.subjects.note(self.training_rows, self.cell)
        return pooled_statistics(self.subjects.volumes.moments(self.training_rows)[:, self.channels])

    def _temperature(self, progress: float) -> float:
        """The temperature of the objective; NaN if it has none."""
        parts = getattr(self.objective, "parts", None)
        return parts.temperature(progress) if parts else math.nan

    def _width(self, progress: float) -> float:
        """The width of the kernel of the objective; NaN if it has none, such as the kernel `equal`."""
        parts = getattr(self.objective, "parts", None)
        return parts.width(progress) if parts and hasattr(self.settings.objective, "width") else math.nan


def build_optimiser(settings: RunSettings, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of `settings.optimiser` over all parameters of `model`."""
    if isinstance(settings.optimiser, SgdSettings):
        optimiser: torch.optim.Optimizer = torch.optim.SGD(model.parameters())
    else:
        # One pass over the parameters instead of a dozen.
        optimiser = torch.optim.Adam(model.parameters(), fused=True)
    set_rates(settings, optimiser, epoch=1)
    return optimiser


def set_rates(settings: RunSettings, optimiser: torch.optim.Optimizer, epoch: int) -> float:
    """Set the learning rate, the weight decay and the momentum for `epoch` (from 1); returns the learning rate.

    All of them are set in every epoch, because a restored optimiser has its own values: when a member of a population
    continues with the weights of another member, these are the values of another configuration.
    """
    rate = learning_rate(settings, epoch)
    chosen = settings.optimiser
    for group in optimiser.param_groups:
        group["lr"] = rate
        group["weight_decay"] = at(chosen.weight_decay, epoch / settings.training.epochs)
        if isinstance(chosen, SgdSettings):
            group["momentum"] = chosen.momentum
    return rate


def learning_rate(settings: RunSettings, epoch: int) -> float:
    """The learning rate in `epoch` (from 1). The warm-up is linear, from 1 % of the rate of the decay schedule."""
    chosen, epochs = settings.optimiser, settings.training.epochs
    progress = epoch / epochs
    rate = at(chosen.learning_rate, progress) * with_epochs(chosen.decay, epochs)(progress)
    warmup = round(chosen.warmup * epochs)
    if epoch <= warmup:
        rate *= 0.01 + 0.99 * (epoch - 1) / warmup
    return rate


def autocast(settings: RunSettings, device: torch.device) -> torch.autocast:
    """The arithmetic of `settings.training.precision` on `device`.

    Raises:
        UserError: bfloat16 on a CPU. There the weight gradient of small 3D convolutions is wrong, or NaN
            (torch 2.13 with oneDNN, maps with sides of 2 voxels, as in the last stage of a ResNet at 4 mm).
    """
    wanted = settings.training.precision
    if wanted == "bfloat16" and device.type == "cpu":
        raise UserError("training.precision=bfloat16 gives wrong gradients on a CPU; use auto or float32")
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


def _channel_indices(settings: RunSettings, available: tuple[str, ...]) -> list[int]:
    wanted = settings.data.channels or available
    for channel in wanted:
        if channel not in available:
            raise UserError(f"data.channels asks for '{channel}', but the cohort has {', '.join(available)}")
    return [available.index(channel) for channel in wanted]


def _derive_seed(cell: Cell, purpose: str) -> int:
    """A seed for one purpose in one cell; different purposes have independent streams."""
    words = (cell.seed, cell.fold + 1, *purpose.encode())
    return int(np.random.SeedSequence(words).generate_state(1)[0])


def _mean_over_workers(value: torch.Tensor, place: Place) -> float:
    """The mean over workers: the same number on every worker, so that all of them notice a divergence."""
    if place.workers > 1:
        torch.distributed.all_reduce(value)
        value = value / place.workers
    return float(value)


def _gather(mine: list[np.ndarray], place: Place) -> np.ndarray:
    """The arrays of all workers, joined in their order; a worker may have none."""
    if place.workers == 1:
        return np.concatenate(mine)
    parts: list[Any] = [None] * place.workers
    torch.distributed.all_gather_object(parts, mine)
    return np.concatenate([array for part in parts for array in part])
