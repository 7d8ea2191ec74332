"""Files and folders that are whole or not there, and what is written into them as JSON."""

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import signal
import stat
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from lpd_export.errors import UserError


def check_file(path: str | os.PathLike[str], what: str, most: int) -> None:
    """Sees that a file can be read whole, before memory is taken for it.

    Raises:
        UserError: `cannot read WHAT PATH: why`, if it is not there, is a device or a pipe (which
            may never end), or has more than `most` bytes.
    """
    try:
        found = Path(path).stat()
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {what} {path}: {reason}") from error
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"cannot read {what} {path}: it is a device or a pipe; give a file")
    if found.st_size > most:
        raise UserError(
            f"cannot read {what} {path}: it has {found.st_size} bytes, and may have {most} at most"
        )


def read_file(path: str | os.PathLike[str], what: str, most: int) -> bytes:
    """The content of a file, if `check_file` lets it be read."""
    check_file(path, what, most)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {what} {path}: {error.strerror or error}") from error


def inside(folder: Path, name: str) -> Path:
    """The file of this name in a folder, which the name may not leave.

    Raises:
        UserError: if it is an absolute path, leads up by `..`, or over a link out of the folder.
    """
    path, there = Path(name), folder.resolve()
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise UserError(f"{name} must be a path inside of {folder}, without ..")
    if not (folder / path).resolve().is_relative_to(there):
        raise UserError(f"{folder / path} is a link that leaves {folder}: put the file there")
    return folder / path


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file whole or not at all: under a temporary name beside it, then renamed.

    Raises UserError if it cannot be written; then nothing is left behind, and a file that was
    there before is untouched.
    """
    path = Path(path)
    temporary = path.parent / f".{uuid.uuid4().hex}.tmp"
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; check that its folder exists and is "
            "writable"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def sync(file: IO[Any]) -> None:
    """Waits until what was written to an open file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def rename_for_good(path: Path, new: Path) -> None:
    """Renames a file that is on the disk, so that a power cut does not bring the old name back."""
    os.replace(path, new)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(new.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def new_folder(path: Path, *, taken: str, check: Callable[[], None]) -> Iterator[Path]:
    """A folder to fill, which takes the name `path` when the block ends well.

    Until then it has a temporary name beside `path`, and a folder that is at `path` stays. If the
    block fails or is interrupted, or the name cannot be given, what was there before is all that
    is left; parents made for the folder are gone too. What a killed process left is put in order by
    the next one.

    Args:
        path: its parents are made if need be.
        taken: the sentence for the user if another process is making the same folder.
        check: raises UserError if what is at `path` may not be replaced. Asked before anything is
            made, when no other process can be at work, and at the end.

    Raises:
        UserError: as `check`, if another process is making it, or if something cannot be written.
    """
    check()
    partial, replaced, lock_file = (
        path.with_name(f".{path.name}.{kind}") for kind in ("partial", "replaced", "lock")
    )
    made = [folder for folder in path.absolute().parents if not os.path.lexists(folder)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(lock_file, taken):
            if os.path.lexists(replaced) and not os.path.lexists(path):
                replaced.rename(path)  # killed between the two renames
            for leftover in (partial, replaced):
                if os.path.lexists(leftover):
                    shutil.rmtree(leftover)
            check()
            try:
                partial.mkdir()
                yield partial
                with uninterrupted():
                    check()
                    _rename(partial, path, replaced)
            finally:
                with uninterrupted():
                    shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        # NumPy reports a short write in its own words.
        reason = error.strerror or f"the disk is full ({error})"
        raise UserError(f"cannot write {path}: {reason}") from error
    finally:
        if not path.exists():
            for folder in made:
                with contextlib.suppress(OSError):  # not empty: another process uses it
                    folder.rmdir()


def _rename(new: Path, path: Path, replaced: Path) -> None:
    """Gives a whole folder its name; an older one is `replaced` until then, and back on failure."""
    older = path.exists()
    if older:
        path.rename(replaced)
    try:
        new.rename(path)
    except OSError as error:
        if older:
            try:
                replaced.rename(path)
            except OSError:
                raise UserError(
                    f"cannot write {path}: {error.strerror}; what was there before is in {replaced}"
                ) from error
        raise
    shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def exclusive(lock_file: Path, taken: str) -> Iterator[None]:
    """Holds a lock file for the block, and removes it at the end.

    Raises:
        UserError: with the sentence `taken`, if another process holds it.
        OSError: if it cannot be written.
    """
    lock_file.touch()  # where it cannot be written, the lock would say that it is taken
    lock = FileLock(lock_file)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(taken) from error
    try:
        yield
    finally:
        with uninterrupted():
            lock_file.unlink(missing_ok=True)
            lock.release()


def check_writable(path: Path) -> None:
    """Raises UserError unless files can be made in the folder `path`, or the folder itself."""
    # os.path.lexists, unlike Path's, takes a name that is too long for one that is not there.
    parent = next(
        folder for folder in (path.absolute(), *path.absolute().parents) if os.path.lexists(folder)
    )
    if not parent.is_dir():
        raise UserError(f"cannot write {path}: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        read_only = os.statvfs(parent).f_flag & os.ST_RDONLY
        why = "read-only file system, as is" if read_only else "no permission to write in"
        raise UserError(f"cannot write {path}: {why} {parent}")


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignores Ctrl-C and a polite kill: cleaning up must not be stopped by a second one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")]
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers if number}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def strict_json(result: Any) -> str:
    """JSON, indented, that every reader takes: what is not a finite number is null.

    What JSON has no word for is told as text.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [plain(entry) for entry in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(result), indent=1, allow_nan=False, default=str)


HASHED_AT_ONCE = 2**23
"""Bytes. After each chunk a thread may have to wait for another one's Python code: with chunks as
small as `hashlib.file_digest` takes, a checksum would wait most of the time."""


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    digest, chunk = hashlib.sha256(), memoryview(bytearray(HASHED_AT_ONCE))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(chunk):
            digest.update(chunk[:size])
    return digest.hexdigest()


def cache_folder() -> Path:
    """Where what can be made again is kept between builds and runs."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "lpd-export"
