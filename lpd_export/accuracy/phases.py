"""Every phase, run by both sides on the same inputs.

Knows what a phase is fed: tokens, caches and images of the expected side, and the mask and write
index that the runtime would make. Does not know how outputs are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from polygraphy.comparator import Comparator

from lpd_export.accuracy.comparison import comparable, quiet
from lpd_export.accuracy.context import Context
from lpd_export.accuracy.sides import FunctionRunner, decode_inputs
from lpd_export.formats import FLOAT_TYPES
from lpd_export.graphs.contract import cache_names
from lpd_export.schedule.phases import Phase, attention_mask

Arrays = Mapping[str, NDArray[Any]]


class PhaseRun(NamedTuple):
    """One phase, run by both sides for one image."""

    name: str
    feed: Arrays
    expected: Arrays
    actual: Arrays
    compared: tuple[Arrays, Arrays]
    """Of both sides, what is compared: all outputs, of caches the rows that are written."""


def phase_runs(context: Context, image: int) -> Iterator[PhaseRun]:
    """Every phase for one image, fed the expected side's tokens, caches and image."""
    yield from decode_runs(context, image)
    yield detokenize_run(context, image)
    yield tokenize_run(context, image)


def decode_runs(context: Context, image: int) -> Iterator[PhaseRun]:
    """Prefill and every decode step for one image."""
    task, model = context.task, context.model
    expected, actual = context.sides
    caches: Arrays = first_caches(context)
    for phase in task.phases:
        feed = decode_feed(context, image, phase, caches)
        runners = [
            FunctionRunner(
                side.name,
                decode_inputs(phase, task.rows, model, context.cache_shape, side.feed_type),
                partial(side.decode, task, phase),
            )
            for side in context.sides
        ]
        one, other = run_both(runners, feed)
        fed = actual.cast(feed)
        compared = comparable(one, expected.cast(feed), phase), comparable(other, fed, phase)
        yield PhaseRun(phase.name, fed, one, other, compared)
        caches = {name.replace("present", "past", 1): values for name, values in one.items()}


def detokenize_run(context: Context, image: int) -> PhaseRun:
    """One image's tokens, decoded."""
    feed = {"indices": context.drawn.token_ids[[image]]}
    inputs = {"indices": (np.int64, (None, context.model.cells))}
    both = run_both(
        [FunctionRunner(side.name, inputs, side.detokenize) for side in context.sides], feed
    )
    return PhaseRun("detokenize", feed, *both, both)


def tokenize_run(context: Context, image: int) -> PhaseRun:
    """One image, as the expected side drew it, encoded."""
    pixels = context.drawn.pixels[[image]].astype(np.float32).transpose(0, 3, 1, 2)
    feed = {"image": np.ascontiguousarray(pixels / 127.5 - 1)}
    inputs = {"image": (np.float32, (None, *feed["image"].shape[1:]))}
    both = run_both(
        [FunctionRunner(side.name, inputs, side.tokenize) for side in context.sides], feed
    )
    return PhaseRun("tokenize", context.actual.cast(feed), *both, both)


def run_both(runners: list[FunctionRunner], feed: Arrays) -> tuple[Arrays, Arrays]:
    """The outputs of two runners for one feed, through Polygraphy's comparator."""
    with quiet():
        (results,) = Comparator.run(runners, data_loader=[feed], streaming=True)
    one, other = (dict(results[i][1][0].items()) for i in range(2))
    return one, other


def decode_feed(
    context: Context, image: int, phase: Phase, caches: Arrays
) -> dict[str, NDArray[Any]]:
    """The inputs of one decode phase for one image, as the runtime would make them."""
    task, model = context.task, context.model
    rows, order = task.rows, task.orders[image]
    positions = np.concatenate([[0], order + 1])
    written = positions[phase.write_index : phase.write_index + phase.tokens]
    if phase.index:
        last = order[phase.first_cell - phase.context : phase.first_cell]
        content = np.tile(context.drawn.token_ids[image][last], (rows, 1))
    else:
        labels = [task.labels[image], None][:rows]
        content = np.array([[model.condition_id(label)] for label in labels])
    masked = -FLOAT_TYPES[context.actual.pipeline.executor.float_type].largest
    inputs = {
        "token_ids": content,
        "positions": np.tile(written, (rows, 1)),
        "attention_mask": attention_mask(phase, model.cells, masked),
        "write_index": np.full(rows, phase.write_index),
    }
    return inputs | {name: caches[name] for name in cache_names("past", model.depth)}


def first_caches(context: Context) -> dict[str, NDArray[np.float32]]:
    """Caches as a runtime finds them: full of what was there before."""
    generator = np.random.default_rng(0)
    shape = (context.task.rows, *context.cache_shape)
    return {
        name: generator.standard_normal(shape, np.float32)
        for name in cache_names("past", context.model.depth)
    }
