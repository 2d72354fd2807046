"""Affine registration of a brain to MNI152, with measures that show whether it can be trusted.

The template is nilearn's MNI152 (ICBM 2009a, symmetric) at 2 mm, the brain alone: images must be
brain-extracted too, or come with a brain mask. Made for T1-weighted images; mutual information also fits other
contrasts in which tissue and fluid differ. A stiffness map shows little more than its outline, and such maps
are published in MNI space already; a CT needs a brain mask.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from nibabel.affines import apply_affine, voxel_sizes
from scipy import ndimage

from core.errors import UserError
from core.volumes.images.nifti import Affine, Volume
from core.volumes.images.resample import Mask, bounding_box, resample, resample_labels

if TYPE_CHECKING:
    import SimpleITK

SPACING = 2.0  # mm, of the template and of what is registered to it
SHRINKING = (4, 2, 1)  # so 8, 4 and 2 mm
BLUR_MM = (4.0, 2.0, 0.0)
MARGIN_MM = 20.0  # background around the brain: its outline is needed, the rest of the image is not
LONGEST_MM = 600.0  # a forged or wrong voxel size must not cost memory
HISTOGRAM_BINS = 32
STEPS = 200  # at most, per level
CLIPPED = (0.5, 99.5)  # percentiles inside the brain; bright vessels would leave few bins to the tissues

LEAST_OVERLAP = 0.88
"""Dice. The 36 brains of ds002748 reach 0.917 to 0.955; two of them on a wrong side 0.83 to 0.90."""
MOST_STRETCH = 1.4
"""Longest over shortest direction of the affine: 1.08 to 1.31 for the 36. Every case of the two on a wrong side that
overlaps by more than 0.88 (a quarter turn about the vertical axis) has 1.45 or more."""
WORSE = 0.02  # Dice that may be lost: a brain already in MNI space can gain little
DETERMINANTS = (0.35, 2.0)
"""Volume of the brain over the template's 1.88 l: 0.35 is the 660 ml of a toddler; no brain is above 2 l."""


class Template(NamedTuple):
    """The MNI152 brain."""

    brain: Volume
    """(X, Y, Z), 0 outside the brain."""
    mask: Mask
    affine: Affine
    """(4, 4), voxel to MNI mm."""


class Registration(NamedTuple):
    """The result of a registration: the affine from the template to an image."""

    template_to_source: Affine
    """(4, 4), MNI mm to the image's mm."""
    measures: dict[str, float]
    """See `register`."""


@functools.lru_cache(maxsize=1)
def load_template() -> Template:
    """The template, read through nilearn's loaders (about 1 s the first time)."""
    from nilearn import datasets  # here because it takes a second, and the command line imports this module

    image = datasets.load_mni152_template(resolution=int(SPACING))
    mask = np.asarray(datasets.load_mni152_brain_mask(resolution=int(SPACING)).dataobj) > 0
    brain = np.where(mask, np.asarray(image.dataobj, dtype=np.float32), np.float32(0))
    return Template(brain, mask, np.asarray(image.affine, dtype=np.float64))


def register(voxels: Volume, affine: Affine, mask: Mask) -> Registration:
    """Find the affine that lays the template over a brain: an image (X, Y, Z), its affine and its mask.

    Mattes mutual information over every voxel of the template's brain and 10 mm around it (no sampling, so
    no seed), from the two centres of mass, by regular gradient steps at 8, 4 and 2 mm. One thread adds in
    one order: the same input gives the same bits on any number of cores. `measures`:

    - template_overlap, template_overlap_before: Dice of the brain's mask with the template's, with the
      affine found and with none
    - registration_metric: mutual information in nats, the higher the better
    - registration_determinant: volume of the brain over the template's
    - registration_stretch: largest over smallest stretch of any direction
    - registration_00 … registration_23: the upper three rows of `template_to_source`

    Raises UserError where the result is implausible: overlap below `LEAST_OVERLAP` or worse than before,
    a stretch above `MOST_STRETCH`, or a determinant outside `DETERMINANTS`. A brain whose left and right were
    swapped registers as well as any other; this cannot be detected here.
    """
    found, mutual_information = _optimise(*simplified(voxels, affine, mask))
    before, after = (overlap_with_template(mask, affine, start) for start in (np.eye(4), found))
    stretches = np.linalg.svd(found[:3, :3], compute_uv=False)
    determinant = float(np.linalg.det(found[:3, :3]))
    stretch = float(stretches[0] / stretches[-1])
    _check(before, after, determinant, stretch)
    measures = {
        "template_overlap": after,
        "template_overlap_before": before,
        "registration_metric": mutual_information,
        "registration_determinant": determinant,
        "registration_stretch": stretch,
    }
    entries = {
        f"registration_{row}{column}": float(found[row, column]) for row in range(3) for column in range(4)
    }
    return Registration(found, measures | entries)


def overlap_with_template(mask: Mask, affine: Affine, template_to_source: Affine | None = None) -> float:
    """Dice coefficient of a brain mask with the template's, 0 to 1; by default their mm are the same."""
    template = load_template()
    place = template.affine if template_to_source is None else template_to_source @ template.affine
    brain = resample_labels(mask.astype(np.int16), affine, place, template.mask.shape) != 0
    return float(
        2 * np.count_nonzero(brain & template.mask) / (np.count_nonzero(brain) + template.mask.sum())
    )


def _check(before: float, after: float, determinant: float, stretch: float) -> None:
    low, high = DETERMINANTS
    hint = "is the image brain-extracted, and upright in its own axes?"
    if not low <= determinant <= high:
        raise UserError(
            f"registration to MNI152 failed: it takes the brain for {determinant:.2f} times the template's volume, "
            f"plausible is {low:g} to {high:g}; {hint}"
        )
    if stretch > MOST_STRETCH:
        raise UserError(
            f"registration to MNI152 failed: it stretches the brain {stretch:.2f} times more along one direction "
            f"than along another, plausible is up to {MOST_STRETCH:g}; {hint}"
        )
    if after < LEAST_OVERLAP or after < before - WORSE:
        needed = max(LEAST_OVERLAP, before - WORSE)
        raise UserError(
            f"registration to MNI152 failed: the brain masks overlap by {after:.2f} (Dice; {before:.2f} before), "
            f"at least {needed:.2f} is needed; {hint}"
        )


def simplified(voxels: Volume, affine: Affine, mask: Mask) -> tuple[Volume, Affine]:
    """The brain at 2 mm along its own axes with an empty margin, its values between percentiles as 0 to 1."""
    edges = voxel_sizes(affine)
    ends = np.array([[box.start, box.stop - 1] for box in bounding_box(mask)])
    extent = (ends[:, 1] - ends[:, 0] + 1) * edges
    if extent.max() > LONGEST_MM:
        raise UserError(
            f"registration failed: the brain is {' x '.join(f'{side:.0f}' for side in extent)} mm large, "
            f"a head is below {LONGEST_MM:.0f} mm; is the unit of length wrong?"
        )
    shape = np.ceil((extent + 2 * MARGIN_MM) / SPACING).astype(int)
    target = np.eye(4)
    target[:3, :3] = affine[:3, :3] / edges * SPACING
    target[:3, 3] = apply_affine(affine, ends.mean(axis=1)) - target[:3, :3] @ ((shape - 1) / 2)
    small = resample(voxels, affine, target, (int(shape[0]), int(shape[1]), int(shape[2])), mask)
    if not small.inside.any():
        raise UserError(f"registration failed: nothing is left of the brain at {SPACING:g} mm")
    darkest, brightest = np.percentile(small.voxels[small.inside], CLIPPED)
    stretched = (small.voxels - darkest) / max(brightest - darkest, np.finfo(np.float32).tiny)
    return np.where(small.inside, np.clip(stretched, 0, 1), 0).astype(np.float32), target


def _optimise(voxels: Volume, affine: Affine) -> tuple[Affine, float]:
    """The affine from MNI mm to the image's, and the mutual information reached."""
    import SimpleITK as sitk

    # the method's own number of threads does not apply to its metric; ITK is used only here
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    template = load_template()
    fixed, moving = as_itk(template.brain, template.affine), as_itk(voxels, affine)
    around = ndimage.binary_dilation(template.mask, iterations=round(MARGIN_MM / 2 / SPACING))
    start = sitk.CenteredTransformInitializer(
        fixed, moving, sitk.AffineTransform(3), sitk.CenteredTransformInitializerFilter.MOMENTS
    )
    transform = sitk.AffineTransform(start)
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(HISTOGRAM_BINS)
    method.SetMetricFixedMask(as_itk(around.astype(np.uint8), template.affine))
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=2.0,
        minStep=1e-3,
        numberOfIterations=STEPS,
        relaxationFactor=0.6,
        gradientMagnitudeTolerance=1e-6,
    )
    descend(method, fixed, moving, transform, SHRINKING, BLUR_MM, "registration to MNI152 failed")
    return as_affine(transform), -float(method.GetMetricValue())


def descend(
    method: SimpleITK.ImageRegistrationMethod,
    fixed: SimpleITK.Image,
    moving: SimpleITK.Image,
    transform: SimpleITK.Transform,
    shrinking: tuple[int, ...],
    blur_mm: tuple[float, ...],
    failed: str,
) -> None:
    """Improve `transform` in place, from coarse to fine, by the metric and optimiser that `method` has.

    Args:
        method: with its metric and its optimiser.
        fixed: the image whose points are mapped.
        moving: the image that they are mapped into.
        transform: from where to start; changed.
        shrinking: factor of the voxels at every level.
        blur_mm: Gaussian sigma at every level, mm.
        failed: what is told if the images cease to overlap.

    Raises:
        UserError: the overlap is too small to continue.
    """
    import SimpleITK as sitk

    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel(shrinking)
    method.SetSmoothingSigmasPerLevel(blur_mm)
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    method.SetInitialTransform(transform, inPlace=True)
    try:
        method.Execute(fixed, moving)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{failed}: {reason}") from None


_RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # ITK's mm run to the left and to the back


def as_itk(voxels: npt.NDArray[np.float32 | np.uint8], affine: Affine) -> SimpleITK.Image:
    """An array (X, Y, Z) with its affine (4, 4) in RAS mm as an image of ITK."""
    import SimpleITK as sitk

    lps = _RAS_TO_LPS @ affine
    edges = voxel_sizes(lps)
    image = sitk.GetImageFromArray(np.ascontiguousarray(voxels.T))  # ITK's arrays are Z, Y, X
    image.SetSpacing(edges.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / edges).ravel().tolist())
    return image


def as_affine(transform: SimpleITK.AffineTransform | SimpleITK.Euler3DTransform) -> Affine:
    """(4, 4) between RAS mm of a transform about a centre between LPS mm."""
    known: Any = transform
    matrix = np.eye(4)
    matrix[:3, :3] = np.reshape(known.GetMatrix(), (3, 3))
    centre = np.array(known.GetCenter())
    matrix[:3, 3] = centre + known.GetTranslation() - matrix[:3, :3] @ centre
    return _RAS_TO_LPS @ matrix @ _RAS_TO_LPS
