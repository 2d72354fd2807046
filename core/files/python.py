"""What a user has written in a Python file: a search space, or a task, named as FILE.py:NAME."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from core.errors import UserError
from core.lookup import look_up


def file_of(name: str) -> Path | None:
    """The file of FILE.py:NAME; None if the name is one of our own."""
    if ":" not in name and not name.endswith(".py"):
        return None
    return Path(name.rpartition(":")[0] if ":" in name else name)


def defined_in(path: Path, name: str, what: str) -> object:
    """What is called `name` in the Python file, which is executed.

    Args:
        path: of the file.
        name: of a function or a class.
        what: it is meant to be, for the error.

    Raises:
        UserError: there is no such file, it cannot be executed, or it defines no such name.
    """
    if not path.is_file():
        raise UserError(f"no file {path} with a {what}; write --{what.split()[-1]} NAME or FILE.py:NAME")
    spec = importlib.util.spec_from_file_location(f"{path.stem} of {path.resolve().parent}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    # Pydantic and dataclasses look up the types of fields in the module of a class.
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        raise UserError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    return look_up(
        {key: value for key, value in vars(module).items() if callable(value)}, name, f"function in {path}"
    )
