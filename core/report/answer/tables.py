"""The tables of a run: the leaderboard of the search, and the results on the hold-out."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from core.objectives import Better
from core.report.answer.describe import describe, is_absent, number
from core.report.answer.population import found_in_words, found_schedule, values_of
from core.report.answer.record import RunRecord, not_settings
from core.report.answer.verdict import after_a_look, comparisons, judged_interval, verdict
from core.run_names import FOUND, MEMBER, PUBLISHED
from core.task_description import BEFORE_0_3, TaskDescription

ABSENT = "–"
INTERVAL = "95 % interval"
IN_A_TERMINAL = 3
"""The metrics that a table of results has room for in a terminal."""
SHOWN_FAILURES = 5
SHOWN_SETTINGS = 7


def mean_and_sd(mean: float, sd: float) -> str:
    """`6.12 ± 0.80`; without the ± if there is no SD (one value), and a dash if there is no value."""
    if is_absent(mean):
        return ABSENT
    text = f"{mean:.2f}" if is_absent(sd) else f"{mean:.2f} ± {sd:.2f}"
    return text.replace("-", "−")


def leaderboard(
    trials: pd.DataFrame,
    top: int = 10,
    found: str = "",
    task: TaskDescription = BEFORE_0_3,
    better: Better = "low",
) -> pd.DataFrame:
    """The `top` trials of the trials table, best first, and the published configuration in any case.

    Only completed trials have a rank. The value of a pruned trial, or of a member of a population, is a mean over
    fewer cells or epochs and cannot be compared; these trials follow while there is room. `found` is the text for the
    schedule that a population found, `task` the task of the run, and `better` says which values are. Columns: rank,
    trial, what (the configuration in a few words), value (mean ± SD over cells), n (cells), state.
    """
    settings = [name for name in trials.columns if name not in not_settings(task)]
    is_ranked = (trials["state"] == "COMPLETE") & trials["value"].notna()
    ascending = [better == "low", True]
    ranked = trials[is_ranked].sort_values(["value", "number"], ascending=ascending)
    pruned = trials[trials["state"] == "PRUNED"].sort_values(["value", "number"], ascending=ascending)
    ordered = [(str(rank), row) for rank, (_, row) in enumerate(ranked.iterrows(), start=1)]
    ordered += [(ABSENT, row) for _, row in pruned.iterrows()]
    failed = trials[(trials["state"] == "FAIL") & (trials["label"] == PUBLISHED)]
    ordered += [(ABSENT, row) for _, row in failed.iterrows()]
    shown = [entry for place, entry in enumerate(ordered) if place < top or entry[1]["label"] == PUBLISHED]
    columns = ["rank", "trial", "what", "value", "n", "state"]
    return pd.DataFrame(
        [_leaderboard_row(rank, row, settings, found) for rank, row in shown], columns=columns
    )


def leaderboard_of(record: RunRecord) -> pd.DataFrame:
    """The leaderboard of a run."""
    found = found_in_words(record, SHOWN_SETTINGS)
    return leaderboard(record.trials, found=found, task=record.task, better=record.objective.better)


def _leaderboard_row(rank: str, row: pd.Series, settings: list[str], found: str) -> dict[str, Any]:
    return {
        "rank": rank,
        "trial": int(row["number"]),
        "what": _what(row, settings, found),
        "value": mean_and_sd(row["value"], row["sd"]),
        "n": ABSENT if is_absent(row["n"]) else str(int(row["n"])),
        "state": _state(row),
    }


def _what(row: pd.Series, settings: list[str], found: str) -> str:
    if row["label"] == FOUND:
        return f"{FOUND}: {found}"
    what = describe(_settings_of(row, settings), most=SHOWN_SETTINGS)
    before = {PUBLISHED: f"{PUBLISHED}: ", MEMBER: "member, began with: "}.get(row["label"], "")
    return before + what


def _state(row: pd.Series) -> str:
    state = str(row["state"])
    if state != "PRUNED" or is_absent(row["epochs"]):
        return state
    if row["label"] == MEMBER:
        return f"member, epoch {int(row['epochs'])}"
    by = "" if is_absent(row["reason"]) or "Wilcoxon" not in str(row["reason"]) else ", Wilcoxon"
    return f"PRUNED, epoch {int(row['epochs'])}{by}"


def _settings_of(row: pd.Series, settings: list[str]) -> dict[str, Any]:
    return {name: row[name] for name in settings}


def count(amount: float, noun: str) -> str:
    """`1 epoch`, `3 epochs`."""
    return f"{int(amount)} {noun}{'' if int(amount) == 1 else 's'}"


def ended(trials: pd.DataFrame) -> int:
    """How many trials of a trials table have ended, in whatever way."""
    return int((~trials["state"].isin(["WAITING", "RUNNING"])).sum())


def holdout_table(
    holdout: pd.DataFrame, predictions: pd.DataFrame, task: TaskDescription = BEFORE_0_3
) -> pd.DataFrame:
    """Mean ± SD over refit seeds (sample SD) of each method on the held-out subjects.

    Columns: method; the metrics that the task shows, behind the first of them its 95 % interval over subjects; seeds
    (refits), subjects (held out). The order is: search winner, published, rival and floor of the task, then all others.
    """
    names = [str(name) for name in holdout["method"].dropna().unique()]
    ordered = [name for name in task.methods if name in names]
    ordered += [name for name in names if name not in task.methods]
    rows = [_holdout_row(name, holdout, predictions, task) for name in ordered]
    return pd.DataFrame(rows, columns=["method", *_result_columns(task), "seeds", "subjects"])


def _result_columns(task: TaskDescription) -> list[str]:
    first, *others = (task.metrics[name].title for name in task.shown)
    return [first, *([INTERVAL] if task.interval != "none" else []), *others]


def _holdout_row(
    method: str, holdout: pd.DataFrame, predictions: pd.DataFrame, task: TaskDescription
) -> dict[str, Any]:
    rows = holdout[holdout["method"] == method]
    low, high = judged_interval(predictions, method, task)
    subjects = sorted({int(n) for n in rows["n_holdout"].dropna()})
    return {
        "method": method,
        **{task.metrics[name].title: mean_and_sd(rows[name].mean(), rows[name].std()) for name in task.shown},
        INTERVAL: ABSENT if math.isnan(low) else f"{low:.2f} to {high:.2f}",
        "seeds": str(len(rows)),
        "subjects": "/".join(map(str, subjects)) or ABSENT,
    }


def failed_trials(trials: pd.DataFrame, task: TaskDescription = BEFORE_0_3) -> pd.DataFrame:
    """The trials that failed: trial, reason, epochs done, what (the configuration in a few words)."""
    settings = [name for name in trials.columns if name not in not_settings(task)]
    rows = [
        {
            "trial": int(row["number"]),
            "reason": "no reason was recorded" if is_absent(row["reason"]) else str(row["reason"]),
            "epochs": ABSENT if is_absent(row["epochs"]) else str(int(row["epochs"])),
            "what": describe(_settings_of(row, settings)),
        }
        for _, row in trials[trials["state"] == "FAIL"].sort_values("number").iterrows()
    ]
    return pd.DataFrame(rows, columns=["trial", "reason", "epochs", "what"])


def winner_beside_published(record: RunRecord) -> pd.DataFrame:
    """Every searched setting with its value in the published configuration and in the winner.

    Columns: setting, published, winner. A dash means that the setting does not act in this configuration. Empty if one
    of the two trials is unknown.
    """
    columns = ["setting", "published", "winner"]
    if record.best is None or record.published is None:
        return pd.DataFrame(columns=columns)
    published, winner = record.trial(record.published), record.trial(record.best)
    found = found_schedule(record)
    if found is not None and found.trial == record.best:
        winner |= values_of(record, found)
    rows = [
        {"setting": name, "published": _value(published[name]), "winner": _value(winner[name])}
        for name in record.searched()
    ]
    return pd.DataFrame(rows, columns=columns)


def _value(value: Any) -> str:
    return ABSENT if is_absent(value) else number(value)


def print_leaderboard(console: Console, record: RunRecord) -> None:
    """Print the leaderboard, the hold-out table and the verdict of a run to a terminal."""
    table = leaderboard_of(record)
    unit = f" in {record.objective.unit}" if record.objective.unit else ""
    for line in record.cut:
        console.print(f"note: {line}", style="bold", markup=False)
    if record.best is None:
        console.print("No trial was completed.")
    if not table.empty:
        console.print(
            _rich(
                table.rename(columns={"value": record.objective.words}),
                f"Leaderboard ({record.objective.words}{unit}, mean ± SD over n cells"
                f"{'; high is better' if record.objective.better == 'high' else ''})",
                record.best,
            )
        )
    found = found_schedule(record)
    if found is not None:
        console.print(f"The mean of trial {found.trial} includes the cell in which its schedule was chosen.")
    states = record.trials["state"].value_counts()
    if not states.empty:
        console.print("Trials: " + ", ".join(f"{number} {state}" for state, number in states.items()))
    baseline = record.best_baseline
    if baseline is not None:
        value = record.objective.amount(mean_and_sd(baseline["value"], baseline["sd"]))
        trials = count(ended(record.baseline), "trial")
        name = "baseline" if record.task.rival is None else record.task.rival.method
        console.print(f"{name}: {record.objective.words} {value}, the best of {trials}", highlight=False)
    for failed in failed_trials(record.trials, record.task).head(SHOWN_FAILURES).itertuples():
        console.print(f"Trial {failed.trial} failed: {failed.reason}", markup=False)
    if record.holdout.empty:
        console.print("Held-out subjects: not looked at yet.")
        return
    judged = record.judged_by
    unit = f" in {judged.unit}" if judged.unit else ""
    over = "; its interval over subjects" if record.task.interval != "none" else ""
    title = f"Held-out subjects ({judged.title}{unit}, mean ± SD over refit seeds{over})"
    table = holdout_table(record.holdout, record.predictions, record.task)
    beyond = [record.task.metrics[name].title for name in record.task.shown[IN_A_TERMINAL:]]
    console.print(_rich(table.drop(columns=beyond), title, None))
    if beyond:
        console.print(f"Also in the report: {', '.join(beyond)}.", highlight=False)
    console.print(verdict(record.predictions, record.task), style="bold", markup=False)
    if looked := after_a_look(record.about.looks):
        console.print(looked, style="bold", markup=False)
    for comparison in comparisons(record.predictions, record.task):
        console.print(f"  {comparison.sentence()}", markup=False)


def _rich(table: pd.DataFrame, title: str, best: int | None) -> Table:
    drawn = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in table.columns:
        is_wide = name in ("what", "method", "state")
        # What is neither words nor a number of settings stays in one line.
        drawn.add_column(str(name), justify="left" if is_wide else "right", no_wrap=name != "what")
    for _, row in table.iterrows():
        is_best = best is not None and row["trial"] == best
        drawn.add_row(*(Text(str(value)) for value in row), style="bold" if is_best else None)
    return drawn
