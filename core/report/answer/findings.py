"""The findings of a run in sentences: the answer, its limits, and each figure in words."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from core.report.answer.classes import confusion_in_words, reliability_in_words, roc_in_words
from core.report.answer.explained import explained_in_words, has_maps
from core.report.answer.features import features_in_words
from core.report.answer.front import front_in_words
from core.report.answer.honesty import (
    access_line,
    change_lines,
    looks_in_words,
    optimism,
    schedule_line,
    tuning_line,
)
from core.report.answer.importance import importances_of
from core.report.answer.overlap import agreement_in_words, cases_in_words, overlap_in_words
from core.report.answer.population import has_population, is_member, population_in_words, steps_in_words
from core.report.answer.record import NothingToShow, RunRecord
from core.report.answer.subjects import are_numbers, held_out, truths_in_words
from core.report.answer.tables import count, mean_and_sd
from core.report.answer.tissues import volumes_in_words
from core.report.answer.verdict import after_a_look, beating_the_floor, comparisons, verdict
from core.run_names import WINNER


def headline(record: RunRecord) -> str:
    """The result in one sentence: on held-out subjects, or the best of the search, or why there is no result."""
    if (record.holdout["method"] == WINNER).any():
        return _held_out_headline(record)
    if record.best is not None:
        best = record.trial(record.best)
        value = mean_and_sd(best["value"], best["sd"])
        cells = "" if pd.isna(best["n"]) else f", {count(best['n'], 'cell')}"
        return (
            "No held-out result yet. "
            f"Best {record.objective.words} so far: {record.objective.amount(value)} "
            f"(trial {record.best}{cells}). It is optimistic, because the search chose it."
        )
    return f"No trial was completed, so nothing can be said about accuracy ({states(record)})."


def _held_out_headline(record: RunRecord) -> str:
    judged, of_winner = record.judged_by, record.holdout["method"] == WINNER
    values, subjects = (
        record.held_out_values.loc[of_winner, "value"],
        record.holdout.loc[of_winner, "n_holdout"].max(),
    )
    n = "" if pd.isna(subjects) else f"n = {count(subjects, 'subject')}, "
    value = judged.amount(mean_and_sd(values.mean(), values.std()))
    refits = f"{n}{count(len(values), 'seed')}"
    return f"Held-out {judged.title} of the search winner: {value} ({refits}){_of_floor(record)}."


def _of_floor(record: RunRecord) -> str:
    """What predicting without images reaches: `; predicting the training median: 14.01`."""
    floor = record.task.floor
    if floor is None:
        return ""
    value = record.held_out_values.loc[record.holdout["method"] == floor.method, "value"].mean()
    return "" if pd.isna(value) else f"; {floor.words}: {value:.2f}"


def states(record: RunRecord) -> str:
    """The number of trials by the way they ended: `12 completed, 9 pruned, 3 failed`."""
    words = {
        "COMPLETE": "completed",
        "PRUNED": "pruned",
        "member": "evolved in one cell",
        "FAIL": "failed",
        "RUNNING": "unfinished",
    }
    counts = record.trials["state"].mask(is_member(record.trials), "member").value_counts()
    return (
        ", ".join(f"{counts[state]} {word}" for state, word in words.items() if state in counts)
        or "no trials"
    )


def verdict_lines(record: RunRecord) -> list[str]:
    """The verdict on the winner, then each comparison with its numbers; empty if the hold-out was not used yet."""
    if record.holdout.empty:
        return []
    made = comparisons(record.predictions, record.task)
    lines = [verdict(record.predictions, record.task), *(each.sentence() for each in made)]
    if record.best is not None and record.best == record.published:
        lines.insert(1, _published_wins(record))
    if looked := after_a_look(record.about.looks):
        lines.insert(1, looked)
    return lines


def _published_wins(record: RunRecord) -> str:
    states = record.trials["state"]
    if (states == "COMPLETE").sum() == 1:
        pruned = int((states == "PRUNED").sum())
        if pruned:
            return (
                f"Only the published configuration was completed: it is the winner. {count(pruned, 'other trial')} "
                "stopped early, because others were ahead by then."
            )
        return "Only the published configuration was completed: it is the winner, because nothing was compared with it."
    return "The search found nothing better than the published configuration, which is its winner."


def caveats(record: RunRecord) -> list[str]:
    """What the numbers of this run do not show; the most serious caveat first."""
    lines = [
        _synthetic(record),
        *(check.in_words() for check in record.about.leaks),
        _no_signal(record),
        _few_subjects(record),
        _winners_curse(record),
        schedule_line(record),
        _one_look(record),
        _single_refit(record),
        _range(record),
        _sites(record),
        _cells(record),
        _pruning(record),
        *change_lines(record),
        *record.task.caveats,
    ]
    return [line for line in lines if line]


def _synthetic(record: RunRecord) -> str:
    if not record.is_synthetic:
        return ""
    return (
        f"These brains are synthetic. What {record.task.truth} does to them follows a known recipe, so the errors show "
        "whether the software works, and say nothing about real people."
    )


def _no_signal(record: RunRecord) -> str:
    task = record.task
    if task.floor is None or beating_the_floor(record.predictions, task) != []:
        return ""
    return f"No method is shown to beat {task.floor.words}: {task.nothing_found}."


def _few_subjects(record: RunRecord) -> str:
    subjects = record.predictions["subject"].nunique() or record.holdout["n_holdout"].max()
    if not subjects or pd.isna(subjects):
        return ""
    return (
        f"{count(subjects, 'held-out subject')}: a few other people in the hold-out would move every number "
        "here. The intervals resample these subjects: they do not cover people who differ from them. Intervals of "
        "gains are corrected for the number of comparisons with the winner. "
        f"{tuning_line(record)}"
    )


def _winners_curse(record: RunRecord) -> str:
    if record.best is None:
        return ""
    best = record.trial(record.best)
    completed = int((record.trials["state"] == "COMPLETE").sum())
    value = mean_and_sd(best["value"], best["sd"])
    line = (
        f"The winner is the best of {count(completed, 'completed trial')}, and the best of many is partly "
        f"luck: its {record.objective.words} ({record.objective.amount(value)}) is optimistic."
    )
    line = " ".join(filter(None, [line, optimism(record)]))
    values, judged = record.held_out_values.loc[record.holdout["method"] == WINNER, "value"], record.judged_by
    if values.empty:
        return line
    return f"{line} Its held-out {judged.title} is {judged.amount(mean_and_sd(values.mean(), values.std()))}."


def _one_look(record: RunRecord) -> str:
    if record.holdout.empty:
        return "The held-out subjects have not been used: no number here is an estimate for new people."
    return (
        f"The held-out subjects were looked at {looks_in_words(record)}. {access_line(record)} "
        "If you change something because of this page and run again, you have tuned on them."
    )


def _single_refit(record: RunRecord) -> str:
    refits = int((record.holdout["method"] == WINNER).sum())
    if refits == 1:
        return "The winner was refitted with a single seed: it is unknown how much the result depends on the seed."
    if refits:
        return (
            f"The ± behind held-out values is the SD over {refits} refits with other seeds, on the same "
            "subjects: it is not the uncertainty for new people."
        )
    return ""


def _range(record: RunRecord) -> str:
    truths, task = record.cohort["truth"].dropna(), record.task
    if truths.empty or not are_numbers(truths):
        return ""
    span = truths_in_words(truths, task.truth_unit)
    return (
        f"{task.truth[:1].upper()}{task.truth[1:]}s run from {span}: nothing here holds outside that range."
    )


def _sites(record: RunRecord) -> str:
    sites = record.cohort["site"].replace("", float("nan")).nunique()
    if sites == 1:
        return "All subjects come from one site: the error on another scanner is unknown."
    if sites > 1:
        return (
            f"The held-out subjects come from the same {sites} sites as the training subjects: another "
            "scanner may do worse."
        )
    return ""


def _cells(record: RunRecord) -> str:
    if record.cells.empty:
        return ""
    return (
        "The ± behind validation errors is the SD over (fold, seed) cells. Cells share training subjects, so "
        "they are not independent, and the SD is not a standard error."
    )


def _pruning(record: RunRecord) -> str:
    pruned = _pruned(record)
    if not pruned:
        return ""
    return (
        f"{count(pruned, 'trial')} stopped early were judged by their first epochs, which favours "
        "configurations that learn fast."
    )


def _pruned(record: RunRecord) -> int:
    """The number of trials that were stopped early, without members of a population: they always end after one cell."""
    return int(((record.trials["state"] == "PRUNED") & ~is_member(record.trials)).sum())


def importance_note(record: RunRecord) -> str:
    """How to read the importance of settings, and whether it can be trusted."""
    completed = int((record.trials["state"] == "COMPLETE").sum())
    settings = len(record.searched())
    trials = count(completed, "completed trial")
    note = f"Share of the variation between {trials} that each setting explains (fANOVA)."
    if completed < 2 * settings:
        return f"{note} That is too few trials for {settings} settings: do not trust the order."
    return note


def in_words(record: RunRecord) -> dict[str, str]:
    """The content of every figure in a sentence with its numbers, for people who cannot see it."""
    values = record.trials.loc[record.trials["state"] == "COMPLETE", "value"].dropna()
    span = f", from {values.min():.2f} to {values.max():.2f}" if len(values) else ""
    judged = record.judged_by
    cells = record.cells.loc[record.cells["number"] == record.best, record.task.shown[0]]
    best = judged.amount(mean_and_sd(cells.mean(), cells.std()))
    pruned = _pruned(record)
    trials = count(len(record.trials), "trial")
    return {
        "front": front_in_words(record) if len(record.objectives) > 1 else "",
        "history": f"{record.value_title} of every trial in order: {states(record)}{span}.",
        "importance": _importance_in_words(record),
        "curves": f"{record.value_title} of {trials} against epochs; {pruned} were pruned.",
        "loss": f"Training loss of the winner in {count(len(cells), 'cell')} against progress.",
        "folds": f"{judged.title} per cell of the leading trials; best: {best}.",
        "gains": " ".join(each.sentence() for each in comparisons(record.predictions, record.task)),
        **{name: words(record) for name, words in OF_PEOPLE.items() if name in record.task.figures},
        "schedules": f"{_listed(['Learning rate', *record.task.course])} of the winner against progress.",
        "people": _people_in_words(record),
        "population": population_in_words(record) if has_population(record) else "",
        "steps": steps_in_words(record) if has_population(record) else "",
        "explained": explained_in_words(record) if has_maps(record) else "",
    }


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _importance_in_words(record: RunRecord) -> str:
    try:
        found = importances_of(record)
    except NothingToShow as reason:
        return str(reason)
    return (
        "Importance of settings: " + ", ".join(f"{name} {value:.2f}" for name, value in found.items()) + "."
    )


def _predictions_in_words(record: RunRecord) -> str:
    try:
        subjects = held_out(record)
    except NothingToShow as reason:
        return str(reason)
    error, gaps = subjects["gap"].abs().mean(), mean_and_sd(subjects["gap"].mean(), subjects["gap"].std())
    truth, unit = record.task.truth, record.task.truth_unit
    return (
        f"Predicted against true {truth} of {count(len(subjects), 'held-out subject')}. Mean absolute error of "
        f"their mean predictions {error:.2f} {unit}; mean gap {gaps} {unit}."
    )


def _gaps_in_words(record: RunRecord) -> str:
    try:
        subjects = held_out(record)
    except NothingToShow as reason:
        return str(reason)
    means = (
        f"{site} {mean_and_sd(group['gap'].mean(), group['gap'].std())} (n = {len(group)})"
        for site, group in subjects.groupby("site")
    )
    return f"Mean brain-age gap in years by site: {', '.join(means)}."


def _people_in_words(record: RunRecord) -> str:
    unit = record.task.truth_unit
    rows = (
        f"{str(site) or 'no site'} {len(group)} ({truths_in_words(group['truth'], unit)})"
        for site, group in record.cohort.groupby("site")
    )
    return f"Scans and {record.task.truth} by site: {', '.join(rows)}."


OF_PEOPLE: dict[str, Callable[[RunRecord], str]] = {
    "predicted": _predictions_in_words,
    "gap": _gaps_in_words,
    "roc": roc_in_words,
    "confusion": confusion_in_words,
    "reliability": reliability_in_words,
    "overlap": overlap_in_words,
    "cases": cases_in_words,
    "features": features_in_words,
    "volumes": volumes_in_words,
    "agreement": agreement_in_words,
}
"""The figures of people and their predictions, in words; a task names those that it has."""
