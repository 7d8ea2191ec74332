"""The model's implementations that can be compared: the PyTorch reference, and bundles.

Each gives Polygraphy runners for single phases, and does the same work as a whole: images drawn
from the same uniform numbers, and logits of a given image's tokens. The reference follows its own
rules, from the group sizes alone: it ignores the mask and the write index that a graph is fed, so
that a wrong one is seen. Does not know what is compared, or how close it must be.

Shapes: R rows of one image (conditional, then null with guidance), C context tokens, T tokens,
Q queries, S cells, V vocabulary entries, H heads, d head width.
"""

from __future__ import annotations

import dataclasses
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.datatype import DataType
from torch import Tensor

from lpd_export.errors import GraphError
from lpd_export.graphs.contract import cache_names
from lpd_export.images import to_uint8
from lpd_export.progress import Report
from lpd_export.runtime.executor import Run
from lpd_export.runtime.pipeline import Pipeline
from lpd_export.runtime.requests import ImageRequest
from lpd_export.runtime.sampler import Sampling, guide
from lpd_export.schedule.phases import Phase, phase_table
from lpd_export.schedule.schedule_file import Schedule
from lpd_reference.generate import generate, guidance_scale
from lpd_reference.lpd import LPD, LayerCache
from lpd_reference.vq import VQTokenizer

Feed = Mapping[str, NDArray[Any]]
Outputs = OrderedDict[str, NDArray[Any]]

BATCH = 4
"""Images that are drawn together."""


@dataclass(frozen=True, eq=False)
class Task:
    """What every implementation is asked to draw."""

    schedule: Schedule
    labels: list[int]
    """[N], class ids."""
    order_indices: list[int]
    """[N], the order of the schedule that each image follows."""
    uniform: NDArray[np.float64]
    """[N, S] in [0, 1), in generation order."""
    sampling: Sampling
    seed: int

    @property
    def orders(self) -> NDArray[np.int64]:
        """[N, S], of each image."""
        return self.schedule.orders[self.order_indices].astype(np.int64)

    @property
    def images(self) -> int:
        """N."""
        return len(self.labels)

    def image(self, index: int) -> Task:
        """The same for one of the images alone."""
        return dataclasses.replace(
            self,
            labels=[self.labels[index]],
            order_indices=[self.order_indices[index]],
            uniform=self.uniform[[index]],
        )

    @property
    def phases(self) -> tuple[Phase, ...]:
        return phase_table(self.schedule.group_sizes)


class Drawn(NamedTuple):
    """Images that an implementation drew."""

    token_ids: NDArray[np.int64]
    """[N, S], raster order."""
    pixels: NDArray[np.uint8]
    """[N, height, width, 3]."""


class Implementation(Protocol):
    """One of the two sides of a comparison."""

    @property
    def name(self) -> str:
        """What its runners are called."""

    @property
    def faults(self) -> Mapping[str, list[str]]:
        """Phases whose graph fails when it is run, by the reason.

        Such a phase gives NaN, or indices of -1.
        """

    def draw(self, task: Task, report: Report) -> Drawn:
        """Images of a task, drawn freely."""

    def sequence_logits(self, task: Task, token_ids: NDArray[np.int64]) -> Tensor:
        """Guided logits [N, S, V] float32 in generation order, teacher-forced with token ids.

        token_ids: [N, S] int64, raster order. Every step sees the caches of the earlier ones.
        """

    def cast(self, feed: Feed) -> dict[str, NDArray[Any]]:
        """A feed with its values as this implementation's float type has them."""

    def decode(self, task: Task, phase: Phase) -> BaseRunner:
        """A runner of one decode phase for one image (see `decode_inputs`)."""

    def detokenize(self) -> BaseRunner:
        """A runner from `indices` [B, S] to `image` [B, 3, height, width]."""

    def tokenize(self) -> BaseRunner:
        """A runner from `image` [B, 3, height, width] to `indices` [B, S]."""


class FunctionRunner(BaseRunner):
    """A Polygraphy runner of a function from named arrays to named arrays.

    Args:
        name: of the runner.
        inputs: types and shapes of the inputs by name; Polygraphy casts what it feeds to these.
        function: what it runs.
    """

    def __init__(
        self,
        name: str,
        inputs: Mapping[str, tuple[Any, Sequence[int | None]]],
        function: Callable[[Feed], Outputs],
    ) -> None:
        super().__init__(name=name)
        self._inputs = inputs
        self._function = function

    def get_input_metadata_impl(self) -> TensorMetadata:
        metadata = TensorMetadata()
        for name, (dtype, shape) in self._inputs.items():
            metadata.add(name, DataType.from_dtype(np.dtype(dtype)), shape)
        return metadata

    def infer_impl(self, feed_dict: Feed) -> Outputs:
        start = time.perf_counter()
        outputs = self._function(feed_dict)
        self.inference_time = time.perf_counter() - start
        return outputs


def decode_inputs(
    phase: Phase, sizes: Mapping[str, int], float_type: Any
) -> dict[str, tuple[Any, Sequence[int | None]]]:
    """Types and shapes of a decode graph's inputs in one phase.

    sizes: rows, depth, heads, cells, head_dim.
    """
    cache = (sizes["rows"], sizes["heads"], sizes["cells"] + 1, sizes["head_dim"])
    return {
        "token_ids": (np.int64, (sizes["rows"], phase.context)),
        "positions": (np.int64, (sizes["rows"], phase.tokens)),
        "attention_mask": (float_type, (phase.tokens, sizes["cells"] + 1)),
        "write_index": (np.int64, (sizes["rows"],)),
    } | {name: (float_type, cache) for name in cache_names("past", sizes["depth"])}


# -------------------------------------------------------------------------------- the reference


class WholeCache(LayerCache):
    """A layer's cache that also keeps the queries' keys and values of its last step."""

    written: tuple[Tensor, Tensor]
    """Keys and values [B, H, T, d] of the last step's context tokens and queries."""

    def extend(self, key: Tensor, value: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        self.written = key, value
        return super().extend(key, value, keep)


class Reference:
    """The PyTorch model and tokenizer, in FP32."""

    name = "reference"

    def __init__(self, model: LPD, tokenizer: VQTokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.faults: dict[str, list[str]] = {}  # it has no graph that could fail

    @torch.inference_mode()
    def draw(self, task: Task, report: Report) -> Drawn:
        token_ids, pixels = [], []
        for start in range(0, len(task.labels), BATCH):
            chunk = slice(start, start + BATCH)
            report(f"drawing images with the reference: {start} of {len(task.labels)}")
            drawn = self._generate(task, chunk)
            token_ids.append(drawn.numpy())
            pixels.append(to_uint8(self.tokenizer.decode(drawn).numpy()))
        return Drawn(np.concatenate(token_ids), np.concatenate(pixels))

    def _generate(self, task: Task, chunk: slice) -> Tensor:
        sampling = task.sampling
        return generate(
            self.model,
            torch.tensor(task.labels[chunk]),
            torch.from_numpy(task.orders[chunk]),
            task.schedule.group_sizes.tolist(),
            torch.from_numpy(task.uniform[chunk]),
            cfg=sampling.cfg,
            guidance=sampling.guidance,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
        ).token_ids

    @torch.inference_mode()
    def sequence_logits(self, task: Task, token_ids: NDArray[np.int64]) -> Tensor:
        sizes, logits = task.schedule.group_sizes.tolist(), []
        for i, label in enumerate(task.labels):
            tokens = torch.from_numpy(token_ids[[i]])
            order = torch.from_numpy(task.orders[[i]])
            guided = self.model(tokens, torch.tensor([label]), order, sizes)
            if task.sampling.guided:
                null = self.model(tokens, None, order, sizes)
                guided = null + self._scale(task)[:, None] * (guided - null)
            logits.append(guided)
        return torch.cat(logits)

    def _scale(self, task: Task) -> Tensor:
        sampling = task.sampling
        return guidance_scale(sampling.cfg, sampling.guidance, self.model.config.cells)

    def cast(self, feed: Feed) -> dict[str, NDArray[Any]]:
        return dict(feed)

    def sizes(self, task: Task) -> dict[str, int]:
        """What the shapes of a decode phase follow from."""
        config = self.model.config
        return {
            "rows": 2 if task.sampling.guided else 1,
            "depth": config.depth,
            "heads": config.heads,
            "cells": config.cells,
            "head_dim": config.head_dim,
        }

    def decode(self, task: Task, phase: Phase) -> BaseRunner:
        scale = self._scale(task)[phase.first_cell : phase.first_cell + phase.queries]
        past = past_rows(task, phase)

        def run(feed: Feed) -> Outputs:
            return self.decode_phase(feed, past, scale if task.sampling.guided else None)

        inputs = decode_inputs(phase, self.sizes(task), np.float32)
        return FunctionRunner(self.name, inputs, run)

    @torch.inference_mode()
    def decode_phase(self, feed: Feed, past: int, scale: Tensor | None) -> Outputs:
        """What a decode graph gives for its inputs, and `guided_logits` [1, Q, V].

        Args:
            feed: the graph's inputs (`decode_inputs`), of which the mask and the write index are
                not looked at.
            past: how many cache rows hold context tokens of earlier steps.
            scale: [Q], the guidance factor; None is no guidance.
        """
        depth = self.model.config.depth
        caches = []
        for i in range(depth):
            key, value = (torch.from_numpy(feed[f"past_{kind}_{i}"]) for kind in ("key", "value"))
            rows = (key[:, :, :past], value[:, :, :past]) if past else (None, None)
            caches.append(WholeCache(*rows))
        positions = torch.from_numpy(feed["positions"])
        context = self.content(torch.from_numpy(feed["token_ids"]))
        logits = self.model.decode_step(context, positions, [*caches])
        outputs: Outputs = OrderedDict(logits=logits.numpy())
        guided = logits
        if scale is not None:
            conditional, null = logits.chunk(2)
            guided = null + scale[:, None] * (conditional - null)
        outputs["guided_logits"] = guided.numpy()
        for number, kind in enumerate(("key", "value")):
            for i, cache in enumerate(caches):
                present = feed[f"past_{kind}_{i}"].copy()
                written = cache.written[number].numpy()
                present[:, :, past : past + written.shape[2]] = written
                outputs[f"present_{kind}_{i}"] = present
        return outputs

    def content(self, token_ids: Tensor) -> Tensor:
        """Content [R, C, D] of context tokens: ids from V on are classes, the last no class."""
        config = self.model.config
        table = torch.cat(
            [self.model.token_emb.weight, self.model.class_emb.weight, self.model.fake_latent]
        )
        assert len(table) == config.vocab_size + config.num_classes + 1
        return table[token_ids]

    @torch.inference_mode()
    def decode_image(self, feed: Feed) -> Outputs:
        """`image` of `indices`."""
        return OrderedDict(image=self.tokenizer.decode(torch.from_numpy(feed["indices"])).numpy())

    @torch.inference_mode()
    def encode_image(self, feed: Feed) -> Outputs:
        """`indices` of `image`."""
        indices = self.tokenizer.encode(torch.from_numpy(feed["image"]))
        return OrderedDict(indices=indices.flatten(1).numpy())

    def detokenize(self) -> BaseRunner:
        inputs = {"indices": (np.int64, (None, self.model.config.cells))}
        return FunctionRunner(self.name, inputs, self.decode_image)

    def tokenize(self) -> BaseRunner:
        side = self.model.config.grid * self.tokenizer.config.stride
        inputs = {"image": (np.float32, (None, 3, side, side))}
        return FunctionRunner(self.name, inputs, self.encode_image)


def past_rows(task: Task, phase: Phase) -> int:
    """How many cache rows hold context tokens of the steps before a phase.

    From the group sizes alone, whatever the phase says of itself.
    """
    return int(1 + task.schedule.group_sizes[: phase.index - 1].sum()) if phase.index else 0


class RememberingReference(Reference):
    """A reference that is asked for the same sequences again and again, and computes them once."""

    def __init__(self, reference: Reference) -> None:
        super().__init__(reference.model, reference.tokenizer)
        self._logits: dict[tuple[int, ...], Tensor] = {}

    def sequence_logits(self, task: Task, token_ids: NDArray[np.int64]) -> Tensor:
        key = (*task.labels, *task.order_indices, *token_ids.ravel().tolist())
        if key not in self._logits:
            self._logits[key] = super().sequence_logits(task, token_ids)
        return self._logits[key]


# ------------------------------------------------------------------------------------ a bundle


def round_to_bf16(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """FP32 values rounded to BF16."""
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


class BundleImplementation:
    """A bundle's graphs, run by its runtime's own executor, sampler and loop."""

    def __init__(self, name: str, pipeline: Pipeline) -> None:
        self.name = name
        self.pipeline = pipeline
        self.faults: dict[str, list[str]] = {}

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

    @property
    def batch(self) -> int:
        """Images that are drawn together."""
        return min(BATCH, self.pipeline.manifest.max_batch or BATCH)

    def drawn_logits(self, task: Task, token_ids: NDArray[np.int64]) -> Iterator[Tensor]:
        """Guided logits [S, V] of each image of what `draw` drew, in its batches.

        A backend may round otherwise in other batches: so these are the very logits that were
        drawn from.
        """
        forced = self.pipeline.forced_logits
        for start in range(0, task.images, self.batch):
            c = slice(start, start + self.batch)
            yield from forced(
                token_ids[c], task.labels[c], task.orders[c], task.sampling, task.schedule
            )

    def sequence_logits(self, task: Task, token_ids: NDArray[np.int64]) -> Tensor:
        forced, dimensions = self.pipeline.forced_logits, self.pipeline.dimensions
        try:
            return torch.cat(
                [
                    forced(token_ids[[i]], [label], task.orders[[i]], task.sampling, task.schedule)
                    for i, label in enumerate(task.labels)
                ]
            )
        except GraphError as error:
            self._tell("whole sequences", error)
            return torch.full((task.images, dimensions.cells, dimensions.vocab_size), torch.nan)

    @property
    def feed_type(self) -> Any:
        """NumPy's name for the graphs' float type; it has none for BF16, which is fed as FP32."""
        return np.float16 if self.pipeline.executor.float_type == torch.float16 else np.float32

    def decode_sizes(self, task: Task) -> dict[str, int]:
        """What the shapes of a decode phase follow from (see `decode_inputs`)."""
        return self.pipeline.dimensions._asdict() | {"rows": 2 if task.sampling.guided else 1}

    def cast(self, feed: Feed) -> dict[str, NDArray[Any]]:
        """A feed in the types of the graphs' inputs; BF16, which NumPy has not, as FP32."""
        floats = {name: v for name, v in feed.items() if v.dtype == np.float32}
        if self.pipeline.manifest.float_type == "bfloat16":
            return {**feed, **{name: round_to_bf16(v) for name, v in floats.items()}}
        return {**feed, **{name: v.astype(self.feed_type) for name, v in floats.items()}}

    def decode(self, task: Task, phase: Phase) -> BaseRunner:
        dimensions, sizes = self.pipeline.dimensions, self.decode_sizes(task)
        first, last = phase.first_cell, phase.first_cell + phase.queries
        scale = task.sampling.scale(dimensions.cells)[first:last] if task.sampling.guided else None

        def run(feed: Feed) -> Outputs:
            return self.decode_phase(feed, phase, scale)

        return FunctionRunner(self.name, decode_inputs(phase, sizes, self.feed_type), run)

    @torch.inference_mode()
    def decode_phase(self, feed: Feed, phase: Phase, scale: Tensor | None) -> Outputs:
        """What the decode graph gives, in FP32, and `guided_logits` [1, Q, V]."""
        executor, dimensions = self.pipeline.executor, self.pipeline.dimensions
        rows = len(feed["token_ids"])
        with executor.stream():
            # Copies, since the caches are updated in place.
            tensors = {name: self._to_device(values) for name, values in feed.items()}
            shape = (rows, phase.queries, dimensions.vocab_size)
            logits = torch.zeros(shape, dtype=torch.float32, device=executor.device)
            caches = cache_names("past", dimensions.depth)
            present = {name.replace("past", "present", 1): tensors[name] for name in caches}
            launched = self._run(phase.name, {**tensors, "logits": logits} | present)
            guided = guide(logits, scale.to(executor.device)) if scale is not None else logits
            outputs = {"logits": logits, "guided_logits": guided} | present
            copied = OrderedDict(
                (name, values.float().cpu().numpy()) for name, values in outputs.items()
            )
            del launched  # copying has waited for the graph, which needs its context until then
            return copied

    def _run(self, phase: str, tensors: Mapping[str, Tensor]) -> Run | None:
        """Runs the decode graph in place; where it cannot be run, what it writes is NaN.

        Returns what was launched: on a GPU it must live until the graph has run.
        """
        run = None
        try:
            run = self.pipeline.executor.bind("decode", tensors)
            run()
        except GraphError as error:
            self._tell(phase, error)
            for name, tensor in tensors.items():
                if name == "logits" or name.startswith("present_"):
                    tensor.fill_(torch.nan)
        return run

    def _tell(self, phase: str, error: GraphError) -> None:
        phases = self.faults.setdefault(str(error), [])
        if phase not in phases:
            phases.append(phase)

    def _to_device(self, values: NDArray[Any]) -> Tensor:
        tensor = torch.tensor(values, device=self.pipeline.executor.device)
        floating = tensor.is_floating_point()
        return tensor.to(self.pipeline.executor.float_type) if floating else tensor

    def detokenize(self) -> BaseRunner:
        side = self.pipeline.dimensions.image_size

        def run(feed: Feed) -> Outputs:
            try:
                image = self.pipeline.detokenize(feed["indices"])
            except GraphError as error:
                self._tell("detokenize", error)
                image = np.full((len(feed["indices"]), 3, side, side), np.nan, np.float32)
            return OrderedDict(image=image)

        inputs = {"indices": (np.int64, (None, self.pipeline.dimensions.cells))}
        return FunctionRunner(self.name, inputs, run)

    def tokenize(self) -> BaseRunner:
        side, cells = self.pipeline.dimensions.image_size, self.pipeline.dimensions.cells

        def run(feed: Feed) -> Outputs:
            try:
                indices = self.pipeline.tokenize(feed["image"])
            except GraphError as error:
                self._tell("tokenize", error)
                indices = np.full((len(feed["image"]), cells), -1)
            return OrderedDict(indices=indices)

        return FunctionRunner(self.name, {"image": (np.float32, (None, 3, side, side))}, run)
