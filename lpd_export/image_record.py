"""What a run records of an image, a line of images.jsonl or failures.jsonl: types, and bounds.

Does not know files or how images are made.
"""

from __future__ import annotations

from typing import Annotated, Any, NotRequired

from pydantic import Field, TypeAdapter, with_config
from typing_extensions import TypedDict

from lpd_export.bounds import (
    STRICT,
    Cfg,
    Digest,
    EditOrder,
    GuidanceSchedule,
    Positive,
    Probability,
    Seed,
    Temperature,
)

MAX_IMAGES = 1_000_000
"""Of a run; a greater number is a slip of the keyboard."""

Position = Annotated[int, Field(ge=0, lt=MAX_IMAGES)]


@with_config(STRICT)
class Record(TypedDict):
    """A line of images.jsonl: how an image was made."""

    file: str
    """In the folder; of a .tar with the member's name after it."""
    position: Position
    """In the run."""
    index: Seed
    class_id: Annotated[int, Field(ge=0)] | None
    class_name: str
    order: Annotated[int, Field(ge=0)] | None
    """Which of the schedule's; None if it was grown from the kept cells of an edit."""
    seed: Seed
    cfg: Cfg
    guidance: GuidanceSchedule
    temperature: Temperature
    top_k: Positive | None
    top_p: Probability | None
    steps: Positive
    schedule_sha256: Digest
    bundle: str
    manifest_sha256: Digest
    token_ids: NotRequired[Any]
    """[cells], raster order; an image whose token ids are damaged is made again."""
    image: NotRequired[str]
    """What was edited; this and what follows only of an edit."""
    image_sha256: NotRequired[Digest]
    """Of its pixels as they were taken, fitted to the model's square; of token ids, of these."""
    outpaint: NotRequired[Annotated[int, Field(ge=1)] | None]
    kept: NotRequired[Annotated[str, Field(pattern="^[0-9a-f]*$")]]
    """Its cells that stay: a bit each, raster order, packed as by `numpy.packbits`, hexadecimal."""
    edit_order: NotRequired[EditOrder]
    paste: NotRequired[bool]


RECORD = TypeAdapter(Record)


@with_config(STRICT)
class Failure(TypedDict):
    """A line of failures.jsonl: which image could not be made, and why."""

    position: Position
    index: Seed
    seed: Seed
    class_id: Annotated[int, Field(ge=0)] | None
    class_name: str
    step: int
    """The first is 1."""
    phase: int
    error: str


FAILURE = TypeAdapter(Failure)
