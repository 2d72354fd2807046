"""What a search may vary, one pair of files per system.

`NAME.yaml` holds the fixed settings, with the published values as defaults; `NAME.py` holds
`space(trial) -> dict`, an ordinary function over an Optuna trial whose parameter names are the dotted names
of the settings they set. A parameter asked for inside an `if` exists only there.

This is a package of brainsweep.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.distributions import CategoricalChoiceType as Choice

from core.config import Settings, flatten, read_settings, with_absent
from core.errors import UserError
from core.lookup import look_up
from search_spaces import brain_age
from search_spaces.points import Space, Without, is_under

SPACES: dict[str, Space] = {"brain_age": brain_age.space}

DEFAULT = "brain_age"

Value = TypeVar("Value")


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


def pin(space: Space, changes: Mapping[str, object]) -> Space:
    """`space` in which the settings in `changes` are given, not searched: they become no parameters at all.

    A block that is switched off (`objective.neighbours=null`) pins everything in it.
    """
    pinned = fixed_by(changes)
    # A space says that it takes an `optuna.Trial`; a PinnedTrial passes on all that it does not answer itself.
    return lambda trial: space(PinnedTrial(trial, pinned))  # type: ignore[arg-type]


def without(space: Space, blocks: Collection[str], settings: Settings) -> Space:
    """`space` without the settings under `blocks`: they become no parameters, and have no place in a configuration.

    Args:
        space: a define-by-run space.
        blocks: dotted names, such as `objective`.
        settings: nested settings. A space that branches on a setting without a place sees its value there.
    """
    values = with_absent(flatten(settings))

    def rest(trial: optuna.Trial) -> Settings:
        proposed = space(Without(trial, blocks, values))  # type: ignore[arg-type]
        return {name: value for name, value in proposed.items() if not is_under(name, blocks)}

    return rest


def fixed_by(changes: Mapping[str, object]) -> Settings:
    """Every setting that `changes` give a value, by dotted name: also those of a block that they switch off."""
    return with_absent(flatten(changes)) | dict(changes)


class PinnedTrial:
    """A trial that answers for pinned settings itself and asks the study for the others."""

    def __init__(self, trial: optuna.Trial, pinned: Mapping[str, Any]) -> None:
        self._trial, self._pinned = trial, pinned
        self._asked: dict[str, object] = {}

    @property
    def params(self) -> dict[str, object]:
        """What was suggested so far, pinned or not."""
        return self._trial.params | self._asked

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """See `optuna.Trial.suggest_float`."""
        return self._pinned_or(name, partial(self._trial.suggest_float, name, low, high, step=step, log=log))

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """See `optuna.Trial.suggest_int`."""
        return self._pinned_or(name, partial(self._trial.suggest_int, name, low, high, step=step, log=log))

    def suggest_categorical(self, name: str, choices: Sequence[Choice]) -> Choice:
        """See `optuna.Trial.suggest_categorical`."""
        return self._pinned_or(name, partial(self._trial.suggest_categorical, name, choices))

    def _pinned_or(self, name: str, ask: Callable[[], Value]) -> Value:
        """The pinned value of `name`, as it is, or what the study answers."""
        if name not in self._pinned:
            return ask()
        value: Value = self._pinned[name]
        self._asked[name] = value
        return value

    def __getattr__(self, name: str) -> object:
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
    functions: dict[str, Space] = {key: value for key, value in vars(module).items() if callable(value)}
    return look_up(functions, function, f"function in {path}")
