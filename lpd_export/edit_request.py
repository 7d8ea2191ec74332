"""What an edit is asked for beside what a run is: the image, what of it is made anew, and how.

Loads no torch, so that a mistake is told at once. Does not know how an edit is made.
"""

from __future__ import annotations

import contextlib
import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from pydantic.dataclasses import dataclass

from lpd_export.bounds import STRICT, EditOrder
from lpd_export.errors import UserError
from lpd_export.files import check_file, inside
from lpd_export.image_record import RECORD
from lpd_export.pictures import Fit, read_mask, read_picture

if TYPE_CHECKING:
    from lpd_export.bundle.manifest import Manifest
    from lpd_export.runtime.editing import Selection


@dataclass(frozen=True, config=STRICT)
class EditRequest:
    """What an edit keeps, and how; see `lpd-export edit --help`.

    Raises:
        UserError: from `check`, for what can be known to be wrong before anything is loaded.
    """

    image: str
    """A picture, a `.npy` of token ids, or an earlier image by its record: `images.jsonl:3`."""
    mask: str | None = None
    box: tuple[int, int, int, int] | None = None
    outpaint: int | None = None
    fit: Fit = "crop"
    order: EditOrder = "locality"
    paste: bool = True
    folder: Annotated[Path | None, Field(strict=False)] = None
    """Of the file of requests that asks for it, which image and mask may not leave."""

    def check(self) -> None:
        """Raises UserError unless the image and the mask can be read, and say what to do."""
        how = [name for name in ("mask", "box", "outpaint") if getattr(self, name) is not None]
        if not how:
            raise UserError(
                "say what is to be made anew: --mask FILE, white where the image is to change; "
                "--box X0,Y0,X1,Y1 in its pixels; or --outpaint PIXELS around it"
            )
        if len(how) > 1:
            raise UserError(f"--{how[0]} and --{how[1]} say two different things: give one of them")
        source = self.source()
        if isinstance(source, str) and Path(source).suffix != ".npy":
            read_picture(source)
        if self.mask is not None:
            read_mask(self.mask)

    def source(self) -> str | NDArray[np.int64]:
        """What is edited: a file, or the token ids [S] of a record."""
        record = self.record()
        return self._path(self.image) if record is None else np.array(record["token_ids"], np.int64)

    def selection(self, manifest: Manifest) -> Selection:
        """What is kept of the image.

        Raises:
            UserError: as `select`.
        """
        from lpd_export.runtime.editing import select  # torch

        mask = None if self.mask is None else self._path(self.mask)
        return select(self.source(), manifest, mask, self.box, self.outpaint, self.fit)

    def _path(self, name: str) -> str:
        return name if self.folder is None else str(inside(self.folder, name))

    def record(self) -> dict[str, Any] | None:
        """The record of the image, if it is given by one."""
        given = re.fullmatch(r"(.+\.jsonl)(?::(\d+))?", self.image, re.DOTALL)
        if not given:
            return None
        path, index = self._path(given[1]), given[2]
        if index is None:
            raise UserError(f"{path} has many images: say which, as in {path}:3")
        check_file(path, "the records", 2**36)
        found = Path(path).stat()
        start = record_places(path, found.st_size, found.st_mtime_ns).get(index)
        if start is not None:
            with open(path, "rb") as lines:
                lines.seek(start)
                record = dict(RECORD.validate_json(lines.readline()))
            tokens = record.get("token_ids")
            if isinstance(tokens, list) and all(type(t) is int and 0 <= t < 2**31 for t in tokens):
                return record
        raise UserError(
            f"{path} has no record of image {index} with its token ids: images are counted from 0"
        )

    def default_class(self) -> str:
        """The class of an image that has a record, else none."""
        record = self.record()
        return "none" if record is None or record["class_id"] is None else str(record["class_id"])


@functools.lru_cache(maxsize=4)
def record_places(path: str, size: int, changed: int) -> dict[str, int]:
    """Where the line of each image begins, by its number, in a file of this size and time."""
    places: dict[str, int] = {}
    start = 0
    with open(path, "rb") as lines:
        for line in lines:
            # What is none is another's, or cut short by a kill.
            with contextlib.suppress(ValidationError):
                places.setdefault(str(RECORD.validate_json(line)["position"]), start)
            start += len(line)
    return places
