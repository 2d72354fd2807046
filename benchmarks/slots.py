"""The cost of a trial without its training: slots against one TorchTrainer per trial.

    python -m benchmarks.slots

Both run equal trials of one epoch (a small encoder on random volumes), one after another, in one Ray session. The slot
runs with every part of a sweep (study in a journal file, TPE, ASHA, display, TensorBoard); the nested trainers run with
the grid of Tune, which takes almost no time.

"between trials" is the whole time from the end of the training of one trial to the first step of the next one. The time
before the very first step, and after the last one, is spent once; "all in" distributes it over the trials.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ray import train, tune
from ray.train.torch import TorchTrainer
from rich.console import Console
from rich.table import Table

from benchmarks.dummy_trials import answer
from benchmarks.engine import run_search, search_for
from core.models import build
from distributed.slots.cluster import connect
from distributed.slots.slot import Slot, Workers, pack
from distributed.sweeps.executor import DRIVER_RESOURCES

SLOT, NESTED = "slot", "TorchTrainer per trial"


@dataclass(frozen=True)
class Overhead:
    """The seconds of one pattern that were not spent in training loops."""

    gaps: list[float]
    """From the end of each trial's loop to the next one's first step."""
    before: float
    """From the start to the first step of all."""
    after: float
    """From the end of the last loop until everything had ended."""

    @property
    def all_in(self) -> float:
        """Seconds per trial, with the time that is spent once."""
        return (self.before + sum(self.gaps) + self.after) / (len(self.gaps) + 1)


def train_one_epoch(config: dict[str, str]) -> None:
    """The whole work of a trial; it notes in `config["log"]` when its first step began and its last step ended."""
    began = time.time()
    model = build("resnet18", width=0.125)
    optimiser = torch.optim.Adam(model.parameters())
    for _ in range(3):
        optimiser.zero_grad()
        model(torch.randn(4, 1, 23, 28, 23)).square().mean().backward()
        optimiser.step()
    with Path(config["log"]).open("a") as lines:
        lines.write(json.dumps({"began": began, "ended": time.time()}) + "\n")


def make_runner(log: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The runner of a worker in a slot."""

    def run(assignment: dict[str, Any]) -> dict[str, Any]:
        train_one_epoch({"log": log})
        return answer(assignment, epoch=1, epochs=1)

    return run


def nested(config: dict[str, Any], log: str, storage: str) -> None:
    """The pattern in the documentation of Ray: a function trainable that runs a TorchTrainer."""
    TorchTrainer(
        train_one_epoch,
        train_loop_config={"log": log},
        scaling_config=train.ScalingConfig(num_workers=1),
        run_config=train.RunConfig(storage_path=storage),
    ).fit()


def run_in_slot(folder: Path, log: Path, trials: int) -> None:
    """All trials in one slot."""
    trainable = tune.with_parameters(
        Slot,
        workers=Workers(),
        runner=pack(make_runner, log=str(log)),
        storage=str(folder / "tune"),
    )
    run_search(folder, search_for(folder, "tpe", trials), trainable, epochs=1)


def run_nested(folder: Path, log: Path, trials: int) -> None:
    """All trials, each with its own TorchTrainer."""
    trainable = tune.with_parameters(nested, log=str(log), storage=str(folder))
    tune.Tuner(
        tune.with_resources(trainable, DRIVER_RESOURCES),
        param_space={"trial": tune.grid_search(list(range(trials)))},
        tune_config=tune.TuneConfig(max_concurrent_trials=1, reuse_actors=True),
        run_config=tune.RunConfig(storage_path=str(folder), verbose=0),
    ).fit()


def measure(run: Callable[[Path, Path, int], None], folder: Path, trials: int) -> Overhead:
    """The cost of `trials` trials without their training."""
    folder.mkdir()
    log, started = folder / "log.jsonl", time.time()
    run(folder, log, trials)
    ended = time.time()
    loops = sorted(
        (json.loads(line) for line in log.read_text().splitlines()), key=lambda loop: loop["began"]
    )
    if len(loops) != trials:
        raise RuntimeError(f"{len(loops)} of {trials} trials trained")
    gaps = [after["began"] - before["ended"] for before, after in itertools.pairwise(loops)]
    return Overhead(gaps, loops[0]["began"] - started, ended - loops[-1]["ended"])


def main() -> None:
    """Run both, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=12, help="of each pattern")
    trials, console = parser.parse_args().trials, Console()
    with tempfile.TemporaryDirectory(prefix="slots-") as folder, connect(None, console):
        costs = {
            name: measure(run, Path(folder) / name.replace(" ", "-"), trials)
            for name, run in ((SLOT, run_in_slot), (NESTED, run_nested))
        }
    table = Table(
        "pattern", "before (s)", "between trials: mean (s)", "median", "most", "after (s)", "all in, per trial (s)",
        title=f"beside the training of {trials} trials",
    )  # fmt: skip
    for name, cost in costs.items():
        between = statistics.mean(cost.gaps), statistics.median(cost.gaps), max(cost.gaps)
        numbers = (cost.before, *between, cost.after, cost.all_in)
        table.add_row(name, *(f"{number:.3f}" for number in numbers))
    console.print(table)
    ratio = statistics.mean(costs[NESTED].gaps) / statistics.mean(costs[SLOT].gaps)
    all_in = costs[NESTED].all_in / costs[SLOT].all_in
    console.print(
        f"overhead of the nesting is {ratio:.0f} times a slot's between trials, {all_in:.1f} times all in; "
        f"first step of the next trial in a slot after {max(costs[SLOT].gaps):.3f} s at most",
        highlight=False,
    )


if __name__ == "__main__":
    main()
