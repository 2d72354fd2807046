"""Volumes per second that reach a training loop: ours against h5py, the DataLoader of torch and MONAI's CacheDataset.

    python -m benchmarks.data

Every contender gives the same: all volumes of a cohort (91 x 109 x 91 random voxels, float16, not compressed, in the
page cache) in shuffled batches of 16, as torch tensors of the stored type. One value per memory page is read. The
yardstick is "raw h5py": single volumes without batches. Ours compare every volume with its checksum (streaming and
direct: at every read; resident: once); the others check nothing. Each contender runs `EPOCHS` epochs after a warm-up
epoch. The contenders take turns several times; the table has the medians.

A second table compares, in turns as well: what each source gives without maps and with one map beside every volume
(bytes of the shards per second), and what one slice across each axis takes of the time of a
volume. Along X, Y and Z a slice is one piece of the file, 91 pieces, or single voxels all over it.
At last the same for the reader alone, without the thread that hands batches over.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import psutil
import ray
import torch
from monai.data import CacheDataset
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from core.volumes.cohort.moments import pooled_statistics
from core.volumes.cohort.reader import Box, Boxes, Cohort
from core.volumes.cohort.writer import CohortWriter
from distributed.batches.hold import batches
from distributed.batches.in_process import Direct, Volumes
from distributed.batches.plan import Cut, Plan, Rows
from distributed.batches.resident import Resident
from distributed.batches.streaming import Streaming
from distributed.slots.cluster import connect

SHAPE = (91, 109, 91)
BATCH = 16
EPOCHS = 5
TRIALS = 4
MAP = "dseg"
# Values of float16.
VALUES_PER_PAGE = 2048

Batches = Iterator[torch.Tensor]


class Shards(Dataset):
    """Volumes by row, from files that stay open: the usual way to use h5py in a DataLoader."""

    def __init__(self, cohort: Cohort) -> None:
        self.files = [cohort.folder / "shards" / shard for shard in cohort.manifest["shard"]]
        self.positions = cohort.manifest["position"].tolist()
        self.opened: dict[Path, Any] = {}

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> torch.Tensor:
        file = self.files[row]
        if file not in self.opened:
            self.opened[file] = h5py.File(file, "r", locking=False)["volumes"]
        return torch.from_numpy(self.opened[file][self.positions[row]])


def write_cohorts(folder: Path, volumes: int) -> dict[str, Cohort]:
    """The same random volumes as HDF5 and as Parquet."""
    cohorts = {}
    for storage in ("hdf5", "parquet"):
        generator = np.random.default_rng(0)
        writer = CohortWriter(
            folder / storage, name="random", channels=("T1w",), shape=SHAPE, spacing=2.0, affine=np.eye(4),
            synthetic=True, volumes_per_shard=32, storage=storage, maps=(MAP,),
        )  # fmt: skip
        with writer:
            for row in range(volumes):
                volume = generator.random((1, *SHAPE), dtype=np.float32)
                classes = (volume[0] * 4).astype(np.int16)
                writer.add(volume, subject=f"{row:04d}", age=float(20 + row % 60), maps={MAP: classes})
        cohorts[storage] = Cohort.open(folder / storage)
    return cohorts


def h5py_alone(cohort: Cohort, rows: np.ndarray, epochs: int) -> Batches:
    """Single volumes; their batches are only for counting."""
    shards = Shards(cohort)
    for _ in range(epochs):
        for row in rows:
            yield shards[int(row)][None]


def loader(dataset: Dataset, workers: int, epochs: int) -> Batches:
    """A shuffling DataLoader."""
    made = DataLoader(dataset, BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    for _ in range(epochs):
        yield from made


def ours(
    volumes: Volumes, rows: int, epochs: int, maps: Sequence[str] = (), cut: Cut | None = None
) -> Iterator[torch.Tensor]:
    """The volumes as a training worker gets them; of their `maps` one value per memory page is read here."""
    plan = Plan(np.arange(rows), BATCH, 0, range(1, epochs + 1), cut=cut)
    for batch in batches(volumes, plan, torch.device("cpu"), maps):
        for several in batch.maps.values():
            several.view(-1)[::VALUES_PER_PAGE].sum()
        yield batch.volumes


def rate_of(reading: Batches, volumes: int) -> float:
    """Volumes per second, without the first epoch."""
    seen, started = 0, 0.0
    for batch in reading:
        batch.view(-1)[::VALUES_PER_PAGE].sum()
        if not started and seen >= volumes:
            started, seen = time.perf_counter(), 0
        seen += len(batch)
    return seen / (time.perf_counter() - started)


class OneSlice:
    """Of every scan one slice across an axis, another one in every pass."""

    def __init__(self, axis: int) -> None:
        self.axis = axis

    def __call__(self, rows: Rows, number: int) -> Sequence[Boxes]:
        """See `Cut`."""
        at = np.random.default_rng((number, self.axis)).integers(0, SHAPE[self.axis], len(rows))
        return [[self._box(int(place))] for place in at]

    def _box(self, place: int) -> Box:
        x, y, z = (
            slice(place, place + 1) if axis == self.axis else slice(0, SHAPE[axis]) for axis in range(3)
        )
        return x, y, z


def maps_and_slices(
    cohorts: dict[str, Cohort], resident: Resident
) -> dict[str, tuple[Callable[[], Batches], Callable[[], Batches]]]:
    """By name what is compared: whole volumes alone, and beside them a map, or a slice of each instead."""
    count, known, epochs = len(cohorts["hdf5"]), resident.known, EPOCHS + 1
    with_map = Resident.of(cohorts["hdf5"], (MAP,))
    sources: dict[str, tuple[Volumes, Volumes]] = {"resident": (resident, with_map)}
    for storage, cohort in cohorts.items():
        direct, streaming = Direct(cohort.address, known), Streaming(cohort.address, known)
        sources |= {f"direct, {storage}": (direct, direct), f"streaming, {storage}": (streaming, streaming)}

    def read(volumes: Volumes, *options: Any) -> Callable[[], Batches]:
        return lambda: ours(volumes, count, epochs, *options)

    pairs = {f"{name}, one map": (read(alone), read(more, (MAP,))) for name, (alone, more) in sources.items()}
    for name, (alone, _) in sources.items():
        if name != "streaming, parquet":
            pairs |= {
                f"{name}, a slice across {'XYZ'[axis]}": (read(alone), read(alone, (), OneSlice(axis)))
                for axis in range(3)
            }
    return pairs


def contenders(cohorts: dict[str, Cohort], resident: Resident) -> dict[str, Callable[[], Batches]]:
    """The function that starts each contender, by name; the first one is the yardstick."""
    hdf5, parquet = cohorts["hdf5"], cohorts["parquet"]
    count, known, epochs = len(hdf5), resident.known, EPOCHS + 1
    shards = Shards(hdf5)
    cached = CacheDataset(range(count), shards.__getitem__, num_workers=1, progress=False, copy_cache=False)
    shuffled = np.random.default_rng(0).permutation(count)
    return {
        "raw h5py, in order": lambda: h5py_alone(hdf5, np.arange(count), epochs),
        "h5py, shuffled": lambda: h5py_alone(hdf5, shuffled, epochs),
        "DataLoader, 0 workers": lambda: loader(Shards(hdf5), 0, epochs),
        "DataLoader, 1 worker": lambda: loader(Shards(hdf5), 1, epochs),
        "DataLoader, 2 workers": lambda: loader(Shards(hdf5), 2, epochs),
        "MONAI CacheDataset": lambda: loader(cached, 0, epochs),
        "resident": lambda: ours(resident, count, epochs),
        "direct, HDF5": lambda: ours(Direct(hdf5.address, known), count, epochs),
        "direct, Parquet": lambda: ours(Direct(parquet.address, known), count, epochs),
        "streaming, HDF5": lambda: ours(Streaming(hdf5.address, known), count, epochs),
        "streaming, Parquet": lambda: ours(Streaming(parquet.address, known), count, epochs),
    }


@ray.remote(num_cpus=0)
class Worker:
    """A slot's worker, which outlives its trials."""

    def trial(self, volumes: Volumes, rows: int, epochs: int) -> float:
        """Seconds from the trial's start to its first batch, statistics included; then reads all its epochs."""
        started = time.perf_counter()
        pooled_statistics(volumes.moments(np.arange(rows)))
        reading = ours(volumes, rows, epochs)
        next(reading)
        seconds = time.perf_counter() - started
        for _ in reading:
            pass
        return seconds


def bytes_read() -> dict[tuple[int, float], int]:
    """The bytes that each process of this session has read by system calls, including those from the page cache."""
    counts = {}
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            counts[process.pid, process.create_time()] = process.io_counters().read_chars
    return counts


def count_reads(cohort: Cohort, console: Console) -> Resident:
    """Hold the cohort, run `TRIALS` trials on it, two at a time, and count the bytes that were read."""
    workers = [Worker.remote() for _ in range(2)]  # type: ignore[attr-defined]
    ray.get([worker.__ray_ready__.remote() for worker in workers])
    # After this the reading processes have imported what they need.
    Resident.of(cohort)
    before = bytes_read()
    resident = Resident.of(cohort)
    held = bytes_read()
    starts = ray.get(
        [workers[trial % 2].trial.remote(resident, len(cohort), EPOCHS) for trial in range(TRIALS)]
    )
    after = bytes_read()
    size = sum(file.stat().st_size for file in (cohort.folder / "shards").iterdir())

    def increase(earlier: dict[tuple[int, float], int], later: dict[tuple[int, float], int]) -> float:
        return sum(count - earlier.get(process, 0) for process, count in later.items()) / size

    console.print(
        f"{TRIALS} resident trials of {EPOCHS} epochs: read {increase(before, held):.2f} times the shards' bytes to "
        f"hold them and {increase(held, after):.2f} times to train (system calls of all its processes)\n"
        f"a trial's data started in {', '.join(f'{seconds:.3f}' for seconds in starts)} s"
    )
    for worker in workers:
        ray.kill(worker)
    return resident


def main() -> None:
    """Run everything, print the table."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    arguments.add_argument("--volumes", type=int, default=416)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument(
        "--folder", type=Path, help="where the cohorts are kept; a temporary one if absent"
    )
    given = arguments.parse_args()
    torch.set_num_threads(1)
    console = Console()
    with tempfile.TemporaryDirectory() as temporary, connect(None, console):
        folder = given.folder or Path(temporary)
        if (folder / "parquet" / "cohort.json").exists():
            cohorts = {storage: Cohort.open(folder / storage) for storage in ("hdf5", "parquet")}
        else:
            cohorts = write_cohorts(folder, given.volumes)
        resident = count_reads(cohorts["hdf5"], console)
        rates: dict[str, list[float]] = {}
        for _ in range(given.rounds):
            for name, start in contenders(cohorts, resident).items():
                rates.setdefault(name, []).append(rate_of(start(), len(cohorts["hdf5"])))
                gc.collect()
        print_table(rates, console)
        compared = maps_and_slices(cohorts, resident)
        pairs: dict[str, list[tuple[float, ...]]] = {name: [] for name in compared}
        for _ in range(given.rounds):
            for name, both in compared.items():
                pairs[name].append(tuple(rate_of(start(), len(cohorts["hdf5"])) for start in both))
                gc.collect()
        print_pairs(pairs, console)
        print_slices(cohorts["hdf5"], 9 * given.rounds, console)


def print_slices(cohort: Cohort, rounds: int, console: Console) -> None:
    """What the reader alone takes for a slice, beside a volume that it compares with its checksum as by default.

    Of 28,208 cache lines of a volume a slice across X has 310, one across Y about 340, and one across Z 9,919: each of
    its voxels lies in another one.
    """
    whole = np.empty((BATCH, 1, *SHAPE), np.float16)
    console.print("the reader alone, of one shard:")
    for axis in range(3):
        one = OneSlice(axis)
        out = np.empty(
            (BATCH, 1, *(1 if each == axis else side for each, side in enumerate(SHAPE))), np.float16
        )
        took: list[tuple[float, float]] = []
        for number in range(rounds + 1):
            rows = np.arange(BATCH)
            boxes = [box for (box,) in one(rows, number)]
            began = time.perf_counter()
            cohort.read_stored(rows, out=whole)
            between = time.perf_counter()
            cohort.read_stored(rows, out=out, boxes=boxes)
            took.append((between - began, time.perf_counter() - between))
        ratio = statistics.median(volume / of_slice for volume, of_slice in took[1:])
        microseconds = 1e6 * statistics.median(of_slice for _, of_slice in took[1:]) / BATCH
        console.print(f"  a slice across {'XYZ'[axis]} in {microseconds:.0f} us, 1/{ratio:.0f} of a volume")


def print_pairs(pairs: dict[str, list[tuple[float, ...]]], console: Console) -> None:
    """Print the medians of both, and the median of their ratios in each round."""
    table = Table(
        "source",
        "volumes/s",
        "with it/s",
        "by bytes",
        "time of a slice / of a volume",
        title="beside or instead",
    )
    for name, rounds in pairs.items():
        alone, other = (statistics.median(column) for column in zip(*rounds, strict=True))
        ratio = statistics.median(two / one for one, two in rounds)
        # In Parquet, which has no int16, a map takes twice the bytes of a volume.
        of_both = 3 if "parquet" in name else 2
        figures = (f"{of_both * ratio:.2f}", "") if name.endswith("map") else ("", f"1/{ratio:.0f}")
        table.add_row(name, f"{alone:,.0f}", f"{other:,.0f}", *figures)
    console.print(table)


def print_table(rates: dict[str, list[float]], console: Console) -> None:
    """Print the medians, and their ratios to the yardstick and to the best DataLoader."""
    medians = {name: statistics.median(values) for name, values in rates.items()}
    raw = next(iter(medians.values()))
    best = max(median for name, median in medians.items() if name.startswith("DataLoader"))
    title = f"{len(rates)} contenders, {EPOCHS} epochs at a time"
    table = Table("contender", "volumes/s", "least", "most", "x raw h5py", "x best DataLoader", title=title)
    for name, values in rates.items():
        figures = (medians[name], min(values), max(values))
        table.add_row(
            name,
            *(f"{value:,.0f}" for value in figures),
            f"{medians[name] / raw:.2f}",
            f"{medians[name] / best:.2f}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
