"""Whether the Python files that run.json names may be executed: not if somebody else could have chosen them.

They are the file of a space, which `resume` executes, and that of a task, which `predict` and `evaluate` execute, too.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from rich.console import Console

from core.config import task_of
from core.errors import UserError
from core.run_description import CodeFile
from core.run_names import RUN_JSON
from distributed.run.code import describe_code
from distributed.run.folder import RunFolder
from distributed.run.working_copy import address_of, run_as_typed

TRUST = "--trust-space"


def check_trusted(
    folder: RunFolder, space: str | None, console: Console, *, is_trusted: bool, does: str = "resume"
) -> None:
    """Say that the files of the recorded `space` and task are executed, and keep what they are now.

    Args:
        folder: of the run.
        space: its name; None if it is not executed, or the user has just typed it.
        console: where to say so.
        is_trusted: whether the user has read them.
        does: the command that would execute them.

    Raises:
        UserError: a file has changed, or somebody else could have written or named it, and it is not trusted.
    """
    about = folder.about
    if space is not None:
        _check(folder, describe_code(space), about.space_file, "space_file", console, is_trusted, does)
    task = describe_code(task_of(about.settings))
    _check(folder, task, about.task_file, "task_file", console, is_trusted, does)


def _check(
    folder: RunFolder, now: CodeFile | None, known: CodeFile | None, field: str, console: Console,
    is_trusted: bool, does: str,
) -> None:  # fmt: skip
    if now is None:
        return
    doubt = _doubt(folder, now, known)
    if doubt and not is_trusted:
        raise UserError(
            f"{does} would execute {now.path}, and {doubt}: read it, and give {TRUST} if it is what you mean"
        )
    state = "trusted by you" if doubt else "of which no checksum was kept" if known is None else "unchanged"
    console.print(f"note: executing {now.path}, {state}", highlight=False, soft_wrap=True, markup=False)
    if now != known:
        folder.update(**{field: now})


def _doubt(folder: RunFolder, now: CodeFile, known: CodeFile | None) -> str:
    """Why the file may not be what the user began the run with; empty if nothing speaks for that."""
    if known is not None and now.sha256 != known.sha256:
        return "it has changed since the run began"
    if known is not None and now.owner != known.owner:
        return f"it belonged to user {known.owner} when the run began, and now to user {now.owner}"
    if not _is_ours(Path(now.path)):
        return f"it belongs to user {now.owner}"
    if address_of(folder.path):
        return f"everyone who can write to {run_as_typed(folder.path)} could have named it"
    if not _is_ours(folder.path / RUN_JSON):
        return f"{folder.path / RUN_JSON}, which names it, belongs to another user"
    open_to_all = [
        path for path in (Path(now.path), folder.path / RUN_JSON) if path.stat().st_mode & stat.S_IWOTH
    ]
    return f"every user of this machine may write {open_to_all[0]}" if open_to_all else ""


def _is_ours(path: Path) -> bool:
    """Whether a file belongs to this user, or to the administrator."""
    return path.stat().st_uid in (0, os.getuid())
