"""What a search may vary, one pair of files per system.

`NAME.yaml` holds the fixed settings, with the published values as defaults; `NAME.py` holds
`space(trial) -> dict`, an ordinary function over an Optuna trial whose parameter names are the dotted names
of the settings they set. A parameter asked for inside an `if` exists only there.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna

from core.config import Settings, flatten, read_settings, with_absent
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


def pin(space: Space, changes: Mapping[str, Any]) -> Space:
    """`space` in which the settings in `changes` are given, not searched: they become no parameters at all.

    A block that is switched off (`objective.neighbours=null`) pins everything in it.
    """
    pinned = fixed_by(changes)
    return lambda trial: space(PinnedTrial(trial, pinned))  # type: ignore[arg-type]


def fixed_by(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting that `changes` give a value, by dotted name: also those of a block that they switch off."""
    return with_absent(flatten(changes)) | dict(changes)


class PinnedTrial:
    """A trial that answers for pinned settings itself and asks the study for the others."""

    def __init__(self, trial: optuna.Trial, pinned: Mapping[str, Any]) -> None:
        self._trial, self._pinned = trial, pinned
        self._asked: dict[str, Any] = {}

    @property
    def params(self) -> dict[str, Any]:
        """What was suggested so far, pinned or not."""
        return self._trial.params | self._asked

    def suggest_float(self, name: str, low: float, high: float, **options: Any) -> float:
        """See `optuna.Trial.suggest_float`."""
        return self._suggest(name, self._trial.suggest_float, low, high, **options)

    def suggest_int(self, name: str, low: int, high: int, **options: Any) -> int:
        """See `optuna.Trial.suggest_int`."""
        return self._suggest(name, self._trial.suggest_int, low, high, **options)

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """See `optuna.Trial.suggest_categorical`."""
        return self._suggest(name, self._trial.suggest_categorical, choices)

    def _suggest(self, name: str, ask: Callable[..., Any], *bounds: Any, **options: Any) -> Any:
        if name not in self._pinned:
            return ask(name, *bounds, **options)
        self._asked[name] = self._pinned[name]
        return self._pinned[name]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trial, name)


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
