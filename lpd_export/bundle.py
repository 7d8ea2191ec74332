"""What a build leaves on disk: a folder that is complete by itself.

Knows the manifest, the files and their checksums, and how a bundle comes into being whole or not
at all. Does not know how its graphs are made or run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lpd_export.errors import UserError
from lpd_export.files import sha256
from lpd_export.schedule import Phase, Schedule, phase_table

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SCHEDULE = "schedule.npz"


@dataclass(frozen=True)
class ModelDescription:
    """The transformer's architecture."""

    dim: int
    depth: int
    heads: int
    head_dim: int
    mlp_dim: int
    grid: int
    num_classes: int
    vocab_size: int


@dataclass(frozen=True)
class TokenizerDescription:
    """The VQ tokenizer's architecture."""

    channels: int
    channel_multipliers: list[int]
    num_res_blocks: int
    z_channels: int
    codebook_size: int
    codebook_dim: int
    stride: int


@dataclass(frozen=True)
class FileDescription:
    """A file of the bundle as it was written."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """manifest.json: all that a runtime must know besides the files themselves."""

    format_version: int
    name: str
    model: ModelDescription
    tokenizer: TokenizerDescription
    resolution: int
    """Pixels of an image's side."""
    precision: str
    backend: str
    backend_version: str
    target_compute_capabilities: list[str]
    max_batch: int | None
    """The largest batch that the graphs take; None is no limit."""
    phases: list[Phase]
    phase_rows: int
    """R of the static phase files."""
    cfg: float
    guidance: str
    class_names: list[list[str]]
    """For each class what it is called, the name to show first; empty if nothing is known."""
    made: dict[str, Any]
    """Versions, sources and settings of the build."""
    files: dict[str, FileDescription]
    """By path relative to the bundle, all but the manifest."""

    @classmethod
    def from_json(cls, text: str, source: Path) -> Manifest:
        """Reads a manifest.

        Raises:
            UserError: if it is of another version, damaged or not a manifest.
        """
        try:
            values = json.loads(text)
            version = values["format_version"]
            if version != FORMAT_VERSION:
                raise UserError(
                    f"{source} has bundle format {version}, this lpd-export reads format "
                    f"{FORMAT_VERSION}: build the bundle again, or use the version that made it"
                )
            values["model"] = ModelDescription(**values["model"])
            values["tokenizer"] = TokenizerDescription(**values["tokenizer"])
            values["phases"] = [Phase(**phase) for phase in values["phases"]]
            values["files"] = {k: FileDescription(**v) for k, v in values["files"].items()}
            return cls(**values)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{source} is damaged or is not a bundle's manifest ({error}): build it again"
            ) from error

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)


class Bundle:
    """An existing bundle.

        bundle = Bundle.open("engines/demo")
        weights = bundle.file("onnx/weights.data")

    Files are verified when they are asked for, so that nothing damaged is ever used.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Opens a bundle and reads its manifest.

        Raises:
            UserError: if there is none, or its manifest is damaged.
        """
        path = Path(path)
        manifest = path / MANIFEST
        if not path.exists():
            raise UserError(f"there is no bundle {path}; `lpd-export build` makes one")
        if not manifest.is_file():
            raise UserError(
                f"{path} is not a bundle: it has no {MANIFEST}; `lpd-export build` makes bundles"
            )
        try:
            text = manifest.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {manifest}: {error}") from error
        return cls(path, Manifest.from_json(text, manifest))

    def file(self, name: str) -> Path:
        """The path of a file, verified.

        Raises:
            UserError: if it is missing, truncated or altered.
        """
        path = self.path / name
        expected = self.manifest.files.get(name)
        if expected is None:
            raise UserError(f"the bundle {self.path} holds no {name}: build it again")
        if not path.is_file():
            raise UserError(f"{path} is missing: build the bundle again")
        try:
            size = path.stat().st_size
            if size != expected.size:
                raise UserError(
                    f"{path} has {size} bytes, where {expected.size} were written: it is truncated "
                    "or altered; build the bundle again"
                )
            if sha256(path) != expected.sha256:
                raise UserError(f"{path} was altered after it was built: build the bundle again")
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        return path

    def files(self) -> list[Path]:
        """All files, verified."""
        return [self.file(name) for name in self.manifest.files]

    def schedule(self) -> Schedule:
        """The bundle's schedule, verified."""
        path = self.file(SCHEDULE)
        schedule = Schedule.load(path)
        schedule.check_grid(self.manifest.model.grid)
        if list(phase_table(schedule.group_sizes)) != self.manifest.phases:
            raise UserError(
                f"the phases in {self.path / MANIFEST} are not those of {path}: the bundle was "
                "altered; build it again"
            )
        return schedule


def describe_files(folder: Path) -> dict[str, FileDescription]:
    """Size and checksum of every file under a folder, by path relative to it."""
    return {
        path.relative_to(folder).as_posix(): FileDescription(path.stat().st_size, sha256(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def check_destination(out: Path, replace: bool) -> None:
    """Sees that a bundle can be written at `out`, before any work is done.

    Raises:
        UserError: if something is there that may not be replaced, or the place is not writable.
    """
    if out.exists() or out.is_symlink():
        if not replace:
            raise UserError(f"{out} exists: choose another --out, or replace it with --force")
        if not (out / MANIFEST).is_file():
            raise UserError(f"{out} exists and is not a bundle: --force replaces bundles alone")
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise UserError(f"cannot write {out}: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {out}: no permission to write in {parent}")


@contextlib.contextmanager
def new_bundle(out: Path, replace: bool = False) -> Iterator[Path]:
    """A folder to write a bundle in, which takes the name `out` when the block ends well.

    Until then it has a temporary name beside `out`; if the block fails or is interrupted it is
    removed, and what a killed build left is removed by the next one.

    Raises:
        UserError: as `check_destination`, or if another build is writing the same bundle.
    """
    check_destination(out, replace)
    partial = out.with_name(f".{out.name}.partial")
    made = [folder for folder in out.absolute().parents if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _locked(partial, out):
            yield partial
            if out.exists():
                replaced = out.with_name(f".{out.name}.replaced")
                shutil.rmtree(replaced, ignore_errors=True)
                out.rename(replaced)
                partial.rename(out)
                shutil.rmtree(replaced)
            else:
                partial.rename(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        if not out.exists():
            for folder in made:
                with contextlib.suppress(OSError):  # not empty: another process uses it
                    folder.rmdir()


@contextlib.contextmanager
def _locked(partial: Path, out: Path) -> Iterator[None]:
    """Holds `partial` as an empty folder of this process alone, and removes it at the end."""
    lock_file = partial.with_suffix(".lock")
    lock = FileLock(lock_file)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"another build is writing {out}: wait for it to end") from error
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        lock_file.unlink(missing_ok=True)
        lock.release()
