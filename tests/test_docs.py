"""The pages say what is there: their links, and the commands that they show."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest

from lpd_export.cli import exit_codes
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
        known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
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
        if page.name not in ("index.md", "commands.md", "api.md", "formats.md"):  # need the site
            assert f"(docs/{page.name}" in text, f"the README does not lead to {page.name}"


def test_exit_codes_are_told() -> None:
    page = (ROOT / "docs" / "exit-codes.md").read_text("utf-8")
    told = {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.M)}
    assert told == {0} | {
        value for name, value in vars(exit_codes).items() if name.startswith("EXIT_")
    }


def test_messages_of_troubleshooting_are_the_code_s() -> None:
    """Each quotation holds a long stretch of text that the code has as it stands there."""
    stretches = set()
    for folder in ("lpd_export", "reference"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    text = " ".join(node.value.split())
                    if len(text) >= 15:
                        stretches.add(text)
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    quotations = re.findall(r"(?:^> .*\n)+", page, re.M)
    assert len(quotations) > 10
    for quotation in quotations:
        said = " ".join(quotation.replace("> ", "").split())
        assert any(text in said for text in stretches), f"no message says: {said}"


def test_the_way_through_the_house_is_there() -> None:
    """CONTRIBUTING.md names files, and what is in them: `room/file.py: name`."""
    page = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    places = re.findall(r"`([\w/]+/[\w]+\.py)(?::\s+(\w+))?`", page)
    assert len(places) > 20
    for file, name in places:
        found = [path for path in (ROOT / file, ROOT / "lpd_export" / file) if path.is_file()]
        assert found, f"CONTRIBUTING.md names {file}, which is not there"
        if name:
            assert re.search(rf"\b{name}\b", found[0].read_text("utf-8")), f"{file} has no {name}"
    for room in (ROOT / "lpd_export").glob("*/__init__.py"):
        assert f"\n  {room.parent.name}/ " in page, f"CONTRIBUTING.md does not show {room.parent}"


def test_the_version_is_told_once_for_all() -> None:
    """What one cites and what the changelog describes is the package's version."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        version = tomllib.load(file)["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\n## {version}\n" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_modules_named_in_the_code_are_there() -> None:
    """A docstring that leads to a module leads to one that exists: `training.loop.Task`."""
    roots = {"lpd_export": ROOT, "training": ROOT, "lpd_reference": ROOT / "reference"}
    for folder in ("lpd_export", "reference", "training", "scripts"):
        for path in (ROOT / folder).rglob("*.py"):
            for named in re.findall(
                r"`((?:lpd_export|training|lpd_reference|reference)\.[\w.]+)`",
                path.read_text("utf-8"),
            ):
                package, *rest = named.split(".")
                assert package in roots, f"{path} names {named}: the package is lpd_reference"
                home = roots[package] / package / rest[0]
                found = home.is_dir() or home.with_suffix(".py").is_file()
                init = (roots[package] / package / "__init__.py").read_text("utf-8")
                assert found or rest[0] in init, f"{path} names {named}, which is not there"
