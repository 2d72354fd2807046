"""What TPE is shown of a long history, held against Optuna's own division into good and bad trials."""

import random

import optuna
import pytest
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.samplers._tpe.sampler import _split_trials, default_gamma
from optuna.trial import TrialState

from distributed.search.recent_history import BEST, LATEST, RecentHistory


class Looks(RandomSampler):
    """Keeps what it is shown."""

    def infer_relative_search_space(self, study, trial):
        self.shown = study.get_trials(deepcopy=False)
        self.independently = None
        return {}

    def sample_independent(self, study, trial, param_name, param_distribution):
        self.independently = study.get_trials(deepcopy=False)
        return super().sample_independent(study, trial, param_name, param_distribution)


def history(study, trials, completed=0.4, seed=0):
    """Random values, half of them equal to another one; the rest pruned at several steps, some without a report."""
    rng = random.Random(seed)
    for _ in range(trials):
        trial = study.ask()
        trial.suggest_float("x", 0, 1)
        fate = rng.random()
        if fate < completed:
            study.tell(trial, round(rng.random(), 2))
        elif fate < 0.95:
            for step in range(rng.randrange(4)):
                trial.report(round(rng.random(), 1), step)
            study.tell(trial, state=TrialState.PRUNED)
        elif fate < 0.98:
            study.tell(trial, state=TrialState.FAIL)


@pytest.mark.parametrize("completed", [0.4, 0.03], ids=["many completed", "fewer than 25 completed"])
def test_the_good_trials_are_those_of_the_whole_history_and_the_others_the_latest(completed):
    looks = Looks(seed=0)
    study = optuna.create_study(sampler=RecentHistory(looks))
    history(study, 600, completed)
    everything = [trial for trial in study.get_trials() if trial.state != TrialState.FAIL]
    ended = [trial for trial in everything if trial.state.is_finished()]
    study.ask().suggest_float("x", 0, 1)
    shown = [trial for trial in looks.shown if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    assert len(shown) == BEST + LATEST < len(ended)

    good, _ = _split_trials(study, ended, default_gamma(len(ended)))
    still_good, others = _split_trials(study, shown, default_gamma(len(shown)))
    assert [trial.number for trial in still_good] == [trial.number for trial in good]
    best = {trial.number for trial in good}
    latest = [trial.number for trial in ended if trial.number not in best][-LATEST:]
    assert [trial.number for trial in others] == latest

    running = [trial.number for trial in everything if trial.state == TrialState.RUNNING]
    now = [trial.number for trial in looks.shown if trial.state == TrialState.RUNNING]
    assert running
    assert now == [*running, 600]
    assert [trial.number for trial in looks.independently] == [trial.number for trial in looks.shown]


def proposed(sampler: BaseSampler, trials, directions):
    study = optuna.create_study(sampler=sampler, directions=directions)
    points = []
    for _ in range(trials):
        trial = study.ask()
        x = trial.suggest_float("x", -1, 1)
        y = trial.suggest_float("y", -1, 1) if trial.suggest_categorical("two", [True, False]) else 0.0
        points.append(trial.params)
        study.tell(trial, [(x - 0.3) ** 2 + y**2, abs(x)][: len(directions)])
    return points


def tpe():
    return TPESampler(seed=5, multivariate=True, group=True, constant_liar=True)


def test_a_history_that_is_short_enough_is_shown_whole():
    trials = BEST + LATEST + 1  # the last is proposed from a whole history
    assert proposed(RecentHistory(tpe()), trials, ["minimize"]) == proposed(tpe(), trials, ["minimize"])


def test_with_several_objectives_the_history_stays_whole(monkeypatch):
    monkeypatch.setattr("distributed.search.recent_history.LATEST", 10)
    both = ["minimize", "minimize"]
    assert proposed(RecentHistory(tpe()), 60, both) == proposed(tpe(), 60, both)
    assert proposed(RecentHistory(tpe()), 60, both[:1]) != proposed(tpe(), 60, both[:1])
