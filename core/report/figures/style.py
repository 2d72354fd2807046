"""One look for every figure, and figures as SVG that follow the page's light or dark colours."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any, TypeVar

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Drawer = TypeVar("Drawer", bound=Callable[..., Figure])

# Wong, Nature Methods 8:441 (2011): told apart with every common colour blindness. The last two are nearly
# as light as paper and come last.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
ACCENT, SECOND = SERIES[0], SERIES[1]
# Unusual values on purpose: `as_svg` finds them and puts the page's own colours there.
INK, MUTED, GRID, PAPER = "#1b1f24", "#6a717b", "#dfe2e6", "#fefefd"
PAGE_COLOURS = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    PAPER: "var(--paper)",
    SERIES[0]: "var(--accent)",
    SERIES[1]: "var(--second)",
}
WIDTH = 5.6  # inches; at a phone's 380 px the 10 pt text is still about 9 px high

STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "figure.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "patch.linewidth": 0.8,
    "text.color": INK,
    "text.parse_math": False,  # a site may be called "$1 clinic"
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "svg.fonttype": "none",  # real text: small, searchable, read aloud
    "savefig.facecolor": "none",
}


_context: Any = matplotlib.rc_context  # typed by the name of every setting there is


def styled(draw: Drawer) -> Drawer:
    """Decorate a function that draws a figure: it draws in the house style."""
    return _context(STYLE)(draw)


def new_figure(height: float, width: float = WIDTH, **grid: Any) -> tuple[Figure, Any]:
    """A figure of `width` x `height` inches and its axes (`grid`: as in `Figure.subplots`)."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(**grid)


def legend_above(axes: Axes, columns: int = 3, **options: Any) -> None:
    """A legend above the axes, where it hides no data."""
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=columns,
        borderaxespad=0.2,
        columnspacing=1.2,
        handletextpad=0.4,
        **options,
    )


def as_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as one inline `<svg>` element, described for people who cannot see it.

    `name` (unique in the page) goes before every id, so that figures do not take each other's clip paths.
    """
    with _context({**STYLE, "svg.hashsalt": name}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg).replace("url(#", f"url(#{name}-")
    for colour, variable in PAGE_COLOURS.items():
        svg = svg.replace(colour, variable)
    svg = re.sub(r"\n\s*", "\n", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{_escape(description)}"', 1)


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
