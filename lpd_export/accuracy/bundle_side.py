"""The side that is judged: a bundle's graphs, run by its runtime's own executor, sampler and loop.

Knows what can run a bundle here, and that a graph that cannot be run gives NaN. The other bundle of
`--against` is one as well. Shapes as in `sides`.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor

from lpd_export.accuracy.request import VerifyRequest
from lpd_export.accuracy.sides import BATCH, Drawn, Feed, Outputs, Task, in_shape
from lpd_export.bundle.manifest import GRAPH_NAMES, Bundle
from lpd_export.errors import GraphError, UserError
from lpd_export.formats import BACKENDS, BFLOAT16, FLOAT16, FLOAT32
from lpd_export.graphs.contract import cache_names, is_past, present_of
from lpd_export.precision.portable import portable_files
from lpd_export.progress import Report
from lpd_export.runtime.arrays import Array
from lpd_export.runtime.backends import open_executor
from lpd_export.runtime.executor import Executor
from lpd_export.runtime.onnxruntime_executor import OnnxRuntimeExecutor
from lpd_export.runtime.pipeline import Pipeline
from lpd_export.runtime.requests import ImageRequest
from lpd_export.runtime.sampler import guide
from lpd_export.schedule.phases import Phase


def round_to_bf16(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """FP32 values rounded to BF16."""
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


class BundleSide:
    """A bundle's graphs.

    Args:
        name: the bundle's folder.
        pipeline: that runs them.
        ran: what runs them, as the report says it.
    """

    def __init__(self, name: str, pipeline: Pipeline, ran: str) -> None:
        self.name = name
        self.pipeline = pipeline
        self.ran = ran
        self.faults: dict[str, list[str]] = {}

    @property
    def batch(self) -> int:
        """Images that are drawn together."""
        return min(BATCH, self.pipeline.manifest.max_batch or BATCH)

    @property
    def feed_type(self) -> Any:
        """NumPy's name for the graphs' float type; it has none for BF16, which is fed as FP32."""
        return np.float16 if self.pipeline.executor.float_type == FLOAT16.torch else np.float32

    def cast(self, feed: Feed) -> dict[str, NDArray[Any]]:
        bf16 = self.pipeline.manifest.float_type == BFLOAT16.torch
        cast = round_to_bf16 if bf16 else lambda values: values.astype(self.feed_type)
        return {name: cast(v) if v.dtype == np.float32 else v for name, v in feed.items()}

    def draw(self, task: Task, report: Report) -> Drawn:
        report(f"drawing images with {self.name}")
        requests = [
            ImageRequest(label, task.seed, index, task.sampling)
            for index, label in enumerate(task.labels)
        ]
        images = list(self.pipeline.stream(requests, batch=self.batch, schedule=task.schedule))
        return Drawn(
            np.stack([image.token_ids for image in images]),
            np.stack([image.pixels for image in images]),
        )

    def edit(self, task: Task, given: NDArray[np.int64]) -> NDArray[np.int64]:
        """Token ids [B, S] of the task's first B images with given tokens [B, S], -1 to draw."""
        requests = [
            ImageRequest(task.labels[i], task.seed, i, task.sampling, task.orders[i], tokens)
            for i, tokens in enumerate(given)
        ]
        images = self.pipeline.stream(requests, batch=self.batch, schedule=task.schedule)
        return np.stack([image.token_ids for image in images])

    def drawn_logits(self, task: Task, token_ids: NDArray[np.int64]) -> Iterator[Tensor]:
        """Guided logits [S, V] of each image of what `draw` drew, in its batches.

        A backend may round otherwise in other batches: so these are the very logits that were
        drawn from.
        """
        for start in range(0, task.images, self.batch):
            yield from self._forced_logits(task, token_ids, slice(start, start + self.batch))

    def sequence_logits(self, task: Task, token_ids: NDArray[np.int64]) -> Tensor:
        model = self.pipeline.manifest.model
        return self._unless_it_fails(
            "whole sequences",
            lambda: torch.cat(
                [self._forced_logits(task, token_ids, slice(i, i + 1)) for i in range(task.images)]
            ),
            torch.full((task.images, model.cells, model.vocab_size), torch.nan),
        )

    def _forced_logits(self, task: Task, token_ids: NDArray[np.int64], images: slice) -> Tensor:
        logits = self.pipeline.forced_logits(
            token_ids[images],
            task.labels[images],
            task.orders[images],
            task.sampling,
            task.schedule,
        )
        return torch.from_numpy(logits)

    def decode(self, task: Task, phase: Phase, feed: Feed) -> Outputs:
        executor, model = self.pipeline.executor, self.pipeline.manifest.model
        arrays, of_row = executor.arrays, self.pipeline.manifest.cache_shape
        given = {k: in_shape(v, of_row) if is_past(k) else v for k, v in feed.items()}
        with executor.stream():
            # Copies, since the caches are updated in place.
            tensors = {name: self._to_device(values) for name, values in given.items()}
            shape = (task.rows, phase.queries, model.vocab_size)
            logits = arrays.zeros(shape, "float32")
            caches = cache_names("past", model.depth)
            written = {"logits": logits} | {present_of(name): tensors[name] for name in caches}

            def launch() -> Callable[[], None]:
                run = executor.bind("decode", tensors | written)
                run()
                return run

            launched = self._unless_it_fails(phase.name, launch, None)
            if launched is None:
                for tensor in written.values():
                    tensor[...] = np.nan
            guided = logits
            if task.sampling.guided:
                scale = task.sampling.scale(model.cells)
                cells = slice(phase.first_cell, phase.first_cell + phase.queries)
                guided = guide(logits, arrays.put(scale[cells]))
            copied = OrderedDict(
                (name, arrays.take(values, "float32"))
                for name, values in {"guided_logits": guided, **written}.items()
            )
            del launched  # copying has waited for the graph, which needs its context until then
            for past in caches:
                present = present_of(past)
                copied[present] = in_shape(copied[present], feed[past].shape[1:])
            return copied

    def detokenize(self, feed: Feed) -> Outputs:
        side = self.pipeline.manifest.resolution
        nothing = np.full((len(feed["indices"]), 3, side, side), np.nan, np.float32)
        run = self.pipeline.detokenize
        return OrderedDict(
            image=self._unless_it_fails("detokenize", lambda: run(feed["indices"]), nothing)
        )

    def tokenize(self, feed: Feed) -> Outputs:
        nothing = np.full((len(feed["image"]), self.pipeline.manifest.model.cells), -1)
        run = self.pipeline.tokenize
        return OrderedDict(
            indices=self._unless_it_fails("tokenize", lambda: run(feed["image"]), nothing)
        )

    def _unless_it_fails(self, phase: str, run: Callable[[], Any], nothing: Any) -> Any:
        """What `run` gives, or `nothing` and a fault if a graph cannot be run."""
        try:
            return run()
        except GraphError as error:
            phases = self.faults.setdefault(str(error), [])
            if phase not in phases:
                phases.append(phase)
            return nothing

    def _to_device(self, values: NDArray[Any]) -> Array:
        executor = self.pipeline.executor
        dtype = executor.float_type if values.dtype.kind == "f" else None
        return executor.arrays.put(values.copy(), dtype)


def open_bundle(
    bundle: Bundle, request: VerifyRequest, scratch: Path, report: Report
) -> BundleSide:
    """A bundle, loaded.

    Args:
        bundle: which one.
        request: how it is run.
        scratch: a folder for graphs that are changed so that the CPU can run them.
        report: called with a line.

    Raises:
        UserError: if nothing here can run it.
    """
    manifest = bundle.manifest
    report(f"loading {bundle.path}")
    schedule = bundle.schedule()
    executor: Executor
    if request.onnx:
        files, note = portable_files(bundle, scratch)
        float_type = FLOAT16 if manifest.float_type == FLOAT16.torch else FLOAT32
        executor = OnnxRuntimeExecutor(files, float_type.torch, threads=request.threads)
        ran = f"its ONNX graphs on ONNX Runtime {onnxruntime.__version__}, cpu{note}"
    else:
        backend = BACKENDS[manifest.backend]
        if backend.compiles and not torch.cuda.is_available():
            raise UserError(
                f"{bundle.path} holds {manifest.backend} engines and there is no GPU to run them: "
                "verify it on its GPU, or with --onnx the graphs that they were compiled from"
            )
        executor = open_executor(bundle, request.device, request.threads)
        version = importlib.import_module(backend.module).__version__
        ran = f"{backend.product} {version}, {executor.device.partition(':')[0]}"
    executor.load(*GRAPH_NAMES)
    return BundleSide(str(bundle.path), Pipeline(manifest, schedule, executor), ran)


def check_same_model(bundle: Bundle, other: Bundle) -> None:
    """Raises UserError unless two bundles are of one architecture."""
    for what in ("model", "tokenizer"):
        ours, theirs = (
            dataclasses.asdict(getattr(each.manifest, what)) for each in (bundle, other)
        )
        different = [
            f"{key} {ours[key]} and {theirs[key]}" for key in ours if ours[key] != theirs[key]
        ]
        if different:
            raise UserError(
                f"{bundle.path} and {other.path} are different models: {what} with "
                f"{', '.join(different)}"
            )
