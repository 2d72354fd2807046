"""The objective family.

loss = build("exponential", temperature=0.1, kernel="rbf", width=2.0)
value = loss(embeddings, labels, progress)  # (B, V, D), (B,), [0, 1] -> scalar
loss.diagnostics                            # anchors used and dropped, neighbours, temperature
"""

from __future__ import annotations

from pydantic import ValidationError
from torch import nn

from core.errors import UserError
from core.lookup import did_you_mean, look_up
from core.losses.members import LossSettings
from core.losses.settings import LOSSES, REGRESSION_LOSSES, TASK_LOSSES, ObjectiveSettings

__all__ = ["LOSSES", "REGRESSION_LOSSES", "TASK_LOSSES", "ObjectiveSettings", "build"]


def build(name: str, epochs: int | None = None, **settings: object) -> nn.Module:
    """The loss `name`; those in LOSSES are called as loss(embeddings (B, V, D), labels (B,), progress).

    Settings are plain values, as in a configuration; None means not given. `epochs` is the length of the
    run, for schedules that count epochs and do not say how many. Raises UserError for an unknown name, a
    setting that cannot act on this loss, or a value out of range.
    """
    model = look_up(LOSSES | REGRESSION_LOSSES | TASK_LOSSES, name, "loss")
    given = {key: value for key, value in settings.items() if value is not None}
    try:
        return model.model_validate({"name": name} | given).build(epochs)
    except ValidationError as error:
        raise UserError(_one_line(name, model, error)) from None


def _one_line(name: str, model: type[LossSettings], error: ValidationError) -> str:
    problem = error.errors()[0]
    field = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = [key for key in model.model_fields if key != "name"]
        return f"{name}: '{field}' cannot act on this loss; {did_you_mean(field, known)}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{name}: {field}: {message}, got {problem['input']!r}" if field else f"{name}: {message}"
