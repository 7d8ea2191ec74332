"""Every phase, run by both sides on the same inputs.

Knows what a phase is fed: tokens, caches and images of the expected side, and the mask and write
index that the runtime would make. Does not know how outputs are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.comparator import Comparator

from lpd_export.accuracy.comparison import comparable, quiet
from lpd_export.accuracy.implementations import Drawn, Task
from lpd_export.accuracy.sides import Sides
from lpd_export.graphs.contract import cache_names
from lpd_export.schedule.phases import Phase, attention_mask

Arrays = Mapping[str, NDArray[Any]]


def phase_names(task: Task) -> list[str]:
    """Of all phases, in the order of computation."""
    return [*(phase.name for phase in task.phases), "detokenize", "tokenize"]


class PhaseRun(NamedTuple):
    """One phase, run by both sides for one image."""

    name: str
    feed: Arrays
    expected: Arrays
    actual: Arrays
    compared: tuple[Arrays, Arrays]
    """Of both sides, what is compared: all outputs, of caches the rows that are written."""


def phase_runs(task: Task, image: int, sides: Sides, drawn: Drawn) -> Iterator[PhaseRun]:
    """Every phase for one image, fed the expected side's tokens, caches and image."""
    yield from decode_runs(task, image, sides, drawn)
    yield detokenize_run(image, sides, drawn)
    yield tokenize_run(image, sides, drawn)


def decode_runs(task: Task, image: int, sides: Sides, drawn: Drawn) -> Iterator[PhaseRun]:
    """Prefill and every decode step for one image."""
    caches = first_caches(sides.actual.decode_sizes(task))
    for phase in task.phases:
        runners = sides.expected.decode(task, phase), sides.actual.decode(task, phase)
        feed = decode_feed(task, image, phase, drawn.token_ids[image], caches, sides)
        one, other = run_both(*runners, feed)
        fed = sides.actual.cast(feed)
        compared = (
            comparable(one, sides.expected.cast(feed), phase),
            comparable(other, fed, phase),
        )
        yield PhaseRun(phase.name, fed, one, other, compared)
        caches = {name.replace("present", "past", 1): values for name, values in one.items()}


def detokenize_run(image: int, sides: Sides, drawn: Drawn) -> PhaseRun:
    """One image's tokens, decoded."""
    feed = {"indices": drawn.token_ids[[image]]}
    one, other = run_both(sides.expected.detokenize(), sides.actual.detokenize(), feed)
    return PhaseRun("detokenize", feed, one, other, (one, other))


def tokenize_run(image: int, sides: Sides, drawn: Drawn) -> PhaseRun:
    """One image, as the expected side drew it, encoded."""
    pixels = drawn.pixels[[image]].astype(np.float32).transpose(0, 3, 1, 2)
    feed = {"image": np.ascontiguousarray(pixels / 127.5 - 1)}
    one, other = run_both(sides.expected.tokenize(), sides.actual.tokenize(), feed)
    return PhaseRun("tokenize", sides.actual.cast(feed), one, other, (one, other))


def run_both(expected: BaseRunner, actual: BaseRunner, feed: Arrays) -> tuple[Arrays, Arrays]:
    """The outputs of two runners for one feed, through Polygraphy's comparator."""
    with quiet():
        (results,) = Comparator.run([expected, actual], data_loader=[feed], streaming=True)
    one, other = (dict(results[i][1][0].items()) for i in range(2))
    return one, other


def decode_feed(
    task: Task,
    image: int,
    phase: Phase,
    token_ids: NDArray[np.int64],
    caches: Arrays,
    sides: Sides,
) -> dict[str, NDArray[Any]]:
    """The inputs of one decode phase for one image, as the runtime would make them.

    token_ids: [S], raster order, of the image.
    """
    dimensions = sides.actual.pipeline.dimensions
    sizes = sides.actual.decode_sizes(task)
    rows, order = sizes["rows"], task.orders[image]
    positions = np.concatenate([[0], order + 1])
    written = positions[phase.write_index : phase.write_index + phase.tokens]
    if phase.index:
        last = order[phase.first_cell - phase.context : phase.first_cell]
        context = np.tile(token_ids[last], (rows, 1))
    else:
        labels = [task.labels[image], None][:rows]
        context = np.array([[dimensions.condition_id(label)] for label in labels])
    masked = float(torch.finfo(sides.actual.pipeline.executor.float_type).min)
    inputs = {
        "token_ids": context,
        "positions": np.tile(written, (rows, 1)),
        "attention_mask": attention_mask(phase, sizes["cells"], masked),
        "write_index": np.full(rows, phase.write_index),
    }
    return inputs | {name: caches[name] for name in cache_names("past", sizes["depth"])}


def first_caches(sizes: Mapping[str, int]) -> dict[str, NDArray[np.float32]]:
    """Caches as a runtime finds them, [R, H, S + 1, d] each: full of what was there before."""
    generator = np.random.default_rng(0)
    shape = (sizes["rows"], sizes["heads"], sizes["cells"] + 1, sizes["head_dim"])
    return {
        name: generator.standard_normal(shape, np.float32)
        for name in cache_names("past", sizes["depth"])
    }
