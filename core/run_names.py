"""The names inside a run that code looks things up by: files, labels and attributes of trials, methods in tables.

They stand in runs that already lie on disks, so none of them ever changes.
"""

from __future__ import annotations

# Files and folders of a run; `distributed.run.folder` says what each holds.
RUN_JSON = "run.json"
JOURNAL = "study.journal"
SPLITS = "splits.csv"

STUDY = "brainsweep"
"""The study of a run whose space was never changed; run.json names the present one."""

# What a trial is called in the tables: the value of its attribute `LABEL`. Most trials have none.
PUBLISHED = "published"
"""The published configuration: the first trial, never stopped early, so that every other can be compared with it."""
ENQUEUED = "enqueued"
"""A configuration that the user gave."""
OUTSIDE_LABEL = "outside the space"
"""A trial that a change of the space has left outside: it has a value, but cannot win."""
MEMBER = "member of the population"
FOUND = "schedule found"
"""The trial that follows the best member's schedule on all cells."""

# User attributes of a trial in the study.
LABEL = "label"
SETTINGS = "settings"
"""Its resolved settings as JSON."""
REASON = "reason"
"""Why it was stopped early, or failed."""
OUTSIDE = "outside"
"""The parameters of a trial that lies outside the space."""
SD, CELLS_DONE, SECONDS = "sd", "n", "seconds"
"""SD of its value over cells, the number of finished cells, and how long it took."""
IDLE_SECONDS = "idle_seconds"
"""From the end of the slot's last trial to the first step of this one."""
CELL_VALUES = "cell_values"
"""Its first objective in every finished cell, in the order of the cells."""
VALUE_AT = "value at epoch "
"""Before the number of epochs done: what Optuna refuses to keep of trials with several objectives."""
FOUND_BY = "found_by"
"""Of the trial `FOUND`: the best member's number."""
LINEAGE = "lineage"
"""The changes behind a member's weights: [{"epoch", "donor", "changed"}]."""
EXCHANGED = "exchanged"
"""Every time that a member took a donor's weights itself, in the same form."""
MEMBER_VALUE = "member_value"
"""A member's last value, where it trained to the end."""

# Methods, as the column `method` of tables has them.
WINNER, L1, MEDIAN = "search winner", "L1 baseline", "training median"
METHODS = (WINNER, PUBLISHED, L1, MEDIAN)
REFITTED = {"winner": WINNER, "published": PUBLISHED, "l1": L1}
"""The folders under `refits/` and `confirmed/`, and the method that each holds."""
