"""What the predicted probabilities of classes say of all held-out people together, and how far it can be trusted."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from core.evaluation import Floats
from core.evaluation.classification import macro_auc, predicted_classes
from core.files.tables import PROBABILITY
from core.report.answer.record import NothingToShow, RunRecord
from core.run_names import WINNER

OUTER, SEED = "outer", "seed"
"""The columns with the hold-out of a nested search, and with the refit: each of them has a model of its own."""
RESAMPLES, FEWEST_RESAMPLES = 2_000, 200
MOST_PAIRS = 2e10
"""Of people in all resamples together; with more people there are fewer resamples."""
TIE = 1e-6
"""Two areas that differ by less are equal."""
FEWEST_OF_A_CLASS = 5
"""Below this, an interval of an area under the ROC curve says more about these people than about others."""


def of_people(predictions: pd.DataFrame, *apart: str) -> pd.DataFrame:
    """One row per person: truth and the mean probability of every class, over scans and refit seeds.

    Of a person whose scans are of two classes there are two rows. The column `OUTER` stays, if there is one, and the
    columns in `apart` if they are there: then a person has a row for each of their values.
    """
    columns = [f"{PROBABILITY}{name}" for name in predicted_classes(predictions)]
    of_text = predictions.assign(truth=predictions["truth"].astype(str))
    by = ["subject", "truth", *(name for name in (OUTER, *apart) if name in predictions)]
    return of_text.groupby(by, sort=True)[columns].mean().reset_index(by if apart else by[1:])


class _People(NamedTuple):
    """Whom an area under the ROC curve is of: N answers of models about P people."""

    probabilities_nk: Floats
    classes_n: npt.NDArray[np.int64]
    models_n: npt.NDArray[np.int64]
    """By which model each is predicted."""
    people_n: npt.NDArray[np.int64]
    """The person that an answer is about, 0 to P - 1; each refit answers about all of them."""


def _people(predictions: pd.DataFrame) -> _People:
    names, answers = predicted_classes(predictions), of_people(predictions, SEED)
    probabilities_nk = answers[[f"{PROBABILITY}{name}" for name in names]].to_numpy(float)
    known = {name: place for place, name in enumerate(names)}
    classes_n = [known.get(name, -1) for name in answers["truth"]]
    outer = [OUTER] if OUTER in answers else []
    models = [*outer, *([SEED] if SEED in answers else [])]
    models_n = answers.groupby(models).ngroup() if models else pd.Series(0, index=answers.index)
    people_n = answers.groupby(["subject", "truth", *outer]).ngroup()
    as_numbers = [np.asarray(each, dtype=np.int64) for each in (classes_n, models_n, people_n)]
    return _People(probabilities_nk, *as_numbers)


def pooled_auc(predictions: pd.DataFrame) -> float:
    """The macro AUC over these people, a person once; of several refits their mean. NaN without two classes among them.

    Only people of one model are compared with each other. The probabilities of several models have no common scale:
    a model that saw fewer people of a class gives it less to everyone, so pairs across models make 0.4 of guessing.
    """
    if predictions.empty or not predicted_classes(predictions):
        return math.nan
    people = _people(predictions)
    if people.models_n.max() == 0:
        return macro_auc(people.probabilities_nk, people.classes_n)
    return float(_macro_aucs(people, np.ones((1, len(people.classes_n)), dtype=np.float32))[0])


def auc_interval(predictions: pd.DataFrame, level: float) -> tuple[float, float]:
    """The interval of `pooled_auc` over people, by the BCa bootstrap within classes (Efron and Tibshirani 1993, 14.3).

    NaN if a class has fewer than `FEWEST_OF_A_CLASS` people, or if everyone is ranked without a mistake: then no
    resample has one, and the interval would have no width.
    """
    if predictions.empty or not predicted_classes(predictions):
        return math.nan, math.nan
    answers, value = _people(predictions), pooled_auc(predictions)
    count = 1 + int(answers.people_n.max())
    classes_p = np.empty(count, dtype=np.int64)
    classes_p[answers.people_n] = answers.classes_n
    groups = [np.flatnonzero(classes_p == each) for each in np.unique(classes_p)]
    if len(groups) < 2 or min(map(len, groups)) < FEWEST_OF_A_CLASS or not value < 1:
        return math.nan, math.nan
    generator = np.random.default_rng(0)
    pairs = sum(int((answers.models_n == model).sum()) ** 2 for model in np.unique(answers.models_n))
    resamples = int(np.clip(MOST_PAIRS / pairs, FEWEST_RESAMPLES, RESAMPLES))
    # How often each person is drawn, within their class; with them come the answers of all refits.
    times_rp = np.zeros((resamples, count), dtype=np.float32)
    for group in groups:
        times_rp[:, group] = generator.multinomial(len(group), np.full(len(group), 1 / len(group)), resamples)
    drawn_r = _macro_aucs(answers, times_rp[:, answers.people_n])
    drawn_r = drawn_r[np.isfinite(drawn_r)]
    if np.ptp(drawn_r) == 0:
        # Everybody has the same probabilities.
        return math.nan, math.nan
    left_out_p = np.concatenate(
        [
            _macro_aucs(answers, (answers.people_n != part[:, None]).astype(np.float32))
            for part in _parts(count)
        ]
    )
    away_p = np.nanmean(left_out_p) - left_out_p[np.isfinite(left_out_p)]
    spread = float((away_p**2).sum()) ** 1.5
    acceleration = 0.0 if spread == 0 else float((away_p**3).sum()) / (6 * spread)
    below = np.clip(
        (drawn_r < value - TIE).mean() + (np.abs(drawn_r - value) <= TIE).mean() / 2, 1e-4, 1 - 1e-4
    )
    bias = stats.norm.ppf(below)
    ends = []
    for share in ((1 - level) / 2, (1 + level) / 2):
        moved = bias + stats.norm.ppf(share)
        ends.append(stats.norm.cdf(bias + moved / (1 - acceleration * moved)))
    low, high = np.quantile(drawn_r, ends)
    return float(low), float(high)


def _parts(count: int) -> list[npt.NDArray[np.int64]]:
    """0 to `count`, in parts."""
    return np.array_split(np.arange(count), max(1, count // 500))


def _macro_aucs(people: _People, times_rn: npt.NDArray[np.float32]) -> Floats:
    """The macro AUC (R,) of R sets of people, in which each stands `times_rn` times.

    It is the share of pairs of a class and the rest, of one model, that are ranked rightly; ties count half (Mann and
    Whitney 1947).
    """
    of_class = []
    for index in np.unique(people.classes_n[people.classes_n >= 0]):
        right_r, all_r = np.zeros(len(times_rn)), np.zeros(len(times_rn))
        for model in np.unique(people.models_n):
            of_model_n = people.models_n == model
            members = np.flatnonzero(of_model_n & (people.classes_n == index))
            others = np.flatnonzero(of_model_n & (people.classes_n != index))
            score_n = people.probabilities_nk[:, index]
            difference = score_n[members, None] - score_n[None, others]
            ranked = ((difference > 0) + 0.5 * (difference == 0)).astype(np.float32)
            right_r += ((times_rn[:, members] @ ranked) * times_rn[:, others]).sum(axis=1)
            all_r += times_rn[:, members].sum(axis=1) * times_rn[:, others].sum(axis=1)
        with np.errstate(invalid="ignore"):
            of_class.append(right_r / all_r)
    mean_r: Floats = np.mean(of_class, axis=0)
    return mean_r


def held_out_people(record: RunRecord) -> pd.DataFrame:
    """One row per held-out person: truth, predicted (the likeliest class), and the mean probability of every class.

    Raises:
        NothingToShow: the winner has no predictions of held-out subjects.
    """
    winner = record.predictions[record.predictions["method"] == WINNER]
    names = predicted_classes(winner)
    if winner.empty or not names:
        raise NothingToShow("the winner has not been tried on the held-out subjects")
    people = of_people(winner)
    likeliest = people[[f"{PROBABILITY}{name}" for name in names]].to_numpy().argmax(axis=1)
    return people.assign(predicted=np.array(names, dtype=object)[likeliest])


def confusion(people: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """How many people of every class (rows) are taken for every class (columns)."""
    return pd.crosstab(people["truth"], people["predicted"]).reindex(index=names, columns=names, fill_value=0)


def _of_held_out_people(words: Callable[[RunRecord, pd.DataFrame], str]) -> Callable[[RunRecord], str]:
    """The words about a run that need the people of its hold-out, or the reason why there are none."""

    @functools.wraps(words)
    def of_record(record: RunRecord) -> str:
        try:
            return words(record, held_out_people(record))
        except NothingToShow as reason:
            return str(reason)

    return of_record


@_of_held_out_people
def roc_in_words(record: RunRecord, people: pd.DataFrame) -> str:
    """The areas under the curves of the figure."""
    winner = record.predictions[record.predictions["method"] == WINNER]
    refits = winner[SEED].nunique()
    what = f", by the mean probabilities of {refits} refits" if refits > 1 else ""
    area = pooled_auc(winner.drop(columns=SEED))
    return f"Sensitivity against 1 - specificity of {len(people)} people{what}; macro AUC {area:.2f}."


@_of_held_out_people
def confusion_in_words(record: RunRecord, people: pd.DataFrame) -> str:
    """The table of the figure."""
    table = confusion(people, predicted_classes(record.predictions))
    rows = (
        f"of {int(row.sum())} {name}: "
        + ", ".join(f"{int(number)} taken for {other}" for other, number in row.items())
        for name, row in table.iterrows()
    )
    return f"{'; '.join(rows)}."


@_of_held_out_people
def reliability_in_words(record: RunRecord, people: pd.DataFrame) -> str:
    """How sure the predictions are, and how often they are right."""
    sure, right = confidence(people)
    return (
        f"Mean probability of the predicted class {sure.mean():.2f}; a share of {right.mean():.2f} is right."
    )


def confidence(people: pd.DataFrame) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """The probability of the predicted class (N,), and whether it is the true one (N,)."""
    columns = [name for name in people if str(name).startswith(PROBABILITY)]
    return people[columns].to_numpy(float).max(axis=1), (people["truth"] == people["predicted"]).to_numpy()
