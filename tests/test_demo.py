"""The demonstration asks for as much as fits; that it fits for real is for people to see, not for a timed test."""

import pytest

from distributed.sweeps.demo import COMPLETED, SECONDS, SIZES, size_of


def test_a_slower_machine_gets_a_smaller_search_and_never_fewer_than_four_whole_trials():
    sizes = [size_of(epoch, slots=2) for epoch in (0.05, 0.3, 0.6, 0.8, 1.2, 1.6, 60.0)]
    asked = [(size.request.trials, size.request.changes["training.epochs"]) for size in sizes]
    assert asked[0] == SIZES[0]
    assert asked[-1] == SIZES[-1]
    assert asked == sorted(asked, key=SIZES.index)
    assert len(set(asked)) >= 4
    for size, (trials, _) in zip(sizes, asked, strict=True):
        assert trials >= size.request.startup_trials == COMPLETED
        assert size.request.time_budget is None  # nothing is cut
        assert size.seconds <= SECONDS or (trials, _) == SIZES[-1]


@pytest.mark.parametrize("epoch", [0.2, 0.7, 1.5])
def test_more_slots_never_ask_for_less(epoch):
    asked = [size_of(epoch, slots) for slots in (1, 2, 4, 16)]
    places = [SIZES.index((size.request.trials, size.request.changes["training.epochs"])) for size in asked]
    assert places == sorted(places, reverse=True)
