"""Kill a sweep's driver again and again at random moments, resume it each time, and count what was lost.

    python -m benchmarks.survival --kills 10

A finished trial is lost or repeated if its record in the study changes after a kill. A finished epoch is lost or
repeated if its row in the history of the trial changes; each row has the time of its first step, so a repeated epoch is
visible.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from rich.console import Console
from rich.table import Table

from core.run_names import STUDY
from core.volumes.cohort.writer import CohortWriter

TRIALS, FOLDS, EPOCHS, SLOTS = 10, 2, 10, 2
SMALL = {
    "model.width": 0.0625, "model.head.dimension": 8, "training.epochs": EPOCHS, "training.batch_size": 4,
    "objective.neighbours": "null",
}  # fmt: skip
STARTING_SHARE = 0.25
"""The share of kills during the start of the driver, up to `STARTING_S` seconds after its first instruction."""
STARTING_S, TRAINING_S = 20.0, 5.0
"""The other kills come up to `TRAINING_S` seconds after the first epoch is on disk, about the duration of a trial."""

History = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Kill:
    """One SIGKILL of a driver: the state at that moment, and the differences to the state at the end."""

    after_s: float
    """From the driver's start."""
    during: str
    finished: int
    running: int
    epochs: int
    finished_lost: int = -1
    epochs_lost: int = -1


def write_cohort(folder: Path, subjects: int = 30) -> Path:
    """A cohort of noise whose brightness falls with age; what the trials learn does not matter here."""
    generator = np.random.default_rng(0)
    writer = CohortWriter(
        folder, name="noise", channels=("stiffness",), shape=(12, 12, 12), spacing=8.0, affine=np.eye(4),
        preprocessing={"spacing": 8.0}, source="benchmark", synthetic=True,
    )  # fmt: skip
    with writer:
        for index in range(subjects):
            age = float(generator.uniform(20, 80))
            volume = (3 - 0.02 * age + generator.normal(0, 0.1, (1, 12, 12, 12))).astype(np.float32)
            writer.add(volume, subject=f"sub-{index:03d}", age=age, site=f"site-{index % 2}")
    return folder


def campaign(folder: Path, kills: int, seed: int, starting_share: float = STARTING_SHARE) -> list[Kill]:
    """Start a sweep in `folder`/run, kill it `kills` times, let it end, and return the cost of each kill.

    The sweep is resumed directly after a kill, while the processes of the killed Ray session are still ending.

    Args:
        folder: the folder for the cohort and the run.
        kills: the number of kills; there are fewer if the sweep ends before.
        seed: the seed for the moments of the kills.
        starting_share: see `STARTING_SHARE`.
    """
    generator = random.Random(seed)
    write_cohort(folder / "cohort")
    run, seen = folder / "run", []
    while len(seen) < kills:
        began, before = time.time(), sum(map(len, _histories(run).values()))
        driver = subprocess.Popen(
            _command(run), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        if generator.random() < starting_share:
            time.sleep(generator.uniform(0, STARTING_S))
        else:
            while driver.poll() is None and sum(map(len, _histories(run).values())) == before:
                time.sleep(0.05)
            time.sleep(generator.uniform(0, TRAINING_S))
        if driver.poll() is not None:
            # The sweep has ended by itself.
            break
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        seen.append((time.time() - began, _finished(run), _histories(run), _unfinished(run)))
    last = subprocess.run(_command(run), cwd=folder, capture_output=True, text=True, check=False)
    if last.returncode != 0:
        raise RuntimeError(f"the last resume failed: {last.stdout[-2000:]}{last.stderr[-2000:]}")
    finished, histories = _finished(run), _histories(run)
    return [_compare(*before, finished, histories) for before in seen]


def complete(run: Path) -> dict[str, Any]:
    """Whether the run is complete: all trials, and each epoch of each fold once, in order."""
    wanted = [[fold, epoch] for fold in range(FOLDS) for epoch in range(1, EPOCHS + 1)]
    histories = _histories(run)
    visited = [[[row["fold"], row["epoch"]] for row in histories[f"{n:04d}"]] for n in range(TRIALS)]
    states = [trial.state for trial in _study(run).get_trials()]
    return {
        "trials": len(states),
        "complete": sum(state == TrialState.COMPLETE for state in states),
        "visited as planned": sum(visits == wanted for visits in visited),
        "report": (run / "report.html").exists(),
    }


def _command(run: Path) -> list[str]:
    """The command that begins the sweep, or resumes it if it has begun."""
    brainsweep = [sys.executable, "-m", "distributed"]
    if (run / "splits.csv").exists():
        return [*brainsweep, "resume", str(run)]
    asked = {"--trials": TRIALS, "--folds": FOLDS, "--slots": SLOTS, "--scheduler": "none", "--out": run}
    options = [str(word) for option in asked.items() for word in option]
    changes = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
    return [*brainsweep, "sweep", "cohort", *options, *changes]


def _study(run: Path) -> optuna.Study:
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(run / "study.journal")))
    return optuna.load_study(study_name=STUDY, storage=storage)


def _trials(run: Path) -> list[optuna.trial.FrozenTrial]:
    try:
        return _study(run).get_trials() if (run / "study.journal").exists() else []
    # The driver was killed after it made the journal, and before it made the study in it.
    except KeyError:
        return []


def _finished(run: Path) -> dict[int, Any]:
    ended = [trial for trial in _trials(run) if trial.state.is_finished()]
    return {
        trial.number: (trial.state, trial.value, trial.params, trial.datetime_complete) for trial in ended
    }


def _unfinished(run: Path) -> int:
    return sum(trial.state == TrialState.RUNNING for trial in _trials(run))


def _histories(run: Path) -> History:
    """The history of every trial and refit, by the name of its folder."""
    files = [*run.glob("trials/*/progress.json"), *run.glob("refits/*/progress.json")]
    return {file.parent.name: json.loads(file.read_text())["history"] for file in files}


def _compare(
    moment: float, finished: dict[int, Any], histories: History, running: int, finished_in_the_end: dict[int, Any],
    histories_in_the_end: History,
) -> Kill:  # fmt: skip
    lost = [number for number, what in finished.items() if finished_in_the_end.get(number) != what]
    epochs_lost = 0
    for name, rows in histories.items():
        now = histories_in_the_end.get(name, [])
        epochs_lost += sum(str(row) != str(after) for row, after in zip(rows, now, strict=False))
        epochs_lost += max(0, len(rows) - len(now))
    during = (
        "refits" if {"winner", "published", "l1"} & histories.keys() else "trials" if histories else "start"
    )
    epochs = sum(map(len, histories.values()))
    return Kill(moment, during, len(finished), running, epochs, len(lost), epochs_lost)


def main() -> None:
    """Run the campaign and print its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    console, began = Console(), time.time()
    with tempfile.TemporaryDirectory(prefix="survival-") as temporary:
        kills = campaign(Path(temporary), arguments.kills, arguments.seed)
        left = complete(Path(temporary) / "run")
    table = Table(*(field.name.replace("_", " ") for field in fields(Kill)), title="SIGKILL of the driver")
    for kill in kills:
        table.add_row(
            *(f"{value:.1f}" if isinstance(value, float) else str(value) for value in vars(kill).values())
        )
    console.print(table)
    console.print(f"{len(kills)} kills in {time.time() - began:.0f} s; in the end: {left}")


if __name__ == "__main__":
    main()
