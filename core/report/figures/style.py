"""One style for all figures, and figures as SVG that follow the light or dark colours of the page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import ParamSpec

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.typing import RcKeyType

Arguments = ParamSpec("Arguments")

# Wong, Nature Methods 8:441 (2011): people with any common colour blindness can distinguish them. The last two
# are nearly as light as paper.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
ACCENT, SECOND = SERIES[0], SERIES[1]
# Unusual values on purpose: `as_svg` finds them and replaces them by the colours of the page.
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

STYLE: dict[RcKeyType, str | float | bool] = {
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


def styled(draw: Callable[Arguments, Figure]) -> Callable[Arguments, Figure]:
    """Decorate a function that draws a figure, so that it draws in this style."""
    return matplotlib.rc_context(STYLE)(draw)


def new_figure(height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    """A figure of `width` x `height` inches and its axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def new_grid(height: float, rows: int, columns: int, *, shared: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure of `WIDTH` x `height` inches and its axes, row by row; `shared`: all have one scale."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, sharex=shared, sharey=shared, squeeze=False).flat)


def cut_above(axes: Axes, lowest: float, limit: float) -> None:
    """Show values from the lowest one to a limit that some exceed.

    The lower end is set too: matplotlib's own margin is a share of the values that are cut, and may reach far below 0.
    """
    axes.set_ylim(lowest - 0.05 * (limit - lowest), limit)


def legend_above(axes: Axes, columns: int = 3) -> None:
    """A legend above the axes, where it hides no data."""
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=columns,
        borderaxespad=0.2,
        columnspacing=1.2,
        handletextpad=0.4,
    )


def as_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as one inline `<svg>` element, described for people who cannot see it.

    `name` (unique in the page) is put before every id, so that no figure uses the clip paths of another.
    """
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
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
