"""What proposes the next configuration, and what each of these can and cannot do.

All but the grid are Optuna's. `check_sampler` refuses at start what would fail, or silently do something else,
in the middle of a sweep; `sampler_note` says what is left to chance.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from optuna.samplers import (
    BaseSampler,
    CmaEsSampler,
    GPSampler,
    NSGAIISampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)

from core.errors import UserError
from core.lookup import look_up
from distributed.search.recent_history import RecentHistory
from search_spaces.points import Profile, Space, grid_of

STARTUP_TRIALS = 8
MOST_GRID_POINTS = 10_000
GRID = "grid"


@dataclass(frozen=True)
class Sampler:
    """A way to propose trials. `learns_from` are the settings it has a model of; the others are drawn alone."""

    make: Callable[[int], BaseSampler]
    learns_from: Literal["all settings", "settings of every trial", "numbers of every trial"] = "all settings"
    most_objectives: int | None = None


def _tpe(seed: int) -> BaseSampler:
    """Parzen estimators over groups of settings that occur together; running trials count as bad ones."""
    return RecentHistory(
        TPESampler(
            seed=seed, multivariate=True, group=True, constant_liar=True, n_startup_trials=STARTUP_TRIALS
        )
    )


def _gp(seed: int) -> BaseSampler:
    """A Gaussian process (expected improvement, hypervolume for several objectives), noise assumed."""
    return GPSampler(
        seed=seed,
        n_startup_trials=STARTUP_TRIALS,
        independent_sampler=RandomSampler(seed=seed),
        warn_independent_sampling=False,
    )


def _cmaes(seed: int) -> BaseSampler:
    """CMA-ES; whole and stepped numbers by its margin (Hamano et al. 2022), choices by univariate TPE."""
    return CmaEsSampler(
        seed=seed,
        with_margin=True,
        independent_sampler=TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS, constant_liar=True),
        warn_independent_sampling=False,
    )


def _nsga2(seed: int) -> BaseSampler:
    """A genetic algorithm with a population small enough to have generations within a sweep."""
    return NSGAIISampler(seed=seed, population_size=16)


def _qmc(seed: int) -> BaseSampler:
    """A scrambled Sobol sequence: fills the space more evenly than chance."""
    return QMCSampler(
        seed=seed,
        scramble=True,
        independent_sampler=RandomSampler(seed=seed),
        warn_independent_sampling=False,
    )


SAMPLERS: dict[str, Sampler] = {
    "tpe": Sampler(_tpe),
    "gp": Sampler(_gp, learns_from="settings of every trial"),
    "cmaes": Sampler(_cmaes, learns_from="numbers of every trial", most_objectives=1),
    "nsga2": Sampler(_nsga2, learns_from="settings of every trial"),
    "qmc": Sampler(_qmc, learns_from="settings of every trial"),
    "random": Sampler(lambda seed: RandomSampler(seed=seed)),
    # Every point is enqueued when the study is made (`grid_points`), so nothing is left to sample.
    GRID: Sampler(lambda seed: RandomSampler(seed=seed)),
}


def make_sampler(name: str, seed: int, begun: int = 0) -> BaseSampler:
    """The Optuna sampler `name` of a study in which `begun` trials were begun by earlier processes.

    A sampler made anew with the same seed would draw again what it drew at the beginning. Only the Sobol sequence
    counts on by itself: its position stands in the study, under its seed.
    """
    if begun and name != "qmc":
        seed = int(np.random.SeedSequence((seed, begun)).generate_state(1)[0])
    return look_up(SAMPLERS, name, "sampler").make(seed)


def check_sampler(name: str, profile: Profile, objectives: int) -> None:
    """Refuse a sampler that cannot search this space for so many objectives.

    Raises:
        UserError: with the reason, and what would do.
    """
    sampler = look_up(SAMPLERS, name, "sampler")
    if sampler.most_objectives is not None and objectives > sampler.most_objectives:
        able = [other for other, each in SAMPLERS.items() if each.most_objectives is None]
        raise UserError(
            f"sampler '{name}' knows one objective and {objectives} are asked for; use {', '.join(able)}"
        )
    if sampler.learns_from == "numbers of every trial" and len(profile.numbers()) < 2:
        raise UserError(
            f"sampler '{name}' needs two numeric settings that every configuration has, and this space has "
            f"{len(profile.numbers())}; use tpe or gp"
        )


def sampler_note(name: str, profile: Profile) -> str:
    """What of this space the sampler does not model, in one line; empty where it models all of it."""
    sampler = SAMPLERS[name]
    known = {
        "all settings": set(profile.settings),
        "settings of every trial": set(profile.always),
        "numbers of every trial": set(profile.numbers()),
    }[sampler.learns_from]
    left = sorted(profile.settings.keys() - known)
    if not left:
        return ""
    how = "each by itself (TPE)" if name == "cmaes" else "at random"
    shown = ", ".join(left[:4]) + (f" and {len(left) - 4} more" if len(left) > 4 else "")
    return f"{name} models {len(known)} of {len(profile.settings)} settings; it draws {how}: {shown}"


def grid_points(space: Space, per_setting: int | None, seed: int) -> list[dict[str, Any]]:
    """Every point of the space's grid, in a random order, so that a search cut short has covered all of it evenly.

    Raises:
        UserError: a setting is continuous and `per_setting` is None, or there are too many points.
    """
    found = list(itertools.islice(grid_of(space, per_setting), MOST_GRID_POINTS + 1))
    if len(found) > MOST_GRID_POINTS:
        raise UserError(
            f"the grid of this space has more than {MOST_GRID_POINTS} points; fix settings with --set, give fewer "
            "--grid-points, or use --sampler qmc"
        )
    random.Random(seed).shuffle(found)
    return found
