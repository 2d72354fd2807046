"""From a folder of scans to a cohort: check, preprocess and store every subject, and say who was left out."""

from __future__ import annotations

import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from core.errors import UserError
from core.volumes.bids import Listing, Reject, Scan, list_scans
from core.volumes.cohort import DESCRIPTION, Cohort
from core.volumes.cohort_writer import CohortWriter
from core.volumes.nifti import read_geometry, read_volume
from core.volumes.preprocess import PreparedVolume, Preprocessing, covers_template_field, prepare_volume
from core.volumes.shards import fingerprint, replacing, writing_to
from core.volumes.stored import StoredType

REJECTS = "rejects.csv"
LOW_COVERAGE = 0.95

Progress = Callable[[int, int, str], None]
"""Called with (subjects done, subjects in all, subject)."""


@dataclass(frozen=True)
class IngestReport:
    """What ingest did."""

    cohort: Cohort
    rejects: tuple[Reject, ...]
    """Subjects left out; the same lines as `rejects.csv` in the cohort's folder."""
    notes: tuple[str, ...] = ()
    """Lines worth a person's attention, such as brains that reach out of the grid."""
    already_there: bool = False
    """True if the folder held this very cohort, so that nothing was done."""


def ingest(
    source: str | Path,
    out: str | Path,
    preprocessing: Preprocessing,
    *,
    suffix: str | None = None,
    age_column: str = "age",
    strict: bool = False,
    dtype: StoredType = "float16",
    on_progress: Progress | None = None,
) -> IngestReport:
    """Turn a BIDS-like folder into a cohort in `out`, one row per subject, in order of subject.

    Subjects that cannot be used (no or several images, unreadable, NaN, 4D, no usable age, …) are left
    out and listed in `out`/rejects.csv; with `strict` the first of them is a UserError. So is a source
    that cannot be used as a whole, no usable subject at all, or an output folder that cannot be written
    or holds anything else; a folder that holds this very cohort is left as it is. Same input, settings
    and versions, same bytes.

    The manifest gets the columns of participants.tsv and: `coverage`, the fraction of the brain's voxels
    inside the grid, and `origin_x/y/z`, the last column of the affine that maps the subject's voxels to
    the mm of its own image (the rest of that affine is the spacing).
    """
    listing = list_scans(source, suffix, age_column)
    if strict and listing.rejects:
        raise _as_error(listing.source, listing.rejects[0])
    preprocessing = resolve_centre(preprocessing, listing.scans)
    out = Path(out)
    request = _request(listing, preprocessing, age_column, dtype)
    if (out / DESCRIPTION).exists():
        return _existing(out, request)
    _check_room(out, len(listing.scans), preprocessing, dtype)
    rejects = list(listing.rejects)
    with CohortWriter(
        out,
        name=out.resolve().name,
        channels=[listing.suffix],
        shape=preprocessing.shape,
        spacing=preprocessing.spacing,
        affine=preprocessing.affine,
        dtype=dtype,
        preprocessing=preprocessing.settings,
        source=str(listing.source.resolve()),
        provenance={"request": request, "suffix": listing.suffix, "age_column": age_column},
    ) as writer:
        for done, (scan, prepared) in enumerate(_prepare_all(listing.scans, preprocessing), start=1):
            if isinstance(prepared, PreparedVolume):
                _add(writer, scan, prepared, listing.source)
            else:
                rejects.append(Reject(scan.subject, _relative(scan.path, listing.source), str(prepared)))
                if strict:
                    raise _as_error(listing.source, rejects[-1])
            if on_progress is not None:
                on_progress(done, len(listing.scans), scan.subject)
        rejects.sort(key=lambda reject: reject.subject)
        _write_rejects(out, rejects)
        if len(rejects) and not writer._scans:
            raise UserError(
                f"no usable subject in {listing.source}: all {len(rejects)} are in {out / REJECTS}; "
                f"the first: {rejects[0].subject}: {rejects[0].reason}"
            )
    cohort = Cohort.open(out)
    return IngestReport(cohort, tuple(rejects), _notes(cohort))


def prepare_subject(scan: Scan, preprocessing: Preprocessing) -> PreparedVolume:
    """One subject from file to grid; a pure function of the file and the settings. UserError says why not."""
    voxels, affine = read_volume(scan.path)
    try:
        return prepare_volume(voxels, affine, preprocessing)
    except UserError as error:
        raise UserError(f"{scan.path}: {error}") from error


def resolve_centre(preprocessing: Preprocessing, scans: Sequence[Scan]) -> Preprocessing:
    """Settle `centre="auto"` for a whole cohort: brains placed in two ways would differ by their placing."""
    if preprocessing.centre != "auto":
        return preprocessing
    placed = {scan.subject: covers for scan in scans if (covers := _covers_template(scan)) is not None}
    outside = [subject for subject, covers in placed.items() if not covers]
    if 0 < len(outside) < len(placed):
        raise UserError(
            f"{len(placed) - len(outside)} of {len(placed)} images cover the MNI152 field of view, others "
            f"do not (such as {outside[0]}); choose centre=brain or centre=world"
        )
    return preprocessing.model_copy(update={"centre": "brain" if outside or not placed else "world"})


def _covers_template(scan: Scan) -> bool | None:
    try:
        return covers_template_field(*read_geometry(scan.path))
    except UserError:
        return None  # it will be rejected, with its reason, when its voxels are read


def _prepare_all(
    scans: Sequence[Scan], preprocessing: Preprocessing
) -> Iterator[tuple[Scan, PreparedVolume | UserError]]:
    """Prepare in threads (gzip and scipy release the GIL), in order, a few ahead: memory stays bounded."""
    workers = min(8, os.cpu_count() or 1)
    waiting: deque[tuple[Scan, Future[PreparedVolume]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for scan in scans:
                waiting.append((scan, pool.submit(prepare_subject, scan, preprocessing)))
                if len(waiting) > 2 * workers:
                    yield _outcome(*waiting.popleft())
            while waiting:
                yield _outcome(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def _outcome(scan: Scan, future: Future[PreparedVolume]) -> tuple[Scan, PreparedVolume | UserError]:
    try:
        return scan, future.result()
    except UserError as error:
        return scan, error


def _add(writer: CohortWriter, scan: Scan, prepared: PreparedVolume, source: Path) -> None:
    x, y, z = prepared.affine[:3, 3].tolist()
    writer.add(
        prepared.voxels[np.newaxis],
        subject=scan.subject,
        age=scan.age,
        sex=scan.sex,
        site=scan.site,
        source=_relative(scan.path, source),
        coverage=prepared.coverage,
        origin_x=x,
        origin_y=y,
        origin_z=z,
        **scan.extra,
    )


def _request(listing: Listing, preprocessing: Preprocessing, age_column: str, dtype: str) -> str:
    """Identity of what was asked for, to know the cohort again: settings, labels and the files' sizes."""
    return fingerprint({
        "source": str(listing.source.resolve()),
        "participants": listing.participants_hash,
        "files": [[_relative(scan.path, listing.source), _size(scan.path)] for scan in listing.scans],
        "settings": [preprocessing.hash, listing.suffix, age_column, dtype],
    })  # fmt: skip


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _existing(out: Path, request: str) -> IngestReport:
    cohort = Cohort.open(out)
    if cohort.description.provenance.get("request") != request:
        raise UserError(
            f"{out} already holds a cohort made from other files or settings ({len(cohort)} subjects of "
            f"{cohort.description.source}); choose another folder or delete it"
        )
    lines = pd.read_csv(out / REJECTS, dtype=str, keep_default_na=False) if (out / REJECTS).exists() else None
    rejects = () if lines is None else tuple(Reject(*line) for line in lines.itertuples(index=False))
    return IngestReport(cohort, rejects, _notes(cohort), already_there=True)


def _check_room(out: Path, subjects: int, preprocessing: Preprocessing, dtype: str) -> None:
    needed = subjects * math.prod(preprocessing.shape) * np.dtype(dtype).itemsize
    existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if (free := shutil.disk_usage(existing).free) < needed:
        raise UserError(
            f"{out} needs {needed / 1e6:,.1f} MB for {subjects} volumes, but {free / 1e6:,.1f} MB are free"
        )


def _write_rejects(out: Path, rejects: Sequence[Reject]) -> None:
    table = pd.DataFrame([vars(reject) for reject in rejects], columns=["subject", "file", "reason"])
    with writing_to(out), replacing(out / REJECTS) as temporary:
        table.to_csv(temporary, index=False)


def _notes(cohort: Cohort) -> tuple[str, ...]:
    cut = cohort.manifest[cohort.manifest["coverage"] < LOW_COVERAGE]
    if cut.empty:
        return ()
    worst = cut.sort_values("coverage").iloc[0]
    return (
        f"{len(cut)} of {len(cohort)} brains reach out of the grid, most of all {worst['subject']} "
        f"({worst['coverage']:.0%} inside); are the images brain-extracted, and is the grid large enough?",
    )


def _as_error(source: Path, reject: Reject) -> UserError:
    return UserError(f"{source}: {reject.subject}: {reject.reason}")


def _relative(path: Path, source: Path) -> str:
    return str(path.relative_to(source))
