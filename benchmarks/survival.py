"""Kill the processes of sweeps at random moments, let every sweep end, and count what was lost.

    python -m benchmarks.survival --kills 100 --out FOLDER

Killed with SIGKILL are the driver (which is then started again with the same command, `sweep --resume`), a worker that
trains, a slot, or a mailbox; at its start, in the first or last epoch of a trial, during a refit, during the report,
right after a write to the journal, or at any moment. Both are drawn at random, with a seed. FOLDER keeps the record of
every kill: the same command continues a campaign that was stopped.

A finished trial is lost or repeated if its record in the study changes after a kill. A finished epoch is lost or
repeated if its row in the history of the trial changes; each row has the time of its first step, so a repeated epoch is
visible.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from rich.console import Console
from rich.table import Table

from core.run_names import STUDY
from core.volumes.cohort.writer import CohortWriter

TRIALS, FOLDS, EPOCHS, SLOTS = 8, 2, 15, 1
SMALL = {
    "model.width": 0.0625, "model.head.dimension": 8, "training.epochs": EPOCHS, "training.batch_size": 4,
    "objective.neighbours": "null",
}  # fmt: skip
KILLS_PER_SWEEP = 8
"""Then a sweep may end: a trial whose slot crashes again and again is given up on purpose."""
PATIENCE_S = 1200.0
"""Without any epoch for so long, a sweep hangs: that is a finding, and the campaign stops."""
PROCESSES = {
    "worker": ("ray::RayTrainWorker",),
    "slot": ("ray::Slot", "ray::ResourceTrainable"),
    "mailbox": ("ray::Mailbox",),
}
"""What the names of the processes begin with."""
MOMENTS = {
    "driver": ("start", "first epoch", "last epoch", "refit", "report", "journal write", "any"),
    "worker": ("first epoch", "last epoch", "refit", "any"),
    "slot": ("first epoch", "last epoch", "refit", "any"),
    "mailbox": ("first epoch", "last epoch", "refit", "any"),
}
MARK = "BRAINSWEEP_SURVIVAL"
"""The environment variable by which the processes of a sweep are found, and no others."""

History = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Kill:
    """One SIGKILL: the state at that moment, and the differences to the state at the end of the sweep."""

    sweep: int
    victim: str
    moment: str
    after_s: float
    """From the start of the driver."""
    finished: int
    running: int
    epochs: int
    finished_lost: int = -1
    epochs_lost: int = -1
    complete: bool = False
    """Whether the sweep ended with every trial complete and each epoch of each fold once, in order."""


@dataclass
class Sweep:
    """A sweep under fire."""

    folder: Path
    number: int
    driver: subprocess.Popen[bytes] | None = None
    began: float = 0.0

    @property
    def run(self) -> Path:
        """The folder of the run."""
        return self.folder / f"run-{self.number:03d}"

    def start(self) -> None:
        """Begin the sweep, or continue it: the command is the same."""
        environment = {**os.environ, MARK: f"{self.run}", "OMP_NUM_THREADS": "1"}
        with (self.folder / f"run-{self.number:03d}.log").open("ab") as log:
            self.driver = subprocess.Popen(
                _command(self.run), cwd=self.folder, stdout=log, stderr=log, env=environment
            )
        self.began = time.time()

    @property
    def is_running(self) -> bool:
        """Whether the driver lives."""
        return self.driver is not None and self.driver.poll() is None

    def processes(self, victim: str) -> list[int]:
        """The processes of a kind that belong to this sweep."""
        if victim == "driver":
            return [self.driver.pid] if self.is_running and self.driver is not None else []
        return [pid for pid, name in _marked(str(self.run)) if name.startswith(PROCESSES[victim])]

    def state(self) -> tuple[dict[int, Any], History, int]:
        """Finished trials, all epochs, and the number of running trials."""
        return _finished(self.run), _histories(self.run), _unfinished(self.run)


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


def plan(kills: int, seed: int) -> list[tuple[str, str, float]]:
    """Victim, moment, and how long to wait after it (a share of the longest wait), of every kill."""
    generator = random.Random(seed)
    made = []
    for _ in range(kills):
        victim = generator.choices(list(MOMENTS), weights=[4, 2, 2, 2])[0]
        made.append((victim, generator.choice(MOMENTS[victim]), generator.random()))
    return made


def campaign(folder: Path, kills: int, seed: int, console: Console | None = None) -> list[Kill]:
    """Run sweeps in `folder` and kill their processes as planned; returns the cost of each kill.

    What an earlier campaign in this folder has recorded counts; the sweep that it left open is run again.
    """
    console = console or Console(quiet=True)
    record = folder / "kills.jsonl"
    if not (folder / "cohort").exists():
        write_cohort(folder / "cohort")
    done = [Kill(**json.loads(line)) for line in record.read_text().splitlines()] if record.exists() else []
    orders = plan(kills, seed)
    while len(done) < kills:
        sweep = Sweep(folder, 1 + max((kill.sweep for kill in done), default=-1))
        shutil.rmtree(sweep.run, ignore_errors=True)
        made = list(_one_sweep(sweep, orders[len(done) : len(done) + KILLS_PER_SWEEP], console))
        if not made:
            raise RuntimeError(f"{sweep.run} ended before any kill")
        with record.open("a") as file:
            file.writelines(f"{json.dumps(asdict(kill))}\n" for kill in made)
        done += made
        console.print(f"{len(done)} of {kills} kills; the last sweep: {complete(sweep.run)}", highlight=False)
    return done


def _one_sweep(sweep: Sweep, orders: list[tuple[str, str, float]], console: Console) -> Iterator[Kill]:
    """Kill the processes of one sweep in turn, let it end, and compare."""
    seen = []
    try:
        for victim, moment, share in orders:
            if not sweep.is_running:
                sweep.start()
            if not _await(sweep, victim, moment, share):
                break
            state, after = sweep.state(), time.time() - sweep.began
            killed = sweep.processes(victim)
            if not killed:
                break
            for process in killed[:1]:
                os.kill(process, signal.SIGKILL)
            if victim == "driver" and sweep.driver is not None:
                sweep.driver.wait()
            console.print(f"  {victim} killed: {moment}, after {after:.1f} s", highlight=False)
            seen.append((victim, moment, after, state))
        _let_end(sweep)
    finally:
        _end_all(sweep)
    finished, histories, _ = sweep.state()
    is_complete = complete(sweep.run) == WHOLE
    for victim, moment, after, (finished_then, histories_then, running) in seen:
        yield Kill(
            sweep=sweep.number,
            victim=victim,
            moment=moment,
            after_s=after,
            finished=len(finished_then),
            running=running,
            epochs=sum(map(len, histories_then.values())),
            finished_lost=sum(finished.get(number) != what for number, what in finished_then.items()),
            epochs_lost=_epochs_lost(histories_then, histories),
            complete=is_complete,
        )


def _await(sweep: Sweep, victim: str, moment: str, share: float) -> bool:
    """Wait for the moment; False if the sweep ended before."""
    before = len(_finished(sweep.run)), sum(map(len, _histories(sweep.run).values()))
    if moment == "start":
        time.sleep(20 * share)
        return sweep.is_running
    if moment == "journal write":
        journal = sweep.run / "study.journal"
        size = journal.stat().st_size if journal.exists() else 0
        changes = 1 + int(30 * share)
        for _ in range(changes):
            if not _until(sweep, lambda: journal.exists() and journal.stat().st_size != size, pause=0.001):  # noqa: B023
                return False
            size = journal.stat().st_size
        return True
    is_there: dict[str, Callable[[], bool]] = {
        "any": lambda: sum(map(len, _histories(sweep.run).values())) > before[1],
        "first epoch": lambda: 1 in _running_epochs(sweep.run, before[1]),
        "last epoch": lambda: FOLDS * EPOCHS - 1 in _running_epochs(sweep.run, before[1]),
        "refit": lambda: any((sweep.run / "refits").glob("*/progress.json")),
        "report": lambda: _refitted(sweep.run) == 3,
    }
    wait = {"any": 5.0, "refit": 1.5, "report": 6.0}.get(moment, 0.2)
    if not _until(sweep, is_there[moment]):
        return False
    time.sleep(wait * share)
    # A slot that was killed before may just be starting again.
    return _until(sweep, lambda: bool(sweep.processes(victim)))


def _until(sweep: Sweep, condition: Callable[[], bool], pause: float = 0.02) -> bool:
    """Wait until `condition` holds; False if the sweep ended before it did."""
    deadline = time.time() + PATIENCE_S
    while not condition():
        if not sweep.is_running:
            return False
        if time.time() > deadline:
            raise RuntimeError(f"{sweep.run} hangs: nothing has happened for {PATIENCE_S:.0f} s")
        time.sleep(pause)
    return True


def _let_end(sweep: Sweep) -> None:
    for _ in range(3):
        if not sweep.is_running:
            sweep.start()
        if sweep.driver is not None and sweep.driver.wait(timeout=600) == 0:
            return
    raise RuntimeError(f"{sweep.run} did not end; see {sweep.run}.log")


def _end_all(sweep: Sweep) -> None:
    """End what the killed sessions of Ray have left, and nothing else."""
    for process, _ in _marked(str(sweep.run)):
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _marked(mark: str) -> list[tuple[int, str]]:
    """Processes with the mark in their environment, and their names."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(
                b"\0"
            ):
                name = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found.append((int(entry.name), name))
        except OSError:
            continue
    return found


WHOLE = {"trials": TRIALS, "complete": TRIALS, "visited as planned": TRIALS, "refits": 4, "report": True}


def complete(run: Path) -> dict[str, Any]:
    """Whether the run is complete: all trials, and each epoch of each fold once, in order."""
    wanted = [[fold, epoch] for fold in range(FOLDS) for epoch in range(1, EPOCHS + 1)]
    histories = _histories(run)
    visited = [
        [[row["fold"], row["epoch"]] for row in histories.get(f"{number:04d}", [])]
        for number in range(TRIALS)
    ]
    states = [trial.state for trial in _trials(run)]
    return {
        "trials": len(states),
        "complete": sum(state == TrialState.COMPLETE for state in states),
        "visited as planned": sum(visits == wanted for visits in visited),
        "refits": _refitted(run),
        "report": (run / "report.html").exists(),
    }


def _command(run: Path) -> list[str]:
    """The command that begins the sweep or continues it."""
    asked = {"--trials": TRIALS, "--folds": FOLDS, "--slots": SLOTS, "--scheduler": "none", "--out": run}
    options = [str(word) for option in asked.items() for word in option]
    changes = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
    return [sys.executable, "-m", "distributed", "sweep", "cohort", *options, *changes, "--resume"]


def _trials(run: Path) -> list[optuna.trial.FrozenTrial]:
    journal = run / "study.journal"
    try:
        # Opening a journal that is not there would make it.
        if not journal.exists():
            return []
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal)))
        return optuna.load_study(study_name=STUDY, storage=storage).get_trials()
    # Killed before the study was in it, or in the middle of a line.
    except (KeyError, ValueError):
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


def _running_epochs(run: Path, before: int) -> set[int]:
    """The epochs done of every trial that has not ended, once more epochs are done than `before`."""
    histories = {name: rows for name, rows in _histories(run).items() if name.isdigit()}
    if sum(map(len, histories.values())) <= before:
        return set()
    return {len(rows) for rows in histories.values() if len(rows) < FOLDS * EPOCHS}


def _refitted(run: Path) -> int:
    answers = (json.loads(file.read_text())["answer"] for file in run.glob("refits/*/progress.json"))
    return sum(answer is not None for answer in answers)


def _epochs_lost(then: History, now: History) -> int:
    lost = 0
    for name, rows in then.items():
        after = now.get(name, [])
        lost += sum(str(row) != str(other) for row, other in zip(rows, after, strict=False))
        lost += max(0, len(rows) - len(after))
    return lost


def table_of(kills: list[Kill]) -> pd.DataFrame:
    """One row per victim and moment: kills, what was lost, and sweeps that did not end complete."""
    table = pd.DataFrame([asdict(kill) for kill in kills])
    grouped = table.assign(incomplete=~table["complete"]).groupby(["victim", "moment"])
    columns = {"kills": ("sweep", "size"), "finished": ("finished", "sum"), "epochs": ("epochs", "sum")}
    lost = {name: (name, "sum") for name in ("finished_lost", "epochs_lost", "incomplete")}
    return grouped.agg(**columns, **lost).reset_index()


def main() -> None:
    """Run the campaign and print its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, help="where sweeps and records are kept, so that it can be continued"
    )
    arguments = parser.parse_args()
    console, began = Console(), time.time()
    folder = arguments.out or Path(tempfile.mkdtemp(prefix="survival-"))
    folder.mkdir(parents=True, exist_ok=True)
    kills = campaign(folder.resolve(), arguments.kills, arguments.seed, console)
    made = table_of(kills)
    table = Table(*(name.replace("_", " ") for name in made.columns), title="SIGKILL")
    for row in made.itertuples(index=False):
        table.add_row(*map(str, row))
    console.print(table)
    sweeps = len({kill.sweep for kill in kills})
    console.print(f"{len(kills)} kills in {sweeps} sweeps, {time.time() - began:.0f} s; records in {folder}")


if __name__ == "__main__":
    main()
