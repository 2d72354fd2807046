"""The command line, `brainsweep` or `python -m distributed`: arguments in, one call, a summary out."""

from __future__ import annotations

import datetime
import math
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from core.errors import UserError

app = typer.Typer(
    name="brainsweep",
    help="Find the best way to train contrastive models on 3D brain images.",
    epilog="Begin with: brainsweep phantom cohorts/phantom && brainsweep sweep cohorts/phantom",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
# A log file is no terminal of 80 columns: tables need more.
console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 110)

CohortFolder = Annotated[Path, typer.Argument(metavar="COHORT", help="folder made by `ingest` or `phantom`")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="folder of a run")]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="NAME=VALUE", help="change any setting, e.g. training.epochs=20; repeatable"
    ),
]
Address = Annotated[
    str | None,
    typer.Option(help="HEAD:PORT of a running Ray cluster, or auto; this machine if absent"),
]


class Ages(StrEnum):
    """How the ages of a phantom cohort are distributed."""

    clusters = "clusters"
    uniform = "uniform"


class Intensity(StrEnum):
    """What ingest stores of the intensities."""

    zscore = "zscore"
    raw = "raw"


class StoredAs(StrEnum):
    """Number format of stored volumes."""

    float16 = "float16"
    float32 = "float32"


@app.command(epilog="Example: brainsweep phantom cohorts/phantom --subjects 96 --spacing 4")
def phantom(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder of the new cohort")],
    subjects: Annotated[int, typer.Option(help="how many brains")] = 96,
    spacing: Annotated[float, typer.Option(help="voxel edge in mm: 2, 4 or 8")] = 4.0,
    ages: Annotated[
        Ages, typer.Option(help="young and old with few in between, or all ages alike")
    ] = Ages.clusters,
    sites: Annotated[int, typer.Option(help="scanner sites, with unequal ages")] = 3,
    channels: Annotated[str, typer.Option(help="stiffness, t1w, or both as stiffness,t1w")] = "stiffness",
    seed: Annotated[int, typer.Option(help="another seed gives other brains")] = 0,
    nifti: Annotated[
        bool, typer.Option("--nifti", help="write a BIDS-like tree of NIfTI files instead")
    ] = False,
) -> None:
    """Make synthetic brains with known ageing, from the ICBM152 anatomy. The same cohort already there is reused."""
    from pydantic import ValidationError

    from core.volumes.phantom import PhantomSettings, write_phantom_bids, write_phantom_cohort

    try:
        settings = PhantomSettings(
            subjects=subjects, spacing=spacing, ages=ages.value, sites=sites, seed=seed,
            channels=tuple(channel.strip() for channel in channels.split(",")),
        )  # fmt: skip
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"--{first['loc'][0]}: {first['msg']}, got {first['input']!r}") from None
    with _progress("making brains") as progress:
        task = progress.add_task("", total=subjects)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        if nifti:
            write_phantom_bids(out, settings, show)
        else:
            cohort = write_phantom_cohort(out, settings, show)
        progress.update(task, completed=subjects)
    if nifti:
        console.print(f"{subjects} subjects in {out}\n\nNext:\n  brainsweep ingest {out} COHORT --suffix T1w")
    else:
        console.print(f"{len(cohort)} phantom brains of {cohort.description.shape} voxels in {out}")
        console.print(f"\nNext:\n  brainsweep describe {out}\n  brainsweep sweep {out}", highlight=False)


@app.command(epilog="Example: brainsweep ingest study/ cohorts/study --suffix T1w --spacing 4")
def ingest(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="BIDS-like folder with participants.tsv")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder of the new cohort")],
    suffix: Annotated[
        str | None, typer.Option(help="which image of each subject, e.g. T1w or stiffness")
    ] = None,
    spacing: Annotated[float, typer.Option(help="voxel edge in mm")] = 4.0,
    shape: Annotated[
        str | None, typer.Option(help="voxels as X,Y,Z; the MNI field of view if absent")
    ] = None,
    intensity: Annotated[
        Intensity, typer.Option(help="zscore inside the brain of each volume, or raw (quantitative maps)")
    ] = Intensity.zscore,
    age_column: Annotated[str, typer.Option(help="column of participants.tsv with the age in years")] = "age",
    dtype: Annotated[StoredAs, typer.Option(help="how volumes are stored")] = StoredAs.float16,
    strict: Annotated[
        bool, typer.Option("--strict", help="stop at the first subject that cannot be used")
    ] = False,
) -> None:
    """Turn NIfTI images and a participants table into a cohort. Subjects that cannot be used are listed, not fatal."""
    from pydantic import ValidationError

    from core.volumes.ingest import ingest as ingest_folder
    from core.volumes.preprocess import Preprocessing

    try:
        grid = tuple(int(side) for side in shape.split(",")) if shape else None
        preprocessing = Preprocessing(spacing=spacing, shape=grid, intensity=intensity.value)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"--{first['loc'][0]}: {first['msg']}, got {first['input']!r}") from None
    except ValueError:
        raise UserError(f"--shape must be three whole numbers such as 46,55,46, got {shape!r}") from None
    with _progress("ingesting") as progress:
        task = progress.add_task("", total=None)
        report = ingest_folder(
            source, out, preprocessing, suffix=suffix, age_column=age_column, strict=strict, dtype=dtype.value,
            on_progress=lambda done, total, _: progress.update(task, completed=done, total=total),
        )  # fmt: skip
    if report.already_there:
        console.print(f"{out} already holds this cohort; nothing to do")
    for note in report.notes:
        console.print(f"note: {note}", highlight=False)
    for reject in report.rejects[:10]:
        console.print(f"left out {reject.subject}: {reject.reason}", style="yellow", highlight=False)
    if len(report.rejects) > 10:
        console.print(f"… and {len(report.rejects) - 10} more in {out}/rejects.csv", style="yellow")
    console.print(f"{len(report.cohort)} subjects in {out}, {len(report.rejects)} left out")
    console.print(f"\nNext:\n  brainsweep describe {out}\n  brainsweep sweep {out}", highlight=False)


@app.command(epilog="Example: brainsweep describe cohorts/phantom")
def describe(cohort: CohortFolder) -> None:
    """Say what is in a cohort: subjects, ages, sites, grid, intensities, and the error any model must beat."""
    from core.volumes.cohort import Cohort
    from core.volumes.describe import describe as facts_of

    table = Table(show_header=False, box=None, padding=(0, 2))
    for name, value in facts_of(Cohort.open(cohort)).items():
        table.add_row(name.replace("_", " "), _readable(value))
    console.print(table)


@app.command(
    epilog="Example: brainsweep train cohorts/phantom --set training.epochs=10 --set model.width=0.25"
)
def train(
    cohort: CohortFolder,
    changes: Changes = None,
    out: Annotated[Path | None, typer.Option(help="run folder; runs/DATE-train if absent")] = None,
    folds: Annotated[int, typer.Option(min=2, help="cross-validation folds")] = 5,
    fold: Annotated[int, typer.Option(min=0, help="the fold to validate on")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="seed of initialisation, order and views")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="data-parallel workers; more than 1 starts Ray")] = 1,
    address: Address = None,
) -> None:
    """Train one configuration on one fold: the published one, with your changes. The hold-out is not touched."""
    from core.config import parse_changes
    from distributed.train_one import train_one

    folder = train_one(
        cohort, out or _new_run("train"), parse_changes(changes or []),
        folds=folds, fold=fold, seed=seed, workers=workers, address=address, console=console,
    )  # fmt: skip
    _show_cells(folder.path)
    console.print(f"\nNext:\n  brainsweep predict {folder.path} VOLUME.nii.gz", highlight=False)


@app.command(
    epilog="Example: brainsweep sweep cohorts/phantom --trials 30 --folds 3 --set training.epochs=10"
)
def sweep(
    cohort: CohortFolder,
    space: Annotated[str, typer.Option(help="NAME of a space, or FILE.py:FUNCTION")] = "brain_age",
    trials: Annotated[int, typer.Option(min=1, help="configurations to try, the published one first")] = 20,
    folds: Annotated[int, typer.Option(help="cross-validation folds of every trial")] = 5,
    seeds: Annotated[int, typer.Option(min=1, help="repeats of every fold")] = 1,
    refit_seeds: Annotated[
        int, typer.Option(min=1, help="refits of winner and baselines for the hold-out")
    ] = 1,
    holdout: Annotated[float, typer.Option(help="share of subjects the search never sees")] = 0.2,
    slots: Annotated[
        int | None, typer.Option(min=1, help="trials at a time; as many as fit if absent")
    ] = None,
    workers_per_slot: Annotated[int, typer.Option(min=1, help="data-parallel workers of a trial")] = 1,
    gpus_per_worker: Annotated[
        float | None, typer.Option(min=0, help="1 where there are GPUs, if absent; fractions share one")
    ] = None,
    scheduler: Annotated[str, typer.Option(help="what stops bad trials early: asha, median, none")] = "asha",
    sampler: Annotated[str, typer.Option(help="what proposes trials: tpe, random, qmc, cmaes")] = "tpe",
    time_budget: Annotated[float | None, typer.Option(help="seconds of search, refits not counted")] = None,
    search_seed: Annotated[int, typer.Option(min=0, help="seed of splits and sampler")] = 0,
    out: Annotated[Path | None, typer.Option(help="run folder; runs/DATE-sweep if absent")] = None,
    address: Address = None,
    changes: Changes = None,
) -> None:
    """Search for the best configuration, refit it, and look at the held-out subjects once."""
    from pydantic import ValidationError

    from core.config import parse_changes
    from distributed.sweep import SweepRequest, run_sweep

    try:
        request = SweepRequest(
            space=space, trials=trials, folds=folds, seeds=seeds, refit_seeds=refit_seeds, holdout=holdout,
            slots=slots, workers_per_slot=workers_per_slot, gpus_per_worker=gpus_per_worker, scheduler=scheduler,
            sampler=sampler, time_budget=time_budget, search_seed=search_seed, changes=parse_changes(changes or []),
        )  # fmt: skip
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]).replace("_", "-")
        raise UserError(f"--{option}: {first['msg'].lower()}, got {first['input']!r}") from None
    run_sweep(cohort, request, out or _new_run("sweep"), address, console)


@app.command(epilog="Example: brainsweep resume runs/demo")
def resume(
    run: RunArgument,
    time_budget: Annotated[float | None, typer.Option(help="seconds of further search")] = None,
    address: Address = None,
) -> None:
    """Continue an interrupted sweep: no finished trial is repeated, unfinished ones go on from their last epoch."""
    from distributed.sweep import resume_sweep

    resume_sweep(run, address, console, time_budget)


@app.command(epilog="Example: brainsweep report runs/demo")
def report(run: RunArgument) -> None:
    """Make the report and the leaderboard of a run again, whatever state the run is in."""
    from core.report.page import write_report
    from core.report.tables import print_leaderboard, read_run

    page = write_report(run)
    print_leaderboard(console, read_run(run))
    console.print(f"\nNext:\n  open {page}", highlight=False)


@app.command(epilog="Example: brainsweep evaluate runs/demo cohorts/other")
def evaluate(run: RunArgument, cohort: CohortFolder) -> None:
    """Predict the ages of a cohort with a run's best model, and say how good that is."""
    from distributed.apply import evaluate_run

    evaluation = evaluate_run(run, cohort)
    for note in evaluation.notes:
        console.print(f"note: {note}", highlight=False)
    table = Table("metric", "value", box=None, padding=(0, 2))
    for name, value in {"subjects": len(evaluation.predictions), **evaluation.metrics}.items():
        table.add_row(name, _readable(value))
    console.print(table)
    console.print(f"predictions in {evaluation.table}", highlight=False)


@app.command(epilog="Example: brainsweep predict runs/demo sub-01_T1w.nii.gz sub-02_T1w.nii.gz")
def predict(
    run: RunArgument,
    volumes: Annotated[
        list[Path], typer.Argument(metavar="VOLUME…", help="NIfTI files, prepared as the cohort was")
    ],
    out: Annotated[Path | None, typer.Option(help="also write file and age to this CSV file")] = None,
) -> None:
    """Predict the age of single NIfTI files with a run's best model."""
    from distributed.apply import predict_files

    predictions = predict_files(run, volumes)
    table = Table("file", "predicted age (years)", box=None, padding=(0, 2))
    for row in predictions.to_dict("records"):
        table.add_row(row["file"], f"{row['predicted']:.1f}")
        if row["note"]:
            console.print(
                f"note: {row['file']}: {row['note']}", style="yellow", highlight=False, soft_wrap=True
            )
    console.print(table)
    if out is not None:
        predictions.to_csv(out, index=False)


def main() -> None:
    """Run the command line; what a person can mend is one line and exit code 2."""
    try:
        app()
    except UserError as error:
        Console(stderr=True, soft_wrap=True).print(f"[red]error:[/red] {_escape(error)}", highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _escape(error: UserError) -> str:
    from rich.markup import escape

    return escape(str(error))


def _progress(what: str) -> Progress:
    return Progress(
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )


def _new_run(kind: str) -> Path:
    return Path("runs") / f"{datetime.datetime.now():%Y-%m-%d-%H%M%S}-{kind}"


def _readable(value: Any) -> str:
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_readable(entry)}" for name, entry in value.items())
    if isinstance(value, list | tuple):
        return (
            " × ".join(map(str, value))
            if all(isinstance(entry, int) for entry in value)
            else ", ".join(map(str, value))
        )
    return str(value)


def _show_cells(run: Path) -> None:
    import pandas as pd

    table = Table(
        "fold", "seed", "n", "MAE", "R²", "site balanced accuracy", "median predictor's MAE", box=None
    )
    for cell in pd.read_csv(run / "cells.csv").to_dict("records"):
        numbers = [cell[key] for key in ("mae", "r2", "site_balanced_accuracy", "median_mae")]
        table.add_row(
            *(str(int(cell[key])) for key in ("fold", "seed", "n")), *(f"{number:.2f}" for number in numbers)
        )
    console.print(table)
