"""Which code runs: the version of brainsweep, and the Python files of a user's own space or task."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

from core.files.python import file_of
from core.run_description import CodeFile, CodeVersion

FOLDER = Path(__file__).resolve().parents[2]
"""Where the packages lie: the top of a checkout, or the site-packages of an environment."""


def code_version() -> CodeVersion:
    """The commit and the sources of this brainsweep.

    An environment may lie inside the repository of another project, whose commit says nothing about this code. So a
    commit is recorded only if the packages lie at the top of a git checkout that tracks them.

    Ray does not upload .git: inside a submitted job only `sources` tells two versions apart.
    """
    digest = hashlib.sha256()
    for package in ("core", "distributed", "search_spaces"):
        for path in sorted((FOLDER / package).rglob("*.py")):
            digest.update(path.relative_to(FOLDER).as_posix().encode() + path.read_bytes())
    ours = _is_our_checkout()
    return CodeVersion(
        commit=_git("rev-parse", "--short=12", "HEAD") if ours else "",
        dirty=ours and bool(_git("status", "--porcelain", "-uno")),
        sources=digest.hexdigest()[:12],
    )


def _is_our_checkout() -> bool:
    top = _git("rev-parse", "--show-toplevel")
    return bool(top) and Path(top).resolve() == FOLDER and bool(_git("ls-files", "distributed/__init__.py"))


def _git(*arguments: str) -> str:
    """What git prints about `FOLDER`; empty where it fails or is not installed."""
    try:
        done = subprocess.run(["git", *arguments], cwd=FOLDER, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def describe_code(name: str) -> CodeFile | None:
    """The file of a space or of a task as it is now; None if it is one of ours, or the file is gone."""
    path = file_of(name)
    if path is None or not path.is_file():
        return None
    content = path.read_bytes()
    return CodeFile(
        path=str(path.resolve()), sha256=hashlib.sha256(content).hexdigest(), owner=path.stat().st_uid
    )
