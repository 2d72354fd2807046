"""The time until a search has found a configuration as good as that of another search: sweeps against other methods.

    python -m benchmarks.search --seconds 180 --seeds 3 --out runs/search-benchmark

sweep     `brainsweep sweep` with its defaults (TPE, ASHA), one slot for each core
plain     Optuna in one process with its own defaults (TPE, MedianPruner)
random    random search in one process, every trial at full length

All three search the same space on the same cells of the same phantom cohort, begin with the published configuration,
and have the same time. Plain and random run the same training loop, but without checkpoints, files and site accuracies.
They keep the cohort in memory, and use one thread or one for each core, depending on which of the two trained an epoch
faster just before. The clock starts with the first training step of each search; the time before is shown separately.

For every seed there are two targets: the worst of the three final bests, which all three reach, and the final best of
random search. Every search writes METHOD-SEED.json with the time and the value of each completed trial. When the
benchmark is called again, it runs only missing searches, and makes the tables again.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from rich.console import Console
from rich.table import Table

from core.config import merge, parse_changes, resolve
from core.evaluation.splits import make_splits
from core.run_names import STUDY
from core.volumes.cohort.reader import Cohort
from distributed.batches.in_process import InMemory
from distributed.run.assignment import Cell
from distributed.search.study import published_parameters
from distributed.sweeps.request import SweepRequest
from distributed.sweeps.resolve import ResolvedSearch, resolve_search
from distributed.training.loop import CellTraining, DivergedError
from distributed.training.subjects import Place, Subjects

SMALL = ["model.width=0.25", "training.batch_size=16", "objective.neighbours.step=2"]
MANY_TRIALS = 10_000
"""More trials than a search can do, so that the time ends it."""


@dataclass(frozen=True)
class Asked:
    """The options that all searches share."""

    seconds: float
    subjects: int
    spacing: float
    folds: int
    slots: int
    changes: list[str]

    def request(self, seed: int) -> SweepRequest:
        """The sweep of one seed, which decides the folds too."""
        return SweepRequest(
            trials=MANY_TRIALS, folds=self.folds, slots=self.slots, time_budget=self.seconds,
            search_seed=seed, changes=parse_changes(self.changes),
        )  # fmt: skip


@dataclass(frozen=True)
class Search:
    """The result of one search. Times are seconds from its first training step."""

    method: str
    seed: int
    asked: dict[str, Any]
    threads: int
    """That trained at a time."""
    before: float
    """Seconds from its start to its first step."""
    states: dict[str, int]
    """Trials by how they ended in time."""
    found: list[tuple[float, float]]
    """(time, validation MAE in years) of every completed trial, in order."""

    @property
    def best(self) -> float:
        """The final best value; infinite if no trial was completed."""
        return min((value for _, value in self.found), default=math.inf)

    def time_to(self, target: float) -> float:
        """Seconds until a trial as good as `target` was completed; infinite if there was none."""
        return min((at for at, value in self.found if value <= target), default=math.inf)


class CellObjective:
    """The objective for plain Optuna: the mean MAE over the cells, one cell after another, as in a trial of a slot."""

    def __init__(self, search: ResolvedSearch, subjects: Subjects, cells: list[dict[str, int]]) -> None:
        self.search, self.subjects, self.cells = search, subjects, cells
        self.first_step: float | None = None

    def __call__(self, trial: optuna.Trial) -> float:
        """The value of the trial, in years; TrialPruned if the pruner of the study stops it."""
        settings = resolve(merge(self.search.base, self.search.space(trial)))
        values: list[float] = []
        for index, cell in enumerate(self.cells):
            training = CellTraining(settings, self.subjects, Cell(**cell), Place())
            try:
                values.append(self._train(trial, training, is_first=index == 0))
            finally:
                training.close()
            self._report(trial, statistics.mean(values), (index + 1) * settings.training.epochs)
        return statistics.mean(values)

    def _train(self, trial: optuna.Trial, training: CellTraining, *, is_first: bool) -> float:
        """Train one cell to its end; in the first cell the pruner is asked after every epoch."""
        epochs = training.settings.training.epochs
        while training.epoch < epochs:
            row = training.run_epoch()
            self.first_step = self.first_step or row["first_step_at"]
            if (
                is_first
                and training.epoch < epochs
                and not isinstance(trial.study.pruner, optuna.pruners.NopPruner)
            ):
                self._report(trial, training.judge(sites=False).metrics["mae"], training.epoch)
        return training.judge(sites=False).metrics["mae"]

    @staticmethod
    def _report(trial: optuna.Trial, value: float, epochs: int) -> None:
        trial.report(value, epochs)
        if trial.should_prune():
            raise optuna.TrialPruned


def in_one_process(
    sampler: Callable[[int], optuna.samplers.BaseSampler], pruner: optuna.pruners.BasePruner,
    method: str, seed: int, asked: Asked, cohort: Path, out: Path,
) -> Search:  # fmt: skip
    """A search without Ray, on `asked.slots` threads."""
    began = time.time()
    opened, request = Cohort.open(cohort), asked.request(seed)
    search = resolve_search(request, opened)
    splits = make_splits(opened.manifest, request.folds, request.holdout, request.search_seed)
    objective = CellObjective(search, Subjects.of(opened, splits, InMemory.of(opened)), request.cells)
    threads = use_fastest_threads(objective, asked.slots)
    study = optuna.create_study(sampler=sampler(seed), pruner=pruner)
    published = published_parameters(search.space, search.base)
    if published is not None:
        study.enqueue_trial(published)
    study.optimize(objective, timeout=asked.seconds, catch=(DivergedError,))
    return _search(method, seed, asked, study, objective.first_step or began, began, threads)


def use_fastest_threads(objective: CellObjective, cores: int) -> int:
    """Let torch use one thread, or one for each core, because more threads can be slower on small volumes."""
    seconds = {}
    for threads in (1, cores):
        torch.set_num_threads(threads)
        training = CellTraining(
            resolve(objective.search.base), objective.subjects, Cell(**objective.cells[0]), Place()
        )
        # The first epoch is for warming up.
        training.run_epoch()
        seconds[threads] = training.run_epoch()["seconds"]
        training.close()
    fastest = min(seconds, key=lambda threads: seconds[threads])
    torch.set_num_threads(fastest)
    return fastest


def as_sweep(method: str, seed: int, asked: Asked, cohort: Path, out: Path) -> Search:
    """The command that users type, in its own process."""
    run, began = out / f"{method}-{seed}", time.time()
    options = {
        "--out": run, "--trials": MANY_TRIALS, "--folds": asked.folds, "--slots": asked.slots,
        "--time-budget": asked.seconds, "--search-seed": seed,
    }  # fmt: skip
    words = [str(word) for option in options.items() for word in option]
    words += [word for change in asked.changes for word in ("--set", change)]
    _run_command(["sweep", str(cohort), *words])
    storage = JournalStorage(JournalFileBackend(str(run / "study.journal")))
    study = optuna.load_study(study_name=STUDY, storage=storage)
    histories = [json.loads(file.read_text())["history"] for file in run.glob("trials/*/progress.json")]
    first_step = min(rows[0]["first_step_at"] for rows in histories if rows)
    return _search(method, seed, asked, study, first_step, began, asked.slots)


METHODS: dict[str, Callable[[str, int, Asked, Path, Path], Search]] = {
    "sweep": as_sweep,
    "plain": functools.partial(
        in_one_process, lambda seed: optuna.samplers.TPESampler(seed=seed), optuna.pruners.MedianPruner()
    ),
    "random": functools.partial(
        in_one_process, lambda seed: optuna.samplers.RandomSampler(seed=seed), optuna.pruners.NopPruner()
    ),
}


def _search(
    method: str, seed: int, asked: Asked, study: optuna.Study, first_step: float, began: float, threads: int
) -> Search:
    """The search of a study, without trials that ended after its time."""
    ended = [
        (trial.datetime_complete.timestamp() - first_step, trial)
        for trial in study.get_trials(deepcopy=False)
        if trial.datetime_complete is not None
    ]
    in_time = sorted(((at, trial) for at, trial in ended if at <= asked.seconds), key=lambda pair: pair[0])
    found = [(at, trial.values[0]) for at, trial in in_time if trial.state == TrialState.COMPLETE]
    states = Counter(trial.state.name for _, trial in in_time)
    return Search(method, seed, asdict(asked), threads, first_step - began, dict(states), found)


def _run_command(words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "distributed", *words], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"brainsweep {words[0]} failed: {done.stdout[-2000:]}{done.stderr[-2000:]}")


def all_searches(asked: Asked, seeds: int, methods: list[str], out: Path, console: Console) -> list[Search]:
    """Every search of every seed; a search whose file is in `out` is read from it."""
    cohort = out / "cohort"
    _run_command(
        ["phantom", str(cohort), "--subjects", str(asked.subjects), "--spacing", f"{asked.spacing:g}"]
    )
    searches = []
    for seed in range(seeds):
        for method in methods:
            file = out / f"{method}-{seed}.json"
            if not file.exists():
                made = METHODS[method](method, seed, asked, cohort, out)
                file.write_text(json.dumps(asdict(made)))
                console.print(f"{method}, seed {seed}: best {made.best:.2f} y", highlight=False)
            search = Search(**json.loads(file.read_text()))
            if search.asked != asdict(asked):
                raise SystemExit(f"{file} is of another benchmark, {search.asked}; give another --out")
            searches.append(search)
    return searches


def targets(searches: list[Search]) -> dict[str, float]:
    """The targets for the searches of one seed, in years."""
    bests = {search.method: search.best for search in searches}
    values = {"worst final best": max(bests.values()), "random's final best": bests.get("random", math.inf)}
    return {name: value for name, value in values.items() if math.isfinite(value)}


def print_tables(searches: list[Search], console: Console) -> None:
    """Print every search, then the time of a sweep relative to the others."""
    by_seed = {seed: [each for each in searches if each.seed == seed] for seed in {s.seed for s in searches}}
    names = list(targets(searches))
    table = Table(
        "seed", "method", "threads", "before (s)", "trials", "best (y)", *(f"{name}: y, s" for name in names),
        title="time to a validation MAE",
    )  # fmt: skip
    ratios: dict[tuple[str, str], list[float]] = {}
    for seed, rivals in by_seed.items():
        wanted = targets(rivals)
        times = {(each.method, name): each.time_to(wanted[name]) for each in rivals for name in names}
        for each in rivals:
            trials = ", ".join(f"{count} {state.lower()}" for state, count in sorted(each.states.items()))
            reached = [f"{wanted[name]:.2f}, {times[each.method, name]:.1f}" for name in names]
            table.add_row(
                str(seed),
                each.method,
                str(each.threads),
                f"{each.before:.1f}",
                trials,
                f"{each.best:.2f}",
                *reached,
            )
            for name in names:
                if each.method != "sweep" and ("sweep", name) in times:
                    # A search that never reached the target would have needed more than the whole time.
                    ratio = times["sweep", name] / min(times[each.method, name], each.asked["seconds"])
                    ratios.setdefault((each.method, name), []).append(ratio)
    console.print(table)
    for (method, name), of_seeds in ratios.items():
        console.print(
            f"sweep's time / {method}'s, to {name}: median {statistics.median(of_seeds):.2f} of "
            f"{', '.join(f'{ratio:.2f}' for ratio in of_seeds)}",
            highlight=False,
        )


def main() -> None:
    """Run what is missing, print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=180.0, help="of every search")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--subjects", type=int, default=128, help="phantom brains")
    parser.add_argument("--spacing", type=float, default=8.0, help="their voxels' edge in mm")
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--slots", type=int, default=2, help="cores: slots of a sweep, threads of the others")
    parser.add_argument("--set", nargs="*", default=SMALL)
    parser.add_argument("--out", type=Path, default=Path("runs/search-benchmark"))
    asked = parser.parse_args()
    changes = [*asked.set, f"training.epochs={asked.epochs}"]
    common = Asked(asked.seconds, asked.subjects, asked.spacing, asked.folds, asked.slots, changes)
    asked.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    print_tables(all_searches(common, asked.seeds, asked.methods, asked.out, console), console)


if __name__ == "__main__":
    main()
