"""Bundles: nothing damaged is ever used, and one comes into being whole or not at all."""

import dataclasses
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from commandline import answer, entries, mistake
from lpd_export.bundle.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    SCHEDULE,
    Bundle,
    Manifest,
    check_destination,
    describe_files,
    new_bundle,
)
from lpd_export.errors import UserError
from lpd_export.files import sha256
from lpd_export.runtime.backends import open_executor
from lpd_export.runtime.pipeline import Pipeline
from lpd_export.schedule.schedule_file import Schedule

USED_BY_RUN = (
    MANIFEST,
    SCHEDULE,
    "onnx/weights.data",
    "onnx/decode.onnx",
    "onnx/detokenize.onnx",
    "onnx/tokenize.onnx",
)


@pytest.fixture
def bundle(small_bundle: Path, tmp_path: Path) -> Path:
    """A bundle to damage."""
    return Path(shutil.copytree(small_bundle, tmp_path / "bundle"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def replace_with_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = (Path.unlink, truncate, empty, flip, replace_with_folder)


# -------------------------------------------------------------------------------- what is whole


def test_a_whole_bundle(small_bundle: Path) -> None:
    opened = Bundle.open(small_bundle)
    files = {path.relative_to(small_bundle).as_posix() for path in opened.files()}
    assert files == {path for path in entries(small_bundle) if path not in (MANIFEST, "onnx")}
    assert set(USED_BY_RUN) - {MANIFEST} <= files
    assert opened.schedule().steps == len(opened.manifest.phases) == 4


def test_a_bundle_is_complete_by_itself(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = bundle.rename(tmp_path / "elsewhere")
    monkeypatch.chdir(elsewhere)
    assert answer("run", ".", "--class", "0", "--out", "../images").code == 0
    assert (tmp_path / "images/00000_red-panda.png").is_file()


def test_a_manifest_comes_back_as_it_was(small_bundle: Path) -> None:
    manifest = Bundle.open(small_bundle).manifest
    assert Manifest.from_json(manifest.to_json(), Path("here")) == manifest


# ------------------------------------------------------------------------------------- damages


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", USED_BY_RUN)
def test_run_refuses_a_damaged_file(
    bundle: Path, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    damage(bundle / name)
    said = mistake("run", bundle, "--class", "0", "--out", tmp_path / "images")
    assert str(bundle / name) in said or (name == MANIFEST and str(bundle) in said)
    assert "build" in said  # what to do
    assert not (tmp_path / "images").exists()
    assert mistake("inspect", bundle) == said


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_inspect_finds_a_damaged_phase(bundle: Path, damage: Callable[[Path], None]) -> None:
    damage(bundle / "onnx/phase_02.onnx")
    assert str(bundle / "onnx/phase_02.onnx") in mistake("inspect", bundle, "--json")


def test_each_damage_has_its_sentence(bundle: Path) -> None:
    weights = bundle / "onnx/weights.data"
    size = weights.stat().st_size
    flip(weights)
    altered = "weights.data was altered after it was built"
    assert altered in mistake("inspect", bundle)
    # Its checksum is taken while graphs are loaded: none is there to be used.
    executor = open_executor(Bundle.open(bundle), None, None)
    for _ in range(2):
        with pytest.raises(UserError, match=altered):
            executor.load("decode")
    truncate(weights)
    assert f"weights.data has {size - 1} bytes, where {size} were" in mistake("inspect", bundle)
    weights.unlink()
    assert "weights.data is missing: build the bundle again" in mistake("inspect", bundle)


def edited(bundle: Path, change: Callable[[dict[str, Any]], object]) -> str:
    """What is said of a bundle whose manifest was changed."""
    path = bundle / MANIFEST
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    return mistake("inspect", bundle)


@pytest.mark.parametrize("entry", ["cfg", "class_names", "max_batch", "phases", "files", "model"])
def test_an_entry_taken_out_of_the_manifest(bundle: Path, entry: str) -> None:
    said = edited(bundle, lambda values: values.pop(entry))
    assert said == f"{bundle / MANIFEST} was altered after it was built: build the bundle again"


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.update(cfg=9.5),
        lambda values: values.update(more=1),
        lambda values: values["class_names"][0].append("dog"),
        lambda values: values["model"].update(heads=2),
        lambda values: values["files"][SCHEDULE].update(size=0),
        lambda values: values["phases"].pop(),
    ],
)
def test_an_altered_manifest(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    assert "manifest.json was altered after it was built" in edited(bundle, change)


def test_every_byte_of_the_manifest_counts(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    content = (bundle / MANIFEST).read_bytes()
    for place in range(0, len(content), 41):
        changed = bytearray(content)
        changed[place] ^= 1
        (bundle / MANIFEST).write_bytes(changed)
        try:
            opened = Bundle.open(bundle)
        except UserError as error:
            told = str(error)
        else:
            assert opened.manifest == manifest  # the byte carried nothing
            continue
        assert str(bundle / MANIFEST) in told


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "3",
        '"x"',
        "{}",
        f'{{"format_version": {FORMAT_VERSION}}}',
        "[" * 10**5,
        "\udcff",
    ],
)
def test_what_is_no_manifest(bundle: Path, text: str) -> None:
    (bundle / MANIFEST).write_text(text, encoding="utf-8", errors="surrogateescape")
    said = mistake("inspect", bundle)
    assert str(bundle / MANIFEST) in said
    assert "damaged or is not a bundle's manifest" in said or "it is not text" in said


def test_a_bundle_of_another_format(bundle: Path) -> None:
    now = FORMAT_VERSION
    for version, advice in ((now + 1, "update lpd-export"), (now - 1, "build the bundle again")):
        said = edited(bundle, lambda values, v=version: values.update(format_version=v))
        assert f"has bundle format {version}, this lpd-export reads format {now}: {advice}" in said


def test_a_schedule_of_other_phases(bundle: Path) -> None:
    # Whole by its checksum, but not the one that the manifest's phases come from.
    Schedule.make(4, 5, repulsion=0).save(bundle / SCHEDULE)
    whole = Bundle.open(bundle).manifest
    files = {**whole.files, SCHEDULE: describe_files(bundle)[SCHEDULE]}
    (bundle / MANIFEST).write_text(Manifest(**{**vars(whole), "files": files}).to_json())
    assert "the phases in" in mistake("inspect", bundle)


def test_what_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, message in (
        (tmp_path / "gone", "there is no bundle"),
        (tmp_path / ("a" * 300), "there is no bundle"),
        (tmp_path, "is not a bundle: it has no manifest.json"),
        (tmp_path / "file", "is not a bundle"),
    ):
        for command in (["inspect", path], ["run", path, "--class", "0", "--out", tmp_path / "a"]):
            said = mistake(*command)
            assert message in said
            assert str(path) in said
            assert "`lpd-export build`" in said
    assert entries(tmp_path) == ["file"]


def test_a_snapshot_in_the_hubs_cache_runs(small_bundle: Path, tmp_path: Path) -> None:
    # As huggingface_hub lays it out: every file a link to a blob called by its checksum.
    snapshot, blobs = tmp_path / "snapshots/main", tmp_path / "blobs"
    blobs.mkdir()
    for file in filter(Path.is_file, small_bundle.rglob("*")):
        blob = blobs / sha256(file)
        shutil.copy(file, blob)
        link = snapshot / file.relative_to(small_bundle)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    assert answer("inspect", snapshot).code == 0
    assert answer("run", snapshot, "--class", "0", "--out", tmp_path / "images").code == 0
    assert (tmp_path / "images/00000_red-panda.png").is_file()


def test_weights_that_are_a_link_to_elsewhere(bundle: Path, tmp_path: Path) -> None:
    weights = bundle / "onnx/weights.data"
    weights.rename(tmp_path / "weights.data")
    weights.symlink_to(tmp_path / "weights.data")
    said = mistake("inspect", bundle)
    assert f"{weights} is a symbolic link to {tmp_path / 'weights.data'}" in said
    assert said.endswith("put the file itself in its place")
    assert mistake("run", bundle, "--class", "0", "--out", tmp_path / "images") == said


def test_a_file_that_the_bundle_does_not_hold(small_bundle: Path) -> None:
    with pytest.raises(UserError, match=r"holds no onnx/gone\.onnx: build it again"):
        Bundle.open(small_bundle).file("onnx/gone.onnx")


# ----------------------------------------------------------------------------- how one is made


def fill(folder: Path) -> None:
    (folder / "onnx").mkdir()
    (folder / "onnx/weights.data").write_bytes(b"weights")
    (folder / MANIFEST).write_text("{}")


def fail(out: Path, failure: BaseException, replace: bool = False) -> None:
    with new_bundle(out, replace) as folder:
        fill(folder)
        raise failure


def test_a_bundle_appears_when_it_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "a/b/bundle"
    with new_bundle(out) as folder:
        fill(folder)
        assert folder.parent == out.parent
        assert not out.exists()
    assert entries(out) == [MANIFEST, "onnx", "onnx/weights.data"]
    assert entries(tmp_path)[:3] == ["a", "a/b", "a/b/bundle"]
    assert len(entries(tmp_path)) == 6


def test_replacing_takes_nothing_over_from_the_old_one(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    for name in ("old", "new"):
        with new_bundle(out, replace=True) as folder:
            fill(folder)
            (folder / f"onnx/{name}.onnx").touch()
    assert entries(tmp_path) == [
        "bundle",
        f"bundle/{MANIFEST}",
        "bundle/onnx",
        "bundle/onnx/new.onnx",
        "bundle/onnx/weights.data",
    ]


def make_with_another_there(out: Path) -> None:
    with new_bundle(out) as folder:
        fill(folder)
        out.mkdir()
        (out / "mine").touch()


def test_what_comes_there_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="bundle exists"):
        make_with_another_there(tmp_path / "bundle")
    assert entries(tmp_path) == ["bundle", "bundle/mine"]


def hold(out: Path, ready: Any) -> None:
    with new_bundle(out):
        ready.set()
        time.sleep(60)


def test_a_build_while_the_bundle_is_read(small_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    shutil.copytree(small_bundle, out)
    read = Bundle.open(out)
    read.schedule()
    with Pipeline.open(out, threads=1) as pipeline:
        with new_bundle(out, replace=True) as folder:
            shutil.copytree(small_bundle, folder, dirs_exist_ok=True)
            with open(folder / "onnx/weights.data", "ab") as weights:
                weights.write(b"another")
            (folder / MANIFEST).unlink()
            manifest = dataclasses.replace(read.manifest, cfg=2.5, files=describe_files(folder))
            (folder / MANIFEST).write_text(manifest.to_json())
        before = pipeline.generate([0])[0].pixels
    assert Bundle.open(out).manifest.cfg == 2.5
    with pytest.raises(UserError, match=f"^{out} was replaced or taken away while it was read"):
        read.files()
    with Pipeline.open(small_bundle, threads=1) as pipeline:
        assert (pipeline.generate([0])[0].pixels == before).all()


def test_two_builds_of_the_same_bundle(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=hold, args=(tmp_path / "bundle", ready))
    process.start()
    try:
        assert ready.wait(60)
        during = entries(tmp_path)
        with pytest.raises(UserError, match=r"another build is writing .*bundle: wait for it"):
            fail(tmp_path / "bundle", AssertionError())
        assert entries(tmp_path) == during
    finally:
        process.kill()
        process.join()
    assert entries(tmp_path) == during  # a killed build cannot clean up: the next one does
    with new_bundle(tmp_path / "bundle") as folder:
        fill(folder)
    assert len(entries(tmp_path)) == 4
    assert (tmp_path / "bundle").is_dir()


@pytest.mark.parametrize("replace", [False, True])
def test_destinations_that_cannot_be(
    tmp_path: Path, replace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "extension").mkdir()
    (tmp_path / "extension" / MANIFEST).touch()
    (tmp_path / "extension" / "mine.js").touch()
    before = entries(tmp_path)
    messages = {
        "file": ("file exists", "file exists and is not a bundle: --force"),
        "folder": ("folder exists", "folder exists and is not a bundle: --force"),
        "link": ("link exists", "link is a symbolic link"),
        "extension": ("extension exists", "extension holds mine.js, which is no part of a bundle"),
        "file/a": (f"{tmp_path}/file is not a folder",) * 2,
        "file/a/b": (f"{tmp_path}/file is not a folder",) * 2,
        ".": ("--out . does not name a folder",) * 2,
        "folder/..": ("does not name a folder",) * 2,
    }
    for out, message in messages.items():
        with pytest.raises(UserError) as raised:
            check_destination(Path(out), replace)
        assert message[replace] in str(raised.value)
        with pytest.raises(UserError):
            fail(Path(out), AssertionError(), replace)
    assert entries(tmp_path) == before


def test_a_link_to_a_bundle_is_not_replaced(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(bundle)
    with pytest.raises(UserError, match="link is a symbolic link: give --out the folder"):
        check_destination(tmp_path / "link", replace=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write anywhere")
def test_a_folder_that_is_read_only(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UserError, match=f"no permission to write in {tmp_path}"):
            check_destination(tmp_path / "a/bundle", replace=False)
    finally:
        tmp_path.chmod(0o700)


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(UserError, match=f"no permission to write in {tmp_path}"):
        check_destination(tmp_path / "a/bundle", replace=False)
