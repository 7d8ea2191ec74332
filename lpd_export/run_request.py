"""What a run is asked for: types, bounds, and sense.

Loads no torch, so that a mistake is told at once. Does not know how images are made.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    ModelWrapValidatorHandler,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.dataclasses import dataclass

from lpd_export.bounds import (
    STRICT,
    Cfg,
    GuidanceSchedule,
    Positive,
    Probability,
    Seed,
    Temperature,
    Threads,
    checked,
    in_words,
)
from lpd_export.bulk.requests_file import read_requests
from lpd_export.bundle.classes import resolve_classes
from lpd_export.bundle.manifest import Bundle
from lpd_export.errors import UserError
from lpd_export.files import check_writable
from lpd_export.image_record import MAX_IMAGES

RECORDS = "images.jsonl"
LOCK = ".run.lock"
SHARD = "shard_{}_of_{}"
"""The folder of a shard, in that of the run."""
ImageFormat = Literal["png", "tar", "npz"]
"""What images are put into."""

Folder = Annotated[Path, Field(strict=False)]


@dataclass(frozen=True, config=STRICT)
class RunRequest:
    """Everything that a user can say of a run; see `lpd-export run --help`.

    Raises:
        UserError: for a value of a wrong type, or one out of its bounds.
    """

    bundle: Folder
    classes: list[str]
    out: Folder
    count: Positive = 1
    seed: Seed = 0
    cfg: Cfg | None = None
    guidance: GuidanceSchedule | None = None
    temperature: Temperature = 1.0
    top_k: Positive | None = None
    top_p: Probability | None = None
    batch: Positive | None = None
    schedule: str | None = None
    steps: Positive | None = None
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d{1,3})?)$")] | None = None
    threads: int | None = None
    save_tokens: str | None = None
    trace: bool = False
    requests: str | None = None
    format: ImageFormat = "png"
    per_file: Positive | None = None
    keep_going: bool = False
    shard: Annotated[str, Field(pattern=r"^(\d{1,6}/\d{1,6}|auto)$")] | None = None
    workers: Positive | None = None

    @property
    def shard_number(self) -> tuple[int, int] | None:
        """Which shard, counted from 0, of how many; None if the run has none.

        Raises:
            UserError: if there is no such shard, or the environment does not say which.
        """
        return None if self.shard is None else read_shard(self.shard)

    @property
    def folder(self) -> Path:
        """Where images go: `out`, or of a shard a folder in it."""
        shard = self.shard_number
        return self.out if shard is None else self.out / SHARD.format(*shard)

    @model_validator(mode="wrap")
    @classmethod
    def _told_in_a_sentence(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(values)
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            option = {"count": "-n", "classes": "--class"}.get(name, f"--{name.replace('_', '-')}")
            wanted = in_words(TypeAdapter(cls).json_schema()["properties"][name])
            raise UserError(f"{option} must be {wanted}, but it is {first['input']!r}") from error


def read_shard(text: str) -> tuple[int, int]:
    """I and N of `I/N`, or of `auto` what torchrun's or SLURM's variables say."""

    def told(name: str, default: int = 0) -> int:
        kind = Annotated[int, Field(strict=False)]
        return int(checked(name, os.environ.get(name, default), kind))

    if text != "auto":
        number, shards = map(int, text.split("/"))
    elif {"RANK", "WORLD_SIZE"} <= set(os.environ):
        number, shards = told("RANK"), told("WORLD_SIZE")
    elif {"SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"} <= set(os.environ):
        number = told("SLURM_ARRAY_TASK_ID") - told("SLURM_ARRAY_TASK_MIN")
        number //= told("SLURM_ARRAY_TASK_STEP", 1) or 1
        shards = told("SLURM_ARRAY_TASK_COUNT")
    else:
        raise UserError(
            "--shard auto reads RANK and WORLD_SIZE, or SLURM_ARRAY_TASK_ID and "
            "SLURM_ARRAY_TASK_COUNT, which are not set: give --shard I/N"
        )
    if not 0 <= number < shards:
        raise UserError(f"--shard {number}/{shards}: of N shards, I is from 0 to N - 1")
    return number, shards


def check_request(request: RunRequest) -> None:
    """Raises UserError for what can be known to be wrong before anything is loaded."""
    if not request.classes and not request.requests:
        raise UserError(
            "say what to draw with --class NAME or --class ID; `lpd-export inspect "
            f"{request.bundle} --classes` lists the classes"
        )
    checked("--threads", request.threads, Threads | None)
    if request.steps is not None and not request.schedule:
        raise UserError("--steps says how to read a --schedule; alone it has no meaning here")
    if request.requests and (request.classes or request.count != 1):
        own = "--class" if request.classes else "-n"
        raise UserError(f"--requests says what to draw and how often: leave out {own}")
    if request.trace and request.format != "png":
        raise UserError(f"--trace draws beside PNGs, not into a .{request.format}: leave out one")
    if request.workers and request.trace:
        raise UserError("--trace draws where images are made: leave out --workers")
    if request.workers and re.fullmatch(r"cuda:\d+", request.device or ""):
        raise UserError(f"Ray gives each worker a GPU: --device cuda, not {request.device}")
    if request.save_tokens:
        # Beside records it may be an earlier end of this run's: they tell.
        if os.path.lexists(request.save_tokens) and not (request.folder / RECORDS).exists():
            raise UserError(f"{request.save_tokens} exists: choose another --save-tokens")
        folder = Path(request.save_tokens).absolute().parent
        if folder != request.folder.absolute() and not folder.is_dir():
            raise UserError(f"cannot write {request.save_tokens}: its folder does not exist")
        check_writable(folder)
    if not os.path.lexists(request.folder / LOCK):  # else another run is writing there
        check_out(request.folder)
    manifest = Bundle.open(request.bundle).manifest
    names, classes = manifest.class_names, manifest.model.num_classes
    if request.requests:
        lines = read_requests(request.requests)
        asked = f"{request.requests} asks"
        counts = {line["class_"]: 0 for _, line, _ in lines}
        for _, line, _ in lines:
            counts[line["class_"]] += line.get("count", 1)
    else:
        asked = f"-n {request.count} asks"
        counts = dict.fromkeys(request.classes, request.count)
    images = sum(
        len(resolve_classes([name], names, classes)) * count for name, count in counts.items()
    )
    if images > MAX_IMAGES:
        raise UserError(f"{asked} for {images} images, a run makes {MAX_IMAGES} at most")


def check_out(out: Path) -> None:
    """Raises UserError unless images can go to `out`: a new or empty folder, or that of a run."""
    check_writable(out)
    if (
        os.path.lexists(out)
        and {path.name for path in out.iterdir()} - {LOCK}
        and not (out / RECORDS).is_file()
    ):
        raise UserError(f"{out} exists and is not empty: choose another --out")
