"""The samplers, which propose the next configuration, and what each of them can and cannot do.

All except the grid are samplers of Optuna. `check_sampler` refuses at the start what would fail in the middle of a
sweep, or silently do something different; `sampler_note` says which settings are drawn without a model.
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
    """A way to propose trials. It has a model of the settings `learns_from`, and draws each other setting by itself."""

    make: Callable[[int], BaseSampler]
    learns_from: Literal["all settings", "settings of every trial", "numbers of every trial"] = "all settings"
    most_objectives: int | None = None


def _tpe(seed: int) -> BaseSampler:
    """Parzen estimators over groups of settings that occur together; running trials count as bad trials."""
    return RecentHistory(
        TPESampler(
            seed=seed, multivariate=True, group=True, constant_liar=True, n_startup_trials=STARTUP_TRIALS
        )
    )


def _gp(seed: int) -> BaseSampler:
    """A Gaussian process with noise (expected improvement; hypervolume for several objectives)."""
    return GPSampler(
        seed=seed,
        n_startup_trials=STARTUP_TRIALS,
        independent_sampler=RandomSampler(seed=seed),
        warn_independent_sampling=False,
    )


def _cmaes(seed: int) -> BaseSampler:
    """CMA-ES; with margin for whole and stepped numbers (Hamano et al. 2022), and univariate TPE for choices."""
    return CmaEsSampler(
        seed=seed,
        with_margin=True,
        independent_sampler=TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS, constant_liar=True),
        warn_independent_sampling=False,
    )


def _nsga2(seed: int) -> BaseSampler:
    """A genetic algorithm; its population is so small that a sweep has several generations."""
    return NSGAIISampler(seed=seed, population_size=16)


def _qmc(seed: int) -> BaseSampler:
    """A scrambled Sobol sequence, which fills the space more evenly than random points."""
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
    # All points are enqueued when the study is made (`grid_points`), so the sampler has nothing to do.
    GRID: Sampler(lambda seed: RandomSampler(seed=seed)),
}


def make_sampler(name: str, seed: int, begun: int = 0) -> BaseSampler:
    """The Optuna sampler `name` for a study in which earlier processes have begun `begun` trials.

    A new sampler with the same seed would draw the first configurations again, so its seed depends on `begun`. Only the
    Sobol sequence continues by itself: the study holds its position, under its seed.
    """
    if begun and name != "qmc":
        seed = int(np.random.SeedSequence((seed, begun)).generate_state(1)[0])
    return look_up(SAMPLERS, name, "sampler").make(seed)


def check_sampler(name: str, profile: Profile, objectives: int) -> None:
    """Refuse a sampler that cannot search this space, or cannot take so many objectives.

    Raises:
        UserError: the message gives the reason, and a sampler that can.
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
    """The settings that the sampler does not model, in one line; empty if it models all of them."""
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
    """Every point of the grid of a space, in a random order, so that a search that ends early has covered it evenly.

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
