"""Random views of volumes, made on the batch and on its device.

    settings.py   `ViewSettings`, the choices of one run
    make.py       `make_views`: crop, cutout, noise, flips, small affine movements, intensities
    intensity.py  brightness, contrast and gamma inside the brain
    motion.py     small affine movements
    mirrored.py   patches with their left-right counterparts, quarter turns
    masks.py      blocks that are hidden
    patches.py    blocks of noise, and blocks taken from another brain
    slices.py     slices by partition of the body, and 2D views of them
    streams.py    where every random number comes from

Every view is a function of (seed, subject, epoch, view) alone, so it does not matter in which batch, in which
order or on which of several workers a subject is used. There is one exception, blocks taken from another brain
of the batch; `patches.swap_patches` says on what they depend.
"""

from core.volumes.views.make import Views, make_views, make_views_with_maps
from core.volumes.views.settings import ViewSettings

__all__ = ["ViewSettings", "Views", "make_views", "make_views_with_maps"]
