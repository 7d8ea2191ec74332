"""What `lpd-export run` does: images and their records in a folder, whole at any moment.

Every image is written as soon as it is made and only then recorded, so that an interrupted run
keeps what it has and can go on. Runs do not share a folder. Does not know the command line.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lpd_export.bulk.containers import Pixels, container, is_whole
from lpd_export.bulk.folder import FAILURES, ImageFolder, Made
from lpd_export.bulk.making import make_images
from lpd_export.bulk.plan import Plan, Record, make_plan
from lpd_export.bulk.shards import Shards, copy_images, shard_positions, write_shard
from lpd_export.bulk.storing import Storing
from lpd_export.bundle.manifest import Bundle
from lpd_export.edit_request import EditRequest
from lpd_export.errors import Interrupted, UserError
from lpd_export.files import exclusive, uninterrupted
from lpd_export.images import contact_sheet, draw_trace, save_png
from lpd_export.run_request import LOCK, RECORDS, RunRequest, check_out, check_request
from lpd_export.runtime.editing import Edit
from lpd_export.runtime.pipeline import Pipeline, Progress

SHEET = "contact_sheet.png"
TRACES = "trace"
"""For each image a folder of its steps, and a drawing of all of them."""
SHEET_IMAGES = 100
"""The contact sheet shows so many images at most."""
SHEET_COLUMNS = 10
NOTES = 10
"""What is to be said of edits, of so many at most."""
DEFAULT_BATCH = 4
"""Where a CPU has most of what batching gives, without much more memory."""


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
    failed: int
    """Images that could not be made, in this run or earlier ones."""
    seconds: float
    """For all that was made, loading not counted."""
    folder: ImageFolder
    contact_sheet: Path | None
    """None if every image failed."""
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
            "failed": self.failed,
            "seconds": round(self.seconds, 3),
            "contact_sheet": str(self.contact_sheet) if self.contact_sheet else None,
            "tokens": str(self.tokens) if self.tokens else None,
            "traces": None if self.traces is None else [str(path) for path in self.traces],
            "notes": list(self.notes),
            "images": [without_tokens(record) for record in self.folder.records()],
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
    missing = [f for f in (request.folder, *request.folder.parents) if not os.path.lexists(f)]
    try:
        with locked(request.folder):
            return write_images(request, edit, report, advance)
    except BaseException:
        with uninterrupted():
            for folder in missing:
                with contextlib.suppress(OSError):  # not made yet, or not empty
                    folder.rmdir()
        raise


def write_images(
    request: RunRequest,
    edit: EditRequest | None,
    report: Callable[[str], None],
    advance: Callable[[Advance], None],
) -> RunResult:
    """What `generate_images` does once the folder is its own."""
    bundle = Bundle.open(request.bundle)
    manifest, plan = bundle.manifest, make_plan(request, bundle, edit)
    pipeline, notes = None, notes_of_edits(plan)
    if edit:
        report(f"loading {request.bundle}")
        plan.edits.pipeline = pipeline = open_pipeline(request)
    positions = shard_positions(plan.images, request.shard_number)
    out = request.folder
    kind = container(request.format, out, manifest.resolution, plan.images, request.per_file)
    is_first = not (out / RECORDS).exists()
    folder = ImageFolder(out, plan, positions, kind, request.keep_going)
    if request.save_tokens and os.path.lexists(request.save_tokens):
        check_token_ids(Path(request.save_tokens), folder)
    made_before, gone_before = len(folder.made), len(positions) - len(folder.missing)
    if pipeline is None and not request.workers and (len(folder.missing) or request.trace):
        report(f"loading {request.bundle}")
        pipeline = open_pipeline(request)
    images: Iterator[Made] = iter(())
    batch = request.batch or min(DEFAULT_BATCH, manifest.max_batch or DEFAULT_BATCH)
    gone = gone_before
    if request.workers and len(folder.missing):
        from lpd_export.bulk.workers import made_by_workers  # Ray need not be there

        report(f"starting {request.workers} workers")
        images = made_by_workers(request, request.workers, bundle, folder.missing, batch)
    elif pipeline and len(folder.missing):
        images = make_images(
            pipeline,
            plan,
            folder.missing,
            batch,
            request.keep_going,
            lambda progress: advance(Advance(progress, gone, len(positions))),
        )
    traces = None
    if pipeline and request.trace:
        traces = Traces(out / TRACES, pipeline, plan, folder, report)
    started = time.monotonic()
    try:
        folder.restore()
        if shard := request.shard_number:
            write_shard(request, plan, shard)
        if traces:
            traces.complete()
        report("generating")
        with Storing(folder, 1 if traces else batch) as storing:
            for image in images:
                gone += 1
                storing.put(image)
                if request.workers:
                    advance(Advance(Progress(image.position, 1, 1, 1), gone - 1, len(positions)))
                if traces and not image.failure:
                    storing.flush()  # a trace is of an image that is there
                    traces.save(image)
        folder.finish()
        seconds = time.monotonic() - started
        edited = plan.edits.edit(edit) if edit else None
        sheet = write_contact_sheet(folder, request.count, edited)
        # Last, so that a run that was stopped before its end has left none in its own way.
        tokens = save_token_ids(request, plan, folder)
    except BaseException as error:
        made = len(folder.made)
        if is_first and not made and not len(folder.failed):
            with uninterrupted():
                folder.take_back()
        if not made or not isinstance(error, KeyboardInterrupt):
            raise
        raise Interrupted(
            f"interrupted: {made} of {len(positions)} images are in {out}, the same "
            "command makes the rest"
        ) from None
    if len(folder.failed):
        notes.append(f"{len(folder.failed)} images could not be made: see {out / FAILURES}")
    return RunResult(
        out=out,
        made=len(folder.made) - made_before,
        failed=len(folder.failed),
        seconds=seconds,
        folder=folder,
        contact_sheet=sheet,
        tokens=tokens,
        traces=[traces.drawing(position) for position in folder.made.tolist()] if traces else None,
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class MergeResult:
    """What a merge has written."""

    out: Path
    images: int
    failed: int
    shards: int

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {**vars(self), "out": str(self.out)}


def merge_shards(source: Path, out: Path, report: Callable[[str], None]) -> MergeResult:
    """Writes what a run without shards would have written; stopped, it goes on when called again.

    Raises:
        UserError: if a shard is missing or not whole, or something cannot be written.
    """
    check_out(out)
    shards = Shards(source)
    of = shards.of
    with locked(out):
        kind = container(of["format"], out, of["resolution"], shards.images, of["per_file"])
        positions = shard_positions(shards.images, None)
        folder = ImageFolder(out, shards, positions, kind, keep_going=True)
        folder.restore()
        report(f"merging {of['shards']} shards")
        copy_images(shards, folder)
        folder.finish()
        write_contact_sheet(folder, of["per_class"], None)
    return MergeResult(out, len(folder.made), len(folder.failed), of["shards"])


def open_pipeline(request: RunRequest) -> Pipeline:
    """The bundle, loaded."""
    return Pipeline.open(request.bundle, device=request.device, threads=request.threads)


def notes_of_edits(plan: Plan) -> list[str]:
    """What must be said of how pictures were taken, each with its line.

    Raises:
        UserError: if one cannot be read, or what is asked for cannot be made of it; with its line.
    """
    notes: list[str] = []
    for group in plan.groups:
        if group.edit is None:
            continue
        where = f"{group.where}: " if group.where else ""
        try:
            notes += [where + note for note in plan.edits.selection(group.edit).notes]
        except UserError as error:
            raise UserError(f"{where}{error}") from error
    return notes if len(notes) <= NOTES else [*notes[:NOTES], f"{len(notes) - NOTES} more of edits"]


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
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
        check_out(out)  # another run may just have ended
        yield


# ----------------------------------------------------------------------------------- traces


class Traces:
    """The pictures of each image after each step, and one drawing of them an image.

    For 00003_red-panda.png they are `trace/00003_red-panda/step_01.png` and so on, and
    `trace/00003_red-panda.png`, which is written when the others are there.
    """

    def __init__(
        self,
        out: Path,
        pipeline: Pipeline,
        plan: Plan,
        folder: ImageFolder,
        report: Callable[[str], None],
    ) -> None:
        self._out = out
        self._pipeline = pipeline
        self._plan, self._folder = plan, folder
        self._report = report

    def drawing(self, position: int) -> Path:
        """The drawing of an image."""
        return self._out / f"{self._plan.stem(position)}.png"

    def pictures(self, position: int) -> list[Path]:
        """The pictures of an image, one a step."""
        steps = self._plan.schedule.steps
        digits = max(2, len(str(steps)))
        folder = self._out / self._plan.stem(position)
        return [folder / f"step_{step:0{digits}d}.png" for step in range(1, steps + 1)]

    def complete(self) -> None:
        """Saves the trace of each image that is there and has none, or not a whole one."""
        for record, pixels in self._folder.pixels():
            position = record["position"]
            if not all(map(is_whole, (*self.pictures(position), self.drawing(position)))):
                self.save(Made(position, pixels, record["token_ids"]))

    def save(self, made: Made) -> None:
        """Writes the trace of an image.

        Raises:
            UserError: if it cannot be written.
        """
        assert isinstance(made.content, np.ndarray)
        image = self._plan.image(made.position, made.content, np.array(made.token_ids))
        self._report(f"drawing the steps of {self.drawing(made.position).name}")
        pictures = self._pipeline.trace(image)
        which = image.order_index
        order = "its own order" if which is None else f"order {which} of {image.schedule.count}"
        title = f"{image.class_name}  ·  seed {image.seed}, image {image.index}, {order}"
        drawing = draw_trace(pictures, image.schedule.group_sizes, title)
        paths = self.pictures(made.position)
        create_folder(self._out)
        partial = self._out / f".{uuid.uuid4().hex}.tmp"
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
        save_png(np.asarray(drawing), self.drawing(made.position))


# ------------------------------------------------------------------------------------ files


def create_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}") from error


def without_tokens(record: Record) -> Record:
    """A record as it is told: token ids are many."""
    return {key: value for key, value in record.items() if key != "token_ids"}


def check_token_ids(path: Path, folder: ImageFolder) -> None:
    """Raises UserError unless a file holds the token ids of the images that are there."""
    with contextlib.suppress(OSError, ValueError, TypeError):  # no array, or one number
        saved = np.load(path, mmap_mode="r")
        if isinstance(saved, np.ndarray) and len(saved) == len(folder.made):
            rows = zip(saved, folder.records(), strict=True)
            if all(np.array_equal(row, record["token_ids"]) for row, record in rows):
                return
    raise UserError(f"{path} exists and is not this run's: choose another --save-tokens")


def save_token_ids(request: RunRequest, plan: Plan, folder: ImageFolder) -> Path | None:
    """Writes token ids [images, S] int64, raster order, if they were asked for."""
    if not request.save_tokens:
        return None
    path = Path(request.save_tokens)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    shape = len(folder.made), plan.schedule.cells
    header = {"descr": "<i8", "fortran_order": False, "shape": shape}
    try:
        with open(temporary, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for record in folder.records():
                file.write(np.array(record["token_ids"], "<i8").tobytes())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_contact_sheet(folder: ImageFolder, count: int, edit: Edit | None) -> Path | None:
    """Draws the first images, class by class, a row a class where there are several of each.

    Of an edit, what was edited and what it keeps come first.
    """
    by_class: dict[int | None, list[tuple[Record, Pixels]]] = {}
    for record, pixels in folder.pixels(SHEET_IMAGES):
        by_class.setdefault(record["class_id"], []).append((record, pixels))
    if not by_class:
        return None
    shown = [image for group in by_class.values() for image in group]
    labels = [record["class_name"] for record, _ in shown]
    pictures = [pixels for _, pixels in shown]
    # Whole classes side by side, as many as are comfortable to look at.
    columns = (
        SHEET_COLUMNS // count * count if count <= SHEET_COLUMNS and len(by_class) > 1 else None
    )
    if edit:
        pictures, labels = [edit.picture, edit.masked, *pictures], ["original", "mask", *labels]
        columns = min(len(pictures), SHEET_COLUMNS)
    save_png(np.asarray(contact_sheet(pictures, labels, columns)), folder.out / SHEET)
    return folder.out / SHEET
