"""Which penalty of the ridge probe predicts new people best, when the encoder was trained on the probe's subjects?

    python -m benchmarks.probe_penalty [--cohort COHORT] [--out TABLE.csv]

An encoder knows the subjects that it was trained on. So a penalty that is chosen on their embeddings may be too small.
Compared are, on people whom nothing has seen:

- seen subjects: every training subject is left out of the probe, but not of the encoder;
- one unseen part: the encoder is trained without a fifth of its subjects, and the penalty is chosen on that fifth;
- out-of-fold encoders: the penalty is chosen on unseen fifths (one of them, or all five), each with an encoder of its
  own; the encoder that is judged is trained on everybody;
- other cells: the penalty is chosen on the validation subjects of the other folds of the same configuration, which
  costs nothing more; this is what a trial does (`core.tasks.penalties`, which is called here);
- the best penalty there is, which no method can know; direct regression (L1); and the median.

"reported" and "same, on unseen" say whether a trial tells the truth: the error that its cells report for their own
validation subjects, and the error of the same models on people whom nothing has seen; means over folds. The validation
subjects are matched in age with the training subjects and the others are not, so compare each with its median.

Without `--cohort` a synthetic cohort is made: 100 subjects to draw from, and 150 others to judge on.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import Ridge

from core.config import Settings, merge, resolve
from core.evaluation import Floats
from core.evaluation.probes import ALPHAS, fit_age_probe, standardisation
from core.evaluation.splits import Rows, Splits, make_splits
from core.run_settings import RunSettings
from core.tasks.brain_age import BrainAge
from core.tasks.penalties import part_of
from core.tasks.task import JudgedCell, Judging, Observed
from core.volumes.cohort.reader import Cohort
from core.volumes.phantom.cohort import write_phantom_cohort
from core.volumes.phantom.settings import PhantomSettings
from distributed.batches.in_process import InMemory
from distributed.run.assignment import HOLDOUT, Cell
from distributed.training.loop import CellTraining
from distributed.training.subjects import Place, Subjects
from search_spaces import published

TASK = BrainAge()
PARTS = 5
JUDGED = 150
SIZES = (20, 40, 80)
SEEDS = (0, 1, 2)
RATES = {"published rate": 1e-4, "ten times the rate": 1e-3}
SMALL: Settings = {"model.width": 0.25, "training.epochs": 20, "training.batch_size": 16}


def embedded(
    subjects: Subjects, settings: RunSettings, trained: Rows, judged: Rows, seed: int
) -> tuple[Observed, Observed]:
    """The embeddings of both groups by an encoder that is trained on the first one."""
    splits = Splits(holdout=judged, folds=(trained,))
    training = CellTraining(
        settings, dataclasses.replace(subjects, splits=splits), Cell(HOLDOUT, seed), Place()
    )
    for _ in range(settings.training.epochs):
        training.run_epoch()
    return training._observe(trained), training._observe(judged)


def errors_by_penalty(fitted: Observed, judged: Observed) -> Floats:
    """MAE in years of every penalty of `ALPHAS`: the probe is fitted on the first group and judged on the second."""
    mean_d, scale_d = standardisation(np.asarray(fitted.embeddings, np.float64))
    known, unknown = ((np.asarray(each.embeddings) - mean_d) / scale_d for each in (fitted, judged))
    predicted = (Ridge(alpha=alpha).fit(known, fitted.labels).predict(unknown) for alpha in ALPHAS)
    return np.array([np.abs(ages - judged.labels).mean() for ages in predicted])


def parts_of(rows: Rows, ages: Floats, seed: int) -> list[Rows]:
    """`rows` in `PARTS` parts of similar ages."""
    ordered = rows[np.argsort(ages[rows], kind="stable")]
    draws = np.random.default_rng(seed)
    blocks = [draws.permutation(ordered[start : start + PARTS]) for start in range(0, len(rows), PARTS)]
    return [
        np.sort(np.array([block[part] for block in blocks if part < len(block)])) for part in range(PARTS)
    ]


def compare(
    subjects: Subjects, settings: RunSettings, folds: Sequence[Rows], judged: Rows, seed: int
) -> dict[str, float]:
    """MAE in years of every way to choose the penalty, for the cell of the first fold, on the `judged` rows."""
    ages = subjects.manifest["age"].to_numpy(float)
    splits = Splits(judged, tuple(folds))
    trained = splits.training(0)
    cells, unseen_of, median_of_folds = [], [], []
    for fold, rows in enumerate(folds):
        known = splits.training(fold)
        fitted_fold, both = embedded(subjects, settings, known, np.concatenate([rows, judged]), seed)
        of_fold, unseen = take(both, slice(None, len(rows))), take(both, slice(len(rows), None))
        outcome = TASK.judge(
            settings, fitted_fold, of_fold, Judging(sites=False, folds=splits.fold_of(known))
        )
        cells.append(JudgedCell(fold, of_fold, outcome.kept))
        median_of_folds.append(outcome.metrics["median_mae"])
        unseen_of.append(errors_by_penalty(fitted_fold, unseen))
        if fold == 0:
            fitted, unseen_first = fitted_fold, unseen
    made = [metrics for metrics, _ in TASK.judge_together(cells)]
    same = [errors[ALPHAS.index(each["penalty"])] for errors, each in zip(unseen_of, made, strict=True)]
    by_penalty = unseen_of[0]

    def chosen(curves: Sequence[Floats]) -> float:
        return float(by_penalty[int(np.argmin(np.mean(curves, axis=0)))])

    inner = []
    for number, part in enumerate(parts_of(trained, ages, seed)):
        rest = np.setdiff1d(trained, part)
        fitted_rest, both = embedded(subjects, settings, rest, np.concatenate([part, judged]), seed)
        of_part, of_judged = take(both, slice(None, len(part))), take(both, slice(len(part), None))
        curve = errors_by_penalty(fitted_rest, of_part)
        inner.append(curve)
        if number == 0:
            one_part = errors_by_penalty(together(fitted_rest, of_part), of_judged)[int(np.argmin(curve))]
    direct = resolve(merge(settings.model_dump(mode="json"), {"objective.name": "l1"}))
    _, regressed = embedded(subjects, direct, trained, judged, seed)
    own = fit_age_probe(fitted.embeddings, fitted.labels, fitted.subjects)
    return {
        "median": float(np.abs(np.median(ages[trained]) - ages[judged]).mean()),
        "seen subjects": float(np.abs(own.predict(unseen_first.embeddings) - unseen_first.labels).mean()),
        "one unseen part": float(one_part),
        "one out-of-fold encoder": chosen(inner[:1]),
        "five out-of-fold encoders": chosen(inner),
        "other cells": float(same[0]),
        "best penalty": float(by_penalty.min()),
        "direct L1": float(np.abs(regressed.predicted - regressed.labels).mean()),
        "penalty of seen subjects": own.alpha,
        "penalty of five": ALPHAS[int(np.argmin(np.mean(inner, axis=0)))],
        "penalty of cells": made[0]["penalty"],
        "penalty best": ALPHAS[int(np.argmin(by_penalty))],
        "median of the folds": float(np.mean(median_of_folds)),
        "reported": float(np.mean([each["mae"] for each in made])),
        "same, on unseen": float(np.mean(same)),
    }


def take(of: Observed, rows: slice) -> Observed:
    """Some scans."""
    return part_of(of, np.arange(len(of.labels))[rows])


def together(first: Observed, second: Observed) -> Observed:
    """The scans of both groups."""
    joined = [
        np.concatenate([getattr(first, name), getattr(second, name)])
        for name in ("labels", "sites", "subjects", "embeddings")
    ]
    return Observed(*joined)


def on_phantoms(sizes: Sequence[int], seeds: Sequence[int]) -> Iterator[dict[str, object]]:
    """A row for every number of training subjects, seed and learning rate."""
    with tempfile.TemporaryDirectory() as folder:
        cohort = write_phantom_cohort(
            Path(folder) / "phantom", PhantomSettings(subjects=100 + JUDGED, spacing=8)
        )
        subjects = Subjects.of(cohort, Splits(np.arange(0), (np.arange(len(cohort)),)), InMemory.of(cohort))
        ages = subjects.manifest["age"].to_numpy(float)
        for seed in seeds:
            drawn = np.random.default_rng(seed).permutation(100)
            for size in sizes:
                folds = parts_of(drawn[: size * PARTS // (PARTS - 1)], ages, seed)
                for name, rate in RATES.items():
                    settings = resolve(
                        merge(published("brain_age"), {**SMALL, "optimiser.learning_rate": rate})
                    )
                    found = compare(subjects, settings, folds, np.arange(100, len(cohort)), seed)
                    yield {"n": size, "seed": seed, "rate": name} | found


def on_cohort(location: Path, seeds: Sequence[int]) -> Iterator[dict[str, object]]:
    """A row for every fold of five, seed and learning rate: the fold is judged, the others are trained on."""
    cohort = Cohort.open(location)
    subjects = Subjects.of(cohort, Splits(np.arange(0), (np.arange(len(cohort)),)), InMemory.of(cohort))
    ages = subjects.manifest["age"].to_numpy(float)
    for seed in seeds:
        outer = make_splits(subjects.manifest, PARTS, 0.0, seed).folds
        for number, judged in enumerate(outer):
            folds = parts_of(np.setdiff1d(np.arange(len(cohort)), judged), ages, seed)
            for name, rate in RATES.items():
                settings = resolve(merge(published("brain_age"), {**SMALL, "optimiser.learning_rate": rate}))
                yield {"n": len(cohort), "seed": seed, "fold": number, "rate": name} | compare(
                    subjects, settings, folds, judged, seed
                )


def main() -> None:
    """Run the comparison, and print the means over seeds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cohort", type=Path)
    parser.add_argument("--out", type=Path, default=Path("probe_penalty.csv"))
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for row in (
        on_cohort(asked.cohort, asked.seeds) if asked.cohort else on_phantoms(asked.sizes, asked.seeds)
    ):
        rows.append(row)
        pd.DataFrame(rows).to_csv(asked.out, index=False)
        print(row, flush=True)
    table = pd.DataFrame(rows)
    print(table.groupby(["rate", "n"]).mean(numeric_only=True).round(2).T.to_string())


if __name__ == "__main__":
    main()
