"""The files of a run, killed wherever it touches them: what is there afterwards, and in the end."""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from commandline import answer, mistake
from lpd_export.bulk.containers import container
from lpd_export.bulk.folder import FAILURES, ImageFolder, Made
from lpd_export.bulk.plan import Plan, make_plan
from lpd_export.bundle.manifest import Bundle
from lpd_export.run_request import RECORDS, ImageFormat, RunRequest

pytestmark = pytest.mark.model

FORMATS: tuple[ImageFormat, ...] = ("png", "tar", "npz")
SIDE, PER_FILE, BATCH = 16, 5, 2
FAILING = {3, 9, 10}
KILLED = 137


@pytest.fixture(scope="module")
def plan(small_bundle: Path) -> Plan:
    """Of 12 images."""
    request = RunRequest(small_bundle, ["all", "none"], Path("unused"), count=2)
    return make_plan(request, Bundle.open(small_bundle))


def made(plan: Plan, position: int, failing: bool) -> Made:
    """An image as it would be made, but at once."""
    if failing and position in FAILING:
        return Made(position, None, [], {"step": 2, "phase": 1, "error": "broken"})
    random = np.random.default_rng(position)
    pixels = random.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    return Made(position, pixels, random.integers(0, 64, 16).tolist())


def store(out: Path, plan: Plan, kind: ImageFormat, failing: bool) -> None:
    """A run as `lpd_export.run` stores it."""
    out.mkdir(exist_ok=True)
    files = container(kind, out, SIDE, plan.images, PER_FILE)
    folder = ImageFolder(out, plan, np.arange(plan.images), files, keep_going=True)
    missing = folder.missing.tolist()
    folder.restore()
    for start in range(0, len(missing), BATCH):
        batch = [made(plan, position, failing) for position in missing[start : start + BATCH]]
        folder.add([folder.encoded(image) for image in batch])
    folder.finish()


def content(out: Path) -> dict[str, str]:
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in out.rglob("*")
        if path.is_file()
    }


def killed_at(number: int, work: Callable[[], None]) -> bool:
    """Does the work in a process that is killed when it touches a file the so many-th time.

    What it was writing then is on the disk by half. Whether it was killed, or got to its end.
    """
    if child := os.fork():
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, KILLED)
        return status == KILLED
    touched, sizes, fsync = 0, {}, os.fsync

    def touch() -> None:
        nonlocal touched
        touched += 1
        if touched == number:
            os._exit(KILLED)

    def half(descriptor: int) -> None:
        state = os.fstat(descriptor)
        before = sizes.get(state.st_ino, 0)
        if touched + 1 == number and state.st_size > before:
            os.ftruncate(descriptor, (before + state.st_size) // 2)
        touch()
        fsync(descriptor)
        sizes[state.st_ino] = state.st_size

    def heard(event: str, _: object) -> None:
        if event in ("open", "os.rename", "os.remove", "os.truncate", "os.mkdir"):
            touch()

    try:
        os.fsync = half
        sys.addaudithook(heard)
        work()
        os._exit(0)
    except BaseException as error:
        os.write(2, repr(error).encode())
    os._exit(1)


@pytest.mark.parametrize("kind", FORMATS)
def test_killed_wherever_it_touches_a_file_it_ends_with_the_same_bytes(
    plan: Plan, tmp_path: Path, kind: ImageFormat
) -> None:
    store(tmp_path / "whole", plan, kind, failing=True)
    whole = content(tmp_path / "whole")
    number = 0
    while True:
        number += 1
        out = tmp_path / str(number)
        killed = killed_at(number, lambda out=out: store(out, plan, kind, True))
        if killed:
            # Killed again while it repairs, and only then left alone.
            killed_at(number % 17 + 1, lambda out=out: store(out, plan, kind, True))
            store(out, plan, kind, True)
        assert content(out) == whole, number
        store(out, plan, kind, True)
        assert content(out) == whole
        if not killed:
            break
    assert number > 25


@pytest.mark.parametrize("kind", FORMATS)
def test_what_others_read(plan: Plan, tmp_path: Path, kind: ImageFormat) -> None:
    store(tmp_path, plan, kind, failing=True)
    there = [position for position in range(12) if position not in FAILING]
    images = [made(plan, position, True) for position in there]
    lines = (tmp_path / RECORDS).read_text().splitlines()
    assert [json.loads(line)["position"] for line in lines] == there
    failures = [json.loads(line) for line in (tmp_path / FAILURES).read_text().splitlines()]
    assert [failure["position"] for failure in failures] == sorted(FAILING)
    assert failures[0] == {
        **{"position": 3, "index": 3, "seed": 0, "class_id": 3, "class_name": "Crane"},
        **{"step": 2, "phase": 1, "error": "broken"},
    }
    if kind == "npz":
        with zipfile.ZipFile(tmp_path / "images.npz") as archive:
            assert archive.testzip() is None
            (member,) = archive.infolist()
            assert member.compress_type == zipfile.ZIP_STORED
        with np.load(tmp_path / "images.npz") as arrays:
            assert list(arrays) == ["arr_0"]
            assert np.array_equal(arrays["arr_0"], np.stack([image.content for image in images]))
        return
    names = [json.loads(line)["file"] for line in lines]
    if kind == "png":
        assert names[4] == "00001/00005_none.png"
        found = [np.asarray(Image.open(tmp_path / name)) for name in names]
    else:
        assert names[4] == "00001.tar/00005.png"
        found = []
        for shard in ("00000.tar", "00001.tar", "00002.tar"):
            with tarfile.open(tmp_path / shard) as tar:
                members = tar.getmembers()
                assert all(member.mtime == 0 == member.uid for member in members)
                assert [member.name for member in members[::2]] == [
                    name.split("/")[1] for name in names if name.startswith(shard)
                ]
                for image, record in zip(members[::2], members[1::2], strict=True):
                    assert record.name == image.name.replace("png", "json")
                    assert tar.extractfile(record).read().decode() == lines[len(found)]
                    data = tar.extractfile(image).read()
                    found.append(np.asarray(Image.open(io.BytesIO(data))))
    assert np.array_equal(np.stack(found), np.stack([image.content for image in images]))


def test_a_file_that_others_damaged_is_made_again(plan: Plan, tmp_path: Path) -> None:
    for kind, damage in (
        ("png", lambda out: (out / "00001/00006_red-panda.png").unlink()),
        ("tar", lambda out: (out / "00001.tar").unlink()),
        ("tar", lambda out: os.truncate(out / "00001.tar", 3000)),
        ("npz", lambda out: os.truncate(out / "images.npz", 3000)),
        ("npz", lambda out: (out / RECORDS).write_text("")),
    ):
        out = tmp_path / kind
        store(out, plan, kind, failing=False)
        whole = content(out)
        damage(out)
        assert content(out) != whole
        store(out, plan, kind, failing=False)
        assert content(out) == whole


# ---------------------------------------------------------------------------- on the command line


@pytest.mark.parametrize("kind", FORMATS)
def test_requests_of_all_kinds_share_batches(small_bundle: Path, tmp_path: Path, kind: str) -> None:
    lines = [
        {"class": "all", "count": 2, "seed": 5},
        {"class": "bird", "seed": 9, "index": 40, "count": 3, "cfg": 1},
        {"class": None, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "guidance": "constant"},
    ]
    requests = tmp_path / "r.jsonl"
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out"
    options = ["--requests", requests, "--cfg", 2, "--format", kind, "--per-file", 4]
    said = answer("run", small_bundle, "--out", out, *options, "--batch", 3, "--json")
    assert said.code == 0, said
    rows = [json.loads(line) for line in (out / RECORDS).read_text().splitlines()]
    assert json.loads(said.out)["images"] == [
        {key: value for key, value in row.items() if key != "token_ids"} for row in rows
    ]
    keys = ("position", "index", "seed", "class_id", "cfg", "guidance", "temperature", "top_k")
    assert [[row[key] for key in keys] for row in rows] == [
        *([i, i, 5, i % 5, 2, "linear", 1, None] for i in range(10)),
        *([10 + i, 40 + i, 9, 3, 1, "linear", 1, None] for i in range(3)),
        [13, 13, 0, None, 2, "constant", 0.5, 3],
    ]
    # Each is what it is alone.
    alone = ["--class", "all", "-n", 2, "--seed", 5, "--cfg", 2]
    assert answer("run", small_bundle, "--out", tmp_path / "alone", *alone).code == 0
    for line, row in zip((tmp_path / "alone" / RECORDS).open(), rows, strict=False):
        assert json.loads(line)["token_ids"] == row["token_ids"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--requests r.jsonl --class 0",
            "--requests says what to draw and how often: leave out -",
        ),
        ("--requests r.jsonl -n 2", "--requests says what to draw and how often: leave out -n"),
        ("--requests r.jsonl", "there is no class 'ice-crem'; did you mean 'ice-cream' (1)"),
        ("--requests many.csv", "many.csv asks for 1000001 images, a run makes 1000000 at most"),
        ("--requests far.csv", "the image's index must be a whole number from 0 to 2^64 - 1, but"),
        ("--class 0 --format tar --trace", "--trace draws beside PNGs, not into a .tar: leave out"),
        ("--class 0 --per-file 0", "--per-file must be a whole number from 1 to"),
    ],
)
def test_what_cannot_be_asked(
    small_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.jsonl").write_text('{"class": "ice-crem"}')
    Path("many.csv").write_text("class,count\n0,1000000\n1,1\n")
    Path("far.csv").write_text(f"class,count,index\n0,2,{2**64 - 1}\n")
    assert message in mistake("run", small_bundle, *options.split(), "--out", "a")
    assert not Path("a").exists()


def test_another_format_is_another_run(small_bundle: Path, tmp_path: Path) -> None:
    assert answer("run", small_bundle, "--class", "0", "--out", tmp_path / "a").code == 0
    said = mistake("run", small_bundle, "--class", "0", "--format", "tar", "--out", tmp_path / "a")
    assert "made with file '00000_red-panda.png', this run has '00000.tar/00000.png'" in said
