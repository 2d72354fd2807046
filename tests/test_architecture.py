"""`docs/architecture.md` is true to the code: its picture, and every file and function that it names."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
WALKS = ("A batch, from shard to loss", "A trial, from proposal to table", "A setting, from")
LINK = re.compile(r"\[(?P<words>[^\]]+)\]\((?P<target>[^)]+)\)")


def load_draw_rooms():
    spec = importlib.util.spec_from_file_location("draw_rooms", ROOT / "docs" / "draw_rooms.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


draw_rooms = load_draw_rooms()


def links_of(text: str) -> list[tuple[str, str]]:
    """(words, target) of every link in `text`."""
    return [(found["words"], found["target"]) for found in LINK.finditer(text)]


def walk(title: str) -> str:
    """The section of the page whose title begins with `title`."""
    (section,) = [each for each in PAGE.read_text().split("\n## ") if each.startswith(title)]
    return section


def defines(body: list[ast.stmt], name: str) -> bool:
    """Whether `name`, such as `Slot.step`, is a function or a class in the `body` of a module or a class."""
    first, _, inner = name.partition(".")
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    found = [node for node in body if isinstance(node, kinds) and node.name == first]
    return bool(found) and (not inner or defines(found[0].body, inner))


def test_the_picture_shows_the_imports_of_the_code():
    drawn = draw_rooms.draw(draw_rooms.arrows_between(ROOT))
    assert drawn == draw_rooms.PICTURE.read_text(encoding="utf-8"), "run: python docs/draw_rooms.py"


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_an_arrow_is_the_number_of_import_lines(tmp_path):
    write_tree(
        tmp_path,
        {
            "core/errors.py": "",
            "core/volumes/cohort/reader.py": "import numpy\nfrom core.errors import UserError",
            "core/volumes/cohort/writer.py": "from core.volumes.cohort.reader import Cohort",
            "distributed/sweeps/sweep.py": (
                "from core.volumes.cohort.reader import Cohort, read_file\n"
                "from distributed.run import folder\n"
                "def run():\n    import core.volumes.cohort.writer"
            ),
            "distributed/run/__init__.py": "",
            "distributed/run/folder.py": "",
        },
    )
    arrows = draw_rooms.arrows_between(tmp_path)
    assert arrows == {
        ("core.volumes.cohort", "core.files"): 1,
        ("distributed.sweeps", "core.volumes.cohort"): 2,
        ("distributed.sweeps", "distributed.run"): 1,
    }
    assert draw_rooms.joined(arrows) == {
        ("core.volumes", "core.files"): 1,
        ("distributed", "core"): 2,
        ("distributed.sweeps", "distributed.run"): 1,
    }


def test_an_import_against_the_flow_is_not_drawn():
    with pytest.raises(ValueError, match=r"distributed\.run imports distributed\.sweeps, against the flow"):
        draw_rooms.draw({("distributed.run", "distributed.sweeps"): 1})


def test_a_room_without_a_place_is_named():
    with pytest.raises(ValueError, match=r"core\.atlas has no place in the picture"):
        draw_rooms.draw({("core.atlas", "core.volumes.cohort"): 1})


def test_every_link_leads_to_a_file_and_every_function_is_in_it():
    for words, target in links_of(PAGE.read_text()):
        path = PAGE.parent / target
        assert path.is_file(), f"{target} does not exist"
        name = words.strip("`")
        if words != name:
            assert defines(ast.parse(path.read_text()).body, name), f"{target} has no {name}"


@pytest.mark.parametrize("title", WALKS)
def test_every_step_of_a_walk_names_a_function(title):
    _, *steps = re.split(r"\n\d+\. ", walk(title))
    assert len(steps) >= 10
    assert not [step for step in steps if not links_of(step)]


@pytest.mark.parametrize("title", WALKS)
def test_a_walk_names_no_function_without_its_file(title):
    without_links = LINK.sub("", walk(title).partition("\n")[2])
    assert [
        name for name in re.findall(r"`([^`]+)`", without_links) if name not in ("--set", "changes")
    ] == []


def test_every_room_of_the_code_is_in_the_table_of_rooms():
    packages = {
        str(folder.relative_to(ROOT))
        for parent in ("distributed", "core")
        for folder in (ROOT / parent).iterdir()
        if (folder / "__init__.py").exists()
    }
    rows = re.findall(r"^\| (`[^|]+) \|", PAGE.read_text(), flags=re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    assert named == packages | {"search_spaces"}
