"""The command line, `brainsweep` or `python -m distributed`: arguments in, one call, a summary out."""

from __future__ import annotations

import datetime
import errno
import importlib.metadata
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
    CohortFolder,
    RunArgument,
    as_typed,
    asks,
    console,
    place,
)
from distributed.commands.using import using
from distributed.run.allocator import keep_freed_memory
from distributed.sweeps.request import ResumeRequest, SweepRequest, TrainRequest

app = typer.Typer(
    name="brainsweep",
    help="Find the best way to train contrastive models on 3D brain images.",
    epilog="Begin with: brainsweep phantom cohorts/phantom && brainsweep sweep cohorts/phantom",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(using)
app.add_typer(data)


def show_version(wanted: bool) -> None:
    """Print the installed version, or the folder of brainsweep if it is not installed, and end."""
    if not wanted:
        return
    try:
        typer.echo(f"brainsweep {importlib.metadata.version('brainsweep')}")
    except importlib.metadata.PackageNotFoundError:
        typer.echo(f"brainsweep, not installed, from {Path(__file__).parents[2]}")
    raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=show_version, is_eager=True, help="print the version and exit"),
    ] = False,
) -> None:
    """Options before a command."""


@app.command(
    epilog="Example: brainsweep train cohorts/phantom --set training.epochs=10 --set model.width=0.25"
)
@asks(TrainRequest)
def train(
    cohort: CohortFolder,
    request: TrainRequest,
    out: Annotated[Path | None, typer.Option(help="run folder; runs/DATE-train if absent")] = None,
    address: Address = None,
) -> None:
    """Train one configuration on one fold: the published one, with your changes. The hold-out is not touched."""
    from core.starts import BEST
    from distributed.sweeps.train_one import train_one

    folder = train_one(cohort, request, out or _new_run("train"), address, console)
    _show_cells(folder.path)
    if (folder.path / BEST).exists():
        console.print(f"\nNext:\n  brainsweep predict {folder.path} VOLUME.nii.gz", highlight=False)


@app.command(
    epilog="Example: brainsweep sweep cohorts/phantom --trials 30 --folds 3 --set training.epochs=10"
)
@asks(SweepRequest)
def sweep(
    cohort: CohortFolder,
    request: SweepRequest,
    enqueue: Annotated[
        Path | None,
        typer.Option(metavar="FILE.yaml", help="your own configurations, tried after the published one"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            parser=place,
            metavar="RUN",
            help="run folder, or s3://bucket/folder; runs/DATE-sweep if absent",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="continue the run at --out if there is one; for batch jobs that start again"
        ),
    ] = False,
    address: Address = None,
) -> None:
    """Search for the best configuration, refit it, and look at the held-out subjects once."""
    from distributed.sweeps.launch import Launch
    from distributed.sweeps.nested import run_nested, run_or_resume
    from distributed.sweeps.sweep import run_sweep

    if resume and out is None:
        raise UserError("--resume needs --out RUN: the run that this command begins or continues")
    run = run_or_resume if resume else run_nested if request.parts else run_sweep
    run(Launch(cohort, request, out or _new_run("sweep"), address, console, enqueue))


@app.command(epilog="Example: brainsweep demo --out runs/demo")
def demo(
    cohort: Annotated[Path, typer.Option(help="where the synthetic brains are made, or are")] = Path(
        "cohorts/phantom"
    ),
    out: Annotated[Path | None, typer.Option(help="run folder; runs/DATE-demo if absent")] = None,
) -> None:
    """Make 128 synthetic brains and search for about 3 minutes, as much as this machine does in that time."""
    from core.volumes.phantom.cohort import write_phantom_cohort
    from core.volumes.phantom.settings import PhantomSettings
    from distributed.run.quiet import quiet
    from distributed.sweeps.demo import measure_epoch, size_of, slots_here
    from distributed.sweeps.launch import Launch
    from distributed.sweeps.sweep import run_sweep

    quiet()
    console.print(f"synthetic brains in {cohort} …", highlight=False)
    brains = write_phantom_cohort(cohort, PhantomSettings(subjects=128, spacing=8))
    size = size_of(measure_epoch(brains), slots_here())
    request = size.request
    console.print(
        f"an epoch takes {size.epoch:.2f} s here: {request.trials} trials of {len(request.cells)} folds and "
        f"{request.changes['training.epochs']} epochs, in about {size.seconds / 60:.0f} minutes. The same as\n"
        f"  {as_typed(cohort, request)}",
        highlight=False,
        soft_wrap=True,
    )
    run_sweep(Launch(cohort, request, out or _new_run("demo"), None, console))


@app.command(epilog="Example: brainsweep resume runs/demo")
@asks(ResumeRequest)
def resume(run: RunArgument, request: ResumeRequest, address: Address = None) -> None:
    """Continue an interrupted run. Finished trials are not repeated; the others continue from their last epoch."""
    from distributed.sweeps.nested import resume_run

    resume_run(run, request, address, console)


@app.command(epilog="Example: brainsweep report runs/demo")
def report(run: RunArgument) -> None:
    """Make the report and the leaderboard of a run again; the run may be unfinished."""
    from core.report.answer.record import read_run
    from core.report.answer.tables import print_leaderboard
    from core.report.page import write_report
    from core.run_names import RUN_JSON
    from distributed.run.folder import open_run
    from distributed.run.working_copy import bring_run, send_report
    from distributed.sweeps.nested import KINDS

    bring_run(run, console)
    kind = KINDS.get(open_run(run).about.kind) if (run / RUN_JSON).exists() else None
    if kind is not None:
        page = kind.write(run)
        kind.show(console, run)
        console.print(f"\nNext:\n  open {page}", highlight=False)
        return
    page = write_report(run)
    send_report(page)
    print_leaderboard(console, read_run(run))
    console.print(f"\nNext:\n  open {page}", highlight=False)


@app.command(epilog="Example: brainsweep compare runs/contrastive runs/cnn --out comparison")
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN…", help="runs judged on the same people")],
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="where the tables and the page are written")
    ] = Path("comparison"),
) -> None:
    """Compare the winners of runs on the same held-out people, in pairs: one table, one page, one picture."""
    from core.report.compare import print_compared, write_compared

    page = write_compared(runs, out)
    print_compared(console, runs)
    console.print(f"\nNext:\n  open {page}", highlight=False)


@app.command(epilog="Example: brainsweep settings temperature")
def settings(
    word: Annotated[
        str, typer.Argument(metavar="[WORD]", help="in the name or the meaning; all if absent")
    ] = "",
    task: Annotated[str | None, typer.Option(help="settings of this task only")] = None,
) -> None:
    """List what can be set: names, defaults, ranges, meanings, and which spaces search them."""
    from distributed.commands.settings import in_words, settings_about

    for line in in_words(settings_about(word, task)):
        console.print(line, highlight=False, soft_wrap=True)


def main() -> None:
    """Run the command line. An error that the user can solve is one line and exit code 2."""
    keep_freed_memory()
    try:
        app()
    except UserError as error:
        Console(stderr=True, soft_wrap=True).print(f"[red]error:[/red] {_escape(error)}", highlight=False)
        sys.exit(2)
    except UnicodeEncodeError as error:
        text = ascii(error.object)[:200]
        Console(stderr=True, soft_wrap=True, markup=False).print(
            f"error: {text} is no text in UTF-8; rename the file, folder or subject", highlight=False
        )
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        Console(stderr=True, soft_wrap=True).print(
            f"[red]error:[/red] {error.strerror}; finished epochs are kept, and `brainsweep resume RUN` continues",
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
    from core.files.tables import read_table
    from core.report.answer.tables import IN_A_TERMINAL
    from distributed.run.folder import open_run

    task = open_run(run).about.task
    columns = {name: task.metrics[name].title for name in task.shown[:IN_A_TERMINAL]}
    if task.floor is not None:
        columns[task.floor.metric] = f"{task.floor.method}'s {task.metrics[task.floor.of].title}"
    table = Table("fold", "seed", "n", *columns.values(), box=None)
    for cell in read_table(run / "cells.csv").to_dict("records"):
        numbers = ("–" if cell[key] != cell[key] else f"{cell[key]:.2f}" for key in columns)
        table.add_row(*(str(int(cell[key])) for key in ("fold", "seed", "n")), *numbers)
    console.print(table)
    if task.shown[IN_A_TERMINAL:]:
        others = ", ".join(task.metrics[name].title for name in task.shown[IN_A_TERMINAL:])
        console.print(f"Also in cells.csv: {others}.", highlight=False)
