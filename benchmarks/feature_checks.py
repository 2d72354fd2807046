"""Checks of what a command has left: each says in words what is wrong if a feature is not there.

They read what a user would read: tables, settings, weights, images and pages. The strongest is `changed`: two runs
differ in one setting only, and their losses differ, too, so the setting acts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from safetensors.numpy import load_file

from core.config import flatten

LOGS = Path("logs")
MANIFEST = "manifest.parquet"
"""Of a cohort: a line for every scan."""


class NotShownError(Exception):
    """A feature is not shown; the message says why."""


class Check(NamedTuple):
    """A test of what a row has made, and other places that it looks at."""

    test: Callable[[Path], None]
    needs: tuple[str, ...] = ()


def holds(fact: Callable[[Path], object], *needs: str) -> Check:
    """A fact about what was made, which its docstring says in a sentence."""

    def test(made: Path) -> None:
        if not fact(made):
            raise NotShownError(f"it is not so that: {fact.__doc__}")

    return Check(test, needs)


def changed(other: str, *names: str) -> Check:
    """The run differs from `other` in these settings and no others, and in the losses of its epochs."""

    def test(run: Path) -> None:
        one, two = settings_of(run), settings_of(Path(other))
        different = {name for name in one.keys() | two.keys() if one.get(name) != two.get(name)}
        if same := [name for name in names if not any(_is_under(each, name) for each in different)]:
            raise NotShownError(f"{run} and {other} have the same {', '.join(same)}")
        if more := sorted(each for each in different if not any(_is_under(each, name) for name in names)):
            raise NotShownError(f"{run} and {other} also differ in {', '.join(more)}")
        if all(one == two for one, two in zip(losses_of(run), losses_of(Path(other)), strict=False)):
            raise NotShownError(f"{', '.join(names)} changes nothing: {run} and {other} have the same losses")

    return Check(test, (other,))


def same_losses(other: str, tolerance: float) -> Check:
    """The losses of all epochs are those of `other`, up to a relative difference."""

    def test(run: Path) -> None:
        if not np.allclose(losses_of(run), losses_of(Path(other)), rtol=tolerance):
            raise NotShownError(
                f"the losses are {losses_of(run)}, and those of {other} {losses_of(Path(other))}"
            )

    return Check(test, (other,))


def searched(*names: str, count: int, alike: int = 0) -> Check:
    """A search completed `count` configurations of these settings, and their losses differ.

    Args:
        names: the settings that were searched.
        count: how many configurations.
        alike: how many may have the loss of another one, because they mean the same.
    """

    def test(run: Path) -> None:
        trials = read(run / "trials.csv")
        done = trials[(trials["state"] == "COMPLETE") & np.isfinite(trials["value"])]
        if len(done) != count or len(done[list(names)].astype(str).drop_duplicates()) != count:
            raise NotShownError(f"{run} completed {len(done)} of {count} configurations")
        losses = read(run / "history.csv").groupby("number")["loss"].mean()
        # What is fitted without a network has no loss.
        values = done["value"] if losses.isna().all() else losses[done["number"]]
        if values.isna().any() or values.round(6).nunique() < count - alike:
            raise NotShownError(f"{', '.join(names)} makes no difference in {run}: {values.tolist()}")

    return Check(test)


def setting(name: str, value: object) -> Check:
    """A run has this setting."""

    def test(run: Path) -> None:
        found = settings_of(run)[name]
        if found != value:
            raise NotShownError(f"{run} has {name}={found}, not {value}")

    return Check(test)


def columns(table: str, *names: str) -> Check:
    """A table has these columns, with a finite number in every row."""

    def test(made: Path) -> None:
        found = read(made / table)
        for name in names:
            if name not in found or found.empty or not np.isfinite(found[name].to_numpy(float)).all():
                raise NotShownError(f"{made / table} has no finite numbers in a column {name}")

    return Check(test)


def values(table: str, expression: str, *expected: float, tolerance: float = 1e-3) -> Check:
    """An expression of the columns of a table is so much in every row; or, of several numbers, row by row.

    Args:
        table: below what was made.
        expression: as pandas understands it, such as `mae - median_mae`.
        expected: one number for all rows, or one for each.
        tolerance: by how much a number may be off.
    """

    def test(made: Path) -> None:
        found = np.array(read(made / table).eval(expression), dtype=np.float64)
        if not np.allclose(found, expected if len(expected) > 1 else expected[0], rtol=0, atol=tolerance):
            raise NotShownError(f"{expression} in {made / table} is {found.tolist()}, not {expected}")

    return Check(test)


def falls(column: str) -> Check:
    """A column of the history falls, and never rises."""

    def test(run: Path) -> None:
        found = read(run / "history.csv")[column]
        if not found.is_monotonic_decreasing or found.nunique() < 2:
            raise NotShownError(f"{column} of {run} does not fall: {found.tolist()}")

    return Check(test)


def only(loss: str) -> Check:
    """Of the losses that a pre-training can have this one was computed, and none of the others."""

    def test(run: Path) -> None:
        found = read(run / "history.csv")[["rotation", "contrast", "inpainting", "symmetry", "masked"]]
        on = [str(name) for name in found if found[name].notna().any()]
        if on != [loss] or not np.isfinite(found[loss]).all():
            raise NotShownError(f"{run} computed {', '.join(on) or 'none'} of the losses, not {loss} alone")

    return Check(test)


def weight(pattern: str, *shape: int) -> Check:
    """The best model has a weight whose name matches `pattern`, and whose shape ends with `shape`."""

    def test(run: Path) -> None:
        found = [each.shape for name, each in weights_of(run / "best").items() if re.search(pattern, name)]
        if not any(each[len(each) - len(shape) :] == shape for each in found):
            raise NotShownError(f"{run} has no weight {pattern} whose shape ends with {shape}, but {found}")

    return Check(test)


def no_weight(pattern: str) -> Check:
    """The best model has no weight whose name matches `pattern`."""

    def test(run: Path) -> None:
        if found := [name for name in weights_of(run / "best") if re.search(pattern, name)]:
            raise NotShownError(f"{run} has the weights {', '.join(found)}")

    return Check(test)


def says(text: str) -> Check:
    """The command has printed this."""

    def test(made: Path) -> None:
        if text not in " ".join(log_of(made).read_text().split()):
            raise NotShownError(f"it did not print {text!r}, see {log_of(made)}")

    return Check(test)


def page(file: str, *texts: str) -> Check:
    """A page in what was made, or the page that was made, contains these texts."""

    def test(made: Path) -> None:
        content = (made / file).read_text()
        if absent := [text for text in texts if text not in content]:
            raise NotShownError(f"{made / file} does not contain {', '.join(absent)}")

    return Check(test)


def exists(pattern: str) -> Check:
    """There is a file of this name in what was made."""

    def test(made: Path) -> None:
        if not any(made.glob(pattern)):
            raise NotShownError(f"{made} has no {pattern}")

    return Check(test)


def read(path: Path) -> pd.DataFrame:
    """A table; a name may have a * in it."""
    found = next(path.parent.glob(path.name), path)
    if found.suffix == ".json":
        return pd.DataFrame(json.loads(found.read_text()))
    return pd.read_parquet(found) if found.suffix == ".parquet" else pd.read_csv(found)


def settings_of(run: Path) -> Mapping[str, object]:
    """The settings of a run by dotted name."""
    return flatten(json.loads((run / "run.json").read_text())["settings"])


def losses_of(run: Path) -> list[float]:
    """The loss of every epoch of one training."""
    return [float(loss) for loss in read(run / "history.csv")["loss"]]


def weights_of(model: Path) -> Mapping[str, npt.NDArray[Any]]:
    """The weights in the folder of a model, by name."""
    return load_file(model / "model.safetensors")


def log_of(made: Path) -> Path:
    """What the command that made it has printed."""
    return LOGS / f"{'-'.join(made.parts)}.txt"


def _is_under(name: str, given: str) -> bool:
    return name == given or name.startswith(f"{given}.")
