"""How every page is made: from the templates beside this file, and written in one step."""

from __future__ import annotations

from pathlib import Path

import jinja2

from core.errors import UserError
from core.files.writing import write_text


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
    """Write a page in one step and return its path; UserError, which calls it `what`, where this is impossible."""
    try:
        write_text(path, text)
    except OSError as error:
        raise UserError(f"cannot write the {what} to '{path}': {error.strerror}") from None
    return path
