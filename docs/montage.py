"""Pictures of brains: axial, coronal and sagittal slices of several volumes, with captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from numpy.typing import NDArray
from PIL import Image

BACKGROUND, INK = "#101014", "#e8e8ec"
COLUMN = 1.6  # inches


def montage(
    volumes: NDArray[np.float32],
    captions: Sequence[str],
    path: str | Path,
    *,
    titles: Sequence[str] = ("",),
    colour_maps: Sequence[str] = ("gray",),
    units: Sequence[str] = ("",),
    limits: Sequence[tuple[float, float]] | None = None,
    cut: tuple[float, float, float] = (0.5, 0.5, 0.5),
    dpi: int = 100,
) -> Path:
    """Save a PNG with one column per volume and, for each channel, its axial, coronal and sagittal slice.

    Args:
        volumes: (N, X, Y, Z) or (N, C, X, Y, Z), RAS, 0 outside the head. Left is drawn on the left.
        captions: N texts of one or two lines, one over each column, such as "24 y".
        path: the PNG to write.
        titles: C names of the channels.
        colour_maps: C matplotlib colour maps.
        units: C labels of the colour bars.
        limits: C lowest and highest values shown; None takes 0 to the 99.5th percentile inside the heads.
        cut: where X, Y and Z are sliced, as fractions of the box that holds all heads.
        dpi: resolution; a column is 1.6 inches wide.
    """
    channels = volumes[:, None] if volumes.ndim == 4 else volumes
    count, kinds = channels.shape[:2]
    if len(captions) != count or not len(titles) == len(colour_maps) == len(units) == kinds:
        raise ValueError(f"{count} volumes of {kinds} channels need as many captions, titles, maps and units")
    channels = _cropped(channels)
    size_x, size_y, size_z = channels.shape[2:]
    rows = [size_y / size_x, size_z / size_x, size_z / size_y] * kinds
    width, height = COLUMN * count + 1.05, COLUMN * sum(rows) + 0.6
    figure = Figure(figsize=(width, height), facecolor=BACKGROUND, dpi=dpi)
    canvas = FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        3 * kinds,
        count,
        left=0.35 / width,
        right=1 - 0.7 / width,
        bottom=0.1 / height,
        top=1 - 0.5 / height,
        wspace=0.04,
        hspace=0.04,
        height_ratios=rows,
    )
    for kind in range(kinds):
        shown = (
            limits[kind]
            if limits
            else (0.0, float(np.percentile(channels[:, kind][channels[:, kind] > 0], 99.5)))
        )
        scale = ScalarMappable(Normalize(*shown), colour_maps[kind])
        for column in range(count):
            for row, plane in enumerate(_slices(channels[column, kind], cut)):
                axes = figure.add_subplot(grid[3 * kind + row, column])
                _draw(axes, plane, scale)
                if kind == row == 0:
                    axes.set_title(captions[column], color=INK, fontsize=10, pad=4)
        _add_scale(
            figure, grid[3 * kind : 3 * kind + 3, :].get_position(figure), scale, titles[kind], units[kind]
        )
    canvas.draw()
    # 256 colours halve the size of the file, and are enough for two colour maps
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    picture.quantize(256, dither=Image.Dither.NONE).save(path)
    return Path(path)


def _cropped(channels: NDArray[np.float32]) -> NDArray[np.float32]:
    """(N, C, X, Y, Z) without the margins where every volume is 0."""
    inside = np.argwhere(channels.any(axis=(0, 1)))
    if not inside.size:
        raise ValueError("all volumes are 0; there is nothing to draw")
    x, y, z = map(slice, inside.min(axis=0), inside.max(axis=0) + 1)
    return channels[:, :, x, y, z]


def _slices(volume: NDArray[np.float32], cut: tuple[float, float, float]) -> list[NDArray[np.float32]]:
    """Axial, coronal and sagittal slice of (X, Y, Z), each as (rows, columns) from bottom left."""
    x, y, z = (round(part * (size - 1)) for part, size in zip(cut, volume.shape, strict=True))
    return [volume[:, :, z].T, volume[:, y, :].T, volume[x, :, :].T]


def _draw(axes: Axes, plane: NDArray[np.float32], scale: ScalarMappable) -> None:
    colours = scale.to_rgba(plane)
    colours[plane == 0] = (*(int(BACKGROUND[place : place + 2], 16) / 255 for place in (1, 3, 5)), 1)
    axes.imshow(colours, origin="lower", interpolation="nearest")
    axes.set_axis_off()


def _add_scale(figure: Figure, box: Bbox, scale: ScalarMappable, title: str, unit: str) -> None:
    """The name of the channel on the left of its rows, and its colour bar on the right."""
    width = figure.get_figwidth()
    figure.text(0.17 / width, (box.y0 + box.y1) / 2, title, color=INK, fontsize=11, rotation=90,
                ha="center", va="center")  # fmt: skip
    place = (1 - 0.62 / width, box.y0 + 0.3 * box.height, 0.1 / width, 0.4 * box.height)
    bar = figure.colorbar(scale, cax=figure.add_axes(place))
    bar.set_label(unit, color=INK, fontsize=9)
    bar.ax.tick_params(colors=INK, labelsize=8)
    bar.outline.set_visible(False)
