"""The two sides of a comparison: what both are asked, and what each must be able to do.

The sides are in `reference_side` and `bundle_side`. Knows the inputs of a phase, and Polygraphy's
form of something that can be run. Does not know what is compared, or how close it must be.

Shapes: R rows of one image (conditional, then null with guidance), C context tokens, T tokens,
Q queries, S cells, V vocabulary entries, H heads, d head width.
"""

from __future__ import annotations

import dataclasses
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.datatype import DataType
from torch import Tensor

from lpd_export.bundle.manifest import ModelDescription
from lpd_export.graphs.contract import cache_names
from lpd_export.progress import Report
from lpd_export.runtime.sampler import Sampling
from lpd_export.schedule.phases import Phase, phase_table
from lpd_export.schedule.schedule_file import Schedule

Feed = Mapping[str, NDArray[Any]]
Outputs = OrderedDict[str, NDArray[Any]]
Inputs = Mapping[str, tuple[Any, Sequence[int | None]]]
"""Types and shapes by name."""

BATCH = 4
"""Images that are drawn together."""


@dataclass(frozen=True, eq=False)
class Task:
    """What both sides are asked to draw."""

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

    @property
    def rows(self) -> int:
        """R."""
        return 2 if self.sampling.guided else 1

    @property
    def phases(self) -> tuple[Phase, ...]:
        return phase_table(self.schedule.group_sizes)

    @property
    def phase_names(self) -> list[str]:
        """Of all phases, in the order of computation."""
        return [*(phase.name for phase in self.phases), "detokenize", "tokenize"]

    def image(self, index: int) -> Task:
        """The same for one of the images alone."""
        return self._images(slice(index, index + 1))

    def first(self, count: int) -> Task:
        """The same for the first images alone."""
        return self._images(slice(count))

    def _images(self, images: slice) -> Task:
        return dataclasses.replace(
            self,
            labels=self.labels[images],
            order_indices=self.order_indices[images],
            uniform=self.uniform[images],
        )


class Drawn(NamedTuple):
    """Images that a side drew."""

    token_ids: NDArray[np.int64]
    """[N, S], raster order."""
    pixels: NDArray[np.uint8]
    """[N, height, width, 3]."""


class Side(Protocol):
    """One of the two sides."""

    @property
    def name(self) -> str:
        """What its runners are called."""

    @property
    def faults(self) -> Mapping[str, list[str]]:
        """Phases whose graph fails when it is run, by the reason.

        Such a phase gives NaN, or indices of -1.
        """

    @property
    def feed_type(self) -> Any:
        """NumPy's name for the type of its float inputs."""

    def cast(self, feed: Feed) -> dict[str, NDArray[Any]]:
        """A feed with its values as this side's float type has them."""

    def draw(self, task: Task, report: Report) -> Drawn:
        """Images of a task, drawn freely."""

    def sequence_logits(self, task: Task, token_ids: NDArray[np.int64]) -> Tensor:
        """Guided logits [N, S, V] float32 in generation order, teacher-forced with token ids.

        token_ids: [N, S] int64, raster order. Every step sees the caches of the earlier ones.
        """

    def decode(self, task: Task, phase: Phase, feed: Feed) -> Outputs:
        """What the decode graph gives for one image (`decode_inputs`), in FP32.

        Beside its outputs, `guided_logits` [1, Q, V]. Caches go in and out in the feed's shape.
        """

    def detokenize(self, feed: Feed) -> Outputs:
        """`image` [B, 3, height, width] of `indices` [B, S]."""

    def tokenize(self, feed: Feed) -> Outputs:
        """`indices` [B, S] of `image` [B, 3, height, width]."""


class FunctionRunner(BaseRunner):
    """A Polygraphy runner of a function from named arrays to named arrays.

    Args:
        name: of the runner.
        inputs: types and shapes; Polygraphy casts what it feeds to these.
        function: what it runs.
    """

    def __init__(self, name: str, inputs: Inputs, function: Callable[[Feed], Outputs]) -> None:
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


def in_shape(cache: NDArray[Any], of_row: Sequence[int]) -> NDArray[Any]:
    """A cache [R, H, N, d] or [R, N, H d] with rows of this shape, which is one of the two."""
    if cache.ndim == 1 + len(of_row):
        return cache
    if cache.ndim == 4:
        return np.ascontiguousarray(cache.swapaxes(1, 2)).reshape(len(cache), *of_row)
    heads, rows, head_dim = of_row
    return np.ascontiguousarray(cache.reshape(-1, rows, heads, head_dim).swapaxes(1, 2))


def decode_inputs(
    phase: Phase, rows: int, model: ModelDescription, cache_shape: Sequence[int], float_type: Any
) -> Inputs:
    """The inputs of a decode graph in one phase.

    cache_shape: of one row's keys or values.
    """
    cache = (float_type, (rows, *cache_shape))
    return {
        "token_ids": (np.int64, (rows, phase.context)),
        "positions": (np.int64, (rows, phase.tokens)),
        "attention_mask": (float_type, (phase.tokens, model.cells + 1)),
        "write_index": (np.int64, (rows,)),
    } | dict.fromkeys(cache_names("past", model.depth), cache)
