"""Checks of a search: the winner is measured again, when each subject was read, and how the search was changed."""

from __future__ import annotations

from typing import Any

import pandas as pd

from core.objectives import Metrics, measure
from core.report.answer.population import found_schedule, is_member
from core.report.answer.record import RunRecord
from core.report.answer.tables import ABSENT, count, ended, mean_and_sd
from core.run_access import in_words
from core.run_names import PUBLISHED, WINNER


def measured_again(record: RunRecord) -> pd.DataFrame:
    """The winner and the published configuration in the search, on its folds with fresh seeds, and refitted.

    The value that made a trial the winner is partly luck (the winner's curse); the other values did not influence the
    choice. Columns: measured (where), and one per configuration as mean ± SD with n. A row without measurements is left
    out.
    """
    in_search = {WINNER: record.best, PUBLISHED: record.published}
    rows: list[dict[str, Any]] = [
        {"measured": f"in the search, {record.value_label}"}
        | {method: _trial_value(record, number) for method, number in in_search.items()}
    ]
    repeated = _repeated(record)
    if repeated:
        if record.best == record.published and WINNER in repeated:
            repeated[PUBLISHED] = repeated[WINNER]
        rows.append({"measured": f"same folds, fresh seeds, {record.value_label}"} | repeated)
    refits = {
        method: _spread(record.held_out_values.loc[record.holdout["method"] == method, "value"])
        for method in (WINNER, PUBLISHED)
    }
    if any(value != ABSENT for value in refits.values()):
        rows.append({"measured": f"refitted with fresh seeds, held-out {record.judged_by.heading}"} | refits)
    return pd.DataFrame(rows, columns=["measured", WINNER, PUBLISHED]).fillna(ABSENT)


def optimism(record: RunRecord) -> str:
    """In one sentence, how much the value of the winner changed when it was measured again; empty if it was not."""
    if record.best is None:
        return ""
    again = _repeated_values(record, WINNER)
    if again.empty:
        return ""
    value = float(record.trial(record.best)["value"])
    change = again.mean() - value
    return (
        f"On the same folds with {count(record.confirmed['seed'].nunique(), 'fresh seed')} the winner's "
        f"{record.objective.words} is {record.objective.amount(mean_and_sd(again.mean(), again.std()))} "
        f"(n = {count(len(again), 'cell')}), "
        f"{abs(change):.2f} {'worse' if change * record.objective.sign > 0 else 'better'} than in the search."
    )


def schedule_line(record: RunRecord) -> str:
    """The caveat that the value of a schedule includes the cell in which it was chosen; empty if none was found."""
    found = found_schedule(record)
    if found is None or record.trial(found.trial)["state"] != "COMPLETE":
        return ""
    others = int(is_member(record.trials).sum())
    line = (
        f"Trial {found.trial} follows the schedule of member {found.member}, which was chosen as the best of "
        f"{count(others, 'member')} in the first cell. That cell is part of its mean and flatters it"
    )
    values, published = _cell_values(record, found.trial), _cell_values(record, record.published)
    if len(values) > 1:
        elsewhere = "the other cell" if len(values) == 2 else f"the other {len(values) - 1} cells"
        line += f": {values.iloc[0]:.2f} there, {_mean_of_rest(values)} in {elsewhere}"
    if len(values) > 1 and len(published) == len(values):
        line += f" (published: {published.iloc[0]:.2f} and {_mean_of_rest(published)})"
    return f"{line}. The refits and the held-out subjects had no part in the choice."


def _mean_of_rest(values: pd.Series) -> str:
    return mean_and_sd(values.iloc[1:].mean(), values.iloc[1:].std())


def _cell_values(record: RunRecord, number: int | None) -> pd.Series:
    """The first objective of every cell of a trial, in the order in which all trials visit them."""
    return _measured(record, record.cells[record.cells["number"] == number])


def _trial_value(record: RunRecord, number: int | None) -> str:
    if number is None:
        return ABSENT
    row = record.trial(number)
    return f"{mean_and_sd(row['value'], row['sd'])} (n = {int(row['n'])})" if row["n"] == row["n"] else ABSENT


def _repeated(record: RunRecord) -> dict[str, str]:
    found = {method: _spread(_repeated_values(record, method)) for method in (WINNER, PUBLISHED)}
    return {method: text for method, text in found.items() if text != ABSENT}


def _repeated_values(record: RunRecord, method: str) -> pd.Series:
    """The first objective of every repeated cell."""
    return _measured(record, record.confirmed[record.confirmed["method"] == method])


def _measured(record: RunRecord, cells: pd.DataFrame) -> pd.Series:
    return pd.Series(
        [measure(record.objectives[0], _metrics(row)) for _, row in cells.iterrows()], dtype=float
    )


def _metrics(row: pd.Series) -> Metrics:
    return {str(name): value for name, value in row.items()}


def _spread(values: pd.Series) -> str:
    return f"{mean_and_sd(values.mean(), values.std())} (n = {len(values)})" if len(values) else ABSENT


def access_line(record: RunRecord) -> str:
    """When held-out subjects were first and last read, and by which part of the run; empty without records."""
    if record.access.empty or record.splits.empty:
        return ""
    try:
        return _access_line(record)
    # A time or a fold that is none.
    except ValueError:
        return "access.csv is damaged: put it back from a backup. The records of the workers are in access/."


def _access_line(record: RunRecord) -> str:
    held_out = set(record.splits.loc[record.splits["role"] == "holdout", "subject"])
    first = pd.to_datetime(record.access["first_read"], utc=True, format="ISO8601")
    of_held_out = first[record.access["subject"].isin(held_out)]
    read = f"Access records of the workers: {count(record.access['subject'].nunique(), 'subject')} read"
    if of_held_out.empty:
        return f"{read}, none of them held out."
    by_search = record.access["subject"].isin(held_out) & (record.access["fold"].astype(float) >= 0)
    if by_search.any():
        people = record.access.loc[by_search, "subject"].nunique()
        return f"{read}. {count(people, 'held-out subject')} WERE READ BY THE SEARCH: its result is void."
    times = f"the first held-out one at {of_held_out.min():%Y-%m-%d %H:%M:%S} UTC"
    if "last_read" in record.access and (len(record.about.looks) > 1 or record.evaluations):
        last = pd.to_datetime(record.access["last_read"], utc=True, format="ISO8601")
        # access.csv was written at the end of the search, and an evaluation follows it.
        ends = [
            last[record.access["subject"].isin(held_out)].max(),
            *(pd.Timestamp(when, unit="s", tz="UTC") for when in record.evaluations),
        ]
        times += f", the last at {max(ends):%Y-%m-%d %H:%M:%S} UTC"
    return (
        f"{read}; {times}, {'by refits and `brainsweep evaluate`' if record.evaluations else 'by a refit'}."
    )


def tuning_line(record: RunRecord) -> str:
    """Whether the rival was tuned as the winner was, with the numbers of trials, and its validation value."""
    if record.task.rival is None:
        return ""
    rival, tried, of_winner = record.task.rival.words, ended(record.baseline), ended(record.trials)
    if not tried:
        return f"The winner was tuned, and {rival} was not."
    best = record.best_baseline
    if best is None:
        return (
            f"None of {count(tried, 'trial')} of {rival} was completed: it was refitted untuned, and the "
            "winner was tuned."
        )
    if tried == 1:
        return f"The winner was tuned, and of {rival} only one configuration was tried."
    number = "as many" if tried == of_winner else str(of_winner)
    value = record.objective.amount(mean_and_sd(best["value"], best["sd"]))
    return (
        f"{rival[:1].upper()}{rival[1:]} was tuned as well: it is the best of {count(tried, 'trial')} on the same "
        f"cells ({record.objective.words} {value}), and the winner the best of {number}."
    )


def looks_in_words(record: RunRecord) -> str:
    """How often the hold-out was used, and when: `2 times (2026-11-20 09:14 UTC, after 6 trials; …)`."""
    told = [look.in_words() for look in record.about.looks]
    # Version 0.2 and before: once, and once more after each change of a search that had used it.
    not_told = 0 if told else 1 + sum(change.holdout_seen for change in record.about.changes)
    told += [f"{in_words(when)}, by `brainsweep evaluate`" for when in record.evaluations]
    looks = not_told + len(told)
    times = "once, after the search" if looks == 1 else f"{looks} times"
    # A date and a time come first in each of them.
    return f"{times} ({'; '.join(sorted(told))})" if told else times


def change_lines(record: RunRecord) -> list[str]:
    """One line for every change of the search while it ran, from run.json."""
    lines = []
    for change in record.about.changes:
        looked = " The held-out subjects had been looked at before." if change.holdout_seen else ""
        outside = count(len(change.outside), "trial")
        aside = f" {outside} lay outside from then on and could not win." if change.outside else ""
        lines.append(
            f"The search was changed at {change.when} after {count(change.after_trials, 'trial')}: "
            f"{'; '.join(change.what)}.{aside}{looked}"
        )
    return lines
