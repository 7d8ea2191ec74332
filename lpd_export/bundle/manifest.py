"""What a build leaves on disk: a folder that is complete by itself.

Knows the manifest, the files and their checksums, and how a bundle comes into being whole or not
at all. Does not know how its graphs are made or run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lpd_export.errors import UserError
from lpd_export.files import check_writable, new_folder, sha256
from lpd_export.schedule.schedule import Phase, Schedule, phase_table

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SCHEDULE = "schedule.npz"
GRAPH_NAMES = ("decode", "detokenize", "tokenize")
FOLDERS = ("onnx", "engines")
"""With the two files, all that there may be in a bundle."""
CHECKSUM = "manifest_sha256"
"""The manifest's entry for a checksum of all its other entries."""


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
    float_type: str
    """Of the graphs' float inputs and outputs, as torch names it."""
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
    calibration: dict[str, Any]
    """What was measured and decided of a precision other than fp32."""
    engines: dict[str, dict[str, Any]]
    """What each TensorRT engine is, by graph."""
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
            if values.pop(CHECKSUM) != _checksum(values):
                raise UserError(f"{source} was altered after it was built: build the bundle again")
            values["model"] = ModelDescription(**values["model"])
            values["tokenizer"] = TokenizerDescription(**values["tokenizer"])
            values["phases"] = [Phase(**phase) for phase in values["phases"]]
            values["files"] = {k: FileDescription(**v) for k, v in values["files"].items()}
            return cls(**values)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{source} is damaged or is not a bundle's manifest: build the bundle again"
            ) from error

    def buffer_bytes(self, batch: int) -> int:
        """What caches and logits of a batch take at run time, guidance included."""
        model = self.model
        size = 4 if self.float_type == "float32" else 2
        caches = 2 * model.depth * model.heads * (model.grid**2 + 1) * model.head_dim * size
        logits = 4 * max(phase.queries for phase in self.phases) * model.vocab_size
        return 2 * batch * (caches + logits)

    def to_json(self) -> str:
        values = dataclasses.asdict(self)
        return json.dumps({CHECKSUM: _checksum(values)} | values, indent=1)


def _checksum(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


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
        if not os.path.lexists(path):
            raise UserError(f"there is no bundle {path}; `lpd-export build` makes one")
        if not manifest.is_file():
            raise UserError(
                f"{path} is not a bundle: it has no {MANIFEST}; `lpd-export build` makes bundles"
            )
        try:
            text = manifest.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise UserError(f"cannot read {manifest}: {reason}") from error
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
    if out.name in ("", ".."):
        raise UserError(f"--out {out} does not name a folder: give the name that the bundle gets")
    # os.path.lexists, unlike Path's, takes a name that is too long for one that is not there.
    if os.path.lexists(out):
        if not replace:
            raise UserError(f"{out} exists: choose another --out, or replace it with --force")
        if out.is_symlink():
            raise UserError(f"{out} is a symbolic link: give --out the folder that it leads to")
        if not (out / MANIFEST).is_file():
            raise UserError(f"{out} exists and is not a bundle: --force replaces bundles alone")
        # Many programs call a file manifest.json; nothing that is not a build's may be lost.
        foreign = {path.name for path in out.iterdir()} - {MANIFEST, SCHEDULE, *FOLDERS}
        if foreign:
            raise UserError(
                f"{out} holds {min(foreign)}, which is no part of a bundle: move it away, or "
                "choose another --out"
            )
    check_writable(out.parent)


def new_bundle(out: Path, replace: bool = False) -> AbstractContextManager[Path]:
    """A folder to write a bundle in, which takes the name `out` when the block ends well.

    If the block fails or is interrupted, an older bundle stays and nothing else does.

    Raises:
        UserError: as `check_destination`, or if another build is writing the same bundle.
    """
    return new_folder(
        out,
        taken=f"another build is writing {out}: wait for it to end",
        check=partial(check_destination, out, replace),
    )
