"""The pages say what is there: their links, and the commands that they show."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from lpd_export.cli.main import commands

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("models/*/*.md")])


def blocks(page: Path) -> str:
    """All that stands in fences, lines that go on joined."""
    fenced = re.findall(r"^```\w*\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)
    return "\n".join(fenced).replace("\\\n", " ")


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text("utf-8")):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), f"{named(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_are_understood(page: Path) -> None:
    for line in blocks(page).splitlines():
        if not line.startswith("lpd-export "):
            continue
        typed = shlex.split(line, comments=True)[1:]
        command: click.Command = commands
        context = click.Context(commands)
        while isinstance(command, click.Group) and typed and not typed[0].startswith("-"):
            found = command.get_command(context, typed.pop(0))
            assert found is not None, line
            command = found
        known = {name for parameter in command.params for name in parameter.opts}
        known |= set(command.get_help_option_names(context)) | {"--help", "--version"}
        for word in typed:
            if re.fullmatch(r"--?[a-z][a-z-]*", word):
                assert word in known, f"{named(page)}: {line}"


def test_the_readme_is_one_screen() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert text.splitlines()[2:5] == [
        "```",
        "make demo    # environment, bundle, images: look at images/demo/contact_sheet.png",
        "make test    # every test",
    ]
    assert len(text.splitlines()) <= 80
    for page in (ROOT / "docs").glob("*.md"):
        if page.name not in ("index.md", "commands.md", "api.md"):  # the last two need the site
            assert f"(docs/{page.name}" in text, f"the README does not lead to {page.name}"
