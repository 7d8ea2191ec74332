"""Batches made in this process: a pipeline, and sets of buffers of the sizes that come.

Knows rows, padding and what a step shows. Does not know what waits, or for whom.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lpd_export.bundle.manifest import Bundle
from lpd_export.runtime.arrays import HOST
from lpd_export.runtime.pipeline import Pipeline
from lpd_export.runtime.requests import GeneratedImage
from lpd_export.serving.batching import AbandonedError, Job, Maker, Partial, Result
from lpd_export.serving.request import ServeRequest

CPU_BUFFERS = 2
"""Sets of buffers that are kept on a CPU: of a lone image and of a full batch."""


class PipelineMaker:
    """A `Maker` over one set of graphs; of one thread, that which opened the pipeline.

    Args:
        pipeline: is closed with this.
        batch: images made together, at most.
    """

    def __init__(self, pipeline: Pipeline, batch: int) -> None:
        self._first, self._batch = pipeline, batch
        self._on_cpu = pipeline.executor.device == HOST
        self._pipelines: OrderedDict[tuple[int, bool], Pipeline] = OrderedDict()

    def make(self, jobs: Sequence[Job]) -> list[GeneratedImage]:
        """As `Maker` says."""
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

        def watch(step: int, token_ids: NDArray[np.int64]) -> None:
            if all(job.client.left for job in jobs):
                raise AbandonedError
            for row, job in enumerate(jobs):
                for due in job.partial_steps:
                    if job.shown < due <= step and not job.client.left:
                        job.shown = due
                        tokens = token_ids[row]
                        pixels = pipeline.picture_after(due, tokens, job.request, job.schedule)
                        job.deliver(Partial(due, pixels))

        images = pipeline.stream(padded, batch=size, schedule=schedule, watch=watch)
        return list(images)[: len(jobs)]

    def call(self, task: Callable[[Pipeline], Result]) -> Result:
        """As `Maker` says."""
        return task(self._first)

    def left(self) -> None:
        """A batch notices it after its step."""

    def close(self) -> None:
        """Gives back the buffers."""
        for each in (*self._pipelines.values(), self._first):
            each.close()

    def _size(self, images: int) -> int:
        """Rows of the buffers: of few sizes where each is a recording, and rows cost little."""
        if self._on_cpu:
            return images
        return min(1 << (images - 1).bit_length(), self._batch)

    def _pipeline(self, size: int, guided: bool) -> Pipeline:
        """The pipeline whose buffers are of this size, over the one set of graphs."""
        key, first = (size, guided), self._first
        if key in self._pipelines:
            self._pipelines.move_to_end(key)
            return self._pipelines[key]
        kept = CPU_BUFFERS if self._on_cpu else 2 * (1 + self._batch.bit_length())
        while len(self._pipelines) >= kept:
            self._pipelines.popitem(last=False)[1].close()
        made = Pipeline(first.manifest, first.choose_schedule(None), first.executor)
        self._pipelines[key] = made
        return made


class InProcess:
    """Where each bundle has one pipeline, in this process."""

    def __init__(self, request: ServeRequest) -> None:
        self._request = request

    def places(self, bundle: Bundle) -> int:
        """How many batches of a bundle are made at once."""
        return 1

    def open(self, bundle: Bundle, batch: int) -> Maker:
        """Loads a bundle.

        Raises:
            UserError: if it is damaged or cannot be run here.
        """
        request = self._request
        pipeline = Pipeline.open(bundle.path, device=request.device, threads=request.threads)
        return PipelineMaker(pipeline, batch)

    def stop(self) -> None:
        """Loading cannot be stopped."""
