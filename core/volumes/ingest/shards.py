"""The unit of work of ingest: a slice of a listing goes in, a shard and a small record of it come out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.errors import UserError
from core.files.writing import replacing, writing_to
from core.volumes.cohort.description import SHARDS, CohortDescription, map_source
from core.volumes.cohort.shards import Fact, Written
from core.volumes.cohort.writer import RESERVED, UNFINISHED, ShardInMemory
from core.volumes.images.preprocess import Preprocessing
from core.volumes.ingest.prepare import prepare_scan
from core.volumes.sources.listing import ImageFile, Reject, Scan


@dataclass(frozen=True)
class ShardTask:
    """One slice of a listing, and all that its shard depends on."""

    folder: Path
    """Of the cohort; absolute."""
    index: int
    scans: tuple[Scan, ...]
    description: CohortDescription
    preprocessing: Preprocessing
    source: Path
    strict: bool


@dataclass(frozen=True)
class ShardRecord:
    """The result of a task; kept as a small file until the cohort is complete."""

    index: int
    written: Written | None
    """None if no scan of the slice can be used."""
    rejects: tuple[Reject, ...]


def write_shard_of(task: ShardTask) -> ShardRecord:
    """Prepare a task's scans one by one and write their shard, then its record, each in one step.

    Raises UserError for a full disk, and with `strict` for a scan that cannot be used.
    """
    shard, rejects = ShardInMemory(task.description), []
    for scan in task.scans:
        try:
            _add(shard, scan, task)
        except UserError as error:
            rejects.append(_reject(scan, task.source, str(error)))
        # an unexpected error of a reader at one damaged file must not stop all others
        except Exception as error:
            rejects.append(
                _reject(scan, task.source, f"cannot be prepared ({type(error).__name__}: {error})")
            )
        if task.strict and rejects:
            raise as_error(task.source, rejects[0])
    with writing_to(task.folder):
        written = shard.write(task.folder / SHARDS, task.index) if len(shard) else None
        record = ShardRecord(task.index, written, tuple(rejects))
        with replacing(_record_path(task.folder, task.index)) as temporary:
            temporary.write_text(_as_json(record))
    return record


def _add(shard: ShardInMemory, scan: Scan, task: ShardTask) -> None:
    prepared = prepare_scan(scan, task.preprocessing)
    facts: dict[str, Fact] = {
        "subject": scan.subject, "session": scan.session, "age": float(scan.age), "sex": scan.sex,
        "site": scan.site, "source": name_of(scan.images[0], task.source),
        **{name: float(value) for name, value in prepared.quality.items()}, **prepared.origin,
        **{
            map_source(name): name_of(scan.maps[name], task.source) if name in scan.maps else ""
            for name in task.description.maps
        },
        "affine": np.asarray(prepared.affine, dtype=np.float64)[:3].reshape(-1).tolist(),
    }  # fmt: skip
    taken = RESERVED | set(facts)
    extra = {f"source_{name}" if name in taken else name: value for name, value in scan.extra.items()}
    shard.add(prepared.voxels, prepared.maps, {**facts, **extra})


def _as_json(record: ShardRecord) -> str:
    written = None if record.written is None else record.written._asdict()
    return json.dumps({"written": written, "rejects": [vars(reject) for reject in record.rejects]})


def read_record(out: Path, index: int) -> ShardRecord | None:
    """The record of a shard that is finished, in any earlier run; None if it is not."""
    path = _record_path(out, index)
    if not path.exists():
        return None
    fields = json.loads(path.read_text())
    written = Written(**fields["written"]) if fields["written"] else None
    return ShardRecord(index, written, tuple(Reject(**reject) for reject in fields["rejects"]))


def _record_path(out: Path, index: int) -> Path:
    return out / UNFINISHED / f"{index:05d}.json"


def _reject(scan: Scan, source: Path, reason: str) -> Reject:
    return Reject(scan.subject, name_of(scan.images[0], source), " ".join(reason.split()))


def as_error(source: Path, reject: Reject) -> UserError:
    """What `strict` raises for a scan that cannot be used."""
    return UserError(f"{source}: {reject.subject}: {reject.reason}")


def name_of(image: ImageFile, source: Path) -> str:
    """The name of an image in the manifest and the rejects: its path below the source, and its row in an array."""
    path = relative(image.path, source)
    return path if image.row is None else f"{path}[{image.row}]"


def relative(path: Path, source: Path) -> str:
    """A path as written in the manifest: relative to the source if it lies below it."""
    path, source = path.absolute(), source.absolute()
    return str(path.relative_to(source) if path.is_relative_to(source) else path)
