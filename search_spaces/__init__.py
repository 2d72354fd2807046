"""What a search may vary, one pair of files per system.

`NAME.yaml` holds the fixed settings, with the published values as defaults; `NAME.py` holds
`space(trial) -> dict`, an ordinary function over an Optuna trial whose parameter names are the dotted names
of the settings they set. A parameter asked for inside an `if` exists only there.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna

from core.config import Settings, read_settings
from core.errors import UserError
from core.lookup import look_up
from search_spaces import brain_age

Space = Callable[[optuna.Trial], Mapping[str, Any]]

SPACES: dict[str, Space] = {"brain_age": brain_age.space}

DEFAULT = "brain_age"


def load_space(name: str) -> tuple[Space, Settings]:
    """The space `NAME` or `path/to/file.py:function`, and the settings it starts from.

    A file's settings are those of a YAML file of the same name beside it, or the default space's.

    Raises:
        UserError: no such space, file or function.
    """
    if ":" not in name and not name.endswith(".py"):
        return look_up(SPACES, name, "space"), published(name)
    path_text, _, function = name.rpartition(":") if ":" in name else (name, "", "space")
    path = Path(path_text)
    space = _function_of(path, function)
    beside = path.with_suffix(".yaml")
    return space, read_settings(beside) if beside.exists() else published(DEFAULT)


def published(name: str) -> Settings:
    """The settings in `NAME.yaml`: the published configuration."""
    return read_settings(Path(__file__).parent / f"{name}.yaml")


def _function_of(path: Path, function: str) -> Space:
    if not path.is_file():
        raise UserError(f"no file {path} with a search space; write --space NAME or --space FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    functions = {key: value for key, value in vars(module).items() if callable(value)}
    return look_up(functions, function, f"function in {path}")
