"""A task that lives only here: which side of a ball is brighter. High is better, nobody has an age, and maps come out.

brainsweep sweep COHORT --task tests/own_task.py:BrighterSide
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import nn

from core.objectives import Metric
from core.run_settings import Frozen, RunSettings
from core.task_description import TaskDescription
from core.tasks.task import Outcome, Prediction, Step, Task


class NetworkSettings(Frozen):
    """The one thing that can be searched."""

    slope: float = 1.0


class SideSettings(RunSettings):
    """What every task has, and a network."""

    task: str
    network: NetworkSettings = NetworkSettings()
    kind: Literal["linear"] = "linear"


class Network(nn.Module):
    """The difference between the means of both halves, times a number that is learnt."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))

    def forward(self, volumes: torch.Tensor) -> torch.Tensor:
        """(B, C, X, Y, Z) -> (B,)."""
        half = volumes.shape[2] // 2
        return self.slope * (
            volumes[:, :, half:].mean((1, 2, 3, 4)) - volumes[:, :, :half].mean((1, 2, 3, 4))
        )


class BrighterSide(Task[SideSettings]):
    """The column `side` is 1 where the right half is brighter, and 0 where the left one is."""

    about = TaskDescription(
        name="brighter_side",
        metrics={"accuracy": Metric(title="accuracy", better="high")},
        objectives=("accuracy",),
        shown=("accuracy",),
        error=Metric(title="errors"),
        interval="none",
        truth="side",
    )
    settings = SideSettings

    def balanced_by(self, settings: SideSettings) -> str:
        return "side"

    def labels(self, settings: SideSettings, manifest: pd.DataFrame) -> Any:
        return manifest["side"].to_numpy(float)

    def build(self, settings: SideSettings, in_channels: int, facts: Any) -> nn.Module:
        return Network(settings.network.slope)

    def objective(self, settings: SideSettings, facts: Any) -> nn.Module:
        return nn.BCEWithLogitsLoss()

    def step(self, model: Any, objective: Any, views: Any, targets: Any, progress: float) -> Step:
        return Step(objective(model(views.flatten(0, 1)), targets))

    def observe(self, settings: SideSettings, model: Any, volumes: torch.Tensor) -> dict[str, torch.Tensor]:
        score = model(volumes)
        return {"embedding": score[:, None], "score": score, "classes": (volumes[:, 0] != 0).float()}

    def judge(self, settings: SideSettings, training: Any, evaluation: Any, judging: Any) -> Outcome:
        table = self.predictions(settings, evaluation.outputs, None, {})
        wrong = np.abs(table["predicted"] - evaluation.labels)
        return Outcome({"accuracy": float(1 - wrong.mean())}, table.assign(error=wrong))

    def predictions(self, settings: SideSettings, outputs: Any, fitted: Any, facts: Any) -> pd.DataFrame:
        return pd.DataFrame({"predicted": (outputs["score"] > 0).astype(float)})

    def maps(self, settings: SideSettings, outputs: Any, facts: Any) -> dict[str, Any]:
        return {"inside": outputs["classes"].astype(np.int16)}

    def present(self, predictions: pd.DataFrame, truth: Any, calibration: Any, facts: Any) -> Prediction:
        table = predictions if truth is None else predictions.assign(truth=truth)
        return Prediction(table, table[["predicted"]].astype(str), "1 is right, 0 is left.")

    def measure(self, presented: pd.DataFrame, truth: Any, internal: Any) -> dict[str, Any]:
        return {"accuracy": float((presented["predicted"] == truth.labels).mean())}


def space(trial: Any) -> dict[str, object]:
    """A negative slope is wrong about every ball before it is trained."""
    trial.suggest_float("network.slope", -3.0, 3.0)
    trial.suggest_float("optimiser.learning_rate", 1e-5, 1e-3, log=True)
    return dict(trial.params)
