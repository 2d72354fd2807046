"""The direction of the data flow: `core` and `search_spaces` know nothing of Ray or of `distributed`."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "core").rglob("*.py"), *(ROOT / "search_spaces").rglob("*.py")])


def imported_packages(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_import_of_ray_or_distributed(file):
    assert not imported_packages(file) & {"ray", "distributed"}


def test_a_second_process_loads_core_without_ray():
    code = "import core.tasks, core.inference, search_spaces, sys; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_call_of_ray_outside_a_connection_starts_no_ray_of_its_own():
    code = """
import distributed.cluster
import ray
try:
    ray.put(1)
except ray.exceptions.RaySystemError:
    print(ray.is_initialized())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
