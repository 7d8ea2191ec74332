"""Traces: what is there of an image after each step, and nothing of what comes later."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lpd_export import ImageRequest, Pipeline, UserError
from lpd_export.images import BLANK, to_uint8
from lpd_export.runtime.requests import GeneratedImage
from lpd_export.runtime.trace import blank_unfilled, filled_after_steps, tokens_after_steps
from lpd_export.schedule.orders import step_of_cell
from lpd_export.schedule.schedule_file import Schedule

Case = tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int32]]


@st.composite
def generations(draw: st.DrawFn) -> Case:
    """Token ids, an order and group sizes of a grid of up to 6 x 6 cells."""
    cells = draw(st.integers(1, 6)) ** 2
    seed = draw(st.integers(0, 2**32 - 1))
    ends = draw(st.sets(st.integers(1, cells - 1), max_size=8)) if cells > 1 else set()
    sizes = np.diff([0, *sorted(ends), cells]).astype(np.int32)
    chance = np.random.default_rng(seed)
    return chance.integers(0, 99, cells), chance.permutation(cells).astype(np.int32), sizes


def squared_distance(one: int, other: int, grid: int) -> int:
    return (one // grid - other // grid) ** 2 + (one % grid - other % grid) ** 2


@given(generations())
def test_a_cell_has_its_token_or_that_of_the_nearest_filled_cell(case: Case) -> None:
    token_ids, order, sizes = case
    grid = math.isqrt(len(order))
    after, filled = tokens_after_steps(*case), filled_after_steps(order, sizes)
    assert after.dtype == np.int64
    assert after.shape == filled.shape == (len(sizes), len(order))
    assert (after[-1] == token_ids).all()
    for step, done in enumerate(np.cumsum(sizes)):
        present = order[:done].tolist()
        assert np.flatnonzero(filled[step]).tolist() == sorted(present)
        for cell in range(len(order)):
            # `min` takes the first of equals, which is the one that was filled first.
            nearest = min(present, key=lambda other, cell=cell: squared_distance(cell, other, grid))
            assert after[step, cell] == token_ids[nearest]


@given(generations(), st.data())
def test_no_step_knows_a_later_token(case: Case, data: st.DataObject) -> None:
    token_ids, order, sizes = case
    step = data.draw(st.integers(0, len(sizes) - 1))
    later = order[sizes[: step + 1].sum() :]
    changed = token_ids.copy()
    changed[later] = np.random.default_rng(step).integers(100, 199, len(later))
    before, after = tokens_after_steps(*case), tokens_after_steps(changed, order, sizes)
    assert (before[: step + 1] == after[: step + 1]).all()
    assert (before[step + 1 :] != after[step + 1 :]).any(axis=1).all()


def test_unfilled_cells_are_blank_and_no_other_pixel_changes() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (2, 6, 6, 3), np.uint8)
    before = pictures.copy()
    filled = np.array([[True, False, False, True], [True] * 4])
    blanked = blank_unfilled(pictures, filled, (1, 2, 3))
    assert blanked.dtype == np.uint8
    assert (blanked[0, :3, :3] == pictures[0, :3, :3]).all()
    assert (blanked[0, 3:, 3:] == pictures[0, 3:, 3:]).all()
    assert (blanked[0, :3, 3:] == (1, 2, 3)).all()
    assert (blanked[0, 3:, :3] == (1, 2, 3)).all()
    assert (blanked[1] == pictures[1]).all()
    assert (pictures == before).all()


# ------------------------------------------------------------------------------------ pictures


@pytest.fixture(scope="module")
def pipeline(emoji_bundle: Path) -> Pipeline:
    return Pipeline.open(emoji_bundle)


@pytest.fixture(scope="module")
def images(pipeline: Pipeline) -> list[GeneratedImage]:
    return pipeline.generate(["heart", "monkey-face", None], seed=2, batch=2)


def test_the_picture_after_the_last_step_is_the_image(
    pipeline: Pipeline, images: list[GeneratedImage]
) -> None:
    for image in images:
        trace = pipeline.trace(image)
        assert trace.shape == (20, 32, 32, 3)
        assert trace.dtype == np.uint8
        assert (trace[-1] == image.pixels).all()
        # It is also what the decoder makes of its tokens, by which the others are decoded.
        assert (to_uint8(pipeline.detokenize(image.token_ids[None]))[0] == image.pixels).all()


def test_each_picture_is_decoded_where_it_is_filled_and_blank_elsewhere(
    pipeline: Pipeline, images: list[GeneratedImage]
) -> None:
    for image in images:
        schedule = image.schedule
        order = image.order
        tokens = tokens_after_steps(image.token_ids, order, schedule.group_sizes)
        steps = step_of_cell(order[None], schedule.group_sizes)[0].reshape(16, 16)
        for step, picture in enumerate(pipeline.trace(image)):
            decoded = to_uint8(pipeline.detokenize(tokens[step : step + 1]))[0]
            there = (steps <= step).repeat(2, axis=0).repeat(2, axis=1)
            assert there.sum() == 4 * schedule.group_sizes[: step + 1].sum()
            assert (picture[there] == decoded[there]).all()
            assert (picture[~there] == BLANK).all()


@given(step=st.integers(0, 18), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=8)
def test_tokens_of_later_steps_show_in_no_picture(
    pipeline: Pipeline, images: list[GeneratedImage], step: int, seed: int
) -> None:
    image = images[seed % len(images)]
    later = image.order[image.schedule.group_sizes[: step + 1].sum() :]
    changed = image.token_ids.copy()
    changed[later] = np.random.default_rng(seed).integers(0, 1024, len(later))
    other = pipeline.trace(dataclasses.replace(image, token_ids=changed))
    trace = pipeline.trace(image)
    assert (other[: step + 1] == trace[: step + 1]).all()
    if step < 18:  # the last picture is not decoded, but the image itself
        assert (other[step + 1 : -1] != trace[step + 1 : -1]).any()


def test_the_trace_follows_the_schedule_of_the_image(pipeline: Pipeline) -> None:
    schedule = Schedule.make(16, steps=5, kind="raster", count=1)
    (image,) = pipeline.generate([13], schedule=schedule)
    trace = pipeline.trace(image)
    assert len(trace) == 5
    rows = int(schedule.group_sizes[:3].sum()) // 16  # whole rows of cells, 2 pixels each
    assert (trace[2, : 2 * rows] != BLANK).any(axis=2).mean() > 0.9
    assert (trace[2, 2 * rows + 2 :] == BLANK).all()


def test_an_image_can_be_watched_as_it_is_made(pipeline: Pipeline) -> None:
    """What `picture_after` draws of unfinished tokens is the trace of the finished ones."""
    requests, schedule = [ImageRequest(13, 2, i) for i in range(2)], pipeline.choose_schedule(None)
    seen = []

    def watch(step: int, token_ids: NDArray[np.int64]) -> None:
        seen.append(pipeline.picture_after(step, token_ids[1], requests[1], schedule))

    *_, image = pipeline.stream(requests, batch=2, watch=watch)
    np.testing.assert_array_equal(seen[:-1], pipeline.trace(image)[:-1])
    assert len(seen) == schedule.steps


def test_an_image_of_another_model_has_no_trace(small_bundle: Path, pipeline: Pipeline) -> None:
    (image,) = Pipeline.open(small_bundle).generate([0])
    with pytest.raises(UserError, match=r"token ids must be \[B, 256\]"):
        pipeline.trace(image)
