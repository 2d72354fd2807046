"""A slot: one Ray Train worker group that stays alive and runs one trial after another.

    Tune ──step()──▶ Slot ──order──▶ Mailbox ◀──next_order()── workers (one TorchTrainer, never restarted)
                       ◀──────────── answer() ────────────────

The pattern in the documentation of Ray starts a driver, a controller, a worker group and a process group for every
trial. This takes seconds, for trials that ASHA may stop after one epoch; a slot does it once. Checkpoints are files in
the folder of the trial, written by rank 0. So a restarted worker, slot or sweep finds them by the name of the trial,
and nothing goes through `ray.train.report` (which blocks for one poll of the controller).

A slot without a trial ends its workers when another slot waits for resources. Otherwise two sweeps that each have half
of a cluster could wait for ever: each has one slot with nothing to do, and one slot that cannot begin.
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

from core.errors import UserError
from distributed.run.assignment import Answer, Assignment, failed, read_progress
from distributed.slots.mailbox import Mailbox
from distributed.slots.reservations import Holder, holder, record, release, release_left, somebody_waits

WORKER_START_TIMEOUT_S = "900"
"""Autoscaled GPU nodes take minutes to start, and the default of Ray Train is 60 s."""
WORKER_RESTARTS = 2
GROUP_RESTARTS = 1
"""How often a worker group is replaced for the same epoch; then it is the trial that ends its workers."""
POLL_S = 1.0
IDLE_S = 5.0
"""Seconds without a trial after which a slot checks whether another slot waits for resources."""


@dataclass(frozen=True)
class Workers:
    """The worker group of one slot."""

    count: int = 1
    cpus: float = 1.0
    gpus: float = 0.0

    @property
    def scaling(self) -> train.ScalingConfig:
        """The group in the form that Ray Train takes; the controller itself uses no CPU."""
        resources = {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})
        return train.ScalingConfig(
            num_workers=self.count, use_gpu=self.gpus > 0, resources_per_worker=resources
        )


Runner = Callable[[Assignment], Answer]
"""Runs one epoch of an assignment in a worker; it keeps everything that outlives a trial."""


@dataclass(frozen=True)
class PackedRunner:
    """How the workers of a slot make their runner. Only the workers unpack it (see `pack`)."""

    contents: ray.ObjectRef[tuple[Callable[..., Runner], dict[str, object]]]

    def unpack(self) -> Runner:
        """Make the runner."""
        make_runner, arguments = ray.get(self.contents)
        return make_runner(**arguments)


def pack(make_runner: Callable[..., Runner], **arguments: object) -> PackedRunner:
    """Pack `make_runner(**arguments)`, which every worker calls once, for the way to the workers.

    The runner keeps everything that outlives a trial. In the object store it is bytes. So the slot and the controller
    of Train pass it on without importing what it needs (networks, losses, MONAI: seconds in each process).
    """
    return PackedRunner(ray.put((make_runner, arguments)))


def worker_loop(config: dict[str, Any]) -> None:
    """What every worker of a slot runs: fetch an order, run one epoch, answer; until the slot closes.

    Args:
        config: `mailbox` (the actor), `runner` (see `pack`), `reserved` and `held_by` (see `reservations.record`).
    """
    mailbox = config["mailbox"]
    rank = train.get_context().get_world_rank()
    if rank == 0:
        # Before everything that takes seconds, because this process may be killed meanwhile.
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
    """A worker group has ended and will not be restarted; the message says why."""


@dataclass
class WorkerGroup:
    """A TorchTrainer that runs `worker_loop` in a thread, and the mailbox for its orders."""

    workers: Workers
    runner: PackedRunner
    storage: str
    mailbox: Any = None
    failure: BaseException | None = None
    reserved: Path = field(init=False)
    held_by: Holder = field(init=False)
    thread: threading.Thread = field(init=False)

    def start(self) -> None:
        """Start the workers. This returns at once; the first `run` waits for them."""
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", WORKER_START_TIMEOUT_S)
        self.reserved = Path(self.storage) / "reserved"
        release_left(self.reserved)
        self.held_by = holder(f"slot-{os.getpid()}-{time.time_ns()}")
        # On the node of the slot: on another node the mailbox could be lost, and the trial would repeat its epoch.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.mailbox = Mailbox.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
        self.thread = threading.Thread(target=self._fit, name="slot-workers", daemon=True)
        self.thread.start()

    def run(self, assignment: Assignment) -> Answer:
        """Run one epoch of `assignment`; WorkersEndedError if the group or its mailbox has ended."""
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
        """Tell the workers to end, and wait until the trainer has ended."""
        # Without a mailbox the workers end by themselves.
        with contextlib.suppress(ray.exceptions.RayActorError):
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
    """A worker group as a trainable of Tune: one `step` is one epoch of the current trial.

    It is made with `tune.with_parameters(Slot, workers=…, runner=pack(…), storage=…)` and `reuse_actors=True`. The
    workers receive the trial's `config["assignment"]`.
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
        self.idle_since, self.heard = math.inf, 0
        self._begin_group()
        threading.Thread(target=self._give_way, name="slot-idle", daemon=True).start()

    def step(self) -> dict[str, object]:
        """Run one epoch. A worker group that ended is replaced; if that one ends in the same epoch, the trial fails.

        So a trial that ends its workers is given up, and one whose workers end now and then for other reasons is not.
        """
        with self.in_use:
            try:
                return {**self._step()}
            finally:
                self.idle_since = time.monotonic()

    def _step(self) -> Answer:
        assignment, ended = self.config["assignment"], 0
        known = self.heard
        while True:
            group = self.group or self._begin_group()
            try:
                answer = group.run(assignment)
                self.heard = answer.get("epochs", 0)
                return answer
            except WorkersEndedError as error:
                group.stop()
                self.group = None
                # An epoch may be kept, and its answer lost on the way.
                before, known = known, _epochs_kept(assignment)
                ended = ended + 1 if known == before else 0
                if ended > GROUP_RESTARTS:
                    return failed(f"its workers ended: {error}")

    def _begin_group(self) -> WorkerGroup:
        self.group = self.make_group()
        self.group.start()
        return self.group

    def _give_way(self) -> None:
        """End the workers of a slot that has had no trial for a while, if another slot waits for resources.

        The next step starts them again; a trial that begins in between continues from its last epoch.
        """
        while not self.closed.wait(IDLE_S):
            with self.in_use:
                is_idle = time.monotonic() - self.idle_since > IDLE_S
                if self.group is not None and is_idle and somebody_waits():
                    self.group.stop()
                    self.group = None

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial; the workers receive it with the next order."""
        # The epochs of the trial that this slot has heard of.
        self.config, self.heard = new_config, 0
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """A name only, because Tune pauses and clones trials by their checkpoints.

        The state itself is in the folder of the trial, and its assignment says from which checkpoint to continue.
        """
        return {"name": self.config["assignment"]["name"]}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Nothing: see `save_checkpoint`."""

    def cleanup(self) -> None:
        """Close the slot."""
        self.closed.set()
        with self.in_use:
            if self.group is not None:
                self.group.stop()


def _epochs_kept(assignment: Assignment) -> int:
    """The epochs of a trial that are in its folder, as far as this node sees it."""
    try:
        return len(read_progress(Path(assignment["folder"]))["history"])
    except UserError:
        return 0


def _reason(failure: BaseException | None) -> str:
    """The last line of the error of the first worker."""
    failures = getattr(failure, "worker_failures", None)
    cause = next(iter(failures.values())) if failures else failure
    lines = str(cause).strip().splitlines() or ["they returned"]
    return lines[-1].strip()[:300]
