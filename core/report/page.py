"""The report of a run: one HTML file that works without network, scripts and other files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure

from core.report.answer.describe import describe, is_absent, number
from core.report.answer.explained import explained_in_words, has_maps
from core.report.answer.findings import (
    caveats,
    headline,
    importance_note,
    in_words,
    states,
    verdict_lines,
)
from core.report.answer.front import front_table
from core.report.answer.honesty import measured_again, schedule_line
from core.report.answer.importance import unassessed_settings
from core.report.answer.population import (
    FOLLOWED,
    course_texts,
    exchange_table,
    found_in_words,
    found_schedule,
    has_population,
)
from core.report.answer.record import NothingToShow, RunRecord, read_run
from core.report.answer.subjects import are_numbers, truths_in_words
from core.report.answer.tables import (
    ABSENT,
    failed_trials,
    holdout_table,
    leaderboard_of,
    mean_and_sd,
    winner_beside_published,
)
from core.report.figures import classes as class_figures
from core.report.figures import explained as explained_figure
from core.report.figures import features as feature_figures
from core.report.figures import overlap as overlap_figures
from core.report.figures import (
    population as population_figure,
)
from core.report.figures import (
    schedule as schedule_figure,
)
from core.report.figures import (
    search as figures,
)
from core.report.figures import (
    subjects as subject_figures,
)
from core.report.figures import (
    tissues as tissue_figures,
)
from core.report.figures.front import pareto_figure
from core.report.figures.style import as_svg
from core.report.html import load_page, write_page
from core.run_description import CodeVersion, CohortOfRun
from core.run_names import REPORT
from core.volumes.cohort.description import spacing_in_words

FIGURES: dict[str, tuple[str, Callable[[RunRecord], Figure]]] = {
    "gains": ("Does the winner predict better?", subject_figures.gains),
    "history": ("Every trial, in order", figures.optimisation_history),
    "importance": ("Which settings mattered", figures.parameter_importance),
    "curves": ("What the pruner saw", figures.learning_curves),
    "loss": ("The winner's training loss", figures.training_loss),
    "folds": ("Spread over folds and seeds", figures.fold_spread),
    "schedules": ("Over the course of training", schedule_figure.schedules),
    "people": ("Who is in the cohort, by site", subject_figures.cohort_people),
}
OF_PEOPLE: dict[str, tuple[str, Callable[[RunRecord], Figure]]] = {
    "predicted": ("Predicted against true {truth}", subject_figures.predicted_against_true),
    "gap": ("Brain-age gap by site", subject_figures.gap_by_site),
    "roc": ("How well people are ranked", class_figures.roc),
    "confusion": ("What people are taken for", class_figures.confusion_matrix),
    "reliability": ("How sure, and how often right", class_figures.reliability),
    "overlap": ("Overlap, class by class", overlap_figures.overlap_by_class),
    "volumes": ("Volumes and age", tissue_figures.volumes_against_age),
    "agreement": ("Do volumes agree?", overlap_figures.volume_agreement),
    "cases": ("The best, the median and the worst case", overlap_figures.cases_in_planes),
    "features": ("Features before the head, as colours", feature_figures.features_as_colours),
}
"""The figures of people and their predictions; a task names those that it has."""
CAPTIONS = {
    "predicted": "Each mark is a held-out subject: the mean prediction of the winner's refits, with a bar from the "
    "lowest to the highest. On the line, the prediction is right.",
    "gap": "Right of 0 the brain looks older than it is. Boxes: median and quartiles; whiskers to 1.5 interquartile "
    "ranges. Sites differ in age, so a difference between sites need not be the scanner's.",
    "roc": "Each step is a held-out subject, by the mean probability over the winner's refits. On the dashed line, "
    "people are ranked as by chance.",
    "confusion": "Numbers of held-out subjects. The diagonal is right.",
    "overlap": "Each mark is a held-out person: mean over refits of the winner. Boxes: median and quartiles. A class "
    "that is in neither map of a person is left out.",
    "cases": "Held-out people, by the winner's first refit: sagittal, coronal and axial slice through the largest part "
    "of the reference, which is the line; filled is what was predicted. Left is on the left.",
    "features": "Held-out people, by the winner's first refit. Colours: three principal components of the features of "
    "every voxel in the slice. Guided well, they change where clusters change. Left is on the left.",
    "volumes": "Marks: held-out people. Line: a cubic through what the winner predicts for them, volume by volume.",
    "agreement": "Each mark is a class of a held-out person. Lines: the mean difference of a class; dashed, 1.96 SDs "
    "around it (Bland and Altman).",
    "reliability": "Held-out subjects in groups of nearly equal size (their numbers beside the marks). Below the line, "
    "predictions are surer than they should be.",
}
OF_SEVERAL_OBJECTIVES: dict[str, tuple[str, Callable[[RunRecord], Figure]]] = {
    "front": ("Objectives against each other", pareto_figure),
}
OF_POPULATIONS: dict[str, tuple[str, Callable[[RunRecord], Figure]]] = {
    "population": ("Members, and who went on from whom", population_figure.population),
    "steps": ("What the schedule found follows", population_figure.steps),
}


EXPLAINED_BY: dict[str, tuple[str, Callable[[RunRecord], Figure]]] = {
    "explained": ("Where the winner looks", explained_figure.where_it_looks),
}
"""If `explain` was run."""

Record = TypeVar("Record")


@dataclass(frozen=True)
class Drawing:
    """A figure of the page: its SVG, or the reason why there is none."""

    title: str
    svg: Markup | None
    reason: str = ""


def write_report(run: Path) -> Path:
    """Write `run`/report.html from whatever files the sweep in the folder `run` wrote; return its path.

    Raises:
        UserError: `run` is not the folder of a sweep, or the page cannot be written there.
    """
    run = Path(run)
    page = render(read_run(run))
    return write_page(page, run / REPORT, "report")


def render(record: RunRecord) -> str:
    """The report as HTML text."""
    failed = failed_trials(record.trials, record.task)
    results = holdout_table(record.holdout, record.predictions, record.task)
    return load_page("report.html").render(
        name=record.folder.resolve().name,
        about=record.about,
        synthetic=record.is_synthetic,
        headline=headline(record),
        verdict=verdict_lines(record),
        missing=record.missing,
        states=states(record),
        best=record.best,
        published=record.published,
        what=_winner_in_words(record),
        leaderboard=_rows(leaderboard_of(record)),
        population=_population(record) if has_population(record) else None,
        holdout=_rows(results),
        headings=_headings(record),
        judged=record.judged_by,
        task=record.task,
        people=[name for name in record.task.figures if name in OF_PEOPLE],
        captions=CAPTIONS,
        again=_rows(measured_again(record)) if record.best is not None else [],
        front=_rows(front_table(record)),
        value_label=record.value_label,
        value_title=record.value_title,
        beside=_rows(winner_beside_published(record)),
        winner_cells=_winner_cells(record),
        failed=_rows(failed),
        drawings=draw_all(record),
        explained=explained_in_words(record) if has_maps(record) else "",
        unassessed=unassessed_settings(record),
        importance=importance_note(record),
        cohort_facts=cohort_facts(record),
        sweep_facts=sweep_facts(record),
        roles=_roles(record),
        versions=_pairs(dict(record.about.versions)),
        caveats=caveats(record),
        settings=json.dumps(record.about.settings, indent=2, ensure_ascii=False),
        winner_settings=json.dumps(record.winner, indent=2, ensure_ascii=False) if record.winner else "",
    )


def draw_all(record: RunRecord) -> dict[str, Drawing]:
    """Every figure of the page by name; a figure that cannot be drawn has its reason instead."""
    words = in_words(record)
    drawn = (
        FIGURES | figures_of_people(record) | (OF_SEVERAL_OBJECTIVES if len(record.objectives) > 1 else {})
    )
    drawn |= OF_POPULATIONS if has_population(record) else {}
    drawn |= EXPLAINED_BY if has_maps(record) else {}
    return {name: draw(name, title, figure, record, words[name]) for name, (title, figure) in drawn.items()}


def figures_of_people(record: RunRecord) -> dict[str, tuple[str, Callable[[RunRecord], Figure]]]:
    """The figures that the task of a run has of people and their predictions, with their titles."""
    named = (name for name in record.task.figures if name in OF_PEOPLE)
    return {name: (OF_PEOPLE[name][0].format(truth=record.task.truth), OF_PEOPLE[name][1]) for name in named}


def draw(name: str, title: str, figure: Callable[[Record], Figure], record: Record, words: str) -> Drawing:
    """The figure of a record, whose content `words` tell people who cannot see it."""
    try:
        return Drawing(title, Markup(as_svg(figure(record), name, f"{title}. {words}")))
    except NothingToShow as reason:
        return Drawing(title, None, str(reason))


def _winner_in_words(record: RunRecord) -> str:
    if record.best is None:
        return ""
    found = found_schedule(record)
    if found is not None and found.trial == record.best:
        return found_in_words(record)
    row = record.trial(record.best)
    return describe({name: row[name] for name in record.searched()})


def _population(record: RunRecord) -> dict[str, object]:
    """What the page says about a population: the schedule found, how far to trust it, and every exchange."""
    found = found_schedule(record)
    return {
        "found": found,
        "courses": {FOLLOWED[name]: text for name, text in course_texts(found).items()} if found else {},
        "chosen": schedule_line(record),
        "exchanges": _rows(exchange_table(record)),
    }


def cohort_facts(record: RunRecord) -> list[tuple[str, str]]:
    """Facts about the cohort of the run, as (name, value) pairs."""
    cohort = record.about.cohort or CohortOfRun()
    facts: dict[str, object] = {
        "Cohort": cohort.name,
        "Subjects": record.cohort["subject"].nunique() or None,
        "Scans": cohort.n,
        "Channels": _joined(cohort.channels, ", "),
        "Grid": _joined(cohort.shape, " × "),
        "Spacing": spacing_in_words(cohort.spacing) if cohort.spacing else None,
        "Source": cohort.source,
        "Folder": cohort.path,
        "Hash": cohort.hash,
    }
    truths, task = record.cohort["truth"], record.task
    title = f"{task.truth[:1].upper()}{task.truth[1:]}"
    told = truths_in_words(truths, task.truth_unit, digits=1)
    if told and are_numbers(truths):
        told += f", median {truths.median():.1f}"
    facts[f"{title}s" if are_numbers(truths) else title] = told
    return _pairs(facts)


def sweep_facts(record: RunRecord) -> list[tuple[str, str]]:
    """Facts about how the run was made, as (name, value) pairs."""
    about, sweep, holdout = record.about, record.about.sweep, record.about.sweep.get("holdout")
    code = about.code or CodeVersion()
    changed = ", with uncommitted changes" if code.dirty else ""
    facts: dict[str, object] = {
        "Started": about.created,
        "Finished": about.finished or ("not finished" if about.created else None),
        "Took": _duration(about.seconds),
        "Code": f"{code.commit}{changed}" if code.commit else None,
        "Task": record.task.name,
        "Search space": sweep.get("space"),
        "Trials": sweep.get("trials"),
        "Trials of the baseline": sweep.get("baseline_trials") or None,
        "Folds": sweep.get("folds"),
        "Seeds": _joined(sweep.get("seeds"), ", "),
        "Refit seeds": sweep.get("refit_seeds"),
        "Search seed": sweep.get("search_seed"),
        "Objectives": _joined(sweep.get("objectives"), ", "),
        "Ended early": about.ended,
        "Sampler": sweep.get("sampler"),
        "Scheduler": sweep.get("scheduler"),
        "Pruner": sweep.get("pruner"),
        "Held out": f"{100 * holdout:.0f} % of subjects" if isinstance(holdout, float) else None,
        "Slots": sweep.get("slots"),
        "Workers per slot": sweep.get("workers_per_slot"),
        "Time budget": _duration(sweep.get("time_budget")),
        "Accelerator-hours": sweep.get("accelerator_hours"),
        "Stop when unlikely": sweep.get("stop_when"),
    }
    return _pairs(facts)


def _pairs(facts: dict[str, object]) -> list[tuple[str, str]]:
    return [(name, str(value)) for name, value in facts.items() if value is not None and value != ""]


def _joined(values: object, by: str) -> object:
    return by.join(map(str, values)) if isinstance(values, list | tuple) else values


def _duration(seconds: object) -> str | None:
    if not isinstance(seconds, int | float):
        return None
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _headings(record: RunRecord) -> dict[str, str]:
    """The headings of the columns of the table of results, by column; the first metric has its unit there."""
    titles = [record.task.metrics[name] for name in record.task.shown]
    return {metric.title: metric.heading for metric in titles}


def _roles(record: RunRecord) -> list[dict[str, str]]:
    """Subjects and what is known of them in every role, one row per role."""
    numbers, unit = are_numbers(record.cohort["truth"]), record.task.truth_unit
    of_subject = record.cohort.groupby("subject")["truth"].agg("mean" if numbers else "first").reset_index()
    people = record.splits.drop_duplicates("subject").merge(of_subject, on="subject", how="left")
    rows = []
    for role, group in sorted(people.groupby("role"), key=lambda item: (item[0] == "holdout", item[0])):
        known = group["truth"].dropna()
        row = {
            "role": "held out" if role == "holdout" else str(role),
            "subjects": str(len(group)),
            "span": truths_in_words(group["truth"], unit) or ABSENT,
        }
        if numbers:
            row["median"] = f"{known.median():.1f}" if len(known) else ABSENT
        rows.append(row)
    return rows


def _winner_cells(record: RunRecord) -> dict[str, object]:
    """Scores of the best trial in every cell, beside those of what predicts without images on the same subjects."""
    cells = record.cells[record.cells["number"] == record.best].sort_values(["fold", "seed"])
    task = record.task
    columns = {name: task.metrics[name].title for name in task.shown if not cells[name].isna().all()}
    if task.floor is not None:
        columns[task.floor.metric] = task.floor.method
    rows = [
        {
            "fold": number(row["fold"]),
            "seed": number(row["seed"]),
            "n": ABSENT if is_absent(row["n"]) else number(row["n"]),
            "values": [mean_and_sd(row[name], float("nan")) for name in columns],
        }
        for row in cells.to_dict(orient="records")
    ]
    return {"headings": list(columns.values()), "rows": rows}


def _rows(table: pd.DataFrame) -> list[dict[str, object]]:
    return [{str(name): value for name, value in row.items()} for row in table.to_dict(orient="records")]
