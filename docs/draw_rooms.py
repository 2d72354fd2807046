"""Draw docs/rooms.svg: the rooms of the code, and an arrow for every room that another room imports.

Run `python docs/draw_rooms.py` from the root of the repository. The arrows are those of the imports in the code; only
the places of the rooms are written here. Arrows run to the right or down, so an import against the flow is an error.
"""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from core.report.figures.style import INK, MUTED, PAPER, SERIES

ROOT = Path(__file__).parents[1]
PICTURE = Path(__file__).with_name("rooms.svg")
PACKAGES = ("distributed", "search_spaces", "core")
FRAMES = ("distributed", "core", "core.report", "core.volumes")
"""Boxes around other boxes. An arrow into or out of a frame stands for all its rooms."""
EVERYWHERE = "core.files"
"""Most rooms import it, so the picture says this, and has no arrows for it."""
THICKNESSES = {6.0: (20, "20 or more"), 3.5: (5, "5 to 19"), 1.4: (1, "1 to 4 lines")}
"""Of an arrow, by its number of import lines. In steps, so that not every new import changes the picture."""

# The files that lie loose in core are drawn with the folder to which they belong.
DRAWN_WITH = {
    "core.inference": "core.tasks",
    "core.explaining": "core.tasks",
    "core.proposals": "core.tasks",
    "core.own_grid": "core.tasks",
    "core.objectives": "core.evaluation",
    "core.run_settings": "core.config",
    "core.settings_list": "core.config",
    "core.starts": "core.tasks",
    "core.task_description": "core.run_description",
    "core.run_access": "core.run_description",
    "core.run_names": "core.run_description",
    "core.report.html": "core.report.page",
    "core.report.compare": "core.report.page",
    "core.report.curve": "core.report.page",
    "core.report.nested": "core.report.page",
    "core.errors": EVERYWHERE,
    "core.lookup": EVERYWHERE,
    "core.schedules": EVERYWHERE,
}


class Box(NamedTuple):
    """The place of a room in the picture, in units of the SVG, and what is written in it."""

    left: float
    top: float
    width: float
    height: float
    lines: tuple[str, ...]

    @property
    def right(self) -> float:
        """The right edge."""
        return self.left + self.width

    @property
    def bottom(self) -> float:
        """The lower edge."""
        return self.top + self.height

    @property
    def centre(self) -> Point:
        """The middle."""
        return Point(self.left + self.width / 2, self.top + self.height / 2)


class Point(NamedTuple):
    """A place in the picture."""

    x: float
    y: float


Arrows = Mapping[tuple[str, str], int]
"""(a room, the room that it imports) -> the number of import lines."""

WIDTH, HEIGHT = 1210, 780
BOXES = {
    "distributed": Box(20, 20, 910, 290, ("distributed", "a sweep on Ray")),
    "distributed.commands": Box(45, 147, 130, 50, ("commands", "the command line")),
    "distributed.sweeps": Box(235, 147, 130, 50, ("sweeps", "from start to report")),
    "distributed.search": Box(430, 65, 135, 50, ("search", "what is tried next")),
    "distributed.training": Box(430, 147, 135, 50, ("training", "what a worker does")),
    "distributed.slots": Box(430, 229, 135, 50, ("slots", "groups of workers")),
    "distributed.run": Box(635, 147, 110, 50, ("run", "folder of a run")),
    "distributed.batches": Box(795, 147, 110, 50, ("batches", "plan to volumes")),
    "search_spaces": Box(1030, 147, 160, 50, ("search_spaces", "what a search varies")),
    "core": Box(20, 360, 1170, 400, ("core", "plain PyTorch, no Ray")),
    "core.report": Box(40, 398, 260, 270, ("report",)),
    "core.report.quality": Box(56, 452, 94, 46, ("quality", "of a cohort")),
    "core.report.figures": Box(190, 452, 94, 46, ("figures", "drawing")),
    "core.report.page": Box(56, 566, 94, 46, ("pages", "and html.py")),
    "core.report.answer": Box(190, 566, 94, 46, ("answer", "what it says")),
    "core.tasks": Box(355, 493, 135, 50, ("tasks", "and inference.py")),
    "core.run_description": Box(355, 612, 135, 50, ("run_*.py", "run.json and names")),
    "core.config": Box(545, 430, 100, 50, ("config.py", "all settings")),
    "core.losses": Box(700, 430, 110, 50, ("losses",)),
    "core.models": Box(700, 505, 110, 50, ("models",)),
    "core.evaluation": Box(700, 580, 110, 50, ("evaluation", "and objectives.py")),
    "core.volumes": Box(850, 398, 320, 270, ("volumes",)),
    "core.volumes.ingest": Box(866, 440, 76, 40, ("ingest",)),
    "core.volumes.sources": Box(972, 440, 76, 40, ("sources",)),
    "core.volumes.phantom": Box(866, 520, 76, 40, ("phantom",)),
    "core.volumes.cohort": Box(972, 520, 76, 40, ("cohort",)),
    "core.volumes.views": Box(866, 600, 76, 40, ("views",)),
    "core.volumes.derive": Box(972, 600, 76, 40, ("derive",)),
    "core.volumes.images": Box(1078, 500, 76, 80, ("images",)),
    EVERYWHERE: Box(40, 698, 1130, 42, ("files, errors.py, lookup.py, schedules.py",)),
}
# Where an arrow must pass, so that it goes round the rooms in between.
PASSES = {
    ("distributed.commands", "distributed.run"): [Point(430, 294), Point(565, 294)],
    ("distributed.commands", "distributed.slots"): [Point(235, 214), Point(330, 236)],
    ("distributed.sweeps", "distributed.run"): [Point(430, 131), Point(565, 131)],
    ("distributed.sweeps", "distributed.batches"): [Point(430, 216), Point(745, 216)],
    ("distributed.training", "distributed.batches"): [Point(635, 206), Point(745, 206)],
    ("core.report", "core.losses"): [Point(545, 414), Point(645, 414)],
    ("core.report", "core.evaluation"): [Point(355, 578), Point(490, 578)],
    ("core.report", "core.volumes"): [Point(355, 680), Point(810, 680)],
    ("core.run_description", "core.volumes"): [Point(700, 642), Point(810, 642)],
    ("core.tasks", "core.losses"): [Point(545, 491), Point(645, 491)],
    ("core.tasks", "core.volumes"): [Point(700, 567), Point(810, 567)],
    ("core.config", "core.volumes"): [Point(700, 414), Point(810, 414)],
    ("core.volumes.ingest", "core.volumes.images"): [Point(972, 500), Point(1048, 500)],
}


def arrows_between(root: Path) -> Counter[tuple[str, str]]:
    """How many import lines of each room reach each other room; imports inside functions count, too."""
    files = {
        ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file
        for package in PACKAGES
        for file in (root / package).rglob("*.py")
    }
    rooms = {module: _room(module) for module in files}
    arrows: Counter[tuple[str, str]] = Counter()
    for module, file in files.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            reached = {rooms[name] for name in _imported(node, rooms)}
            arrows.update((rooms[module], other) for other in reached - {rooms[module]})
    return arrows


def draw(arrows: Arrows) -> str:
    """The picture as SVG.

    Raises:
        ValueError: a room has no place in the picture, or an arrow would run to the left or up.
    """
    for room in sorted({room for arrow in arrows for room in arrow}):
        if room not in BOXES:
            raise ValueError(f"{room} has no place in the picture; add it to BOXES in docs/draw_rooms.py")
    drawn = {arrow: lines for arrow, lines in joined(arrows).items() if arrow[1] != EVERYWHERE}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'font-family="Helvetica, Arial, sans-serif" text-anchor="middle">',
        "<title>The rooms of brainsweep, and which room imports which</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="{PAPER}"/>',
        *(_frame(name) for name in FRAMES),
        *_arrows(drawn),
        *(_room_box(name) for name in BOXES if name not in FRAMES and name != EVERYWHERE),
        _bar(),
        *_key(),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def joined(arrows: Arrows) -> Counter[tuple[str, str]]:
    """The arrows as they are drawn: between the outermost boxes that do not hold both rooms."""
    together: Counter[tuple[str, str]] = Counter()
    for (room, other), lines in arrows.items():
        around, around_other = _boxes_around(room), _boxes_around(other)
        start = next(name for name in around if name not in around_other)
        end = next(name for name in around_other if name not in around)
        together[start, end] += lines
    return together


def _room(module: str) -> str:
    """distributed.run.folder -> distributed.run; core.volumes.cohort.reader -> core.volumes.cohort."""
    parts = module.split(".")
    frame = max((frame for frame in FRAMES if f"{module}.".startswith(f"{frame}.")), key=len, default="")
    room = ".".join(parts[: frame.count(".") + 2]) if frame else parts[0]
    return DRAWN_WITH.get(room, room)


def _imported(node: ast.AST, rooms: Mapping[str, str]) -> Iterator[str]:
    """The modules of ours that an import reaches: `from core import errors` reaches core.errors, and not core."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in rooms)
    elif isinstance(node, ast.ImportFrom) and node.module and node.module in rooms:
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            yield inner if inner in rooms else node.module


def _boxes_around(room: str) -> list[str]:
    """The frames around a room, the outermost one first, and the room itself."""
    parts = room.split(".")
    return [name for end in range(1, len(parts) + 1) if (name := ".".join(parts[:end])) in BOXES]


def _arrows(drawn: Arrows) -> Iterator[str]:
    """Every arrow as a curve, thicker for more import lines."""
    ends = _ends(drawn)
    for (room, other), lines in sorted(drawn.items()):
        start, end = ends[room, other]
        downward = BOXES[other].left < BOXES[room].right
        thickness = _thickness(lines)
        tip = 5 + 1.2 * thickness
        # The line ends inside its tip, where it does not show.
        line_end = Point(end.x, end.y - tip / 2) if downward else Point(end.x - tip / 2, end.y)
        curve = _curve([start, *PASSES.get((room, other), []), line_end], downward)
        shape = (
            [(-tip / 2, -tip), (tip / 2, -tip), (0, 0)]
            if downward
            else [(-tip, -tip / 2), (-tip, tip / 2), (0, 0)]
        )
        corners = " ".join(f"{end.x + x:.1f},{end.y + y:.1f}" for x, y in shape)
        colour = _colour(room)
        yield (
            f"<g><title>{room} imports {other}</title>"
            f'<path d="{curve}" fill="none" stroke="{colour}" stroke-opacity="0.65" stroke-width="{thickness}"/>'
            f'<polygon points="{corners}" fill="{colour}"/></g>'
        )


def _ends(drawn: Arrows) -> dict[tuple[str, str], tuple[Point, Point]]:
    """Where each arrow begins and ends: spread along the edges of the boxes, in the order of the other ends."""
    edges: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for room, other in sorted(drawn):
        a, b = BOXES[room], BOXES[other]
        if b.left >= a.right:
            sides = ("right", "left")
        elif b.top >= a.bottom:
            sides = ("bottom", "top")
        else:
            raise ValueError(f"{room} imports {other}, against the flow of the picture")
        edges[room, sides[0]].append((room, other))
        edges[other, sides[1]].append((room, other))
    places: dict[tuple[str, str], dict[str, Point]] = defaultdict(dict)
    for (box, side), arrows in edges.items():
        arrows.sort(key=lambda arrow: _direction(arrow, box, side))
        for place, arrow in enumerate(arrows, start=1):
            share = place / (len(arrows) + 1)
            places[arrow]["start" if arrow[0] == box else "end"] = _on_edge(BOXES[box], side, share)
    return {
        arrow: (found["start"], _beneath(found["start"], found["end"], arrow[1]))
        for arrow, found in places.items()
    }


def _beneath(start: Point, end: Point, other: str) -> Point:
    """`end`, moved beneath `start` where the arrow runs down to a box that is wide enough."""
    box = BOXES[other]
    return Point(start.x, end.y) if end.y == box.top and box.left < start.x < box.right else end


def _direction(arrow: tuple[str, str], box: str, side: str) -> float:
    """The height (beside an edge) or the place across (below one) to which an arrow goes next from `box`."""
    passes = PASSES.get(arrow, [])
    leaves = arrow[0] == box
    towards = (
        (passes[0] if leaves else passes[-1]) if passes else BOXES[arrow[1] if leaves else arrow[0]].centre
    )
    return towards.y if side in ("left", "right") else towards.x


def _on_edge(box: Box, side: str, share: float) -> Point:
    if side in ("left", "right"):
        return Point(box.left if side == "left" else box.right, box.top + share * box.height)
    return Point(box.left + share * box.width, box.top if side == "top" else box.bottom)


def _curve(through: Iterable[Point], downward: bool) -> str:
    """A smooth curve through the points, level (or upright, if `downward`) at each of them."""
    first, *others = through
    text, last = f"M{first.x:.1f} {first.y:.1f}", first
    for point in others:
        if downward:
            bend = (point.y - last.y) / 2
            controls = Point(last.x, last.y + bend), Point(point.x, point.y - bend)
        else:
            bend = (point.x - last.x) / 2
            controls = Point(last.x + bend, last.y), Point(point.x - bend, point.y)
        text += " C" + " ".join(f"{each.x:.1f} {each.y:.1f}" for each in (*controls, point))
        last = point
    return text


def _thickness(lines: int) -> float:
    return next(thickness for thickness, (least, _) in THICKNESSES.items() if lines >= least)


def _colour(room: str) -> str:
    return dict(zip(PACKAGES, SERIES, strict=False))[room.split(".")[0]]


def _frame(name: str) -> str:
    box, colour = BOXES[name], _colour(name)
    title, *rest = box.lines
    size = 17 if "." not in name else 14
    words = f'<tspan font-weight="bold" fill="{colour}">{title}</tspan>' + "".join(
        f'<tspan dx="8" font-size="13">{line}</tspan>' for line in rest
    )
    return (
        f'<rect x="{box.left}" y="{box.top}" width="{box.width}" height="{box.height}" rx="8" fill="{colour}" '
        f'fill-opacity="0.07" stroke="{colour}" stroke-opacity="0.5"/>'
        f'<text x="{box.left + 12}" y="{box.top + 24}" text-anchor="start" font-size="{size}" fill="{MUTED}">'
        f"{words}</text>"
    )


def _room_box(name: str) -> str:
    box, colour = BOXES[name], _colour(name)
    title, *rest = box.lines
    x, y = box.centre
    text = f'<text x="{x}" y="{y + (-3 if rest else 5)}" font-size="14" font-weight="bold" fill="{INK}">{title}</text>'
    for line in rest:
        text += f'<text x="{x}" y="{y + 14}" font-size="11" fill="{MUTED}">{line}</text>'
    return (
        f'<rect x="{box.left}" y="{box.top}" width="{box.width}" height="{box.height}" rx="5" fill="{PAPER}" '
        f'stroke="{colour}" stroke-width="1.4"/>{text}'
    )


def _bar() -> str:
    """What most rooms import."""
    box, colour = BOXES[EVERYWHERE], _colour(EVERYWHERE)
    return (
        f'<rect x="{box.left}" y="{box.top}" width="{box.width}" height="{box.height}" rx="5" fill="{PAPER}" '
        f'stroke="{colour}" stroke-width="1.4"/>'
        f'<text x="{box.centre.x}" y="{box.centre.y + 5}" font-size="14" fill="{MUTED}">'
        f'<tspan font-weight="bold" fill="{INK}">{box.lines[0]}</tspan>'
        '<tspan dx="10" font-size="12">most rooms import these</tspan></text>'
    )


def _key() -> Iterator[str]:
    """What an arrow means, in the free corner below search_spaces."""
    yield f'<text x="950" y="232" text-anchor="start" font-size="12" fill="{MUTED}">An arrow: “imports”</text>'
    for place, (thickness, (_, words)) in enumerate(reversed(THICKNESSES.items())):
        y = 252 + 20 * place
        yield (
            f'<path d="M950 {y}h40" stroke="{MUTED}" stroke-width="{thickness}"/>'
            f'<text x="1000" y="{y + 4}" text-anchor="start" font-size="12" fill="{MUTED}">{words}</text>'
        )


if __name__ == "__main__":
    PICTURE.write_text(draw(arrows_between(ROOT)), encoding="utf-8")
