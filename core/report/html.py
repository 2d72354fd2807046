"""What every page of ours is made with: templates beside this file, and a write that leaves no half page."""

from __future__ import annotations

import os
from pathlib import Path

import jinja2

from core.errors import UserError


def load_page(name: str) -> jinja2.Template:
    """A template of this folder; values are escaped, and a missing one is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def write_page(text: str, path: Path, what: str) -> Path:
    """Write a page in one step and return its path; UserError, naming `what` it is, if that is impossible."""
    unfinished = path.with_name(path.name + ".part")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    except OSError as error:
        raise UserError(f"cannot write the {what} to '{path}': {error.strerror}") from None
    return path
