"""One training run, without a search: in this very process, or on several workers of one slot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from core.config import merge, read_settings, resolve
from core.errors import UserError
from core.evaluation.splits import Splits, make_splits
from core.files.writing import writing_to
from core.tasks import TASKS
from core.volumes.cohort.reader import Cohort
from distributed.batches.hold import Mode, hold
from distributed.batches.in_process import InMemory
from distributed.run import folder as run_folder
from distributed.run.assignment import assign
from distributed.run.folder import RunFolder
from distributed.slots.cluster import connect, plan_slots
from distributed.slots.slot import WorkerGroup, pack
from distributed.sweeps import tables
from distributed.training.subjects import Subjects
from distributed.training.trial import Runner, make_runner
from search_spaces import DEFAULT, load_space

NAME = "0000"


def train_one(
    cohort: str | Path,
    out: Path,
    changes: dict[str, Any],
    *,
    folds: int,
    fold: int,
    seed: int,
    workers: int,
    address: str | None,
    console: Console,
    data_mode: Mode = "auto",
    settings_file: Path | None = None,
) -> RunFolder:
    """Train one configuration on one fold's training subjects, judge it on that fold's validation subjects.

    It is the published one, or that of `settings_file` (YAML, such as a run's schedule.yaml), with `changes`.

    The hold-out is not touched. With one worker, no `address` and no `data_mode` Ray is not started, so a
    debugger works; the cohort is held in memory then.
    """
    opened = Cohort.open(cohort)
    base = load_space(DEFAULT)[1] if settings_file is None else read_settings(settings_file)
    chosen = resolve(merge(base, changes))
    TASKS[chosen.task].check(chosen)
    settings = chosen.model_dump(mode="json")
    splits = make_splits(opened.manifest, folds)
    if not 0 <= fold < folds:
        raise UserError(f"--fold {fold} does not exist; with --folds {folds} it is 0 to {folds - 1}")
    request = {"folds": folds, "fold": fold, "seed": seed, "workers": workers, "changes": changes}
    folder = run_folder.create_run(out, "train", request, settings, opened)
    run_folder.write_splits(folder, splits, opened)
    assignment = assign(folder.trial(NAME), settings, [{"fold": fold, "seed": seed}], keep_model=True)
    if workers == 1 and address is None and data_mode == "auto":
        subjects = Subjects.of(opened, splits, InMemory.of(opened))
        answer = _run(Runner(subjects), assignment, settings, console)
    else:
        answer = _run_on_ray(
            opened, splits, workers, address, assignment, settings, folder, console, data_mode
        )
    if "failed" in answer:
        raise UserError(f"training failed: {answer['failed']}")
    with writing_to(folder.path):
        run_folder.keep_best(folder, folder.trial(NAME) / f"model-{seed}")
        tables.finish(folder)
        _write_history(folder)
    return folder


def _run(
    run_epoch: Any, assignment: dict[str, Any], settings: dict[str, Any], console: Console
) -> dict[str, Any]:
    """Epoch after epoch, with a progress bar; returns the last answer."""
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[now]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("epochs", total=settings["training"]["epochs"], now="")
        while True:
            answer = run_epoch(assignment)
            now = f"loss {answer.get('loss', float('nan')):.3f}  validation MAE {answer['value']:.2f} y"
            progress.update(task, advance=1, now=now)
            if answer["done"]:
                return answer


def _run_on_ray(
    cohort: Cohort, splits: Splits, workers: int, address: str | None, assignment: dict[str, Any],
    settings: dict[str, Any], folder: RunFolder, console: Console, data_mode: Mode,
) -> dict[str, Any]:  # fmt: skip
    with connect(address, console):
        size, _ = plan_slots(slots=1, workers=workers, gpus_per_worker=None, trials=1)
        runner = pack(make_runner, subjects=Subjects.of(cohort, splits, hold(cohort, data_mode)))
        group = WorkerGroup(size, runner, str(folder.path / "tune"))
        group.start()
        try:
            return _run(group.run, assignment, settings, console)
        finally:
            group.stop()


def _write_history(folder: RunFolder) -> None:
    progress = run_folder.read_progress(folder.trial(NAME))
    pd.DataFrame(progress["history"]).assign(number=0).to_csv(folder.path / "history.csv", index=False)
    pd.DataFrame(progress["cells"]).assign(number=0).to_csv(folder.path / "cells.csv", index=False)
