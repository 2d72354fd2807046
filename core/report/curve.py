"""The result of a curve: one table, one figure and one page for the budgets of `sweep --labelled`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from core.errors import UserError
from core.evaluation import Floats
from core.files.tables import write_table
from core.files.writing import writing_to
from core.report.answer.describe import describe
from core.report.answer.record import NothingToShow, RunRecord, read_run
from core.report.answer.saving import savings
from core.report.answer.tables import ABSENT, count
from core.report.answer.verdict import compare, errors_of, judged_interval, judged_value
from core.report.figures.curve import label_curve
from core.report.html import load_page, write_page
from core.report.page import draw
from core.run_description import RunDescription
from core.run_names import CURVE, REPORT, RUN_JSON, WEIGHTS, WINNER
from core.task_description import TaskDescription


@dataclass(frozen=True)
class Budget:
    """One budget of labels, and the sweep with it."""

    asked: str
    labelled: int
    """People that the refits train on with their label."""
    record: RunRecord

    @property
    def predictions(self) -> pd.DataFrame:
        """Of the sweep."""
        return self.record.predictions


@dataclass(frozen=True)
class Curve:
    """The sweeps of a curve that have a result, by rising budgets."""

    folder: Path
    about: RunDescription
    budgets: tuple[Budget, ...]
    missing: tuple[str, ...]
    """Why others have no part in it."""

    @property
    def task(self) -> TaskDescription:
        """The task of the sweeps in words."""
        return self.budgets[0].record.task

    @property
    def trained(self) -> list[str]:
        """The methods that are searched at every budget: the best of every start; the first one is from scratch."""
        starts = sorted(self.task.starts, key=lambda start: start.changes[WEIGHTS] is not None)
        return [start.method for start in starts] or [WINNER]


def read_curve(run: Path) -> Curve:
    """The curve in folder `run`.

    Raises:
        UserError: there is none, or none of its sweeps has a result yet.
    """
    try:
        about = RunDescription.model_validate_json((run / RUN_JSON).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{run / RUN_JSON} cannot be read: {error}") from None
    asked = about.sweep.get("labelled")
    if about.kind != CURVE or not isinstance(asked, list):
        raise UserError(f"{run} is no curve: --labelled makes one")
    budgets, missing = [], []
    for text in map(str, asked):
        folder = run / f"labelled-{text}"
        record = read_run(folder) if (folder / RUN_JSON).exists() else None
        if record is None or not (record.predictions["method"] == WINNER).any():
            why = "it has not begun" if record is None else "it has no result on the held-out people"
            missing.append(f"No point for {text} labelled: {why}.")
            continue
        budgets.append(Budget(text, int(record.holdout["n_train"].max()), record))
    if not budgets:
        raise UserError(f"no budget of {run} has a result yet; continue it with `brainsweep resume {run}`")
    return Curve(run, about, tuple(sorted(budgets, key=lambda each: each.labelled)), tuple(missing))


def curve_table(curve: Curve) -> pd.DataFrame:
    """One row per budget and method: asked, labelled, method, value, low, high, seeds, subjects, what (settings)."""
    rows, task = [], curve.task
    shown = [*curve.trained, *(each.method for each in (task.voxels, task.floor) if each is not None)]
    for budget in curve.budgets:
        for method in shown:
            of_method = budget.predictions[budget.predictions["method"] == method]
            if of_method.empty:
                continue
            low, high = judged_interval(budget.predictions, method, task)
            rows.append(
                {
                    "asked": budget.asked, "labelled": budget.labelled, "method": method,
                    "value": judged_value(budget.predictions, method, task), "low": low, "high": high,
                    "seeds": of_method["seed"].nunique(), "subjects": of_method["subject"].nunique(),
                    "what": _settings_of(budget, method),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def _settings_of(budget: Budget, method: str) -> str:
    """The configuration of the best of a start, in a few words."""
    record = budget.record
    start = next((each for each in record.task.starts if each.method == method), None)
    trials = record.trials[(record.trials["state"] == "COMPLETE") & record.trials["value"].notna()]
    if "outside" in trials:
        trials = trials[~trials["outside"].fillna(False).astype(bool)]
    if start is not None:
        given = trials[WEIGHTS] if WEIGHTS in trials else pd.Series(dtype=object)
        wanted = start.changes[WEIGHTS]
        trials = trials[given.isna() if wanted is None else given == wanted]
    elif method != WINNER:
        return ""
    if trials.empty:
        return ABSENT
    best = trials.sort_values(["value", "number"], ascending=[record.objective.better == "low", True]).iloc[0]
    return describe({name: best[name] for name in record.searched() if name != WEIGHTS})


def lines(curve: Curve) -> list[str]:
    """At every budget each start against training from scratch, in pairs; then the labels that it saves."""
    others = curve.trained[1:]
    said = list(curve.missing)
    said += [
        f"No point for the {method} with {budget.labelled} labelled: it has no completed trial, or its refit failed."
        for budget in curve.budgets
        for method in curve.trained
        if not (budget.predictions["method"] == method).any()
    ]
    if not others:
        said.append(
            "Every budget has people and a search of its own; see its page for what its winner beats."
        )
    reference, family = curve.trained[0], len(others) * len(curve.budgets)
    for method in others:
        made = []
        for budget in curve.budgets:
            each = compare(budget.predictions, method, reference, family, curve.task)
            if each is not None:
                made.append(f"{budget.labelled} labelled: {each.sentence()}")
        said += made
        said += _savings_in_words(curve, method, reference)
    return said


def _savings_in_words(curve: Curve, method: str, reference: str) -> list[str]:
    """What a start saves at every budget; [] with fewer than two budgets."""
    both = {budget.labelled: errors_of(budget.predictions) for budget in curve.budgets}
    both = {labelled: table for labelled, table in both.items() if {method, reference} <= set(table)}
    if len(both) < 2:
        return []
    errors = list(both.values())
    people = sorted(set.intersection(*(set(table[[method, reference]].dropna().index) for table in errors)))

    def of(name: str) -> Floats:
        return np.stack([table.loc[people, name].to_numpy(float) for table in errors])

    found = savings(list(both), of(method), of(reference), len(curve.trained) - 1)
    words = curve.task.in_words
    return [each.sentence(words[method], words[reference]) for each in found]


def headline(curve: Curve) -> str:
    """What few and many labels give from every start."""
    table, judged = curve_table(curve), curve.task.judged_by
    parts = []
    for method in curve.trained:
        points = table[table["method"] == method]
        both = zip(points["labelled"], points["value"], strict=True)
        values = ", ".join(f"{value:.2f} with {labelled}" for labelled, value in both)
        if values:
            parts.append(f"{curve.task.in_words.get(method, method)}: {values}")
    return f"Held-out {judged.heading} by labelled people. {'; '.join(part[:1].upper() + part[1:] for part in parts)}."


def caveats(curve: Curve) -> list[str]:
    """What these numbers do not show."""
    made = [
        "Every budget has a search of its own: trials are compared, and the winner is chosen, on the folds of the "
        "labelled people; the held-out people are the same for all.",
        "Which people are labelled is drawn anew with every seed of a refit, balanced as the folds are; of one seed a "
        "smaller budget is a part of a larger one. Intervals resample held-out people, not the choice of the labelled.",
        "The judging folds of a search have all their labels, whatever the budget: with few labels a real search would "
        "choose less well.",
    ]
    made[:0] = dict.fromkeys(
        check.in_words() for budget in curve.budgets for check in budget.record.about.leaks
    )
    if curve.budgets[0].record.is_synthetic:
        made.insert(0, "These brains are synthetic: the errors say nothing about real people.")
    return made


def write_curve(run: Path) -> Path:
    """Write curve.csv and report.html of a curve; returns the page."""
    curve = read_curve(run)
    with writing_to(run):
        write_table(curve_table(curve), run / "curve.csv")
    return write_page(render(curve), run / REPORT, "report")


def render(curve: Curve) -> str:
    """The page as HTML text."""
    table = curve_table(curve)

    def figure(shown: Curve) -> Figure:
        if len(shown.budgets) < 2:
            raise NothingToShow("one budget is no curve")
        return label_curve(table, shown.trained, shown.task.judged_by.heading)

    return load_page("curve.html").render(
        name=curve.folder.resolve().name,
        headline=headline(curve),
        lines=lines(curve),
        judged=curve.task.judged_by,
        rows=_shown(table),
        drawing=draw("curve", "What labels bring", figure, curve, headline(curve)),
        caveats=caveats(curve),
        command=curve.about.command,
    )


def _shown(table: pd.DataFrame) -> list[dict[str, str]]:
    """The rows as texts."""
    shown = []
    for row in table.to_dict(orient="records"):
        low, high = row["low"], row["high"]
        numbers = {
            "value": f"{row['value']:.2f}",
            "interval": ABSENT if low != low else f"{low:.2f} to {high:.2f}",
        }
        shown.append({str(name): str(value) for name, value in row.items()} | numbers)
    return shown


def print_curve(console: Console, run: Path) -> None:
    """The table of budgets and what follows, in the terminal."""
    curve = read_curve(run)
    judged = curve.task.judged_by
    table = Table("labelled", "method", judged.heading, "95 % interval", "seeds", box=None, padding=(0, 2))
    made = curve_table(curve)
    for row in _shown(made):
        table.add_row(*(row[name] for name in ("labelled", "method", "value", "interval", "seeds")))
    people = count(int(made["subjects"].max()), "held-out subject")
    console.print(f"\nWhat labels bring ({people})", style="bold", highlight=False)
    console.print(table)
    for line in lines(curve):
        console.print(f"  {line}", markup=False)
