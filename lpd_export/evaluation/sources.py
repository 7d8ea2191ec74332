"""Where the images come from: a bundle that generates them, a folder, tar shards, or an `.npz`.

A source gives its images in chunks, one after another, and holds no more than one of them. What a
chunk's images follow from is its key, so that what was seen of them once can be found again. Does
not know what sees the images.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lpd_export.bundle.manifest import MANIFEST, Bundle
from lpd_export.errors import UserError
from lpd_export.evaluation.statistics import IMAGES, LABELS, entries, load_arrays, read_header
from lpd_export.files import sha256
from lpd_export.pictures import read_picture
from lpd_export.run_request import RECORDS
from lpd_export.runtime.pipeline import Pipeline
from lpd_export.runtime.requests import ImageRequest
from lpd_export.runtime.sampler import Sampling
from lpd_export.schedule.schedule_file import Schedule

Pixels = NDArray[np.uint8]
Label = int | None

CHUNK = 50
"""Images held at once, and seen between two savings; more only if a batch is larger."""
MOST_HELD = 2**28
"""Bytes of the images of an array that are held at once, however few of them these are."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
MAX_SIDE, MAX_COUNT = 8192, 10_000_000
"""Of the images in an array; more is damage."""
MAX_MEMBER = 2**28
"""Bytes of an image in a tar."""


class Chunk(NamedTuple):
    """Some images of a source, one after another."""

    key: str
    """A hash of all that they follow from."""
    labels: list[Label]
    """The classes that were asked for, None where that is not known."""
    pixels: Callable[[], Pixels]
    """[N, H, W, 3] uint8."""


class Source(Protocol):
    """Images of one size."""

    name: str
    count: int
    side: int | None
    """Of its images in pixels, where that is known before they are read."""
    class_names: tuple[str, ...]
    """What its labels mean, where it is known."""

    def chunks(self) -> Iterator[Chunk]:
        """All images, in order."""


def open_images(path: Path) -> Source:
    """The images of a folder or an `.npz`.

    Raises:
        UserError: if there are none.
    """
    if path.is_dir():
        lines = read_records(path / RECORDS) if (path / RECORDS).is_file() else {}
        # Of the folder itself: a record leads nowhere else.
        arrays = [name for name in lines if name.endswith(".npz") and Path(name).name == name]
        if arrays:
            return NpzImages(path / arrays[0], lines[arrays[0]])
        return FolderImages(path, {name: labels[-1] for name, labels in lines.items()})
    if path.suffix == ".npz":
        return NpzImages(path)
    if not path.exists():
        raise UserError(
            f"there is no {path}: give a bundle, a folder of images, or an .npz of them"
        )
    raise UserError(f"{path} is not a bundle, a folder of images, or an .npz of them")


def read_records(path: Path) -> dict[str, list[Label]]:
    """Of each file that a run recorded, the class of each image in it."""
    found: dict[str, list[Label]] = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                name, label = record["file"], record["class_id"]
                if type(name) is not str or type(label) not in (int, type(None)):
                    raise ValueError("its file is no text, or its class no number")
                found.setdefault(name, []).append(label)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise UserError(
                    f"{path}, line {number}: not a record of `lpd-export run`; move the file away "
                    "to have the images taken without it"
                ) from error
    return found


class FolderImages:
    """Every picture under a folder and in its .tar files; of a run's folder, what it recorded."""

    side: int | None = None
    class_names: tuple[str, ...] = ()

    def __init__(self, folder: Path, labels: dict[str, Label]) -> None:
        self.name, self._folder, self._labels = str(folder), folder, labels
        self._files = sorted(
            path
            for path in folder.rglob("*")
            if path.suffix.lower() in (*SUFFIXES, ".tar") and not path.name.startswith(".")
        )
        self.count = sum(1 for _ in self._pictures())
        if not self.count:
            raise UserError(f"{folder} holds no images: {', '.join(SUFFIXES)} or .tar of them")
        if labels and self.count != len(labels):
            raise UserError(
                f"{folder} holds {self.count} of the {len(labels)} images that its {RECORDS} "
                "records: run the command that makes them to its end"
            )

    def _pictures(self) -> Iterator[tuple[str, Callable[[], Image.Image]]]:
        """The name of each image in the folder, and what reads it while its tar is open."""
        for path in self._files:
            name = path.relative_to(self._folder).as_posix()
            if path.suffix != ".tar":
                if not self._labels or name in self._labels:
                    yield name, lambda path=path: read_picture(path)  # type: ignore[misc]
                continue
            try:
                with tarfile.open(path, "r:") as tar:
                    for member in tar:
                        inside = f"{name}/{member.name}"
                        if not member.isfile() or not inside.lower().endswith(SUFFIXES):
                            continue
                        if self._labels and inside not in self._labels:
                            continue
                        yield inside, lambda tar=tar, member=member: _member(tar, member)  # type: ignore[misc]
            except tarfile.TarError as error:
                raise UserError(f"{path} is not a tar, or is damaged: {error}") from error

    def chunks(self) -> Iterator[Chunk]:
        first, size = "", (0, 0)
        names: list[str] = []
        some: list[Pixels] = []
        for name, read in self._pictures():
            picture = read()
            first, size = first or name, size if first else picture.size
            if picture.size != size:
                raise UserError(
                    f"{self._folder / name} is {_size(picture.size)} pixels, where "
                    f"{self._folder / first} is {_size(size)}: images must be of one size"
                )
            names.append(name)
            some.append(np.asarray(picture))
            if len(names) == CHUNK:
                yield _of_pixels(np.stack(some), [self._labels.get(name) for name in names])
                names, some = [], []
        if names:
            yield _of_pixels(np.stack(some), [self._labels.get(name) for name in names])


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Image.Image:
    """A picture in a tar."""
    name = f"{tar.name!s}/{member.name}"
    if member.size > MAX_MEMBER:
        raise UserError(f"{name} has {member.size} bytes: that is no image")
    file = tar.extractfile(member)
    assert file is not None  # of a file
    content = io.BytesIO(file.read())
    content.name = name  # for the sentence of what cannot be read
    return read_picture(content)


def _of_pixels(pixels: Pixels, labels: list[Label]) -> Chunk:
    key = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()
    return Chunk(key, labels, lambda: pixels)


class NpzImages:
    """`arr_0` uint8 [N, H, W, 3] of an `.npz`, read as it goes by; labels [N] may be `arr_1`."""

    class_names: tuple[str, ...] = ()

    def __init__(self, path: Path, labels: Sequence[Label] | None = None) -> None:
        self.name, self._path = str(path), path
        found = entries(path)
        if IMAGES not in found:
            raise UserError(
                f"{path} holds {', '.join(sorted(found)) or 'nothing'}, not images ({IMAGES}, "
                "uint8 [N, H, W, 3])"
            )
        self._shape, dtype = found[IMAGES]
        if (
            len(self._shape) != 4
            or self._shape[3] != 3
            or dtype != np.uint8
            or not all(1 <= side <= MAX_SIDE for side in self._shape[1:3])
            or not 1 <= self._shape[0] <= MAX_COUNT
        ):
            raise UserError(
                f"{path} holds {IMAGES} as {dtype} {list(self._shape)}, which are not images, "
                f"uint8 [N, H, W, 3] of at most {MAX_COUNT} and {MAX_SIDE} px"
            )
        self.count = self._shape[0]
        self.side: int | None = max(self._shape[1:3])
        if labels is None and LABELS in found:
            shape, dtype = found[LABELS]
            if shape == (self.count,) and dtype.kind in "iu":
                labels = load_arrays(path, LABELS)[LABELS].tolist()
        if labels is not None and len(labels) != self.count:
            raise UserError(
                f"{path} holds {self.count} images, and {len(labels)} are recorded beside it: run "
                "the command that makes them to its end"
            )
        self._labels: Sequence[Label] = labels or [None] * self.count

    def chunks(self) -> Iterator[Chunk]:
        row = self._shape[1:]
        try:
            with zipfile.ZipFile(self._path) as archive, archive.open(f"{IMAGES}.npy") as file:
                read_header(file)
                bytes_each = int(np.prod(row))
                at_once = max(1, min(CHUNK, MOST_HELD // bytes_each))
                for start in range(0, self.count, at_once):
                    labels = list(self._labels[start : start + at_once])
                    size = len(labels) * bytes_each
                    content = file.read(size)
                    if len(content) != size:
                        raise EOFError(f"image {start} and what comes after are missing")
                    pixels = np.frombuffer(bytearray(content), np.uint8)  # writable, for torch
                    yield _of_pixels(pixels.reshape(-1, *row), labels)
        except Exception as error:  # what zipfile, zlib and NumPy raise
            raise UserError(f"{self._path} is damaged: {error}") from error


class BundleImages:
    """Images that a bundle generates, as many of each class, in the order of the classes."""

    def __init__(
        self,
        bundle: Path,
        pipeline: Pipeline,
        per_class: int,
        seed: int,
        sampling: Sampling,
        batch: int,
        schedule: Schedule,
    ) -> None:
        pipeline.check_batch(batch)
        manifest = pipeline.manifest
        self.name, self._pipeline, self._batch = str(bundle), pipeline, batch
        self._schedule = schedule
        self.side: int | None = manifest.resolution
        self.class_names = tuple(names[0] for names in manifest.class_names)
        self.count = per_class * manifest.model.num_classes
        self._requests = [
            ImageRequest(index // per_class, seed, index, sampling) for index in range(self.count)
        ]
        digest = sha256(bundle / MANIFEST)
        Bundle.open(bundle).check_is(manifest)
        self._common: dict[str, Any] = {
            "manifest": digest,
            "seed": seed,
            "sampling": dataclasses.asdict(sampling),
            "batch": batch,
            "device": pipeline.executor.device,
            "sizes": schedule.group_sizes.tolist(),
            "orders": hashlib.sha256(schedule.orders.tobytes()).hexdigest(),
        }

    def chunks(self) -> Iterator[Chunk]:
        # Whole batches, so that another number of images leaves them as they are.
        size = -(-CHUNK // self._batch) * self._batch
        for start in range(0, self.count, size):
            some = self._requests[start : start + size]
            labels = [request.label for request in some]
            what = self._common | {"first": start, "labels": labels}
            key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
            yield Chunk(key, labels, lambda some=some: self._generate(some))  # type: ignore[misc]

    def _generate(self, requests: list[ImageRequest]) -> Pixels:
        images = self._pipeline.stream(requests, batch=self._batch, schedule=self._schedule)
        return np.stack([image.pixels for image in images])
