"""From NIfTI files to a cohort: ours on all cores, against plain nibabel loops in one process.

    python -m benchmarks.ingest [SCANS]

Ours and the loops turn the same whole heads of 1 mm (made here: a smooth brain with noise, 176 x 208 x 176 voxels,
gzip) into float16 volumes of 2 mm in HDF5, with z-scores inside the brain. The loops are the usual code: load,
canonical axes, `nibabel.processing.resample_from_to`, z-score, append. One loop uses the defaults of nibabel (cubic,
no smoothing), the other does the same work as ours (smoothing by the larger voxel, then linear). Ours also removes the
background at the edge, measures quality, writes checksums and digests, and can be killed at any moment.
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import nibabel as nib
import nibabel.processing
import numpy as np
import ray
from rich.console import Console
from rich.table import Table
from scipy import ndimage

from core.volumes.images.preprocess import Preprocessing
from core.volumes.ingest.cohort import ingest
from core.volumes.sources import list_scans
from core.volumes.sources.listing import Listing
from distributed.commands.on_ray import in_parallel
from distributed.slots.cluster import connect

SCANS, ROUNDS = 24, 2
SHAPE = (176, 208, 176)
SETTINGS = Preprocessing(spacing=2, centre="brain", intensity="zscore")


def make_study(folder: Path, scans: int) -> Listing:
    """A BIDS folder of `scans` heads of 1 mm, each with other noise."""
    generator = np.random.default_rng(0)
    grid = np.meshgrid(*(np.linspace(-1.2, 1.2, size, dtype=np.float32) for size in SHAPE), indexing="ij")
    inside = sum(axis**2 for axis in grid) < 1
    smooth = ndimage.gaussian_filter(generator.normal(size=SHAPE).astype(np.float32), 4)
    brain = np.where(inside, 800 + 5000 * smooth, 0)
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    affine[:3, 3] = -(np.asarray(SHAPE) - 1) / 2
    lines = ["participant_id\tage"]
    for number in range(scans):
        noise = generator.integers(0, 60, SHAPE)
        path = folder / f"sub-{number:03d}" / "anat" / f"sub-{number:03d}_T1w.nii.gz"
        path.parent.mkdir(parents=True)
        nib.save(nib.Nifti1Image(np.where(inside, brain + noise, 0).astype(np.int16), affine), path)
        lines.append(f"sub-{number:03d}\t{20 + number}")
    (folder / "participants.tsv").write_text("\n".join(lines) + "\n")
    return list_scans(folder, kind="bids")


def plain_loop(listing: Listing, out: Path, *, same_work: bool) -> None:
    """The usual loop in one process; with `same_work` smoothed and linear, as ours."""
    grid = (SETTINGS.shape, SETTINGS.affine)
    fwhm = np.sqrt(SETTINGS.spacing**2 - 1)
    with h5py.File(out, "w") as file:
        size = (len(listing.scans), 1, *SETTINGS.shape)
        volumes = file.create_dataset("volumes", size, dtype=np.float16, chunks=(1, *size[1:]))
        for row, scan in enumerate(listing.scans):
            image = nib.as_closest_canonical(nib.load(scan.images[0].path))
            if same_work:
                image = nibabel.processing.smooth_image(image, fwhm, mode="constant")
            resampled = nibabel.processing.resample_from_to(image, grid, order=1 if same_work else 3)
            voxels = resampled.get_fdata(dtype=np.float32)
            mask = voxels > 1
            voxels[mask] = (voxels[mask] - voxels[mask].mean()) / voxels[mask].std()
            volumes[row, 0] = voxels


def seconds(work: Callable[[], object]) -> float:
    """Wall clock of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    """Print scans per second and the ratios to the plain loop."""
    scans = int(sys.argv[1]) if len(sys.argv) > 1 else SCANS
    console, taken = Console(width=110), {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        listing = make_study(folder / "study", scans)

        def ours(name: str) -> None:
            assert len(ingest(listing, folder / name, SETTINGS, run=in_parallel).cohort) == scans

        began = time.perf_counter()
        with connect(None, Console(quiet=True)):
            ours("first")
            taken["ours, with Ray's start"] = [time.perf_counter() - began]
            defaults, same_work, steady = [], [], []
            for turn in range(ROUNDS):
                defaults.append(seconds(lambda: plain_loop(listing, folder / "plain.h5", same_work=False)))
                steady.append(seconds(functools.partial(ours, f"steady-{turn}")))
                same_work.append(seconds(lambda: plain_loop(listing, folder / "plain.h5", same_work=True)))
            taken |= {
                "loop of defaults": defaults,
                "loop of the same work": same_work,
                "ours, steady": steady,
            }
            cores = int(ray.cluster_resources()["CPU"])
    loops = ("loop of defaults", "loop of the same work")
    table = Table("way", "scans/s", *(f"times the {name}" for name in loops), title=f"{scans} scans")
    for name, times in taken.items():
        ratios = (f"{min(taken[loop]) / min(times):.2f}" for loop in loops)
        table.add_row(name, f"{scans / min(times):.2f}", *ratios)
    console.print(table)
    console.print(f"{cores} cores in Ray; load of the machine {os.getloadavg()[0]:.1f}", highlight=False)


if __name__ == "__main__":
    main()
