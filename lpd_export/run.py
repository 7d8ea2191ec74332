"""What `lpd-export run` does: images and their records in a folder, whole at any moment.

Every image is written as soon as it is made and only then recorded, so that an interrupted run
keeps what it has and can go on. Runs do not share a folder. Does not know the command line.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError

from lpd_export.bundle.classes import display_name, resolve_classes
from lpd_export.bundle.manifest import MANIFEST
from lpd_export.edit_request import EditRequest
from lpd_export.errors import Interrupted, UserError
from lpd_export.files import exclusive, sha256, uninterrupted, write_atomically
from lpd_export.images import contact_sheet, draw_trace, save_png
from lpd_export.run_request import LOCK, RECORD, RECORDS, RunRequest, check_out, check_request
from lpd_export.runtime.editing import Edit
from lpd_export.runtime.pipeline import Pipeline, Progress
from lpd_export.runtime.requests import GeneratedImage, ImageRequest
from lpd_export.runtime.sampler import Sampling
from lpd_export.schedule.schedule_file import Schedule

SHEET = "contact_sheet.png"
TRACES = "trace"
"""For each image a folder of its steps, and a drawing of all of them."""
SHEET_IMAGES = 100
"""The contact sheet shows so many images at most."""
SHEET_COLUMNS = 10
DEFAULT_BATCH = 4
"""Where a CPU has most of what batching gives, without much more memory."""

Record = dict[str, Any]


class Finished(NamedTuple):
    """An image that is written."""

    record: Record
    token_ids: NDArray[np.int32]
    """[S], raster order."""

    def line(self) -> str:
        """Its line in images.jsonl."""
        return json.dumps(self.record | {"token_ids": self.token_ids.tolist()}) + "\n"


class Advance(NamedTuple):
    """How far a run is."""

    progress: Progress
    images_before: int
    """Made before the images that are being made."""
    all_images: int

    @property
    def images_done(self) -> float:
        """Whole images and the done share of those in the making."""
        progress = self.progress
        return self.images_before + progress.images * progress.step / progress.steps

    def describe(self) -> str:
        """Which image and which step."""
        first, last = self.images_before + 1, self.images_before + self.progress.images
        images = f"image {first}" if first == last else f"images {first} to {last}"
        step = f"step {self.progress.step} of {self.progress.steps}"
        return f"{images} of {self.all_images}, {step}"


@dataclass(frozen=True)
class RunResult:
    """What a run has written."""

    out: Path
    made: int
    """Images made by this run, those of earlier runs not counted."""
    seconds: float
    """For all that was made, loading not counted."""
    records: list[Record]
    contact_sheet: Path
    tokens: Path | None
    traces: list[Path] | None
    """The drawing of each image's steps, if they were asked for."""
    notes: tuple[str, ...]
    """What must be said of how it was done."""

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "out": str(self.out),
            "made": self.made,
            "seconds": round(self.seconds, 3),
            "contact_sheet": str(self.contact_sheet),
            "tokens": str(self.tokens) if self.tokens else None,
            "traces": None if self.traces is None else [str(path) for path in self.traces],
            "notes": list(self.notes),
            "images": self.records,
        }


def generate_images(
    request: RunRequest,
    report: Callable[[str], None] = lambda stage: None,
    advance: Callable[[Advance], None] = lambda advance: None,
    edit: EditRequest | None = None,
) -> RunResult:
    """Does what is asked for.

    Args:
        request: the run.
        report: called with each stage.
        advance: called after each step of each batch.
        edit: what the images keep of another one, if they do.

    Raises:
        UserError: if the request is wrong, or another run is writing to the folder; no file is
            then written.
        Interrupted: on Ctrl-C, once what is finished is on disk.
    """
    check_request(request)
    missing = [f for f in (request.out, *request.out.parents) if not os.path.lexists(f)]
    try:
        with locked(request.out, request.resume):
            is_first = bool(missing) or not request.resume
            return write_images(request, edit, is_first, report, advance)
    except BaseException:
        with uninterrupted():
            for folder in missing:
                with contextlib.suppress(OSError):  # not made yet, or not empty
                    folder.rmdir()
        raise


def write_images(
    request: RunRequest,
    edit: EditRequest | None,
    is_first: bool,
    report: Callable[[str], None],
    advance: Callable[[Advance], None],
) -> RunResult:
    """What `generate_images` does once the folder is its own; `is_first` if it resumes no run."""
    report(f"loading {request.bundle}")
    pipeline = Pipeline.open(request.bundle, device=request.device, threads=request.threads)
    plan = plan_images(request, pipeline)
    if edit:
        plan = plan_edit(edit, plan, pipeline)
    done = read_records(request.out, plan) if request.resume else {}
    batch = request.batch or min(DEFAULT_BATCH, pipeline.manifest.max_batch or DEFAULT_BATCH)
    images = pipeline.stream(
        [request for request in plan.requests if request.index not in done],
        batch=batch,
        schedule=plan.schedule,
        progress=lambda progress: advance(Advance(progress, len(done), len(plan.labels))),
    )
    made_before = len(done)
    traces = Traces(request.out / TRACES, pipeline, plan, report) if request.trace else None
    started = time.monotonic()
    try:
        write_records(request.out, done)
        if traces:
            traces.complete(done)
        report("generating")
        for image in map(plan.finish, images):
            save_png(image.pixels, request.out / plan.file_name(image.index))
            finished = Finished(plan.record(image.index), image.token_ids.astype(np.int32))
            append_record(request.out, finished)
            done[image.index] = finished
            if traces:
                traces.save(image)
        seconds = time.monotonic() - started
        records = [done[index].record for index in sorted(done)]
        sheet = write_contact_sheet(request.out, records, request.count, plan.edit)
        # Last, so that a run that was stopped before its end has left none in its own way.
        tokens = save_token_ids(request, done)
    except BaseException as error:
        if is_first and not done:
            with uninterrupted():
                take_back([request.out / RECORDS, request.out / plan.file_name(0)])
        if not done or not isinstance(error, KeyboardInterrupt):
            raise
        raise Interrupted(
            f"interrupted: {len(done)} of {len(plan.labels)} images are in {request.out}, the "
            "same command with --resume makes the rest"
        ) from None
    drawings = [traces.drawing(index) for index in sorted(done)] if traces else None
    return RunResult(
        out=request.out,
        made=len(done) - made_before,
        seconds=seconds,
        records=records,
        contact_sheet=sheet,
        tokens=tokens,
        traces=drawings,
        notes=plan.edit.notes if plan.edit else (),
    )


@contextlib.contextmanager
def locked(out: Path, resume: bool) -> Iterator[None]:
    """Makes the folder `out` if it is not there, and keeps other runs from it.

    Raises:
        UserError: if another run is writing there, or as `check_out`.
    """
    lock_file = out / LOCK
    create_folder(out)
    taken = f"another run is writing to {out}: wait for it to end, or choose another --out"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(exclusive(lock_file, taken))
        except OSError as error:
            raise UserError(f"cannot write to {out}: {error.strerror or error}") from error
        check_out(out, resume)  # another run may just have ended
        yield


@dataclass(frozen=True)
class ImagePlan:
    """What each image of a run is made from; its index in `labels` is the image's."""

    labels: list[int | None]
    class_names: list[list[str]]
    seed: int
    sampling: Sampling
    schedule: Schedule
    vocab_size: int
    bundle: Path
    edit: Edit | None = None
    edit_request: EditRequest | None = None

    @cached_property
    def common(self) -> Record:
        """What all images of the run share."""
        content = self.schedule.group_sizes.tobytes() + self.schedule.orders.tobytes()
        return {
            "seed": self.seed,
            "cfg": self.sampling.cfg,
            "guidance": self.sampling.guidance,
            "temperature": self.sampling.temperature,
            "top_k": self.sampling.top_k,
            "top_p": self.sampling.top_p,
            "steps": self.schedule.steps,
            "schedule_sha256": hashlib.sha256(content).hexdigest(),
            "bundle": str(self.bundle),
            "manifest_sha256": sha256(self.bundle / MANIFEST),
            **self.of_edit,
        }

    @cached_property
    def of_edit(self) -> Record:
        """What all images of an edit share beside; empty for a run."""
        if not self.edit or not self.edit_request:
            return {}
        taken = self.edit.original.tobytes() + self.edit.token_ids.tobytes()
        return {
            "image": self.edit_request.image,
            "image_sha256": hashlib.sha256(taken).hexdigest(),
            "kept": np.packbits(self.edit.kept).tobytes().hex(),
            "edit_order": self.edit_request.order,
            "paste": self.edit_request.paste,
        }

    def record(self, index: int) -> Record:
        """How image `index` is made: its line in images.jsonl, but for the token ids."""
        request = self.requests[index]
        own = request.order is not None
        return {
            "file": self.file_name(index),
            "index": index,
            "class_id": self.labels[index],
            "class_name": display_name(self.class_names, self.labels[index]),
            "order": None if own else request.chance(self.schedule).order_index,
            **self.common,
        }

    def file_name(self, index: int) -> str:
        """Index and class, as in 00003_red-panda.png."""
        name = display_name(self.class_names, self.labels[index])
        slug = re.sub(r"[\W_]+", "-", name.casefold())[:60].strip("-")
        return f"{index:05d}_{slug or self.labels[index]}.png"

    @cached_property
    def requests(self) -> list[ImageRequest]:
        """Each image as the pipeline takes it."""
        labels, seed, sampling = self.labels, self.seed, self.sampling
        if self.edit and self.edit_request:
            order = self.edit_request.order
            return self.edit.requests(labels, seed, sampling, self.schedule, order)
        return [ImageRequest(label, seed, i, sampling) for i, label in enumerate(labels)]

    def finish(self, image: GeneratedImage) -> GeneratedImage:
        """An image as it is saved: of an edit, with the original's pixels where it is kept."""
        if not self.edit or not self.edit_request or not self.edit_request.paste:
            return image
        return replace(image, pixels=self.edit.paste(image.pixels))

    def image(
        self, index: int, pixels: NDArray[np.uint8], token_ids: NDArray[np.int32]
    ) -> GeneratedImage:
        """Image `index` as the pipeline gave it, of what is on disk."""
        name = display_name(self.class_names, self.labels[index])
        return GeneratedImage(
            pixels, token_ids.astype(np.int64), self.requests[index], name, self.schedule
        )


def plan_images(request: RunRequest, pipeline: Pipeline) -> ImagePlan:
    """What each image is made from, all of it checked.

    Images go round the classes: more of them (a greater -n) leaves the first ones as they are.
    """
    manifest = pipeline.manifest
    labels = resolve_classes(request.classes, manifest.class_names, manifest.model.num_classes)
    schedule = None
    if request.schedule:
        steps = request.steps
        if steps is None and Path(request.schedule).suffix == ".json":
            steps = len(manifest.phases)
        schedule = Schedule.load(request.schedule, steps=steps)
    return ImagePlan(
        labels=labels * request.count,
        class_names=manifest.class_names,
        seed=request.seed,
        sampling=pipeline.sampling(
            cfg=request.cfg,
            guidance=request.guidance,
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
        ),
        schedule=pipeline.choose_schedule(schedule),
        vocab_size=manifest.model.vocab_size,
        bundle=request.bundle,
    )


def plan_edit(request: EditRequest, plan: ImagePlan, pipeline: Pipeline) -> ImagePlan:
    """The plan of a run whose images keep a part of another one."""
    edit = pipeline.prepare_edit(
        request.source(),
        request.mask,
        box=request.box,
        outpaint=request.outpaint,
        fit=request.fit,
    )
    return replace(plan, edit=edit, edit_request=request)


# ---------------------------------------------------------------------------------- records


def read_records(out: Path, plan: ImagePlan) -> dict[int, Finished]:
    """The images that are already there, with their token ids, by index.

    Raises:
        UserError: if they were made in another way than this run would make them.
    """
    done: dict[int, Finished] = {}
    path = out / RECORDS
    if not path.is_file():
        return done
    *lines, _ = path.read_bytes().split(b"\n")  # a last one that a kill cut short is left out
    for number, line in enumerate(lines, 1):
        try:
            record = RECORD.validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
            raise UserError(
                f"{path}, line {number}: not a record of `lpd-export run` ({what}); choose another "
                "--out"
            ) from error
        index = record["index"]
        if index >= len(plan.labels):
            raise UserError(
                f"{path}, line {number}: image {index} is not among the {len(plan.labels)} of "
                "this run; choose another --out"
            )
        expected = plan.record(index)
        check_same(record, expected, f"{path}, line {number}")
        token_ids = read_token_ids(record.get("token_ids"), plan)
        if token_ids is not None and is_whole(out / record["file"]):
            done[index] = Finished(expected | {"bundle": record["bundle"]}, token_ids)
    return done


def read_token_ids(value: Any, plan: ImagePlan) -> NDArray[np.int32] | None:
    """The token ids [S] of a record, or None if it does not hold those of an image."""
    if not isinstance(value, list) or len(value) != plan.schedule.cells:
        return None
    if not all(type(token) is int and 0 <= token < plan.vocab_size for token in value):
        return None
    return np.array(value, np.int32)


def is_whole(png: Path) -> bool:
    """Whether an image is there and can be read to its end."""
    try:
        with Image.open(png) as picture:
            picture.load()
    except (OSError, SyntaxError):  # the latter for a damaged PNG
        return False
    return True


def check_same(found: Mapping[str, object], expected: Record, where: str) -> None:
    # What follows from other entries goes last, so that the cause is what is named.
    for key in sorted(expected, key=lambda key: key in ("file", "order", "index")):
        value = expected[key]
        if key != "bundle" and found.get(key) != value:
            raise UserError(
                f"{where}: made with {key} {found.get(key)!r}, this run has {value!r}: repeat the "
                "first run's command, or choose another --out"
            )


def write_records(out: Path, done: Mapping[int, Finished]) -> None:
    """Starts images.jsonl with what is there, without a line that was cut short."""
    remove_leftovers(out)
    lines = [done[index].line() for index in sorted(done)]
    write_atomically(out / RECORDS, "".join(lines).encode())


def append_record(out: Path, finished: Finished) -> None:
    path = out / RECORDS
    size = path.stat().st_size
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(finished.line())
    except OSError as error:
        with contextlib.suppress(OSError):
            os.truncate(path, size)
        raise UserError(f"cannot write {path}: {error.strerror}") from error


# ----------------------------------------------------------------------------------- traces


class Traces:
    """The pictures of each image after each step, and one drawing of them an image.

    For 00003_red-panda.png they are `trace/00003_red-panda/step_01.png` and so on, and
    `trace/00003_red-panda.png`, which is written when the others are there.
    """

    def __init__(
        self, folder: Path, pipeline: Pipeline, plan: ImagePlan, report: Callable[[str], None]
    ) -> None:
        self._folder = folder
        self._pipeline = pipeline
        self._plan = plan
        self._report = report

    def drawing(self, index: int) -> Path:
        """The drawing of image `index`."""
        return self._folder / self._plan.file_name(index)

    def pictures(self, index: int) -> list[Path]:
        """The pictures of image `index`, one a step."""
        steps = self._plan.schedule.steps
        digits = max(2, len(str(steps)))
        folder = self.drawing(index).with_suffix("")
        return [folder / f"step_{step:0{digits}d}.png" for step in range(1, steps + 1)]

    def complete(self, done: Mapping[int, Finished]) -> None:
        """Saves the trace of each of these images that has none, or not a whole one."""
        for index in sorted(done):
            if not all(map(is_whole, (*self.pictures(index), self.drawing(index)))):
                with Image.open(self._folder.parent / self._plan.file_name(index)) as picture:
                    pixels = np.asarray(picture)
                self.save(self._plan.image(index, pixels, done[index].token_ids))

    def save(self, image: GeneratedImage) -> None:
        """Writes the trace of an image.

        Raises:
            UserError: if it cannot be written.
        """
        self._report(f"drawing the steps of {self._plan.file_name(image.index)}")
        pictures = self._pipeline.trace(image)
        which = image.order_index
        order = "its own order" if which is None else f"order {which} of {image.schedule.count}"
        title = f"{image.class_name}  ·  seed {image.seed}, image {image.index}, {order}"
        drawing = draw_trace(pictures, image.schedule.group_sizes, title)
        paths = self.pictures(image.index)
        create_folder(self._folder)
        partial = self._folder / f".{uuid.uuid4().hex}.tmp"
        try:
            partial.mkdir()
            for path, picture in zip(paths, pictures, strict=True):
                save_png(picture, partial / path.name)
            if not os.path.lexists(paths[0].parent):
                partial.rename(paths[0].parent)
            else:  # a part of them, perhaps among files of the user's
                for path in paths:
                    os.replace(partial / path.name, path)
        except OSError as error:
            raise UserError(f"cannot write {paths[0].parent}: {error.strerror}") from error
        finally:
            with uninterrupted():
                shutil.rmtree(partial, ignore_errors=True)
        save_png(np.asarray(drawing), self.drawing(image.index))


# ------------------------------------------------------------------------------------ files


def create_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}") from error


def remove_leftovers(out: Path) -> None:
    """Removes what a kill cut short."""
    for leftover in (*out.glob(".*.tmp"), *(out / TRACES).glob(".*.tmp")):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def take_back(files: list[Path]) -> None:
    """Removes what a run made that came to nothing."""
    for file in files:
        with contextlib.suppress(OSError):  # not made yet
            file.unlink()


def save_token_ids(request: RunRequest, done: Mapping[int, Finished]) -> Path | None:
    """Writes token ids [images, S] int64, raster order, if they were asked for."""
    if not request.save_tokens:
        return None
    path, buffer = Path(request.save_tokens), io.BytesIO()
    np.save(buffer, np.stack([done[index].token_ids for index in sorted(done)]).astype(np.int64))
    write_atomically(path, buffer.getvalue())
    return path


def write_contact_sheet(out: Path, records: list[Record], count: int, edit: Edit | None) -> Path:
    """Draws the first images, class by class, a row a class where there are several of each.

    Of an edit, what was edited and what it keeps come first.
    """
    shown = records[:SHEET_IMAGES]
    by_class: dict[int | None, list[Record]] = {}
    for record in shown:
        by_class.setdefault(record["class_id"], []).append(record)
    ordered = [record for group in by_class.values() for record in group]
    pictures, labels = [], [record["class_name"] for record in ordered]
    for record in ordered:
        with Image.open(out / record["file"]) as picture:
            pictures.append(np.asarray(picture.convert("RGB")))
    # Whole classes side by side, as many as are comfortable to look at.
    columns = (
        SHEET_COLUMNS // count * count if count <= SHEET_COLUMNS and len(by_class) > 1 else None
    )
    if edit:
        pictures, labels = [edit.picture, edit.masked, *pictures], ["original", "mask", *labels]
        columns = min(len(pictures), SHEET_COLUMNS)
    save_png(np.asarray(contact_sheet(pictures, labels, columns)), out / SHEET)
    return out / SHEET
