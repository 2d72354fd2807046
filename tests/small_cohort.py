"""A cohort small enough to train on within a test: a bright ball whose brightness falls with age."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from core.volumes.cohort.formats import Compression, Storage
from core.volumes.cohort.reader import Cohort
from core.volumes.cohort.writer import CohortWriter

SIDE = 12


def write_small_cohort(
    folder: Path,
    subjects: int = 24,
    seed: int = 0,
    storage: Storage = "hdf5",
    compression: Compression = "none",
    names: Sequence[str] = (),
    maps: Sequence[str] = (),
) -> Cohort:
    """`names` are those of the first subjects, and the first of them is also the name of a site.

    Every third scan has no map of `maps`.
    """
    generator = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, SIDE)] * 3, indexing="ij"))
    ball = np.linalg.norm(grid, axis=0) < 0.8
    writer = CohortWriter(
        folder, name="small", channels=("stiffness",), shape=(SIDE,) * 3, spacing=8.0, affine=np.eye(4),
        preprocessing={"spacing": 8.0}, source="test", synthetic=True, storage=storage,
        compression=compression, maps=maps,
    )  # fmt: skip
    with writer:
        for index in range(subjects):
            age = float(generator.uniform(20, 80))
            volume = ball * (3 - 0.02 * age + generator.normal(0, 0.1, ball.shape))
            subject = names[index] if index < len(names) else f"sub-{index:03d}"
            site = names[0] if names and index % 2 else f"site-{index % 2}"
            classes = {name: (volume > 1.5 + place).astype(np.int16) for place, name in enumerate(maps)}
            writer.add(
                volume[None].astype(np.float32), subject=subject, age=age, site=site,
                maps={} if index % 3 == 2 else classes,
            )  # fmt: skip
    return Cohort.open(folder)


SMALL = {
    "model.width": 0.0625,
    "model.head.dimension": 8,
    "training.epochs": 2,
    "training.batch_size": 8,
}
