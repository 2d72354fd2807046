"""The 1 mm maps from which the phantom's anatomy is made, with ventricles and regions drawn on them.

The maps are the ICBM152 2009a symmetric average (Fonov et al. 2011) inside the nilearn wheel, so nothing is
downloaded. All arrays are cropped to the head, (X, Y, Z), RAS; `open_millimetres` says where each voxel is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from core.volumes.phantom.ageing import REGIONS

if TYPE_CHECKING:
    import nibabel

Kind = TypeVar("Kind", np.float32, np.uint8)
"""Of a map's voxels: fractions and intensities, or labels."""
Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]

CROP = (slice(22, 176), slice(22, 216), slice(0, 160))  # of the 1 mm templates: all that is inside the skull
CROP_START = (-98 + 22, -134 + 22, -72)  # mm, centre of the first voxel of the crop
PUSH_REACH_MM = 45.0  # distance from the ventricles beyond which their growth moves nothing


@dataclass(frozen=True, eq=False)
class Templates:
    """The average head at 1 mm."""

    inside: Mask
    """Inside the skull: tissue and CSF."""
    tissue: Floats
    """Probability of grey or white matter: the lower, the sooner a voxel turns into CSF."""
    whiteness: Floats
    """White share of the tissue."""
    wall_shift: Floats
    """By how many mm the wall of the ventricles must move outwards to reach a voxel; negative inside them."""
    push: Floats
    """(3, X, Y, Z) displacement in mm for each mm by which the ventricles' wall moves outwards."""
    regions: NDArray[np.uint8]
    """0 for none, else 1 + place in REGIONS."""
    residual_t1: Floats
    """What the T1-weighted template shows beyond its three tissues."""


def load_templates() -> Templates:
    """Read the maps through nilearn's loaders and draw ventricles and regions on them (about 1.5 s)."""
    from nilearn import datasets  # here because it takes a second, and the command line imports this module

    grey = _cropped(datasets.load_mni152_gm_template(resolution=1))
    white = _cropped(datasets.load_mni152_wm_template(resolution=1))
    t1 = _cropped(datasets.load_mni152_template(resolution=1))
    inside = _cropped(datasets.load_mni152_brain_mask(resolution=1)) > 0
    depth = _depth(_find_ventricles(grey + white, inside))
    # the share of the wall's shift by which a voxel moves: 1 at the wall, less with depth
    felt = np.clip(1 - np.clip(depth, 0, None) / np.float32(PUSH_REACH_MM), 0, None) ** 2
    # the maps have 256 levels; a little smoothing leaves no ties, and no jagged borders
    tissue = ndimage.gaussian_filter(grey + white, 0.6)
    return Templates(
        inside=inside,
        tissue=tissue,
        whiteness=ndimage.gaussian_filter(white, 0.6) / np.maximum(tissue, np.float32(1e-3)),
        wall_shift=depth / np.maximum(felt, np.float32(1e-6)),
        push=np.array(np.gradient(depth)) * (felt * np.clip(1 + depth / 3, 0, 1)),
        regions=_draw_regions(),
        # 0.66, 0.88 and 0.28 are the least-squares intensities of grey, white and CSF in the template;
        # what remains at the ventricles' wall does not belong where the wall is in another brain
        residual_t1=(t1 - 0.28 - 0.38 * grey - 0.60 * white) * inside * np.clip(depth / 4 - 1, 0, 1),
    )


def _cropped(image: nibabel.Nifti1Image) -> Floats:
    return np.asarray(image.dataobj[CROP], dtype=np.float32)


def open_millimetres() -> list[Floats]:
    """x, y and z in MNI mm of every voxel, as an open grid."""
    starts_and_sizes = zip(CROP_START, (part.stop - part.start for part in CROP), strict=True)
    axes = [start + np.arange(size, dtype=np.float32) for start, size in starts_and_sizes]
    return list(np.ix_(*axes))


def _find_ventricles(tissue: Floats, inside: Mask) -> Mask:
    """Fluid in a central box that is connected to the bodies of the lateral ventricles."""
    x, y, z = open_millimetres()
    box = (abs(x) < 45) & (y > -55) & (y < 40) & (z > -8) & (z < 38)
    behind_third = (abs(x) < 8) & (y < -28)  # cisterns around the pineal gland
    labels, _ = ndimage.label((tissue < 0.6) & inside & box & ~behind_third)
    seeds = (abs(x) > 4) & (abs(x) < 8) & (y > 5) & (y < 15) & (z > 8) & (z < 20)
    return np.isin(labels, np.unique(labels[seeds & (labels > 0)]))


def _depth(ventricle: Mask) -> Floats:
    """Smooth distance in mm to the wall of the ventricles, negative inside them."""
    depth = ndimage.distance_transform_edt(~ventricle).astype(np.float32)
    around = ndimage.find_objects(ndimage.binary_dilation(ventricle).astype(np.uint8))[0]
    depth[around] -= ndimage.distance_transform_edt(ventricle[around]).astype(np.float32)
    smooth: Floats = ndimage.gaussian_filter(depth, 1.5)
    return smooth


# Centre (|x|, y, z) and half axes of an ellipsoid on each side, MNI mm, read off the template.
NUCLEUS_MM = {
    "thalamus": ((11, -18, 7), (11, 15, 10)),
    "caudate": ((13, 11, 9), (6, 13, 11)),
    "putamen": ((26, 3, 1), (7, 17, 11)),
    "pallidum": ((19, -5, -1), (6, 9, 7)),
    "hippocampus": ((27, -22, -13), (8, 20, 8)),
    "amygdala": ((23, -4, -19), (9, 8, 8)),
}


def _draw_regions() -> NDArray[np.uint8]:
    """Label every voxel, tissue or not, with its region.

    Approximations: lobes are cut by straight planes near the central, Sylvian and parieto-occipital sulci
    and the tentorium; nuclei are ellipsoids. They give a phantom regional contrast and are not meant for measurements.
    """
    x, y, z = open_millimetres()
    side = abs(x)
    labels = np.zeros(np.broadcast_shapes(x.shape, y.shape, z.shape), dtype=np.uint8)
    # later cuts claim voxels from earlier ones
    labels[np.broadcast_to(z > -5, labels.shape)] = _label("parietal")
    labels[np.broadcast_to(y > -5 - 0.33 * z, labels.shape)] = _label("frontal")
    below_sylvian = z < np.clip(-0.5 * y, -12, 15)
    labels[(side > 18) & below_sylvian & (y < 22)] = _label("temporal")
    labels[np.broadcast_to(y < -70 - 0.15 * z, labels.shape)] = _label("occipital")
    labels[(y < -35) & (z < -8 - 0.3 * side)] = _label("cerebellum")
    labels[(side < 14) & (y > -42) & (y < -12) & (z < -10)] = 0  # brain stem
    for name, (centre, half_axes) in NUCLEUS_MM.items():
        offsets = zip((side, y, z), centre, half_axes, strict=True)
        labels[sum(((place - middle) / half) ** 2 for place, middle, half in offsets) <= 1] = _label(name)
    return labels


def _label(region: str) -> int:
    return 1 + REGIONS.index(region)
