"""Classes from volumes: an encoder with a class head, or a contrastive one whose embedding a probe reads (system C).

Shape suffixes: N scans, B scans of a batch, V views, C channels, X, Y, Z, E embedding, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, cast

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from pydantic import Field
from torch import nn

from core.errors import UserError
from core.evaluation import Floats
from core.evaluation.class_probe import (
    PENALTIES,
    ClassProbe,
    NeighbourProbe,
    fit_class_probe,
    probabilities_by_penalty,
    read_probe,
    softmax,
)
from core.evaluation.classification import (
    Indices,
    by_person,
    classification_metrics,
    log_losses,
    predicted_classes,
)
from core.evaluation.logistic import fit_logistic_probe
from core.evaluation.splits import NO_NAME, Rows, Splits
from core.files.tables import PROBABILITY
from core.lookup import did_you_mean
from core.losses.classes import ClassLoss, CrossEntropy, Focal
from core.losses.members import SimCLR, SupCon
from core.models import build_encoder, build_projection_head
from core.models.contrastive import ContrastiveModel
from core.models.heads import ClassHead
from core.models.settings import ModelSettings, ResNetSettings
from core.objectives import Metric
from core.run_settings import DataSettings, Frozen, RunSettings
from core.task_description import Floor, Rival, TaskDescription
from core.tasks.penalties import (
    BY_PENALTY,
    WITHOUT,
    best_place,
    by_penalty_of,
    chosen_for_each,
    errors_without_folds,
)
from core.tasks.task import (
    Facts,
    JudgedCell,
    Judging,
    Labels,
    Observed,
    Outcome,
    Prediction,
    Step,
    Task,
    Truth,
    is_known,
    of_sites,
)
from core.volumes.views import ViewSettings

MOST_CLASSES = 100


class ClassificationData(DataSettings):
    """What is taken from the cohort: also which column has the classes."""

    target: str = Field("", description="column of the cohort with the class of every scan")


class ProbeSettings(Frozen):
    """How an embedding is judged; a class head needs none of this."""

    probe: Literal["logistic", "neighbours"] = Field(
        "logistic", description="what reads classes from the embedding of a contrastive encoder"
    )
    neighbours: int = Field(5, ge=1, description="nearest training scans, for probe neighbours")
    reference: Literal["openbhb"] | None = Field(
        None, description="openbhb: logistic regression as the challenge has it, on embeddings as they are"
    )


class ClassificationSettings(RunSettings):
    """The settings of classification."""

    task: str = "classification"
    data: ClassificationData = ClassificationData()
    views: ViewSettings = ViewSettings(count=1)
    model: ModelSettings = ResNetSettings()
    objective: Annotated[CrossEntropy | Focal | SimCLR | SupCon, Field(discriminator="name")] = CrossEntropy()
    evaluation: ProbeSettings = ProbeSettings()


class ClassModel(nn.Module):
    """Encoder and class head."""

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, volumes_bcxyz: torch.Tensor) -> torch.Tensor:
        """Scores (B, K), float32."""
        scores_bk: torch.Tensor = self.head(self.encoder(volumes_bcxyz))
        return scores_bk


class Classification(Task[ClassificationSettings]):
    """See the top of this file."""

    about = TaskDescription(
        name="classification",
        metrics={
            "macro_auc": Metric(title="macro AUC", better="high"),
            "balanced_accuracy": Metric(title="balanced accuracy", better="high"),
            "f1": Metric(title="F1", better="high"),
            "log_loss": Metric(title="log loss"),
            "brier": Metric(title="Brier score"),
            "calibration_error": Metric(title="calibration error"),
            "site_balanced_accuracy": Metric(
                title="site balanced accuracy", needs_sites=True, as_objective="site balanced accuracy"
            ),
        },
        objectives=(
            "macro_auc", "balanced_accuracy", "f1", "log_loss", "brier", "calibration_error", "site_balanced_accuracy",
        ),
        shown=("macro_auc", "balanced_accuracy", "f1", "log_loss", "brier", "calibration_error"),
        error=Metric(title="log losses"),
        interval="auc",
        truth="class",
        floor=Floor(
            method="class shares", words="predicting the shares of the classes", metric="floor_macro_auc",
            of="macro_auc",
        ),
        voxels=Rival(folder="voxels", method="voxels", words="logistic regression on voxels"),
        nothing_found="the classes have not been found in these images",
        caveats=(
            "Methods are compared in pairs by the log loss of every person, which also asks how sure a prediction is; "
            "the AUC asks only how people are ranked.",
        ),
        figures=("roc", "confusion", "reliability"),
    )  # fmt: skip
    keeps = (BY_PENALTY, WITHOUT)
    settings = ClassificationSettings

    def check(self, settings: ClassificationSettings) -> None:
        """Refuse a configuration without a target, and settings that cannot act."""
        if not settings.data.target:
            raise UserError(
                "data.target is not given: --set data.target=COLUMN names the column with the classes"
            )
        evaluation = settings.evaluation
        if has_class_head(settings) and evaluation != ProbeSettings():
            raise UserError(
                f"evaluation.probe cannot act with objective.name={settings.objective.name}, whose class head predicts "
                "itself; remove the settings of evaluation, or use a contrastive objective"
            )
        if evaluation.probe == "neighbours" and evaluation.reference is not None:
            raise UserError(
                "evaluation.reference=openbhb is a logistic probe; remove evaluation.probe=neighbours"
            )
        if isinstance(settings.objective, SupCon) and settings.objective.bin_width is not None:
            raise UserError("objective.bin_width is for continuous labels, and a class is none; remove it")

    def balanced_by(self, settings: ClassificationSettings) -> str:
        """Folds are alike in the classes."""
        return settings.data.target

    def labels(self, settings: ClassificationSettings, manifest: pd.DataFrame) -> Labels:
        """The names of the classes (N,), None where unknown.

        Raises:
            UserError: there is no such column, or it has one class, or so many that it has none.
        """
        target = settings.data.target
        if target not in manifest:
            raise UserError(
                f"data.target: the cohort has no column '{target}'; {did_you_mean(target, map(str, manifest.columns))}"
            )
        names = np.array([class_name(value) for value in manifest[target]], dtype=object)
        found = sorted({str(name) for name in names if name is not None})
        if len(found) < 2:
            raise UserError(
                f"data.target={target} has {f'the class {found[0]} only' if found else 'no known class'}: two or more "
                "are needed"
            )
        if len(found) > MOST_CLASSES:
            raise UserError(
                f"data.target={target} has {len(found)} different values, such as {found[0]} and {found[-1]}: that is "
                f"no class; at most {MOST_CLASSES} are taken"
            )
        return names

    def needs_truth(self, settings: ClassificationSettings) -> bool:
        """SimCLR contrasts scans without it."""
        return settings.objective.name != "simclr"

    def check_cohort(self, settings: ClassificationSettings, manifest: pd.DataFrame, splits: Splits) -> None:
        """Refuse classes with too few people to be learnt, or judged, in every part.

        Raises:
            UserError: naming the class, its people, and what would help.
        """
        labels = self.labels(settings, manifest)
        subjects = manifest["subject"].to_numpy(str)

        def people(rows: Rows, name: str) -> int:
            return len(np.unique(subjects[rows][labels[rows] == name]))

        everyone, folds = np.arange(len(labels)), len(splits.folds)
        for name in class_names(labels):
            total = people(everyone, name)
            parts = {f"fold {fold}": people(rows, name) for fold, rows in enumerate(splits.folds)}
            if splits.holdout.size:
                parts["the hold-out"] = people(splits.holdout, name)
            empty = [part for part, count in parts.items() if count == 0]
            if empty:
                held = " and the hold-out" if splits.holdout.size else ""
                raise UserError(
                    f"class {name} of {settings.data.target} has {total} of {len(np.unique(subjects))} people, and "
                    f"{empty[0]} has none of them: {folds} folds{held} need at least as many people of every class; "
                    "use fewer --folds, or leave this class out of the column"
                )
            if total - max(parts.values()) < 2:
                raise UserError(
                    f"class {name} of {settings.data.target} has {total} people: too few are left to train on; at "
                    "least two of every class are needed in training"
                )

    def learn(self, settings: ClassificationSettings, training: Truth) -> Facts:
        """The names of the classes, in order, and how many people of each there are."""
        names = class_names(training.labels)
        counts = [len(np.unique(training.subjects[training.labels == name])) for name in names]
        return {"classes": cast(Any, names), "people": cast(Any, counts)}

    def targets(self, truth: Truth, facts: Facts) -> npt.NDArray[np.generic]:
        """The places of the classes (N,); -1 where unknown, or not among those of the training."""
        return indices_of(truth.labels, facts)

    def build(self, settings: ClassificationSettings, in_channels: int, facts: Facts) -> nn.Module:
        """The model of `settings`, on the CPU, with PyTorch's current random state."""
        encoder = build_encoder(settings.model, in_channels)
        if has_class_head(settings):
            return ClassModel(encoder, ClassHead(encoder.embedding_dim, len(names_of(facts))))
        head = build_projection_head(settings.model, encoder.embedding_dim)
        return ContrastiveModel(encoder, head, settings.model.readout)

    def objective(self, settings: ClassificationSettings, facts: Facts) -> nn.Module:
        """The loss of `settings`, with the weights of the classes."""
        loss = settings.objective.build(settings.training.rounds)
        if isinstance(loss, ClassLoss):
            loss.weigh(torch.tensor(cast(list[int], facts["people"])))
        return loss

    def step(
        self,
        model: nn.Module,
        objective: nn.Module,
        views_bvcxyz: torch.Tensor,
        targets_b: torch.Tensor,
        progress: float,
    ) -> Step:
        """The loss of one batch; `targets_b` are places of classes."""
        subjects, views = views_bvcxyz.shape[:2]
        output_bvk = model(views_bvcxyz.flatten(0, 1)).view(subjects, views, -1)
        return Step(objective(output_bvk, targets_b, progress))

    def observe(
        self, settings: ClassificationSettings, model: nn.Module, volumes_bcxyz: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The embedding (B, E), and of a class head the scores (B, K)."""
        if isinstance(model, ContrastiveModel):
            return {"embedding": model.embed(volumes_bcxyz)}
        network = cast(ClassModel, model)
        embedding_be = network.encoder(volumes_bcxyz)
        return {"embedding": embedding_be, "scores": network.head(embedding_be)}

    def judge(
        self, settings: ClassificationSettings, training: Observed, evaluation: Observed, judging: Judging
    ) -> Outcome:
        """Fit the probe, if there is one, on the training subjects only, and measure the evaluation subjects."""
        facts = self.learn(settings, training)
        known: dict[str, object] = {}
        scores = evaluation.outputs.get("scores")
        if scores is not None:
            fitted, probabilities = None, softmax(scores)
        else:
            probe = _fit(settings, training, facts, judging.penalty)
            fitted, probabilities = probe.to_json(), probe.probabilities(evaluation.embeddings)
            chooses = settings.evaluation.probe == "logistic" and settings.evaluation.reference is None
            if judging.folds is not None and chooses:
                classes = indices_of(training.labels, facts)
                count = len(names_of(facts))
                by_penalty = probabilities_by_penalty(
                    training.embeddings, classes, training.subjects, evaluation.embeddings
                )
                known = {
                    BY_PENALTY: by_penalty,
                    WITHOUT: errors_without_folds(
                        training,
                        evaluation,
                        judging.folds,
                        lambda one, other: _errors(one, other, facts),
                        2 * count,
                    ),
                }
        metrics = _measured(probabilities, evaluation, facts)
        shares = _shares(facts, len(evaluation.labels))
        metrics["floor_macro_auc"] = _measured(shares, evaluation, facts)["macro_auc"]
        metrics["site_balanced_accuracy"] = of_sites(training, evaluation, judging)
        return Outcome(metrics, _as_table(probabilities, evaluation.labels, facts), fitted, known)

    def judge_together(self, cells: Sequence[JudgedCell]) -> list[tuple[dict[str, float], pd.DataFrame]]:
        """The metrics of every cell, and its predictions, with a penalty that the cells of other folds choose."""
        made = []
        for cell, place in zip(cells, chosen_for_each(cells), strict=False):
            # All cells have all classes: a fold without one is refused.
            facts: Facts = {"classes": cast(Any, class_names(cell.truth.labels))}
            probabilities = by_penalty_of(cell)[place]
            metrics = _measured(probabilities, cell.truth, facts) | {"penalty": PENALTIES[place]}
            made.append((metrics, _as_table(probabilities, cell.truth.labels, facts)))
        return made

    def penalty_of(self, cells: Sequence[JudgedCell]) -> float | None:
        """The penalty of the probe that is best in all cells."""
        if not cells:
            return None
        return PENALTIES[best_place([_errors_by_penalty(by_penalty_of(cell), cell.truth) for cell in cells])]

    def floor(self, settings: ClassificationSettings, training: Truth, evaluation: Truth) -> Outcome:
        """The share of every class among the training people, for everyone."""
        facts = self.learn(settings, training)
        shares = _shares(facts, len(evaluation.labels))
        return Outcome(_measured(shares, evaluation, facts), _as_table(shares, evaluation.labels, facts))

    def predictions(
        self,
        settings: ClassificationSettings,
        outputs: Mapping[str, Floats],
        fitted: str | None,
        facts: Facts,
    ) -> pd.DataFrame:
        """The likeliest class, and the probability of every class."""
        if fitted is None:
            return _as_table(softmax(outputs["scores"]), None, facts)
        return _as_table(read_probe(fitted).probabilities(outputs["embedding"]), None, facts)

    def mean_of(self, tables: Sequence[pd.DataFrame], facts: Facts) -> pd.DataFrame:
        """Of the mean probabilities."""
        columns = [f"{PROBABILITY}{name}" for name in names_of(facts)]
        return _as_table(np.mean([table[columns].to_numpy(float) for table in tables], axis=0), None, facts)

    def check_fitted(self, fitted: str | None) -> None:
        """See `Task`."""
        if fitted is not None:
            read_probe(fitted)

    def read_truth(self, texts: Sequence[str], facts: Facts) -> Labels:
        """The names of classes.

        Raises:
            UserError: a class that the model does not know.
        """
        names = names_of(facts)
        for text in texts:
            if text not in names:
                raise UserError(f"--truth {text} is no class of this model; {did_you_mean(text, names)}")
        return np.array(texts, dtype=object)

    def present(
        self, predictions: pd.DataFrame, truth: Labels | None, calibration: str | None, facts: Facts
    ) -> Prediction:
        """The likeliest class, and how probable every class is."""
        table = predictions.copy()
        if truth is not None:
            table["truth"] = truth
        names = names_of(facts)
        shown = pd.DataFrame({"predicted class": table["predicted"].astype(str)})
        for name in names:
            shown[f"p({name})"] = [f"{value:.2f}" for value in table[f"{PROBABILITY}{name}"]]
        if truth is not None:
            shown["true class"] = [str(name) for name in truth]
        return Prediction(
            table,
            shown,
            "Probabilities are those of people like the ones of the cohort: where classes are rarer or more frequent, "
            "they do not hold.",
        )

    def measure(
        self, presented: pd.DataFrame, truth: Truth, internal: Mapping[str, float]
    ) -> dict[str, float | str]:
        """The metrics, and how many people of every class there are."""
        names = predicted_classes(presented)
        facts: Facts = {"classes": cast(Any, names)}
        other = sorted({str(name) for name in truth.labels} - set(names))
        if other:
            raise UserError(
                f"the cohort has the class {other[0]}, which this model was not trained on; it knows {', '.join(names)}"
            )
        probabilities = presented[[f"{PROBABILITY}{name}" for name in names]].to_numpy(float)
        found: dict[str, float | str] = dict(_measured(probabilities, truth, facts))
        for name in names:
            found[f"people of class {name}"] = str(len(np.unique(truth.subjects[truth.labels == name])))
        return found


def has_class_head(settings: ClassificationSettings) -> bool:
    """Whether the model predicts classes itself, without a probe."""
    return isinstance(settings.objective, CrossEntropy | Focal)


def class_names(labels: Labels) -> list[str]:
    """The classes among labels (N,), in order."""
    return sorted({str(name) for name in labels[is_known(labels)]})


def names_of(facts: Facts) -> list[str]:
    """The classes of a model, in the order of its scores."""
    return [str(name) for name in cast(list[str], facts["classes"])]


def indices_of(labels: Labels, facts: Facts) -> Indices:
    """The places (N,) of the classes; -1 where unknown."""
    places = {name: place for place, name in enumerate(names_of(facts))}
    return np.array([places.get(str(name), -1) for name in labels], dtype=np.int64)


def class_name(value: object) -> str | None:
    """A class as text; None if it is not known. A number without a fraction is written as one."""
    if value is None or value is pd.NA:
        return None
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return str(int(value)) if value.is_integer() else str(value)
    text = str(value).strip()
    return None if text.lower() in NO_NAME else text


def _fit(
    settings: ClassificationSettings, training: Observed, facts: Facts, penalty: float | None
) -> ClassProbe | NeighbourProbe:
    """The probe of the training scans."""
    classes, count = indices_of(training.labels, facts), len(names_of(facts))
    chosen = settings.evaluation
    if chosen.probe == "neighbours":
        embeddings = np.asarray(training.embeddings, dtype=np.float32)
        return NeighbourProbe(embeddings, classes, count, chosen.neighbours)
    if chosen.reference is None and penalty is not None:
        return fit_class_probe(training.embeddings, classes, training.subjects, penalty)
    fitted = fit_logistic_probe(
        training.embeddings, classes, training.subjects, reference=chosen.reference is not None
    )
    return fitted.as_class_probe()


def _errors(training: Observed, evaluation: Observed, facts: Facts) -> Floats:
    """The errors (P,) over the people of the evaluation with every penalty of a probe of the training scans."""
    classes, count = indices_of(training.labels, facts), len(names_of(facts))
    if len(np.unique(classes)) < count:
        # Without this fold a class has nobody left: no penalty is better than another one.
        return np.zeros(len(PENALTIES))
    by_penalty = probabilities_by_penalty(
        training.embeddings, classes, training.subjects, evaluation.embeddings
    )
    return _errors_by_penalty(by_penalty, evaluation)


def _errors_by_penalty(by_penalty: Floats, truth: Truth) -> Floats:
    """The mean log loss over people (P,) of probabilities (P, N, K)."""
    facts: Facts = {"classes": cast(Any, class_names(truth.labels))}
    classes = indices_of(truth.labels, facts)
    return np.array(
        [
            log_losses(*by_person(probabilities, classes, truth.subjects)).mean()
            for probabilities in by_penalty
        ]
    )


def _shares(facts: Facts, scans: int) -> npt.NDArray[np.float64]:
    people = np.array(cast(list[int], facts["people"]), dtype=np.float64)
    return np.tile(people / people.sum(), (scans, 1))


def _measured(probabilities: Floats, truth: Truth, facts: Facts) -> dict[str, float]:
    return classification_metrics(probabilities, indices_of(truth.labels, facts), truth.subjects)


def _as_table(probabilities: Floats, labels: Labels | None, facts: Facts) -> pd.DataFrame:
    """The columns predicted, error (if the truth is known) and one of probabilities for every class."""
    names = names_of(facts)
    table = pd.DataFrame({"predicted": np.array(names, dtype=object)[probabilities.argmax(axis=1)]})
    if labels is not None:
        table["error"] = log_losses(probabilities, indices_of(labels, facts))
    for place, name in enumerate(names):
        table[f"{PROBABILITY}{name}"] = probabilities[:, place]
    return table
