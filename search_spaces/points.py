"""Points of a define-by-run space, without a study: is a point inside, what is searched, all points of a grid."""

from __future__ import annotations

import contextlib
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
    check_distribution_compatibility,
    distribution_to_json,
)
from optuna.distributions import CategoricalChoiceType as Choice

from core.errors import StorageError, UserError

Space = Callable[[optuna.Trial], Mapping[str, object]]

ASK = object()
"""The answer for a setting that is not given."""


class OutsideSpaceError(ValueError):
    """A point is not in a space; the message names the setting and says why."""


class ContinuousError(UserError):
    """A grid cannot have all values of a continuous setting."""


class RefusedPointError(UserError):
    """The function of a space, or the settings, cannot take a point; other points may be right."""


def propose(space: Space, trial: optuna.trial.BaseTrial) -> Mapping[str, object]:
    """What `space` proposes for `trial`: settings by their dotted names.

    Raises:
        RefusedPointError: the function of the space raised an exception, which the message names, or it returned no
            settings.
        optuna.TrialPruned: it gave the trial up.
        OutsideSpaceError: see `point_of`.
        StorageError: the study could not be written meanwhile.
    """
    try:
        # A space says that it takes an `optuna.Trial`; it uses what all trials have.
        proposed = space(trial)  # type: ignore[arg-type]
    except (RefusedPointError, ContinuousError, optuna.TrialPruned, OutsideSpaceError, StorageError):
        raise
    # The function is the user's, so it may raise anything, and end the process.
    except (Exception, SystemExit) as error:
        said = _said(error)
        raise RefusedPointError(
            f"the space raised {type(error).__name__}{': ' if said else ''}{said}"
        ) from error
    if not isinstance(proposed, Mapping):
        raise RefusedPointError(f"the space must return a dict of settings, got {type(proposed).__name__}")
    odd = next((name for name in proposed if not isinstance(name, str)), None)
    if odd is not None:
        raise RefusedPointError(f"the space must return settings by their names, got {odd!r}")
    return proposed


def _said(error: BaseException) -> str:
    """What an exception says, in one line; empty if it cannot say anything."""
    try:
        return " ".join(str(error).split())[:300]
    # The exception may be of the user's own class.
    except Exception:
        return ""


def _check_compatible(name: str, one: BaseDistribution, other: BaseDistribution) -> None:
    """UserError if a study could not hold both distributions under one name."""
    try:
        check_distribution_compatibility(one, other)
    except ValueError:
        raise UserError(
            f"setting '{name}' has to be {_in_words(one)} in one part of the space and {_in_words(other)} in another; "
            "no sampler learns from choices that change: ask for it under another name in each part, and return its "
            f"value as '{name}'"
        ) from None


class Asked(optuna.trial.FixedTrial):
    """Takes the place of a trial in a space: `answer(name, distribution)` is the value of each setting asked for.

    It has every method of a trial that Optuna's own stand-in has, the old `suggest_uniform` and its like among them.
    """

    def __init__(self, answer: Callable[[str, BaseDistribution], Any], number: int = 0) -> None:
        super().__init__({}, number)
        self._answer = answer

    def _suggest(self, name: str, distribution: BaseDistribution) -> Any:
        """All `suggest_*` methods of a trial end here."""
        if name in self.distributions:
            _check_compatible(name, self.distributions[name], distribution)
        else:
            self.params[name] = self._answer(name, distribution)
            self.distributions[name] = distribution
        return self.params[name]


class StandIn(Asked):
    """A trial of which some settings are given: `given(name, distribution)`; it asks `trial` for those that are ASK."""

    def __init__(self, trial: optuna.Trial, given: Callable[[str, BaseDistribution], Any]) -> None:
        def answer(name: str, distribution: BaseDistribution) -> Any:
            value = given(name, distribution)
            return _suggested(trial, name, distribution) if value is ASK else value

        super().__init__(answer, trial.number)
        self._trial = trial

    def set_user_attr(self, key: str, value: Any) -> None:
        """A space may note something about the trial."""
        self._trial.set_user_attr(key, value)

    @property
    def user_attrs(self) -> dict[str, Any]:
        """The notes about the trial."""
        return self._trial.user_attrs

    def __getattr__(self, name: str) -> object:
        return getattr(self._trial, name)


def pinned(trial: optuna.Trial, values: Mapping[str, object]) -> StandIn:
    """`trial` with the settings in `values` (by dotted name) as they are, whatever the space offers."""
    return StandIn(trial, lambda name, distribution: values.get(name, ASK))


def without(trial: optuna.Trial, blocks: Collection[str], settings: Mapping[str, object]) -> StandIn:
    """`trial` without the settings under some blocks.

    Those settings get their value in `settings` (by dotted name), or if they cannot have it their first choice or
    lowest value: a space may branch on them.
    """

    def given(name: str, distribution: BaseDistribution) -> Any:
        if not is_under(name, blocks):
            return ASK
        if name in settings and _holds(distribution, settings[name]):
            return settings[name]
        if isinstance(distribution, CategoricalDistribution):
            return distribution.choices[0]
        return _range_of(distribution)[0]

    return StandIn(trial, given)


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
            raise OutsideSpaceError(f"setting '{name}' is missing ({_in_words(distribution)})")
        value = settings[name]
        if not _holds(distribution, value):
            raise OutsideSpaceError(f"setting '{name}' is {value!r}, which is not {_in_words(distribution)}")
        return value

    asked = Asked(answer)
    try:
        propose(space, asked)
    except (RefusedPointError, optuna.TrialPruned) as refusal:
        reason = str(refusal) or "it prunes this point"
        raise OutsideSpaceError(reason) from refusal
    unused = settings.keys() - asked.params.keys()
    if all_used and unused:
        raise OutsideSpaceError(
            f"setting '{min(unused)}' is not searched here (fixed, or it cannot act beside the others)"
        )
    return asked.params


@dataclass(frozen=True)
class Profile:
    """What a space searches, as seen at many random points.

    `settings` has every distribution that a setting was seen with; `always` are those that every point has.
    """

    settings: dict[str, tuple[BaseDistribution, ...]]
    always: frozenset[str]
    refused: tuple[str, ...] = ()
    """Why some of the points were refused."""

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


def profile_of(points: Sequence[Mapping[str, BaseDistribution]], refused: Sequence[str] = ()) -> Profile:
    """The profile of a space from the distributions that it asked for at each of many points.

    UserError if a setting has choices at one point and others at another: see `_check_compatible`.
    """
    settings: dict[str, tuple[BaseDistribution, ...]] = {}
    for point in points:
        for name, distribution in point.items():
            known = settings.get(name, ())
            if known:
                _check_compatible(name, known[0], distribution)
            settings[name] = known if distribution in known else (*known, distribution)
    always = frozenset(name for name in settings if all(name in point for point in points))
    return Profile(settings, always, tuple(refused))


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
        # A point that the space refuses is one of the grid all the same: its trial says why it failed.
        with contextlib.suppress(RefusedPointError, optuna.TrialPruned):
            propose(space, asked)
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
        raise ContinuousError(
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
