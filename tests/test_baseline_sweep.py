"""A sweep whose L1 baseline is tuned, too: killed during the search for the baseline, and resumed."""

import csv
import json
import os
import signal

import optuna
import pandas as pd
import pytest
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from process_helpers import end_marked, run, start, study_of, trials_of, wait_until
from small_cohort import write_small_cohort

from core.files.tables import read_table
from core.run_names import BASELINE_STUDY, LABEL, PUBLISHED, SETTINGS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TRIALS, BASELINE_TRIALS, EPOCHS = 2, 2, 4
NAMES = ("NA", "null", "None", "nan", "=1+1", "007", "-5")
"""Of subjects and of a site: they come back from every table of the run."""
SPACE = """
def space(trial):
    trial.suggest_float("optimiser.learning_rate", 1e-4, 1e-2, log=True)
    trial.suggest_float("objective.temperature", 0.03, 0.5, log=True)
    return dict(trial.params)
"""


def baseline_of(folder):
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder / "study.journal")))
    return optuna.load_study(study_name=BASELINE_STUDY, storage=storage).get_trials()


def history_of(folder, number):
    path = folder / "baseline" / f"{number:04d}" / "progress.json"
    return json.loads(path.read_text())["history"] if path.exists() else []


def test_a_baseline_is_searched_first_and_a_killed_one_is_resumed_and_refitted_at_its_best(tmp_path):
    cohort = write_small_cohort(tmp_path / "cohort", subjects=30, names=NAMES)
    (tmp_path / "mine.py").write_text(SPACE)
    folder, mark = tmp_path / "run", f"baseline-{os.getpid()}"
    sweep = start(
        "sweep", "cohort", "--space", "mine.py:space", "--trials", TRIALS, "--baseline-trials", BASELINE_TRIALS,
        "--folds", 2, "--slots", 1, "--out", "run", "--scheduler", "none", "--set", f"training.epochs={EPOCHS}",
        "--objectives", "mae,accelerator_seconds", cwd=tmp_path, mark=mark,
    )  # fmt: skip
    try:
        assert wait_until(lambda: len(history_of(folder, 1)) >= 2, 400)
    finally:
        left = end_marked(mark, 20, [signal.SIGKILL])
        sweep.communicate()
    assert not left
    before = history_of(folder, 1)
    first = baseline_of(folder)[0]
    assert first.state == TrialState.COMPLETE
    assert first.user_attrs[LABEL] == PUBLISHED
    assert not trials_of(folder, TrialState.RUNNING, TrialState.COMPLETE)  # the main search has not begun
    again = run("resume", "run", "--set", "objective.temperature=0.1", "--change-search", cwd=tmp_path)
    assert again.returncode == 2
    assert "of the baseline of run 1 of 2 trials have ended" in again.stderr

    resumed = run("resume", "run", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    baseline, main = baseline_of(folder), study_of(folder).get_trials()
    assert [trial.state for trial in baseline] == [TrialState.COMPLETE] * BASELINE_TRIALS
    assert [trial.state for trial in main] == [TrialState.COMPLETE] * TRIALS
    assert baseline[0].values == first.values
    assert history_of(folder, 1)[: len(before)] == before  # continued, not begun again
    steps = [[row["fold"], row["epoch"]] for row in history_of(folder, 1)]
    assert steps == [[fold, epoch] for fold in range(2) for epoch in range(1, EPOCHS + 1)]
    assert max(trial.datetime_complete for trial in baseline) < min(trial.datetime_start for trial in main)
    for trial in baseline:
        settings = json.loads(trial.user_attrs[SETTINGS])
        assert settings["objective"]["name"] == "l1"
        assert settings["optimiser"]["learning_rate"] == trial.params["optimiser.learning_rate"]
        assert set(trial.params) == {"optimiser.learning_rate"}

    best = min(baseline, key=lambda trial: trial.values)
    refitted = json.loads(next((folder / "refits" / "l1").glob("model-*/settings.json")).read_text())
    assert refitted == json.loads(best.user_attrs[SETTINGS])
    table = pd.read_csv(folder / "baseline.csv")
    assert table["value"].tolist() == pytest.approx([trial.values[0] for trial in baseline])
    assert list(table.columns)[:9] == list(pd.read_csv(folder / "trials.csv").columns)[:9]
    (look,) = json.loads((folder / "run.json").read_text())["looks"]
    assert (look["trials"], look["baseline"]) == (TRIALS, best.number)
    assert "L1 baseline: validation MAE" in resumed.stdout
    report = " ".join((folder / "report.html").read_text().split())
    assert "it is the best of 2 trials on the same cells" in report
    assert "and the winner the best of as many." in report
    once_more = run("resume", "run", cwd=tmp_path)
    assert once_more.returncode == 0
    assert "nothing left to do" in once_more.stdout
    for made in ("splits.csv", "access.csv", "predictions.csv"):
        named = read_table(folder / made)["subject"]
        assert set(named) <= set(cohort.manifest["subject"])
        assert made == "predictions.csv" or set(NAMES) <= set(named)
    assert "NA" in set(read_table(folder / "predictions.csv")["site"])
    with (folder / "splits.csv").open(newline="") as file:
        assert "'=1+1" in {
            row["subject"] for row in csv.DictReader(file)
        }  # what a spreadsheet takes for text
    judged = run("evaluate", "run", "cohort", cwd=tmp_path)
    assert judged.returncode == 0, judged.stderr
