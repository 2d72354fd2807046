"""A training step of a segmentation against a plain MONAI loop, patches by bytes, and a trial without a network.

    python -m benchmarks.segmentation

Steps: the same network, loss, optimiser and patch size on the same volumes in memory. Ours is an epoch of
`CellTraining` as a slot runs it: the plan, reading, normalisation, views, maps, the noted parts of the loss. The plain
loop has MONAI's dictionary transforms for crops and flips. They take turns; what is printed are medians, and the median
of ratios.

Patches: bytes per second of boxes and of whole volumes out of resident memory, in turns.

Trials: two sweeps of `tissue_age` that differ in their number of trials only; what a trial more takes, beside the fits
of its cells alone.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
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
from core.tasks import find_task
from core.tasks.tissue_age import regressor_of
from core.volumes.cohort.reader import Cohort
from core.volumes.phantom.cohort import write_phantom_cohort
from core.volumes.phantom.settings import PhantomSettings
from distributed.batches.in_process import InMemory
from distributed.batches.resident import Resident
from distributed.run.assignment import Cell
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
    parser.add_argument(
        "--trials", type=int, default=60, help="trials that the longer sweep of tables has more"
    )
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
    """Bytes per second of boxes and of whole volumes, out of resident memory."""
    resident = Resident.of(brains, ("dseg",))
    draws, rows = np.random.default_rng(0), np.arange(len(brains))
    grid = brains.volume_shape[1:]

    def box() -> tuple[slice, slice, slice]:
        x, y, z = (int(draws.integers(side - CUT + 1)) for side in grid)
        return slice(x, x + CUT), slice(y, y + CUT), slice(z, z + CUT)

    def whole() -> int:
        return sum(resident.read(rows[part : part + 4]).nbytes for part in range(0, len(rows), 4))

    def boxes() -> int:
        return sum(
            resident.read(rows[part : part + 4], boxes=[box() for _ in rows[part : part + 4]]).nbytes
            for part in range(0, len(rows), 4)
        )

    rates: dict[str, list[float]] = {"whole": [], "boxes": []}
    for _ in range(rounds):
        for name, read in (("whole", whole), ("boxes", boxes)):
            began, read_bytes = time.perf_counter(), 0
            while time.perf_counter() - began < 0.2:
                read_bytes += read()
            rates[name].append(read_bytes / (time.perf_counter() - began))
    ratio = statistics.median(
        cut / everything for cut, everything in zip(rates["boxes"], rates["whole"], strict=True)
    )
    console.print(
        f"out of resident memory by bytes: patches of {CUT}^3 at {statistics.median(rates['boxes']) / 1e9:.2f} GB/s, "
        f"whole volumes of {'x'.join(map(str, grid))} at {statistics.median(rates['whole']) / 1e9:.2f} GB/s, "
        f"ratio {ratio:.2f}"
    )


def tables(place: Path, more: int, console: Console) -> None:
    """What a trial of `tissue_age` takes, and the fits of its cells alone."""
    brains = write_phantom_cohort(
        place / "people", PhantomSettings(subjects=160, spacing=8.0, kind="tissue", channels=("t1w",))
    )
    took = {}
    for trials in (5, 5 + more):
        request = SweepRequest(task="tissue_age", trials=trials, folds=5, slots=1, sampler="random")
        folder = run_sweep(
            Launch(brains.address, request, place / f"run-{trials}", None, Console(quiet=True))
        )
        took[trials] = folder.about.seconds or 0.0
    of_trial = (took[5 + more] - took[5]) / more
    space, base = load_space("tissue_age")
    del space
    settings = resolve(base)
    features = find_task("tissue_age").features(settings, brains.manifest)
    assert features is not None
    ages = brains.manifest["age"].to_numpy(float)
    fits = []
    for _ in range(more):
        began = time.perf_counter()
        for fold in range(5):
            chosen = np.arange(len(ages)) % 5 != fold
            regressor = regressor_of(settings.regressor).fit(features[chosen], ages[chosen])  # type: ignore[attr-defined]
            regressor.predict(features[~chosen])
        fits.append(time.perf_counter() - began)
    console.print(
        f"a trial of tissue_age on 5 folds takes {1000 * of_trial:.0f} ms, least squares on these folds alone "
        f"{1000 * statistics.median(fits):.0f} ms ({more} trials more in a sweep of random search)"
    )


if __name__ == "__main__":
    main()
