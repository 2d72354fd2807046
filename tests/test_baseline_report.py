"""The L1 baseline in what people see: the live display, the terminal and the report."""

import io
from types import SimpleNamespace

import pandas as pd
from fake_run import make_run
from of_age import MAE
from rich.console import Console

from core.report.answer.findings import caveats
from core.report.answer.record import read_run
from core.report.answer.tables import print_leaderboard
from distributed.search.budget import Budget
from distributed.sweeps.display import Display


def test_the_display_counts_the_trials_of_the_baseline():
    console = Console(file=io.StringIO(), width=120)
    display = Display(console, 3, 2, Budget(), MAE["mae"], what="L1 baseline")
    assignment = {
        "name": "l1-0001",
        "settings": {"objective": {"name": "l1"}},
        "cells": [{"fold": 0, "seed": 0}],
    }
    trial = SimpleNamespace(trial_id="a", config={"assignment": assignment})
    display.on_trial_start(0, [], trial)
    display.on_trial_result(0, [], trial, {"value": 4.25, "epochs": 2, "fold": 0, "finished": True})
    display.on_trial_complete(0, [], trial)
    assert (
        console.file.getvalue().strip()
        == "trial l1-0001 finished after 2 epochs, MAE 4.25 years  best 4.25 years (trial l1-0001)"
    )
    assert display.done == 1


def tuning(run, rows=None):
    """What the report says of the tuning, and what is printed, with these (state, value, sd) in baseline.csv."""
    if rows is not None:
        table = pd.DataFrame(rows, columns=["state", "value", "sd"])
        table.assign(number=range(len(table))).to_csv(run / "baseline.csv", index=False)
    record = read_run(run)
    console = Console(file=io.StringIO(), width=200)
    print_leaderboard(console, record)
    (line,) = [line for line in caveats(record) if "held-out subjects: a few other people" in line]
    return line[line.index("with the winner. ") + len("with the winner. ") :], console.file.getvalue()


def test_the_report_says_how_the_baseline_was_tuned(tmp_path):
    run = make_run(tmp_path / "run", trials=6)
    said, printed = tuning(run)
    assert said == "The winner was tuned, and the L1 baseline was not."
    assert "L1 baseline: " not in printed
    tried = [("COMPLETE", 9.0, 0.5), ("COMPLETE", 7.25, 0.75), ("PRUNED", 6.0, None), ("RUNNING", 5.0, None)]
    said, printed = tuning(run, tried)
    assert said == (
        "The L1 baseline was tuned as well: it is the best of 3 trials on the same cells (validation MAE 7.25 ± 0.75 "
        "years), and the winner the best of 6."
    )
    assert "L1 baseline: validation MAE 7.25 ± 0.75 years, the best of 3 trials" in printed
    assert "and the winner the best of as many." in tuning(run, tried * 2)[0]
    said, _ = tuning(run, tried[:1])
    assert said == "The winner was tuned, and of the L1 baseline only one configuration was tried."
    said, printed = tuning(run, [("FAIL", None, None)] * 2)
    assert (
        said
        == "None of 2 trials of the L1 baseline was completed: it was refitted untuned, and the winner was tuned."
    )
    assert "L1 baseline: " not in printed
