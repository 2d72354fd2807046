"""A training step of a segmentation against a plain MONAI loop, patches by bytes, and a trial without a network.

    python -m benchmarks.segmentation

Steps: the same network, loss, optimiser and patch size on the same volumes in memory. Ours is an epoch of
`CellTraining` as a slot runs it: the plan, reading, normalisation, views, maps, the noted parts of the loss. The plain
loop has MONAI's dictionary transforms for crops and flips. They take turns; what is printed are medians, and the median
of ratios.

Patches: bytes per second of boxes and of whole volumes, in turns: copied out of resident memory, and as the batches of
float32 that a training step gets.

Trials: a sweep of `tissue_age`; the time from one trial's end to the next one's, beside the fits of its cells alone.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from monai.data.utils import list_data_collate
from monai.losses.dice import DiceCELoss
from monai.transforms.compose import Compose
from monai.transforms.croppad.dictionary import RandSpatialCropd
from monai.transforms.spatial.dictionary import RandFlipd
from rich.console import Console

from core.config import merge, resolve
from core.models.segmenter import build_segmenter
from core.report.answer.record import read_run
from core.run_settings import RunSettings
from core.tasks import find_task
from core.tasks.tissue_age import regressor_of
from core.volumes.cohort.reader import Cohort
from core.volumes.phantom.cohort import write_phantom_cohort
from core.volumes.phantom.settings import PhantomSettings
from distributed.batches.hold import read_ahead
from distributed.batches.in_process import InMemory
from distributed.batches.plan import Part
from distributed.batches.resident import Resident
from distributed.run.assignment import Cell
from distributed.search.study import recorded_settings
from distributed.slots.cluster import connect
from distributed.sweeps.launch import Launch
from distributed.sweeps.request import SweepRequest
from distributed.sweeps.resolve import splits_of
from distributed.sweeps.sweep import run_sweep
from distributed.training.loop import CellTraining
from distributed.training.subjects import Place, Subjects
from search_spaces import load_space, published

SUBJECTS, PATCH, BATCH = 16, 32, 2
CUT = 64
"""Side of the patches whose bytes are counted."""
FEW, FOLDS = 5, 5
"""Trials of a sweep of tables before those that are timed, and its folds."""
SETTINGS = {
    "model.name": "dynunet", "model.width": 0.25, "model.depths": 1, "objective.name": "dice_cross_entropy",
    "views.crop_size": PATCH, "views.pad_to": PATCH, "views.flip": 0.5, "data.balanced": "site",
    "training.batch_size": BATCH, "training.epochs": 100,
}  # fmt: skip


def main() -> None:
    """Run all three."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9, help="turns of every contender")
    parser.add_argument("--trials", type=int, default=60, help="timed trials of the sweep of tables")
    options = parser.parse_args()
    console = Console(width=120)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        brains = write_phantom_cohort(
            Path(place) / "tissue",
            PhantomSettings(subjects=SUBJECTS, spacing=4.0, kind="tissue", channels=("t1w",)),
        )
        steps(brains, options.rounds, console)
        with connect(None, Console(quiet=True)):
            fine = PhantomSettings(subjects=2 * SUBJECTS, spacing=2.0, kind="tissue", channels=("t1w",))
            patches(write_phantom_cohort(Path(place) / "fine", fine), options.rounds, console)
        # Every sweep starts Ray itself.
        tables(Path(place), options.trials, console)


def steps(brains: Cohort, rounds: int, console: Console) -> None:
    """Seconds of a training step, ours and plain."""
    settings = resolve(merge(published("tissue"), SETTINGS))
    splits = splits_of(SweepRequest(folds=2), brains.manifest, "site")
    volumes = InMemory.of(brains, find_task("segmentation").needed_maps(settings))
    subjects = Subjects.of(brains, splits, volumes)
    torch.manual_seed(0)
    training = CellTraining(settings, subjects, Cell(0, 0), Place())
    rows = training.training_rows
    count = -(-len(rows) // BATCH)
    plain = _plain_loop(brains, rows)
    ours, theirs = [], []
    for turn in range(rounds + 1):
        for contender, took in ((training.run_epoch, ours), (plain, theirs)):
            began = time.perf_counter()
            contender()
            if turn:
                took.append((time.perf_counter() - began) / count)
    training.close()
    ratio = statistics.median(mine / other for mine, other in zip(ours, theirs, strict=True))
    console.print(
        f"a training step on {BATCH} patches of {PATCH}^3: ours {1000 * statistics.median(ours):.1f} ms, plain MONAI "
        f"{1000 * statistics.median(theirs):.1f} ms, ratio {ratio:.3f} ({rounds} rounds of {count} steps)"
    )


def _plain_loop(brains: Cohort, rows: np.ndarray) -> Callable[[], object]:
    """An epoch as one writes it with MONAI."""
    settings = resolve(merge(published("tissue"), SETTINGS))
    torch.manual_seed(0)
    model = build_segmenter(settings.model, 1, 4)  # type: ignore[attr-defined]
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    loss = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)
    names = ["image", "label"]
    change = Compose(
        [RandSpatialCropd(names, (PATCH,) * 3, random_size=False), RandFlipd(names, prob=0.5, spatial_axis=0)]
    )
    images = torch.from_numpy(brains.read(rows))
    mean = images.flatten(1).mean(1)[:, None, None, None, None]
    labels = torch.from_numpy(brains.read_map("dseg", rows).astype(np.int16))[:, None]
    items = [{"image": image, "label": label} for image, label in zip(images - mean, labels, strict=True)]
    draws = np.random.default_rng(0)

    def epoch() -> None:
        model.train()
        for part in np.array_split(draws.permutation(len(items)), -(-len(items) // BATCH)):
            batch = list_data_collate([change(items[number]) for number in part])
            optimiser.zero_grad(set_to_none=True)
            value = loss(model(batch["image"].float()), batch["label"].float())
            value.backward()
            optimiser.step()

    return epoch


def patches(brains: Cohort, rounds: int, console: Console) -> None:
    """Bytes per second of boxes and of whole volumes: copied, and as batches on their way to a training step."""
    resident = Resident.of(brains, ("dseg",))
    draws, rows = np.random.default_rng(0), np.arange(len(brains))
    grid = brains.volume_shape[1:]

    def box() -> tuple[slice, slice, slice]:
        x, y, z = (int(draws.integers(side - CUT + 1)) for side in grid)
        return slice(x, x + CUT), slice(y, y + CUT), slice(z, z + CUT)

    def parts(boxed: bool) -> Iterator[Part]:
        for begin in range(0, len(rows), 4):
            part = rows[begin : begin + 4]
            yield part, [box() for _ in part] if boxed else None

    def copied(boxed: bool) -> int:
        return sum(resident.read(part, boxes=boxes).nbytes for part, boxes in parts(boxed))

    def ready(boxed: bool) -> int:
        batches = read_ahead(resident, parts(boxed), torch.device("cpu"))
        return sum(batch.volumes.float().nbytes for batch in batches)

    for what, read in (("copied out of resident memory", copied), ("ready for a step, as float32", ready)):
        rates: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(rounds):
            for boxed, of_turns in rates.items():
                began, read_bytes = time.perf_counter(), 0
                while time.perf_counter() - began < 0.2:
                    read_bytes += read(boxed)
                of_turns.append(read_bytes / (time.perf_counter() - began) / 1e9)
        ratio = statistics.median(cut / whole for whole, cut in zip(*rates.values(), strict=True))
        console.print(
            f"{what}: patches of {CUT}^3 at {statistics.median(rates[True]):.2f} GB/s, whole volumes of "
            f"{'x'.join(map(str, grid))} at {statistics.median(rates[False]):.2f} GB/s, ratio {ratio:.2f}"
        )


def tables(place: Path, more: int, console: Console) -> None:
    """What a trial of `tissue_age` takes, and the fits of its cells alone."""
    brains = write_phantom_cohort(
        place / "people", PhantomSettings(subjects=160, spacing=8.0, kind="tissue", channels=("t1w",))
    )
    _, base = load_space("tissue_age")
    ages = brains.manifest["age"].to_numpy(float)
    for slots in (1, 2):
        request = SweepRequest(
            task="tissue_age", trials=FEW + more, folds=FOLDS, slots=slots, sampler="random"
        )
        folder = run_sweep(Launch(brains.address, request, place / f"run-{slots}", None, Console(quiet=True)))
        study = read_run(folder.path).study
        assert study is not None
        # From one end to another, so that everything between two trials counts, and what Ray takes to start does not.
        trials = sorted(
            study.get_trials(deepcopy=False), key=lambda trial: trial.datetime_complete or datetime.max
        )
        last, first = trials[-1].datetime_complete, trials[FEW - 1].datetime_complete
        assert first is not None
        assert last is not None
        took = (last - first).total_seconds() / more
        fits = [_fit_alone(resolve(recorded_settings(trial, base)), brains, ages) for trial in trials[FEW:]]
        alone = statistics.mean(fits) / slots
        console.print(
            f"a trial of tissue_age on {FOLDS} folds in each of {slots} slots: one more every {1000 * took:.0f} ms; "
            f"its fits alone take {1000 * alone:.0f} of them, all else {1000 * (took - alone):.0f} ({more} trials)"
        )


def _fit_alone(settings: RunSettings, brains: Cohort, ages: np.ndarray) -> float:
    """The seconds that the fits and predictions of a trial take."""
    features = find_task("tissue_age").features(settings, brains.manifest)
    assert features is not None
    began = time.perf_counter()
    for fold in range(FOLDS):
        chosen = np.arange(len(ages)) % FOLDS != fold
        regressor = regressor_of(settings.regressor).fit(features[chosen], ages[chosen])  # type: ignore[attr-defined]
        regressor.predict(features[~chosen])
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
