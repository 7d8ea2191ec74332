"""The images of the six sets of artwork, made of small packages: no network, few drawings."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import json
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner, Result

SCRIPT = Path(__file__).parents[2] / "scripts" / "prepare_artwork.py"
NAMES = {
    "cat": "animal-mammal",
    "red heart": "heart",
    "blue heart": "heart",
    "black heart": "heart",
    "flag: Peru": "country-flag",
    "flag: Chad": "country-flag",
    "anchor": "transport-water",
}


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("prepare_artwork", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its data classes look themselves up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def write_tarball(path: Path, name: str, content: object) -> str:
    """A package of one file; its integrity."""
    encoded = json.dumps(content).encode()
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo(f"package/{name}")
        info.size = len(encoded)
        archive.addfile(info, io.BytesIO(encoded))
    return "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()


def icons(number: int) -> dict[str, object]:
    """Bars: all sets draw the cat alike, and the first two everything."""
    names = ["cat", "red-heart", "blue-heart", "black-heart", "flag-for-peru", "flag-chad"]
    names += ["anchor", "cat-medium-dark", "fidget-spinner"]
    return {
        "width": 64,
        "height": 64,
        "icons": {
            name: {"body": f'<path d="M0 0h{4 + place}v{max(number, 1) + 9 if place else 9}H0z"/>'}
            for place, name in enumerate(names)
        },
    }


@pytest.fixture
def tarballs(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of small packages, which the script takes for the published ones."""
    folder = tmp_path / "tarballs"
    folder.mkdir()

    def small(package: object, name: str, content: object) -> object:
        path = folder / package.tarball  # type: ignore[attr-defined]
        return replace(package, integrity=write_tarball(path, name, content))  # type: ignore[type-var]

    sets = [
        replace(one, package=small(one.package, "icons.json", icons(number)))
        for number, one in enumerate(script.SETS)
    ]
    monkeypatch.setattr(script, "SETS", tuple(sets))
    names = [{"name": name, "subgroup": subgroup} for name, subgroup in NAMES.items()]
    monkeypatch.setattr(script, "NAMES", small(script.NAMES, "emoji.json", names))
    return folder


def prepare(script: ModuleType, *arguments: object) -> Result:
    return CliRunner().invoke(script.main, [str(argument) for argument in arguments])


def test_the_folder(script: ModuleType, tarballs: Path, tmp_path: Path) -> None:
    out = tmp_path / "data" / "artwork"
    said = prepare(script, "--tarballs", tarballs, "--out", out)
    assert said.exit_code == 0, said.output
    assert {path.name for path in out.iterdir()} == {
        *script.SPLITS,
        script.UNSORTED,
        *script.FILES,
    }
    names = json.loads((out / "classes.json").read_text())
    assert names == list(script.read_classes())
    assert {"cat", "heart"} < set(json.loads((out / "mirrored.json").read_text())) < set(names)
    made = {
        str(path.parent.relative_to(out)): {one.name for one in path.parent.iterdir()}
        for path in out.glob("**/*.png")
    }
    sets = {one.name for one in script.SETS}
    assert made["validation/cat"] == {"cat-emojione.png"}
    assert len(made["train/heart"]) == 2 * len(made["validation/heart"]) == 10
    # Flags that are discs are of no class, and of the one that is held out nothing is trained on.
    [held] = {one.split("-")[1] for one in made["validation/flag"]}
    [trained] = {one.split("-")[1] for one in made["train/flag"]}
    assert {held, trained} == {"peru", "chad"}
    assert made["unsorted"] == {f"flag-{trained}-emojione.png"} | {
        f"anchor-{name}.png" for name in sets - {"fluent-emoji-flat"}
    }
    assert "30 images of 64x64" in " ".join(said.output.split())
    licences = (out / "licences.md").read_text()
    for one in script.SETS:
        assert one.package.integrity in licences
        assert one.credit in licences
    assert script.NAMES.integrity in licences


def test_mistakes_are_answered_in_one_sentence(
    script: ModuleType, tarballs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "artwork"
    arguments = ("--tarballs", tarballs, "--out", out)

    def mistake(*more: object) -> str:
        said = prepare(script, *arguments, *more)
        assert said.exit_code == 2, said.output
        return said.stderr.splitlines()[-1].removeprefix("prepare_artwork: error: ")

    assert prepare(script, *arguments).exit_code == 0
    assert mistake() == (
        f"{out} is there already: use it, choose another --out, or make it anew with --force"
    )
    assert prepare(script, *arguments, "--force").exit_code == 0
    path = tarballs / script.SETS[0].package.tarball
    path.write_bytes(path.read_bytes() + b"\0")
    assert mistake("--force").startswith(f"{path} is not the published @iconify-json/fluent-emoji ")
    assert list(out.glob("train/heart/*.png"))
    (out / "thesis.txt").write_text("years of work")
    assert mistake("--force").startswith(f"{out} was not made by this script, it holds thesis.txt")


def test_ctrl_c_leaves_nothing(
    script: ModuleType, tarballs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(svg: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "render", interrupt)
    said = prepare(script, "--tarballs", tarballs, "--out", tmp_path / "artwork")
    assert said.exit_code == 130
    assert [*tmp_path.iterdir()] == [tarballs]


def test_a_failure_keeps_what_was_there(
    script: ModuleType, tarballs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "artwork"
    arguments = ("--tarballs", tarballs, "--out", out)
    assert prepare(script, *arguments).exit_code == 0

    def disk_full(svg: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(script, "render", disk_full)
    said = prepare(script, *arguments, "--force")
    assert said.exit_code == 2
    sentence = said.stderr.splitlines()[-1]
    assert sentence == f"prepare_artwork: error: cannot write {out}: No space left on device"
    assert list(out.glob("train/heart/*.png"))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_packages_are_addressed_as_the_registry_does(script: ModuleType) -> None:
    package = script.SETS[2].package
    assert package.tarball == "iconify-json-noto-1.2.9.tgz"
    assert package.address("https://registry.example") == (
        "https://registry.example/@iconify-json/noto/-/noto-1.2.9.tgz"
    )
