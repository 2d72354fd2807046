"""The findings of a run in sentences: the answer, its limits, and each figure in words."""

from __future__ import annotations

import pandas as pd

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
from core.report.answer.population import has_population, is_member, population_in_words, steps_in_words
from core.report.answer.record import NothingToShow, RunRecord
from core.report.answer.subjects import held_out
from core.report.answer.tables import count, mean_and_sd
from core.report.answer.verdict import after_a_look, beating_the_median, comparisons, verdict
from core.run_names import MEDIAN, WINNER


def headline(record: RunRecord) -> str:
    """The result in one sentence: on held-out subjects, or the best of the search, or why there is no result."""
    winner = record.holdout[record.holdout["method"] == WINNER]
    if not winner.empty:
        return _held_out_headline(record, winner)
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


def _held_out_headline(record: RunRecord, winner: pd.DataFrame) -> str:
    error = mean_and_sd(winner["mae"].mean(), winner["mae"].std())
    subjects = winner["n_holdout"].max()
    n = "" if pd.isna(subjects) else f"n = {count(subjects, 'subject')}, "
    median = record.holdout.loc[record.holdout["method"] == MEDIAN, "mae"].mean()
    floor = "" if pd.isna(median) else f"; predicting the training median: {median:.2f}"
    return f"Held-out MAE of the search winner: {error} years ({n}{count(len(winner), 'seed')}){floor}."


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
    lines = [verdict(record.predictions), *(each.sentence() for each in comparisons(record.predictions))]
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
        _no_signal(record),
        _few_subjects(record),
        _winners_curse(record),
        schedule_line(record),
        _one_look(record),
        _single_refit(record),
        _ages(record),
        _sites(record),
        _cells(record),
        _pruning(record),
        *change_lines(record),
        "Predicted ages are drawn to the middle: if the prediction is imperfect, young people look older and old "
        "people younger. Without a correction for this, a brain-age gap is not a finding about a person; "
        "`predict` and `evaluate` give corrected gaps, too.",
    ]
    return [line for line in lines if line]


def _synthetic(record: RunRecord) -> str:
    if not record.is_synthetic:
        return ""
    return (
        "These brains are synthetic. Their age effects follow a known recipe, so the errors show whether the "
        "software works, and say nothing about real people."
    )


def _no_signal(record: RunRecord) -> str:
    if beating_the_median(record.predictions) != []:
        return ""
    return (
        "No method is shown to beat predicting the training median: age has not been found in these images."
    )


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
    winner = record.holdout.loc[record.holdout["method"] == WINNER, "mae"]
    if winner.empty:
        return line
    return f"{line} Its held-out MAE is {mean_and_sd(winner.mean(), winner.std())} years."


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
            f"The ± behind held-out errors is the SD over {refits} refits with other seeds, on the same "
            "subjects: it is not the uncertainty for new people."
        )
    return ""


def _ages(record: RunRecord) -> str:
    ages = record.cohort["age"].dropna()
    if ages.empty:
        return ""
    return f"Ages run from {ages.min():.0f} to {ages.max():.0f} years: nothing here holds outside that range."


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
    cells = record.cells.loc[record.cells["number"] == record.best, "mae"]
    pruned = _pruned(record)
    trials = count(len(record.trials), "trial")
    return {
        "front": front_in_words(record) if len(record.objectives) > 1 else "",
        "history": f"{record.value_title} of every trial in order: {states(record)}{span}.",
        "importance": _importance_in_words(record),
        "curves": f"{record.value_title} of {trials} against epochs; {pruned} were pruned.",
        "loss": f"Training loss of the winner in {count(len(cells), 'cell')} against progress.",
        "folds": f"MAE per cell of the leading trials; best: {mean_and_sd(cells.mean(), cells.std())} years.",
        "gains": " ".join(each.sentence() for each in comparisons(record.predictions)),
        "predicted": _predictions_in_words(record),
        "gap": _gaps_in_words(record),
        "schedules": "Learning rate, temperature, width and neighbours of the winner against progress.",
        "ages": _ages_in_words(record),
        "population": population_in_words(record) if has_population(record) else "",
        "steps": steps_in_words(record) if has_population(record) else "",
    }


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
    return (
        f"Predicted against true age of {count(len(subjects), 'held-out subject')}. Mean absolute error of "
        f"their mean predictions {error:.2f} years; mean gap {gaps} years."
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


def _ages_in_words(record: RunRecord) -> str:
    sites = record.cohort.groupby("site")["age"].agg(["count", "min", "max"])
    rows = (
        f"{site or 'no site'} {row['count']:.0f} ({row['min']:.0f} to {row['max']:.0f})"
        for site, row in sites.iterrows()
    )
    return f"Subjects and ages in years by site: {', '.join(rows)}."
