"""A folder of images with their records, which is right however often its writer is killed.

images.jsonl is the journal: a line an image, added once the image itself is where it belongs.
What has no line was not made. So a run that is started again reads the journal, cuts off what is
beside it, and goes on; it ends with the bytes of a run that was never stopped. An image that
failed has its line in failures.jsonl instead. Does not know how images are made.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from pydantic import TypeAdapter, ValidationError

from lpd_export.bulk.containers import Container, Pixels
from lpd_export.bulk.plan import Positions, Record
from lpd_export.errors import UserError
from lpd_export.files import rename_for_good, sync
from lpd_export.image_record import FAILURE, RECORD
from lpd_export.run_request import RECORDS

FAILURES = "failures.jsonl"
"""A line an image that could not be made, and why."""


class Made(NamedTuple):
    """An image, ready to be stored, or why there is none."""

    position: int
    content: bytes | Pixels | None
    """As its container encodes it, or pixels still; None if it could not be made."""
    token_ids: Sequence[int]
    """[S], raster order."""
    failure: Record | None = None
    """`step`, `phase` and `error`."""


class Planned(Protocol):
    """What a folder knows of its images: a plan, or the shards that it merges."""

    def stem(self, position: int) -> str: ...
    def record(self, position: int) -> Record: ...
    def takes(self, position: int, token_ids: Any) -> bool: ...


class ImageFolder:
    """The images of a plan at some positions, in a container, with their records.

    Args:
        out: the folder, of this process alone.
        plan: what the images are made from.
        positions: which of them this folder is for.
        container: where they go.
        keep_going: whether images that failed earlier are left out; else they are a UserError.

    Raises:
        UserError: if what is there was made in another way, or cannot be read.
    """

    def __init__(
        self,
        out: Path,
        plan: Planned,
        positions: Positions,
        container: Container,
        keep_going: bool = False,
    ) -> None:
        self.out, self.plan, self.positions = out, plan, positions
        self._container = container
        self._starts = np.full(len(positions), -1, np.int64)
        """Where each image's line in images.jsonl begins; -1 where it has none."""
        self._failed = np.zeros(len(positions), bool)
        self._kept: list[tuple[int, int]] = []
        self._read_failures(keep_going)
        self._end = self._read_records()

    # ------------------------------------------------------------------------ what is there

    @property
    def made(self) -> Positions:
        """Images that are there."""
        return self.positions[self._starts >= 0]

    @property
    def failed(self) -> Positions:
        """Images that could not be made."""
        return self.positions[self._failed]

    @property
    def missing(self) -> Positions:
        """Images that are still to be made."""
        return self.positions[(self._starts < 0) & ~self._failed]

    def records(self, first: int = 2**63 - 1) -> Iterator[Record]:
        """What images.jsonl says of the images that are there, by position; the first so many."""
        for position in self.made[:first]:
            yield self.record(int(position))

    def record(self, position: int) -> Record:
        """The record of an image that is there, with its token ids."""
        with open(self.out / RECORDS, "rb") as file:
            file.seek(self._starts[self._place(position)])
            record: Record = json.loads(file.readline())
            return record

    def images(self, first: int = 2**63 - 1) -> Iterator[tuple[Record, bytes]]:
        """Records with what is stored of their images, by position; the first so many."""
        for row, record in enumerate(self.records(first)):
            yield record, self._container.read(record["file"], row)

    def pixels(self, first: int = 2**63 - 1) -> Iterator[tuple[Record, Pixels]]:
        """The first so many records with their images, [H, W, 3] uint8."""
        for record, content in self.images(first):
            yield record, self._container.decode(content)

    def _place(self, position: int) -> int:
        return int(np.searchsorted(self.positions, position))

    def expected(self, position: int) -> Record:
        """The record of an image, but for its token ids."""
        return {
            "file": self._container.file(position, self.plan.stem(position)),
            **self.plan.record(position),
        }

    def _known(self, position: int, where: str) -> int:
        """The place of an image among this folder's."""
        place = self._place(position)
        if place == len(self.positions) or self.positions[place] != position:
            raise UserError(
                f"{where}: image {position} is not among the {len(self.positions)} of this run; "
                "choose another --out"
            )
        return place

    def _read_failures(self, keep_going: bool) -> None:
        path = self.out / FAILURES
        for number, start, line in whole_lines(path):
            failure = read_record(line, f"{path}, line {number}", FAILURE)
            place = self._known(failure["position"], f"{path}, line {number}")
            if not keep_going:
                raise UserError(
                    f"{path}, line {number}: {failure['error']}; go on without such images by "
                    "--keep-going, or choose another --out"
                )
            self._failed[place] = True
            self._failures_end = start + len(line) + 1

    _failures_end = 0

    def _read_records(self) -> int:
        """Finds the images that are there; gives the length of the journal that says so."""
        path, end, last = self.out / RECORDS, 0, -1
        for number, start, line in whole_lines(path):
            record = read_record(line, f"{path}, line {number}")
            position = record["position"]
            place = self._known(position, f"{path}, line {number}")
            check_same(record, self.expected(position), f"{path}, line {number}")
            row = len(self._kept)
            good = self.plan.takes(position, record.get("token_ids"))
            good = good and (self._container.fills_gaps or self._follows(last, place))
            if good and self._starts[place] < 0 and self._container.holds(record["file"], row):
                self._starts[place], last = start, place
                self._kept.append((start, start + len(line) + 1))
                end = start + len(line) + 1
            elif not self._container.fills_gaps:
                break
        return end

    def _follows(self, last: int, place: int) -> bool:
        """Whether nothing but failed images is between these two."""
        return place > last and bool(self._failed[last + 1 : place].all())

    # ----------------------------------------------------------------------- what is written

    def restore(self) -> None:
        """Removes what a killed process left beside what is recorded.

        Raises:
            UserError: if it cannot be written.
        """
        with self._writing():
            for leftover in self.out.rglob(".*.tmp"):
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                else:
                    leftover.unlink()
            made = self.made
            last = self.expected(int(made[-1]))["file"] if len(made) else ""
            if not len(made) or len(self.missing) or not self._container.is_finished(last):
                self._container.restore(len(made), last)
            if sum(end - start for start, end in self._kept) == self._end:
                (self.out / RECORDS).touch()
                os.truncate(self.out / RECORDS, self._end)
            else:  # lines between others are of no use any more
                self._rewrite(self._kept)
            self._kept = []
            if (self.out / FAILURES).exists():
                os.truncate(self.out / FAILURES, self._failures_end)

    def encoded(self, image: Made) -> Made:
        """An image as it is stored; needs no file."""
        if not isinstance(image.content, np.ndarray):
            return image
        return image._replace(content=self._container.encode(image.content))

    def add(self, images: Sequence[Made]) -> None:
        """Stores encoded images, and records them once they are where they belong.

        Raises:
            UserError: if one cannot be written; none of these is then recorded.
        """
        with self._writing():
            lines: list[bytes] = []
            failures: list[bytes] = []
            for image in images:
                if image.failure is None:
                    record = self.expected(image.position)
                    line = json.dumps(record | {"token_ids": list(image.token_ids)}).encode()
                    assert isinstance(image.content, bytes)
                    self._container.append(record["file"], image.content, line)
                    lines.append(line)
                else:
                    made_of = self.plan.record(image.position)
                    names = ("position", "index", "seed", "class_id", "class_name")
                    record = {name: made_of[name] for name in names} | image.failure
                    failures.append(json.dumps(record).encode())
            self._container.sync()
            append(self.out / FAILURES, failures)
            starts = iter(append(self.out / RECORDS, lines))
            for image in images:
                place = self._place(image.position)
                if image.failure is None:
                    self._starts[place] = next(starts)
                else:
                    self._failed[place] = True

    def take_back(self) -> None:
        """Removes what a run has begun that came to nothing."""
        for path in self.out.iterdir():
            if re.fullmatch(
                rf"\d{{5,}}.*|\..*\.partial|{RECORDS}|{FAILURES}|shard.json", path.name
            ):
                with contextlib.suppress(OSError):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def finish(self) -> None:
        """Ends the last file, once no image is missing, and puts the records in order.

        Raises:
            UserError: if it cannot be written.
        """
        with self._writing():
            made = self._starts[self._starts >= 0]
            if (np.diff(made) < 0).any():  # images were made again
                lines = []
                with open(self.out / RECORDS, "rb") as file:
                    for start in made.tolist():
                        file.seek(start)
                        lines.append((start, start + len(file.readline())))
                self._rewrite(lines)
            last = self.expected(int(self.made[-1]))["file"] if len(made) else ""
            if not last or not self._container.is_finished(last):
                self._container.finish()

    def _rewrite(self, lines: Sequence[tuple[int, int]]) -> None:
        """Makes images.jsonl anew of these stretches of it, in their order."""
        path, temporary = self.out / RECORDS, self.out / f".{RECORDS}.tmp"
        moved = {}
        with open(path, "rb") as old, open(temporary, "wb") as new:
            for start, end in lines:
                moved[start] = new.tell()
                old.seek(start)
                new.write(old.read(end - start))
            sync(new)
        rename_for_good(temporary, path)
        self._starts = np.array([moved.get(s, -1) for s in self._starts.tolist()], np.int64)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            path = error.filename or self.out
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def whole_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Number, place and content of each line of a file, but for a last one that was cut short."""
    if path.is_file():
        start = 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.endswith(b"\n"):
                    yield number, start, line[:-1]
                start += len(line)


def read_record(line: bytes, where: str, kind: TypeAdapter[Any] = RECORD) -> Record:
    """A line of images.jsonl, or of failures.jsonl. Raises UserError if it is none."""
    try:
        return dict(kind.validate_json(line))
    except ValidationError as error:
        first = error.errors()[0]
        what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
        raise UserError(
            f"{where}: not a record of `lpd-export run` ({what}); choose another --out"
        ) from error


def check_same(found: Mapping[str, object], expected: Record, where: str) -> None:
    # What follows from other entries goes last, so that the cause is what is named.
    for key in sorted(expected, key=lambda key: key in ("file", "order", "index")):
        value = expected[key]
        if key != "bundle" and found.get(key) != value:
            raise UserError(
                f"{where}: made with {key} {found.get(key)!r}, this run has {value!r}: repeat the "
                "first run's command, or choose another --out"
            )


def append(path: Path, lines: Sequence[bytes]) -> list[int]:
    """Adds lines, on the disk when this returns; gives the places where they begin."""
    if not lines:
        return []
    start = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "ab") as file:
            file.write(b"".join(line + b"\n" for line in lines))
            sync(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.truncate(path, start)  # closed: nothing is written to it any more
        raise OSError(error.errno, error.strerror, str(path)) from error
    return [start, *(start + np.cumsum([len(line) + 1 for line in lines[:-1]])).tolist()]
