"""Several runs on the same held-out people: one table, a picture, and every pair of methods with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from core.errors import UserError
from core.files.tables import write_table
from core.files.writing import writing_to
from core.report.answer.record import NothingToShow, RunRecord, read_run
from core.report.answer.tables import ABSENT, count
from core.report.answer.verdict import Comparison, compare, judged_interval, judged_value
from core.report.figures.compare import methods_side_by_side
from core.report.html import load_page, write_page
from core.report.page import draw
from core.run_names import WINNER
from core.task_description import TaskDescription

PAGE, TABLE, PAIRS = "compare.html", "compare.csv", "pairs.csv"


@dataclass(frozen=True)
class Compared:
    """Runs that were judged on the same people."""

    records: dict[str, RunRecord]
    """By the name of the run, in the order in which they were given."""
    predictions: pd.DataFrame
    """Of all of them; `method` is the name of a run, and the baselines of the first one follow."""
    task: TaskDescription
    """Of the first run; in all of them the error of a person means the same."""

    @property
    def methods(self) -> list[str]:
        """The runs, then what they have to beat."""
        return list(dict.fromkeys(self.predictions["method"]))

    @property
    def people(self) -> int:
        """The number of held-out people."""
        return int(self.predictions["subject"].nunique())


def read_compared(runs: Sequence[Path]) -> Compared:
    """The runs side by side.

    Raises:
        UserError: fewer than two runs, one without a result, or runs whose errors, cohorts or held-out people differ.
    """
    if len(runs) < 2:
        raise UserError("compare takes two runs or more")
    records: dict[str, RunRecord] = {}
    for run in runs:
        record = read_run(run)
        if not (record.predictions["method"] == WINNER).any():
            raise UserError(
                f"{run} has no result on held-out people yet; continue it with `brainsweep resume {run}`"
            )
        name = run.resolve().name
        if name in records:
            # Two runs may have one name in two folders.
            name = str(run)
        records[name] = record
    if len(records) < len(runs):
        raise UserError("a run is given twice")
    (first_name, first), *others = records.items()
    people = _held_out(first)
    for name, record in others:
        if record.task.error != first.task.error:
            raise UserError(
                f"{first_name} and {name} cannot be compared: the error of a person is {first.task.error.title} in the "
                f"first and {record.task.error.title} in the second"
            )
        if _cohort_of(record) != _cohort_of(first):
            raise UserError(
                f"{first_name} and {name} were made on different people: compare runs on cohorts of one source"
            )
        if _held_out(record) != people:
            shared = len(_held_out(record) & people)
            raise UserError(
                f"{first_name} and {name} share {shared} of {len(people)} and {len(_held_out(record))} held-out "
                f"people: make the second with --splits-from {runs[0]}, so that both are judged on the same ones"
            )
    tables = [
        record.predictions[record.predictions["method"] == WINNER].assign(method=name)
        for name, record in records.items()
    ]
    baselines = [each.method for each in (first.task.voxels, first.task.floor) if each is not None]
    tables.append(first.predictions[first.predictions["method"].isin(baselines)])
    return Compared(records, pd.concat(tables, ignore_index=True), first.task)


def _held_out(record: RunRecord) -> set[str]:
    of_winner = record.predictions["method"] == WINNER
    return set(record.predictions.loc[of_winner & record.predictions["error"].notna(), "subject"])


def _cohort_of(record: RunRecord) -> str:
    """What tells the people of cohorts apart: the source from which it was made, of phantoms with their seed."""
    cohort = record.about.cohort
    if cohort is None:
        return ""
    return f"{cohort.source or cohort.hash}, seed {cohort.preprocessing.get('seed')}"


def compared_table(compared: Compared) -> pd.DataFrame:
    """One row per method: method, task, value, low, high, seeds, subjects."""
    rows = []
    for method in compared.methods:
        of_method = compared.predictions[compared.predictions["method"] == method]
        low, high = judged_interval(compared.predictions, method, compared.task)
        record = compared.records.get(method)
        rows.append(
            {
                "method": method,
                "task": ABSENT if record is None else record.task.name,
                "value": judged_value(compared.predictions, method, compared.task),
                "low": low,
                "high": high,
                "seeds": int(of_method["seed"].nunique()),
                "subjects": int(of_method["subject"].nunique()),
            }
        )
    return pd.DataFrame(rows)


def pairs(compared: Compared) -> list[Comparison]:
    """Every pair of methods, each interval wide enough for all of them together."""
    both = list(combinations(compared.methods, 2))
    found = (compare(compared.predictions, one, two, len(both), compared.task) for one, two in both)
    return [each for each in found if each is not None]


def write_compared(runs: Sequence[Path], out: Path) -> Path:
    """Write compare.csv, pairs.csv and compare.html into the folder `out`; returns the page."""
    compared = read_compared(runs)
    table = pd.DataFrame(
        [
            {
                "method": each.method, "other": each.other, "gain": each.gain, "low": each.low, "high": each.high,
                "subjects": each.n, "outcome": each.outcome,
            }
            for each in pairs(compared)
        ]
    )  # fmt: skip
    with writing_to(out):
        out.mkdir(parents=True, exist_ok=True)
        write_table(compared_table(compared), out / TABLE)
        write_table(table, out / PAIRS)
    return write_page(render(compared), out / PAGE, "page")


def render(compared: Compared) -> str:
    """The page as HTML text."""
    table = compared_table(compared)

    def figure(shown: Compared) -> Figure:
        if table["value"].isna().all():
            raise NothingToShow("no method has a value over all people")
        return methods_side_by_side(table, shown.task.judged_by.heading)

    return load_page("compare.html").render(
        headline=headline(compared),
        judged=compared.task.judged_by,
        rows=_shown(table),
        runs={name: record.folder.resolve() for name, record in compared.records.items()},
        commands={name: record.about.command for name, record in compared.records.items()},
        drawing=draw("compare", "Side by side", figure, compared, headline(compared)),
        pairs=[each.sentence() for each in pairs(compared)],
        synthetic=any(record.is_synthetic for record in compared.records.values()),
        looks={name: len(record.about.looks) for name, record in compared.records.items()},
    )


def headline(compared: Compared) -> str:
    """Every run with its value."""
    table, judged = compared_table(compared), compared.task.judged_by
    values = [f"{row['method']} {row['value']:.2f}" for row in table.to_dict(orient="records")]
    return (
        f"Held-out {judged.heading} over the same {count(compared.people, 'subject')}: {', '.join(values)}."
    )


def _shown(table: pd.DataFrame) -> list[dict[str, str]]:
    shown = []
    for row in table.to_dict(orient="records"):
        low, high = row["low"], row["high"]
        texts = {
            "value": ABSENT if row["value"] != row["value"] else f"{row['value']:.2f}",
            "interval": ABSENT if low != low else f"{low:.2f} to {high:.2f}",
        }
        shown.append({str(name): str(value) for name, value in row.items()} | texts)
    return shown


def print_compared(console: Console, runs: Sequence[Path]) -> None:
    """The table and the pairs, in the terminal."""
    compared = read_compared(runs)
    table = Table(
        "run",
        "task",
        compared.task.judged_by.heading,
        "95 % interval",
        "seeds",
        "subjects",
        box=None,
        padding=(0, 2),
    )
    for row in _shown(compared_table(compared)):
        table.add_row(*(row[name] for name in ("method", "task", "value", "interval", "seeds", "subjects")))
    console.print(table)
    for each in pairs(compared):
        console.print(f"  {each.sentence()}", markup=False)
