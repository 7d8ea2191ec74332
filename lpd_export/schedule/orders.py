"""The orders in which the cells of a grid are generated: raster, random and locality-aware.

Knows how orders are made, and the figures by which they are judged. An *order* is a permutation of
all cells; its first group is the cells of the first step. Does not know the transformer or a file.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpd_export.bounds import EditOrder, Natural, Positive, Seed, checked
from lpd_export.errors import UserError
from lpd_export.schedule.phases import Sizes, checked_sizes

KINDS = ("locality", "random", "raster")

_NEIGHBOURS = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1) if down or right]
_BATCH = 64  # orders grown side by side: enough to drown call overhead, few enough for the cache
_TIE_BREAK = 0.1  # less than the least gap (0.12) between two different proximity scores
# The counter's top word: other uses of the same (seed, index) key then draw other numbers.
_SCHEDULE = int.from_bytes(b"orders", "big")
_EDIT = int.from_bytes(b"edit", "big")


def make_orders(
    grid: int,
    sizes: Sizes,
    kind: str,
    count: int,
    seed: int,
    repulsion: int = 2,
    proximity: float = 1.0,
) -> NDArray[np.int32]:
    """`count` generation orders of a grid x grid image: [count, grid * grid] int32.

    `kind` is "locality" (see `locality_orders`), "random" (uniform permutations) or "raster" (row
    by row, `count` times the same). `sizes`, `repulsion` and `proximity` matter to "locality"
    alone. Order i depends on the seed, i and the settings, not on `count`.

    Raises UserError for an unknown kind, sizes that do not fill the grid, or a setting out of
    its range.
    """
    cells = checked("the grid", grid, Positive) ** 2
    count = checked("the number of orders", count, Positive)
    sizes = checked_sizes(sizes, cells)
    if kind == "raster":
        return np.tile(np.arange(cells, dtype=np.int32), (count, 1))
    if kind == "random":
        permutations = [_stream(seed, index).permutation(cells) for index in range(count)]
        return np.array(permutations, np.int32)
    if kind != "locality":
        raise UserError(f"there is no order kind {kind!r}: choose one of {', '.join(KINDS)}")
    starts = range(0, count, _BATCH)
    batches = [range(start, min(start + _BATCH, count)) for start in starts]
    grown = [locality_orders(grid, sizes, batch, seed, repulsion, proximity) for batch in batches]
    return np.concatenate([orders for orders, _ in grown])


def locality_orders(
    grid: int,
    sizes: Sizes,
    indices: Sequence[int],
    seed: int,
    repulsion: int = 2,
    proximity: float = 1.0,
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """The locality-aware orders of these indices, and which of their cells proximity picked.

    A step first takes cells close to what is generated but not to each other: from the highest
    proximity score (the sum of 1 / Euclidean distance over the generated 8-neighbours) down to
    `proximity`, skipping every cell within Chebyshev distance `repulsion`, inclusive, of one taken
    in this step. Then it fills up by farthest-point sampling over the step's cells. All ties
    are broken at random. Step 0, where nothing is generated yet, thereby starts at a random cell.

    Returns orders [len(indices), grid * grid] int32 and, in the same generation order, a bool
    array that is true where the first rule took the cell. Raises UserError for a setting out of
    its range. Source: arXiv 2507.01957, the section on locality-aware generation order.
    """
    sizes = checked_sizes(sizes, checked("the grid", grid, Positive) ** 2)
    streams = [_stream(seed, index) for index in indices]
    return _grow(np.zeros(grid * grid, np.bool_), sizes, streams, repulsion, proximity)


def edit_orders(
    sizes: Sizes,
    kept: NDArray[np.bool_],
    keys: Sequence[tuple[int, int]],
    kind: str,
    repulsion: int = 2,
    proximity: float = 1.0,
) -> NDArray[np.int32]:
    """Orders that have the kept cells first, one for each key (seed, image index): [N, S] int32.

    The kept cells [S] bool come in random order, as in training; then the new ones, grown from them
    as `locality_orders` grows from what is generated, or if `kind` is "random" in random order.
    Group sizes stay as they are. Where a step has both, its new cells do not see its kept ones:
    these are the ones that are farthest from what is new.

    Raises UserError as `make_orders`.
    """
    checked("the order of new cells", kind, EditOrder)
    ends = np.cumsum(checked_sizes(sizes, len(kept)))
    old, new, grid = np.flatnonzero(kept), np.flatnonzero(~kept), math.isqrt(len(kept))
    sizes = np.diff(np.maximum(ends, len(old)), prepend=len(old))
    unseen = len(old) - ends[sizes == 0].max(initial=0)
    (old_down, old_right), (new_down, new_right) = np.divmod(old, grid), np.divmod(new, grid)
    squared = (old_down[:, None] - new_down) ** 2 + (old_right[:, None] - new_right) ** 2
    distance = squared.min(axis=1, initial=2 * len(kept))
    streams = [_stream(*key, use=_EDIT) for key in keys]
    first = []
    for stream in streams:
        shuffled = stream.permutation(len(old))
        farthest = np.sort(distance[shuffled].argsort(kind="stable")[len(old) - unseen :])
        first.append(old[np.append(np.delete(shuffled, farthest), shuffled[farthest])])
    if kind == "random":
        then = [stream.permutation(new)[None] for stream in streams]
    else:
        some = (streams[start : start + _BATCH] for start in range(0, len(streams), _BATCH))
        then = [_grow(kept, sizes[sizes > 0], s, repulsion, proximity)[0] for s in some]
    return np.concatenate([np.stack(first), np.concatenate(then)], axis=1).astype(np.int32)


def _grow(
    kept: NDArray[np.bool_],
    sizes: NDArray[np.integer[Any]],
    streams: Sequence[np.random.Generator],
    repulsion: int,
    proximity: float,
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """The rule of `locality_orders`, from cells that are there; `sizes` are of the others."""
    cells = len(kept)
    grid = math.isqrt(cells)
    repulsion = checked("the repulsion threshold", repulsion, Natural)
    proximity = checked("the proximity threshold", proximity, float)
    axis, each = np.arange(grid), np.arange(len(streams))
    generated = np.zeros((len(streams), grid + 2, grid + 2))  # a border spares the edge cases
    generated[:, 1:-1, 1:-1] = kept.reshape(grid, grid)
    orders = np.empty((len(streams), int(sum(sizes))), np.int32)
    by_proximity = np.empty(orders.shape, np.bool_)

    start = 0
    for size in sizes:
        chance = np.stack([stream.random(cells) for stream in streams])
        free = generated[:, 1:-1, 1:-1].reshape(-1, cells) == 0
        pulls = [_shifted(generated, *offset) / math.hypot(*offset) for offset in _NEIGHBOURS]
        score = np.sum(pulls, axis=0).reshape(-1, cells)
        # Both ranks are -1 where a cell cannot be taken. Squared distances are whole numbers, so
        # a chance below 1 orders equal ones only; 4 * cells is beyond any distance in the grid.
        near = np.where(free & (score >= proximity), score + _TIE_BREAK * chance, -1)
        far = np.where(free, 4 * cells + chance, -1)
        for turn in range(start, start + size):
            nearest = near.argmax(axis=1)
            walking = near[each, nearest] >= 0
            taken = np.where(walking, nearest, far.argmax(axis=1))
            orders[:, turn], by_proximity[:, turn] = taken, walking
            down = np.abs(axis - taken[:, None] // grid)
            right = np.abs(axis - taken[:, None] % grid)
            repelled = (down <= repulsion)[:, :, None] & (right <= repulsion)[:, None, :]
            distance = (down**2)[:, :, None] + (right**2)[:, None, :]
            near[repelled.reshape(-1, cells)] = -1
            np.minimum(far, distance.reshape(-1, cells) + chance, out=far)
            far[each, taken] = -1
        group = orders[:, start : start + size]
        generated[each[:, None], 1 + group // grid, 1 + group % grid] = 1
        start += size
    return orders, by_proximity


def _stream(seed: int, index: int, use: int = _SCHEDULE) -> np.random.Generator:
    """The random numbers of one order, whatever the other orders draw."""
    key = np.array([checked("the seed", seed, Seed), index], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, use]))


def _shifted(bordered: NDArray[Any], down: int, right: int) -> NDArray[Any]:
    """The neighbour of every cell in one direction: [N, G + 2, G + 2] -> a view [N, G, G]."""
    grid = bordered.shape[-1] - 2
    return bordered[:, 1 + down : 1 + down + grid, 1 + right : 1 + right + grid]


@dataclass(frozen=True)
class LocalityStatistics:
    """How well orders keep to what is generated, and the cells of a step to themselves.

    `isolated_share`: of the cells after step 0, the share that has no 8-neighbour generated in an
    earlier step. `group_distance`: the mean Euclidean distance, in cells, to the nearest other
    cell of the same group, groups of one left out. NaN where there is nothing to count.
    """

    isolated_share: float
    group_distance: float


def locality_statistics(orders: NDArray[np.integer[Any]], sizes: Sizes) -> LocalityStatistics:
    """The two figures by which orders are judged, over orders [N, S] of one list of group sizes.

    Source: arXiv 2507.01957, the two principles behind the locality-aware order.
    """
    grid = math.isqrt(orders.shape[1])
    sizes = checked_sizes(sizes, orders.shape[1])
    step = step_of_cell(orders, sizes).reshape(-1, grid, grid)
    bordered = np.pad(step, ((0, 0), (1, 1), (1, 1)), constant_values=len(sizes))
    first_neighbour = np.min([_shifted(bordered, *offset) for offset in _NEIGHBOURS], axis=0)
    isolated = (first_neighbour >= step)[step > 0]

    total, counted = 0.0, 0
    ends = np.cumsum(sizes)
    for order in orders:
        for size, end in zip(sizes, ends, strict=True):
            if size > 1:
                down, right = np.divmod(order[end - size : end].astype(np.int64), grid)
                squares = (down[:, None] - down) ** 2 + (right[:, None] - right) ** 2
                np.fill_diagonal(squares, 2 * grid * grid)
                total += float(np.sqrt(squares.min(axis=1)).sum())
                counted += int(size)
    return LocalityStatistics(
        isolated_share=float(isolated.mean()) if isolated.size else math.nan,
        group_distance=total / counted if counted else math.nan,
    )


def step_of_cell(orders: NDArray[np.integer[Any]], sizes: Sizes) -> NDArray[np.int32]:
    """The step that generates each cell: orders [N, S] -> [N, S] int32 in raster order."""
    steps = np.empty(orders.shape, np.int32)
    in_order = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    np.put_along_axis(steps, orders.astype(np.int64), in_order[None], axis=1)
    return steps


def checked_orders(orders: NDArray[Any]) -> NDArray[np.int32]:
    """A copy [N, S] int32 in which every row is a permutation of a square grid's cells."""
    orders = np.asarray(orders)
    if orders.ndim != 2 or orders.size == 0 or orders.dtype.kind not in "iu":
        raise UserError(
            "the orders must be a non-empty table of whole numbers, one order a row, but they are "
            f"{orders.dtype} of shape {list(orders.shape)}"
        )
    cells = orders.shape[1]
    grid = math.isqrt(cells)
    if grid * grid != cells:
        raise UserError(
            f"the orders visit {cells} cells, which is no square grid: the nearest are "
            f"{grid}x{grid} = {grid**2} and {grid + 1}x{grid + 1} = {(grid + 1) ** 2}"
        )
    wrong = (np.sort(orders, axis=1) != np.arange(cells)).any(axis=1)
    if wrong.any():
        index = int(wrong.argmax())
        order = orders[index]
        outside = order[(order < 0) | (order >= cells)]
        if outside.size:
            raise UserError(
                f"order {index} holds cell {outside[0]}, but the cells of a {grid}x{grid} grid are "
                f"0 to {cells - 1}"
            )
        visits = np.bincount(order.astype(np.int64), minlength=cells)
        raise UserError(
            f"order {index} is no permutation: it repeats cell {visits.argmax()} and misses cell "
            f"{visits.argmin()}"
        )
    return orders.astype(np.int32)
