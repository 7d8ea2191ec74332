"""Edits among the requests of a file: what they make, and where their pictures may lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_shards import content

from commandline import answer, mistake
from lpd_export.run_request import RECORDS

pytestmark = pytest.mark.model


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / RECORDS).read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, an earlier run, and requests that edit both; leave it as it is."""
    folder = tmp_path_factory.mktemp("edits")
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (20, 30, 3), np.uint8)).save(folder / "photo.png")
    mask = Image.new("L", (30, 20))
    mask.paste(255, (15, 0, 30, 20))
    mask.save(folder / "mask.png")
    assert answer("run", small_bundle, "--class", "1", "--out", folder / "earlier").code == 0
    lines = [
        {"class": "all", "seed": 5},
        {"image": "earlier/images.jsonl:0", "box": [8, 0, 16, 16], "seed": 3, "index": 0},
        {"image": "photo.png", "mask": "mask.png", "fit": "pad", "class": "bird", "count": 2},
        {"image": "photo.png", "outpaint": 4, "order": "random", "paste": False, "cfg": 1},
        {"class": None},
    ]
    (folder / "r.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "r.csv").write_text(
        "class,seed,index,image,box,mask,fit,outpaint,order,paste,count,cfg\n"
        "all,5,,,,,,,,,,\n"
        ',3,0,earlier/images.jsonl:0,"8,0,16,16",,,,,,,\n'
        "bird,,,photo.png,,mask.png,pad,,,,2,\n"
        ",,,photo.png,,,,4,random,false,,1\n"
        "none,,,,,,,,,,,\n"
    )
    return folder


def test_each_is_what_it_is_alone(small_bundle: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = [small_bundle, "--requests", folder / "r.jsonl", "--batch", 3]
    said = answer("run", *asked, "--out", out)
    assert said.code == 0, said
    rows = records(out)
    named = [(row["class_id"], row["index"], row.get("image")) for row in rows]
    assert named == [
        *((i, i, None) for i in range(5)),
        (1, 0, "earlier/images.jsonl:0"),
        (3, 6, "photo.png"),
        (3, 7, "photo.png"),
        (None, 8, "photo.png"),
        (None, 9, None),
    ]
    assert [row.get("outpaint") for row in rows if "image" in row] == [None, None, None, 4]
    alone = ["edit", small_bundle, f"{folder}/earlier/images.jsonl:0", "--seed", 3]
    assert answer(*alone, "--box", "8,0,16,16", "--out", tmp_path / "alone").code == 0
    (record,) = records(tmp_path / "alone")
    same = ("class_id", "seed", "index", "token_ids", "kept", "image_sha256", "edit_order", "order")
    assert {name: record[name] for name in same} == {name: rows[5][name] for name in same}
    pixels = [np.asarray(Image.open(out / row["file"])) for row in rows]
    (file,) = (tmp_path / "alone").glob("0*.png")
    np.testing.assert_array_equal(pixels[5], np.asarray(Image.open(file)))
    # The photo's left half, on white above and below, is the same in both; the right one is not.
    np.testing.assert_array_equal(pixels[6][:, :6], pixels[7][:, :6])
    assert (pixels[6][0, :6] == 255).all()
    assert rows[6]["token_ids"] != rows[7]["token_ids"]
    as_csv = [small_bundle, "--requests", folder / "r.csv", "--batch", 3]
    assert answer("run", *as_csv, "--out", tmp_path / "csv").code == 0
    assert content(tmp_path / "csv") == content(out)


@pytest.mark.parametrize("kind", ["png", "tar", "npz"])
def test_resumed_and_in_shards_they_are_the_same(
    small_bundle: Path, folder: Path, tmp_path: Path, kind: str
) -> None:
    asked = [small_bundle, "--requests", folder / "r.jsonl", "--format", kind]
    assert answer("run", *asked, "--out", tmp_path / "whole").code == 0
    whole = content(tmp_path / "whole")
    assert answer("run", *asked, "--out", tmp_path / "cut").code == 0
    path = tmp_path / "cut" / RECORDS
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:7]))
    assert answer("run", *asked, "--batch", 2, "--out", tmp_path / "cut").code == 0
    assert content(tmp_path / "cut") == whole
    for shard in range(3):
        shards = ["--shard", f"{shard}/3", "--out", tmp_path / "shards"]
        assert answer("run", *asked, *shards).code == 0
    assert answer("merge", tmp_path / "shards", "--out", tmp_path / "merged").code == 0
    assert content(tmp_path / "merged") == whole


def test_another_picture_is_another_run(small_bundle: Path, tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
    (tmp_path / "r.jsonl").write_text('{"image": "a.png", "box": [0, 0, 4, 4]}')
    asked = ["run", small_bundle, "--requests", tmp_path / "r.jsonl", "--out", tmp_path / "out"]
    assert answer(*asked).code == 0
    Image.new("RGB", (16, 16), "blue").save(tmp_path / "a.png")
    assert "images.jsonl, line 1: made with image_sha256 " in mistake(*asked)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"image": "/etc/passwd", "outpaint": 4}, "/etc/passwd must be a path inside of "),
        ({"image": "in/../../photo.png", "outpaint": 4}, "photo.png must be a path inside of "),
        ({"image": "../x/images.jsonl:0", "outpaint": 4}, "images.jsonl must be a path inside of"),
        ({"image": "linked.png", "outpaint": 4}, "linked.png is a link that leaves "),
        ({"image": "in/photo.png", "mask": "linked.png"}, "linked.png is a link that leaves "),
        ({"image": "gone.png", "outpaint": 4}, "cannot read the image "),
        ({"image": "in/photo.png", "outpaint": 9}, "outpaint must be from 1 to 4 pixels"),
        ({"image": "in/photo.png", "box": [0, 0, 4, 99]}, "the box 0,0,4,99 is not inside the "),
        ({"image": "in/photo.png"}, "say what is to be made anew, by one of"),
    ],
)
def test_what_a_file_cannot_ask(
    small_bundle: Path, tmp_path: Path, line: dict[str, Any], message: str
) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "photo.png")
    asked = tmp_path / "asked"
    (asked / "in").mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(asked / "in" / "photo.png")
    (asked / "linked.png").symlink_to(tmp_path / "photo.png")
    (asked / "r.jsonl").write_text('{"class": 0}\n' + json.dumps(line))
    out = tmp_path / "out"
    said = mistake("run", small_bundle, "--requests", asked / "r.jsonl", "--out", out)
    assert said.startswith(f"{asked / 'r.jsonl'}, line 2: ")
    assert message in said
    assert not out.exists()
