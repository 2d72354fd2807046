"""What a long search lets go of: Tune's records of trials that have ended."""

from __future__ import annotations

from ray import tune
from ray.tune.experiment import Trial


class ForgetFinished(tune.Callback):
    """Drops what Tune keeps of a trial that has ended: statistics of every number of its results, its settings in
    several shapes, its last result.

    The study has what matters, and the search and the scheduler have been told. With thousands of trials this is most
    of what the driver holds, and of what Tune writes down every few seconds; the record of each trial itself stays, as
    Tune's design has it (ray-project/ray#64231).
    """

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: object) -> None:
        """Forget; Tune calls this after the search and the scheduler, and the other callbacks come first."""
        trial.metric_analysis.clear()
        trial.metric_n_steps.clear()
        trial.run_metadata.last_result = {}
        trial.run_metadata.invalidate_cache()
        trial.evaluated_params = {}
        if (
            "member" not in trial.config
        ):  # of a population, which looks at all its members until the last has ended
            trial.config.clear()  # in place: Tune keeps it under another name, too
        trial.invalidate_json_state()
