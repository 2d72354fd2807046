"""The direction of the data flow, within the project and to Ray, as `docs/architecture.md` draws it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ["commands", "sweeps", "search", "training", "slots", "run", "batches"]
"""Of `distributed`, each imports only what stands to its right; these three do not import each other."""
TRADES = {"search", "training", "slots"}


def imports_of(file: Path) -> set[str]:
    """Every module that a file imports anywhere, functions included, with what is imported from it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute here"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def files_of(*packages: str) -> list[Path]:
    return sorted(file for package in packages for file in (ROOT / package).rglob("*.py"))


def as_id(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", files_of("core", "search_spaces"), ids=as_id)
def test_no_import_of_ray_or_distributed(file):
    assert not {name.split(".")[0] for name in imports_of(file)} & {"ray", "distributed"}


@pytest.mark.parametrize("file", files_of(*(f"distributed/{room}" for room in ROOMS)), ids=as_id)
def test_a_room_imports_only_what_stands_to_its_right(file):
    room = file.relative_to(ROOT).parts[1]
    allowed = {room, *ROOMS[ROOMS.index(room) + 1 :]} - (TRADES - {room} if room in TRADES else set())
    for name in imports_of(file):
        if name.startswith("distributed."):
            assert name.split(".")[1] in allowed, f"{room} imports {name}"


def test_every_module_of_distributed_is_in_a_room():
    flat = {file.name for file in (ROOT / "distributed").glob("*.py")}
    assert flat == {"__init__.py", "__main__.py"}
    assert {each.name for each in (ROOT / "distributed").iterdir() if (each / "__init__.py").exists()} == {
        *ROOMS
    }


@pytest.mark.parametrize("file", files_of("core/report/answer"), ids=as_id)
def test_the_answer_is_free_of_figures(file):
    """What is computed and worded does not depend on what is drawn."""
    forbidden = ("core.report.figures", "core.report.quality", "core.report.page", "matplotlib")
    assert not [name for name in imports_of(file) if name.startswith(forbidden)]


def test_a_second_process_loads_core_without_ray():
    code = "import core.tasks, core.inference, search_spaces, sys; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_call_of_ray_outside_a_connection_starts_no_ray_of_its_own():
    code = """
import distributed.slots.cluster
import ray
try:
    ray.put(1)
except ray.exceptions.RaySystemError:
    print(ray.is_initialized())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
