"""Three hashes of one sweep that is killed twice and resumed: does a change of the code keep the results?

    git clone . ../before && git -C ../before checkout COMMIT
    python -m benchmarks.same_results --tree ../before
    python -m benchmarks.same_results

The sweep has 24 trials of 2 folds in one slot, so the order of its results does not depend on the load of the machine.
All its processes are killed in the second fold of the first trial, and again in the first fold of a later trial. There
is one hash for the study (settings, values, intermediate values and attributes of every trial), one for the tables,
and one for the predictions of the winner for held-out subjects and for three NIfTI files. Times are left out. The last
value before each kill is left out, too, because it depends on the moment of the kill whether the study has it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import pandas as pd
import psutil
from optuna.storages.journal import JournalFileBackend

EPOCHS, FOLDS, TRIALS = 8, 2, 24
SETTINGS = {
    "model.width": 0.25, "training.epochs": EPOCHS, "training.batch_size": 16, "objective.neighbours.step": 2,
}  # fmt: skip
TIMES = {"seconds", "spent_seconds", "first_step_at", "first_read", "accelerator_seconds", "idle_seconds"}
"""Columns, and attributes of trials, that hold a time."""
TABLES = ("trials", "cells", "history", "splits", "holdout", "predictions", "confirmed")
KILLED_AT = {"first trial": EPOCHS + 3, "later trial": 3}
"""Epochs over all folds that a trial has done when it is killed."""


def main() -> None:
    """Run the sweep in `--tree`, and print its hashes."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--tree", type=Path, default=Path.cwd(), help="a working copy of this project")
    options.add_argument("--out", type=Path, help="an empty folder to keep; a temporary one if absent")
    asked = options.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        run = sweep_killed_twice(asked.tree.resolve(), folder.resolve())
        for name, content in (
            ("study", of_study(run)),
            ("tables", of_tables(run)),
            ("predictions", of_predictions(asked.tree.resolve(), folder.resolve())),
        ):
            (folder / f"{name}.json").write_text(content)
            print(f"{name:12} {hashlib.sha256(content.encode()).hexdigest()[:16]}")


def sweep_killed_twice(tree: Path, folder: Path) -> Path:
    """Run a sweep with the code in `tree`, kill it at two places, let it end, and return its folder."""
    run = folder / "run"
    brainsweep(tree, folder, "phantom", folder / "cohort", "--subjects", 48, "--spacing", 8)
    changes = [word for name, value in SETTINGS.items() for word in ("--set", f"{name}={value}")]
    begin = [
        "sweep", folder / "cohort", "--trials", TRIALS, "--folds", FOLDS, "--slots", 1, "--holdout", 0.25,
        "--confirm-seeds", 1, "--out", run, *changes,
    ]  # fmt: skip
    first, then = KILLED_AT.values()
    kill_when(tree, folder, lambda: epochs_of(run, 0) == first, *begin)
    kill_when(tree, folder, lambda: any(epochs_of(run, n) == then for n in range(8, TRIALS)), "resume", run)
    brainsweep(tree, folder, "resume", run)
    return run


def epochs_of(run: Path, number: int) -> int:
    """The epochs that a trial has done in all its folds."""
    path = run / "trials" / f"{number:04d}" / "progress.json"
    return len(json.loads(path.read_text())["history"]) if path.exists() else 0


def kill_when(tree: Path, folder: Path, condition: Callable[[], bool], *arguments: object) -> None:
    """Start a command, and kill all its processes shortly after `condition` becomes true."""
    driver = subprocess.Popen(
        command(arguments), cwd=folder, env=environment(tree), stdout=subprocess.DEVNULL
    )
    while not condition():
        if driver.poll() is not None:
            raise RuntimeError(f"ended before it could be killed: {' '.join(map(str, arguments))}")
        time.sleep(0.01)
    # The study gets the epoch some milliseconds after the file is written.
    time.sleep(0.05)
    main_process = psutil.Process(driver.pid)
    for process in [*main_process.children(recursive=True), main_process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    driver.wait()


def brainsweep(tree: Path, folder: Path, *arguments: object) -> str:
    """Run a command and return its output; its errors are shown."""
    done = subprocess.run(
        command(arguments), cwd=folder, env=environment(tree), stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def command(arguments: tuple[object, ...]) -> list[str]:
    """`brainsweep ARGUMENTS`."""
    return [sys.executable, "-m", "distributed", *map(str, arguments)]


def environment(tree: Path) -> dict[str, str]:
    """The environment of a command: the code of `tree` first on the path, and a fixed number of threads."""
    return os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "2"}


def of_study(run: Path) -> str:
    """Every trial of the study, as JSON."""
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(run / "study.journal")))
    study = optuna.load_study(study_name=json.loads((run / "run.json").read_text())["study"], storage=storage)
    return json.dumps(
        [
            {
                "number": trial.number,
                "state": trial.state.name,
                "params": trial.params,
                "values": trial.values,
                "intermediate": {
                    epoch: value
                    for epoch, value in trial.intermediate_values.items()
                    if not {epoch, epoch - 1} & set(KILLED_AT.values())
                },
                "attributes": {name: value for name, value in trial.user_attrs.items() if name not in TIMES},
            }
            for trial in study.get_trials()
        ],
        indent=1,
        sort_keys=True,
    )


def of_tables(run: Path) -> str:
    """Every table without its columns of times, as JSON; columns are sorted by name."""
    tables = {}
    for name in TABLES:
        table = pd.read_csv(run / f"{name}.csv", keep_default_na=False, dtype=str)
        tables[name] = table[sorted(set(table.columns) - TIMES)].to_dict("records")
    return json.dumps(tables, indent=1)


def of_predictions(tree: Path, folder: Path) -> str:
    """The ages that the winner predicts for three other brains, with all digits of the table."""
    brainsweep(
        tree, folder, "phantom", folder / "scans", "--subjects", 3, "--spacing", 8, "--seed", 7, "--nifti"
    )
    scans = sorted((folder / "scans").rglob("*.nii.gz"))[:3]
    brainsweep(tree, folder, "predict", folder / "run", *scans, "--out", folder / "ages.csv")
    table = pd.read_csv(folder / "ages.csv")
    if not all(map(math.isfinite, table["predicted"])):
        raise RuntimeError(f"predicted ages are not finite: {table['predicted'].tolist()}")
    return json.dumps(table["predicted"].tolist())


if __name__ == "__main__":
    main()
