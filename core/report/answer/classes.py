"""What the predicted probabilities of classes say of all held-out people together, and how far it can be trusted."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from core.evaluation import Floats
from core.evaluation.classification import macro_auc, predicted_classes
from core.files.tables import PROBABILITY
from core.report.answer.record import NothingToShow, RunRecord
from core.run_names import WINNER

RESAMPLES = 2_000
FEWEST_OF_A_CLASS = 5
"""Below this, an interval of an area under the ROC curve says more about these people than about others."""


def of_people(predictions: pd.DataFrame) -> pd.DataFrame:
    """One row per person: truth and the mean probability of every class, over scans and refit seeds.

    Of a person whose scans are of two classes there are two rows.
    """
    columns = [f"{PROBABILITY}{name}" for name in predicted_classes(predictions)]
    of_text = predictions.assign(truth=predictions["truth"].astype(str))
    return of_text.groupby(["subject", "truth"], sort=True)[columns].mean().reset_index("truth")


def _arrays(predictions: pd.DataFrame) -> tuple[Floats, npt.NDArray[np.int64]]:
    names, people = predicted_classes(predictions), of_people(predictions)
    probabilities_nk = people[[f"{PROBABILITY}{name}" for name in names]].to_numpy(float)
    known = {name: place for place, name in enumerate(names)}
    classes_n = np.array([known.get(name, -1) for name in people["truth"]], dtype=np.int64)
    return probabilities_nk, classes_n


def pooled_auc(predictions: pd.DataFrame) -> float:
    """The macro AUC over these people, a person once; NaN without two classes among them."""
    if predictions.empty or not predicted_classes(predictions):
        return math.nan
    return macro_auc(*_arrays(predictions))


def auc_interval(predictions: pd.DataFrame, level: float) -> tuple[float, float]:
    """The interval of `pooled_auc` over people, by the BCa bootstrap within classes (Efron and Tibshirani 1993, 14.3).

    NaN if a class has fewer than `FEWEST_OF_A_CLASS` people, or if everyone is ranked without a mistake: then no
    resample has one, and the interval would have no width.
    """
    if predictions.empty or not predicted_classes(predictions):
        return math.nan, math.nan
    probabilities_nk, classes_n = _arrays(predictions)
    groups = [np.flatnonzero(classes_n == each) for each in range(probabilities_nk.shape[1])]
    groups = [group for group in groups if group.size]
    value = macro_auc(probabilities_nk, classes_n)
    if len(groups) < 2 or min(map(len, groups)) < FEWEST_OF_A_CLASS or value >= 1:
        return math.nan, math.nan
    generator = np.random.default_rng(0)
    drawn_rn = np.concatenate(
        [group[generator.integers(0, group.size, (RESAMPLES, group.size))] for group in groups], axis=1
    )
    drawn_r = _macro_aucs(probabilities_nk[drawn_rn], classes_n[np.concatenate(groups)])
    left_out_n = np.array(
        [
            macro_auc(np.delete(probabilities_nk, row, axis=0), np.delete(classes_n, row))
            for group in groups
            for row in group
        ]
    )
    away_n = left_out_n.mean() - left_out_n
    spread = float((away_n**2).sum()) ** 1.5
    acceleration = 0.0 if spread == 0 else float((away_n**3).sum()) / (6 * spread)
    below = np.clip((drawn_r < value).mean() + (drawn_r == value).mean() / 2, 1e-4, 1 - 1e-4)
    bias = stats.norm.ppf(below)
    ends = []
    for share in ((1 - level) / 2, (1 + level) / 2):
        moved = bias + stats.norm.ppf(share)
        ends.append(stats.norm.cdf(bias + moved / (1 - acceleration * moved)))
    low, high = np.quantile(drawn_r, ends)
    return float(low), float(high)


def _macro_aucs(probabilities_rnk: Floats, classes_n: npt.NDArray[np.int64]) -> Floats:
    """The macro AUC of R sets of people of the same classes, from the ranks of their scores (Mann and Whitney 1947)."""
    of_class = []
    for index in np.unique(classes_n):
        is_member_n = classes_n == index
        members, others = int(is_member_n.sum()), int((~is_member_n).sum())
        ranks_rn = stats.rankdata(probabilities_rnk[:, :, index], axis=1)
        above_r = ranks_rn[:, is_member_n].sum(axis=1) - members * (members + 1) / 2
        of_class.append(above_r / (members * others))
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
    return f"Sensitivity against 1 - specificity of {len(people)} people; macro AUC {pooled_auc(winner):.2f}."


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
