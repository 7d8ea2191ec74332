"""A run in shards, each in a folder of its own, and the folder that they make together.

An image depends on its request alone, so any split gives the same images. A shard has consecutive
positions, and says in shard.json what it is a part of; merging needs no bundle. Does not know how
images are made.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from lpd_export.bounds import Positive
from lpd_export.bulk.containers import container
from lpd_export.bulk.folder import FAILURES, ImageFolder, Made, read_record, whole_lines
from lpd_export.bulk.plan import Plan, Positions, Record, stem
from lpd_export.errors import UserError
from lpd_export.files import write_atomically
from lpd_export.image_record import FAILURE, RECORD
from lpd_export.run_request import RECORDS, SHARD, ImageFormat, RunRequest

OF = "shard.json"
BATCH = 64
"""Images that are copied between two looks at the disk."""


class Of(TypedDict):
    """What all shards of a run have in common."""

    shards: Positive
    images: Positive
    format: ImageFormat
    per_file: Positive | None
    resolution: Positive
    per_class: Positive
    manifest_sha256: str


OF_RUN = TypeAdapter(Of)


def shard_positions(images: int, shard: tuple[int, int] | None) -> Positions:
    """The images of a shard, all if there is none."""
    number, shards = shard or (0, 1)
    return np.arange(images * number // shards, images * (number + 1) // shards)


def write_shard(request: RunRequest, plan: Plan, shard: tuple[int, int]) -> None:
    """Says in the shard's folder what it is a part of."""
    of = Of(
        shards=shard[1],
        images=plan.images,
        format=request.format,
        per_file=request.per_file,
        resolution=plan.manifest.resolution,
        per_class=request.count,
        manifest_sha256=plan.record(0)["manifest_sha256"],
    )
    write_atomically(request.folder / OF, json.dumps(of).encode() + b"\n")


class Shards:
    """All shards of a run, whole, read as one; it serves an `ImageFolder` as its plan.

    Raises:
        UserError: if one is missing, of another run, or not whole.
    """

    def __init__(self, folder: Path) -> None:
        found = {
            int(name[1]): path
            for path in (folder.iterdir() if folder.is_dir() else ())
            if (name := re.fullmatch(SHARD.format(r"(\d+)", r"\d+"), path.name))
        }
        if not found:
            raise UserError(f"{folder} holds no shards: give the --out of runs with --shard")
        self.of = read_of(next(iter(found.values())))
        self._shards = []
        for number in range(self.of["shards"]):
            path = folder / SHARD.format(number, self.of["shards"])
            if number not in found or not path.is_dir():
                raise UserError(
                    f"shard {number} of {self.of['shards']} is missing in {folder}: run it"
                )
            if read_of(path) != self.of:
                raise UserError(f"{path} is of another run than the others: move it away")
            positions = shard_positions(self.images, (number, self.of["shards"]))
            self._shards.append(Shard(path, self.of, positions))

    @property
    def images(self) -> int:
        """How many there are, those that failed among them."""
        return self.of["images"]

    def _shard(self, position: int) -> Shard:
        ends = [self.images * (n + 1) // self.of["shards"] for n in range(self.of["shards"])]
        return self._shards[bisect_right(ends, position)]

    def record(self, position: int) -> Record:
        """How an image was made, or why there is none."""
        record = self._shard(position).record(position)
        return {key: value for key, value in record.items() if key not in ("file", "token_ids")}

    def stem(self, position: int) -> str:
        """What an image's file is called."""
        record = self.record(position)
        return stem(position, record["class_name"], record["class_id"])

    def takes(self, position: int, token_ids: Any) -> bool:
        """Whether an image has these token ids."""
        record = self._shard(position).record(position)
        return bool(token_ids == record.get("token_ids"))

    def made(self, position: int) -> Made:
        """An image as it is stored."""
        return self._shard(position).made(position)


class Shard:
    """The images of one shard."""

    def __init__(self, path: Path, of: Of, positions: Positions) -> None:
        self._path = path
        self._container = container(
            of["format"], path, of["resolution"], of["images"], of["per_file"]
        )
        self._first = int(positions[0]) if len(positions) else 0
        self._rows = np.full(len(positions), -1, np.int64)
        self._starts = np.full(len(positions), -1, np.int64)
        for name in (RECORDS, FAILURES):
            for number, start, line in whole_lines(path / name):
                where = f"{path / name}, line {number}"
                kind = RECORD if name == RECORDS else FAILURE
                place = read_record(line, where, kind)["position"] - self._first
                if not 0 <= place < len(positions):
                    raise UserError(f"{where}: image {place + self._first} is not of this shard")
                self._starts[place] = start
                if name == RECORDS:
                    self._rows[place] = number - 1
        missing = int((self._starts < 0).sum())
        if missing:
            raise UserError(
                f"{path} is not whole: {missing} of its {len(positions)} images are missing; the "
                "command that made the others makes them"
            )

    def record(self, position: int) -> Record:
        """Its line, or of an image that failed that one."""
        place = position - self._first
        name = FAILURES if self._rows[place] < 0 else RECORDS
        with open(self._path / name, "rb") as file:
            file.seek(self._starts[place])
            record: Record = json.loads(file.readline())
            return record

    def made(self, position: int) -> Made:
        """An image as it is stored; OSError if it is not there."""
        record, row = self.record(position), int(self._rows[position - self._first])
        if row < 0:
            return Made(
                position, None, [], {name: record[name] for name in ("step", "phase", "error")}
            )
        # Not what the record says: that might lead anywhere.
        file = self._container.file(
            position, stem(position, record["class_name"], record["class_id"])
        )
        content = self._container.read(file, row)
        return Made(position, content, record["token_ids"])


def read_of(path: Path) -> Of:
    """What a shard says of itself."""
    try:
        return OF_RUN.validate_json((path / OF).read_bytes())
    except (OSError, ValidationError) as error:
        raise UserError(f"{path} is no shard of a run: {OF} is missing or damaged") from error


def copy_images(shards: Shards, folder: ImageFolder) -> None:
    """Stores all that are missing in the folder, in their order."""
    missing = folder.missing.tolist()
    for start in range(0, len(missing), BATCH):
        folder.add([shards.made(position) for position in missing[start : start + BATCH]])
