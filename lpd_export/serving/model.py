"""A served bundle: what its clients may ask, and the image requests that follow from it.

Knows the bundle's manifest and schedules, and its queue. Does not know HTTP but for how a wrong
parameter is refused.
"""

from __future__ import annotations

import asyncio
import io
import secrets
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lpd_export.bundle.classes import resolve_class
from lpd_export.bundle.manifest import Bundle
from lpd_export.errors import UserError
from lpd_export.pictures import read_mask, read_picture, read_transparent
from lpd_export.runtime.editing import Box, Edit
from lpd_export.runtime.pipeline import Pipeline
from lpd_export.runtime.requests import ImageRequest
from lpd_export.runtime.sampler import Sampling
from lpd_export.schedule.schedule_file import FOREIGN, Schedule
from lpd_export.serving.batching import Client, Event, Job, Makers, ModelQueue
from lpd_export.serving.metrics import Meters
from lpd_export.serving.refusals import RefusedError, refusal
from lpd_export.serving.request import ServeRequest, batch_of
from lpd_export.serving.schema import EditForm, GenerationRequest, Settings

RANDOM_SEEDS = 2**32
"""A seed that nobody gave is below this, which every client's numbers hold."""
KEPT_SCHEDULES = 16
PICTURES = 8
"""Uploaded ones that are in memory at once; the others wait as files."""

Pixels = NDArray[np.uint8]


class Plan(NamedTuple):
    """What a request to the server comes to."""

    requests: list[ImageRequest]
    schedule: Schedule
    finish: Callable[[Pixels], Pixels]
    """From the pipeline's pixels to those that are sent."""


class ServedModel:
    """A bundle with its name and its queue."""

    def __init__(
        self, name: str, bundle: Bundle, request: ServeRequest, makers: Makers, meters: Meters
    ) -> None:
        self.name, self.manifest = name, bundle.manifest
        self.schedule = bundle.schedule()
        batch = batch_of(bundle, request.batch)
        self.queue = ModelQueue(
            partial(makers.open, bundle, batch),
            batch,
            request.max_queue,
            request.max_wait / 1e3,
            makers.places(bundle),
            self._count_batch,
        )
        self._meters = meters
        self._schedules: dict[tuple[int, str], Schedule] = {}
        self._making = threading.Lock()
        self._pictures = asyncio.Semaphore(PICTURES)
        meters.queue.labels(name).set_function(lambda: self.queue.waiting)

    def _count_batch(self, images: int, seconds: float) -> None:
        self._meters.batches.labels(self.name).observe(images)
        self._meters.stages.labels(self.name, "generate").observe(seconds)

    @property
    def ready(self) -> bool:
        """Whether the bundle is loaded."""
        return self.queue.opened.done() and self.queue.opened.exception() is None

    def description(self) -> dict[str, Any]:
        """What clients may know of it."""
        manifest = self.manifest
        return {
            "id": self.name,
            "object": "model",
            "created": 0,
            "owned_by": "lpd-export",
            "resolution": manifest.resolution,
            "grid": manifest.model.grid,
            "steps": self.schedule.steps,
            "order": self.schedule.kind,
            "classes": manifest.model.num_classes,
            "cfg": manifest.cfg,
            "guidance": manifest.guidance,
            "precision": manifest.precision,
            "backend": manifest.backend,
            "batch": self.queue.batch,
        }

    # -------------------------------------------------------------------------------- planning

    async def plan_generation(self, asked: GenerationRequest) -> Plan:
        """The images of a request without a picture.

        Raises:
            RefusedError: for a class, a size or steps that the model has not.
        """
        label, seed, sampling = self._common(asked)
        schedule = await self._schedule_of(asked.steps, asked.order)
        requests = [ImageRequest(label, seed, asked.index + i, sampling) for i in range(asked.n)]
        return Plan(requests, schedule, lambda pixels: pixels)

    async def plan_edit(self, asked: EditForm) -> Plan:
        """The images of a request that keep a part of a picture; its tokens are the model's work.

        Raises:
            RefusedError: as `plan_generation`, for a picture that cannot be read, or a mask that
                makes no sense.
            QueueFullError, StoppingError: if nothing is taken.
        """
        label, seed, sampling = self._common(asked)
        schedule = await self._schedule_of(asked.steps, None)
        self.queue.check_room(asked.n)  # before a picture is read
        async with self._pictures:
            image = await asked.image.read()
            mask = None if asked.mask is None else await asked.mask.read()
            prepare = await asyncio.to_thread(self._read_edit, asked, image, mask)
            try:
                edit = await asyncio.wrap_future(self.queue.call(prepare))
            except UserError as error:
                raise refusal(error, "image", wrong=True) from error
        labels = [label] * asked.n
        requests = await asyncio.to_thread(
            edit.requests, labels, seed, sampling, schedule, asked.order, asked.index
        )
        return Plan(requests, schedule, edit.paste if asked.paste else lambda pixels: pixels)

    def _read_edit(
        self, asked: EditForm, image: bytes, mask: bytes | None
    ) -> Callable[[Pipeline], Edit]:
        """Reads what was uploaded, so that the model's threads need not."""
        name = "image"
        try:
            picture = read_picture(io.BytesIO(image))
            new: NDArray[np.bool_] | None = None
            if mask is not None:
                name = "mask"
                transparent = read_transparent(io.BytesIO(mask))
                new = read_mask(io.BytesIO(mask)) if transparent is None else transparent
            elif asked.box is None and asked.outpaint is None:
                new = read_transparent(io.BytesIO(image))
        except UserError as error:
            raise RefusedError(400, f"{name}: {error}", name) from error
        box: Box | None = None
        if asked.box is not None:
            left, top, right, bottom = map(int, asked.box.split(","))
            box = left, top, right, bottom
        ways = {"mask": new, "box": box, "outpaint": asked.outpaint}
        if sum(way is not None for way in ways.values()) != 1:
            raise RefusedError(
                400,
                "say what is to be made anew, by one of: mask, transparent or else white where the "
                "image is to change; transparent parts of the image; box; or outpaint",
                "mask",
            )
        return partial(
            Pipeline.prepare_edit,
            image=picture,
            mask=new,
            box=box,
            outpaint=asked.outpaint,
            fit=asked.fit,
        )

    def _common(self, asked: GenerationRequest | EditForm) -> tuple[int | None, int, Sampling]:
        """Label, seed and sampling of a request."""
        side = self.manifest.resolution
        if asked.size not in (None, "auto", f"{side}x{side}"):
            raise RefusedError(
                400,
                f"size must be {side}x{side} or auto for {self.name}, but it is {asked.size!a}",
                "size",
            )
        try:
            names, classes = self.manifest.class_names, self.manifest.model.num_classes
            label = resolve_class(asked.prompt, names, classes)
        except UserError as error:
            sentence = str(error).replace(
                "`lpd-export inspect BUNDLE --classes`", f"GET /v1/models/{self.name}"
            )
            raise RefusedError(400, sentence, "prompt", "unknown_class") from error
        seed = secrets.randbelow(RANDOM_SEEDS) if asked.seed is None else asked.seed
        return label, seed, self._sampling(asked)

    def _sampling(self, asked: Settings) -> Sampling:
        return Sampling(
            cfg=self.manifest.cfg if asked.cfg is None else asked.cfg,
            guidance=asked.guidance or self.manifest.guidance,
            temperature=asked.temperature,
            top_k=asked.top_k,
            top_p=asked.top_p,
        )

    async def _schedule_of(self, steps: int | None, order: str | None) -> Schedule:
        """The bundle's schedule, or one that `lpd-export schedule make` makes of these."""
        own = self.schedule
        steps, order = steps or own.steps, order or own.kind
        if (steps, order) == (own.steps, own.kind):
            return own
        if steps > own.cells:
            raise RefusedError(
                400,
                f"steps must be from 1 to {own.cells} for {self.name}, a cell a step, but it "
                f"is {steps}",
                "steps",
            )
        kind = "locality" if order == FOREIGN else order
        if made := self._schedules.get((steps, kind)):
            return made
        return await asyncio.to_thread(self._make_schedule, steps, kind)

    def _make_schedule(self, steps: int, kind: str) -> Schedule:
        with self._making:
            key = steps, kind
            if key not in self._schedules:
                made = Schedule.make(self.schedule.grid, steps, kind)
                while len(self._schedules) >= KEPT_SCHEDULES:
                    self._schedules.pop(next(iter(self._schedules)))
                self._schedules[key] = made
            return self._schedules[key]

    # ------------------------------------------------------------------------------------- work

    def submit(self, plan: Plan, partials: int, client: Client) -> asyncio.Queue[tuple[int, Event]]:
        """Puts the images of a plan into the queue.

        Returns:
            Where their events come, each with the number of its image.

        Raises:
            QueueFullError, StoppingError: if they are not taken.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

        def deliver(number: int, event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, (number, event))

        due = steps_to_show(plan.schedule.steps, partials)
        self.queue.submit(
            [
                Job(request, plan.schedule, client, partial(deliver, number), due)
                for number, request in enumerate(plan.requests)
            ]
        )
        return events


def steps_to_show(steps: int, partials: int) -> list[int]:
    """After which of the steps there are partial images: spread evenly, never after the last."""
    partials = min(partials, steps - 1)
    return [round(steps * (i + 1) / (partials + 1)) for i in range(partials)]
