"""One training run without a search: in this process, or on several workers of one slot."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from core.config import Settings, check_settings, merge, needed_maps, read_settings, resolve
from core.errors import UserError
from core.evaluation.splits import Splits
from core.files.python import file_of
from core.files.tables import write_table
from core.files.writing import writing_to
from core.objectives import Metric
from core.run_names import SPLITS, STAGES, TRAIN
from core.run_settings import RunSettings
from core.tasks import find_task
from core.tasks.task import check_parts
from core.volumes.cohort.reader import Cohort
from distributed.batches.hold import hold
from distributed.batches.in_process import InMemory
from distributed.run.assignment import Answer, Assignment, assign, kept_model, read_progress
from distributed.run.folder import RunFolder, cohort_of, create_run, keep_best, write_splits
from distributed.run.lock import claim
from distributed.run.quiet import quiet
from distributed.run.trust import check_trusted
from distributed.slots.cluster import connect, fit_slots
from distributed.slots.slot import WorkerGroup, pack
from distributed.sweeps.launch import check_first_stage, tell_of_grid
from distributed.sweeps.request import TrainRequest
from distributed.sweeps.resolve import chosen_task, splits_of, with_first_stage, with_hash
from distributed.sweeps.resume import same_splits
from distributed.sweeps.starts import check_leaks, find_start, keep_starts, starts_of, tell_what_matches
from distributed.sweeps.tables import calibrate_best, finish
from distributed.training.subjects import Subjects
from distributed.training.trial import Runner, make_runner
from search_spaces import load_space

NAME = "0000"

RunEpoch = Callable[[Assignment], Answer]


def train_one(
    cohort: str | Path, request: TrainRequest, out: Path, address: str | None, console: Console
) -> RunFolder:
    """Train one configuration on the training subjects of one fold, and judge it on the validation subjects.

    The configuration is the published one, or that of `request.settings`, with `request.changes`. The hold-out is not
    used. With one worker, no `address` and no data mode Ray is not started, so a debugger works; then the cohort is in
    the memory of this process.

    Args:
        cohort: the folder or the URL of the cohort.
        request: the request of the user.
        out: the folder of the run, made here.
        address: the address of a Ray cluster.
        console: where to print the progress.

    Raises:
        UserError: a part of the request cannot work, or the training failed.
    """
    quiet()
    opened = Cohort.open(cohort)
    asked = chosen_task(request.task) | request.changes
    given, starts = find_start(merge(with_first_stage(_published(request), asked), asked))
    settings = resolve(given)
    task = find_task(settings.task)
    check_settings(settings)
    labels = task.labels(settings, opened.manifest)
    splits = splits_of(request, opened.manifest, task.balanced_by(settings))
    if request.fold >= request.folds:
        raise UserError(
            f"--fold {request.fold} does not exist; with --folds {request.folds} it is 0 to {request.folds - 1}"
        )
    task.check_cohort(settings, opened.manifest, splits)
    check_first_stage(settings, opened)
    tell_of_grid(settings, opened, console)
    check_parts(labels, splits, task.describe(settings).truth)
    judged = splits.folds[request.fold]
    tell_what_matches(settings, starts, opened, splits.training(request.fold), console)
    leaks = check_leaks(starts, settings, opened, judged, console, is_allowed=request.allow_seen_subjects)
    request = with_hash(request, splits, opened.manifest)
    asked, resolved = request.model_dump(mode="json"), settings.model_dump(mode="json")
    folder = create_run(out, TRAIN, asked, resolved, opened)
    keep_starts(folder, starts, leaks)
    write_splits(folder, splits, opened)
    return _train(folder, request, opened, splits, address, console)


def _published(request: TrainRequest) -> Settings:
    """The settings that a training run starts from."""
    if request.settings is not None:
        if request.space is not None:
            raise UserError(
                f"--space {request.space} and --settings {request.settings} exclude each other: both are settings to "
                "start from; give one"
            )
        return read_settings(request.settings)
    # The file of a task need not have a space.
    is_own = file_of(request.task or "") is not None and request.space is None
    return {} if is_own else load_space(request.space_name)[1]


def resume_training(
    folder: RunFolder,
    cohort: str | None,
    address: str | None,
    console: Console,
    *,
    is_trusted: bool = False,
) -> RunFolder:
    """Continue a training run from its last epoch.

    Args:
        folder: of the run.
        cohort: where its cohort is now, if it was moved.
        address: the address of a Ray cluster.
        console: where to print the progress.
        is_trusted: whether the user trusts the file of the task as it is.

    Raises:
        UserError: the cohort or its splits are others, or the training failed.
    """
    if folder.about.finished:
        console.print(f"nothing left to do: {folder.path} is finished")
        return folder
    check_trusted(folder, None, console, is_trusted=is_trusted)
    request = TrainRequest.model_validate(folder.about.sweep)
    opened = cohort_of(folder, cohort)
    settings = resolve(folder.about.settings)
    by = find_task(settings.task).balanced_by(settings)
    splits = splits_of(request, opened.manifest, by, folder.path / SPLITS)
    if (folder.path / SPLITS).exists():
        same_splits(folder, splits, opened)
    else:
        # It was stopped before it had written them.
        write_splits(folder, splits, opened)
    return _train(folder, request, opened, splits, address, console)


def _train(
    folder: RunFolder,
    request: TrainRequest,
    cohort: Cohort,
    splits: Splits,
    address: str | None,
    console: Console,
) -> RunFolder:
    """Train to the end, from the checkpoint if there is one, and write the results."""
    resolved = folder.about.settings
    settings = resolve(resolved)
    cell = {"fold": request.fold, "seed": request.seed}
    task = find_task(settings.task)
    of_task = task.describe(settings)
    first = of_task.objectives[0]
    assignment = assign(folder.trial(NAME), resolved, [cell], metric=first, keep_model=True)
    with claim(folder.path, console):
        if request.workers == 1 and address is None and request.data_mode == "auto":
            runner = Runner(
                Subjects.of(
                    cohort, splits, InMemory.of(cohort, needed_maps(settings)), starts=starts_of(folder)
                )
            )
            answer = _run(runner, assignment, settings, of_task.metrics[first], console)
        else:
            with connect(address, console):
                group = _worker_group(request, cohort, splits, folder)
                group.start()
                try:
                    answer = _run(group.run, assignment, settings, of_task.metrics[first], console)
                finally:
                    group.stop()
        if "failed" in answer:
            raise UserError(f"training failed: {answer['failed']}")
        with writing_to(folder.path):
            model = kept_model(folder.trial(NAME), request.fold, request.seed)
            if model.exists():
                keep_best(folder, model)
                calibrate_best(folder, task, folder.trial(NAME), f"fold {request.fold}")
            _write_history(folder)
            shutil.rmtree(folder.path / STAGES, ignore_errors=True)
            finish(folder)
    return folder


def _run(
    run_epoch: RunEpoch, assignment: Assignment, settings: RunSettings, metric: Metric, console: Console
) -> Answer:
    """Run all epochs, with a progress bar; returns the last answer."""
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[now]}"),
    )
    with Progress(*columns, console=console) as progress:
        first = settings.pretraining
        total = settings.training.rounds + (0 if first is None else first.training.rounds)
        task = progress.add_task("epochs", total=total, now="")
        while True:
            answer = run_epoch(assignment)
            if "note" in answer:
                console.print(f"note: {answer['note']}", highlight=False, soft_wrap=True, markup=False)
            value = metric.amount(f"{answer['value']:.2f}")
            now = f"loss {answer.get('loss', float('nan')):.3f}  {metric.words} {value}"
            progress.update(task, completed=answer["epochs"], now=now)
            if answer["done"]:
                return answer


def _worker_group(request: TrainRequest, cohort: Cohort, splits: Splits, folder: RunFolder) -> WorkerGroup:
    """The workers of one slot, with the cohort."""
    size, _ = fit_slots(slots=1, workers=request.workers, gpus_per_worker=None, trials=1)
    volumes = hold(cohort, request.data_mode, needed_maps(resolve(folder.about.settings)))
    subjects = Subjects.of(cohort, splits, volumes, starts=starts_of(folder))
    return WorkerGroup(size, pack(make_runner, subjects=subjects), str(folder.tune))


def _write_history(folder: RunFolder) -> None:
    progress = read_progress(folder.trial(NAME))
    write_table(pd.DataFrame(progress["history"]).assign(number=0), folder.path / "history.csv")
    write_table(pd.DataFrame(progress["cells"]).assign(number=0), folder.path / "cells.csv")
