"""The folder of a run: how it is made and opened, and the files that are written directly into it.

RUN/run.json                       request, resolved settings, seeds, versions, the cohort's hash
    splits.csv                     subject, role
    study.journal                  the Optuna study: the one record of the search
    study.journal.copy             the same lines with checksums, from which damage is mended
    trials/0007/progress.json      history and finished cells of a trial; checkpoint.pt while it runs;
                                   predictions-FOLD-SEED.csv for the validation subjects of every finished cell
    baseline/0003/…                the same, of a trial of the tuned baseline (--baseline-trials)
    refits/METHOD/…                the same, with predictions-SEED.csv and model-SEED/
    confirmed/METHOD/…             winner and published again on the folds of the search, with seeds it never used;
                                   model-FOLD-SEED/ of the winner
    trials.csv, trials.parquet, cells.csv, history.csv, access.csv, baseline.csv, confirmed.csv,
    holdout.csv, predictions.csv   made from these
    tensorboard/  report.html
    best/                          the model of the refitted winner, with calibration.json, if its task makes one
    starts/NAME#HASH/              the weights that trainings start from, and whom they were trained on
    stages/KEY/                    first stages that trials share, while the run is not finished
    evaluations/                   predictions for the cohorts of `evaluate`
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from core.config import Settings, resolve, task_of
from core.errors import UserError
from core.evaluation.splits import Splits
from core.files.places import is_url
from core.files.tables import write_table
from core.files.writing import write_text
from core.run_description import CohortOfRun, RunDescription, find_cohort
from core.run_names import (
    ACCESS,
    BASELINE,
    CONFIRMED,
    JOURNAL,
    LOCK,
    REFITS,
    REPORT,
    RUN_JSON,
    SPLITS,
    STARTS,
    TRIALS,
    TUNE,
)
from core.tasks import find_task
from core.volumes.cohort.overlay import used_overlays
from core.volumes.cohort.reader import Cohort
from distributed.run.code import code_version, describe_code
from distributed.run.lock import refuse_url

VERSIONS_OF = ("brainsweep", "ray", "torch", "optuna", "monai", "numpy", "scikit-learn", "nibabel", "nilearn")


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, and the names in it."""

    path: Path

    @property
    def about(self) -> RunDescription:
        """The content of run.json."""
        return RunDescription.model_validate_json((self.path / RUN_JSON).read_bytes())

    @property
    def journal(self) -> Path:
        """The journal file of the study."""
        return self.path / JOURNAL

    def trial(self, name: str) -> Path:
        """The folder of a trial of the search."""
        return self.path / TRIALS / name

    def baseline(self, name: str) -> Path:
        """The folder of a trial of the baseline."""
        return self.path / BASELINE / name

    def refit(self, method: str) -> Path:
        """The folder of a refit."""
        return self.path / REFITS / method

    def confirmed(self, method: str) -> Path:
        """The folder of a repetition on the folds of the search with fresh seeds."""
        return self.path / CONFIRMED / method

    @property
    def starts(self) -> Path:
        """The weights that trainings of the run start from; see `core.starts`."""
        return self.path / STARTS

    @property
    def access(self) -> Path:
        """The folder in which workers note every use of a subject."""
        return self.path / ACCESS

    @property
    def tune(self) -> Path:
        """The folder of Ray Tune, of use to a running sweep only."""
        return self.path / TUNE

    @property
    def is_concluded(self) -> bool:
        """Whether the run has ended, and its page was written after that: the process may be killed in between."""
        about = self.about
        return about.finished is not None and about.concluded and (self.path / REPORT).exists()

    def update(self, **changes: object) -> None:
        """Replace fields of run.json."""
        known = RunDescription.model_validate(self.about.model_dump() | changes)
        write_text(self.path / RUN_JSON, known.model_dump_json(indent=2))


def create_run(
    out: Path,
    kind: str,
    request: Mapping[str, JsonValue],
    settings: Settings,
    cohort: Cohort,
    first: Mapping[str, Sequence[Mapping[str, object]]] | None = None,
) -> RunFolder:
    """A new run folder with its run.json; `first` are the configurations to try first, see `RunDescription`.

    Raises:
        UserError: the folder exists and is not empty, or cannot be written.
    """
    refuse_url(out)
    out = Path(out).resolve()
    if any(part.startswith("_ray_pkg_") for part in out.parts):
        raise UserError(
            f"{out} is deleted with its Ray job; give an absolute --out on storage that all nodes mount"
        )
    if (out / RUN_JSON).exists():
        raise UserError(
            f"{out} already holds a run; continue it with `brainsweep resume {out}` or give another --out"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        # A process that was killed here leaves a lock, or a file half written.
        if any(path.name != LOCK and path.suffix != ".tmp" for path in out.iterdir()):
            raise UserError(f"the output folder {out} is not empty; give another --out")
        about = _describe(kind, request, settings, cohort, out).model_copy(
            update={"first": dict(first or {})}
        )
        write_text(out / RUN_JSON, about.model_dump_json(indent=2))
    except OSError as error:
        raise UserError(f"cannot write a run to {out}: {error.strerror or error}") from None
    return RunFolder(out)


def open_run(path: Path) -> RunFolder:
    """An existing run; UserError where there is none."""
    folder = RunFolder(Path(path).resolve())
    try:
        # Read it now, so that a file that cannot be read is found here.
        folder.about  # noqa: B018
    except FileNotFoundError:
        raise UserError(f"{path} is not a run: it has no run.json") from None
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{path}/run.json cannot be read: {first}; put it back from a backup") from None
    return folder


def cohort_of(folder: RunFolder, given: Path | str | None = None) -> Cohort:
    """The cohort of a run, as `find_cohort` finds it; run.json then holds its new place.

    Raises:
        UserError: the cohort is not found, or the cohort that is found is another one.
    """
    recorded = folder.about.cohort or CohortOfRun()
    cohort = find_cohort(folder.path, recorded, given)
    if cohort.location != recorded.path:
        folder.update(cohort=recorded.model_copy(update={"path": cohort.location}))
    return cohort


def write_splits(folder: RunFolder, splits: Splits, cohort: Cohort) -> None:
    """Record which subjects are in which fold, and which are held out."""
    write_table(splits.to_frame(cohort.manifest), folder.path / SPLITS)


def keep_best(folder: RunFolder, model: Path) -> None:
    """Copy the folder of a model to best/, and replace an earlier one."""
    best = folder.path / "best"
    shutil.rmtree(best, ignore_errors=True)
    shutil.copytree(model, best)


def _describe(
    kind: str, request: Mapping[str, JsonValue], settings: Settings, cohort: Cohort, out: Path
) -> RunDescription:
    description, task, resolved = cohort.description, find_task(task_of(settings)), resolve(settings)
    column = task.balanced_by(resolved)
    return RunDescription(
        kind=kind,
        command=" ".join(["brainsweep", *sys.argv[1:]]),
        created=now(),
        # A sweep has begun as soon as its splits and its first points are written.
        begun=kind != "sweep",
        versions={"python": platform.python_version()} | {name: _version(name) for name in VERSIONS_OF},
        code=code_version(),
        cohort=CohortOfRun(
            path=cohort.address,
            from_run=cohort.address if is_url(cohort.address) else os.path.relpath(cohort.address, out),
            n=len(cohort),
            name=description.name,
            hash=description.hash,
            synthetic=description.synthetic,
            spacing=description.spacing,
            shape=description.shape,
            source=description.source,
            channels=description.channels,
            preprocessing=description.preprocessing,
            overlays={
                # Also those that a search chooses among.
                name: each.description.hash
                for name, each in used_overlays(cohort.overlays, [settings, dict(request)]).items()
            },
        ),
        settings=settings,
        sweep=dict(request),
        task=task.describe(resolved).model_copy(update={"column": column}),
        task_file=describe_code(task_of(settings)),
    )


def now() -> str:
    """ISO 8601, UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
