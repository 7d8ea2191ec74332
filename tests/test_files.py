"""Folders that appear whole or not at all, by one process at a time."""

from __future__ import annotations

import multiprocessing
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from commandline import entries
from lpd_export.errors import UserError
from lpd_export.files import check_writable, exclusive, new_folder

TAKEN = "another process is making it: wait for it to end"


def make(path: Path, happens: Callable[[Path], object], may_replace: bool = True) -> None:
    """Makes a folder with a file `new` in it, and lets something happen before it is whole."""

    def check() -> None:
        if path.exists() and not may_replace:
            raise UserError(f"{path} exists")

    with new_folder(path, taken=TAKEN, check=check) as folder:
        (folder / "new").touch()
        happens(folder)


def nothing(folder: Path) -> None:
    """What happens where all goes well."""


def fail_with(failure: BaseException) -> Callable[[Path], None]:
    def fail(folder: Path) -> None:
        raise failure

    return fail


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """A folder that was there before."""
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").write_text("as it was")
    return path


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a/b/folder"
    during = [".folder.lock", ".folder.partial", ".folder.partial/new"]

    def look(folder: Path) -> None:
        assert entries(path.parent) == during

    make(path, look)
    assert entries(tmp_path) == ["a", "a/b", "a/b/folder", "a/b/folder/new"]


def test_it_takes_the_place_of_an_older_one(tmp_path: Path, older: Path) -> None:
    make(older, lambda folder: (older / "old").read_text())  # it is there meanwhile
    assert entries(tmp_path) == ["folder", "folder/new"]


@pytest.mark.parametrize("failure", [OSError(28, "Full"), UserError("no"), KeyboardInterrupt()])
def test_a_failure_leaves_what_was_there(
    tmp_path: Path, older: Path, failure: BaseException
) -> None:
    expected = UserError if isinstance(failure, OSError) else type(failure)
    for path in (older, tmp_path / "a/b/folder"):
        with pytest.raises(expected):
            make(path, fail_with(failure))
        assert entries(tmp_path) == ["folder", "folder/old"]
    assert (older / "old").read_text() == "as it was"


def test_what_may_not_be_replaced_stays(tmp_path: Path, older: Path) -> None:
    def somebody_writes(folder: Path) -> None:
        (tmp_path / "other").mkdir()
        (tmp_path / "other/mine").touch()

    with pytest.raises(UserError, match="folder exists"):
        make(older, fail_with(AssertionError("it was checked before")), may_replace=False)
    with pytest.raises(UserError, match="other exists"):
        make(tmp_path / "other", somebody_writes, may_replace=False)
    assert entries(tmp_path) == ["folder", "folder/old", "other", "other/mine"]


def test_the_older_one_is_restored_where_the_name_cannot_be_given(
    tmp_path: Path, older: Path
) -> None:
    """Whatever the reason; here there is nothing left to give it to."""
    for path in (older, tmp_path / "a/new"):
        with pytest.raises(UserError, match=f"cannot write {path}: No such file or directory"):
            make(path, shutil.rmtree)
        assert entries(tmp_path) == ["folder", "folder/old"]
    assert (older / "old").read_text() == "as it was"


def test_what_cannot_be_restored_is_told_and_kept(
    tmp_path: Path, older: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that refuses from some moment on."""
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if target == older:
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(UserError) as error:
        make(older, nothing)
    aside = tmp_path / ".folder.replaced"
    assert str(error.value) == (
        f"cannot write {older}: Input/output error; what was there before is in {aside}"
    )
    assert entries(tmp_path) == [".folder.replaced", ".folder.replaced/old"]
    # Where the file system works again, it is put back before anything else.
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"^no$"):
        make(older, fail_with(UserError("no")))
    assert entries(tmp_path) == ["folder", "folder/old"]


def leave(folder: Path, *, replaced: bool, whole: bool) -> None:
    """What a process leaves that is killed while it works, or as it gives the name."""
    partial, aside = (folder.with_name(f".{folder.name}.{n}") for n in ("partial", "replaced"))
    folder.with_name(f".{folder.name}.lock").touch()
    if replaced:
        folder.rename(aside)
    if whole:
        folder.mkdir()
        (folder / "new").touch()
    else:
        (partial / "inside").mkdir(parents=True)


@pytest.mark.parametrize(
    ("replaced", "whole", "left"),
    [(False, False, "old"), (True, False, "old"), (True, True, "new")],
    ids=["before", "between the two renames", "after"],
)
def test_what_a_killed_process_left(
    tmp_path: Path, older: Path, replaced: bool, whole: bool, left: str
) -> None:
    leave(older, replaced=replaced, whole=whole)
    with pytest.raises(UserError, match=r"^no$"):
        make(older, fail_with(UserError("no")))
    assert entries(tmp_path) == ["folder", f"folder/{left}"]
    leave(older, replaced=False, whole=False)
    make(older, nothing)
    assert entries(tmp_path) == ["folder", "folder/new"]


def hold(path: Path, ready: Any) -> None:
    make(path, lambda folder: (ready.set(), time.sleep(600)))


def test_one_process_makes_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=hold, args=(tmp_path / "folder", ready))
    process.start()
    try:
        assert ready.wait(300)
        during = entries(tmp_path)
        with pytest.raises(UserError, match=f"^{TAKEN}$"):
            make(tmp_path / "folder", nothing)
        assert entries(tmp_path) == during
    finally:
        process.kill()
        process.join()
    assert entries(tmp_path) == during
    make(tmp_path / "folder", nothing)
    assert entries(tmp_path) == ["folder", "folder/new"]


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    # NumPy's short write has no error number.
    short = OSError("4096 requested and 12 written")
    with pytest.raises(UserError, match=r"cannot write .*folder: the disk is full \(4096 reque"):
        make(tmp_path / "folder", fail_with(short))
    assert entries(tmp_path) == []


def test_a_lock_is_held_and_then_gone(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    told = []

    def wait_for_it() -> None:
        try:
            with exclusive(lock, TAKEN):
                pass
        except UserError as error:
            told.append(str(error))

    with exclusive(lock, TAKEN):
        other = threading.Thread(target=wait_for_it)
        other.start()
        other.join()
        assert lock.exists()
    assert told == [TAKEN]
    assert entries(tmp_path) == []
    with pytest.raises(FileNotFoundError), exclusive(tmp_path / "gone/lock", TAKEN):
        pytest.fail("there is nothing to lock")


def test_a_read_only_file_system_is_told() -> None:
    """On a file system that is really mounted so, if there is one."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    folders = [Path(mount[1]) for mount in mounts if "ro" in mount[3].split(",")]
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is None:
        pytest.skip("nothing is mounted read-only")
    with pytest.raises(UserError, match=f"^cannot write {folder}/a: read-only file system, as is"):
        check_writable(folder / "a")
