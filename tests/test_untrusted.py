"""Files from anywhere: they lead out of a folder, never end, take memory, talk to terminals.

What each parser says of damage in its own format is tested beside it.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import resource
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from commandline import answer, mistake
from lpd_export.bounds import printable
from lpd_export.bundle.manifest import CHECKSUM, MANIFEST, Bundle, checksum, describe_files
from lpd_export.errors import UserError

ESCAPE = "\x1b]0;owned\x07"
SHOWN = r"\x1b]0;owned\x07"


@pytest.fixture
def bundle(small_bundle: Path, tmp_path: Path) -> Path:
    """A bundle to change."""
    return Path(shutil.copytree(small_bundle, tmp_path / "bundle"))


def sign(bundle: Path, change: Callable[[dict[str, Any]], object] = lambda values: None) -> None:
    """Writes a manifest of the files that are there, with right checksums, changed."""
    values = json.loads((bundle / MANIFEST).read_text())
    del values[CHECKSUM]
    (bundle / MANIFEST).unlink()
    values["files"] = {
        name: dataclasses.asdict(file) for name, file in describe_files(bundle).items()
    }
    change(values)
    (bundle / MANIFEST).write_text(json.dumps({CHECKSUM: checksum(values)} | values))


# ------------------------------------------------------------------------- out of the folder


@pytest.mark.parametrize("name", ["onnx/phase_00.onnx", "onnx/decode.onnx", "onnx", "schedule.npz"])
def test_a_link_out_of_the_bundle(bundle: Path, tmp_path: Path, name: str) -> None:
    (bundle / name).rename(tmp_path / "elsewhere")
    (bundle / name).symlink_to(tmp_path / "elsewhere")
    assert f"is a symbolic link to {tmp_path / 'elsewhere'}" in mistake("inspect", bundle)


def keep_weights_in(graph: Path, place: str) -> None:
    model = onnx.load(graph, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = place
    onnx.save(model, graph)


@pytest.mark.parametrize("place", ["../../weights.data", "/etc/passwd", "undeclared.data"])
def test_weights_that_are_not_the_bundles(bundle: Path, tmp_path: Path, place: str) -> None:
    for copy in (bundle / "onnx/undeclared.data", tmp_path / "weights.data"):
        shutil.copy(bundle / "onnx/weights.data", copy)
    keep_weights_in(bundle / "onnx/decode.onnx", place)
    sign(bundle, lambda values: values["files"].pop("onnx/undeclared.data", None))
    said = mistake("inspect", bundle)
    assert said == (
        f"{bundle / 'onnx/decode.onnx'} keeps weights in {place!r}, which is not a file of the "
        "bundle beside it: do not use this bundle"
    )
    with pytest.raises(UserError, match="keeps weights in"):
        Bundle.open(bundle).graph("onnx/decode.onnx")
    if place != "undeclared.data":  # ONNX Runtime has the same rule
        mistake("run", bundle, "--class", "0", "--out", tmp_path / "images")


@pytest.mark.parametrize(
    ("graph", "other"), [("decode", "tokenize"), ("detokenize", "decode"), ("decode", "phase_02")]
)
def test_one_graph_in_the_place_of_another(bundle: Path, graph: str, other: str) -> None:
    shutil.copy(bundle / f"onnx/{other}.onnx", bundle / f"onnx/{graph}.onnx")
    sign(bundle)
    said = mistake("run", bundle, "--class", "0", "--out", bundle.with_name("images"))
    assert str(bundle / f"onnx/{graph}.onnx") in said
    assert said.endswith("build the bundle again")
    assert not bundle.with_name("images").exists()


def test_check_tells_what_a_bundle_does_not_declare(bundle: Path) -> None:
    said = answer("inspect", bundle, "--check")
    assert (said.code, said.err) == (0, "")
    assert said.out.endswith("files, all whole\n")
    (bundle / "onnx/more.onnx").touch()
    assert "holds onnx/more.onnx, which its manifest does not name" in mistake(
        "inspect", bundle, "--check"
    )


# ------------------------------------------------------------------------- terminals and pages


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.update(name=ESCAPE),
        lambda values: values["class_names"][0].append(f"a{ESCAPE}"),
        lambda values: values["made"]["versions"].update({ESCAPE: "1"}),
        lambda values: values.update(backend_version="\u202e1.0"),
    ],
)
def test_a_manifest_that_talks_to_the_terminal(
    bundle: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    sign(bundle, change)
    for command in (["inspect"], ["inspect", "--classes"], ["run", "--class", "0", "--out", "x"]):
        said = mistake(command[0], bundle, *command[1:])
        assert "holds control characters, which no build writes" in said
        assert printable(said) == said


def test_a_graph_that_talks_to_the_terminal(bundle: Path) -> None:
    model = onnx.load(bundle / "onnx/decode.onnx", load_external_data=False)
    model.graph.node[0].name = ESCAPE
    onnx.save(model, bundle / "onnx/decode.onnx")
    sign(bundle)
    assert "holds control characters" in mistake("inspect", bundle)


def test_what_a_user_names_is_shown_not_obeyed(small_weights: Path, tmp_path: Path) -> None:
    assert f"there is no bundle {SHOWN}" in mistake("inspect", ESCAPE)
    names = tmp_path / "names.json"
    names.write_text(json.dumps([ESCAPE, *"bcde"]))
    weights = ["--checkpoint", small_weights / "lpd.pth", "--tokenizer", small_weights / "vq.pt"]
    said = mistake("build", *weights, "--classes", names, "--out", tmp_path / "out")
    assert said == f"the class names {names} hold control characters in that of class 0: '{SHOWN}'"


# --------------------------------------------------------------------------- without an end


def endless(folder: Path) -> dict[str, Path]:
    """A pipe that nobody writes to, and links to a device under names of many formats."""
    os.mkfifo(folder / "pipe.png")
    for name in ("a.toml", "a.json", "a.npy", "a.jsonl", "a.pth", "a.safetensors"):
        (folder / name).symlink_to("/dev/zero")
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize(
    "command",
    [
        "build a.toml",
        "build --checkpoint a.pth --tokenizer a.safetensors --out b",
        "build --res 256 --random-weights --schedule a.json --steps 4 --out b",
        "build --res 256 --random-weights --precision int8 --keep-layers a.json --out b",
        "build --checkpoint LPD --tokenizer VQ --classes a.json --out b",
        "schedule check a.json",
        "edit BUNDLE pipe.png --box 0,0,8,8 --out b",
        "edit BUNDLE IMAGE --mask pipe.png --out b",
        "edit BUNDLE a.npy --box 0,0,8,8 --out b",
        "edit BUNDLE RECORDS:0 --box 0,0,8,8 --out b",
    ],
)
def test_a_file_without_an_end(
    small_bundle: Path, small_weights: Path, tmp_path: Path, command: str
) -> None:
    paths = endless(tmp_path)
    Image.new("RGB", (16, 16)).save(tmp_path / "image.png")
    known = {
        "BUNDLE": small_bundle,
        "LPD": small_weights / "lpd.pth",
        "VQ": small_weights / "vq.pt",
        "IMAGE": tmp_path / "image.png",
        "b": tmp_path / "b",
        **paths,
    }
    words = command.replace("RECORDS", str(paths["a.jsonl"])).split()
    said = mistake(*(known.get(word, word) for word in words))
    assert "it is a device or a pipe; give a file" in said or "there is no checkpoint" in said
    assert not (tmp_path / "b").exists()


# ------------------------------------------------------------------------- more than memory


def npy(shape: tuple[int, ...]) -> bytes:
    """An array by its header alone."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<i8", "fortran_order": False, "shape": shape}
    )
    return header.getvalue()


def header_bomb(path: Path) -> None:
    """A schedule of 1.3 MB with an array whose header is 300 MB of spaces."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("group_sizes.npy", "w") as file:
            file.write(b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31))
            for _ in range(300):
                file.write(b" " * 2**20)
        for name in ("orders", "meta"):
            archive.writestr(f"{name}.npy", npy((4, 4)))


def long_file(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(2**40)


def png_bomb(path: Path) -> None:
    """An image of 100 million pixels in a file of a few kilobytes."""
    Image.new("1", (10_000, 10_000)).save(path)


@pytest.mark.parametrize(
    ("name", "write", "command"),
    [
        ("a.npz", header_bomb, "schedule check FILE"),
        ("a.json", long_file, "schedule check FILE --steps 4"),
        ("a.toml", long_file, "build FILE"),
        ("a.toml", lambda path: path.write_text("a" + ".a" * 50_000 + " = 1"), "build FILE"),
        ("a.toml", lambda path: path.write_text("res = " + "9" * 10_000), "build FILE"),
        ("a.npy", lambda path: path.write_bytes(npy((2**33,))), "edit BUNDLE FILE --box 0,0,8,8"),
        ("a.npy", lambda path: path.write_bytes(npy((2**60,))), "edit BUNDLE FILE --box 0,0,8,8"),
        ("a.png", png_bomb, "edit BUNDLE FILE --box 0,0,8,8"),
        ("a.png", png_bomb, "edit BUNDLE IMAGE --mask FILE"),
        ("manifest.json", long_file, "inspect FOLDER"),
    ],
)
def test_a_file_larger_than_memory(
    small_bundle: Path, tmp_path: Path, name: str, write: Callable[[Path], object], command: str
) -> None:
    path = tmp_path / name
    write(path)
    Image.new("RGB", (16, 16)).save(tmp_path / "image.png")
    known = {"FILE": path, "BUNDLE": small_bundle, "IMAGE": tmp_path / "image.png"}
    words = [known.get(word, word) for word in command.replace("FOLDER", str(tmp_path)).split()]
    if "edit" in words:
        words += ["--out", tmp_path / "out"]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    mistake(*words)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 300 * 1024, "kilobytes: the sentence took memory"


def test_a_picture_that_is_a_program_is_not_run(small_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    said = mistake("edit", small_bundle, path, "--box", "0,0,8,8", "--out", tmp_path / "out")
    assert said.startswith(f"{path} is no image of a known format: AVIF, ")
