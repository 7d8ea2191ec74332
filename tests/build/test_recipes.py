"""Recipes by name: each published row is one, and the demo's file, found from anywhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lpd_export.build import recipes
from lpd_export.build.published import PUBLISHED, TOKENIZER, PublishedSettings
from lpd_export.build.recipes import named_recipe, published_recipes
from lpd_export.build.refusals import check_request
from lpd_export.build.request import BuildRequest, read_recipe
from lpd_export.build.settings import weight_sources
from lpd_export.errors import UserError

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "engines"
ROWS = {
    "lpd-l-256": PUBLISHED[0],
    "lpd-xl-256": PUBLISHED[1],
    "lpd-xxl-256": PUBLISHED[2],
    "lpd-l-256-steps32": PUBLISHED[3],
    "lpd-xl-256-steps32": PUBLISHED[4],
    "lpd-l-512": PUBLISHED[5],
    "lpd-xl-512": PUBLISHED[6],
}
NAMES = [name + precision for name in ROWS for precision in ("", "-int8")]


def test_there_is_a_recipe_for_every_published_row() -> None:
    assert len(PUBLISHED) == len(ROWS)
    assert list(published_recipes()) == NAMES
    assert [path.name for path in FOLDER.glob("*.toml")] == ["demo.toml"]


@pytest.mark.parametrize(("name", "row"), ROWS.items())
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_recipe_says_what_was_published(
    name: str,
    row: PublishedSettings,
    precision: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    name += "" if precision == "fp16" else f"-{precision}"
    request = BuildRequest(**named_recipe(name))
    assert request == BuildRequest(
        model=row.model,
        res=row.resolution,
        steps=row.steps,
        cfg=row.cfg,
        repulsion=row.repulsion,
        precision=precision,
        backend="tensorrt",
        out=f"engines/{name}",
    )
    assert weight_sources(request) == (row.checkpoint, TOKENIZER)


def test_a_recipe_of_a_published_model_takes_random_weights() -> None:
    settings = named_recipe("lpd-l-256-int8") | {"backend": "onnxruntime", "random_weights": True}
    check_request(BuildRequest(**settings))


# ------------------------------------------------------------------------------------- finding


def test_the_demo_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert named_recipe("demo") == read_recipe(FOLDER / "demo.toml", FOLDER.parent) | {
        "out": "engines/demo"
    }


def test_a_file_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("lpd-xl-512", "mine.toml", "mine"):
        (tmp_path / name).write_text("steps = 3")
        assert named_recipe(name) == {"steps": 3, "out": name.removesuffix(".toml")}
    absolute = tmp_path / "mine.toml"
    assert named_recipe(str(absolute))["out"] == str(tmp_path / "mine")


def test_a_bundle_does_not_hide_its_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lpd-xl-512").mkdir()
    monkeypatch.chdir(tmp_path)
    assert named_recipe("lpd-xl-512")["out"] == "engines/lpd-xl-512"


def test_what_is_there_but_no_file_is_left_to_the_reader(tmp_path: Path) -> None:
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
        named_recipe(text)
    said = str(caught.value)
    assert said.startswith(f"there is no recipe {text} (did you mean ")
    assert meant in said.split("?")[0]
    assert f"one of the names {', '.join(sorted([*NAMES, 'demo']))}" in said


@pytest.mark.parametrize("text", ["resnet", "", "a" * 300, "a\0b", "/"])
def test_words_that_are_nothing_like_a_recipe(text: str) -> None:
    with pytest.raises(UserError) as caught:
        named_recipe(text)
    assert "did you mean" not in str(caught.value)


# ------------------------------------------------------------------------ an installed package


def test_the_demo_needs_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "lpd_export"
    (package / "engines").mkdir(parents=True)
    shutil.copy(FOLDER / "demo.toml", package / "engines")
    monkeypatch.setattr(recipes, "__file__", str(package / "build" / "recipes.py"))
    monkeypatch.chdir(tmp_path)
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
    held = {path.relative_to(extracted).as_posix() for path in extracted.rglob("*")}
    assert {name for name in held if name.endswith(".toml")} == {"lpd_export/engines/demo.toml"}
    for folder, package in (
        (REPOSITORY, "lpd_export"),
        (REPOSITORY / "reference", "lpd_reference"),
    ):
        modules = {path.relative_to(folder).as_posix() for path in (folder / package).rglob("*.py")}
        assert {
            name for name in held if name.startswith(f"{package}/") and name.endswith(".py")
        } == (modules)
    top = {path.name for path in extracted.iterdir() if not path.name.endswith(".dist-info")}
    assert top == {"lpd_export", "lpd_reference"}
    script = (
        "import json; from lpd_export.build import recipes; print(json.dumps([recipes.__file__, "
        "recipes.named_recipe('lpd-xl-512'), str(recipes.recipes_folder())]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(extracted)},
        capture_output=True,
        text=True,
        check=True,
    )
    file, settings, folder = json.loads(done.stdout)
    assert file == str(extracted / "lpd_export/build/recipes.py")
    assert settings["model"] == "lpd-xl"
    assert folder == str(extracted / "lpd_export/engines")
