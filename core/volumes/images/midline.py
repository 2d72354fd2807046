"""The plane between the halves of a head, found by laying its mirror image over it.

A head and its mirror image differ by a turn and a shift if the head does not lie upright in its image; half of both
brings each onto the mid-sagittal plane (halfway registration, as symmetry-aware pre-training assumes it done). To
mirror a scan that was prepared so is to flip its grid.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from nibabel.affines import apply_affine

from core.errors import UserError
from core.volumes.images.nifti import Affine, Volume
from core.volumes.images.registration import as_affine, as_itk, descend, simplified
from core.volumes.images.resample import Mask, resample

SHRINKING = (4, 2)
BLUR_MM = (4.0, 2.0)
STEPS = 100
"""At most, per level."""
MOST_TURNED = 45.0
"""Degrees: a head that is turned further is not upright in its image at all."""
MOST_LEFT_DEGREES, MOST_LEFT_MM = 2.0, 2.0
"""What may be left between an aligned head and its mirror image."""
LEAST_LIKENESS = 0.85
"""Correlation. Thirteen real scans (three studies; T1w and FLAIR) have 0.95 to 0.98, halves of a head 0.64 and 0.84."""


class Midline(NamedTuple):
    """Where the mid-sagittal plane of a head lies."""

    to_source: Affine
    """(4, 4), rigid: from mm in which the plane is x = 0 to the mm of the image. y and z are turned as little as may
    be, and the middle of the head keeps them."""
    middle: npt.NDArray[np.float64]
    """(3,) the middle of the head in these mm; its x is 0."""
    measures: dict[str, float]
    """See `find_midline`."""


class _Plane(NamedTuple):
    normal: npt.NDArray[np.float64]
    """(3,) of length 1, to the right."""
    point: npt.NDArray[np.float64]
    """(3,) in mm."""


def find_midline(voxels: Volume, affine: Affine, mask: Mask, middle: npt.NDArray[np.float64]) -> Midline:
    """Find the mid-sagittal plane of a head: an image (X, Y, Z), its affine (4, 4), its mask and its middle in mm.

    A rigid registration of the image to its mirror image at 8 and 4 mm by correlation, without sampling and in one
    thread: the same bits on any machine. `measures`:

    - midline_angle, midline_offset: by how many degrees the head was turned, and how far (mm) the plane lay from its
      middle
    - midline_residual_angle, midline_residual_offset: the same, of the aligned head
    - midline_likeness: the correlation of the aligned head with its mirror image

    Raises UserError where it failed: the head is turned by more than `MOST_TURNED`, or what is left is above
    `MOST_LEFT_DEGREES` or `MOST_LEFT_MM`, or both sides are less alike than `LEAST_LIKENESS`.
    """
    head, place = simplified(voxels, affine, mask)
    plane, _ = _plane_of(head, place, middle)
    angle = _degrees(plane.normal)
    if angle > MOST_TURNED:
        raise UserError(
            f"the midline was not found: the head would be turned by {angle:.0f} degrees; is the image upright, and do "
            "its axes point where its header says?"
        )
    to_source, centre = _aligning(plane, middle)
    aligned_place = np.linalg.inv(to_source) @ place
    again, likeness = _plane_of(*_upright(head, aligned_place), centre)
    left_degrees, left_mm = _degrees(again.normal), float(abs(again.normal @ (centre - again.point)))
    if left_degrees > MOST_LEFT_DEGREES or left_mm > MOST_LEFT_MM or likeness < LEAST_LIKENESS:
        raise UserError(
            f"the midline was not found: after alignment the mirror image still lies {left_degrees:.1f} degrees and "
            f"{left_mm:.1f} mm aside, and their correlation is {likeness:.2f}; is this a whole head?"
        )
    return Midline(
        to_source,
        centre,
        {
            "midline_angle": angle,
            "midline_offset": float(plane.normal @ (middle - plane.point)),
            "midline_residual_angle": left_degrees,
            "midline_residual_offset": left_mm,
            "midline_likeness": likeness,
        },
    )


def _plane_of(head: Volume, place: Affine, middle: npt.NDArray[np.float64]) -> tuple[_Plane, float]:
    """The plane about which a head is most like its mirror image, and the correlation of both."""
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    # The mirror image in the world's mm, about x = middle: the same array backwards, wherever its axes point.
    across = np.diag([-1.0, 1.0, 1.0, 1.0])
    across[0, 3] = 2 * middle[0]
    mirrored = across @ place
    # ITK knows no improper affine, so an axis of the array is turned round with it.
    axis = int(np.abs(mirrored[0, :3]).argmax())
    back = np.eye(4)
    back[axis, axis], back[axis, 3] = -1.0, head.shape[axis] - 1
    fixed, moving = as_itk(head, place), as_itk(np.flip(head, axis), mirrored @ back)
    start = sitk.Euler3DTransform()
    start.SetCenter((np.array([-1.0, -1.0, 1.0]) * middle).tolist())
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsCorrelation()
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=1.0,
        minStep=1e-4,
        numberOfIterations=STEPS,
        relaxationFactor=0.6,
        gradientMagnitudeTolerance=1e-8,
    )
    transform = sitk.Euler3DTransform(start)
    descend(method, fixed, moving, transform, SHRINKING, BLUR_MM, "the midline was not found")
    # A point of the head, and where what lies opposite to it is.
    opposite = across @ as_affine(transform)
    values, vectors = np.linalg.eigh((opposite[:3, :3] + opposite[:3, :3].T) / 2)
    normal = vectors[:, values.argmin()]
    normal = normal if normal[0] > 0 else -normal
    return _Plane(normal, (middle + apply_affine(opposite, middle)) / 2), -float(method.GetMetricValue())


def _degrees(normal: npt.NDArray[np.float64]) -> float:
    """The angle between a normal and left-right."""
    return math.degrees(math.acos(min(1.0, float(normal[0]))))


def _aligning(plane: _Plane, middle: npt.NDArray[np.float64]) -> tuple[Affine, npt.NDArray[np.float64]]:
    """The rigid affine from mm in which the plane is x = 0, by the least turn, and the middle of the head in them."""
    on_plane = middle - plane.normal * (plane.normal @ (middle - plane.point))
    right = np.array([1.0, 0.0, 0.0])
    axis = np.cross(right, plane.normal)
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    # Rodrigues' formula for the turn from left-right to the normal.
    turn = np.eye(3) + cross + cross @ cross / (1 + float(right @ plane.normal))
    centre = np.array([0.0, on_plane[1], on_plane[2]])
    to_source = np.eye(4)
    to_source[:3, :3], to_source[:3, 3] = turn, on_plane - turn @ centre
    return to_source, centre


def _upright(head: Volume, place: Affine) -> tuple[Volume, Affine]:
    """The head on a grid along the world's axes, which has room for its turned corners."""
    corners = np.array(np.meshgrid(*([0, side - 1] for side in head.shape))).reshape(3, -1).T
    ends = apply_affine(place, corners)
    spacing = float(np.abs(np.linalg.det(place[:3, :3])) ** (1 / 3))
    low, high = ends.min(axis=0), ends.max(axis=0)
    sides = np.ceil((high - low) / spacing).astype(int) + 1
    target = np.diag([spacing, spacing, spacing, 1.0])
    target[:3, 3] = (low + high) / 2 - spacing * (sides - 1) / 2
    placed = resample(head, place, target, (int(sides[0]), int(sides[1]), int(sides[2])), head > 0)
    return np.where(placed.inside, placed.voxels, 0).astype(np.float32), target
