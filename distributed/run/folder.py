"""What a run leaves on disk, and how its tables are made.

RUN/run.json                       request, resolved settings, seeds, versions, the cohort's hash
    splits.csv                     subject, role
    study.journal                  the Optuna study: the one record of the search
    trials/0007/progress.json      history and finished cells of a trial; checkpoint.pt while it runs
    refits/METHOD/…                the same, with predictions-SEED.csv and model-SEED/
    confirmed/METHOD/…             winner and published once more on the search's folds, with seeds it never used
    trials.csv, trials.parquet, cells.csv, history.csv, access.csv, confirmed.csv, holdout.csv,
    predictions.csv                made from these
    tensorboard/  best/  report.html
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.config import Settings
from core.errors import UserError
from core.evaluation.splits import Splits
from core.files.places import is_url
from core.report.answer.record import STUDY_NAME
from core.volumes.cohort.reader import Cohort
from distributed.run.assignment import PROGRESS
from distributed.run.lock import refuse_url

VERSIONS_OF = ("brainsweep", "ray", "torch", "optuna", "monai", "numpy", "scikit-learn", "nibabel", "nilearn")


@dataclass(frozen=True)
class RunFolder:
    """A run's folder and the names in it."""

    path: Path

    @property
    def about(self) -> dict[str, Any]:
        """The content of run.json."""
        return json.loads((self.path / "run.json").read_text())

    @property
    def journal(self) -> Path:
        """The study's journal file."""
        return self.path / "study.journal"

    def trial(self, name: str) -> Path:
        """The folder of a trial of the search."""
        return self.path / "trials" / name

    def refit(self, method: str) -> Path:
        """The folder of a refit."""
        return self.path / "refits" / method

    def confirmed(self, method: str) -> Path:
        """The folder of a repetition on the search's own folds with fresh seeds."""
        return self.path / "confirmed" / method

    @property
    def access(self) -> Path:
        """Where workers note whom they read first."""
        return self.path / "access"

    def update(self, **changes: Any) -> None:
        """Replace fields of run.json."""
        _write_json(self.path / "run.json", self.about | changes)


def create_run(
    out: Path, kind: str, request: dict[str, Any], settings: Settings, cohort: Cohort
) -> RunFolder:
    """A new run folder with its run.json.

    Raises:
        UserError: the folder exists with something in it, or cannot be written.
    """
    refuse_url(out)
    out = Path(out).resolve()
    if any(part.startswith("_ray_pkg_") for part in out.parts):
        raise UserError(
            f"{out} is deleted with its Ray job; give an absolute --out on storage that all nodes mount"
        )
    if (out / "run.json").exists():
        raise UserError(
            f"{out} already holds a run; continue it with `brainsweep resume {out}` or give another --out"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise UserError(f"the output folder {out} is not empty; give another --out")
        _write_json(out / "run.json", _about(kind, request, settings, cohort, out))
    except OSError as error:
        raise UserError(f"cannot write a run to {out}: {error.strerror or error}") from None
    return RunFolder(out)


def open_run(path: Path) -> RunFolder:
    """An existing run; UserError where there is none."""
    folder = RunFolder(Path(path).resolve())
    try:
        folder.about  # noqa: B018 - read to see that it can be
    except FileNotFoundError:
        raise UserError(f"{path} is not a run: it has no run.json") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}/run.json cannot be read: {error}") from None
    return folder


def cohort_of(folder: RunFolder, given: Path | str | None = None) -> Cohort:
    """The run's cohort: at `given`, else where it was, else where it was as seen from the run's folder.

    A run that was copied or mounted elsewhere with its cohort beside it finds it so; its new place is recorded.

    Raises:
        UserError: it is at none of them, or what is there is another cohort.
    """
    recorded = folder.about["cohort"]
    beside = os.path.normpath(folder.path / recorded.get("from_run", recorded["path"]))
    places = [given] if given is not None else [recorded["path"], beside]
    found = next((place for place in places if is_url(place) or (Path(place) / "cohort.json").exists()), None)
    if found is None:
        raise UserError(
            f"the cohort of {folder.path} is not at {' nor at '.join(map(str, dict.fromkeys(map(str, places))))}; "
            "give its new place with --cohort"
        )
    cohort = Cohort.open(found if is_url(found) else Path(found))
    if cohort.description.hash != recorded["hash"]:
        raise UserError(
            f"{found} holds another cohort than the run began with (or it was changed: hash "
            f"{cohort.description.hash[:8]}, not {recorded['hash'][:8]}); its trials would not be comparable"
        )
    if str(found) != recorded["path"]:
        folder.update(cohort=recorded | {"path": str(found)})
    return cohort


def write_splits(folder: RunFolder, splits: Splits, cohort: Cohort) -> None:
    """Record who is in which fold and who is held out."""
    splits.to_frame(cohort.manifest).to_csv(folder.path / "splits.csv", index=False)


def keep_best(folder: RunFolder, model: Path) -> None:
    """Copy a model's folder to best/, replacing what is there."""
    best = folder.path / "best"
    shutil.rmtree(best, ignore_errors=True)
    shutil.copytree(model, best)


def read_progress(folder: Path) -> dict[str, Any]:
    """A trial's history and finished cells; empty before its first epoch."""
    try:
        return json.loads((folder / PROGRESS).read_text())
    except FileNotFoundError:
        return {"history": [], "cells": [], "answer": None}


def _about(
    kind: str, request: dict[str, Any], settings: Settings, cohort: Cohort, out: Path
) -> dict[str, Any]:
    description = cohort.description
    return {
        "kind": kind,
        "command": " ".join(["brainsweep", *sys.argv[1:]]),
        "created": _now(),
        "begun": kind != "sweep",  # a sweep has once its splits and its first points are written
        "finished": None,
        "seconds": None,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in VERSIONS_OF},
        "code": code_version(),
        "cohort": {
            "path": cohort.address,
            "from_run": cohort.address if is_url(cohort.address) else os.path.relpath(cohort.address, out),
            "n": len(cohort),
            **description.model_dump(
                mode="json", include={"name", "hash", "synthetic", "spacing", "shape", "source"}
            ),
            "channels": list(description.channels),
            "preprocessing": description.preprocessing,
        },
        "settings": settings,
        "sweep": request,
        "study": STUDY_NAME,
        "changes": [],
        "best": None,
    }


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def code_version() -> dict[str, Any]:
    """The commit of the source tree this runs from, empty when it is not a git checkout, and what it holds.

    Ray leaves .git out of what it uploads: inside a submitted job only `sources` tells two versions apart.
    """
    here = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for package in ("core", "distributed", "search_spaces"):
        for path in sorted((here.parent / package).rglob("*.py")):
            digest.update(path.relative_to(here.parent).as_posix().encode() + path.read_bytes())
    sources = digest.hexdigest()[:12]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "--short=12", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "-uno")),
            "sources": sources,
        }
    except FileNotFoundError:
        return {"commit": "", "dirty": False, "sources": sources}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(content, indent=2, default=str))
    beside.replace(path)
