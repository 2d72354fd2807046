"""From one trial's end to the next one's first step: slots, against a TorchTrainer per trial.

    python -m benchmarks.slots

Both run the same one-epoch trials (a small encoder on random volumes), one after another, in one Ray session.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from ray import train, tune
from ray.train.torch import TorchTrainer
from rich.console import Console
from rich.table import Table

from core.models import build
from distributed.cluster import connect
from distributed.slot import Slot, Workers
from distributed.sweep import DRIVER_RESOURCES

TRIALS = 6


def train_one_epoch(trial: int, log: str) -> None:
    """A trial's whole work; notes when its first step began and its last one ended."""
    began = time.time()
    model = build("resnet18", width=0.125)
    optimiser = torch.optim.Adam(model.parameters())
    for _ in range(3):
        optimiser.zero_grad()
        model(torch.randn(4, 1, 23, 28, 23)).square().mean().backward()
        optimiser.step()
    with Path(log).open("a") as lines:
        lines.write(json.dumps({"trial": trial, "began": began, "ended": time.time()}) + "\n")


def make_runner(log: str) -> Any:
    """What a slot's worker runs."""

    def run(assignment: dict[str, Any]) -> dict[str, Any]:
        train_one_epoch(assignment["trial"], log)
        return {"value": 0.0, "done": True}

    return run


def nested(config: dict[str, Any], log: str, storage: str) -> None:
    """The documented nesting: a function trainable that runs a TorchTrainer."""
    TorchTrainer(
        lambda loop: train_one_epoch(**loop),
        train_loop_config={"trial": config["assignment"]["trial"], "log": log},
        scaling_config=train.ScalingConfig(num_workers=1),
        run_config=train.RunConfig(storage_path=storage),
    ).fit()


def run_trials(trainable: Any, storage: str) -> float:
    """All trials, one at a time; returns the seconds it took altogether."""
    started = time.time()
    tune.Tuner(
        tune.with_resources(trainable, DRIVER_RESOURCES),
        param_space={"assignment": tune.grid_search([{"trial": trial} for trial in range(TRIALS)])},
        tune_config=tune.TuneConfig(max_concurrent_trials=1, reuse_actors=True),
        run_config=tune.RunConfig(
            storage_path=storage,
            verbose=0,
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False)
            if isinstance(trainable, type)
            else tune.CheckpointConfig(),
        ),
    ).fit()
    return time.time() - started


def gaps(log: Path) -> list[float]:
    """Seconds between every trial's end and the next one's first step."""
    lines = sorted(
        (json.loads(line) for line in log.read_text().splitlines()), key=lambda line: line["began"]
    )
    return [after["began"] - before["ended"] for before, after in itertools.pairwise(lines)]


def main() -> None:
    """Run both, print the table."""
    console = Console()
    table = Table(
        "pattern", "median gap (s)", "least", "most", "seconds for all trials", title=f"{TRIALS} trials"
    )
    medians = {}
    with tempfile.TemporaryDirectory() as folder, connect(None, console):
        for name in ("slot", "TorchTrainer per trial"):
            log = Path(folder) / f"{name}.jsonl"
            if name == "slot":
                trainable = tune.with_parameters(
                    Slot,
                    workers=Workers(1, 1.0),
                    make_runner=make_runner,
                    arguments={"log": str(log)},
                    storage=folder,
                )
            else:
                trainable = tune.with_parameters(nested, log=str(log), storage=folder)
            seconds = run_trials(trainable, folder)
            between = gaps(log)
            medians[name] = statistics.median(between)
            numbers = (medians[name], min(between), max(between), seconds)
            table.add_row(name, *(f"{number:.3f}" for number in numbers))
    console.print(table)
    console.print(f"ratio of the medians: {medians['TorchTrainer per trial'] / medians['slot']:.0f}")


if __name__ == "__main__":
    main()
