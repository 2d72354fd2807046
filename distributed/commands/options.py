"""What all commands share: the console, arguments that recur, progress bars, and values as people read them."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from core.errors import UserError

# A log file is no terminal of 80 columns: tables need more.
console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 110)

CohortFolder = Annotated[
    str,
    typer.Argument(metavar="COHORT", help="made by `ingest` or `phantom`: a folder, or s3://bucket/folder"),
]


def place(text: str) -> Path:
    """The folder of a run that lies at `text`, a path or an address."""
    if "://" not in text:
        return Path(text)
    from distributed.run.working_copy import place_of_run

    return place_of_run(text)


RunArgument = Annotated[
    Path, typer.Argument(metavar="RUN", parser=place, help="folder of a run, or s3://bucket/folder")
]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="NAME=VALUE", help="change any setting, e.g. training.epochs=20; repeatable"
    ),
]
DataMode = Annotated[
    str,
    typer.Option(
        help="where volumes wait: auto, resident (in shared memory), streaming (by Ray Data), direct (on disk)"
    ),
]
Address = Annotated[
    str | None,
    typer.Option(help="HEAD:PORT of a running Ray cluster, or auto; this machine if absent"),
]


def progress_bar(what: str) -> Progress:
    """A bar that vanishes when it is done."""
    return Progress(
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )


def names(text: str | None) -> tuple[str, ...]:
    """The parts of a comma-separated option; () if it is absent."""
    return tuple(name.strip() for name in text.split(",") if name.strip()) if text else ()


def wrong_option(error: ValidationError) -> UserError:
    """The first mistake, named by the option it was typed with."""
    first = error.errors()[0]
    option = str(first["loc"][0]).replace("_", "-") if first["loc"] else "options"
    return UserError(f"--{option}: {first['msg'].removeprefix('Value error, ')}, got {first['input']!r}")


def readable(value: Any) -> str:
    """A number, list or dict in a table's cell."""
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {readable(entry)}" for name, entry in value.items())
    if isinstance(value, list | tuple):
        separator = " × " if all(isinstance(entry, int) for entry in value) else ", "
        return separator.join(map(str, value))
    return str(value)
