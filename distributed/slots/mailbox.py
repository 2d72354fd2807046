"""Orders from a slot to its workers, answers back. A process of its own, so it imports next to nothing."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypedDict

import ray

if TYPE_CHECKING:
    from distributed.run.assignment import Answer, Assignment


class Order(TypedDict):
    """What a worker group is to do next: one epoch of an assignment."""

    serial: int
    assignment: Assignment


@ray.remote(num_cpus=0)
class Mailbox:
    """Passes orders from a slot to its workers and the answer back; remembers what is unanswered.

    A restarted worker group asks again and gets the same order, so no epoch is lost or run twice.
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
        """The first order later than `after`, waiting for it; None once the slot is closed."""
        async with self._changed:
            await self._changed.wait_for(
                lambda: self._closed or (self._order is not None and self._order["serial"] > after)
            )
            return None if self._closed else self._order

    async def answer(self, serial: int, answer: Answer) -> None:
        """Hand in the answer to order `serial`; an answer that nobody waits for any more is dropped."""
        async with self._changed:
            if serial == self._serial:
                self._answers[serial] = answer
                self._changed.notify_all()

    async def unanswered(self) -> int:
        """The serial after which a newly started worker has to begin."""
        async with self._changed:
            waiting = self._order is not None and self._serial not in self._answers
            return self._serial - 1 if waiting else self._serial

    async def close(self) -> None:
        """Send every worker home."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()
