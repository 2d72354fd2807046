"""Diseases of phantom brains: lesions on one side, scattered lesions, or thin cortex of one hemisphere.

Half of the people are healthy. What tells the others apart is that their hemispheres differ, which an age does not. The
five rungs of the ladder go down to lesions that have no contrast at all: whoever finds those has found a leak. Volumes
are those of large infarcts (tens of mL), of the load of T1-dark lesions in multiple sclerosis (some mL), and below; the
shares by which a lesion is darker go down with them. They were chosen before any model was trained on them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from core.volumes.phantom.subject import LESIONS, Person, PhantomBrain, smooth_field
from core.volumes.phantom.templates import Floats

Condition = Literal["healthy", "unilateral", "diffuse", "atrophy"]
DISEASES: tuple[Condition, ...] = ("unilateral", "diffuse", "atrophy")
HEALTHY_SHARE = 0.5
LADDER = ((40.0, 0.5), (15.0, 0.4), (5.0, 0.3), (1.5, 0.2), (0.5, 0.0))
"""Of every rung: the volume of all lesions of a person (mL), and the share by which they are darker than before."""
THINNING = (0.8, 0.5, 0.3, 0.15, 0.0)
"""Of every rung: the share of CSF that the outer cortex of the hemisphere gets."""
SCATTERED = 12
"""Lesions of a diffuse disease."""
ON_ONE_SIDE = 0.85
"""The share of them on the side that is more affected."""
FROM_MIDLINE_MM = 12.0
RAGGED, RAGGED_MM = 0.25, 10.0
EDGE_MM = 1.5
WHITE, GREY, CSF = 3, 2, 1


@dataclass(frozen=True, eq=False)
class Diseased:
    """What a disease has made of a brain."""

    brain: PhantomBrain
    lesion: npt.NDArray[np.uint8]
    """(X, Y, Z): 1 in a lesion."""
    condition: Condition
    side: str
    """left, right, or "" of healthy people."""
    lesion_ml: float

    @property
    def columns(self) -> dict[str, str | float]:
        """What the table of the cohort has of it."""
        disease = "healthy" if self.condition == "healthy" else "diseased"
        return {
            "disease": disease,
            "condition": self.condition,
            "side": self.side,
            "lesion_ml": round(self.lesion_ml, 3),
        }


def with_disease(person: Person, brain: PhantomBrain, spacing: float, rung: int) -> Diseased:
    """The brain of a person, healthy or not; its T1-weighted image is changed and nothing else.

    Args:
        person: whose brain it is; who is ill does not depend on the rung.
        brain: with the channel t1w.
        spacing: of the grid, mm.
        rung: 1 (largest) to 5 (invisible).
    """
    draws = person.stream(LESIONS)
    ill, kind, right = draws.random(3)
    lesion = np.zeros(brain.tissue.shape, dtype=np.uint8)
    if ill < HEALTHY_SHARE:
        return Diseased(brain, lesion, "healthy", "", 0.0)
    condition = DISEASES[int(kind * len(DISEASES))]
    side = "right" if right < 0.5 else "left"
    is_side = of_side(brain, side)
    image = brain.channels["t1w"]
    if condition == "atrophy":
        changed = _thinned(image, brain.tissue, is_side, THINNING[rung - 1], draws)
    else:
        volume_ml, darker = LADDER[rung - 1]
        centres = lesion_centres(brain, is_side, 1 if condition == "unilateral" else SCATTERED, draws)
        lesion = grow_lesion(brain, centres, volume_ml, spacing, draws)
        soft = ndimage.gaussian_filter(lesion.astype(np.float32), EDGE_MM / spacing)
        changed = (image * (1 - np.float32(darker) * soft)).astype(np.float32)
    ill_brain = replace(brain, channels={**brain.channels, "t1w": changed})
    return Diseased(ill_brain, lesion, condition, side, float(lesion.sum()) * spacing**3 / 1000)


def _millimetres(brain: PhantomBrain) -> npt.NDArray[np.float64]:
    """(3, X, Y, Z) RAS positions of the voxels."""
    grid = np.indices(brain.tissue.shape, dtype=np.float64)
    positions: npt.NDArray[np.float64] = (
        np.tensordot(brain.affine[:3, :3], grid, axes=1) + brain.affine[:3, 3][:, None, None, None]
    )
    return positions


def of_side(brain: PhantomBrain, side: str) -> npt.NDArray[np.bool_]:
    """The voxels of one half of the head; X points to the right."""
    across = _millimetres(brain)[0]
    half: npt.NDArray[np.bool_] = across > 0 if side == "right" else across < 0
    return half


def lesion_centres(
    brain: PhantomBrain, is_side: npt.NDArray[np.bool_], count: int, draws: np.random.Generator
) -> npt.NDArray[np.float64]:
    """(count, 3) positions in white matter (mm); a single one is on the side, most of several are."""
    positions = _millimetres(brain)
    may_be = (brain.tissue == WHITE) & (np.abs(positions[0]) > FROM_MIDLINE_MM)
    found = []
    for index in range(count):
        here = is_side if index == 0 or draws.random() < ON_ONE_SIDE else ~is_side
        places = np.flatnonzero(may_be & here)
        # By share and not by number, so that it is about the same place at every spacing.
        place = places[int(draws.random() * len(places))]
        found.append(positions.reshape(3, -1)[:, place])
    return np.array(found)


def grow_lesion(
    brain: PhantomBrain,
    centres: npt.NDArray[np.float64],
    volume_ml: float,
    spacing: float,
    draws: np.random.Generator,
) -> npt.NDArray[np.uint8]:
    """The voxels of the brain nearest to the centres, with ragged edges, until they have the volume; one at least."""
    positions = _millimetres(brain)
    distance = np.min(
        [np.linalg.norm(positions - centre[:, None, None, None], axis=0) for centre in centres], axis=0
    )
    distance = distance * np.exp(RAGGED * smooth_field(draws, spacing, RAGGED_MM))
    # A lesion does not cross the midline.
    same_half = np.isin(np.sign(positions[0]), np.sign(centres[:, 0]))
    may_be = (brain.tissue > CSF) & same_half
    count = min(max(1, round(volume_ml * 1000 / spacing**3)), int(may_be.sum()))
    nearest = np.argsort(np.where(may_be, distance, np.inf), axis=None, kind="stable")[:count]
    lesion = np.zeros(brain.tissue.shape, dtype=np.uint8)
    lesion.flat[nearest] = 1
    return lesion


def _thinned(
    image: Floats,
    tissue: npt.NDArray[np.uint8],
    is_side: npt.NDArray[np.bool_],
    share: float,
    draws: np.random.Generator,
) -> Floats:
    """The outer cortex of a hemisphere, mixed with the person's own CSF: its intensity and its noise."""
    outer = (tissue == GREY) & is_side & ndimage.binary_dilation(tissue <= CSF)
    fluid = image[tissue == CSF]
    thinned = image.copy()
    drawn = draws.choice(fluid, int(outer.sum()))
    thinned[outer] = (1 - np.float32(share)) * image[outer] + np.float32(share) * drawn
    return thinned.astype(np.float32)
