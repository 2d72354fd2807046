"""Trials without training. They give the answers of real trials, so everything around the training does its full work.

This module imports little, because every simulated slot is a process that imports it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import tune

from distributed.run.assignment import Answer, Assignment

POLL_S = 0.05


def answer(assignment: Assignment, epoch: int, epochs: int) -> Answer:
    """The answer of `Trial` after `epoch` of `epochs` in its only cell; the value follows from the settings."""
    # The settings are not resolved, because this would import torch.
    rate = float(assignment["settings"]["optimiser"]["learning_rate"])  # type: ignore[index]
    value = 5.0 + abs(math.log10(rate) + 3.5) + 5.0 / epoch
    cell = {"fold": 0, "seed": 0, "n": 1, "mae": value, "r2": 0.0, "site_balanced_accuracy": 0.5}
    is_over = epoch == epochs
    # `standing` is not used, because its metrics would import scikit-learn.
    return Answer(
        name=assignment["name"], fold=0, seed=0, epoch=epoch, progress=epoch / epochs, epochs=epoch,
        prunable_epochs=epoch, loss=value, mae=value, value=value, learning_rate=rate, temperature=0.1, width=2.0,
        neighbours=1.0, first_step_at=time.time(), seconds=0.0, spent_seconds=0.0, sd=math.nan, n=int(is_over),
        cells=[cell] if is_over else [], finished=is_over, done=is_over,
    )  # fmt: skip


def make_runner() -> Callable[[Assignment], Answer]:
    """The runner of a slot, whose trials have one epoch that ends at once."""
    return lambda assignment: answer(assignment, epoch=1, epochs=1)


class Sleeper(tune.Trainable):
    """A slot without workers: an epoch is a sleep. All slots begin their first epoch together.

    Made with `tune.with_parameters(Sleeper, seconds=…, epochs=…, slots=…, gate=…)`; `gate` is an empty folder.
    """

    def setup(  # type: ignore[override]
        self, config: dict[str, Any], seconds: float, epochs: int, slots: int, gate: str
    ) -> None:
        """Tell the other slots that this one has started."""
        self.seconds, self.epochs, self.slots, self.gate = seconds, epochs, slots, Path(gate)
        self.epoch = 0
        (self.gate / self.trial_id).touch()

    def step(self) -> dict[str, Any]:
        """One epoch; the first one waits until all slots have started."""
        while len(list(self.gate.iterdir())) < self.slots:
            time.sleep(POLL_S)
        started = time.time()
        time.sleep(self.seconds)
        self.epoch += 1
        said = answer(self.config["assignment"], self.epoch, self.epochs)
        return said | {"first_step_at": started, "ended_at": time.time()}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial."""
        self.config, self.epoch = new_config, 0
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Keep nothing."""
        return {}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Do nothing: see `save_checkpoint`."""
