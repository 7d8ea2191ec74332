"""What a build leaves on disk: a folder that is complete by itself.

Knows the manifest, the files and their checksums, and how a bundle comes into being whole or not
at all. Does not know how its graphs are made or run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from math import prod
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, NotRequired

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
    with_config,
)
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from lpd_export.bounds import UNPRINTABLE, Cfg, Digest, GuidanceSchedule
from lpd_export.errors import UserError
from lpd_export.files import check_writable, new_folder, read_file, sha256
from lpd_export.formats import BACKENDS, FLOAT_TYPES, PRECISIONS
from lpd_export.graphs import contract
from lpd_export.schedule.phases import Phase, phase_table
from lpd_export.schedule.schedule_file import Schedule

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
SCHEDULE = "schedule.npz"
GRAPH_NAMES = ("decode", "detokenize", "tokenize")
FOLDERS = ("onnx", "engines")
"""With the two files, all that there may be in a bundle."""
MOST_BYTES = 2**26
"""Of a manifest: that of the largest published model has a quarter of a megabyte."""
CHECKSUM = "manifest_sha256"
"""The manifest's entry for a checksum of all its other entries."""


GraphName = Annotated[str, Field(pattern=f"^({'|'.join(GRAPH_NAMES)})$")]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=2**20)]
"""Of things that a model is made of: layers, channels, cells, classes, tokens."""


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or str(path) != name or set(name) & set("\0\\:"):
        raise PydanticCustomError("path", "it must be a path inside the bundle")
    return name


BundlePath = Annotated[str, Field(min_length=1), AfterValidator(_inside)]
"""Relative to the bundle, with `/`; never leads out of it."""

# What an entry is not declared to be is refused, never converted.
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


# Of a record only the declared keys are read; others are kept as they are.
RECORD = ConfigDict(strict=True, extra="allow")


@dataclass(frozen=True, config=STRICT)
class ModelDescription:
    """The transformer's architecture, for all that follows from it without its weights.

    `build` makes it of the reference's configuration; bundles, buffers and reports read it alone.
    """

    dim: Count
    depth: Annotated[int, Field(ge=1, le=1024)]
    heads: Count
    head_dim: Count
    mlp_dim: Count
    grid: Annotated[int, Field(ge=1, le=1024)]
    num_classes: Count
    vocab_size: Count

    @property
    def cells(self) -> int:
        """S, the cells of the grid and so the tokens of an image."""
        return self.grid * self.grid

    def condition_id(self, label: int | None) -> int:
        """The token id of a class, or of the null condition."""
        return self.vocab_size + (self.num_classes if label is None else label)


@dataclass(frozen=True, config=STRICT)
class TokenizerDescription:
    """The VQ tokenizer's architecture."""

    channels: Count
    channel_multipliers: Annotated[list[Count], Field(min_length=1, max_length=16)]
    num_res_blocks: Count
    z_channels: Count
    codebook_size: Count
    codebook_dim: Count
    stride: Count


@dataclass(frozen=True, config=STRICT)
class FileDescription:
    """A file of the bundle as it was written."""

    size: Annotated[int, Field(ge=0, lt=2**63)]
    sha256: Digest


@with_config(RECORD)
class Origin(TypedDict):
    """A file of weights that a bundle was made from."""

    source: str
    sha256: Digest


Versions = TypedDict(
    "Versions",
    {"lpd-export": str, "python": str, "torch": str, "onnx": str, "onnxruntime": str},
)
"""What took part in a build."""


@with_config(RECORD)
class Made(TypedDict):
    """Versions, sources and settings of a build."""

    time: str
    checkpoint: Origin | None
    tokenizer: Origin | None
    random_weights_seed: int | None
    versions: Versions


@with_config(RECORD)
class LargestValue(TypedDict):
    """The value of a graph that comes nearest to overflow."""

    value: str
    magnitude: float


@with_config(RECORD)
class QuantizationDecision(TypedDict):
    """How many layers of a graph could be quantized, those that are not, and by what measure."""

    layers: int
    kept: dict[str, float]
    measure: str
    value: float
    limit: float
    trials: NotRequired[Sequence[Annotated[Sequence[Finite], Field(min_length=2, max_length=2)]]]
    """Pairs: how many layers are kept, and the measure then."""
    kept_as: NotRequired[str]
    """What the weights of kept layers are stored as, if not as they are."""


@with_config(RECORD)
class CalibrationRecord(TypedDict):
    """What was measured and decided of a precision other than FP32, by graph."""

    largest_values: NotRequired[dict[GraphName, LargestValue]]
    quantization: NotRequired[dict[GraphName, QuantizationDecision]]


@with_config(RECORD)
class EngineRecord(TypedDict):
    """What TensorRT made of a graph."""

    backend: str
    backend_version: str
    size: int
    engine_layers: int
    cache_updates: int
    copied_caches: Sequence[str]
    convolutions: int
    integer_convolutions: int
    attentions: int
    decomposable_attentions: int
    tensors: dict[str, str]
    optimization_profiles: list[
        dict[str, Annotated[Sequence[int], Field(min_length=3, max_length=3)]]
    ]


@dataclass(frozen=True, config=STRICT)
class Manifest:
    """manifest.json: all that a runtime must know besides the files themselves."""

    format_version: int
    name: str
    model: ModelDescription
    tokenizer: TokenizerDescription
    resolution: Count
    """Pixels of an image's side."""
    precision: Annotated[str, Field(pattern=f"^({'|'.join(PRECISIONS)})$")]
    float_type: Annotated[str, Field(pattern=f"^({'|'.join(FLOAT_TYPES)})$")]
    """Of the graphs' float inputs and outputs, as torch names it."""
    backend: Annotated[str, Field(pattern=f"^({'|'.join(BACKENDS)})$")]
    backend_version: str
    target_compute_capabilities: list[str]
    max_batch: Count | None
    """The largest batch that the graphs take; None is no limit."""
    phases: list[Phase]
    phase_rows: Annotated[int, Field(ge=1, le=2)]
    """R of the static phase files."""
    cfg: Cfg
    guidance: GuidanceSchedule
    calibration: CalibrationRecord
    engines: dict[str, EngineRecord]
    """By graph."""
    class_names: list[Annotated[list[str], Field(min_length=1)]]
    """For each class what it is called, the name to show first; empty if nothing is known."""
    made: Made
    files: dict[BundlePath, FileDescription]
    """By path relative to the bundle, all but the manifest."""

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Manifest:
        model, tokenizer = self.model, self.tokenizer
        queries = [phase.queries for phase in self.phases]
        for what, agrees in (
            (
                "model.heads times model.head_dim is model.dim",
                model.heads * model.head_dim == model.dim,
            ),
            (
                "model.vocab_size is tokenizer.codebook_size",
                model.vocab_size == tokenizer.codebook_size,
            ),
            (
                "resolution is model.grid times tokenizer.stride",
                self.resolution == model.grid * tokenizer.stride,
            ),
            (
                "the queries of the phases sum to the cells of the grid",
                min(queries, default=0) >= 1 and sum(queries) == model.cells,
            ),
            ("the phases follow from their queries", self.phases == list(phase_table(queries))),
            (
                "class_names has an entry for each class, or none",
                len(self.class_names) in (0, model.num_classes),
            ),
        ):
            if not agrees:
                raise PydanticCustomError("agreement", "it is not so that {what}", {"what": what})
        return self

    @classmethod
    def from_json(cls, text: str, source: Path) -> Manifest:
        """Reads a manifest.

        Raises:
            UserError: if it is of another version, damaged or not a manifest; the sentence names
                the first entry that is wrong.
        """
        try:
            values = json.loads(text)
            version = values["format_version"]
            if version != FORMAT_VERSION:
                newer = type(version) is int and version > FORMAT_VERSION
                advice = "update lpd-export" if newer else "build the bundle again"
                raise UserError(
                    f"{source} has bundle format {str(version)[:20]}, this lpd-export reads format "
                    f"{FORMAT_VERSION}: {advice}, or use the version that made it"
                )
            if values.pop(CHECKSUM) != checksum(values):
                raise UserError(f"{source} was altered after it was built: build the bundle again")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{source} is damaged or is not a bundle's manifest: build the bundle again"
            ) from error
        for text in _texts(values):
            if UNPRINTABLE.search(text):
                raise UserError(
                    f"{source} holds control characters, which no build writes: {text[:80]!a}; do "
                    "not use this bundle"
                )
        try:
            return TypeAdapter(cls).validate_json(json.dumps(values))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            entry = ".".join(map(str, first["loc"]))
            raise UserError(
                f"{source} is no manifest of bundle format {FORMAT_VERSION}"
                f"{f', by its entry {entry!a}' if entry else ''}: {first['msg']}; build the bundle "
                "again"
            ) from error

    @property
    def cache_shape(self) -> tuple[int, ...]:
        """Of one row's keys or values, as the graphs have them."""
        model, fused = self.model, BACKENDS[self.backend].fuses_attention
        return contract.cache_shape(model.heads, model.cells, model.head_dim, fused)

    def buffer_bytes(self, batch: int) -> int:
        """What caches and logits of a batch take at run time, guidance included."""
        model = self.model
        size = FLOAT_TYPES[self.float_type].size
        caches = 2 * model.depth * prod(self.cache_shape) * size
        logits = 4 * max(phase.queries for phase in self.phases) * model.vocab_size
        return 2 * batch * (caches + logits)

    def to_json(self) -> str:
        values = dataclasses.asdict(self)
        return json.dumps({CHECKSUM: checksum(values)} | values, indent=1)


def _texts(value: Any) -> Iterator[str]:
    """All keys and texts of what JSON holds."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        value = value.values()
    if isinstance(value, Iterable) and not isinstance(value, str):
        for entry in value:
            yield from _texts(entry)


def checksum(values: dict[str, Any]) -> str:
    """Of a manifest, without the entry that holds it."""
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
            text = read_file(manifest, "the manifest", MOST_BYTES).decode()
        except UnicodeDecodeError as error:
            raise UserError(f"cannot read {manifest}: it is not text") from error
        return cls(path, Manifest.from_json(text, manifest))

    def file(self, name: str) -> Path:
        """The path of a file, verified.

        Raises:
            UserError: if it is missing, truncated or altered, or the bundle was replaced meanwhile.
        """
        try:
            self.verify_meanwhile(name)()
        except UserError as error:
            try:
                Bundle.open(self.path).check_is(self.manifest)
            except UserError:
                raise self._replaced() from error
            raise
        return self.path / name

    def check_is(self, manifest: Manifest) -> None:
        """Raises UserError unless this is the bundle of a manifest that was read before."""
        if self.manifest != manifest:
            raise self._replaced()

    def _replaced(self) -> UserError:
        return UserError(f"{self.path} was replaced or taken away while it was read: start again")

    def verify_meanwhile(self, name: str) -> Callable[[], None]:
        """Starts to verify a file in a thread; the call that is returned waits for the end.

        Raises:
            UserError: if it is missing or truncated; from the call, if it is altered.
        """
        path = self.path / name
        expected = self.manifest.files.get(name)
        if expected is None:
            raise UserError(f"the bundle {self.path} holds no {name}: build it again")
        if not path.is_file():
            raise UserError(f"{path} is missing: build the bundle again")
        self._check_link(path)
        try:
            size = path.stat().st_size
            if size != expected.size:
                raise UserError(
                    f"{path} has {size} bytes, where {expected.size} were written: it is truncated "
                    "or altered; build the bundle again"
                )
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        pool = ThreadPoolExecutor(1)
        found = pool.submit(sha256, path)
        pool.shutdown(wait=False)

        def verified() -> None:
            try:
                content = found.result()
            except OSError as error:
                raise UserError(f"cannot read {path}: {error.strerror}") from error
            if content != expected.sha256:
                raise UserError(f"{path} was altered after it was built: build the bundle again")

        return verified

    def _check_link(self, path: Path) -> None:
        """Raises UserError for a symbolic link, unless the bundle is a snapshot in the hub's cache.

        There every file is a link into the folder `blobs` of its repository.
        """
        folder, target = self.path.resolve(), path.resolve()
        in_cache = (
            folder.parent.name == "snapshots" and target.parent == folder.parents[1] / "blobs"
        )
        if target != folder / path.relative_to(self.path) and not in_cache:
            raise UserError(
                f"{path} is a symbolic link to {target}: a bundle is read from its own folder "
                "alone; put the file itself in its place"
            )

    def graph(self, name: str) -> Path:
        """The path of an ONNX file, verified, all that it refers to included.

        Raises:
            UserError: as `file`, or if its weights are in a file that is not one of the bundle's.
        """
        from lpd_export.bundle.graph_file import check_graph_file

        path = self.file(name)
        folder = PurePosixPath(name).parent
        here = [PurePosixPath(file) for file in self.manifest.files]
        check_graph_file(path, {file.name for file in here if file.parent == folder})
        return path

    def files(self) -> list[Path]:
        """All files, verified."""
        return [
            self.graph(name) if name.endswith(".onnx") else self.file(name)
            for name in self.manifest.files
        ]

    def check_nothing_else(self) -> None:
        """Raises UserError for a file in the folder that the manifest does not name."""
        for path in sorted(self.path.rglob("*")):
            name = path.relative_to(self.path).as_posix()
            if (path.is_symlink() or not path.is_dir()) and name not in (
                MANIFEST,
                *self.manifest.files,
            ):
                raise UserError(
                    f"{self.path} holds {name}, which its manifest does not name: take it away, or "
                    "do not use this bundle"
                )

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
