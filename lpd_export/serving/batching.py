"""Images of many users in shared batches: the queue of a model, and the threads that empty it.

What waits is rows of buffers, so that a batch mixes users, classes, seeds, guidance, filters and
given cells; only steps of other sizes make a batch of their own. A batch starts when it is full or
its oldest image has waited long enough. Does not know who makes a batch, and where, nor HTTP.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from lpd_export.bundle.manifest import Bundle
from lpd_export.errors import UserError
from lpd_export.runtime.pipeline import Pipeline
from lpd_export.runtime.requests import GeneratedImage, ImageRequest
from lpd_export.schedule.schedule_file import Schedule

Result = TypeVar("Result")
log = logging.getLogger("lpd_export.serving")


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
    """Called by the queue's threads: with each partial image, then with the image or why not."""
    partial_steps: Sequence[int] = ()
    """After which steps it is to be seen, rising."""
    entered: float = field(default_factory=time.monotonic)
    shown: int = 0
    """The last step that was."""


class Maker(Protocol):
    """Who makes a batch: a pipeline in this process, or replicas elsewhere."""

    def make(self, jobs: Sequence[Job]) -> list[GeneratedImage]:
        """An image for each job; partial ones are delivered on the way.

        Raises:
            AbandonedError: if nobody waits for any of them any more.
            UserError: if one of them cannot be made.
        """

    def call(self, task: Callable[[Pipeline], Result]) -> Result:
        """Runs something else that needs the pipeline."""

    def left(self) -> None:
        """Is told, from any thread, that a client has left."""

    def close(self) -> None:
        """Gives back what it holds; nothing follows."""


class Makers(Protocol):
    """Where the batches of bundles are made."""

    def places(self, bundle: Bundle) -> int:
        """How many batches of a bundle are made at once."""

    def open(self, bundle: Bundle, batch: int) -> Maker:
        """Who makes a bundle's batches of so many images at most, loaded.

        Raises:
            UserError: if nobody can.
            StoppingError: after `stop`.
        """

    def stop(self) -> None:
        """Lets `open` wait no longer than it must."""


class ModelQueue:
    """What waits for a model, and the threads that hand it on, a batch each.

    Args:
        open_maker: gives who makes batches; called by the first thread, which is the only one that
            ever uses it if there is one place.
        batch: images made together, at most.
        max_queue: images that may wait.
        max_wait: seconds that the oldest image waits for others.
        places: batches made at once.
        on_batch: told each batch's size and seconds.
    """

    def __init__(
        self,
        open_maker: Callable[[], Maker],
        batch: int,
        max_queue: int,
        max_wait: float,
        places: int = 1,
        on_batch: Callable[[int, float], None] = lambda images, seconds: None,
    ) -> None:
        self.batch, self.max_queue, self.max_wait = batch, max_queue, max_wait
        self.opened: Future[Maker] = Future()
        """Who makes batches, or why nobody does."""
        self._open_maker, self._places, self._on_batch = open_maker, places, on_batch
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._tasks: deque[tuple[Future[Any], Callable[[Pipeline], Any]]] = deque()
        self._stopping = False
        self._pace = 0.0  # seconds an image, lately
        self._thread = threading.Thread(target=self._open, daemon=True)

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
            self._changed.notify_all()

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
            self._changed.notify_all()
        return future

    def leave(self, client: Client) -> None:
        """Drops what a client still waits for; if nobody else waits for a batch, that too."""
        client.left = True
        with self._changed:
            self._waiting = deque(job for job in self._waiting if job.client is not client)
        if self.opened.done() and not self.opened.exception():
            self.opened.result().left()

    def stop(self) -> None:
        """Takes nothing new; what has begun is finished, what has not is told so."""
        with self._changed:
            self._stopping = True
            refused = [job for job in self._waiting if not job.client.begun]
            self._waiting = deque(job for job in self._waiting if job.client.begun)
            self._changed.notify_all()
        for job in refused:
            job.deliver(StoppingError())

    def join(self) -> None:
        """Waits for the threads to end, after `stop`."""
        self._thread.join()

    # ----------------------------------------------------------------------- the threads' own

    def _open(self) -> None:
        try:
            maker = self._open_maker()
        except Exception as error:
            self.opened.set_exception(error)
            return
        self.opened.set_result(maker)
        others = [
            threading.Thread(target=self._work, args=(maker,), daemon=True)
            for _ in range(self._places - 1)
        ]
        for thread in others:
            thread.start()
        self._work(maker)
        for thread in others:
            thread.join()
        maker.close()

    def _work(self, maker: Maker) -> None:
        while (work := self._next()) is not None:
            if isinstance(work, list):
                self._make(maker, work)
            else:
                future, task = work
                try:
                    future.set_result(maker.call(task))
                except Exception as error:
                    future.set_exception(error)

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

    def _make(self, maker: Maker, jobs: list[Job]) -> None:
        """Makes a batch and delivers it; one image's fault is not that of the others."""
        started = time.monotonic()
        try:
            images = maker.make(jobs)
        except AbandonedError:
            return
        except Exception as error:
            if not isinstance(error, UserError):
                log.exception("a batch of %d failed", len(jobs))
            if len(jobs) == 1:
                jobs[0].deliver(error)
                return
            for job in jobs:
                self._make(maker, [job])
            return
        seconds = time.monotonic() - started
        self._pace = seconds / len(jobs) / self._places
        self._on_batch(len(jobs), seconds)
        for job, image in zip(jobs, images, strict=True):
            image = replace(image, request=job.request, schedule=job.schedule)
            job.deliver(Finished(image, started - job.entered, seconds))
