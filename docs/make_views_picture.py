"""Draw docs/views.png: a phantom brain, and one example of every kind of view.

Run `python docs/make_views_picture.py` from the root of the repository (half a minute). A bright spot in the left half
shows the orientation of the brain. Of 24 epochs the picture shows the one in which a view changes most.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch

from core.volumes.images.mirror import mirror_image
from core.volumes.phantom.cohort import phantom_brain
from core.volumes.phantom.settings import PhantomSettings
from core.volumes.views import ViewSettings, make_views
from core.volumes.views.patches import PatchSettings, corrupt, drop_patches, swap_patches
from core.volumes.views.slices import SliceViewSettings, partition_slices, slice_views
from core.volumes.views.turns import quarter_turns

matplotlib.use("Agg")
import matplotlib.pyplot as plt

AXIAL, CORONAL, SAGITTAL = 2, 1, 0
CUT = (0.36, 0.5, 0.5)
SPOT = (0.36, 0.66, 0.5)
"""In the left half (RAS: X runs to the right), in front, as fractions of the grid."""
COLUMNS = 6
SUBJECT = 0
EPOCHS = 24

VIEWS: list[tuple[str, int, dict[str, object]]] = [
    ("the brain itself", AXIAL, {}),
    ("crop=0.8", AXIAL, {"crop": 0.8}),
    ("crop_size=64, crop_place=centre", AXIAL, {"crop_size": 64, "crop_place": "centre"}),
    ("crop_size=64, pad_to=80", AXIAL, {"crop_size": 64, "pad_to": 80}),
    ("cutout=1", AXIAL, {"cutout": 1.0}),
    ("noise=0.1", AXIAL, {"noise": 0.1}),
    ("noise=0.1, noise_in=brain", AXIAL, {"noise": 0.1, "noise_in": "brain"}),
    ("flip=1", AXIAL, {"flip": 1.0}),
    ("flip_front_back=1", AXIAL, {"flip_front_back": 1.0}),
    ("flip_up_down=1", CORONAL, {"flip_up_down": 1.0}),
    ("rotate=30", AXIAL, {"rotate": 30.0}),
    ("zoom=0.2", AXIAL, {"zoom": 0.2}),
    ("translate=0.15", AXIAL, {"translate": 0.15}),
    ("scale=0.5", AXIAL, {"scale": 0.5}),
    ("shift=0.3", AXIAL, {"shift": 0.3}),
    ("contrast=0.8", AXIAL, {"contrast": 0.8}),
    ("gamma=1", AXIAL, {"gamma": 1.0}),
    ("all of them, mildly", AXIAL, {
        "crop": 0.9, "cutout": 1.0, "cutout_size": 0.25, "noise": 0.03, "flip": 0.5, "rotate": 10.0, "zoom": 0.1,
        "translate": 0.05, "scale": 0.1, "shift": 0.1, "contrast": 0.3, "gamma": 0.2,
    }),
]  # fmt: skip


def main() -> None:
    """Draw every view of the first phantom, in an epoch in which its effect is visible."""
    brains = torch.stack([phantom_t1w(index) for index in range(2)])
    panels = [
        (label, most_changed(brains[:1], axis, ViewSettings.model_validate({"count": 1, **settings})))
        for label, axis, settings in VIEWS
    ]
    panels += pretext_panels(brains) + slice_panels(brains)
    rows = -(-len(panels) // COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(COLUMNS * 1.9, rows * 2.15), facecolor="white")
    for place in axes.flat:
        place.set_axis_off()
    for place, (label, plane) in zip(axes.flat, panels, strict=False):
        place.imshow(plane.T, cmap="gray", vmin=0, vmax=1.25, origin="lower", interpolation="nearest")
        place.add_patch(plt.Rectangle((0, 0), 1, 1, transform=place.transAxes, fill=False, ec="0.75", lw=0.8))
        place.set_title(label, fontsize=7.5)
    figure.tight_layout(pad=0.4)
    figure.savefig(Path(__file__).with_name("views.png"), dpi=100)


def phantom_t1w(index: int) -> torch.Tensor:
    """(1, X, Y, Z) at 2 mm, white matter at 1, outside the brain 0."""
    brain = phantom_brain(PhantomSettings(spacing=2.0, channels=("t1w",)), index)
    t1w = brain.channels["t1w"]
    relative = np.asarray(t1w / np.median(t1w[brain.tissue == 3]), np.float32)
    places = np.indices(relative.shape).transpose(1, 2, 3, 0) / np.array(relative.shape)
    relative[np.linalg.norm((places - SPOT) * relative.shape, axis=-1) < 4] = 1.25
    return torch.from_numpy(relative)[None]


def most_changed(volumes: torch.Tensor, axis: int, settings: ViewSettings) -> np.ndarray:
    """The plane of the view that differs most from the volume's own, among EPOCHS epochs."""
    own = plane_of(volumes[0], axis)
    seen = [
        plane_of(make_views(volumes, [SUBJECT], epoch, 0, settings)[0, 0], axis) for epoch in range(EPOCHS)
    ]
    if seen[0].shape != own.shape:
        return seen[0]
    return max(seen, key=lambda plane: float(abs(plane - own).mean()))


def plane_of(volume_cxyz: torch.Tensor, axis: int) -> np.ndarray:
    """The plane through CUT across `axis`, the first channel."""
    volume = volume_cxyz[0].numpy()
    return np.take(volume, int(CUT[axis] * volume.shape[axis]), axis)


def pretext_panels(brains: torch.Tensor) -> list[tuple[str, np.ndarray]]:
    """Mirrored crops, quarter turns, blocks of noise and of the other brain."""
    both = torch.cat([brains[:1], mirror_image(brains[:1])], dim=1)
    crops = make_views(
        both, [SUBJECT], 0, 0, ViewSettings(count=1, crop_size=(44, 80, 80), pad_to=(44, 80, 80))
    )
    pair = crops[:, 0].unflatten(1, (2, -1))
    panels = [
        (name, plane_of(side, AXIAL))
        for name, side in zip(("mirrored crop: the patch", "… and its counterpart"), pair[0], strict=True)
    ]
    for epoch in range(4, 40):
        turned, turns = quarter_turns(pair[:, 0], [SUBJECT], epoch, 0)
        label = f"quarter turns: {int(turns[0])}"
        if label not in dict(panels):
            panels.append((label, plane_of(turned[0], SAGITTAL)))
    panels[2:] = sorted(panels[2:])
    settings = PatchSettings()
    panels.append(("another brain", plane_of(brains[1], AXIAL)))
    panels.append(("dropped blocks", plane_of(drop_patches(brains, range(2), 5, 0, settings)[0][0], AXIAL)))
    panels.append(("swapped blocks", plane_of(swap_patches(brains, range(2), 5, 0, settings)[0][0], AXIAL)))
    both, where = corrupt(brains[:, None], range(2), 5, 0, settings)
    return [
        *panels,
        ("both", plane_of(both[0, 0], AXIAL)),
        ("… and where", 1.25 * plane_of(where[0], AXIAL)),
    ]


def slice_panels(brains: torch.Tensor) -> list[tuple[str, np.ndarray]]:
    """Three partitions, and views of the middle one's slice."""
    inner = brains[:1, :, :, :, 15:80]
    sampled = partition_slices(inner, [SUBJECT], 3, 0, 3)
    settings = SliceViewSettings(
        count=4, window=100 / 160, corner=(10 / 160, 60 / 160), brightness=0.3, contrast=0.3
    )
    views = slice_views(sampled.slices_bpchw, [SUBJECT], 3, 0, settings)
    return [
        *((f"partition {part + 1} of 3", sampled.slices_bpchw[0, part, 0].numpy()) for part in range(3)),
        *((f"2D view {view + 1} of partition 2", views[0, 1, view, 0].numpy()) for view in range(4)),
    ]


if __name__ == "__main__":
    main()
