"""The command line, `brainsweep` or `python -m distributed`: arguments in, one call, a summary out."""

from __future__ import annotations

import datetime
import errno
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from core.errors import UserError
from distributed.commands.cohorts import data
from distributed.commands.options import (
    Address,
    Changes,
    CohortFolder,
    DataMode,
    RunArgument,
    console,
    place,
    readable,
    wrong_option,
)

app = typer.Typer(
    name="brainsweep",
    help="Find the best way to train contrastive models on 3D brain images.",
    epilog="Begin with: brainsweep phantom cohorts/phantom && brainsweep sweep cohorts/phantom",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(data)


@app.command(
    epilog="Example: brainsweep train cohorts/phantom --set training.epochs=10 --set model.width=0.25"
)
def train(
    cohort: CohortFolder,
    settings: Annotated[
        Path | None,
        typer.Option(help="YAML file of settings, such as RUN/schedule.yaml; published if absent"),
    ] = None,
    changes: Changes = None,
    out: Annotated[Path | None, typer.Option(help="run folder; runs/DATE-train if absent")] = None,
    folds: Annotated[int, typer.Option(min=2, help="cross-validation folds")] = 5,
    fold: Annotated[int, typer.Option(min=0, help="the fold to validate on")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="seed of initialisation, order and views")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="data-parallel workers; more than 1 starts Ray")] = 1,
    data_mode: DataMode = "auto",
    address: Address = None,
) -> None:
    """Train one configuration on one fold: the published one, with your changes. The hold-out is not touched."""
    from core.config import parse_changes
    from distributed.batches.hold import checked_mode
    from distributed.sweeps.train_one import train_one

    folder = train_one(
        cohort, out or _new_run("train"), parse_changes(changes or []),
        folds=folds, fold=fold, seed=seed, workers=workers, address=address, console=console,
        data_mode=checked_mode(data_mode), settings_file=settings,
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
    objectives: Annotated[
        str,
        typer.Option(
            help="what to minimise, the first stops trials and chooses the winner: "
            "mae, site_balanced_accuracy, openbhb_score, accelerator_seconds; comma-separated"
        ),
    ] = "mae",
    scheduler: Annotated[
        str,
        typer.Option(
            help="what stops bad trials early: asha, hyperband, median, none; "
            "or a population that changes while it trains: pbt, pb2"
        ),
    ] = "asha",
    pruner: Annotated[
        str,
        typer.Option(
            help="beside the scheduler: none, or wilcoxon[=P] against the best trial, cell by cell (P 0.1)"
        ),
    ] = "none",
    sampler: Annotated[
        str, typer.Option(help="what proposes trials: tpe, gp, cmaes, nsga2, qmc, random, grid")
    ] = "tpe",
    grid_points: Annotated[
        int | None, typer.Option(min=2, help="values of every continuous setting, for --sampler grid")
    ] = None,
    enqueue: Annotated[
        Path | None,
        typer.Option(metavar="FILE.yaml", help="list of your configurations, tried after the published one"),
    ] = None,
    data_mode: DataMode = "auto",
    time_budget: Annotated[float | None, typer.Option(help="seconds of search, refits not counted")] = None,
    accelerator_hours: Annotated[
        float | None,
        typer.Option(help="GPU-hours (CPU-core-hours without GPUs) of all trials, refits not counted"),
    ] = None,
    stop_when: Annotated[
        str,
        typer.Option(
            help="also end when improvement is unlikely: regret or emmr (from 20 completed trials), never"
        ),
    ] = "never",
    confirm_seeds: Annotated[
        int,
        typer.Option(min=0, help="repeat winner and published on the same folds with so many fresh seeds"),
    ] = 0,
    search_seed: Annotated[int, typer.Option(min=0, help="seed of splits and sampler")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            parser=place,
            metavar="RUN",
            help="run folder, or s3://bucket/folder; runs/DATE-sweep if absent",
        ),
    ] = None,
    address: Address = None,
    changes: Changes = None,
) -> None:
    """Search for the best configuration, refit it, and look at the held-out subjects once."""
    from pydantic import ValidationError

    from core.config import parse_changes
    from distributed.batches.hold import checked_mode
    from distributed.sweeps.sweep import SweepRequest, run_sweep

    try:
        request = SweepRequest(
            space=space, trials=trials, folds=folds, seeds=seeds, refit_seeds=refit_seeds, holdout=holdout,
            slots=slots, workers_per_slot=workers_per_slot, gpus_per_worker=gpus_per_worker, scheduler=scheduler,
            sampler=sampler, time_budget=time_budget, search_seed=search_seed, changes=parse_changes(changes or []),
            data_mode=checked_mode(data_mode),
            objectives=tuple(name.strip() for name in objectives.split(",")), pruner=pruner, grid_points=grid_points,
            accelerator_hours=accelerator_hours, stop_when=stop_when, confirm_seeds=confirm_seeds,
        )  # fmt: skip
    except ValidationError as error:
        raise wrong_option(error) from None
    run_sweep(cohort, request, out or _new_run("sweep"), address, console, enqueue)


@app.command(epilog="Example: brainsweep resume runs/demo")
def resume(
    run: RunArgument,
    cohort: Annotated[
        str | None, typer.Option(help="where the cohort lies now, if it was moved since the run began")
    ] = None,
    time_budget: Annotated[float | None, typer.Option(help="seconds of further search")] = None,
    accelerator_hours: Annotated[
        float | None, typer.Option(help="of the whole run, earlier sessions included")
    ] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="of the whole run; needs --change-search")] = None,
    space: Annotated[str | None, typer.Option(help="another space; needs --change-search")] = None,
    changes: Changes = None,
    change_search: Annotated[
        bool,
        typer.Option(
            "--change-search", help="search another space, fix settings with --set, or try more trials"
        ),
    ] = False,
    address: Address = None,
) -> None:
    """Continue an interrupted sweep: no finished trial is repeated, unfinished ones go on from their last epoch."""
    from core.config import parse_changes
    from distributed.sweeps.resume import resume_sweep

    resume_sweep(
        run,
        address,
        console,
        budgets={"time_budget": time_budget, "accelerator_hours": accelerator_hours},
        search={"space": space, "changes": parse_changes(changes or []), "trials": trials},
        change=change_search,
        cohort=cohort,
    )


@app.command(epilog="Example: brainsweep report runs/demo")
def report(run: RunArgument) -> None:
    """Make the report and the leaderboard of a run again, whatever state the run is in."""
    from core.report.answer.tables import print_leaderboard, read_run
    from core.report.page import write_report
    from distributed.run.working_copy import bring_run, send_report

    bring_run(run, console)
    page = write_report(run)
    send_report(page)
    print_leaderboard(console, read_run(run))
    console.print(f"\nNext:\n  open {page}", highlight=False)


@app.command(epilog="Example: brainsweep evaluate runs/demo cohorts/other")
def evaluate(run: RunArgument, cohort: CohortFolder) -> None:
    """Predict the ages of a cohort with a run's best model, and say how good that is."""
    from distributed.commands.predicting import evaluate_run
    from distributed.run.working_copy import bring_run

    bring_run(run, console)
    evaluation = evaluate_run(run, cohort)
    for note in evaluation.notes:
        console.print(f"note: {note}", highlight=False)
    table = Table("metric", "value", box=None, padding=(0, 2))
    for name, value in {"subjects": len(evaluation.predictions), **evaluation.metrics}.items():
        table.add_row(name, readable(value))
    console.print(table)
    console.print(f"predictions in {evaluation.table}", highlight=False)


@app.command(epilog="Example: brainsweep predict runs/demo sub-01_T1w.nii.gz sub-02_T1w.nii.gz")
def predict(
    run: RunArgument,
    volumes: Annotated[
        list[Path], typer.Argument(metavar="VOLUME…", help="NIfTI files, prepared as the cohort was")
    ],
    masks: Annotated[
        list[Path] | None,
        typer.Option(
            "--mask",
            help="brain mask of each volume, in order, if the cohort has masks; repeatable",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="also write file and age to this CSV file")] = None,
) -> None:
    """Predict the age of single NIfTI files with a run's best model."""
    from distributed.commands.predicting import predict_files
    from distributed.run.working_copy import bring_run

    bring_run(run, console)
    predictions = predict_files(run, volumes, masks)
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
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        Console(stderr=True, soft_wrap=True).print(
            f"[red]error:[/red] {error.strerror}; nothing finished is lost, and `brainsweep resume RUN` continues",
            highlight=False,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _escape(error: UserError) -> str:
    from rich.markup import escape

    return escape(str(error))


def _new_run(kind: str) -> Path:
    return Path("runs") / f"{datetime.datetime.now():%Y-%m-%d-%H%M%S}-{kind}"


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
