"""The recipes of engines/: each says what was published, and is found by path and by name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from lpd_export.build import recipes
from lpd_export.build.published import PUBLISHED, TOKENIZER, PublishedSettings, published_settings
from lpd_export.build.recipes import find_recipe, named_recipe, recipe_names
from lpd_export.build.request import BuildRequest, read_recipe
from lpd_export.errors import UserError

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "engines"


def expected_name(row: PublishedSettings, precision: str) -> str:
    """MODEL-RES, then what differs from its first row and from fp16."""
    first = published_settings(row.model, row.resolution)
    steps = "" if row == first else f"-steps{row.steps}"
    return f"{row.model}-{row.resolution}{steps}" + ("" if precision == "fp16" else f"-{precision}")


ROWS = {expected_name(row, p): (row, p) for row in PUBLISHED for p in ("fp16", "int8")}


def test_there_is_a_recipe_for_every_published_row() -> None:
    assert len(ROWS) == 14
    assert recipe_names() == sorted([*ROWS, "demo"])
    assert {"lpd-l-256", "lpd-l-256-steps32-int8", "lpd-xl-512", "lpd-xxl-256"} <= set(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_a_recipe_says_what_was_published(name: str) -> None:
    row, precision = ROWS[name]
    path = FOLDER / f"{name}.toml"
    request = BuildRequest(**read_recipe(path))
    assert request == BuildRequest(
        model=row.model,
        res=row.resolution,
        steps=row.steps,
        cfg=row.cfg,
        repulsion=row.repulsion,
        precision=precision,
        backend="tensorrt",
        checkpoint=row.checkpoint,
        tokenizer=TOKENIZER,
        out=str(FOLDER / name),
    )
    comment, *rest = path.read_text(encoding="utf-8").splitlines()
    assert comment.startswith(f"# {row.model} at {row.resolution} px in {row.steps} steps")
    assert comment.endswith(f"in {precision}.")
    assert not any("#" in line for line in rest)


def test_no_setting_is_left_to_the_defaults() -> None:
    keys = {"model", "res", "steps", "cfg", "repulsion", "precision", "backend"}
    for name in ROWS:
        said = tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
        assert said.keys() == keys | {"checkpoint", "tokenizer"}


# ------------------------------------------------------------------------------------- finding


@pytest.mark.parametrize("name", [*ROWS, "demo"])
def test_recipes_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe(name) == FOLDER / f"{name}.toml"
    settings = named_recipe(name)
    assert settings["out"] == f"engines/{name}"
    assert settings == read_recipe(FOLDER / f"{name}.toml") | {"out": f"engines/{name}"}


def test_a_file_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("lpd-xl-512", "mine.toml", "mine"):
        (tmp_path / name).write_text("steps = 3")
        assert find_recipe(name) == Path(name)
        assert named_recipe(name) == {"steps": 3, "out": name.removesuffix(".toml")}
    absolute = tmp_path / "mine.toml"
    assert named_recipe(str(absolute))["out"] == str(tmp_path / "mine")


def test_a_bundle_does_not_hide_its_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lpd-xl-512").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_recipe("lpd-xl-512") == FOLDER / "lpd-xl-512.toml"
    assert named_recipe("lpd-xl-512")["out"] == "engines/lpd-xl-512"


def test_what_is_there_but_no_file_is_left_to_the_reader(tmp_path: Path) -> None:
    assert find_recipe(str(tmp_path)) == tmp_path
    with pytest.raises(UserError, match=f"^cannot read the recipe {tmp_path}: Is a directory$"):
        named_recipe(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("lpd-xl-521", "lpd-xl-512"),
        ("LPD-XL-512", "lpd-xl-512"),
        ("lpd-xl-512.toml", "lpd-xl-512"),
        ("engines/lpd-xl-512.toml", "lpd-xl-512"),
        ("lpd-l-256-fp16", "lpd-l-256"),
        ("lpd-xl-256-int-8", "lpd-xl-256-int8"),
        ("lpd_l_512", "lpd-l-512"),
        ("dmeo", "demo"),
    ],
)
def test_near_misses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, meant: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        find_recipe(text)
    said = str(caught.value)
    assert said.startswith(f"there is no recipe {text} (did you mean ")
    assert meant in said.split("?")[0]
    assert f"one of the names {', '.join(recipe_names())}" in said


@pytest.mark.parametrize("text", ["resnet", "", "a" * 300, "a\0b", "/"])
def test_words_that_are_nothing_like_a_recipe(text: str) -> None:
    with pytest.raises(UserError) as caught:
        named_recipe(text)
    assert "did you mean" not in str(caught.value)


# ------------------------------------------------------------------------ an installed package


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package folder as a wheel lays it out, which the recipes are now taken from."""
    package = tmp_path / "site-packages" / "lpd_export"
    (package / "engines").mkdir(parents=True)
    for path in FOLDER.glob("*.toml"):
        (package / "engines" / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(recipes, "__file__", str(package / "recipes.py"))
    monkeypatch.chdir(tmp_path)
    return package


def test_recipes_of_an_installed_package(installed: Path) -> None:
    assert recipe_names() == sorted([*ROWS, "demo"])
    assert find_recipe("lpd-l-512") == installed / "engines" / "lpd-l-512.toml"
    assert named_recipe("lpd-l-512")["out"] == "engines/lpd-l-512"


def test_the_demo_needs_the_repository(installed: Path) -> None:
    with pytest.raises(UserError) as caught:
        named_recipe("demo")
    assert str(caught.value) == (
        "the recipe demo needs lpd.safetensors, which is in lpd-export's repository and not in the "
        "installed package: build engines/demo.toml in a clone of it"
    )


def test_a_wheel_holds_the_recipes_and_every_module(tmp_path: Path) -> None:
    source, extracted = tmp_path / "source", tmp_path / "wheel"
    for name in ("lpd_export", "reference", "engines"):
        for path in (REPOSITORY / name).rglob("*"):
            if path.suffix in (".py", ".toml") or path.name == "py.typed":
                copy = source / path.relative_to(REPOSITORY)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, copy)
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(REPOSITORY / name, source)
    (source / "engines" / "built").mkdir()
    (source / "engines" / "built" / "weights.toml").touch()  # a bundle's files stay out
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", tmp_path, source],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(extracted)
    assert (extracted / "lpd_export" / "py.typed").is_file()
    recipes = {path.relative_to(extracted).as_posix() for path in extracted.rglob("*.toml")}
    assert recipes == {f"lpd_export/engines/{name}.toml" for name in (*ROWS, "demo")}
    for package, home in (("lpd_export", REPOSITORY), ("lpd_reference", REPOSITORY / "reference")):
        modules = {path.relative_to(home) for path in (home / package).rglob("*.py")}
        held = {path.relative_to(extracted) for path in (extracted / package).rglob("*.py")}
        assert held == modules
    script = "from lpd_export.build.recipes import find_recipe; print(find_recipe('lpd-xl-512'))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(extracted)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(extracted / "lpd_export" / "engines" / "lpd-xl-512.toml")
