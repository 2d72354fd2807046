"""The names inside a run by which code finds things: files, labels and attributes of trials, methods in tables.

Runs that already exist contain them, so none of them may ever change.
"""

from __future__ import annotations

# Files of a run; `distributed.run.folder` says what each of them contains.
RUN_JSON, JOURNAL, SPLITS, LOCK = "run.json", "study.journal", "splits.csv", "writer.lock"
REPORT = "report.html"
"""The page, the last file of a sweep."""
JOURNAL_COPY = "study.journal.copy"
"""The journal of the study again, with a checksum before every line."""
TRIALS, REFITS, CONFIRMED, ACCESS, TUNE = "trials", "refits", "confirmed", "access", "tune"
EXPLAINED = "explained"
"""Maps of the parts of a volume that the best model uses, if they were asked for."""
STAGES = "stages"
"""First stages of trials, which trials share while the run is not finished."""
STARTS = "starts"
"""The weights that trainings of the run start from."""
WEIGHTS = "begin.weights"
"""The setting that names one of them, and the parameter of a search that compares several."""
BASELINE = "baseline"
"""The trials of the baseline, if it was searched, too."""
# In the folder of a trial or a refit.
PROGRESS, CHECKPOINT = "progress.json", "checkpoint.pt"

SWEEP, TRAIN, NESTED, CURVE = "sweep", "train", "nested", "curve"
"""The kinds of runs, in run.json; a nested search has a sweep for every hold-out in `outer-1`, `outer-2`, …, and a
curve one for every budget of labels in `labelled-16`, `labelled-32`, …"""
STUDY = "brainsweep"
"""The name of the study if the space of the run was never changed; run.json has the name of the present one."""
BASELINE_STUDY = "l1-baseline"
"""The study of the tuned baseline, in the same journal."""

# The label of a trial in the tables: the value of its attribute `LABEL`. Most trials have no label.
PUBLISHED = "published"
"""The published configuration: the first trial, never stopped early, so that all others can be compared with it."""
ENQUEUED = "enqueued"
"""A configuration that the user gave."""
OUTSIDE_LABEL = "outside the space"
"""A trial that lies outside the space since the space was changed: it keeps its value, but it cannot win."""
MEMBER = "member of the population"
FOUND = "schedule found"
"""The trial that follows the schedule of the best member on all cells."""

# User attributes of a trial in the study.
LABEL = "label"
SETTINGS = "settings"
"""The resolved settings of the trial, as JSON."""
REASON = "reason"
"""Why the trial was stopped early, or failed."""
OUTSIDE = "outside"
"""The parameters of a trial that lies outside the space."""
SD, CELLS_DONE, SECONDS = "sd", "n", "seconds"
"""SD of the value over cells, the number of finished cells, and the duration in seconds."""
IDLE_SECONDS = "idle_seconds"
"""Seconds from the end of the last trial in the slot to the first step of this trial."""
PENALTY = "penalty"
"""The penalty with which a finished trial is refitted; absent if its task finds none."""
CELL_VALUES = "cell_values"
"""The first objective in every finished cell, in the order of the cells."""
AFTER_CELLS = "after_cells"
"""The same as it was after the first cell, after the second one, and so on: later cells change the earlier values."""
VALUE_AT = "value at epoch "
"""With the number of epochs done behind it: an intermediate value, which Optuna refuses with several objectives."""
FOUND_BY = "found_by"
"""In the trial `FOUND`: the number of the best member."""
LINEAGE = "lineage"
"""The changes that led to the weights of a member: [{"epoch", "donor", "changed"}]."""
EXCHANGED = "exchanged"
"""The exchanges in which the member itself took the weights of a donor, in the same form."""
MEMBER_VALUE = "member_value"
"""The last value of a member that trained to the end."""

# Methods, as in the column `method` of tables; a task adds its rival and its floor.
WINNER = "search winner"
L1, MEDIAN = "L1 baseline", "training median"
"""The rival and the floor of brain age."""
WINNER_FOLDER = "winner"
REFITTED = {WINNER_FOLDER: WINNER, PUBLISHED: PUBLISHED}
"""The folders under `refits/` and `confirmed/` that every task has, and the method in each of them."""
