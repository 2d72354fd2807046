"""Whether `resume` may execute the Python file that run.json names: not if somebody else could have chosen it."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from rich.console import Console

from core.errors import UserError
from core.run_description import SpaceFile
from core.run_names import RUN_JSON
from distributed.run.folder import RunFolder
from distributed.run.working_copy import address_of, run_as_typed
from search_spaces import file_of

TRUST = "--trust-space"


def describe_space(space: str) -> SpaceFile | None:
    """The file of a space as it is now; None if the space has none, or the file is gone."""
    path = file_of(space)
    if path is None or not path.is_file():
        return None
    content = path.read_bytes()
    return SpaceFile(
        path=str(path.resolve()), sha256=hashlib.sha256(content).hexdigest(), owner=path.stat().st_uid
    )


def check_trusted(folder: RunFolder, space: str, console: Console, *, is_trusted: bool) -> None:
    """Say that the file of the recorded `space` is executed, and keep what it is now.

    Raises:
        UserError: the file has changed, or somebody else could have written or named it, and it is not trusted.
    """
    now, known = describe_space(space), folder.about.space_file
    if now is None:
        return
    doubt = _doubt(folder, now, known)
    if doubt and not is_trusted:
        raise UserError(
            f"resume would execute {now.path}, and {doubt}: read it, and give {TRUST} if it is what you mean"
        )
    state = "trusted by you" if doubt else "of which no checksum was kept" if known is None else "unchanged"
    console.print(f"note: executing {now.path}, {state}", highlight=False, soft_wrap=True, markup=False)
    if now != known:
        folder.update(space_file=now)


def _doubt(folder: RunFolder, now: SpaceFile, known: SpaceFile | None) -> str:
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
