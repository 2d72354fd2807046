"""How the settings of a population change: the ranges of the settings, and the two methods of Ray.

The methods are PopulationBasedTraining (Jaderberg et al., arXiv 1711.09846) and PB2 (Parker-Holder et al., arXiv
2002.02518), both synchronous. Every `interval` epochs all members are compared at the same epoch of the same cell. The
worst quarter continues from the checkpoints of the best quarter, with settings that are changed at random (pbt) or by
a Gaussian process (pb2, which starts to learn again when a population is resumed). `population.py` applies the
changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.distributions import FloatDistribution
from ray import tune
from ray.tune.schedulers import PopulationBasedTraining
from ray.tune.schedulers.pb2 import PB2

from core.config import Settings, merge
from core.errors import UserError
from core.schedules import then
from distributed.run.assignment import METRIC
from search_spaces.points import Profile

CHANGEABLE = (
    "optimiser.learning_rate",
    "optimiser.weight_decay",
    "objective.temperature",
    "objective.width",
    "objective.neighbours.end",
)
"""The settings that can change during training, and that may be piecewise schedules."""
CLOCK = "epochs_since_entering"
"""The time of Ray: epochs since the beginning, or since the exchange at which the population was resumed."""
FEWEST_MEMBERS = 4
EXCHANGES = 8
QUARTER = 0.25


@dataclass(frozen=True)
class Range:
    """A setting that members may change, with its range in the space."""

    name: str
    low: float
    high: float
    log: bool

    def clip(self, value: float) -> float:
        """`value`, or the nearer end of the range."""
        return min(max(value, self.low), self.high)

    def place(self, value: float) -> float:
        """The position of `value` in the range, from 0 to 1; on the logarithm if the space searches on it."""
        low, high, value = self._scaled(self.low), self._scaled(self.high), self._scaled(self.clip(value))
        return (value - low) / (high - low)

    def at_place(self, place: float) -> float:
        """The value at a position in the range, from 0 to 1; the inverse of `place`."""
        low, high = self._scaled(self.low), self._scaled(self.high)
        value = low + place * (high - low)
        return self.clip(math.exp(value) if self.log else value)

    def _scaled(self, value: float) -> float:
        return math.log(value) if self.log else value


def changeable_ranges(profile: Profile) -> list[Range]:
    """The settings of a space that a population may change."""
    ranges = []
    for name in CHANGEABLE:
        match profile.settings.get(name, ()):
            case (FloatDistribution(step=None, low=low, high=high, log=log),) if low < high:
                ranges.append(Range(name, low, high, log))
    return ranges


@dataclass(frozen=True)
class Method:
    """A way to change settings. It sees them as they are, or (`by_place`) as positions in their ranges."""

    make: Callable[[Sequence[Range], dict[str, Any]], PopulationBasedTraining]
    by_place: bool

    def scheduler(self, ranges: Sequence[Range], interval: int, mode: str) -> PopulationBasedTraining:
        """The scheduler of Ray, which exchanges whenever all members have trained `interval` more epochs of `CLOCK`.

        `mode` is min or max: which values are better. PB2 has no burn-in period, so the clock begins again when a
        population is resumed.
        """
        common = {
            "time_attr": CLOCK, "metric": METRIC, "mode": mode, "perturbation_interval": interval,
            "quantile_fraction": QUARTER, "log_config": False, "synch": True,
        }  # fmt: skip
        return self.make(ranges, common)

    def seen(self, one: Range, value: float) -> float:
        """`value` as the method sees it."""
        return one.place(value) if self.by_place else value

    def meant(self, one: Range, seen: float) -> float:
        """The value that the method means, inside the range."""
        return one.at_place(min(max(seen, 0.0), 1.0)) if self.by_place else one.clip(seen)


def _pbt(ranges: Sequence[Range], common: dict[str, Any]) -> PopulationBasedTraining:
    """Multiply by 0.8 or 1.2; in one of four cases draw a new value."""
    drawn = {one.name: (tune.loguniform if one.log else tune.uniform)(one.low, one.high) for one in ranges}
    return PopulationBasedTraining(hyperparam_mutations={"changed": drawn}, **common)


def _pb2(ranges: Sequence[Range], common: dict[str, Any]) -> PopulationBasedTraining:
    """Go where a Gaussian process over epoch, value and settings expects the largest gain; at first only copy."""
    return PB2(hyperparam_bounds={"changed": {one.name: [0.0, 1.0] for one in ranges}}, **common)


# PB2 has a linear scale, so it sees positions: a learning rate between 1e-5 and 1e-2 is searched on its logarithm.
POPULATIONS: dict[str, Method] = {"pbt": Method(_pbt, by_place=False), "pb2": Method(_pb2, by_place=True)}


def exchange_interval(epochs: int) -> int:
    """Epochs between two exchanges: a run has eight exchanges if it has enough epochs."""
    return max(1, round(epochs / EXCHANGES))


def members_of(trials: int, is_inside: bool) -> int:
    """The members among `trials`: all but the schedule found, and the published configuration if it `is_inside`."""
    return trials - 1 - is_inside


def check_population(
    name: str, profile: Profile, epochs: int, trials: int, beside: Mapping[str, str]
) -> None:
    """Refuse a population that cannot work.

    Args:
        name: the name of the method.
        profile: the settings that the space searches.
        epochs: the epochs of a cell.
        trials: the number of trials that the user wants.
        beside: the values of other options, by their names; "" if the option does not concern a population.

    Raises:
        UserError: the first reason.
    """
    for option, given in beside.items():
        if given:
            raise UserError(
                f"--{option} {given} cannot act on a population (--scheduler {name}); leave it out"
            )
    if not changeable_ranges(profile):
        raise UserError(
            f"--scheduler {name} changes settings while training, and this space searches none of "
            f"{', '.join(CHANGEABLE)}"
        )
    if epochs < 2:
        raise UserError(f"--scheduler {name} needs at least 2 epochs to exchange between, got {epochs}")
    if trials < FEWEST_MEMBERS + 2:
        raise UserError(
            f"--scheduler {name} needs at least {FEWEST_MEMBERS + 2} trials: {FEWEST_MEMBERS} members, the published "
            f"configuration, and the schedule that was found; got {trials}"
        )


def setting(settings: Mapping[str, Any], name: str) -> Any:
    """The setting `name`; None if this configuration does not have it."""
    value: Any = settings
    for key in name.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def change(
    settings: Settings, wanted: Mapping[str, float], progress: float
) -> tuple[Settings, dict[str, float]]:
    """`settings` with the `wanted` values from `progress` on, and those of the values that could act.

    A setting that this configuration does not have, or for which it has a schedule of its own, does not change.
    """
    made, acted = settings, {}
    for name, value in wanted.items():
        present = setting(settings, name)
        is_own_schedule = isinstance(present, Mapping) and present.get("shape") != "piecewise"
        if present is None or is_own_schedule:
            continue
        changed = then(present, progress, value)
        if changed != present:
            made, acted[name] = merge(made, {name: changed}), value
    return made, acted
