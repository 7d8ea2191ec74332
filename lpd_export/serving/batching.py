"""Images of many users in shared batches: a queue, and the thread that a model belongs to.

What waits is rows of buffers, so that a batch mixes users, classes, seeds, guidance, filters and
given cells; only steps of other sizes make a batch of their own. A batch starts when it is full or
its oldest image has waited long enough. Knows the pipeline; does not know HTTP.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lpd_export.errors import UserError
from lpd_export.runtime.pipeline import Pipeline
from lpd_export.runtime.requests import GeneratedImage, ImageRequest
from lpd_export.schedule.schedule_file import Schedule

Result = TypeVar("Result")
log = logging.getLogger("lpd_export.serving")

CPU_BUFFERS = 2
"""Sets of buffers that are kept on a CPU: of a lone image and of a full batch."""


class QueueFullError(Exception):
    """There is no room for so many more images; `seconds` is when there may be."""

    def __init__(self, waiting: int, limit: int, seconds: int) -> None:
        super().__init__(
            f"{waiting} images wait, and {limit} may: try again in {seconds} "
            f"second{'s' * (seconds != 1)}"
        )
        self.seconds = seconds


class StoppingError(Exception):
    """The server is stopping: only what has begun is finished."""

    def __init__(self) -> None:
        super().__init__("the server is stopping: try again in a few seconds")


class AbandonedError(Exception):
    """Nobody waits for any image of a batch any more."""


@dataclass(eq=False)
class Client:
    """Who waits for the images of one request."""

    left: bool = False
    begun: bool = False


class Partial(NamedTuple):
    """An image after a step."""

    step: int
    pixels: NDArray[np.uint8]


class Finished(NamedTuple):
    """An image, and when it was made: seconds in the queue, seconds of its batch."""

    image: GeneratedImage
    waited: float
    made: float


Event = Partial | Finished | Exception


@dataclass(eq=False)
class Job:
    """An image that somebody waits for."""

    request: ImageRequest
    schedule: Schedule
    client: Client
    deliver: Callable[[Event], None]
    """Called by the model's thread with each partial image, then once with the image or why not."""
    partial_steps: Sequence[int] = ()
    """After which steps it is to be seen, rising."""
    entered: float = field(default_factory=time.monotonic)
    shown: int = 0
    """The last step that was."""


class ModelThread:
    """The thread that opens a bundle and alone runs it.

    Args:
        open_pipeline: gives the pipeline; called by the thread.
        batch: images made together, at most.
        max_queue: images that may wait.
        max_wait: seconds that the oldest image waits for others.
        on_batch: told each batch's size and seconds.
    """

    def __init__(
        self,
        open_pipeline: Callable[[], Pipeline],
        batch: int,
        max_queue: int,
        max_wait: float,
        on_batch: Callable[[int, float], None] = lambda images, seconds: None,
    ) -> None:
        self.batch, self.max_queue, self.max_wait = batch, max_queue, max_wait
        self.opened: Future[Pipeline] = Future()
        """The pipeline, or why there is none."""
        self._open_pipeline, self._on_batch = open_pipeline, on_batch
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._tasks: deque[tuple[Future[Any], Callable[[Pipeline], Any]]] = deque()
        self._stopping = False
        self._pace = 0.0  # seconds an image, lately
        self._pipelines: OrderedDict[tuple[int, bool], Pipeline] = OrderedDict()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._stopping

    @property
    def waiting(self) -> int:
        """Images in the queue."""
        return len(self._waiting)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Puts a request's images into the queue, all or none.

        Raises:
            QueueFullError, StoppingError: as `check_room`.
        """
        with self._changed:
            self.check_room(len(jobs))
            self._waiting.extend(jobs)
            self._changed.notify()

    def check_room(self, images: int = 1) -> None:
        """Sees that so many more would be taken.

        Raises:
            QueueFullError: if there is no room.
            StoppingError: after `stop`.
        """
        with self._changed:
            if self._stopping:
                raise StoppingError
            waiting = len(self._waiting) + len(self._tasks)
            if waiting + images > self.max_queue:
                seconds = max(1, math.ceil(self._pace * waiting))
                raise QueueFullError(waiting, self.max_queue, seconds)

    def call(self, task: Callable[[Pipeline], Result]) -> Future[Result]:
        """Runs something else that needs the model, between two batches.

        Raises:
            QueueFullError, StoppingError: as `check_room`.
        """
        future: Future[Result] = Future()
        with self._changed:
            self.check_room()
            self._tasks.append((future, task))
            self._changed.notify()
        return future

    def leave(self, client: Client) -> None:
        """Drops what a client still waits for; if nobody else waits for a batch, that too."""
        client.left = True
        with self._changed:
            self._waiting = deque(job for job in self._waiting if job.client is not client)

    def stop(self) -> None:
        """Takes nothing new; what has begun is finished, what has not is told so."""
        with self._changed:
            self._stopping = True
            refused = [job for job in self._waiting if not job.client.begun]
            self._waiting = deque(job for job in self._waiting if job.client.begun)
            self._changed.notify()
        for job in refused:
            job.deliver(StoppingError())

    def join(self) -> None:
        """Waits for the thread to end, after `stop`."""
        self._thread.join()

    # ------------------------------------------------------------------------ the thread's own

    def _work(self) -> None:
        try:
            pipeline = self._open_pipeline()
        except Exception as error:
            self.opened.set_exception(error)
            return
        self.opened.set_result(pipeline)
        while (work := self._next()) is not None:
            if isinstance(work, list):
                self._make(work)
            else:
                future, task = work
                try:
                    future.set_result(task(pipeline))
                except Exception as error:
                    future.set_exception(error)
        for each in (*self._pipelines.values(), pipeline):
            each.close()

    def _next(self) -> list[Job] | tuple[Future[Any], Callable[[Pipeline], Any]] | None:
        """Waits for the next batch or task; None when there will be none."""
        with self._changed:
            while True:
                if self._tasks:
                    return self._tasks.popleft()
                if not self._waiting:
                    if self._stopping:
                        return None
                    self._changed.wait()
                    continue
                oldest = self._waiting[0]
                sizes = oldest.schedule.group_sizes.tobytes()
                jobs = [j for j in self._waiting if j.schedule.group_sizes.tobytes() == sizes]
                left = oldest.entered + self.max_wait - time.monotonic()
                if len(jobs) < self.batch and left > 0 and not self._stopping:
                    self._changed.wait(left)
                    continue
                chosen = jobs[: self.batch]
                taken = set(map(id, chosen))
                self._waiting = deque(job for job in self._waiting if id(job) not in taken)
                for job in chosen:
                    job.client.begun = True
                return chosen

    def _make(self, jobs: list[Job]) -> None:
        """Makes a batch and delivers it; one image's fault is not that of the others."""
        started = time.monotonic()
        try:
            images = self._generate(jobs)
        except AbandonedError:
            return
        except Exception as error:
            if not isinstance(error, UserError):
                log.exception("a batch of %d failed", len(jobs))
            if len(jobs) == 1:
                jobs[0].deliver(error)
                return
            for job in jobs:
                self._make([job])
            return
        seconds = time.monotonic() - started
        self._pace = seconds / len(jobs)
        self._on_batch(len(jobs), seconds)
        for job, image in zip(jobs, images, strict=True):
            job.deliver(Finished(image, started - job.entered, seconds))

    def _generate(self, jobs: list[Job]) -> list[GeneratedImage]:
        # One schedule for all: where an image's own is another, its order is said.
        schedule = jobs[0].schedule
        requests = [
            job.request
            if job.schedule is schedule
            else replace(job.request, order=job.request.order_of(job.schedule))
            for job in jobs
        ]
        size = self._size(len(jobs))
        # Rows beyond the images repeat the last one.
        padded = [*requests, *[requests[-1]] * (size - len(requests))]
        pipeline = self._pipeline(size, any(request.sampling.guided for request in requests))

        def watch(step: int, token_ids: Tensor) -> None:
            if all(job.client.left for job in jobs):
                raise AbandonedError
            for row, job in enumerate(jobs):
                for due in job.partial_steps:
                    if job.shown < due <= step and not job.client.left:
                        job.shown = due
                        tokens = token_ids[row].cpu().numpy()
                        pixels = pipeline.picture_after(due, tokens, job.request, job.schedule)
                        job.deliver(Partial(due, pixels))

        images = pipeline.stream(padded, batch=size, schedule=schedule, watch=watch)
        made = list(images)[: len(jobs)]
        return [replace(i, request=j.request, schedule=j.schedule) for i, j in zip(made, jobs)]  # noqa: B905

    def _size(self, images: int) -> int:
        """Rows of the buffers: of few sizes where each is a recording, and rows cost little."""
        if self.opened.result().executor.device.type == "cpu":
            return images
        return min(1 << (images - 1).bit_length(), self.batch)

    def _pipeline(self, size: int, guided: bool) -> Pipeline:
        """The pipeline whose buffers are of this size, over the one set of graphs."""
        key, first = (size, guided), self.opened.result()
        if key in self._pipelines:
            self._pipelines.move_to_end(key)
            return self._pipelines[key]
        on_cpu = first.executor.device.type == "cpu"
        kept = CPU_BUFFERS if on_cpu else 2 * (1 + self.batch.bit_length())
        while len(self._pipelines) >= kept:
            self._pipelines.popitem(last=False)[1].close()
        made = Pipeline(first.manifest, first.choose_schedule(None), first.executor)
        self._pipelines[key] = made
        return made
