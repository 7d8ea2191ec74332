"""One generation after another on the clock, each split into its parts.

Knows how a bundle's and the reference's images are made, and when. Does not know what the times are
compared with, or how they are shown.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch

from lpd_export.bench.work import DETOKENIZE, PIXELS, SAMPLING, step_title
from lpd_export.images import to_uint8
from lpd_export.precision.calibration import spread_labels
from lpd_export.runtime.arrays import HOST, Array
from lpd_export.runtime.executor import Executor, ExecutorAround, Run
from lpd_export.runtime.pipeline import Pipeline
from lpd_export.runtime.randomness import image_randomness
from lpd_reference import LPD, VQTokenizer, generate

TOTAL, PREPARE, GENERATE = "total", "prepare", "generate"
"""The whole; before the first step; and of the reference all that detokenize follows."""

Mark = float | torch.cuda.Event
Seconds = Mapping[str, float]
"""By part, `total` among them."""


class Contender(Protocol):
    """Something that makes images, and is timed at it."""

    name: str

    def run(self, batch: int, seed: int) -> Seconds:
        """Makes a batch of images once; the parts sum to `total` or less."""


class TimedExecutor(ExecutorAround):
    """An executor that notes when each bound graph starts and ends, on the device's own clock."""

    def __init__(self, executor: Executor) -> None:
        super().__init__(executor)
        self.marks: list[tuple[str, Mark, Mark]] = []
        """Graph, start and end of every run since it was cleared."""

    def bind(self, graph: str, tensors: Mapping[str, Array]) -> Run:
        run = self._executor.bind(graph, tensors)

        def timed() -> None:
            start = self.mark()
            run()
            self.marks.append((graph, start, self.mark()))

        return timed

    def mark(self) -> Mark:
        """Now: on a GPU when all that was launched before has run."""
        if self.device == HOST:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


def between(start: Mark, end: Mark) -> float:
    """Seconds; of events, both must have happened."""
    if isinstance(start, float) and isinstance(end, float):
        return end - start
    assert isinstance(start, torch.cuda.Event)
    assert isinstance(end, torch.cuda.Event)
    return start.elapsed_time(end) / 1e3


class BundleContender:
    """A bundle, as `Pipeline` runs it.

    Where generations are recorded as one launch, the total is that of a recorded one and the parts
    are of another one, launched step by step.
    """

    def __init__(self, name: str, pipeline: Pipeline, mutual_visibility: bool = True) -> None:
        self.name = name
        self._executor = TimedExecutor(pipeline.executor)
        schedule = pipeline.choose_schedule(None)
        self._timed = Pipeline(pipeline.manifest, schedule, self._executor, mutual_visibility)
        self._whole = pipeline
        self._steps = [step_title(phase) for phase in pipeline.manifest.phases]

    def run(self, batch: int, seed: int) -> Seconds:
        labels = spread_labels(self._whole.manifest.model.num_classes, batch)
        marks = self._executor.marks
        marks.clear()
        begun, begin = time.perf_counter(), self._executor.mark()
        self._timed.generate(labels, seed=seed, batch=batch)
        total = time.perf_counter() - begun
        parts = split([(g, between(begin, s), between(begin, e)) for g, s, e in marks], total)
        steps = dict(zip(self._steps, parts.pop("steps"), strict=True))
        if self._whole.executor.records:
            begun = time.perf_counter()
            self._whole.generate(labels, seed=seed, batch=batch)
            total = time.perf_counter() - begun
        return {**steps, **{name: sum(times) for name, times in parts.items()}, TOTAL: total}

    @property
    def device(self) -> str:
        """Where it runs."""
        return self._executor.device

    def close(self) -> None:
        """Gives back the buffers; graphs stay loaded."""
        self._timed.close()
        self._whole.close()


def split(runs: list[tuple[str, float, float]], total: float) -> dict[str, list[float]]:
    """Times by part, of one generation.

    Args:
        runs: graph, start and end of every run in order, seconds from the generation's begin.
        total: when it ended.

    Returns:
        The steps' times; sampling, which is what lies between a step and the next graph, a step
        each; detokenize, pixels, and what came before the first step.
    """
    steps = [(start, end) for graph, start, end in runs if graph == "decode"]
    images = [(start, end) for graph, start, end in runs if graph == DETOKENIZE]
    nexts = [start for start, _ in steps[1:]] + [images[0][0]]
    return {
        "steps": [end - start for start, end in steps],
        SAMPLING: [after - end for (_, end), after in zip(steps, nexts, strict=True)],
        DETOKENIZE: [images[-1][1] - images[0][0]],
        PIXELS: [total - images[-1][1]],
        PREPARE: [steps[0][0]],
    }


class ReferenceContender:
    """The eager PyTorch reference, in FP32, with a bundle's schedule and guidance."""

    name = "reference"

    def __init__(self, model: LPD, tokenizer: VQTokenizer, pipeline: Pipeline) -> None:
        self._model, self._tokenizer, self._pipeline = model, tokenizer, pipeline

    @torch.inference_mode()
    def run(self, batch: int, seed: int) -> Seconds:
        pipeline = self._pipeline
        begun = time.perf_counter()
        schedule = pipeline.choose_schedule(None)
        chances = [image_randomness(seed, i, schedule.cells, schedule.count) for i in range(batch)]
        orders = np.stack([schedule.orders[chance.order_index] for chance in chances])
        generation = generate(
            self._model,
            torch.tensor(spread_labels(pipeline.manifest.model.num_classes, batch)),
            torch.from_numpy(orders.astype(np.int64)),
            schedule.group_sizes.tolist(),
            torch.from_numpy(np.stack([chance.uniform for chance in chances])),
            cfg=pipeline.manifest.cfg,
            guidance=pipeline.sampling().guidance,
        )
        generated = time.perf_counter()
        images = self._tokenizer.decode(generation.token_ids)
        decoded = time.perf_counter()
        to_uint8(images.numpy())
        ended = time.perf_counter()
        return {
            GENERATE: generated - begun,
            DETOKENIZE: decoded - generated,
            PIXELS: ended - decoded,
            TOTAL: ended - begun,
        }
