"""What images are put into: PNG files, .tar shards or one .npz, each the same bytes at every try.

A container knows its files and how they come to be whole. It takes images in the order of their
positions, and is told which of them are recorded: what comes after these in its files, a process
that was killed left there, and it goes. Does not know records' content or how images are made.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import struct
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lpd_export.files import rename_for_good, sync, write_atomically
from lpd_export.images import png_bytes
from lpd_export.run_request import ImageFormat

Pixels = NDArray[np.uint8]

MANY = 10_000
"""PNGs of more images than this go into folders."""
PER_FILE = 1000
"""Images a .tar, or a folder of PNGs."""


class Container(Protocol):
    """The files of one format in one folder."""

    fills_gaps: bool
    """Whether an image can be made again in its place when later ones are there."""

    def file(self, position: int, stem: str) -> str:
        """Where an image is: a path in the folder, of a .tar with the member's name after it."""

    def encode(self, pixels: Pixels) -> bytes:
        """What is stored of an image [H, W, 3]; needs no file, and may run anywhere."""

    def decode(self, content: bytes) -> Pixels:
        """An image [H, W, 3] of what is stored of it."""

    def read(self, file: str, row: int) -> bytes:
        """What is stored of the image whose record is number `row`; OSError if it is not there."""

    def holds(self, file: str, row: int) -> bool:
        """Whether the image is there, whole."""

    def is_finished(self, last: str) -> bool:
        """Whether nothing is to be done any more if the last image is in this file."""

    def restore(self, count: int, last: str) -> None:
        """Cuts off whatever is there beside `count` recorded images, to go on after the last."""

    def append(self, file: str, content: bytes, record: bytes) -> None:
        """Adds an image, encoded, with its record as JSON."""

    def sync(self) -> None:
        """What was added is on the disk when this returns."""

    def finish(self) -> None:
        """All are there: the last file takes its name."""


def container(
    kind: ImageFormat, folder: Path, side: int, images: int, per_file: int | None
) -> Container:
    """The container of a run of so many images, `side` pixels wide and high."""
    if kind == "npz":
        return NpzFile(folder, side)
    if kind == "tar":
        return TarShards(folder, per_file or PER_FILE)
    return PngFiles(folder, per_file or (PER_FILE if images > MANY else None))


class PngFiles:
    """A file an image, `00003_heart.png`; of many in folders, `00000/00003_heart.png`."""

    fills_gaps = True

    def __init__(self, folder: Path, per_folder: int | None) -> None:
        self._folder, self._per_folder = folder, per_folder

    def file(self, position: int, stem: str) -> str:
        shard = "" if self._per_folder is None else f"{position // self._per_folder:05d}/"
        return f"{shard}{stem}.png"

    def encode(self, pixels: Pixels) -> bytes:
        return png_bytes(pixels)

    def decode(self, content: bytes) -> Pixels:
        return decode_png(content)

    def read(self, file: str, row: int) -> bytes:
        return (self._folder / file).read_bytes()

    def holds(self, file: str, row: int) -> bool:
        # No file is waited for on its way to the disk: what a power cut took is made again.
        return is_whole(self._folder / file)

    def is_finished(self, last: str) -> bool:
        return True

    def restore(self, count: int, last: str) -> None:
        pass  # an image that is not recorded is written again

    def append(self, file: str, content: bytes, record: bytes) -> None:
        path = self._folder / file
        if self._per_folder is not None:
            path.parent.mkdir(exist_ok=True)
        write_atomically(path, content)

    def sync(self) -> None:
        pass

    def finish(self) -> None:
        pass


class TarShards:
    """`00000.tar` and so on, by WebDataset's convention: 00003.png, then 00003.json.

    The shard that is being filled has a name of its own, so that a .tar is always whole.
    """

    fills_gaps = False

    def __init__(self, folder: Path, per_shard: int) -> None:
        self._folder, self._per_shard = folder, per_shard
        self._open: BinaryIO | None = None
        self._name = ""
        self._indexed: tuple[str, dict[str, tuple[int, int]]] = "", {}

    def file(self, position: int, stem: str) -> str:
        return f"{position // self._per_shard:05d}.tar/{position:05d}.png"

    def encode(self, pixels: Pixels) -> bytes:
        return png_bytes(pixels)

    def decode(self, content: bytes) -> Pixels:
        return decode_png(content)

    def _partial(self, shard: str) -> Path:
        return self._folder / f".{shard}.partial"

    def _present(self, shard: str) -> Path:
        whole = self._folder / shard
        return whole if whole.exists() else self._partial(shard)

    def _index(self, shard: str) -> dict[str, tuple[int, int]]:
        """Where the content of each member is, and its size; kept for the last shard asked for."""
        if self._indexed[0] != shard:
            self._indexed = shard, tar_members(self._present(shard))
        return self._indexed[1]

    def read(self, file: str, row: int) -> bytes:
        shard, member = file.split("/")
        start, size = self._index(shard)[member]
        with open(self._present(shard), "rb") as tar:
            tar.seek(start)
            return tar.read(size)

    def holds(self, file: str, row: int) -> bool:
        shard, member = file.split("/")
        try:
            return _json_name(member) in self._index(shard)
        except OSError:
            return False

    def is_finished(self, last: str) -> bool:
        shard = last.split("/")[0]
        return (self._folder / shard).exists() and not self._partial(shard).exists()

    def restore(self, count: int, last: str) -> None:
        last, _, member = last.partition("/")
        for path in self._folder.iterdir():
            name = re.fullmatch(r"(\d{5,}\.tar)|\.(\d{5,}\.tar)\.partial", path.name)
            if not name:
                continue
            shard = name[1] or name[2]
            # By number: a hundred thousand shards have longer names.
            if not last or int(shard[:-4]) > int(last[:-4]):
                path.unlink()
            elif shard != last and name[2]:
                self._name = shard
                self._open = open(path, "r+b")  # noqa: SIM115, finish closes it
                self._open.seek(0, os.SEEK_END)
                self.finish()
        self._indexed = "", {}
        if last:
            start, size = self._index(last)[_json_name(member)]
            os.replace(self._present(last), self._partial(last))
            self._take(last)
            assert self._open is not None
            self._open.seek(start + _padded(size))
            self._open.truncate()
            self._indexed = "", {}

    def _take(self, shard: str) -> None:
        """Goes on at the end of a shard, which is begun if need be."""
        if self._name != shard:
            self.finish()
            path = self._partial(shard)
            path.touch()
            self._open, self._name = open(path, "r+b"), shard  # noqa: SIM115
            self._open.seek(0, os.SEEK_END)

    def append(self, file: str, content: bytes, record: bytes) -> None:
        shard, member = file.split("/")
        self._take(shard)
        assert self._open is not None
        for name, data in ((member, content), (_json_name(member), record)):
            info = tarfile.TarInfo(name)  # of nobody, and of no time
            info.size = len(data)
            self._open.write(info.tobuf(tarfile.USTAR_FORMAT))
            self._open.write(data.ljust(_padded(len(data)), b"\0"))

    def sync(self) -> None:
        if self._open is not None:
            sync(self._open)

    def finish(self) -> None:
        if self._open is None:
            return
        self._open.write(bytes(-self._open.tell() % tarfile.RECORDSIZE or tarfile.RECORDSIZE))
        sync(self._open)
        self._open.close()
        rename_for_good(self._partial(self._name), self._folder / self._name)
        self._open, self._name = None, ""


class NpzFile:
    """`images.npz` with `arr_0`, uint8 [N, H, W, 3]: row k is of line k of images.jsonl.

    While it grows it has another name; the places that hold N and sums are filled in at the end.
    The one member is stored, not compressed, so that a row's place is known.
    """

    fills_gaps = False
    NAME = "images.npz"
    MEMBER = b"arr_0.npy"
    _START = 30 + len(MEMBER) + 20 + 128
    """Bytes before the first row: ZIP's local header with its 64-bit sizes, and NumPy's header."""

    def __init__(self, folder: Path, side: int) -> None:
        self._side = side
        self._whole, self._partial = folder / self.NAME, folder / f".{self.NAME}.partial"
        self._open: BinaryIO | None = None

    @property
    def _row(self) -> int:
        return self._side * self._side * 3

    def file(self, position: int, stem: str) -> str:
        return self.NAME

    def encode(self, pixels: Pixels) -> bytes:
        return pixels.tobytes()

    def decode(self, content: bytes) -> Pixels:
        return np.frombuffer(content, np.uint8).reshape(self._side, self._side, 3)

    def _present(self) -> Path:
        return self._whole if self._whole.exists() else self._partial

    def read(self, file: str, row: int) -> bytes:
        with open(self._present(), "rb") as npz:
            npz.seek(self._START + row * self._row)
            return npz.read(self._row)

    def holds(self, file: str, row: int) -> bool:
        with contextlib.suppress(OSError):
            return self._present().stat().st_size >= self._START + (row + 1) * self._row
        return False

    def is_finished(self, last: str) -> bool:
        return self._whole.exists()

    def restore(self, count: int, last: str) -> None:
        if self._whole.exists():
            os.replace(self._whole, self._partial)
        self._partial.touch()
        self._open = open(self._partial, "r+b")  # noqa: SIM115, finish closes it
        self._open.truncate(self._START + count * self._row)
        self._open.seek(0, os.SEEK_END)

    def append(self, file: str, content: bytes, record: bytes) -> None:
        assert self._open is not None
        self._open.write(content)

    def sync(self) -> None:
        assert self._open is not None
        sync(self._open)

    def finish(self) -> None:
        file = self._open
        assert file is not None
        end = file.tell()
        shape = ((end - self._START) // self._row, self._side, self._side, 3)
        text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}"
        header = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + text.ljust(117).encode() + b"\n"
        file.seek(self._START - len(header))
        file.write(header)
        total, checksum = end - self._START + len(header), 0
        file.seek(self._START - len(header))
        while part := file.read(2**24):
            checksum = zlib.crc32(part, checksum)
        # APPNOTE.TXT, sections 4.3.7, 4.3.12, 4.3.14 to 4.3.16, 4.5.3; dated 1980-01-01.
        common = struct.pack("<HHHHHI", 45, 0, 0, 0, 0x21, checksum)
        sizes = struct.pack("<HHQQ", 1, 16, total, total)
        unknown = struct.pack("<II", 0xFFFFFFFF, 0xFFFFFFFF)  # the sizes have 64 bits
        name = struct.pack("<H", len(self.MEMBER))
        file.seek(0)
        file.write(b"PK\3\4" + common + unknown + name + struct.pack("<H", 20))
        file.write(self.MEMBER + sizes)
        file.seek(end)
        directory = b"PK\1\2" + struct.pack("<H", 45) + common + unknown + name
        directory += struct.pack("<HHHHII", 20, 0, 0, 0, 0, 0) + self.MEMBER + sizes
        size = len(directory)
        file.write(directory)
        file.write(b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 1, 1, size, end))
        file.write(b"PK\6\7" + struct.pack("<IQI", 0, end + size, 1))
        file.write(b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, size, 0xFFFFFFFF, 0))
        sync(file)
        file.close()
        rename_for_good(self._partial, self._whole)
        self._open = None


def decode_png(content: bytes) -> Pixels:
    """The pixels [H, W, 3] of a PNG."""
    with Image.open(io.BytesIO(content)) as picture:
        return np.asarray(picture.convert("RGB"))


def is_whole(png: Path) -> bool:
    """Whether an image is there and can be read to its end."""
    try:
        with Image.open(png) as picture:
            picture.load()
    except (OSError, SyntaxError):  # the latter for a damaged PNG
        return False
    return True


def tar_members(path: Path) -> dict[str, tuple[int, int]]:
    """Place and size of the content of each whole member of a .tar that may be cut short."""
    return {name: (start, size) for name, start, size in _tar_walk(path)}


def _tar_walk(path: Path) -> Iterator[tuple[str, int, int]]:
    end = path.stat().st_size
    with open(path, "rb") as tar:
        while True:
            try:
                info = tarfile.TarInfo.frombuf(tar.read(tarfile.BLOCKSIZE), "utf-8", "strict")
            except tarfile.HeaderError:  # the archive's end, or the file's
                return
            start = tar.tell()
            after = start + _padded(info.size)
            if after > end:
                return
            yield info.name, start, info.size
            tar.seek(after)


def _json_name(member: str) -> str:
    return member.removesuffix("png") + "json"


def _padded(size: int) -> int:
    return size + -size % tarfile.BLOCKSIZE
