"""A slot: one Ray Train worker group that stays alive and runs one trial after another.

    Tune ──step()──▶ Slot ──order──▶ Mailbox ◀──next_order()── workers (one TorchTrainer, never restarted)
                       ◀──────────── answer() ────────────────

The documented nesting starts a driver, a controller, a worker group and a process group for every trial:
seconds, for trials that ASHA may stop after one epoch. A slot pays that once. Checkpoints are files in the
trial's own folder, written by rank 0, so a restarted worker, slot or sweep finds them by the trial's name
and nothing has to travel through `ray.train.report` (which blocks for one controller poll).

A slot without a trial gives its workers up as soon as somebody waits for such. Else two sweeps that got half a
cluster each would wait for ever, each with one slot that has nothing left to do and one that never began.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray import train, tune
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from distributed.run.assignment import Answer, Assignment, failed
from distributed.slots.mailbox import Mailbox
from distributed.slots.reservations import Holder, holder, record, release, release_left, somebody_waits

WORKER_START_TIMEOUT_S = "900"  # autoscaled GPU nodes take minutes; Train's default gives up after 60 s
WORKER_RESTARTS = 2
GROUP_RESTARTS = 1
POLL_S = 1.0
IDLE_S = 5.0
"""After so long without a trial a slot looks whether somebody waits for its workers."""


@dataclass(frozen=True)
class Workers:
    """The worker group of one slot."""

    count: int = 1
    cpus: float = 1.0
    gpus: float = 0.0

    @property
    def scaling(self) -> train.ScalingConfig:
        """The group as Ray Train wants it said; the controller itself takes no CPU."""
        resources = {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})
        return train.ScalingConfig(
            num_workers=self.count, use_gpu=self.gpus > 0, resources_per_worker=resources
        )


Runner = Callable[[Assignment], Answer]
"""What a worker runs epochs with; it holds what outlives a trial."""


@dataclass(frozen=True)
class PackedRunner:
    """How the workers of a slot make their runner, unpacked by nobody else (see `pack`)."""

    contents: ray.ObjectRef[tuple[Callable[..., Runner], dict[str, object]]]

    def unpack(self) -> Runner:
        """The runner, made anew."""
        make_runner, arguments = ray.get(self.contents)
        return make_runner(**arguments)


def pack(make_runner: Callable[..., Runner], **arguments: object) -> PackedRunner:
    """`make_runner(**arguments) -> Callable[[assignment], Answer]`, to be called once in every worker.

    What it makes holds what outlives a trial. In the object store it is bytes: the slot and Train's controller pass
    it on without importing what it needs (networks, losses, MONAI: seconds in each of them).
    """
    return PackedRunner(ray.put((make_runner, arguments)))


def worker_loop(config: dict[str, Any]) -> None:
    """What every worker of a slot runs: fetch an order, run one epoch, answer; until the slot closes.

    Args:
        config: `mailbox` (the actor), `runner` (see `pack`), `reserved` and `held_by` (see `reservations.record`).
    """
    mailbox = config["mailbox"]
    rank = train.get_context().get_world_rank()
    if rank == 0:  # first of all: what follows takes seconds, in which this process may be killed
        record(Path(config["reserved"]), config["held_by"])
    run_epoch = config["runner"].unpack()
    done = ray.get(mailbox.unanswered.remote())
    finished_at: float | None = None
    while (order := ray.get(mailbox.next_order.remote(done))) is not None:
        started_at = time.time()
        answer = run_epoch(order["assignment"])
        done = order["serial"]
        if rank == 0:
            answer |= {"started_at": answer.get("first_step_at", started_at), "previous_end_at": finished_at}
            finished_at = time.time()
            ray.get(mailbox.answer.remote(done, answer))


class WorkersEndedError(RuntimeError):
    """A worker group is gone for good; the message says why."""


@dataclass
class WorkerGroup:
    """A TorchTrainer running `worker_loop` in a thread, and the mailbox that feeds it."""

    workers: Workers
    runner: PackedRunner
    storage: str
    mailbox: Any = None
    failure: BaseException | None = None
    reserved: Path = field(init=False)
    held_by: Holder = field(init=False)
    thread: threading.Thread = field(init=False)

    def start(self) -> None:
        """Bring the workers up; returns at once, the first `run` waits for them."""
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", WORKER_START_TIMEOUT_S)
        self.reserved = Path(self.storage) / "reserved"
        release_left(self.reserved)
        self.held_by = holder(f"slot-{os.getpid()}-{time.time_ns()}")
        # beside the slot: on another node it would be lost with that node, and the slot's trial begin its epoch again
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.mailbox = Mailbox.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
        self.thread = threading.Thread(target=self._fit, name="slot-workers", daemon=True)
        self.thread.start()

    def run(self, assignment: Assignment) -> Answer:
        """One epoch of `assignment`; WorkersEndedError when the group, or its mailbox, is no more."""
        pending = self.mailbox.run.remote(assignment)
        while True:
            ready, _ = ray.wait([pending], timeout=POLL_S)
            if ready:
                try:
                    answer: Answer = ray.get(pending)
                    return answer
                except ray.exceptions.RayActorError:
                    raise WorkersEndedError("the slot's mailbox died") from None
            if not self.thread.is_alive():
                raise WorkersEndedError(_reason(self.failure)) from self.failure

    def stop(self) -> None:
        """Send the workers home and wait for the trainer to end."""
        with contextlib.suppress(ray.exceptions.RayActorError):  # without a mailbox they go by themselves
            ray.get(self.mailbox.close.remote())
        self.thread.join(timeout=60)
        release(self.reserved, self.held_by)

    def _fit(self) -> None:
        trainer = TorchTrainer(
            worker_loop,
            train_loop_config={
                "mailbox": self.mailbox,
                "reserved": str(self.reserved),
                "held_by": self.held_by,
                "runner": self.runner,
            },
            scaling_config=self.workers.scaling,
            run_config=train.RunConfig(
                storage_path=self.storage,
                name=self.held_by["group"],
                failure_config=train.FailureConfig(max_failures=WORKER_RESTARTS),
            ),
        )
        try:
            trainer.fit()
        except BaseException as failure:
            self.failure = failure


class Slot(tune.Trainable):
    """Tune's face of a worker group: one `step` is one epoch of the trial the slot currently holds.

    Made with `tune.with_parameters(Slot, workers=…, runner=pack(…), storage=…)` and `reuse_actors=True`. The workers
    receive the trial's `config["assignment"]`.
    """

    def setup(  # type: ignore[override]
        self,
        config: dict[str, Any],
        workers: Workers,
        runner: PackedRunner,
        storage: str,
    ) -> None:
        """Start the workers; Tune calls this once per slot."""
        self.make_group: Callable[[], WorkerGroup] = lambda: WorkerGroup(workers, runner, storage)
        self.group: WorkerGroup | None = None
        self.in_use, self.closed = threading.Lock(), threading.Event()
        self.idle_since = math.inf
        self._begin_group()
        threading.Thread(target=self._give_way, name="slot-idle", daemon=True).start()

    def step(self) -> dict[str, object]:
        """One epoch. A group that Train gave up is replaced; a trial that ends that one too has failed."""
        with self.in_use:
            try:
                return {**self._step()}
            finally:
                self.idle_since = time.monotonic()

    def _step(self) -> Answer:
        for _ in range(GROUP_RESTARTS + 1):
            group = self.group or self._begin_group()
            try:
                return group.run(self.config["assignment"])
            except WorkersEndedError as ended:
                reason = str(ended)
                group.stop()
                self.group = None
        return failed(f"its workers ended: {reason}")

    def _begin_group(self) -> WorkerGroup:
        self.group = self.make_group()
        self.group.start()
        return self.group

    def _give_way(self) -> None:
        """End the workers of a slot that has had nothing to do for a while, if others wait; the next step brings them
        back, and a trial in which that falls goes on from its last epoch."""
        while not self.closed.wait(IDLE_S):
            with self.in_use:
                is_idle = time.monotonic() - self.idle_since > IDLE_S
                if self.group is not None and is_idle and somebody_waits():
                    self.group.stop()
                    self.group = None

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial: the workers learn of it with the next order."""
        self.config = new_config
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """A note for Tune, which pauses and clones trials by their checkpoints: the state itself is in the folder
        of the trial, and where to begin from is part of its assignment."""
        return {"name": self.config["assignment"]["name"]}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Nothing: see `save_checkpoint`."""

    def cleanup(self) -> None:
        """Close the slot."""
        self.closed.set()
        with self.in_use:
            if self.group is not None:
                self.group.stop()


def _reason(failure: BaseException | None) -> str:
    """The first worker's own last words, in one line."""
    failures = getattr(failure, "worker_failures", None)
    cause = next(iter(failures.values())) if failures else failure
    lines = str(cause).strip().splitlines() or ["they returned"]
    return lines[-1].strip()[:300]
