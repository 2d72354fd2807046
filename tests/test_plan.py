"""The order of an epoch: a permutation, the same for any number of workers, cheap for any number of epochs."""

import itertools
import tracemalloc

import numpy as np
import pytest

from distributed.batches.plan import READS, Plan, epoch_batches, share


def test_batches_are_a_permutation_and_the_same_for_any_number_of_workers():
    rows = np.arange(100, 137)
    batches = epoch_batches(rows, 8, seed=1, epoch=3)
    assert sorted(np.concatenate(batches)) == sorted(rows)
    for workers in (1, 2, 4):
        again = epoch_batches(rows, 8, seed=1, epoch=3, workers=workers)
        joined = [np.concatenate([share(batch, rank, workers) for rank in range(workers)]) for batch in again]
        assert np.concatenate(joined).tolist() == np.concatenate(batches).tolist()
        assert min(len(share(batch, workers - 1, workers)) for batch in again) >= 1


@pytest.mark.parametrize("subjects", [3, 16, 17, 18, 19])
def test_one_worker_and_two_have_the_same_batches(subjects):
    one, two = (epoch_batches(np.arange(subjects), 8, seed=0, epoch=1, workers=workers) for workers in (1, 2))
    assert [batch.tolist() for batch in one] == [batch.tolist() for batch in two]


@pytest.mark.parametrize(("subjects_left", "workers"), [(2, 1), (2, 2), (3, 2), (3, 3)])
def test_a_last_batch_of_two_subjects_stays(subjects_left, workers):
    batches = epoch_batches(np.arange(16 + subjects_left), 8, seed=0, epoch=1, workers=workers)
    assert [len(batch) for batch in batches] == [8, 8, subjects_left]


@pytest.mark.parametrize(("subjects_left", "workers"), [(1, 1), (1, 2), (2, 3), (3, 4)])
def test_a_last_batch_too_small_to_contrast_or_to_share_joins_the_one_before(subjects_left, workers):
    batches = epoch_batches(np.arange(16 + subjects_left), 8, seed=0, epoch=1, workers=workers)
    assert [len(batch) for batch in batches] == [8, 8 + subjects_left]


def test_epochs_and_seeds_give_other_orders():
    orders = {
        tuple(np.concatenate(epoch_batches(np.arange(20), 8, seed, epoch)))
        for seed in (0, 1)
        for epoch in (1, 2)
    }
    assert len(orders) == 4


def test_without_the_last_batch_every_batch_is_whole():
    assert [len(batch) for batch in epoch_batches(np.arange(21), 8, 0, 1, drop_last=True)] == [8, 8]
    assert [len(batch) for batch in epoch_batches(np.arange(5), 8, 0, 1, drop_last=True)] == [5]
    kept, dropped = (
        epoch_batches(np.arange(21), 8, 0, 1),
        epoch_batches(np.arange(21), 8, 0, 1, drop_last=True),
    )
    assert [batch.tolist() for batch in kept[:2]] == [batch.tolist() for batch in dropped]


def test_a_plan_that_begins_later_is_the_tail_of_the_whole_one():
    rows = np.arange(50)
    whole = [batch.tolist() for batch in Plan(rows, 8, 3, range(1, 6)).batches()]
    rest = [batch.tolist() for batch in Plan(rows, 8, 3, range(4, 6)).batches()]
    assert rest == whole[-len(rest) :]
    assert len(rest) == 2 * 7


@pytest.mark.parametrize("rows_per_read", [1, 8, 20, 1000])
def test_reads_hold_the_batches_of_an_epoch_in_order(rows_per_read):
    plan = Plan(np.arange(100, 151), 8, 0, range(1, 2), rank=1, workers=2)
    table = plan.reads(1, rows_per_read)
    assert table.schema == READS
    batches = []
    for line in table.to_pylist():
        assert sum(line["sizes"]) == len(line["rows"])
        assert len(line["rows"]) <= max(rows_per_read, max(line["sizes"]))
        starts = np.cumsum([0, *line["sizes"]])
        batches += [line["rows"][a:b] for a, b in itertools.pairwise(starts)]
    assert batches == [batch.tolist() for batch in plan.epoch(1)]


def test_a_plan_holds_one_epoch_at_a_time():
    peaks = []
    for epochs in (2, 12):
        tracemalloc.start()
        planned = sum(len(batch) for batch in Plan(np.arange(50_000), 32, 0, range(1, epochs + 1)).batches())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert planned == epochs * 50_000
    assert max(peaks) < 5e6
    assert peaks[1] < 1.1 * peaks[0]


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_shares_are_those_of_numpy(workers):
    for size in (workers, 31, 32):
        for rank, part in enumerate(np.array_split(np.arange(size), workers)):
            assert share(np.arange(size), rank, workers).tolist() == part.tolist()
