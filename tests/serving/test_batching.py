"""The queue of a model: whose fault is whose, and what nobody waits for."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lpd_export import ImageRequest, Pipeline, UserError
from lpd_export.serving.batching import Client, Event, Finished, Job, ModelQueue, Partial
from lpd_export.serving.making import PipelineMaker
from lpd_export.serving.model import steps_to_show

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def pipeline(small_bundle: Path) -> Pipeline:
    return Pipeline.open(small_bundle, threads=1)


@pytest.fixture
def waiting(small_bundle: Path) -> Iterator[ModelQueue]:
    def load() -> PipelineMaker:
        return PipelineMaker(Pipeline.open(small_bundle, threads=1), 4)

    made = ModelQueue(load, 4, 16, max_wait=0.01)
    made.start()
    yield made
    made.stop()
    made.join()


def job(
    pipeline: Pipeline, label: int, events: queue.Queue[Event], client: Client | None = None
) -> Job:
    schedule = pipeline.choose_schedule(None)
    return Job(ImageRequest(label), schedule, client or Client(), events.put)


def test_an_image_that_fails_fails_alone(waiting: ModelQueue, pipeline: Pipeline) -> None:
    events: list[queue.Queue[Event]] = [queue.Queue() for _ in range(3)]
    labels = [0, 5, 1]  # there is no class 5
    waiting.submit([job(pipeline, *pair) for pair in zip(labels, events, strict=True)])
    first, wrong, last = (each.get(timeout=60) for each in events)
    assert isinstance(wrong, UserError)
    for label, event in ((0, first), (1, last)):
        assert isinstance(event, Finished)
        (alone,) = pipeline.generate([label], cfg=1)
        np.testing.assert_array_equal(event.image.pixels, alone.pixels)


def test_a_batch_that_nobody_waits_for_is_abandoned(
    waiting: ModelQueue, pipeline: Pipeline
) -> None:
    client, events = Client(), queue.Queue[Event]()
    seen: list[Event] = []

    def deliver(event: Event) -> None:
        seen.append(event)
        waiting.leave(client)

    left = job(pipeline, 0, events, client)
    left.deliver, left.partial_steps = deliver, [1, 2, 3]
    waiting.submit([left, job(pipeline, 0, queue.Queue(), client)])
    waiting.call(lambda _: None).result(timeout=60)  # after the batch
    waiting.submit([job(pipeline, 2, events)])
    event = events.get(timeout=60)
    assert isinstance(event, Finished)
    np.testing.assert_array_equal(event.image.pixels, pipeline.generate([2], cfg=1)[0].pixels)
    assert [type(each) for each in seen] == [Partial]


@pytest.mark.parametrize(
    ("steps", "partials", "shown"),
    [(20, 0, []), (20, 1, [10]), (20, 3, [5, 10, 15]), (4, 9, [1, 2, 3]), (1, 3, [])],
)
def test_partial_images_are_spread_over_the_steps(
    steps: int, partials: int, shown: list[int]
) -> None:
    assert steps_to_show(steps, partials) == shown
