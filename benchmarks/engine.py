"""The cost of a search without its training: per result, for many trials, and for many slots.

    python -m benchmarks.engine --trials 1000 --slots 64

Results: dummy trials of one epoch, one after another in one slot, with every part of a sweep (study in a journal file,
sampler, ASHA, Tune, mailbox, display, TensorBoard). The time of the sampler is shown separately, because it is the time
of Optuna and grows with the number of trials.

Growth: simulated slots with the same search and Tune; each slot is a process that sleeps instead of training. What is
left out runs on the nodes and not in the driver: mailboxes, worker groups, training. The slots begin together when all
of them have started, so their results always arrive at the same moment.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import psutil
from optuna.samplers import BaseSampler
from ray import tune
from rich.console import Console
from rich.table import Table

from benchmarks.dummy_trials import Sleeper, make_runner
from core.config import resolve
from core.task_description import BRAIN_AGE
from distributed.run.assignment import assign
from distributed.search.budget import Budget
from distributed.search.schedulers import make_scheduler
from distributed.search.searcher import Judgement, Proposals, StudySearch
from distributed.search.study import open_study
from distributed.slots.cluster import connect
from distributed.slots.slot import Slot, Workers, pack
from distributed.sweeps.display import Display, TensorBoard
from distributed.sweeps.executor import Executor
from search_spaces import DEFAULT, load_space

HUNDRED = 100
OBJECTIVES = {"mae": BRAIN_AGE.metrics["mae"]}
CELLS = [{"fold": 0, "seed": 0}]


class TimedSampler(BaseSampler):
    """A sampler that notes the seconds it took for each trial."""

    def __init__(self, sampler: BaseSampler) -> None:
        self.sampler = sampler
        self.seconds: dict[int, float] = defaultdict(float)

    @contextlib.contextmanager
    def _timed(self, trial: optuna.trial.FrozenTrial) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[trial.number] += time.perf_counter() - began

    def before_trial(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        """See `BaseSampler`."""
        with self._timed(trial):
            self.sampler.before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> Any:
        """See `BaseSampler`."""
        with self._timed(trial):
            return self.sampler.infer_relative_search_space(study, trial)

    def sample_relative(self, study: optuna.Study, trial: optuna.trial.FrozenTrial, search_space: Any) -> Any:
        """See `BaseSampler`."""
        with self._timed(trial):
            return self.sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: optuna.trial.FrozenTrial, param_name: str, param_distribution: Any
    ) -> Any:
        """See `BaseSampler`."""
        with self._timed(trial):
            return self.sampler.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self, study: optuna.Study, trial: optuna.trial.FrozenTrial, state: Any, values: Any
    ) -> None:
        """See `BaseSampler`."""
        with self._timed(trial):
            self.sampler.after_trial(study, trial, state, values)


class Watch(tune.Callback):
    """Records for every result when it was trained, when it reached the driver, and the state of the driver then."""

    def __init__(self) -> None:
        self.at: list[float] = []
        self.processor: list[float] = []
        self.resident: list[int] = []
        self.spans: list[tuple[float, float]] = []
        self.process = psutil.Process()

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its callbacks for a restore that is not used here."""
        return {}

    def on_trial_result(
        self, iteration: int, trials: list, trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """An epoch ended."""
        self.at.append(time.perf_counter())
        self.processor.append(time.process_time())
        self.resident.append(self.process.memory_info().rss)
        self.spans.append((result["first_step_at"], result.get("ended_at", result["first_step_at"])))


@dataclass(frozen=True)
class Measured:
    """The cost of a search with dummy trials."""

    results: list[float]
    """Seconds since the result before; the first one's is that of bringing up, and left out."""
    sampling: list[float]
    """Seconds of the sampler for each of the same trials."""
    processor: list[float]
    """Seconds of the driver's own processor time meanwhile, the sampler's included."""
    resident: list[int]
    """Bytes of the driver at every result."""

    @property
    def engine(self) -> list[float]:
        """Seconds per result, without those of the sampler."""
        return [whole - sampler for whole, sampler in zip(self.results, self.sampling, strict=True)]


def search_for(folder: Path, sampler: str, trials: int, scheduler: str = "asha") -> StudySearch:
    """The search of a sweep over the default space, its study in `folder`, its sampler timed."""
    folder.mkdir(parents=True, exist_ok=True)
    space, settings = load_space(DEFAULT)
    study = open_study(folder / "study.journal", sampler, 0, OBJECTIVES)
    study.sampler = TimedSampler(study.sampler)
    proposals = Proposals(
        study,
        space,
        resolve(settings).model_dump(mode="json"),
        trials,
        assignment=lambda name, settings, prunable: assign(
            folder / "trials" / name, settings, CELLS, metric="mae", prunable=prunable
        ),
        refits=lambda study: [],
    )
    return StudySearch(proposals, Budget(), Judgement(OBJECTIVES, scheduler=scheduler))


def run_search(
    folder: Path, search: StudySearch, trainable: Any, epochs: int, slots: int = 1
) -> tuple[Watch, float]:
    """Run `search` as a sweep does; returns the records, and the seconds from start to end."""
    watch, budget, began = Watch(), search.budget, time.time()
    with Path(os.devnull).open("w") as nowhere:
        display = Display(Console(file=nowhere), search.proposals.trials, epochs, budget, OBJECTIVES["mae"])
        callbacks = [
            display,
            TensorBoard(folder / "tensorboard", ["optimiser.learning_rate"], ["value", "loss"], 1),
            watch,
        ]
        scheduler = make_scheduler(search.judgement.scheduler, epochs, len(CELLS))
        Executor(trainable, slots, folder / "tune", callbacks).search(search, scheduler, budget).fit()
    return watch, time.time() - began


def run_dummies(folder: Path, sampler: str, trials: int) -> Measured:
    """`trials` one-epoch trials without training, one after another in one real slot."""
    search = search_for(folder, sampler, trials)
    trainable = tune.with_parameters(
        Slot, workers=Workers(), runner=pack(make_runner), storage=str(folder / "tune")
    )
    watch, _ = run_search(folder, search, trainable, epochs=1)
    if len(watch.at) != trials:
        raise RuntimeError(f"{len(watch.at)} of {trials} dummy trials came back")
    sampler_of_study: TimedSampler = search.proposals.study.sampler  # type: ignore[assignment]
    sampling = [sampler_of_study.seconds[number] for number in range(1, trials)]
    return Measured(_steps(watch.at), sampling, _steps(watch.processor), watch.resident)


def _steps(values: list[float]) -> list[float]:
    """The differences between successive values."""
    return [after - before for before, after in itertools.pairwise(values)]


@dataclass(frozen=True)
class Growth:
    """The time for all results of many slots, from the first step to the last one."""

    used: float
    """Share of the slots' time that was slept through: trained, were they real."""
    per_result: float
    """Seconds of the driver's processor per result, proposals included."""
    busy: float
    """Share of the time that the driver kept a processor busy."""


def grow(folder: Path, sampler: str, slots: int, rounds: int, epochs: int, seconds: float) -> Growth:
    """Run a search with simulated slots.

    Args:
        folder: the folder for the study and the logs.
        sampler: the name of the sampler.
        slots: the number of slots.
        rounds: trials per slot.
        epochs: epochs of every trial; no trial is stopped early.
        seconds: the duration of every epoch.
    """
    gate = folder / "gate"
    gate.mkdir(parents=True)
    trainable = tune.with_parameters(Sleeper, seconds=seconds, epochs=epochs, slots=slots, gate=str(gate))
    search = search_for(folder, sampler, slots * rounds, scheduler="none")
    watch, _ = run_search(folder, search, trainable, epochs, slots)
    if len(watch.spans) != slots * rounds * epochs:
        raise RuntimeError(f"{len(watch.spans)} of {slots * rounds * epochs} epochs came back")
    lasted = max(end for _, end in watch.spans) - min(start for start, _ in watch.spans)
    processor = watch.processor[-1] - watch.processor[0]
    return Growth(
        len(watch.spans) * seconds / (slots * lasted), processor / len(watch.spans), processor / lasted
    )


def cost_table(measured: dict[str, Measured]) -> Table:
    """Milliseconds per result in the first and the last hundred, for engine and sampler; the memory of the driver."""
    trials = len(next(iter(measured.values())).resident)
    some = min(HUNDRED, trials // 2)
    places = sorted({min(some, trials), trials // 2, trials})
    table = Table(
        "sampler", "part", f"first {some} (ms)", f"last {some} (ms)", "last / first",
        *(f"driver after {place} (MB)" for place in places), title=f"{trials} one-epoch dummy trials",
    )  # fmt: skip
    for name, cost in measured.items():
        memory = [f"{cost.resident[place - 1] / 1e6:.0f}" for place in places]
        parts = {
            "engine": cost.engine, "sampler": cost.sampling, "both": cost.results, "both, processor": cost.processor,
        }  # fmt: skip
        for part, seconds in parts.items():
            first, last = statistics.mean(seconds[:some]), statistics.mean(seconds[-some:])
            table.add_row(
                name, part, f"{1e3 * first:.1f}", f"{1e3 * last:.1f}", f"{last / first:.2f}",
                *(memory if part == "engine" else [""] * len(memory)),
            )  # fmt: skip
    return table


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=1000, help="dummy trials for each sampler; 0 for none")
    parser.add_argument("--samplers", nargs="+", default=["random", "tpe"])
    parser.add_argument("--slots", type=int, default=64, help="simulated slots; 0 for none")
    parser.add_argument("--rounds", type=int, default=2, help="trials of each simulated slot")
    parser.add_argument("--epochs", type=int, default=5, help="of each simulated trial")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each simulated epoch")
    return parser.parse_args()


def main() -> None:
    """Measure, print the tables."""
    asked, console = _arguments(), Console()
    with tempfile.TemporaryDirectory(prefix="engine-") as temporary, connect(None, console):
        if asked.trials:
            console.print(
                cost_table(
                    {name: run_dummies(Path(temporary) / name, name, asked.trials) for name in asked.samplers}
                )
            )
        for name in asked.samplers if asked.slots else ():
            growth = grow(
                Path(temporary) / f"slots-{name}",
                name,
                asked.slots,
                asked.rounds,
                asked.epochs,
                asked.seconds,
            )
            console.print(
                f"{name}: {asked.slots} simulated slots, {asked.rounds} trials each of {asked.epochs} epochs of "
                f"{asked.seconds:g} s: used {growth.used:.1%} of the time from the first step to the last; "
                f"the driver took {1e3 * growth.per_result:.1f} ms of processor per result, {growth.busy:.0%} of one",
                highlight=False,
            )


if __name__ == "__main__":
    main()
