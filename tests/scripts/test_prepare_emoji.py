"""The images of lpd-emoji, made of small packages of the same layout: no network, few pictures."""

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
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "scripts" / "prepare_emoji.py"
RED = (214, 30, 84, 255)
ENTRIES = [
    ("1F98A", "fox_face", "animal-mammal"),
    ("1F42A", "dromedary_camel", "animal-mammal"),
    ("1F43E", "feet", "animal-mammal"),
    ("2764-FE0F", "heart", "heart"),
    *((f"1F49{i}", f"heart_{i}", "heart") for i in range(6)),
    ("1F528", "hammer", "tool"),
]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("prepare_emoji", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its data classes look themselves up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def encoded(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def half_red() -> Image.Image:
    """The left half red, the right half transparent."""
    picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    picture.paste(RED, (0, 0, 32, 64))
    return picture


def write_tarball(path: Path, artist: str) -> str:
    """A package of one artist; its integrity."""
    entries = [
        {
            "unified": unified,
            "image": f"{unified.lower()}.png",
            "short_name": short_name,
            "subcategory": subgroup,
            "has_img_google": True,
            "has_img_twitter": short_name != "heart_5",
            "skin_variations": {"1F3FB": {"image": f"{unified.lower()}-1f3fb.png"}},
        }
        for unified, short_name, subgroup in ENTRIES
    ]
    files = {"LICENSE": f"licence of {artist}".encode(), "emoji.json": json.dumps(entries).encode()}
    for entry in entries:
        files[f"img/{artist}/64/{entry['image']}"] = encoded(half_red())
    files[f"img/{artist}/64/2764-fe0f-1f3fb.png"] = encoded(half_red())
    files[f"img/{artist}/sheets/64.png"] = b"a sheet of all"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()


@pytest.fixture
def tarballs(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of both small packages, which the script takes for the published ones."""
    folder = tmp_path / "tarballs"
    folder.mkdir()
    packages = [
        replace(package, integrity=write_tarball(folder / package.tarball, package.artist))
        for package in script.PACKAGES
    ]
    monkeypatch.setattr(script, "PACKAGES", tuple(packages))
    return folder


def prepare(script: ModuleType, *arguments: object) -> Result:
    return CliRunner().invoke(script.main, [str(argument) for argument in arguments])


def mistake(script: ModuleType, *arguments: object) -> str:
    """The one sentence that answers a wrong command."""
    said = prepare(script, *arguments)
    assert said.exit_code == 2, said.output
    *_, last = said.stderr.splitlines()
    assert said.stderr.count("\n") == 1
    return last.removeprefix("prepare_emoji: error: ")


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


# -------------------------------------------------------------------------------- the folder


def test_layout(script: ModuleType, tarballs: Path, tmp_path: Path) -> None:
    out = tmp_path / "data" / "emoji"
    said = prepare(script, "--tarballs", tarballs, "--out", out)
    assert said.exit_code == 0, said.output
    assert sorted(path.name for path in out.iterdir()) == [
        "classes.json",
        "licences.md",
        "train",
        "validation",
    ]
    names = json.loads((out / "classes.json").read_text())
    assert names == sorted(script.CLASSES)
    for split in ("train", "validation"):
        assert sorted(path.name for path in (out / split).iterdir()) == names
    files = {
        class_name: sorted(path.name for path in out.glob(f"*/{class_name}/*"))
        for class_name in names
    }
    assert {name for name in names if files[name]} == {"animal", "animal-face", "heart"}
    assert files["animal"] == ["1f42a-google.png", "1f42a-twitter.png"]  # and no feet
    assert files["animal-face"] == ["1f98a-google.png", "1f98a-twitter.png"]
    assert "2764-fe0f-google.png" in files["heart"]
    assert not any("1f3fb" in file for file in files["heart"])  # no skin tones
    assert "1f495-google.png" in files["heart"]
    assert "1f495-twitter.png" not in files["heart"]  # that artist has none
    licences = (out / "licences.md").read_text()
    for package in script.PACKAGES:
        assert package.integrity in licences
        assert f"licence of {package.artist}" in licences
    assert "Apache License 2.0" in licences
    assert "CC BY 4.0" in licences
    assert "17 images" in said.output
    assert not hidden(out.parent)


def test_both_artists_of_an_emoji_are_on_one_side(
    script: ModuleType, tarballs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "emoji"
    assert prepare(script, "--tarballs", tarballs, "--out", out).exit_code == 0
    emoji = {
        split: {path.name.rpartition("-")[0] for path in out.glob(f"{split}/*/*.png")}
        for split in ("train", "validation")
    }
    assert emoji["train"]
    assert emoji["validation"]
    assert not emoji["train"] & emoji["validation"]


def test_images_are_on_white(script: ModuleType, tarballs: Path, tmp_path: Path) -> None:
    out = tmp_path / "emoji"
    assert prepare(script, "--tarballs", tarballs, "--out", out).exit_code == 0
    for path in out.glob("*/*/*.png"):
        with Image.open(path) as picture:
            assert picture.mode == "RGB"
            pixels = np.asarray(picture)
        assert pixels.shape == (64, 64, 3)
        assert (pixels[:, :32] == RED[:3]).all()
        assert (pixels[:, 32:] == 255).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
@pytest.mark.parametrize("side", [64, 72])
def test_any_mode_and_size_is_composed(script: ModuleType, mode: str, side: int) -> None:
    picture = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (0, 0, side // 2, side))
    source = picture.convert(mode) if mode != "P" else picture.quantize(4)
    made = np.asarray(script.compose(encoded(source)))
    assert made.shape == (64, 64, 3)
    assert (made[:, :28] == 0).all()
    if mode in ("RGBA", "LA", "P"):  # the others cannot say what is transparent
        assert (made[:, 36:] == 255).all()


def test_half_transparent_is_half_white(script: ModuleType) -> None:
    content = encoded(Image.new("RGBA", (64, 64), (255, 0, 0, 128)))
    assert script.compose(content).getpixel((5, 5)) == (255, 127, 127)


# --------------------------------------------------------------------------- classes and split


def test_no_emoji_has_two_classes(script: ModuleType) -> None:
    contents = script.CLASSES.values()
    subgroups = [name for content in contents for name in content.subgroup_names()]
    named = [name for content in contents for name in content.also.split()]
    left_out = [name for content in contents for name in content.without.split()]
    for names in (subgroups, named, left_out):
        assert len(names) == len(set(names))
    assert not set(named) & set(left_out)
    assert 16 <= len(script.CLASSES) <= 28


def test_the_split_never_changes(script: ModuleType) -> None:
    assert script.code_point_hash("2764-fe0f") == script.code_point_hash("2764-FE0F")
    entries = [entry(f"1F{number:03X}", "heart") for number in range(0x300, 0x700)]
    chosen = sorted(script.validation_emoji(entries))
    assert len(chosen) == 34
    assert chosen[:4] == ["1F339", "1F33E", "1F33F", "1F375"]


def entry(unified: str, subgroup: str) -> dict[str, Any]:
    return {"unified": unified, "short_name": f"emoji_{unified}", "subcategory": subgroup}


CODE_POINTS = st.lists(
    st.tuples(st.integers(0x1F300, 0x1FAFF), st.sampled_from(["heart", "time", "sport", "tool"])),
    unique_by=lambda pair: pair[0],
    max_size=40,
)


@given(CODE_POINTS)
def test_validation_holds_two_of_each_class(
    script: ModuleType, pairs: list[tuple[int, str]]
) -> None:
    entries = [entry(f"{point:X}", subgroup) for point, subgroup in pairs]
    chosen = script.validation_emoji(entries)
    assert chosen == script.validation_emoji(entries[::-1])
    for subgroup in ("heart", "time", "sport"):
        members = [one["unified"] for one in entries if one["subcategory"] == subgroup]
        low = {one for one in members if script.code_point_hash(one)[0] < 13}
        assert low <= chosen
        assert len(chosen & set(members)) == max(len(low), min(2, len(members)))
    assert not chosen & {one["unified"] for one in entries if one["subcategory"] == "tool"}


# ----------------------------------------------------------------------------------- mistakes


def test_a_package_of_another_hash_is_refused(
    script: ModuleType, tarballs: Path, tmp_path: Path
) -> None:
    path = tarballs / script.PACKAGES[1].tarball
    path.write_bytes(path.read_bytes() + b"\0")
    out = tmp_path / "emoji"
    sentence = mistake(script, "--tarballs", tarballs, "--out", out)
    assert sentence.startswith(f"{path} is not the published emoji-datasource-twitter 16.0.0")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tarballs"]


def test_a_missing_package_is_named(script: ModuleType, tarballs: Path, tmp_path: Path) -> None:
    path = tarballs / script.PACKAGES[0].tarball
    path.unlink()
    sentence = mistake(script, "--tarballs", tarballs, "--out", tmp_path / "emoji")
    assert sentence.startswith(f"cannot read {path}: No such file")


def test_a_second_run_says_what_to_do(script: ModuleType, tarballs: Path, tmp_path: Path) -> None:
    out = tmp_path / "emoji"
    arguments = ("--tarballs", tarballs, "--out", out)
    assert prepare(script, *arguments).exit_code == 0
    (out / "train" / "heart" / "mine.png").write_bytes(b"")
    assert mistake(script, *arguments) == (
        f"{out} is there already: use it, choose another --out, or make it anew with --force"
    )
    assert prepare(script, *arguments, "--force").exit_code == 0
    assert not (out / "train" / "heart" / "mine.png").exists()
    assert not hidden(tmp_path)


def test_force_spares_what_it_did_not_make(
    script: ModuleType, tarballs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "home"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    sentence = mistake(script, "--tarballs", tarballs, "--out", out, "--force")
    assert sentence.startswith(f"{out} was not made by this script, it holds thesis.txt")
    assert (out / "thesis.txt").read_text() == "years of work"


def test_a_failure_keeps_what_was_there(
    script: ModuleType, tarballs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "emoji"
    arguments = ("--tarballs", tarballs, "--out", out)
    assert prepare(script, *arguments).exit_code == 0

    def disk_full(content: bytes) -> Image.Image:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(script, "compose", disk_full)
    sentence = mistake_last(prepare(script, *arguments, "--force"))
    assert sentence == f"prepare_emoji: error: cannot write {out}: No space left on device"
    assert list(out.glob("train/heart/*.png"))
    assert not hidden(tmp_path)


def mistake_last(said: Result) -> str:
    assert said.exit_code == 2, said.output
    return said.stderr.splitlines()[-1]


def test_ctrl_c_leaves_nothing(
    script: ModuleType, tarballs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(content: bytes) -> Image.Image:
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "compose", interrupt)
    said = prepare(script, "--tarballs", tarballs, "--out", tmp_path / "emoji")
    assert said.exit_code == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tarballs"]
