"""From a listing of scans to a cohort, shard by shard, so that a finished shard is never made again.

The listing is cut into slices, one per shard. `write_shard_of` prepares the scans of a slice and writes the
shard, then a record of it; a run that was interrupted at any moment continues with the slices that have no
record. The cohort depends only on the files and the settings, not on which process wrote which shard.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from core.errors import UserError
from core.files.fingerprint import fingerprint
from core.files.places import is_url
from core.files.tables import read_table, write_table
from core.files.writing import replacing, writing_to
from core.volumes.cohort.description import DESCRIPTION, REJECTS, SHARDS, CohortDescription
from core.volumes.cohort.formats import Compression, Storage, StoredType
from core.volumes.cohort.reader import Cohort
from core.volumes.cohort.writer import (
    SHARD_BYTES,
    UNFINISHED,
    claim_folder,
    describe_cohort,
    discard_shards,
    finish_cohort,
    volume_bytes,
)
from core.volumes.images.preprocess import Preprocessing, covers_template_field
from core.volumes.ingest.request import newest_file, request_of, times_of
from core.volumes.ingest.shards import ShardRecord, ShardTask, as_error, read_record, write_shard_of
from core.volumes.sources import Listing, Reject, Scan, read_image_geometry

REQUEST = "request.json"
LOW_COVERAGE = 0.95
PLAUSIBLE_LITRES = (0.2, 8.0)
"""Of what is not background: from the brain of a newborn to a head with its neck."""
MOST_VOLUMES, FEWEST_VOLUMES, ENOUGH_SHARDS = 256, 4, 32

OnProgress = Callable[[int, int, str], None]
"""Called with (scans done, scans in all, subject of the last one) whenever a shard is finished."""


@dataclass(frozen=True)
class IngestReport:
    """What ingest did."""

    cohort: Cohort
    rejects: tuple[Reject, ...]
    """Subjects left out; the same lines as `rejects.csv` in the cohort's folder."""
    notes: tuple[str, ...] = ()
    """Lines that the user should read, such as brains that extend beyond the grid."""
    already_there: bool = False
    """True if the folder already held the same cohort, so that nothing was done."""


Runner = Callable[[Sequence[ShardTask]], Iterator[ShardRecord]]
"""Runs `write_shard_of` for each task, in any order and any process, and yields the records."""


def one_after_another(tasks: Sequence[ShardTask]) -> Iterator[ShardRecord]:
    """Run the tasks in this process."""
    return map(write_shard_of, tasks)


def ingest(
    listing: Listing,
    out: str | Path,
    preprocessing: Preprocessing,
    *,
    dtype: StoredType = "float16",
    storage: Storage = "hdf5",
    compression: Compression = "none",
    strict: bool = False,
    on_progress: OnProgress | None = None,
    run: Runner = one_after_another,
) -> IngestReport:
    """Turn a listing into a cohort in the folder `out`, one row per scan, in the order of the listing.

    Scans that cannot be used (unreadable, NaN, 4D, no brain in the grid, …) are left out and listed in
    `out`/rejects.csv; with `strict` the first of them is a UserError. So is no usable scan at all, or an
    output folder that is full, cannot be written, holds anything else or is being written by another
    process. Finished shards always stay, and the same call continues after them; if files or settings
    changed in the meantime it starts over, with a note. A folder that holds the same cohort is left as it is.
    The same input, settings and versions give the same bytes, also after interruptions.

    The manifest gets the facts of each scan, its `quality` (`core.volumes.ingest.prepare`), and `affine`: the
    upper three rows, one after the other, of the matrix from the scan's voxels to the mm of its source.
    """
    if is_url(out):
        raise UserError(f"{out} is not a folder: ingest into a folder, then copy it there (`Cohort.copy_to`)")
    if strict and listing.rejects:
        raise as_error(listing.source, listing.rejects[0])
    out = Path(out)
    preprocessing = resolve_centre(preprocessing, listing.scans)
    description = describe_cohort(
        name=out.resolve().name,
        channels=listing.channels,
        shape=preprocessing.shape,
        spacing=preprocessing.spacing,
        affine=preprocessing.affine,
        dtype=dtype,
        storage=storage,
        compression=compression,
        maps=sorted({name for scan in listing.scans for name in scan.maps}),
        preprocessing=preprocessing.settings,
        source=str(listing.source.resolve()),
    )
    request = request_of(listing, description)
    description = description.model_copy(
        update={"provenance": {"request": fingerprint(request), "layout": listing.kind}}
    )
    if (out / DESCRIPTION).exists():
        return _existing(out, listing, description)
    with _claimed(out):
        notes = _start_or_go_on(
            out, {**request, "versions": fingerprint(description.versions)}, listing.scans
        )
        tasks = _tasks(out, listing, description, preprocessing, strict)
        records = _run_all(out, tasks, run, on_progress, listing)
        return _finish(out, listing, description, records, notes)


def volumes_per_shard(volume_bytes: int, scans: int) -> int:
    """About 64 MB, at most 256 volumes, and for small cohorts few enough that many processes have work.

    It depends on the cohort alone, because the same cohort must have the same bytes on every machine.
    """
    by_size = min(max(SHARD_BYTES // volume_bytes, 1), MOST_VOLUMES)
    return min(by_size, max(math.ceil(scans / ENOUGH_SHARDS), FEWEST_VOLUMES))


def resolve_centre(preprocessing: Preprocessing, scans: Sequence[Scan]) -> Preprocessing:
    """Decide `centre="auto"` for a whole cohort: brains placed in two ways would differ by their placement."""
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
        return covers_template_field(*read_image_geometry(scan.images[0]))
    # it will be rejected, with the reason, when its voxels are read
    except UserError:
        return None


def _tasks(
    out: Path, listing: Listing, description: CohortDescription, preprocessing: Preprocessing, strict: bool
) -> list[ShardTask]:
    size = volumes_per_shard(volume_bytes(description), len(listing.scans))
    return [
        ShardTask(
            out.resolve(), index, listing.scans[begin : begin + size], description, preprocessing,
            listing.source.resolve(), strict,
        )
        for index, begin in enumerate(range(0, len(listing.scans), size))
    ]  # fmt: skip


def _run_all(
    out: Path, tasks: Sequence[ShardTask], run: Runner, on_progress: OnProgress | None, listing: Listing
) -> list[ShardRecord]:
    """The records of all tasks, in order; only those that have none yet are run."""
    records = {task.index: record for task in tasks if (record := read_record(out, task.index)) is not None}
    left = [task for task in tasks if task.index not in records]
    done = sum(len(tasks[index].scans) for index in records)
    if left:
        _check_room(out, sum(len(task.scans) for task in left), left[0].description)
    for record in run(left):
        records[record.index] = record
        done += len(tasks[record.index].scans)
        if on_progress is not None:
            on_progress(done, len(listing.scans), tasks[record.index].scans[-1].subject)
    return [records[task.index] for task in tasks]


def _finish(
    out: Path,
    listing: Listing,
    description: CohortDescription,
    records: Sequence[ShardRecord],
    notes: Sequence[str],
) -> IngestReport:
    rejects = sorted(
        [*listing.rejects, *(reject for record in records for reject in record.rejects)],
        key=lambda reject: (reject.subject, reject.file),
    )
    with writing_to(out):
        table = pd.DataFrame([vars(reject) for reject in rejects], columns=["subject", "file", "reason"])
        write_table(table, out / REJECTS)
    written = [record.written for record in records if record.written is not None]
    if not written:
        discard_shards(out)
        first = f"; the first: {rejects[0].subject}: {rejects[0].reason}" if rejects else ""
        raise UserError(
            f"no usable subject in {listing.source}: all {len(rejects)} are in {out / REJECTS}{first}"
        )
    _clear_temporaries(out)
    finish_cohort(out, description, written)
    shutil.rmtree(out / UNFINISHED)
    cohort = Cohort.open(out)
    return IngestReport(cohort, tuple(rejects), (*listing.notes, *notes, *_notes(cohort)))


@contextlib.contextmanager
def _claimed(out: Path) -> Iterator[None]:
    """Lock the folder against other processes; the lock ends with this process, also when it is killed.

    After an error before the first finished shard no files stay behind.
    """
    claim_folder(out)
    with writing_to(out):
        (out / UNFINISHED).mkdir(exist_ok=True)
        lock = (out / UNFINISHED / ".lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{out} is being written by another process; wait for it, or choose another"
            ) from None
        try:
            yield
        except BaseException:
            if not any((out / UNFINISHED).glob("[0-9]*.json")):
                discard_shards(out)
            raise


def _start_or_go_on(out: Path, request: dict[str, str], scans: Sequence[Scan]) -> list[str]:
    """Keep the shards of an unfinished run of the same request; remove those of another one, with a note."""
    path, notes = out / UNFINISHED / REQUEST, []
    asked = {**request, "times": times_of(scans)}
    with writing_to(out):
        before = json.loads(path.read_text()) if path.exists() else None
        if before != asked:
            if before is not None:
                changed = [name for name in asked if before.get(name) != asked[name]]
                notes.append(f"{out} held an unfinished cohort of other {', '.join(changed)}; started over")
            for leftover in (*(out / UNFINISHED).glob("*.json"), *(out / SHARDS).glob("*")):
                leftover.unlink()
            (out / SHARDS).mkdir(exist_ok=True)
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(asked, indent=2))
        _clear_temporaries(out)
    return notes


def _clear_temporaries(out: Path) -> None:
    """Remove temporary files of killed processes; see `replacing`."""
    for folder in (out / SHARDS, out / UNFINISHED):
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)


def _existing(out: Path, listing: Listing, description: CohortDescription) -> IngestReport:
    cohort = Cohort.open(out)
    changed, newest = newest_file(listing.scans)
    other = cohort.description.provenance.get("request") != description.provenance["request"]
    if other or changed > (out / DESCRIPTION).stat().st_mtime_ns:
        why = "made from other files or settings" if other else f"that is older than {newest}"
        raise UserError(
            f"{out} already holds a cohort {why} ({cohort.manifest['subject'].nunique()} subjects of "
            f"{cohort.description.source}); choose another folder or delete it"
        )
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)  # there if ingest was killed in its last step
    lines = read_table(out / REJECTS, ("subject", "file", "reason"))
    rejects = tuple(Reject(*line) for line in lines.itertuples(index=False))
    return IngestReport(cohort, rejects, (*listing.notes, *_notes(cohort)), already_there=True)


def _check_room(out: Path, scans: int, description: CohortDescription) -> None:
    needed, free = scans * volume_bytes(description), shutil.disk_usage(out).free
    if description.compression == "none" and free < needed:
        raise UserError(
            f"{out} needs {needed / 1e6:,.1f} MB for {scans} volumes, but {free / 1e6:,.1f} MB are free"
        )


def _notes(cohort: Cohort) -> tuple[str, ...]:
    manifest, notes = cohort.manifest, []
    cut = manifest[manifest["coverage"] < LOW_COVERAGE]
    if not cut.empty:
        worst = cut.sort_values("coverage").iloc[0]
        notes.append(
            f"{len(cut)} of {len(cohort)} brains reach out of the grid, most of all {worst['subject']} "
            f"({worst['coverage']:.0%} inside); are the images brain-extracted, and is the grid large enough?"
        )
    litres = float(manifest["brain_ml"].median()) / 1000
    if not PLAUSIBLE_LITRES[0] <= litres <= PLAUSIBLE_LITRES[1]:
        notes.append(
            f"half of the brains have {litres:.3g} litres or more; a human one has 1 to 2, a whole head 4 to 6: is the "
            "unit of length, or the mask, right?"
        )
    return tuple(notes)
