"""What the contrast-guided pre-training of system D costs: a step, and a constraint map.

    python -m benchmarks.contrasts [--rounds 9] [--scans 2 6]

Steps: a step of the published 2D pre-training (10 slices of 160 x 160, 2 contrasts, partial decoder) against the same
step with a trivial loss, and the loss alone on features that are there. They take turns; medians, and the median ratio.

Maps: `derive --constraint` on cohorts of few and of more scans of 240 x 240 x 155, each in a process of its own: the
most memory it had, which must not grow with the scans, and the time of a scan beside that of a plain script of the
published recipe on the same scan.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.ndimage
import torch
from skimage.restoration import denoise_tv_bregman
from sklearn.cluster import MiniBatchKMeans
from sklearn.decomposition import PCA

from core.config import merge, resolve
from core.tasks import find_task
from core.volumes.cohort.reader import Cohort
from core.volumes.cohort.writer import CohortWriter
from core.volumes.derive.constraint import ConstraintSettings
from core.volumes.phantom.cohort import write_phantom_cohort
from core.volumes.phantom.settings import PhantomSettings
from distributed.commands.constraining import derive_constraint
from search_spaces import published

SLICES, SIDE, CONTRASTS = 10, 160, ("t1gd", "t1w")
GRID = (240, 240, 155)


def main() -> None:
    """Measure both."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9, help="turns of every contender")
    parser.add_argument("--scans", type=int, nargs=2, default=(2, 6), help="of the two cohorts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    steps(options.rounds)
    with tempfile.TemporaryDirectory() as place:
        maps(Path(place), options.scans)


def steps(rounds: int) -> None:
    """Seconds of a step, of the same step with a trivial loss, and of the loss alone."""
    task = find_task("contrast_pretraining")
    settings = resolve(merge(published("contrast_pretraining"), {"data.constraint": "tissue"}))
    torch.manual_seed(0)
    model, objective = task.build(settings, len(CONTRASTS), {}).train(), task.objective(settings, {})
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    images = torch.rand(1, SLICES, len(CONTRASTS), SIDE, SIDE) + 0.1
    seen = {"images": images, "clusters": torch.randint(1, 21, (1, SLICES, SIDE, SIDE))}
    features = model(images[0], "dense").detach().requires_grad_()
    nothing = torch.zeros(1)

    def whole() -> None:
        optimiser.zero_grad()
        task.step(model, objective, seen, nothing, 0.5).loss.backward()
        optimiser.step()

    def without_loss() -> None:
        optimiser.zero_grad()
        model(images[0], "dense").mean().backward()
        optimiser.step()

    def loss_alone() -> None:
        _, module, within = objective.at(0.5)  # type: ignore[operator]
        module(
            features, seen["clusters"][0], torch.ones(SLICES, SIDE, SIDE, dtype=torch.bool), within
        ).backward()

    took: dict[Callable[[], None], list[float]] = {whole: [], without_loss: [], loss_alone: []}
    for turn in range(rounds + 1):
        for contender, times in took.items():
            began = time.perf_counter()
            contender()
            if turn:
                times.append(time.perf_counter() - began)
    ratio = statistics.median(step / (free + loss) for step, free, loss in zip(*took.values(), strict=True))
    step, free, loss = (1000 * statistics.median(times) for times in took.values())
    print(
        f"a step on {SLICES} slices of {SIDE} x {SIDE}: {step:.0f} ms; with a trivial loss {free:.0f}, the loss alone "
        f"{loss:.0f}; ratio to the sum of both {ratio:.3f} (median of {rounds} rounds)"
    )


def maps(place: Path, scans: tuple[int, int]) -> None:
    """The memory and the time of constraint maps."""
    peaks, seconds = [], []
    for count in scans:
        cohort = _large_cohort(place / f"scans-{count}", count)
        context = multiprocessing.get_context("spawn")
        with context.Pool(1) as pool:
            peak, took = pool.apply(_derive, (cohort.folder,))
        peaks.append(peak)
        seconds.append(took / count)
    began = time.perf_counter()
    _plain_script(cohort.read([0])[0])
    plain = time.perf_counter() - began
    shape = " x ".join(map(str, GRID))
    print(
        f"constraint maps of {shape} voxels, {len(CONTRASTS)} contrasts, in one process: {peaks[0]:.0f} MiB at most "
        f"for {scans[0]} scans, {peaks[1]:.0f} for {scans[1]}; a scan takes {seconds[1]:.0f} s, in a plain script "
        f"{plain:.0f} s"
    )


def _large_cohort(folder: Path, count: int) -> Cohort:
    """Phantoms of two contrasts on a fine grid."""
    coarse = write_phantom_cohort(
        folder.with_name(f"{folder.name}-coarse"),
        PhantomSettings(subjects=count, spacing=4.0, kind="contrasts", channels=CONTRASTS),
    )
    writer = CohortWriter(
        folder, name="large", channels=CONTRASTS, shape=GRID, spacing=(1.0, 1.0, 1.0), affine=np.eye(4),
        dtype="float16", source="phantom", synthetic=True,
    )  # fmt: skip
    draws = np.random.default_rng(0)
    with writer:
        for row in range(count):
            volume_cxyz = coarse.read([row])[0]
            factors = (1, *(side / had for side, had in zip(GRID, volume_cxyz.shape[1:], strict=True)))
            fine = scipy.ndimage.zoom(volume_cxyz, factors, order=1)
            noisy = fine + np.where(fine != 0, draws.normal(0, 0.02 * fine.max(), fine.shape), 0)
            writer.add(noisy.astype(np.float32), subject=f"sub-{row:03d}", age=50.0)
    return Cohort.open(folder)


def _derive(folder: Path) -> tuple[float, float]:
    """MiB at most beyond what the process had before, and seconds."""
    before = _most_memory()
    began = time.perf_counter()
    derive_constraint(folder, "tissue", ConstraintSettings())
    took = time.perf_counter() - began
    return (_most_memory() - before) / 1024, took


def _most_memory() -> int:
    """KiB that this process ever had; `getrusage` would count the process that it was started from."""
    text = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith("VmHWM")))


def _plain_script(volume_cxyz: np.ndarray) -> np.ndarray:
    """The published recipe as one writes it for one scan."""
    inside = (volume_cxyz != 0).any(axis=0)
    values_pc = volume_cxyz[:, inside].T.astype(np.float64)
    found_pk = PCA(min(4, len(volume_cxyz))).fit_transform(values_pc / values_pc.std(axis=0))
    found_pk = (found_pk - found_pk.min()) / (found_pk.max() - found_pk.min())
    smooth = []
    for component_p in found_pk.T:
        image = np.zeros(inside.shape)
        image[inside] = component_p
        smooth.append(denoise_tv_bregman(image, weight=40)[inside])
    clusters = np.zeros(inside.shape, dtype=np.int16)
    clusters[inside] = 1 + MiniBatchKMeans(20, random_state=0).fit_predict(np.stack(smooth, axis=1))
    return clusters


if __name__ == "__main__":
    main()
