"""Ray Tune as the executor of a search: its slots run the trials that a searcher proposes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
from ray import tune
from ray.tune.schedulers import TrialScheduler
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from distributed.search.searcher import StudySearch
from distributed.sweeps.forget_finished import ForgetFinished

TRIAL_RESTARTS = 2
# The driver of a trial in Tune needs a resource; the marker resource of the head uses no CPU of the slots.
HEAD = "node:__internal_head__"
DRIVER_RESOURCES = {"CPU": 0, HEAD: 0.001}


@dataclass(frozen=True)
class Executor:
    """The slots, and the folder for the files of Tune. Every use of Tune in a run takes its options from here."""

    trainable: type[tune.Trainable]
    """`Slot` with its parameters."""
    slots: int
    """The number of trials at a time."""
    storage: Path
    callbacks: Sequence[tune.Callback] = ()

    def search(
        self, search: StudySearch, scheduler: TrialScheduler, stopper: tune.Stopper, name: str = "sweep"
    ) -> tune.Tuner:
        """A tuner for the trials of `search`, `slots` at a time; `scheduler` and `stopper` stop them."""
        return tune.Tuner(
            tune.with_resources(self.trainable, DRIVER_RESOURCES),
            tune_config=tune.TuneConfig(
                search_alg=search,
                scheduler=scheduler,
                num_samples=-1,
                max_concurrent_trials=self.slots,
                reuse_actors=True,
            ),
            run_config=self.options(name, stopper),
        )

    def options(self, name: str, stopper: tune.Stopper) -> tune.RunConfig:
        """Where Tune keeps its files, and how often it restarts a trial."""
        return tune.RunConfig(
            name=name,
            stop=stopper,
            storage_path=str(self.storage),
            failure_config=tune.FailureConfig(max_failures=TRIAL_RESTARTS),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            callbacks=[*self.callbacks, ForgetFinished()],
            verbose=0,
        )


def release_slots() -> None:
    """Release what the slots of a tuner that has ended still reserve; no slot of this job is alive now.

    Tune kills slots that do not end at once. Ray keeps the placement groups of their workers as long as the job lives
    (ray-project/ray#58515), and the slots of the following search would wait for them for ever. The id of a group ends
    with the id of its job, so the groups of other sweeps on the cluster are not removed.
    """
    job = ray.get_runtime_context().get_job_id()
    for group, about in placement_group_table().items():
        if group.endswith(job) and about["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group))))
