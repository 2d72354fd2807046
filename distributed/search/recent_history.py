"""What a sampler that learns from every finished trial learns from when there are thousands of them."""

from __future__ import annotations

import copy
import heapq
from collections.abc import Container, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

BEST = 25
"""The good trials that Optuna's TPE has at most, out of however many: a tenth of 250."""
LATEST = 225
"""Others: with the best just enough to be 250, so that 25 of what it is shown are the good ones still."""


class RecentHistory(BaseSampler):
    """TPE that is shown the 25 best finished trials, the latest 225 others, and all that run.

    TPE goes through its whole history several times for every proposal, once for each group of settings that
    occur together: with 1,000 trials that is five times the work of 100 (optuna/optuna#2172). Its density of good
    trials is built from the 25 best of all, so that stays what it was. Its density of the others weighs a trial
    the less the older it is; those whose weight has become small are left out.

    With several objectives the history stays whole: which trials are good is then no matter of one number.
    """

    def __init__(self, sampler: BaseSampler) -> None:
        self.sampler = sampler
        self._view: optuna.Study | None = None

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """See `BaseSampler`; every trial begins with this, and sees the history as it is now."""
        self._view = None if len(study.directions) > 1 else _view_of(study, self.sampler)
        return self.sampler.infer_relative_search_space(self._view or study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """See `BaseSampler`."""
        return self.sampler.sample_relative(self._view or study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """See `BaseSampler`."""
        return self.sampler.sample_independent(self._view or study, trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """See `BaseSampler`."""
        self.sampler.before_trial(study, trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """See `BaseSampler`."""
        self.sampler.after_trial(study, trial, state, values)

    def reseed_rng(self) -> None:
        """See `BaseSampler`."""
        self.sampler.reseed_rng()


def _view_of(study: optuna.Study, sampler: BaseSampler) -> optuna.Study:
    storage: Any = _Shortened(study._storage)
    return optuna.Study(study.study_name, storage, sampler)


class _Shortened:
    """A storage that shows part of the finished trials, as they are when one proposal begins; all else passes through.

    TPE asks for all trials once for every group of settings, and while it proposes nothing changes that it looks at.
    """

    def __init__(self, storage: BaseStorage) -> None:
        self._storage = storage
        self._shown: list[FrozenTrial] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        if self._shown is None:
            everything = self._storage.get_all_trials(study_id, deepcopy=False)
            forgotten = _forgotten(everything)
            self._shown = [trial for trial in everything if trial.number not in forgotten]
        found = [trial for trial in self._shown if states is None or trial.state in states]
        return copy.deepcopy(found) if deepcopy else found


def _forgotten(trials: Sequence[FrozenTrial]) -> set[int]:
    """The numbers of the finished trials that are neither among the best nor among the latest."""
    ended = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    if len(ended) <= BEST + LATEST:
        return set()
    best = {trial.number for trial in heapq.nsmallest(BEST, ended, key=_rank)}
    others = [trial.number for trial in ended if trial.number not in best]
    return set(others[:-LATEST])


def _rank(trial: FrozenTrial) -> tuple[int, float, float]:
    """TPE's own order: completed trials by their value, then pruned ones by how far they came, and how well."""
    if trial.state == TrialState.COMPLETE and trial.value is not None:
        return 0, trial.value, 0.0
    reported: Mapping[int, float] = trial.intermediate_values
    last = max(reported, default=None)
    return (2, 0.0, 0.0) if last is None else (1, -last, reported[last])
