"""Points of a define-by-run space, without a study: is a point inside, what is searched, all points of a grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)
from optuna.distributions import CategoricalChoiceType as Choice

from core.errors import UserError

Space = Callable[[optuna.Trial], Mapping[str, object]]


class OutsideSpaceError(ValueError):
    """A point is not in a space; the message names the setting and says why."""


class Asked:
    """Takes the place of a trial in a space: `answer(name, distribution)` is the value of each setting asked for."""

    number = 0

    def __init__(self, answer: Callable[[str, BaseDistribution], Any]) -> None:
        self._answer = answer
        self.params: dict[str, object] = {}
        self.distributions: dict[str, BaseDistribution] = {}

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """See `optuna.Trial.suggest_float`."""
        value: float = self._ask(name, FloatDistribution(low, high, log=log, step=step))
        return value

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """See `optuna.Trial.suggest_int`."""
        value: int = self._ask(name, IntDistribution(low, high, log=log, step=step))
        return value

    def suggest_categorical(self, name: str, choices: Sequence[Choice]) -> Choice:
        """See `optuna.Trial.suggest_categorical`."""
        value: Choice = self._ask(name, CategoricalDistribution(choices))
        return value

    def _ask(self, name: str, distribution: BaseDistribution) -> Any:
        if name not in self.params:
            self.params[name] = self._answer(name, distribution)
            self.distributions[name] = distribution
        return self.params[name]


class Without(Asked):
    """A trial without the settings under some blocks; it asks `trial` for all others.

    Those settings get their value in `settings` (by dotted name), or if they cannot have it their first choice or
    lowest value: a space may branch on them.
    """

    def __init__(self, trial: optuna.Trial, blocks: Collection[str], settings: Mapping[str, object]) -> None:
        def answer(name: str, distribution: BaseDistribution) -> Any:
            if not is_under(name, blocks):
                return _suggested(trial, name, distribution)
            if name in settings and _holds(distribution, settings[name]):
                return settings[name]
            return (
                distribution.choices[0]
                if isinstance(distribution, CategoricalDistribution)
                else _range_of(distribution)[0]
            )

        super().__init__(answer)
        self._trial, self.number = trial, trial.number

    def __getattr__(self, name: str) -> object:
        return getattr(self._trial, name)


def is_under(name: str, blocks: Collection[str]) -> bool:
    """Whether the setting `name` is one of `blocks`, or in one of them."""
    return any(name == block or name.startswith(f"{block}.") for block in blocks)


def _suggested(trial: optuna.Trial, name: str, distribution: BaseDistribution) -> Any:
    """What `trial` suggests."""
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    if isinstance(distribution, IntDistribution):
        step, log = distribution.step, distribution.log
        return trial.suggest_int(name, distribution.low, distribution.high, step=step, log=log)
    if not isinstance(distribution, FloatDistribution):
        raise TypeError(f"nothing can suggest {distribution}")
    low, high = distribution.low, distribution.high
    return trial.suggest_float(name, low, high, step=distribution.step, log=distribution.log)


def point_of(space: Space, settings: Mapping[str, object], *, all_used: bool = True) -> dict[str, object]:
    """The parameters of `space` at `settings` (by dotted name).

    Args:
        space: a define-by-run space.
        settings: a value for every setting that the space asks for on the way.
        all_used: whether a setting that the space does not ask for is a mistake.

    Raises:
        OutsideSpaceError: a setting is missing, outside its range or choices, or not asked for.
    """

    def answer(name: str, distribution: BaseDistribution) -> object:
        if name not in settings:
            raise OutsideSpaceError(f"'{name}' is missing ({_in_words(distribution)})")
        value = settings[name]
        if not _holds(distribution, value):
            raise OutsideSpaceError(f"'{name}' is {value!r}, which is not {_in_words(distribution)}")
        return value

    asked = Asked(answer)
    # A space says that it takes a whole `optuna.Trial`, of which it uses the methods that `Asked` has.
    space(asked)  # type: ignore[arg-type]
    unused = settings.keys() - asked.params.keys()
    if all_used and unused:
        raise OutsideSpaceError(
            f"'{min(unused)}' is not searched here (fixed, or it cannot act beside the others)"
        )
    return asked.params


@dataclass(frozen=True)
class Profile:
    """What a space searches, as seen at many random points.

    `settings` has every distribution that a setting was seen with; `always` are those that every point has.
    """

    settings: dict[str, tuple[BaseDistribution, ...]]
    always: frozenset[str]

    @property
    def conditional(self) -> list[str]:
        """Settings that some configurations do not have."""
        return sorted(self.settings.keys() - self.always)

    def numbers(self) -> list[str]:
        """Settings that every configuration has and whose values are numbers of one fixed range."""
        return sorted(
            name
            for name in self.always
            if len(self.settings[name]) == 1
            and not isinstance(self.settings[name][0], CategoricalDistribution)
        )

    def as_json(self) -> dict[str, list[str]]:
        """For run.json: a space that searches something else compares unequal."""
        return {
            name: sorted(distribution_to_json(each) for each in found)
            for name, found in sorted(self.settings.items())
        }


def profile_of(points: Sequence[Mapping[str, BaseDistribution]]) -> Profile:
    """The profile of a space from the distributions that it asked for at each of many points."""
    settings: dict[str, tuple[BaseDistribution, ...]] = {}
    for point in points:
        for name, distribution in point.items():
            known = settings.get(name, ())
            settings[name] = known if distribution in known else (*known, distribution)
    always = frozenset(name for name in settings if all(name in point for point in points))
    return Profile(settings, always)


def grid_of(space: Space, points: int | None = None) -> Iterator[dict[str, object]]:
    """Every point of a finite space, once; conditions are followed, so a setting that cannot act has no value.

    Args:
        space: a define-by-run space. It is walked as a tree: the first setting it asks for is the root.
        points: values of each continuous setting, evenly spread (over the logarithm where that is searched).

    Raises:
        UserError: a setting is continuous and `points` is None.
    """
    # The values of each setting, in the order asked, and the place of the value that is taken.
    chosen: list[tuple[list[Choice], int]] = []
    while True:
        depth = 0

        def answer(name: str, distribution: BaseDistribution) -> Choice:
            nonlocal depth
            if depth == len(chosen):
                chosen.append((_values(name, distribution, points), 0))
            values, taken = chosen[depth]
            depth += 1
            return values[taken]

        asked = Asked(answer)
        space(asked)  # type: ignore[arg-type]
        yield asked.params
        while chosen and chosen[-1][1] + 1 == len(chosen[-1][0]):
            chosen.pop()
        if not chosen:
            return
        values, taken = chosen[-1]
        chosen[-1] = (values, taken + 1)


def _values(name: str, distribution: BaseDistribution, points: int | None) -> list[Choice]:
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    if isinstance(distribution, IntDistribution):
        return list(range(distribution.low, distribution.high + 1, distribution.step))
    if not isinstance(distribution, FloatDistribution):
        raise TypeError(f"no values are known of {distribution}")
    low, high = distribution.low, distribution.high
    if distribution.step is not None:
        return [
            low + index * distribution.step for index in range(round((high - low) / distribution.step) + 1)
        ]
    if points is None:
        raise UserError(
            f"a grid needs finitely many values, but '{name}' is {_in_words(distribution)}; give it a step, "
            "or --grid-points N"
        )
    if low == high or points == 1:
        return [low if low == high else math.sqrt(low * high) if distribution.log else (low + high) / 2]
    spread = np.geomspace(low, high, points) if distribution.log else np.linspace(low, high, points)
    # geomspace may end slightly beyond `high`.
    return [low, *(float(value) for value in spread[1:-1]), high]


def _holds(distribution: BaseDistribution, value: object) -> bool:
    """Whether `value` is one of the distribution's, and of its type: Optuna takes True for 1, and "1" for 1.0."""
    if isinstance(distribution, CategoricalDistribution):
        return any(value == choice and type(value) is type(choice) for choice in distribution.choices) or any(
            _is_number(value) and _is_number(choice) and value == choice for choice in distribution.choices
        )
    if not _is_number(value) or not math.isfinite(value):
        return False
    if isinstance(distribution, IntDistribution) and not float(value).is_integer():
        return False
    low, high, step = _range_of(distribution)
    on_step = step is None or math.isclose((value - low) / step, round((value - low) / step), abs_tol=1e-8)
    return low <= value <= high and on_step


def _range_of(distribution: BaseDistribution) -> tuple[float, float, float | None]:
    """Lowest value, highest value, and step of a numeric distribution."""
    if not isinstance(distribution, FloatDistribution | IntDistribution):
        raise TypeError(f"no range is known of {distribution}")
    return distribution.low, distribution.high, distribution.step


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _in_words(distribution: BaseDistribution) -> str:
    if isinstance(distribution, CategoricalDistribution):
        return f"one of {', '.join(map(repr, distribution.choices))}"
    low, high, step = _range_of(distribution)
    kind = "a whole number" if isinstance(distribution, IntDistribution) else "a number"
    by = f" in steps of {step:g}" if step not in (None, 1) else ""
    return f"{kind} from {low:g} to {high:g}{by}"
