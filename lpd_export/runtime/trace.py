"""How an image fills in: what is there of it after each step of its generation.

Works on token ids, an order and group sizes, after the generation and without any look into it.
Does not know a model or a file: `Pipeline.trace` decodes what is said here, `images.draw_trace`
draws it. K steps, S cells.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpd_export.schedule.orders import step_of_cell


def given_first(
    order: NDArray[np.int64], group_sizes: NDArray[np.int32], given: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """The order and the group sizes of an edit in which what is given is there from the first step.

    Later groups hold their new cells alone, which may be none.

    Args:
        order: [S], the cells in the order of their generation.
        group_sizes: [K], the cells of each step, S together.
        given: [S], raster order.
    """
    new = ~given[order]
    ends = given.sum() + np.cumsum(new)[np.cumsum(group_sizes) - 1]
    return order[np.argsort(new, kind="stable")], np.diff(ends, prepend=0).astype(np.int32)


def filled_after_steps(
    order: NDArray[np.integer[Any]], group_sizes: NDArray[np.integer[Any]]
) -> NDArray[np.bool_]:
    """Which cells are filled after each step: [K, S] bool, raster order.

    Args:
        order: [S], the cells in the order of their generation.
        group_sizes: [K], the cells of each step, S together.
    """
    steps = step_of_cell(order[None], group_sizes)[0]
    return steps <= np.arange(len(group_sizes))[:, None]


def tokens_after_steps(
    token_ids: NDArray[np.int64],
    order: NDArray[np.integer[Any]],
    group_sizes: NDArray[np.integer[Any]],
) -> NDArray[np.int64]:
    """The token ids after each step, without a gap: [K, S] int64, raster order.

    A decoder looks at the whole grid. A cell that is not filled yet has the token of the filled
    cell that is nearest in the grid, of equally near ones that which was filled first; so a row
    follows from the tokens of its own and earlier steps alone, and the last row is `token_ids`.

    Args:
        token_ids: [S], of the finished image, raster order.
        order: [S], the cells in the order of their generation.
        group_sizes: [K], the cells of each step, S together.
    """
    cells = len(token_ids)
    down, right = np.divmod(np.arange(cells), math.isqrt(cells))
    nearest = np.zeros(cells, np.int64)
    distance = np.full(cells, 2 * cells)  # squared, and beyond any in the grid
    rows = []
    for group in np.split(order.astype(np.int64), np.cumsum(group_sizes)[:-1]):
        squared = (down[:, None] - down[group]) ** 2 + (right[:, None] - right[group]) ** 2
        if group.size:
            least = squared.min(axis=1)
            nearer = least < distance
            nearest[nearer] = group[squared.argmin(axis=1)][nearer]
            distance[nearer] = least[nearer]
        rows.append(token_ids[nearest])
    return np.stack(rows)


def blank_unfilled(
    pictures: NDArray[np.uint8], filled: NDArray[np.bool_], blank: tuple[int, int, int]
) -> NDArray[np.uint8]:
    """Pictures [K, height, width, 3] uint8 with the pixels of unfilled cells in one colour.

    Args:
        pictures: one a step; unchanged.
        filled: [K, S], from `filled_after_steps`.
        blank: the colour, 0 to 255 for red, green and blue.
    """
    steps, cells = filled.shape
    grid = math.isqrt(cells)
    stride = pictures.shape[1] // grid
    pixels = filled.reshape(steps, grid, grid).repeat(stride, axis=1).repeat(stride, axis=2)
    return np.where(pixels[..., None], pictures, np.array(blank, np.uint8))
