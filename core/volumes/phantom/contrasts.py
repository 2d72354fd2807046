"""MR contrasts of a phantom brain from relaxation times by the signal equations, some with a tumour, few labelled.

Relaxation times at 3 T are those of Stanisz et al. 2005 (Magn Reson Med 54:507) for grey and white matter; those of
tumours, oedema and fluid are of usual size. A spin echo gives S = PD (1 - e^(-TR/T1)) e^(-TE/T2), with an inversion
S = PD |1 - 2 e^(-TI/T1) + e^(-TR/T1)| e^(-TE/T2). Gadolinium shortens T1: 1/T1' = 1/T1 + r1 c. They were chosen before
any model was trained on them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from core.volumes.phantom.lesions import grow_lesion, lesion_centres, of_side
from core.volumes.phantom.subject import BIAS_WIDTH_MM, CONTRASTS, Person, PhantomBrain, smooth_field
from core.volumes.phantom.templates import Floats

TUMOUR_SHARE, LABELLED_SHARE = 0.8, 0.5
"""Of all people, and of those with a tumour."""
TUMOUR_ML = (15.0, 60.0)
CORE_SHARE, NECROSIS_SHARE = 0.45, 0.35
"""Of the tumour the part that is no oedema, and of this part what is dead."""
RELAXIVITY = 4.5
"""Of gadolinium, per second and mM."""
NECROSIS, OEDEMA, ENHANCING = 1, 2, 4
"""In the map, as in BraTS."""
NOISE = 0.02
VARIATION = 0.04
"""SD, as a share, of the relaxation times of a person."""


@dataclass(frozen=True)
class _Tissue:
    density: float
    t1_ms: float
    t2_ms: float
    gadolinium_mm: float = 0.0


TISSUES = {
    "csf": _Tissue(1.0, 4000.0, 2000.0),
    "grey": _Tissue(0.82, 1820.0, 99.0, 0.02),
    "white": _Tissue(0.70, 1084.0, 69.0, 0.01),
    "necrosis": _Tissue(0.95, 3000.0, 300.0),
    "oedema": _Tissue(0.85, 1900.0, 170.0),
    "enhancing": _Tissue(0.85, 1700.0, 130.0, 0.8),
}


@dataclass(frozen=True)
class _Sequence:
    repetition_ms: float
    echo_ms: float
    inversion_ms: float | None = None
    with_gadolinium: bool = False

    def signal(self, tissue: _Tissue) -> float:
        rate = 1 / tissue.t1_ms
        if self.with_gadolinium:
            rate += RELAXIVITY * tissue.gadolinium_mm / 1000
        recovered = 1 - math.exp(-self.repetition_ms * rate)
        if self.inversion_ms is not None:
            recovered = abs(
                1 - 2 * math.exp(-self.inversion_ms * rate) + math.exp(-self.repetition_ms * rate)
            )
        return tissue.density * recovered * math.exp(-self.echo_ms / tissue.t2_ms)


SEQUENCES = {
    "t1w": _Sequence(600.0, 10.0),
    "t1gd": _Sequence(600.0, 10.0, with_gadolinium=True),
    "t2w": _Sequence(5000.0, 100.0),
    "flair": _Sequence(9000.0, 100.0, inversion_ms=2500.0),
}


@dataclass(frozen=True, eq=False)
class Contrasts:
    """A brain in several contrasts, and its tumour."""

    brain: PhantomBrain
    tumour: npt.NDArray[np.uint8]
    """(X, Y, Z): 1 necrosis, 2 oedema, 4 enhancing; 0 elsewhere."""
    is_labelled: bool

    @property
    def columns(self) -> dict[str, str | float]:
        """What the table of the cohort has of it."""
        return {"disease": "tumour" if self.tumour.any() else "healthy"}


def with_contrasts(person: Person, brain: PhantomBrain, spacing: float, channels: Sequence[str]) -> Contrasts:
    """The brain of a person in these contrasts.

    Args:
        person: whose brain it is.
        brain: of which the channels are not used.
        spacing: of the grid, mm.
        channels: of t1w, t1gd, t2w and flair.
    """
    draws = person.stream(CONTRASTS)
    ill, labelled, right, size = draws.random(4)
    tumour = np.zeros(brain.tissue.shape, dtype=np.uint8)
    if ill < TUMOUR_SHARE:
        volume_ml = TUMOUR_ML[0] * (TUMOUR_ML[1] / TUMOUR_ML[0]) ** size
        side = of_side(brain, "right" if right < 0.5 else "left")
        tumour = _tumour(brain, lesion_centres(brain, side, 1, draws), volume_ml, spacing, draws)
    varied = {
        name: replace(
            tissue,
            t1_ms=tissue.t1_ms * math.exp(VARIATION * draws.standard_normal()),
            t2_ms=tissue.t2_ms * math.exp(VARIATION * draws.standard_normal()),
        )
        for name, tissue in TISSUES.items()
    }
    within = brain.fractions.sum(axis=-1)
    images = {}
    # All contrasts are drawn, used or not, so that one is the same whatever stands beside it.
    for name, sequence in SEQUENCES.items():
        parts = [sequence.signal(varied[tissue]) for tissue in ("csf", "grey", "white")]
        clean = brain.fractions @ np.array(parts, dtype=np.float32)
        for tissue, number in (("necrosis", NECROSIS), ("oedema", OEDEMA), ("enhancing", ENHANCING)):
            share = ndimage.gaussian_filter((tumour == number).astype(np.float32), 1.0 / spacing)
            clean = clean * (1 - share) + np.float32(sequence.signal(varied[tissue])) * share * within
        shading = np.exp(0.06 * smooth_field(draws, spacing, BIAS_WIDTH_MM))
        gain = 1000 * math.exp(0.15 * draws.standard_normal())
        real, imaginary = NOISE * draws.standard_normal((2, *clean.shape))
        magnitude = gain * np.hypot(clean * shading + real, imaginary)
        images[name] = np.where(within >= 0.5, magnitude, 0).astype(np.float32)
    seen = replace(brain, channels={name: images[name] for name in channels})
    return Contrasts(seen, tumour, bool(tumour.any() and labelled < LABELLED_SHARE))


def _tumour(
    brain: PhantomBrain,
    centre: npt.NDArray[np.float64],
    volume_ml: float,
    spacing: float,
    draws: np.random.Generator,
) -> npt.NDArray[np.uint8]:
    """Oedema around an enhancing rim around necrosis, each the inner part of the one before."""
    whole = grow_lesion(brain, centre, volume_ml, spacing, draws) > 0
    depth: Floats = ndimage.distance_transform_edt(whole).astype(np.float32)
    order = np.argsort(-depth[whole], kind="stable")
    count = int(whole.sum())
    classes = np.full(count, OEDEMA, dtype=np.uint8)
    core = max(1, round(CORE_SHARE * count))
    classes[order[:core]] = ENHANCING
    classes[order[: max(1, round(NECROSIS_SHARE * core))]] = NECROSIS
    tumour = np.zeros(brain.tissue.shape, dtype=np.uint8)
    tumour[whole] = classes
    return tumour
