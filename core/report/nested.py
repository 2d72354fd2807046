"""The result of a nested search: one table and one page for the hold-outs of `sweep --outer`."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from core.errors import UserError
from core.files.tables import write_table
from core.files.writing import writing_to
from core.report.answer.describe import describe
from core.report.answer.record import RunRecord, read_run
from core.report.answer.tables import ABSENT, count, mean_and_sd
from core.report.answer.verdict import LEVEL, comparisons, errors_of, judged_interval, judged_value, verdict
from core.report.figures import subjects as figures
from core.report.html import load_page, write_page
from core.report.page import draw, figures_of_people
from core.run_description import RunDescription
from core.run_names import NESTED, REPORT, RUN_JSON, WINNER
from core.task_description import TaskDescription

FIGURES: dict[str, tuple[str, Callable[[RunRecord], Figure]]] = {
    "gains": ("Do the winners predict better?", figures.gains),
}
"""With those that the task has of people."""


@dataclasses.dataclass(frozen=True)
class Nested:
    """The sweeps of a nested search that have a result, and their predictions together."""

    folder: Path
    about: RunDescription
    sweeps: tuple[RunRecord, ...]
    """Of the hold-outs that were judged, in their order."""
    predictions: pd.DataFrame
    """Of everyone who was held out so far: columns of `predictions` of a sweep, and outer (from 1)."""
    begun: Mapping[int, RunRecord]
    """The sweeps that have begun, by hold-out (from 1)."""

    @property
    def hold_outs(self) -> int:
        """The number of hold-outs that were asked for."""
        asked = self.about.sweep.get("outer")
        return asked if isinstance(asked, int) else len(self.sweeps)

    @property
    def task(self) -> TaskDescription:
        """The task of the sweeps in words."""
        return self.sweeps[0].task

    @property
    def together(self) -> RunRecord:
        """A record with the predictions of all hold-outs, for the figures of subjects."""
        return dataclasses.replace(self.sweeps[0], folder=self.folder, predictions=self.predictions)


def _description(run: Path) -> RunDescription | None:
    """The description of the nested search in folder `run`; None if there is none."""
    try:
        about = RunDescription.model_validate_json((run / RUN_JSON).read_bytes())
    except (OSError, ValueError):
        return None
    return about if about.kind == NESTED else None


def read_nested(run: Path) -> Nested:
    """The nested search in folder `run`.

    Raises:
        UserError: there is none, or none of its hold-outs was judged yet.
    """
    about = _description(run)
    if about is None:
        raise UserError(f"{run} is no nested search: --outer makes one")
    asked = about.sweep.get("outer")
    numbers = range(1, (asked if isinstance(asked, int) else 0) + 1)
    folders = {number: run / f"outer-{number}" for number in numbers}
    records = {number: read_run(path) for number, path in folders.items() if (path / RUN_JSON).exists()}
    judged = {
        number: record for number, record in records.items() if (record.predictions["method"] == WINNER).any()
    }
    if not judged:
        if any(record.about.finished for record in records.values()):
            raise UserError(f"no hold-out of {run} has a result; read what each of its sweeps says")
        raise UserError(f"no hold-out of {run} was judged yet; continue it with `brainsweep resume {run}`")
    together = pd.concat(
        [record.predictions.assign(outer=number) for number, record in judged.items()], ignore_index=True
    )
    return Nested(run, about, tuple(judged.values()), together, records)


def outer_table(nested: Nested) -> pd.DataFrame:
    """One row per hold-out: outer, subjects, the result of every method, and the winner (trial, kind, in words)."""
    rows = []
    for number, record in zip(nested.predictions["outer"].unique(), nested.sweeps, strict=True):
        values = record.held_out_values.groupby("method")["value"].mean()
        best = record.best
        settings = {} if best is None else record.trial(best)
        of_winner = record.predictions[record.predictions["method"] == WINNER]
        row: dict[str, object] = {"outer": int(number), "subjects": of_winner["subject"].nunique()}
        row |= {method: values.get(method, float("nan")) for method in nested.task.methods}
        row |= {
            "trial": best,
            "kind": _kind(record),
            "what": describe({name: settings[name] for name in record.searched()}) if settings else ABSENT,
            "is_published": best is not None and best == record.published,
        }
        rows.append(row)
    return pd.DataFrame(rows)


def _kind(record: RunRecord) -> str:
    """The objective of the winner, such as `exponential`."""
    objective = record.winner.get("objective")
    return str(objective["name"]) if isinstance(objective, dict) and "name" in objective else ABSENT


def headline(nested: Nested) -> str:
    """The result in one sentence: over all subjects with its interval, and the SD over hold-outs."""
    table, task, predictions = outer_table(nested), nested.task, nested.predictions
    low, high = judged_interval(predictions, WINNER, task)
    people = int(errors_of(predictions)[WINNER].count())
    interval = "" if low != low else f", {100 * LEVEL:.0f} % interval {low:.2f} to {high:.2f}"
    spread = f"SD over {count(len(table), 'hold-out')} {table[WINNER].std():.2f}" if len(table) > 1 else ""
    values = {method: judged_value(predictions, method, task) for method in task.methods}
    if values[WINNER] != values[WINNER]:
        values = {method: float(table[method].mean()) for method in task.methods}
    floor = ""
    if task.floor is not None and values[task.floor.method] == values[task.floor.method]:
        floor = f"; {task.floor.words}: {values[task.floor.method]:.2f}"
    value = task.judged_by.amount(f"{values[WINNER]:.2f}")
    return (
        f"Held-out {task.judged_by.title} of the search: {value} over {count(people, 'subject')}, each held out once"
        f"{interval}{f' ({spread})' if spread else ''}{floor}.{_missing(nested)}"
    )


def _missing(nested: Nested) -> str:
    """Which hold-outs have no part in the result, and why; empty if all have."""
    judged = set(nested.predictions["outer"].unique())
    without = [
        number for number, record in nested.begun.items() if number not in judged and record.about.finished
    ]
    left = nested.hold_outs - len(judged) - len(without)
    reasons: dict[str, list[int]] = {}
    for number in without:
        reasons.setdefault(_why_without(nested.begun[number]), []).append(number)
    said = "".join(
        f" No result for hold-out {', '.join(map(str, numbers))}: {reason}."
        for reason, numbers in reasons.items()
    )
    return said + (f" So far {len(judged)} of {nested.hold_outs} hold-outs." if left else "")


def _why_without(record: RunRecord) -> str:
    """Why a sweep that has ended has no prediction of its winner."""
    if record.best is None:
        return "no trial was completed there"
    # It is absent if every refit has failed.
    if any(line.startswith("predictions") and " is absent" not in line for line in record.missing):
        return "its predictions.csv is damaged, put it back from a backup"
    return "the refit of the winner failed there"


def lines(nested: Nested) -> list[str]:
    """The verdict over all subjects, each comparison with its numbers, and how alike the winners were."""
    made = comparisons(nested.predictions, nested.task)
    said = [verdict(nested.predictions, nested.task), *(each.sentence() for each in made)]
    said = [
        re.sub("(T|t)he search winner", lambda found: f"{found[1]}he search with its refit", line)
        for line in said
    ]
    table = outer_table(nested)
    kinds = Counter(table["kind"])
    named = ", ".join(f"{kind} {times} of {len(table)}" for kind, times in kinds.most_common())
    published = int(table["is_published"].sum())
    times = f"{published} of {len(table)} times"
    winners = f"Objective of the winner: {named}. The published configuration itself won {times}."
    return [*said, winners]


def caveats(nested: Nested) -> list[str]:
    """What these numbers do not show."""
    made = [
        "The number is about the procedure, a search and a refit, not about one configuration: every hold-out has a "
        "winner of its own.",
        "Everyone is judged by a model that was trained without them. The models share training subjects, so hold-outs "
        "are not independent, and the SD over hold-outs is not a standard error. The interval resamples subjects.",
        "If you change something because of this page and run again, you have tuned on everyone.",
    ]
    looked = [
        number
        for number, record in zip(nested.predictions["outer"].unique(), nested.sweeps, strict=True)
        if len(record.about.looks) > 1
    ]
    if looked:
        which = ", ".join(map(str, looked))
        made.insert(0, f"The searches of hold-outs {which} went on after a look at their held-out subjects.")
    cut = {
        number: record.about.ended
        for number, record in zip(nested.predictions["outer"].unique(), nested.sweeps, strict=True)
        if record.about.ended
    }
    if cut:
        told = "; ".join(f"hold-out {number}: {reason}" for number, reason in cut.items())
        made.insert(
            0,
            f"Some searches ended early ({told}). They are not continued, because they have looked at their hold-out: "
            "for longer searches begin a new run.",
        )
    made[:0] = [
        f"In hold-out {number} {line}, because this result is wrong without its rest."
        for number, record in nested.begun.items()
        for line in record.cut
    ]
    made[:0] = dict.fromkeys(check.in_words() for sweep in nested.sweeps for check in sweep.about.leaks)
    if nested.sweeps[0].is_synthetic:
        made.insert(0, "These brains are synthetic: the errors say nothing about real people.")
    return made


def write_nested(run: Path) -> Path:
    """Write outer.csv, predictions.csv and report.html of a nested search; returns the page."""
    nested = read_nested(run)
    with writing_to(run):
        write_table(outer_table(nested), run / "outer.csv")
        write_table(nested.predictions, run / "predictions.csv")
    return write_page(render(nested), run / REPORT, "report")


def render(nested: Nested) -> str:
    """The page as HTML text."""
    words = lines(nested)
    drawings = {
        name: draw(name, title, figure, nested.together, f"{headline(nested)} {words[0]}")
        for name, (title, figure) in (FIGURES | figures_of_people(nested.together)).items()
    }
    return load_page("nested.html").render(
        name=nested.folder.resolve().name,
        headline=headline(nested),
        verdict=words,
        methods=nested.task.methods,
        judged=nested.task.judged_by,
        table=_shown(nested),
        drawings=drawings,
        caveats=caveats(nested),
        command=nested.about.command,
    )


def _shown(nested: Nested) -> list[dict[str, object]]:
    rows = outer_table(nested).to_dict(orient="records")
    return [
        {str(name): value for name, value in row.items()}
        | {method: mean_and_sd(row[method], float("nan")) for method in nested.task.methods}
        for row in rows
    ]


def print_nested(console: Console, run: Path) -> None:
    """The table of hold-outs and the verdict, in the terminal."""
    nested = read_nested(run)
    methods, judged = nested.task.methods, nested.task.judged_by
    table = Table("hold-out", "subjects", *methods, "objective", box=None, padding=(0, 2))
    for row in _shown(nested):
        values = [row["outer"], row["subjects"], *(row[method] for method in methods), row["kind"]]
        table.add_row(*(Text(str(value)) for value in values))
    unit = f" in {judged.unit}" if judged.unit else ""
    console.print(f"\nHold-outs of the nested search ({judged.title}{unit})", style="bold")
    console.print(table)
    console.print(headline(nested), style="bold", markup=False)
    for line in lines(nested):
        console.print(f"  {line}", markup=False)
