"""The mailbox between a slot and its workers: orders go out, answers come back.

It is a process of its own, so this module imports very little.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypedDict

import ray

if TYPE_CHECKING:
    from distributed.run.assignment import Answer, Assignment


class Order(TypedDict):
    """What a worker group must do next: one epoch of an assignment."""

    serial: int
    assignment: Assignment


@ray.remote(num_cpus=0)
class Mailbox:
    """Passes orders from a slot to its workers and the answers back; remembers an order that is not answered yet.

    A restarted worker group asks again and gets the same order. So no epoch is lost or run twice.
    """

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._order: Order | None = None
        self._answers: dict[int, Answer] = {}
        self._serial = 0
        self._closed = False

    async def run(self, assignment: Assignment) -> Answer:
        """Order one epoch of `assignment` and wait for its answer."""
        async with self._changed:
            self._serial += 1
            serial = self._serial
            self._order = Order(serial=serial, assignment=assignment)
            self._changed.notify_all()
            await self._changed.wait_for(lambda: serial in self._answers)
            return self._answers.pop(serial)

    async def next_order(self, after: int) -> Order | None:
        """Wait for the first order after the one with the serial `after`; None when the slot is closed."""
        async with self._changed:
            await self._changed.wait_for(
                lambda: self._closed or (self._order is not None and self._order["serial"] > after)
            )
            return None if self._closed else self._order

    async def answer(self, serial: int, answer: Answer) -> None:
        """Give the answer to the order `serial`; it is dropped if a later order has been given."""
        async with self._changed:
            if serial == self._serial:
                self._answers[serial] = answer
                self._changed.notify_all()

    async def unanswered(self) -> int:
        """The serial after which a newly started worker must begin."""
        async with self._changed:
            waiting = self._order is not None and self._serial not in self._answers
            return self._serial - 1 if waiting else self._serial

    async def close(self) -> None:
        """Tell every worker to end."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()
