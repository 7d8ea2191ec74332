"""`lpd-export edit`: what it writes, what it says, and that nothing is left of what cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from commandline import answer, entries, mistake
from lpd_export.image_record import RECORD

pytestmark = pytest.mark.model


def edit(bundle: Path, image: object, out: Path, *options: object) -> list[dict[str, Any]]:
    """The records of an edit that must succeed."""
    said = answer("edit", bundle, image, "--out", out, *options)
    assert said.code == 0, said
    lines = (out / "images.jsonl").read_text().splitlines()
    return [dict(RECORD.validate_json(line)) for line in lines]


@pytest.fixture(scope="module")
def made(small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two images."""
    out = tmp_path_factory.mktemp("made") / "images"
    said = answer("run", small_bundle, "--class", "1", "none", "--seed", 3, "--out", out)
    assert said.code == 0, said
    return out


def tokens(record: dict[str, Any]) -> np.ndarray:
    return np.array(record["token_ids"])


def test_an_edit_of_a_runs_image(small_bundle: Path, made: Path, tmp_path: Path) -> None:
    """Its tokens are exact, its class stays, and sheet, records and traces tell all of it."""
    before = [json.loads(line) for line in (made / "images.jsonl").read_text().splitlines()]
    out = tmp_path / "edits"
    records = edit(
        small_bundle, f"{made}/images.jsonl:0", out, "--box", "8,0,16,16", "-n", 2, "--trace"
    )
    assert [record["class_id"] for record in records] == [1, 1]
    kept = np.arange(16) % 4 < 2
    for record in records:
        assert (tokens(record)[kept] == tokens(before[0])[kept]).all()
        assert np.unpackbits(np.frombuffer(bytes.fromhex(record["kept"]), np.uint8)).all(where=kept)
        assert record["order"] is None
        assert (record["edit_order"], record["paste"]) == ("locality", True)
        with Image.open(out / record["file"]) as one, Image.open(made / before[0]["file"]) as other:
            np.testing.assert_array_equal(np.asarray(one)[:, :6], np.asarray(other)[:, :6])
    files = [record["file"] for record in records]
    names = [f"step_{step:02d}.png" for step in range(1, 5)]
    steps = [f"trace/{Path(file).stem}/{name}" for file in files for name in names]
    folders = [f"trace/{Path(file).stem}" for file in files]
    assert entries(out) == sorted(
        [*files, "contact_sheet.png", "images.jsonl", "trace", *steps, *folders]
        + [f"trace/{file}" for file in files]
    )
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.width > 3 * sheet.height  # original, mask and both results in a row


def test_an_interrupted_edit_is_resumed_as_it_was(
    small_bundle: Path, made: Path, tmp_path: Path
) -> None:
    options = ["--outpaint", 4, "--class", "2", "none", "-n", 2, "--seed", 9, "--batch", 3]
    image = f"{made}/images.jsonl:1"
    whole = edit(small_bundle, image, tmp_path / "whole", *options)
    edit(small_bundle, image, tmp_path / "cut", *options)
    (path := tmp_path / "cut" / "images.jsonl").write_text(
        "".join(path.read_text().splitlines(keepends=True)[:1])
    )
    assert edit(small_bundle, image, tmp_path / "cut", *options, "--resume") == whole
    said = mistake(
        "edit",
        small_bundle,
        f"{made}/images.jsonl:0",
        *options,
        "--resume",
        "--out",
        tmp_path / "cut",
    )
    assert "made with image" in said


def test_pictures_masks_and_notes(small_bundle: Path, tmp_path: Path) -> None:
    Image.new("RGB", (40, 20), (9, 90, 200)).save(tmp_path / "photo.jpg")
    mask = Image.new("L", (20, 20))
    mask.paste(255, (10, 0, 20, 20))
    mask.save(tmp_path / "mask.png")
    out = tmp_path / "out"
    arguments = [small_bundle, tmp_path / "photo.jpg", "--mask", tmp_path / "mask.png"]
    said = answer("edit", *arguments, "--no-paste", "--json", "--out", out)
    assert said.code == 0, said
    result = json.loads(said.out)
    assert result["images"][0]["class_id"] is None
    assert result["notes"] == [
        "the mask is 20 x 20, the image 40 x 20: both are made 16 x 16 in the same way"
    ]
    assert f"lpd-export: {result['notes'][0]}" in said.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "say what is to be made anew: --mask FILE"),
        (["--box", "0,0,4,4", "--outpaint", 4], "--box and --outpaint say two different things"),
        (["--box", "0,0,4"], "'0,0,4' is not four whole numbers such as 16,0,48,32"),
        (["--box", "0,0,4,99"], "is not inside the image, which is 16 x 16"),
        (["--outpaint", 9], "outpaint must be from 1 to 4"),
        (["--mask", "nowhere.png"], "cannot read the image nowhere.png"),
        (["--box", "0,0,4,4", "--class", "dog"], "dog"),
        (["--box", "0,0,4,4", "--batch", 0], "--batch must be a whole number from 1"),
    ],
)
def test_wrong_edits_leave_nothing(
    small_bundle: Path, made: Path, tmp_path: Path, options: list[object], words: str
) -> None:
    out = tmp_path / "a" / "out"
    said = mistake("edit", small_bundle, f"{made}/images.jsonl:0", *options, "--out", out)
    assert words in said
    assert entries(tmp_path) == []


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("images.jsonl", "images.jsonl has many images: say which, as in"),
        ("images.jsonl:7", "images.jsonl has no record of image 7"),
        ("images.jsonl:" + 5000 * "9", "images.jsonl has no record of image 9999"),
        ("other.jsonl:7", "cannot read"),
        ("00000_ice-cream.png.jpg", "cannot read the image"),
        ("images.jsonl:x", "cannot read the image"),
        ("outside.npy", "token 64 is not in the model's codebook"),
        ("none.npy", "cannot read"),
        ("broken.npy", "is damaged or no array of NumPy"),
    ],
)
def test_wrong_images_leave_nothing(
    small_bundle: Path, made: Path, tmp_path: Path, image: str, words: str
) -> None:
    np.save(made / "outside.npy", np.full(16, 64))
    (made / "broken.npy").write_bytes(b"\x93NUMPY")
    out = tmp_path / "a" / "out"
    said = mistake("edit", small_bundle, made / image, "--box", "0,0,4,4", "--out", out)
    assert words in said
    assert entries(tmp_path) == []


def test_an_unwritable_place_is_a_sentence(small_bundle: Path, made: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = mistake(
        "edit",
        small_bundle,
        f"{made}/images.jsonl:0",
        "--outpaint",
        4,
        "--out",
        tmp_path / "file" / "out",
    )
    assert "file is not a folder" in said
    assert entries(tmp_path) == ["file"]
