"""One command for each of the 75 features that the four reference systems have, and a check of what it leaves.

    python -m benchmarks.features OUT [--only TEXT]

Every row of `benchmarks.feature_rows` is a command as a user types it. It runs in OUT, on synthetic brains of 8 mm; its
line ends with `ok`, or with what is missing, and what commands print is in OUT/logs. Repeat the command after a stop: a
row is not run again if what it made is there and passes its checks. All of it takes about half an hour of 2 cores.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.feature_checks import NotShownError, log_of
from benchmarks.feature_rows import ROWS, Row
from benchmarks.feature_sources import PREPARED, Prepared, write_text

Runner = Callable[[str, Path], None]
"""Runs a command, and writes what it prints into a file; raises NotShownError if it fails."""


def main() -> None:
    """Show all rows, or those with a text."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder of the campaign")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="rows whose feature or command has this text"
    )
    options = parser.parse_args()
    # In OUT the commands still are those of this checkout.
    checkout = str(Path(__file__).parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [checkout, os.environ.get("PYTHONPATH")]))
    options.out.mkdir(parents=True, exist_ok=True)
    os.chdir(options.out)
    sys.exit(campaign(ROWS, brainsweep, options.only))


def campaign(rows: Sequence[Row], run: Runner, only: str = "") -> int:
    """Show the rows that have a text in the folder of the process; the exit code is 1 if one of them fails."""
    chosen = [row for row in rows if only in row.feature or only in row.command]
    failed = []
    for row in chosen:
        wrong = show(row, rows, run)
        print(
            f"{row.system:<3} {rows.index(row) + 1:2}/{len(rows)}  {row.feature}  {wrong or 'ok'}", flush=True
        )
        if row.lacks:
            print(f"           {row.lacks}")
        if wrong:
            failed.append(row.feature)
    print(f"{len(chosen) - len(failed)} of {len(chosen)}")
    for feature in failed:
        print(f"    not shown: {feature}")
    return 1 if failed else 0


def show(row: Row, rows: Sequence[Row], run: Runner) -> str:
    """Run the command of a row, unless what it makes is there and passes; says what is wrong, or nothing."""
    if row.made.exists() and not fault_of(row, rows, run):
        return ""
    remove(row.made)
    try:
        for place in [*row.needs, *places_in(row.command, without=row.made)]:
            provide(place, rows, run)
        row.made.parent.mkdir(parents=True, exist_ok=True)
        run(row.command, log_of(row.made))
    except NotShownError as error:
        return f"FAILED: {error}"
    return fault_of(row, rows, run)


def fault_of(row: Row, rows: Sequence[Row], run: Runner) -> str:
    """What is wrong with what a row has made; empty if nothing is."""
    try:
        for check in row.checks:
            for place in check.needs:
                provide(place, rows, run)
            check.test(row.made)
    except NotShownError as error:
        return f"FAILED: {error}"
    # Whatever is missing or damaged, the other rows are shown.
    except Exception as error:
        return f"FAILED: {type(error).__name__}: {error}"
    return ""


def provide(place: str, rows: Sequence[Row], run: Runner) -> None:
    """Make what is at a place, if it is not there: what is prepared for the rows, or made by another row.

    Raises:
        NotShownError: it could not be made.
    """
    for name, prepared in PREPARED.items():
        # What was stopped on the way has no log.
        if is_in(place, name) and not (Path(name).exists() and log_of(Path(name)).exists()):
            prepare(Path(name), prepared, rows, run)
    for row in rows:
        if is_in(place, str(row.made)) and not row.made.exists():
            wrong = show(row, rows, run)
            if wrong:
                raise NotShownError(f"{place}, which it needs, was not made: {wrong}")


def prepare(place: Path, prepared: Prepared, rows: Sequence[Row], run: Runner) -> None:
    """Make what is prepared for the rows, and what it needs.

    Raises:
        NotShownError: it could not be made.
    """
    remove(place)
    for each in prepared.needs:
        provide(each, rows, run)
    try:
        if isinstance(prepared.make, str):
            for each in places_in(prepared.make, without=place):
                provide(each, rows, run)
            run(prepared.make, log_of(place))
        else:
            prepared.make(place)
            write_text(log_of(place), "")
    except NotShownError:
        remove(place)
        raise


def places_in(command: str, *, without: Path) -> list[str]:
    """The words of a command, and the values in its changes, that may be places; not that of what it makes."""
    words = shlex.split(command.replace("=", " "))
    return [word for word in words if not is_in(word, str(without))]


def is_in(place: str, name: str) -> bool:
    """Whether a place is what has this name, or lies in it."""
    return place == name or place.startswith(f"{name}/")


def remove(place: Path) -> None:
    """A file or a folder, if it is there."""
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


def brainsweep(command: str, log: Path) -> None:
    """Run a command as a user types it.

    Raises:
        NotShownError: it ended with an error.
    """
    print("$ brainsweep", command, flush=True)
    words = [sys.executable, "-m", "distributed", *shlex.split(command)]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    said = ended.stdout + ended.stderr
    write_text(log, said)
    if ended.returncode:
        raise NotShownError((said.strip() or f"exit code {ended.returncode}").splitlines()[-1])


if __name__ == "__main__":
    main()
