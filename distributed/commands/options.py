"""What all commands share: the console, common arguments, options made from requests, and values as text."""

from __future__ import annotations

import functools
import inspect
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from core.errors import UserError
from distributed.sweeps.request import REPEATED

# A log file has no width, and 80 columns are not enough for the tables.
# Names of people's folders and subjects may hold [brackets], which are no markup.
console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 110, markup=False)

EVERY_S = 30.0
"""How often a command says how far it is, where it cannot draw."""

CohortFolder = Annotated[
    str,
    typer.Argument(metavar="COHORT", help="made by `ingest` or `phantom`: a folder, or s3://bucket/folder"),
]


def place(text: str) -> Path:
    """The folder of the run at `text`, which is a path or an address."""
    if "://" not in text:
        return Path(text)
    from distributed.run.working_copy import place_of_run

    return place_of_run(text)


RunArgument = Annotated[
    Path, typer.Argument(metavar="RUN", parser=place, help="folder of a run, or s3://bucket/folder")
]
Address = Annotated[
    str | None,
    typer.Option(help="HEAD:PORT of a running Ray cluster, or auto; this machine if absent"),
]

Ensemble = Literal["best", "folds"]
EnsembleOption = Annotated[
    Ensemble,
    typer.Option(
        help="best: the model of all development people; folds: the mean of the winner's models of all folds, which a "
        "sweep with --confirm-seeds keeps"
    ),
]
TrustsTask = Annotated[
    bool,
    typer.Option(
        "--trust-space", help="execute the FILE.py of the run's task though it, or its owner, has changed"
    ),
]
"""For commands that use the models of a run."""


class Lines(Progress):
    """Progress for a log file or a pipe, where nothing can be drawn over: a line now and then, in place of a bar."""

    def __init__(self, what: str) -> None:
        super().__init__(console=Console(quiet=True))
        self.what, self.said = what, time.monotonic()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """See `Progress`; says how far it is if it has said nothing for a while."""
        super().update(task_id, **changes)
        task = self.tasks[task_id]
        if time.monotonic() - self.said < EVERY_S or task.total is None or task.completed >= task.total:
            return
        self.said = time.monotonic()
        console.print(
            f"{self.what}: {task.completed:g} of {task.total:g} after {task.elapsed or 0:.0f} s",
            highlight=False,
        )


def progress_bar(what: str) -> Progress:
    """A progress bar that disappears when it is done; lines where there is no terminal."""
    if not console.is_terminal:
        return Lines(what)
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


def asks(request: type[BaseModel]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the fields of `request` as options, and call it with the request that the user typed.

    The command has one parameter of the type `request`. A field becomes an option with its name; --help shows its
    default, its bounds and its description. A tuple is typed with commas; a dictionary is `--set NAME=VALUE`, which may
    be repeated. The request itself checks the values.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        parameters: list[inspect.Parameter] = []
        for own in inspect.signature(command, eval_str=True).parameters.values():
            if own.annotation is request:
                asked = own.name
                parameters += [_option(name, field) for name, field in _options(request).items()]
            else:
                parameters.append(own.replace(kind=own.KEYWORD_ONLY))

        @functools.wraps(command)
        def with_options(**given: object) -> None:
            values = {name: given.pop(name) for name in _options(request)}
            command(**given, **{asked: _made(request, values)})

        # Typer reads the options of a command from its signature.
        with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return with_options

    return decorate


def _options(request: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields that are options: those with a description, which is their help."""
    return {name: field for name, field in request.model_fields.items() if field.description}


def _made(request: type[BaseModel], typed: Mapping[str, object]) -> BaseModel:
    """The request with the values that were `typed`; UserError if it refuses one of them."""
    values = dict(typed)
    for name, field in _options(request).items():
        value = typed[name]
        if is_repeated(field):
            values[name] = tuple(value) if isinstance(value, list) else ()
        elif get_origin(field.annotation) is tuple:
            is_left_to_it = value is None and field.default is None
            values[name] = None if is_left_to_it else names(value if isinstance(value, str) else None)
        elif get_origin(field.annotation) is dict:
            from core.config import parse_changes

            task = typed.get("task")
            asked = list(value) if isinstance(value, list) else []
            values[name] = parse_changes(asked, task if isinstance(task, str) else None)
    try:
        return request(**values)
    except ValidationError as error:
        raise wrong_option(error) from None


def _option(name: str, field: FieldInfo) -> inspect.Parameter:
    """The option for a field of a request."""
    default, kind = field.get_default(call_default_factory=True), field.annotation
    spelled: tuple[str, ...] = ()
    metavar = None
    if is_repeated(field):
        default, kind = None, list[str] | None
    elif get_origin(kind) is tuple:
        default, kind = None if default is None else ",".join(default), str
    elif get_origin(kind) is dict:
        default, kind, spelled, metavar = None, list[str] | None, ("--set",), "NAME=VALUE"
    elif get_origin(kind) is Literal:
        kind, metavar = str, "|".join(get_args(kind))
    elif kind is bool:
        spelled = (f"--{name.replace('_', '-')}",)
    words = " ".join(filter(None, [field.description, _bounds(field)]))
    option = typer.Option(*spelled, help=words, metavar=metavar)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
    )


def is_repeated(field: FieldInfo) -> bool:
    """Whether the option is given once for each of its values, which may hold commas."""
    return isinstance(field.json_schema_extra, dict) and bool(field.json_schema_extra.get(REPEATED))


def _bounds(field: FieldInfo) -> str:
    """The bounds of a number, for its help; bounds of 0 and 1 are not shown."""
    signs: dict[type, tuple[str, str]] = {
        Ge: ("ge", "at least"),
        Gt: ("gt", "above"),
        Le: ("le", "at most"),
        Lt: ("lt", "below"),
    }
    found = [
        f"{words} {getattr(each, key):g}"
        for each in field.metadata
        for kind, (key, words) in signs.items()
        if isinstance(each, kind) and getattr(each, key) not in (0, 1)
    ]
    return f"({', '.join(found)})" if found else ""


def as_typed(cohort: Path, request: BaseModel) -> str:
    """The command that makes a sweep of this request, with the options that are not the default."""
    words = [f"brainsweep sweep {cohort}"]
    for name, value in request.model_dump(exclude_defaults=True).items():
        if isinstance(value, dict):
            words += [f"--set {setting}={given}" for setting, given in value.items()]
        elif isinstance(value, tuple):
            words += [f"--{name.replace('_', '-')} {given}" for given in value]
        else:
            words.append(f"--{name.replace('_', '-')} {value}")
    return " ".join(words)


def wrong_option(error: ValidationError) -> UserError:
    """The first mistake, with the name of its option."""
    first = error.errors()[0]
    option = str(first["loc"][0]).replace("_", "-") if first["loc"] else "options"
    words = first["msg"].removeprefix("Value error, ")
    # The messages of our own checks contain the value already.
    given = "" if ", got " in words else f", got {first['input']!r}"
    return UserError(f"--{option}: {words}{given}")


def readable(value: object) -> str:
    """A number, a list or a dictionary as the text of a table cell."""
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {readable(entry)}" for name, entry in value.items())
    if isinstance(value, list | tuple):
        separator = " × " if all(isinstance(entry, int) for entry in value) else ", "
        return separator.join(map(str, value))
    return str(value)
