"""What a user asks of a sweep, of its continuation, or of one training run: the options of the command line.

This is the only place for the name, default, bounds and help of every option of these commands. It imports nothing
that takes long, because `brainsweep --help` needs it, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator

from distributed.batches.mode import Mode
from distributed.run.assignment import HOLDOUT

TASK = "NAME of a task, or FILE.py:NAME; that of the space if absent"
Changes = dict[str, JsonValue]
"""Settings by dotted name, as `--set` gives them."""
CHANGES = "change any setting, e.g. training.epochs=20; repeatable"
ALLOW_SEEN = "start from weights that know people who are judged; the report says so"
DATA_MODE = "where volumes wait: auto, resident (in shared memory), streaming (by Ray Data), direct (on disk)"


NONE = "none"
"""As a start: random weights."""
LABELLED = "data.labelled"
OTHER_SPACE = {"segmentation": "tissue"}
"""The space of a task of ours, where it has another name."""
REPEATED = "repeated"
"""In a field: its option is given once for each of its values."""


class _Request(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Divided(_Request):
    """How the subjects are divided."""

    folds: int = Field(5, ge=2, description="cross-validation folds of every trial")
    folds_from: str | None = Field(
        None,
        description="column of the cohort with the fold of every subject; those without one are held out",
    )
    leave_out: str | None = Field(
        None,
        description="column, such as site: all subjects with one value of it are in one fold, or held out",
    )
    splits_from: Path | None = Field(
        None, description="another RUN, whose hold-out and folds are taken, to compare on the same people"
    )
    splits_hash: str | None = None
    """Of what was taken from there. A field without a description is no option."""

    @property
    def given_splits(self) -> list[str]:
        """The options that say who is in which part."""
        given = {
            "--folds-from": self.folds_from,
            "--leave-out": self.leave_out,
            "--splits-from": self.splits_from,
        }
        return [f"{option} {value}" for option, value in given.items() if value is not None]


def space_of(task: JsonValue) -> str:
    """The space of a task: one of ours has its name, and in the file of a task it is the function `space`."""
    if not isinstance(task, str):
        return "brain_age"
    if task in OTHER_SPACE:
        return OTHER_SPACE[task]
    return f"{task.rpartition(':')[0] or task}:space" if ":" in task or task.endswith(".py") else task


@dataclass(frozen=True)
class Part:
    """One of several searches that belong together."""

    folder: str
    words: str
    changes: dict[str, Any]
    """What the request of this part differs in."""


def budget_of(text: str) -> int | float | None:
    """The value of `data.labelled` that a user typed; ValueError if it is none.

    Args:
        text: a number of subjects, a share of them with a point, or all.
    """
    if text == "all":
        return None
    try:
        value = float(text) if "." in text else int(text)
    except ValueError:
        value = 0
    if not (value >= 2 if isinstance(value, int) else 0 < value < 1):
        raise ValueError(
            f"{text} is no budget; give a number of subjects from 2, a share such as 0.5, or all"
        )
    return value


class SweepRequest(_Divided):
    """What a user asks of a sweep. run.json records it, so that `resume` uses the same request."""

    task: str | None = Field(None, description=TASK)
    start: tuple[str, ...] = Field(
        (),
        json_schema_extra={REPEATED: True},
        description="RUN or file of weights to start from, or none; repeat it, and the search compares them",
    )
    allow_seen_subjects: bool = Field(False, description=ALLOW_SEEN)
    space: str | None = Field(
        None, description="NAME of a space, or FILE.py:FUNCTION; that of the task if absent"
    )
    choose: tuple[str, ...] = Field(
        (),
        json_schema_extra={REPEATED: True},
        description="NAME=A,B,…: let the search choose a setting among these values, such as several derived maps",
    )
    stages: int = Field(
        1,
        ge=1,
        description="different first stages (pretraining.*) to try, each with several trainings after it",
    )
    trials: int = Field(20, ge=1, description="configurations to try, the published one first")
    baseline_trials: int = Field(
        0, ge=0, description="configurations of the baseline (L1) to try first; 0: it is refitted untuned"
    )
    seeds: int = Field(1, ge=1, description="repeats of every fold, each with another seed")
    outer: int | None = Field(
        None, ge=2, description="repeat the whole search with so many hold-outs, everyone held out once"
    )
    outer_fold: int | None = None
    """The hold-out of a search inside a nested one. A field without a description is no option."""
    labelled: tuple[str, ...] = Field(
        (),
        description="budgets of labels, such as 16,32,64,all: a whole search for each, in which so many subjects are "
        "labelled, and the curve of what labels bring",
    )
    labelled_at: str | None = None
    """The budget of a search inside a curve."""
    refit_seeds: int = Field(1, ge=1, description="refits of the winner and the baselines for the hold-out")
    holdout: float = Field(0.2, gt=0, lt=1, description="share of subjects that the search never sees")
    slots: int | None = Field(None, ge=1, description="trials at a time; as many as fit if absent")
    workers_per_slot: int = Field(1, ge=1, description="data-parallel workers of a trial")
    gpus_per_worker: float | None = Field(
        None, ge=0, description="GPUs of each worker, fractions share one; 1 if absent and there are GPUs"
    )
    objectives: tuple[str, ...] = Field(
        (),
        description="what to optimise; the first one stops trials and chooses the winner, by default that of the "
        "task; accelerator_seconds is one of every task; comma-separated",
    )
    scheduler: str = Field(
        "asha",
        description="what stops bad trials early: asha, hyperband, median, none; "
        "or a population that changes while it trains: pbt, pb2",
    )
    pruner: str = Field(
        "none",
        description="beside the scheduler: none, or wilcoxon[=P] against the best trial, cell by cell (P 0.1)",
    )
    startup_trials: int = Field(
        0, ge=0, description="trials at the beginning that are compared but never stopped early"
    )
    sampler: str = Field("tpe", description="what proposes trials: tpe, gp, cmaes, nsga2, qmc, random, grid")
    grid_points: int | None = Field(
        None, ge=2, description="values of every continuous setting, for --sampler grid"
    )
    data_mode: Mode = Field("auto", description=DATA_MODE)
    time_budget: float | None = Field(None, gt=0, description="seconds of search, refits not counted")
    accelerator_hours: float | None = Field(
        None, gt=0, description="GPU-hours (CPU-core-hours without GPUs) of all trials, refits not counted"
    )
    stop_when: str = Field(
        "never",
        description="also end when improvement is unlikely: regret or emmr (from 20 completed trials), never",
    )
    confirm_seeds: int = Field(
        0, ge=0, description="repeat winner and published on the same folds with so many fresh seeds"
    )
    search_seed: int = Field(0, ge=0, description="seed of splits and sampler")
    changes: Changes = Field({}, description=CHANGES)

    @field_validator("labelled")
    @classmethod
    def _budgets(cls, labelled: tuple[str, ...]) -> tuple[str, ...]:
        for text in labelled:
            budget_of(text)
        if len(labelled) == 1:
            raise ValueError("a curve needs two budgets or more; for one use --set data.labelled")
        if len({budget_of(text) for text in labelled}) < len(labelled):
            raise ValueError("a budget is given twice")
        return labelled

    @property
    def parts(self) -> tuple[Part, ...]:
        """The searches of which this request is made; () if it is one search."""
        if self.labelled:
            return tuple(
                Part(
                    f"labelled-{text}",
                    f"{text} labelled",
                    {"labelled_at": text, "changes": {**self.changes, LABELLED: budget_of(text)}},
                )
                for text in self.labelled
            )
        count = self.outer or 0
        return tuple(
            Part(
                f"outer-{number + 1}",
                f"hold-out {number + 1} of {count}",
                {"outer_fold": number, "holdout": 1 / count},
            )
            for number in range(count)
        )

    @property
    def is_part(self) -> bool:
        """Whether it is one of the searches of another request."""
        return self.outer_fold is not None or self.labelled_at is not None

    @property
    def starts(self) -> tuple[str | None, ...]:
        """What the trials start from: NAME#HASH, or None for random weights."""
        return tuple(None if each == NONE else each for each in self.start)

    @property
    def space_name(self) -> str:
        """The space, or that of the task."""
        return self.space or space_of(self.task or self.changes.get("task"))

    @property
    def cells(self) -> list[dict[str, int]]:
        """The (fold, seed) cells of every trial, in the order in which all trials visit them."""
        return [{"fold": fold, "seed": seed} for seed in range(self.seeds) for fold in range(self.folds)]

    @property
    def confirm_cells(self) -> list[dict[str, int]]:
        """The folds of the search with seeds that it never used."""
        fresh = range(self.seeds, self.seeds + self.confirm_seeds)
        return [{"fold": fold, "seed": seed} for seed in fresh for fold in range(self.folds)]

    @property
    def refit_cells(self) -> list[dict[str, int]]:
        """The cells of a refit; the search never used their seeds."""
        return [{"fold": HOLDOUT, "seed": self.seeds + index} for index in range(self.refit_seeds)]


class ResumeRequest(_Request):
    """What a user asks when a sweep is continued; a field that is None does not change."""

    cohort: str | None = Field(
        None, description="where the cohort is now, if it was moved since the run began"
    )
    time_budget: float | None = Field(None, gt=0, description="seconds of further search")
    accelerator_hours: float | None = Field(
        None, gt=0, description="of the whole run, earlier sessions included"
    )
    trials: int | None = Field(None, ge=1, description="of the whole run; needs --change-search")
    space: str | None = Field(None, description="another space; needs --change-search")
    changes: Changes = Field({}, description=CHANGES)
    change_search: bool = Field(
        False, description="search another space, fix settings with --set, or try more trials"
    )
    trust_space: bool = Field(
        False, description="execute the FILE.py of the space or the task though it, or its owner, has changed"
    )


class TrainRequest(_Divided):
    """What a user asks of one training run. run.json records it."""

    task: str | None = Field(None, description=TASK)
    allow_seen_subjects: bool = Field(False, description=ALLOW_SEEN)
    space: str | None = Field(
        None, description="space whose published settings are trained; that of the task if absent"
    )
    settings: Path | None = Field(
        None, description="YAML file of settings, such as RUN/schedule.yaml; the published ones if absent"
    )
    changes: Changes = Field({}, description=CHANGES)
    fold: int = Field(0, ge=0, description="the fold to validate on")
    seed: int = Field(0, ge=0, description="seed of initialisation, order and views")
    workers: int = Field(1, ge=1, description="data-parallel workers; more than 1 starts Ray")
    data_mode: Mode = Field("auto", description=DATA_MODE)

    @property
    def space_name(self) -> str:
        """The space whose published settings are trained."""
        return self.space or space_of(self.task or self.changes.get("task"))
