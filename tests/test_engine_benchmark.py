"""The benchmarks of the search measure what they say: timed proposals, trials that end, times that are read right."""

import math

import optuna
import pytest
from optuna.trial import TrialState

from benchmarks.dummy_trials import answer
from benchmarks.engine import TimedSampler, search_for
from benchmarks.search import Search, targets
from benchmarks.slots import Overhead
from distributed.search.samplers import make_sampler
from search_spaces import load_space


def proposals(sampler, trials=14):
    """What `sampler` proposes of the default space when the value follows from the learning rate."""
    space, _ = load_space("brain_age")
    study = optuna.create_study(sampler=sampler)
    for _ in range(trials):
        trial = study.ask()
        rate = space(trial)["optimiser.learning_rate"]
        study.tell(trial, abs(math.log10(rate) + 3))
    return [trial.params for trial in study.get_trials()]


@pytest.mark.parametrize("name", ["tpe", "random"])
def test_a_timed_sampler_proposes_what_it_would_propose_untimed_and_knows_every_trial(name):
    timed = TimedSampler(make_sampler(name, seed=3))
    assert proposals(timed) == proposals(make_sampler(name, seed=3))
    assert sorted(timed.seconds) == list(range(14))


def test_dummy_trials_end_in_the_study_as_finished_trials_do(tmp_path):
    search = search_for(tmp_path, "tpe", trials=2)
    for name in ("a", "b"):
        assignment = search.suggest(name)["assignment"]
        search.on_trial_result(name, answer(assignment, epoch=1, epochs=2))
        search.on_trial_complete(name, answer(assignment, epoch=2, epochs=2))
    first, second = search.proposals.study.get_trials()
    assert [first.state, second.state] == [TrialState.COMPLETE] * 2
    assert sorted(first.intermediate_values) == [1]
    assert first.value < first.intermediate_values[1]
    rates = sorted((first, second), key=lambda trial: trial.value)
    distances = [abs(math.log10(trial.params["optimiser.learning_rate"]) + 3.5) for trial in rates]
    assert distances == sorted(distances)


def search(method, found):
    return Search(method, 0, {}, 1, 0.0, {}, found)


def test_a_search_reaches_a_value_when_its_first_trial_as_good_is_complete():
    one = search("sweep", [(2.0, 9.0), (5.0, 7.0), (8.0, 8.0)])
    assert [one.time_to(target) for target in (9.5, 9.0, 8.0, 7.0, 6.9)] == [2.0, 2.0, 5.0, 5.0, math.inf]
    rivals = [one, search("plain", [(4.0, 8.5)]), search("random", [(1.0, 9.0), (6.0, 7.5)])]
    assert targets(rivals) == {"worst final best": 8.5, "random's final best": 7.5}
    assert all(math.isfinite(each.time_to(8.5)) for each in rivals)


def test_what_is_paid_once_is_spread_over_all_trials():
    assert Overhead(gaps=[0.5, 1.5], before=3.0, after=1.0).all_in == pytest.approx(2.0)
