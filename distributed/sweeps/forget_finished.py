"""A long search deletes the records that Tune keeps of trials that have ended."""

from __future__ import annotations

from ray import tune
from ray.tune.experiment import Trial


class ForgetFinished(tune.Callback):
    """Deletes what Tune keeps of a trial that has ended: statistics of every number in its results, its settings in
    several forms, and its last result.

    The study holds the result, and the search and the scheduler know it. With thousands of trials these records are
    most of the memory of the driver, and most of what Tune writes every few seconds. The object of each trial itself
    stays, because Tune needs it (ray-project/ray#64231).
    """

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: object) -> None:
        """Delete the records. Tune calls this after the search, the scheduler and the other callbacks."""
        trial.metric_analysis.clear()
        trial.metric_n_steps.clear()
        trial.run_metadata.last_result = {}
        trial.run_metadata.invalidate_cache()
        trial.evaluated_params = {}
        # A population reads the configurations of all its members until the last one has ended.
        if "member" not in trial.config:
            # In place, because Tune has a second reference to it.
            trial.config.clear()
        trial.invalidate_json_state()
