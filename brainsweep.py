"""The command `brainsweep`: checks that the three packages are its own before it imports one of them.

`core`, `distributed` and `search_spaces` are names that others use, too: a `core.py` of the user, or Dask's
`distributed`, whose files pip writes over those of brainsweep without a word.
"""

import importlib.util
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
"""Where the three packages lie: the top of a checkout, or the site-packages of an environment."""
PACKAGES = ("core", "distributed", "search_spaces")
MARK = "This is a package of brainsweep."
"""What the docstring of each of them says."""
REMEDY = "install brainsweep into an environment of its own (pipx, uv tool)"


def main() -> None:
    """Run the command line; where a package is not brainsweep's own, say so in one line and exit with code 2."""
    problem = find_intruder()
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    from distributed.commands.app import main as run_command

    run_command()


def find_intruder() -> str | None:
    """What is wrong with the first of the packages that would not be brainsweep's own; None if all are.

    Nothing is imported for it: a package of somebody else might do anything.
    """
    for name in PACKAGES:
        ours = FOLDER / name / "__init__.py"
        spec = importlib.util.find_spec(name)
        if not ours.exists():
            return f"{ours} is missing, it may have been removed with another package; {REMEDY}"
        if MARK not in ours.read_text(errors="replace"):
            return f"{ours} belongs to another package, which was installed over brainsweep; {REMEDY}"
        found = spec and spec.origin and Path(spec.origin).resolve()
        if found != ours:
            return (
                f"{found} would be imported instead of {ours}; rename it, take its folder out of PYTHONPATH "
                f"(`python -m` adds the current folder, `brainsweep` does not), or {REMEDY}"
            )
    return None


if __name__ == "__main__":
    main()
