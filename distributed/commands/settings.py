"""`settings`: what can be set, what it means, and what searches it; in the terminal, and as the page of the manual."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import optuna

from core.config import known_names, task_of
from core.errors import UserError
from core.settings_list import Setting, list_settings, similar_settings
from core.tasks import TASKS
from distributed.run.quiet import quiet
from search_spaces import SPACES, published
from search_spaces.points import propose

DRAWS = 64
"""Random points of a space that show what it searches."""


def settings_about(word: str, task: str | None = None) -> list[Setting]:
    """The settings whose name or meaning has a word in it; all if it is empty.

    Raises:
        UserError: there is none; the message says which are similar.
    """
    found = [
        setting
        for setting in list_settings()
        if word.lower() in f"{setting.name} {setting.meaning}".lower()
        and (task is None or task in setting.tasks)
    ]
    if found:
        return found
    similar = similar_settings(word, known_names(task))
    named = [
        setting for setting in list_settings() if setting.name in similar and task in (None, *setting.tasks)
    ]
    if named:
        return named
    raise UserError(f"no setting has '{word}' in its name or meaning; `brainsweep settings` lists all")


def searched_by() -> dict[str, tuple[str, ...]]:
    """The spaces that search a setting, by its name."""
    found: dict[str, tuple[str, ...]] = {}
    quiet()
    for name, space in SPACES.items():
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        points = [study.ask() for _ in range(DRAWS)]
        for point in points:
            propose(space, point)
        for setting in dict.fromkeys(setting for point in points for setting in point.params):
            found[setting] = (*found.get(setting, ()), name)
    return found


def _spaces_of(setting: Setting, spaces: Mapping[str, Sequence[str]]) -> str:
    """The spaces that search a setting, among those of its tasks."""
    return ", ".join(
        name for name in spaces.get(setting.name, ()) if task_of(published(name)) in setting.tasks
    )


def in_words(settings: Iterable[Setting]) -> Iterator[str]:
    """Each setting in a few lines."""
    spaces = searched_by()
    for setting in settings:
        yield f"{setting.name} = {setting.default}    ({setting.values})"
        yield f"    {setting.meaning}"
        if beside := _beside(setting, spaces):
            yield f"    {beside}"


def _beside(setting: Setting, spaces: Mapping[str, Sequence[str]]) -> str:
    """With which choices and tasks a setting exists, and which spaces search it; empty if there is nothing to say."""
    parts = [f"of {', '.join(setting.choices)}"] if setting.choices else []
    if len(setting.tasks) < len(TASKS):
        parts.append(f"{'task' if len(setting.tasks) == 1 else 'tasks'} {', '.join(setting.tasks)}")
    if searching := _spaces_of(setting, spaces):
        parts.append(f"searched by {searching}")
    return "; ".join(parts)


def as_page() -> str:
    """The page of the manual."""
    spaces = searched_by()
    lines = [
        "# Settings", "",
        "Every setting has a name for `--set NAME=VALUE`, for a space and for a file of settings. What stands here",
        "is the default of the code; the published configuration of a space, in `search_spaces/`, may say otherwise.",
        "The settings of a first stage have `pretraining.` before them. A *schedule* is a number that changes with the",
        "progress of the training: `--set objective.temperature.shape=linear --set objective.temperature.start=0.5`.",
        "This page is made from the code by `python docs/make_settings.py`; `brainsweep settings WORD` says the same.",
    ]  # fmt: skip
    block = ""
    for setting in list_settings():
        if setting.name.split(".")[0] != block:
            block = setting.name.split(".")[0]
            lines += ["", f"## {block}", "", "| name | default | values | meaning |", "|---|---|---|---|"]
        beside = _beside(setting, spaces)
        cells = [
            f"`{setting.name}`", setting.default, setting.values,
            setting.meaning + (f" *({beside})*" if beside else ""),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
