"""Computed tomography of a phantom head: Hounsfield units of tissues, skull, skin and air, and fresh blood.

Grey matter 37 to 41 HU, white matter 20 to 30, cerebrospinal fluid 0 to 15, compact bone 700 and more, fresh
blood 60 to 80 (textbook values, as of Broder, Diagnostic Imaging for the Emergency Physician, 2011); noise of some HU.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from core.volumes.phantom.lesions import (
    EDGE_MM,
    HEALTHY_SHARE,
    Condition,
    Diseased,
    grow_lesion,
    lesion_centres,
    of_side,
)
from core.volumes.phantom.subject import TOMOGRAPHY, Person, PhantomBrain
from core.volumes.phantom.templates import Floats

LADDER = ((40.0, 1.0), (15.0, 0.8), (5.0, 0.6), (1.5, 0.4), (0.5, 0.0))
"""Of every rung: the volume of the bleeding (mL), and how plain it is: 1 is fresh blood."""

HU_OF_TISSUE = (8.0, 38.0, 28.0)
"""Cerebrospinal fluid, grey and white matter."""
BONE_HU, SKIN_HU, AIR_HU, BLOOD_HU = 900.0, 45.0, -1000.0, 70.0
BONE_MM, SKIN_MM = 7.0, 6.0
NOISE_HU = 5.0


def hounsfield(fractions: NDArray[np.float32], spacing: float, draws: np.random.Generator) -> Floats:
    """A head in Hounsfield units (X, Y, Z) of its fractions (X, Y, Z, 3) of fluid, grey and white matter."""
    within = fractions.sum(axis=-1)
    inside = ndimage.binary_fill_holes(within >= 0.5)
    away = ndimage.distance_transform_edt(~inside, sampling=spacing)
    # Bone and skin lie around what is inside; where a voxel is inside in part, the rest of it is bone.
    outside = np.select([away <= BONE_MM, away <= BONE_MM + SKIN_MM], [BONE_HU, SKIN_HU], AIR_HU)
    clean = fractions @ np.array(HU_OF_TISSUE, dtype=np.float32)
    missing = np.clip(1 - within, 0, 1)
    deep = inside & (away == 0) & (within < 0.5)
    clean = clean + missing * np.where(deep, HU_OF_TISSUE[0], outside)
    noisy = clean + NOISE_HU * draws.standard_normal(clean.shape)
    return np.asarray(np.maximum(noisy, AIR_HU), dtype=np.float32)


def with_blood(image: Floats, blood: Floats, contrast: float) -> Floats:
    """The image with fresh blood: `blood` (X, Y, Z) says which part of a voxel it fills, `contrast` how plain it is."""
    share = np.float32(contrast) * blood
    return np.asarray(image * (1 - share) + np.float32(BLOOD_HU) * share, dtype=np.float32)


def head_with_bleeding(person: Person, brain: PhantomBrain, spacing: float, rung: int) -> Diseased:
    """The head of a person in Hounsfield units; half of all people have a bleeding on one side of the brain.

    Args:
        person: whose head it is; who bleeds does not depend on the rung.
        brain: of which the channels are not used.
        spacing: of the grid, mm.
        rung: 1 (largest, as plain as fresh blood) to 5 (invisible).
    """
    draws = person.stream(TOMOGRAPHY)
    image = hounsfield(brain.fractions, spacing, draws)
    ill, right = draws.random(2)
    lesion = np.zeros(brain.tissue.shape, dtype=np.uint8)
    side = ""
    if ill >= HEALTHY_SHARE:
        side = "right" if right < 0.5 else "left"
        volume_ml, plain = LADDER[rung - 1]
        centres = lesion_centres(brain, of_side(brain, side), 1, draws)
        lesion = grow_lesion(brain, centres, volume_ml, spacing, draws)
        soft = ndimage.gaussian_filter(lesion.astype(np.float32), EDGE_MM / spacing)
        image = with_blood(image, soft, plain)
    condition: Condition = "unilateral" if side else "healthy"
    drawn = replace(brain, channels={"ct": image})
    return Diseased(drawn, lesion, condition, side, float(lesion.sum()) * spacing**3 / 1000)
