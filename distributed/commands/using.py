"""The commands that use the models of a run: evaluate, predict, derive."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table
from rich.text import Text

from core.errors import UserError
from distributed.commands.options import (
    Address,
    CohortFolder,
    Ensemble,
    EnsembleOption,
    RunArgument,
    TrustsTask,
    console,
    names,
    place,
    progress_bar,
    readable,
    wrong_option,
)

using = typer.Typer()
MANY = 64
"""Scans of which the volumes are measured by all cores, which takes Ray seconds to begin."""


@using.command(epilog="Example: brainsweep evaluate runs/demo cohorts/other")
def evaluate(
    run: RunArgument,
    cohort: CohortFolder,
    ensemble: EnsembleOption = "best",
    out_of_fold: Annotated[
        bool,
        typer.Option(
            "--out-of-fold",
            help="in the cohort of the run itself judge the people of its folds, too, each by the models of the folds "
            "that were not trained on them",
        ),
    ] = False,
    trust: TrustsTask = False,
) -> None:
    """Predict a cohort with the best model of a run, and measure the errors, site by site."""
    from distributed.commands.evaluating import evaluate_run
    from distributed.run.quiet import quiet
    from distributed.run.working_copy import bring_run

    quiet()
    bring_run(run, console)
    with progress_bar("predicting") as progress:
        task = progress.add_task("", total=None)
        evaluation = evaluate_run(
            run, cohort, ensemble=ensemble, out_of_fold=out_of_fold, console=console, is_trusted=trust,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )  # fmt: skip
    for note in evaluation.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    judged = evaluation.predictions
    sites = judged["site"].where(judged["site"] != "", "unknown")
    table = Table(
        "metric", "all", *(Column(Text(site)) for site in evaluation.of_sites), box=None, padding=(0, 2)
    )
    for name, of_people in (("subjects", judged["subject"]), ("scans", None)):
        counts = sites.value_counts() if of_people is None else of_people.groupby(sites).nunique()
        whole = len(judged) if of_people is None else of_people.nunique()
        table.add_row(name, readable(whole), *(readable(int(counts[site])) for site in evaluation.of_sites))
    for name, value in evaluation.metrics.items():
        table.add_row(
            name, readable(value), *(readable(of_site[name]) for of_site in evaluation.of_sites.values())
        )
    console.print(table)
    console.print(f"predictions in {evaluation.table}", highlight=False)


@using.command(epilog="Example: brainsweep predict runs/demo sub-01_T1w.nii.gz sub-02_T1w.nii.gz")
def predict(
    run: RunArgument,
    volumes: Annotated[
        list[Path],
        typer.Argument(metavar="VOLUME…", help="NIfTI files, prepared as the cohort was; or one BIDS tree"),
    ],
    masks: Annotated[
        list[Path] | None,
        typer.Option(
            "--mask",
            help="brain mask of each volume, in order, if the cohort has masks; repeatable",
        ),
    ] = None,
    truth: Annotated[
        list[str] | None,
        typer.Option(
            "--truth",
            "--age",
            help="the truth about each volume, in order, to compare with: its age in years, or its class; repeatable",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER|FILE.csv",
            help="also write the table, with whether the model was trained on a file: to FILE.csv or .json, or "
            "into FOLDER, beside the maps of classes of a task that has any, each on its file's grid; of a BIDS tree "
            "FOLDER becomes a tree of derivatives",
        ),
    ] = None,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="write the probabilities of all classes into FOLDER, too")
    ] = False,
    embeddings: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.parquet",
            help="also write the embedding of every file: file, embedding_0, embedding_1, …",
        ),
    ] = None,
    ensemble: EnsembleOption = "best",
    trust: TrustsTask = False,
) -> None:
    """Predict NIfTI files, or a BIDS tree, with the best model of a run: ages with an interval, classes, or maps."""
    from distributed.commands.predicting import Wanted, predict_files, predict_tree
    from distributed.run.quiet import quiet
    from distributed.run.working_copy import bring_run

    quiet()
    bring_run(run, console)
    folder = None if out is None or out.suffix.lower() in (".csv", ".json") else out
    if probabilities and folder is None:
        raise UserError("--probabilities needs --out FOLDER")
    trees = [volume for volume in volumes if volume.is_dir()]
    if trees and (len(volumes) > 1 or folder is None or masks or truth):
        raise UserError(
            f"{trees[0]} is a folder: a BIDS tree is predicted by itself, into --out FOLDER, with its own masks and "
            "without --truth"
        )
    if embeddings is not None and (embeddings.suffix != ".parquet" or ensemble != "best"):
        raise UserError(
            f"--embeddings {embeddings} must be a .parquet file, of one model (--ensemble best: axes of several differ)"
        )
    wanted = Wanted(folder, probabilities, ensemble, embeddings)
    with progress_bar("predicting") as progress:
        task = progress.add_task("", total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        if folder is not None and trees:
            prediction = predict_tree(
                run, trees[0], folder, wanted, console=console, is_trusted=trust, on_progress=show
            )
        else:
            prediction = predict_files(
                run, volumes, masks, truth, wanted=wanted, console=console, is_trusted=trust, on_progress=show
            )
    found = prediction.table
    for note in prediction.lacks:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    for said, files in found[found["note"] != ""].groupby("note", sort=False)["file"]:
        who = files.iloc[0] if len(files) == 1 else f"{len(files)} files"
        console.print(f"note: {who}: {said}", style="yellow", highlight=False, soft_wrap=True)
    table = Table("file", *prediction.shown.columns, box=None, padding=(0, 2))
    for file, texts in zip(found["file"], prediction.shown.to_numpy(str), strict=True):
        table.add_row(Text(file), *map(Text, texts))
    console.print(table)
    console.print(prediction.how_to_read, highlight=False, soft_wrap=True)
    if out is not None and not trees:
        from core.files.tables import write_table
        from core.files.writing import write_text, writing_to

        table_file = out if folder is None else folder / "predictions.csv"
        with writing_to(table_file.parent):
            table_file.parent.mkdir(parents=True, exist_ok=True)
            if table_file.suffix.lower() == ".json":
                write_text(table_file, found.to_json(orient="records", indent=2))
            else:
                write_table(found, table_file)


@using.command(epilog="Example: brainsweep explain runs/demo cohorts/phantom")
def explain(
    run: RunArgument,
    cohort: CohortFolder,
    people: Annotated[
        int, typer.Option(min=1, help="scans at most, of people whom the model does not know")
    ] = 8,
    cube: Annotated[float, typer.Option(min=1, metavar="MM", help="side of the cube that is hidden")] = 24.0,
    trust: TrustsTask = False,
) -> None:
    """Show where the best model of a run looks: hide parts of volumes, and see what changes. The report draws it."""
    from core.report.page import write_report
    from core.run_names import SWEEP
    from distributed.commands.explaining import explain_run
    from distributed.run.folder import open_run
    from distributed.run.quiet import quiet
    from distributed.run.working_copy import bring_run

    quiet()
    bring_run(run, console)
    with progress_bar("hiding parts of scans") as progress:
        task = progress.add_task("", total=None)
        found, place = explain_run(
            run, cohort, people, cube, console=console, is_trusted=trust,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )  # fmt: skip
    console.print(
        f"{found.what}, mean over {found.scans} scans, in {place}; correlation with the map of random weights "
        f"{found.likeness:+.2f}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    page = write_report(run) if open_run(run).about.kind == SWEEP else None
    console.print(f"\nNext:\n  open {page or place / 'trained.nii.gz'}", highlight=False, soft_wrap=True)


@using.command(
    rich_help_panel="Cohorts", epilog="Example: brainsweep derive cohorts/study --from runs/tissue --volumes"
)
def derive(
    cohort: CohortFolder,
    run: Annotated[
        Path | None,
        typer.Option(
            "--from", metavar="RUN", parser=place, help="run whose models compute it, for --volumes"
        ),
    ] = None,
    volumes: Annotated[
        bool,
        typer.Option(
            "--volumes", help="the volume of every class that the run segments, in mL and as a share"
        ),
    ] = False,
    name: Annotated[
        str,
        typer.Option(
            help="of the overlay in COHORT/derived; its columns begin with it, if it is not `volumes`"
        ),
    ] = "volumes",
    ensemble: EnsembleOption = "best",
    trust: TrustsTask = False,
    constraint: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="maps of clusters of like contrast, which guide a pre-training"),
    ] = None,
    contrasts: Annotated[
        str | None, typer.Option(help="channels that --constraint clusters, comma-separated; all if absent")
    ] = None,
    components: Annotated[
        int, typer.Option(min=1, help="principal components of the contrasts, at most")
    ] = 4,
    clusters: Annotated[
        str,
        typer.Option(metavar="K[,K…]", help="clusters inside the brain; of several K the maps are NAME-K"),
    ] = "20",
    tv: Annotated[
        float, typer.Option(help="weight of the total variation: the larger, the less is smoothed")
    ] = 40.0,
    seed: Annotated[int, typer.Option(min=0, help="of the clusters")] = 0,
    address: Address = None,
) -> None:
    """Add what is computed once to a cohort: volumes of classes, or constraint maps. Its files do not change.

    Repeat the command after a stop.
    """
    if volumes == (constraint is not None):
        raise UserError("derive what? Give --volumes with --from RUN, or --constraint NAME")
    if volumes and run is None:
        raise UserError("--volumes needs --from RUN, the run whose models segment")
    if constraint is not None and run is not None:
        raise UserError("--from cannot act with --constraint, which needs no model")
    from distributed.run.quiet import quiet

    quiet()
    if run is not None:
        _derive_volumes(cohort, run, name, ensemble, trust, address)
    elif constraint is not None:
        _derive_constraints(cohort, constraint, contrasts, components, clusters, tv, seed, address)


def _derive_volumes(
    cohort: str, run: Path, name: str, ensemble: Ensemble, trust: bool, address: str | None
) -> None:
    from distributed.commands.deriving import derive_volumes, measure_volumes, one_after_another
    from distributed.run.working_copy import bring_run

    bring_run(run, console)
    with (
        progress_bar("measuring volumes") as progress,
        _runner_for(cohort, address, measure_volumes, one_after_another) as runner,
    ):
        task = progress.add_task("", total=None)
        description, page = derive_volumes(
            run, Path(cohort), name, ensemble=ensemble, console=console, is_trusted=trust, runner=runner,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )  # fmt: skip
    console.print(
        f"{', '.join(description.columns)} in {cohort}, made by {description.made_by}", highlight=False
    )
    named = [column for column in description.columns if column.endswith("_ml")]
    changes = "" if name == "volumes" else f" --set 'data.volumes=[{','.join(named)}]'"
    following = f"sweep {cohort} --task tissue_age{changes}"
    console.print(f"\nNext:\n  open {page}\n  brainsweep {following}", highlight=False, soft_wrap=True)


def _derive_constraints(
    cohort: str, name: str, contrasts: str | None, components: int, clusters: str, tv: float, seed: int,
    address: str | None,
) -> None:  # fmt: skip
    from pydantic import ValidationError

    from core.volumes.derive.constraint import ConstraintSettings
    from distributed.commands.constraining import derive_constraint, make_maps, one_after_another

    try:
        counts = [int(each) for each in names(clusters)]
    except ValueError:
        counts = []
    if not counts or len(set(counts)) < len(counts):
        raise UserError(f"--clusters must be whole numbers such as 20 or 10,20,30, got {clusters!r}")
    pages = []
    for count in counts:
        try:
            settings = ConstraintSettings(
                contrasts=names(contrasts), components=components, clusters=count, tv=tv, seed=seed
            )
        except ValidationError as error:
            raise wrong_option(error) from None
        own = name if len(counts) == 1 else f"{name}-{count}"
        with (
            progress_bar(f"clustering {own}") as progress,
            _runner_for(cohort, address, make_maps, one_after_another) as runner,
        ):
            task = progress.add_task("", total=None)

            def show(done: int, total: int, task: Any = task, progress: Any = progress) -> None:
                progress.update(task, completed=done, total=total)

            description, page = derive_constraint(
                Path(cohort), own, settings, runner=runner, on_progress=show
            )
        console.print(
            f"map {own} in {cohort}, made by {description.made_by}", highlight=False, soft_wrap=True
        )
        pages.append(page)
    if len(settings.contrasts) == 1:
        console.print(
            "note: with one contrast clusters are levels of its grey values, and nothing else guides"
        )
    last = name if len(counts) == 1 else f"{name}-{counts[-1]}"
    console.print(
        "\nNext:" + "".join(f"\n  open {page}" for page in pages)
        + f"\n  brainsweep sweep {cohort} --space contrast_pretraining --set data.constraint={last}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


@contextmanager
def _runner_for(
    cohort: str, address: str | None, function: Callable[[Any], str], here: Callable[..., Any]
) -> Iterator[Any]:
    """What runs tasks: this process, or all cores where a cohort is so large that Ray's seconds of start pay."""
    from core.volumes.cohort.reader import Cohort

    if address is None and len(Cohort.open(cohort)) <= MANY:
        yield here
        return
    from distributed.commands.on_ray import PROCESS_BYTES, on_all_cores
    from distributed.slots.cluster import connect

    with connect(address, console):
        yield lambda tasks, memory: on_all_cores(function, tasks, PROCESS_BYTES + memory)
