"""The manual: its links lead somewhere, its commands exist, its examples run, and the README is short."""

import re
import shlex
import unicodedata
from pathlib import Path

import pytest
import typer.main
import yaml
from small_cohort import SMALL, write_small_cohort

from distributed.commands.app import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
pytestmark = pytest.mark.skipif(not (ROOT / "docs").exists(), reason="the manual is not installed")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
COMMANDS = typer.main.get_command(app).commands


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """As mkdocs and GitHub make them of headings."""
    found = set()
    for heading in re.findall(
        r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE
    ):
        plain = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode().lower()
        found.add(re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip()))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_what_is_there(page):
    for link in LINK.findall(without_code(page.read_text())):
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def commands_in(page: Path) -> list[list[str]]:
    """The words of every `brainsweep …` in blocks of shell commands, without comments."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
        # Variables of the shell stand for more options.
        whole = re.sub(r'^\w+="[^"]*"|\$\w+|…', "", block.replace("\\\n", " "), flags=re.MULTILINE)
        for line in whole.splitlines():
            words = shlex.split(line, comments=True)
            if "brainsweep" in words[:1]:
                found.append(words[1:])
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_exist(page):
    for name, *words in commands_in(page):
        if name.startswith("--"):
            continue
        assert name in COMMANDS, name
        known = {option for each in COMMANDS[name].params for option in each.opts + each.secondary_opts}
        for word in words:
            option = word.partition("=")[0]
            assert not word.startswith("--") or option in known | {"--help"}, f"{name} {word}"


def test_the_examples_in_python_run(tmp_path, monkeypatch, brainsweep, capsys):
    monkeypatch.chdir(tmp_path)
    write_small_cohort(tmp_path / "cohorts" / "phantom", subjects=20)
    small = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
    code, _, err = brainsweep("train", "cohorts/phantom", "--folds", 2, *small, "--out", "runs/phantom")
    assert code == 0, err
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)
    assert len(blocks) == 5
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)
    said = capsys.readouterr().out
    assert "anchors_used" in said
    assert "(2, 128)" in said or "torch.Size([2, 128])" in said
    assert names["views"].shape[:2] == (3, 2)


def test_the_readme_is_short_and_the_manual_whole():
    assert len((ROOT / "README.md").read_text().split()) <= 900
    text = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r"[\w]+\.md", yaml.safe_dump(yaml.safe_load(text)["nav"])))
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")}
