"""Draw docs/phantom_montage.png: young and old brains of the phantom cohort.

Run `python docs/make_phantom_montage.py` from the root of the repository (10 s).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from montage import montage

from core.volumes.phantom.cohort import phantom_brain, phantom_participants
from core.volumes.phantom.settings import PhantomSettings
from core.volumes.phantom.subject import PhantomBrain

AGES = (22, 28, 34, 72, 78, 84)


def main() -> None:
    """Draw the subjects of the default cohort whose ages are nearest to AGES."""
    settings = PhantomSettings(spacing=2.0, channels=("t1w", "stiffness"))
    ages = phantom_participants(settings)["age"]
    nearest = [int(np.argmin(abs(ages - age))) for age in AGES]
    brains = [phantom_brain(settings, index) for index in nearest]
    montage(
        np.stack([[normalised_t1w(brain), brain.channels["stiffness"]] for brain in brains]),
        [
            f"{ages[index]:.0f} years\nventricles {brain.volumes_ml['ventricle_ml']:.0f} mL"
            for index, brain in zip(nearest, brains, strict=True)
        ],
        Path(__file__).with_name("phantom_montage.png"),
        titles=("T1-weighted", "Shear stiffness"),
        colour_maps=("gray", "inferno"),
        units=("relative to white matter", "kPa"),
        limits=[(0.0, 1.2), (0.0, 5.0)],
        cut=(0.46, 0.52, 0.53),
        dpi=90,
    )


def normalised_t1w(brain: PhantomBrain) -> np.ndarray:
    """The T1-weighted image without the gain of its scanner."""
    t1w = brain.channels["t1w"]
    return t1w / np.median(t1w[brain.tissue == 3])


if __name__ == "__main__":
    main()
