"""The commands for cohorts: make synthetic brains, ingest scans, and describe, inspect and verify a cohort."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError
from rich.table import Table

from core.errors import UserError
from core.volumes.cohort.formats import Compression, Storage, StoredType
from core.volumes.phantom.settings import PhantomSettings
from distributed.commands.options import (
    Address,
    CohortFolder,
    asks,
    console,
    names,
    progress_bar,
    readable,
    wrong_option,
)

if TYPE_CHECKING:
    from core.volumes.ingest.cohort import IngestReport, Runner
    from core.volumes.sources import Listing

data = typer.Typer()
NEXT_OF_KIND = {
    "ageing": "",
    "tissue": " --task segmentation",
    "lesions": " --task classification --set data.target=disease",
    "ct": " --task classification --set data.target=disease --set data.normalise=window:ct_brain",
    "contrasts": " --space contrast_segmentation",
}
"""What a sweep of phantoms of each kind is asked for."""


@data.command(
    rich_help_panel="Cohorts", epilog="Example: brainsweep phantom cohorts/phantom --subjects 96 --spacing 4"
)
@asks(PhantomSettings)
def phantom(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder of the new cohort")],
    settings: PhantomSettings,
    nifti: Annotated[
        bool, typer.Option("--nifti", help="write a BIDS-like tree of NIfTI files instead of a cohort")
    ] = False,
) -> None:
    """Make synthetic brains with known ageing, from the ICBM152 anatomy. An equal cohort in OUT is used again."""
    from core.volumes.phantom.cohort import write_phantom_bids, write_phantom_cohort

    with progress_bar("making brains") as progress:
        task = progress.add_task("", total=settings.subjects)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        if nifti:
            write_phantom_bids(out, settings, show)
        else:
            cohort = write_phantom_cohort(out, settings, show)
        progress.update(task, completed=settings.subjects)
    if nifti:
        from core.volumes.phantom.cohort import BIDS_SUFFIX, MAPS

        channels = ",".join(BIDS_SUFFIX[name] for name in settings.channels)
        maps = "".join(f" --maps {name}" for name in MAPS[settings.kind])
        console.print(
            f"{settings.subjects} subjects in {out}\n\nNext:\n"
            f"  brainsweep ingest {out} COHORT --channels {channels}{maps}"
            f"{' --intensity hu --dtype int16' if settings.kind == 'ct' else ''}",
            highlight=False,
        )
    else:
        console.print(f"{len(cohort)} phantom brains of {cohort.description.shape} voxels in {out}")
        of_kind = NEXT_OF_KIND[settings.kind]
        console.print(
            f"\nNext:\n  brainsweep describe {out}\n  brainsweep sweep {out}{of_kind}", highlight=False
        )


@data.command(
    rich_help_panel="Cohorts",
    epilog="Example: brainsweep ingest study/ cohorts/study --channels T1w --spacing 4",
)
def ingest(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="BIDS tree, table of paths (.csv, .tsv), list (.json), OpenBHB or MRE arrays, or one folder per case",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder of the new cohort")],
    layout: Annotated[
        str | None,
        typer.Option(help="bids, table, openbhb, mre, decathlon or cases; recognised if absent"),
    ] = None,
    channels: Annotated[
        str | None,
        typer.Option(
            help="images of each scan, comma-separated: suffixes such as T1w,FLAIR, or columns of a table"
        ),
    ] = None,
    maps: Annotated[
        str | None,
        typer.Option(
            "--maps", "--label", help="maps of classes that go with scans, comma-separated, e.g. dseg,lesion"
        ),
    ] = None,
    mask: Annotated[str | None, typer.Option(help="brain mask that comes with each scan, e.g. mask")] = None,
    age_column: Annotated[
        str | None,
        typer.Option(help="column with the age in years, age if absent; none: ingest without ages"),
    ] = None,
    root: Annotated[
        Path | None,
        typer.Option(help="folder at which the relative paths of a list or table begin; its own if absent"),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            "--split-4d",
            metavar="NAME",
            help="channels NAME-1, NAME-2, … from the volumes of 4-D images, e.g. echo",
        ),
    ] = None,
    spacing: Annotated[
        str, typer.Option(metavar="MM|X,Y,Z", help="edge of a voxel in mm, or its edges along three axes")
    ] = "4",
    shape: Annotated[
        str | None, typer.Option(help="voxels as X,Y,Z; the MNI field of view if absent")
    ] = None,
    registration: Annotated[
        bool, typer.Option("--register", help="align each brain with MNI152 by an affine transform")
    ] = False,
    midline: Annotated[
        bool,
        typer.Option(
            "--midline",
            help="turn each head so that its mid-sagittal plane is the middle of the grid; refused where it fails",
        ),
    ] = False,
    interpolation: Annotated[
        str,
        typer.Option(metavar="linear|bspline", help="of images; maps have the class of the nearest voxel"),
    ] = "linear",
    intensity: Annotated[
        str,
        typer.Option(
            help="zscore, raw, hu (CT), percentile:LOW,HIGH, window:LOW,HIGH or window:mri, ct, ct_brain, stiffness"
        ),
    ] = "zscore",
    dtype: Annotated[StoredType, typer.Option(help="how voxels are stored")] = "float16",
    storage: Annotated[Storage, typer.Option("--format", help="format of the shards")] = "hdf5",
    compression: Annotated[Compression, typer.Option(help="smaller on disk, slower to read")] = "none",
    strict: Annotated[
        bool, typer.Option("--strict", help="stop at the first subject that cannot be used")
    ] = False,
    address: Address = None,
) -> None:
    """Turn scans into a cohort. Unusable scans are listed and left out; after an interruption repeat the command."""
    from core.volumes.images.preprocess import Preprocessing
    from core.volumes.ingest.cohort import ingest as ingest_scans
    from core.volumes.sources import list_scans

    try:
        grid = tuple(int(side) for side in shape.split(",")) if shape else None
    except ValueError:
        raise UserError(f"--shape must be three whole numbers such as 46,55,46, got {shape!r}") from None
    try:
        edges = tuple(float(edge) for edge in spacing.split(","))
    except ValueError:
        edges = ()
    if len(edges) not in (1, 3):
        raise UserError(
            f"--spacing must be a number of mm such as 4, or three such as 1,1,5, got {spacing!r}"
        )
    try:
        preprocessing = Preprocessing(
            spacing=edges[0] if len(set(edges)) == 1 else edges, shape=grid, intensity=intensity,
            interpolation=interpolation, midline=midline,
            mask="file" if mask else None, registration="affine" if registration else None,
        )  # fmt: skip
    except ValidationError as error:
        raise wrong_option(error) from None
    listing = list_scans(
        source, kind=layout, channels=names(channels) or None, maps=names(maps), mask=mask,
        age_column=None if age_column and age_column.lower() == "none" else age_column or "age",
        is_age_asked=age_column is not None, root=root, split=split or None,
    )  # fmt: skip
    for note in listing.notes:
        console.print(f"note: {note}", highlight=False)
    with _runner(listing, address) as run, progress_bar("ingesting") as progress:
        task = progress.add_task("", total=len(listing.scans))
        report = ingest_scans(
            listing, out, preprocessing, strict=strict, dtype=dtype, storage=storage,
            compression=compression, run=run,
            on_progress=lambda done, total, _: progress.update(task, completed=done, total=total),
        )  # fmt: skip
    _show_ingest(report, out, said=listing.notes)


@contextmanager
def _runner(listing: Listing, address: str | None) -> Iterator[Runner]:
    """The runner of the shard tasks: this process if there are few scans, otherwise Ray."""
    from core.volumes.ingest.cohort import one_after_another
    from distributed.commands.on_ray import in_parallel, pays
    from distributed.slots.cluster import connect

    if address is None and not pays(listing):
        yield one_after_another
        return
    with connect(address, console):
        yield in_parallel


def _show_ingest(report: IngestReport, out: Path, said: Sequence[str]) -> None:
    from core.proposals import searches_of

    if report.already_there:
        console.print(f"{out} already holds this cohort; nothing to do")
    for note in report.notes:
        if note not in said:
            console.print(f"note: {note}", highlight=False)
    for reject in report.rejects[:10]:
        console.print(
            f"left out {reject.subject}: {reject.reason}", style="yellow", highlight=False, soft_wrap=True
        )
    if len(report.rejects) > 10:
        console.print(f"… and {len(report.rejects) - 10} more in {out}/rejects.csv", style="yellow")
    console.print(f"{len(report.cohort)} scans in {out}, {len(report.rejects)} left out")
    following = [f"quality {out}", f"describe {out}"]
    following += [f"sweep {out}{options}" for options in searches_of(report.cohort)]
    console.print(
        "\nNext:" + "".join(f"\n  brainsweep {each}" for each in following), highlight=False, soft_wrap=True
    )


@data.command(rich_help_panel="Cohorts", epilog="Example: brainsweep describe cohorts/phantom")
def describe(cohort: CohortFolder) -> None:
    """Describe a cohort: subjects, ages, sites, grid, intensities, and the error that a model must beat."""
    from core.volumes.cohort.describe import describe as facts_of
    from core.volumes.cohort.reader import Cohort

    table = Table(show_header=False, box=None, padding=(0, 2))
    for name, value in facts_of(Cohort.open(cohort)).items():
        table.add_row(name.replace("_", " "), readable(value))
    console.print(table)


@data.command(rich_help_panel="Cohorts", epilog="Example: brainsweep quality cohorts/study")
def quality(
    cohort: CohortFolder,
    out: Annotated[Path | None, typer.Option(help="file of the page; COHORT/quality.html if absent")] = None,
) -> None:
    """Make a page that shows every scan of a cohort at a glance, the unusual ones first."""
    from core.report.quality.page import write_quality_page
    from core.volumes.cohort.reader import Cohort

    opened = Cohort.open(cohort)
    with console.status(f"looking at {len(opened)} scans"):
        page = write_quality_page(opened, out or opened.folder / "quality.html")
    console.print(f"\nNext:\n  open {page}", highlight=False)


@data.command(rich_help_panel="Cohorts", epilog="Example: brainsweep verify cohorts/study")
def verify(cohort: CohortFolder) -> None:
    """Check every byte of a cohort against its checksums; exit code 1 if any differs."""
    from core.volumes.cohort.verify import verify as find_damage

    with progress_bar("verifying") as progress:
        task = progress.add_task("", total=None)
        damage = find_damage(cohort, lambda done, total: progress.update(task, completed=done, total=total))
    for found in damage:
        where = (
            f"{found.file}, row {found.row}, subject {found.subject}" if found.row is not None else found.file
        )
        console.print(f"damaged: {where}: {found.reason}", style="red", highlight=False)
    if damage:
        raise typer.Exit(1)
    console.print(f"{cohort} is as it was written", highlight=False)
