"""How often a slot replaces its workers for a trial; no Ray."""

import json

import pytest
from of_age import assign

from core.run_names import PROGRESS
from distributed.slots.slot import GROUP_RESTARTS, Slot, WorkersEndedError


class Group:
    """Workers that keep `epochs` and end before they have answered."""

    def __init__(self, folder, epochs):
        self.folder, self.epochs = folder, epochs

    def start(self):
        pass

    def stop(self):
        pass

    def run(self, assignment):
        if self.epochs is None:
            return {"value": 1.0}
        rows = [{"epoch": epoch + 1} for epoch in range(self.epochs)]
        (self.folder / PROGRESS).write_text(
            json.dumps({"of": None, "history": rows, "cells": [], "answer": None})
        )
        raise WorkersEndedError("the slot's mailbox died")


@pytest.mark.parametrize(
    ("kept", "survives"),
    [
        ([0, None], True),
        ([0, 0, None], False),  # twice in the same epoch
        ([1, 2, None], True),  # every time an epoch further
        ([1, 1, 2, 2, 3, None], True),
        ([1, 1, 1, None], False),
    ],
)
def test_workers_are_replaced_as_long_as_the_trial_gets_on(tmp_path, kept, survives):
    groups = iter([Group(tmp_path, epochs) for epochs in kept])
    slot = Slot.__new__(Slot)
    slot.group, slot.make_group, slot.heard = None, lambda: next(groups), 0
    slot.config = {"assignment": assign(tmp_path, {}, [{"fold": 0, "seed": 0}])}
    answer = slot._step()
    assert GROUP_RESTARTS == 1
    assert ("failed" not in answer) == survives
    if not survives:
        assert answer["failed"] == "its workers ended: the slot's mailbox died"
        assert answer["done"]
