"""Which cells of the grid are generated in which step, and what that means for the transformer.

This module knows group sizes, generation orders, the phases that follow from them and the file
that holds a schedule. It does not know a model, a backend or a picture: everything here is a
small NumPy array computed from the size of the grid and the number of steps.

Words: a *cell* is a raster index into a square grid; an *order* is a permutation of all cells; a
*group* is the run of cells in an order that one *step* generates.
"""

import io
import json
import math
import operator
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsFloat, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from lpd_export.errors import UserError
from lpd_export.files import write_atomically

KINDS = ("locality", "random", "raster")
FOREIGN = "foreign"  # orders read from a bare JSON list, which does not say how they were made

_NEIGHBOURS = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1) if down or right]
_BATCH = 64  # orders grown side by side: enough to drown call overhead, few enough for the cache
_MOST_BYTES = 2**28  # of an array in a file: 65,536 orders of a 32x32 grid
_TIE_BREAK = 0.1  # less than the least gap (0.12) between two different proximity scores
# The counter's top word: other uses of the same (seed, index) key then draw other numbers.
_STREAM = int.from_bytes(b"orders", "big")

Sizes = Sequence[int] | NDArray[np.integer[Any]]


# ------------------------------------------------------------------------------- group sizes


def group_sizes(cells: int, steps: int) -> NDArray[np.int32]:
    """The number of cells that each step generates: [steps] int32, never falling, sum `cells`.

    Each size is its share of a quarter cosine, rounded, at least 1, and the first exactly 1 where
    there is more than one step. What rounding leaves over is corrected so that the list keeps
    rising and the largest group, which sizes every buffer, does not grow unless it must: an
    excess comes off the largest groups, a shortage goes one each to those just below the largest.

    Raises UserError unless 1 <= steps <= cells. Source: arXiv 2507.01957, the cosine schedule.
    """
    cells, steps = _whole("the number of cells", cells, 1), _whole("the number of steps", steps, 1)
    if steps > cells:
        raise UserError(
            f"{steps} steps are too many for {cells} cells: every step generates at least one "
            f"cell, so ask for 1 to {cells} steps"
        )
    if steps == 1:
        return np.array([cells], np.int32)
    left_to_generate = cells * np.cos(np.pi / 2 * np.arange(steps + 1) / steps)
    sizes = np.maximum(np.rint(-np.diff(left_to_generate)), 1).astype(np.int32)
    sizes[0] = 1
    while sizes.sum() > cells:
        sizes[sizes.argmax()] -= 1
    while (shortage := cells - int(sizes.sum())) > 0:
        growable = 1 + np.flatnonzero(sizes[1:] < sizes[-1])
        if growable.size == 0:
            growable = np.arange(1, steps)
        sizes[growable[-shortage:]] += 1
    return sizes


# ------------------------------------------------------------------------------------ orders


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
    cells = _whole("the grid", grid, 1) ** 2
    count = _whole("the number of orders", count, 1)
    sizes = _checked_sizes(sizes, cells)
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
    cells = _whole("the grid", grid, 1) ** 2
    sizes = _checked_sizes(sizes, cells)
    repulsion = _whole("the repulsion threshold", repulsion, 0)
    proximity = _number("the proximity threshold", proximity)
    streams = [_stream(seed, index) for index in indices]
    axis, each = np.arange(grid), np.arange(len(streams))
    generated = np.zeros((len(streams), grid + 2, grid + 2))  # a border spares the edge cases
    orders = np.empty((len(streams), cells), np.int32)
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


def _stream(seed: int, index: int) -> np.random.Generator:
    """The random numbers of one order, whatever the other orders draw."""
    seed = _whole("the seed", seed, 0)
    if seed >= 2**64:
        raise UserError(f"the seed must be below 2**64, but it is {seed}")
    key = np.array([seed, index], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, _STREAM]))


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
    sizes = _checked_sizes(sizes, orders.shape[1])
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


# ------------------------------------------------------------------------------------ phases


@dataclass(frozen=True)
class Phase:
    """One pass through the transformer: what goes in, and where it lands in the cache.

    `context` tokens (the condition, or what the last step sampled) come first, then `queries`, one
    for each cell to generate. Their keys and values fill the cache rows from `write_index` on; row
    0 is the condition's. `first_cell` is the generation index of the first query.
    """

    index: int
    context: int
    queries: int
    write_index: int
    first_cell: int

    @property
    def name(self) -> str:
        """As the phase's ONNX file is called: `phase_07`."""
        return f"phase_{self.index:02d}"

    @property
    def tokens(self) -> int:
        """Context and queries together: the rows of the cache that this phase writes."""
        return self.context + self.queries


def phase_table(sizes: Sizes) -> tuple[Phase, ...]:
    """The phases of a generation with these group sizes; the last one ends in cache row S."""
    phases: list[Phase] = []
    context, write_index = 1, 0
    for index, queries in enumerate(int(size) for size in sizes):
        first_cell = write_index + context - 1
        phases.append(Phase(index, context, queries, write_index, first_cell))
        write_index += context
        context = queries
    return tuple(phases)


def attention_mask(
    phase: Phase, cells: int, masked: float, mutual_visibility: bool = True
) -> NDArray[np.float32]:
    """What each token of a phase sees of the cache: [T, cells + 1] float32, 0 or `masked`.

    A context token sees everything up to the end of its own group; a query sees that and the
    other queries of its step, or without `mutual_visibility` itself alone. The queries of earlier
    steps are gone: their rows are overwritten.
    """
    mask = np.full((phase.tokens, cells + 1), masked, np.float32)
    first_query = phase.write_index + phase.context
    mask[:, :first_query] = 0
    queries = mask[phase.context :, first_query : first_query + phase.queries]
    if mutual_visibility:
        queries[:] = 0
    else:
        np.fill_diagonal(queries, 0)
    return mask


# ---------------------------------------------------------------------------------- schedule


@dataclass(frozen=True, eq=False)
class Schedule:
    """Group sizes and the orders that share them; valid by construction, and read-only.

    `group_sizes` [K] int32 and `orders` [N, S] int32, each row a permutation of the S raster
    indices. `kind` is one of KINDS, or FOREIGN for orders of unknown making; `repulsion`,
    `proximity` and `seed` say how the orders were made, and are None where that means nothing.

        schedule = Schedule.make(grid=16, steps=20)
        schedule.save("orders.npz")
        Schedule.load("orders.npz").check_grid(16)

    Raises UserError for sizes or orders that are not a schedule, saying which and why.
    """

    group_sizes: NDArray[np.int32]
    orders: NDArray[np.int32]
    kind: str
    repulsion: int | None = None
    proximity: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in (*KINDS, FOREIGN):
            raise UserError(
                f"there is no order kind {self.kind!r}: it is one of {', '.join(KINDS)}, "
                f"or {FOREIGN} for orders of unknown making"
            )
        if self.repulsion is not None:
            _whole("the repulsion threshold", self.repulsion, 0)
        if self.proximity is not None:
            _number("the proximity threshold", self.proximity)
        if self.seed is not None:
            _whole("the seed", self.seed, 0)
        orders = _checked_orders(self.orders)
        sizes = _checked_sizes(self.group_sizes, orders.shape[1])
        for name, array in (("group_sizes", sizes), ("orders", orders)):
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    @property
    def cells(self) -> int:
        """S: the cells of the grid."""
        return int(self.orders.shape[1])

    @property
    def grid(self) -> int:
        """The side of the grid, in cells."""
        return math.isqrt(self.cells)

    @property
    def steps(self) -> int:
        """K: the steps in which an image is generated."""
        return len(self.group_sizes)

    @property
    def count(self) -> int:
        """N: how many orders there are to choose from."""
        return len(self.orders)

    @classmethod
    def make(
        cls,
        grid: int,
        steps: int,
        kind: str = "locality",
        repulsion: int = 2,
        proximity: float = 1.0,
        count: int = 64,
        seed: int = 0,
    ) -> "Schedule":
        """A new schedule of `count` orders; the same arguments always give the same one.

        Raises UserError for an argument out of its range.
        """
        sizes = group_sizes(_whole("the grid", grid, 1) ** 2, steps)
        orders = make_orders(grid, sizes, kind, count, seed, repulsion, proximity)
        return cls(
            group_sizes=sizes,
            orders=orders,
            kind=kind,
            repulsion=repulsion if kind == "locality" else None,
            proximity=float(proximity) if kind == "locality" else None,
            seed=None if kind == "raster" else seed,
        )

    def check_grid(self, grid: int) -> None:
        """Raises UserError unless this schedule is for a model of this grid."""
        if grid != self.grid:
            raise UserError(
                f"the schedule is for a {self.grid}x{self.grid} grid, the model's is "
                f"{grid}x{grid}: give a schedule made for the model's resolution"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the schedule as .npz, whole or not at all; the same schedule, the same bytes.

        Raises UserError if the file cannot be written.
        """
        meta = {
            "kind": self.kind,
            "grid": self.grid,
            "repulsion": self.repulsion,
            "proximity": self.proximity,
            "seed": self.seed,
        }
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            group_sizes=self.group_sizes,
            orders=self.orders,
            meta=np.array(json.dumps(meta)),
        )
        write_atomically(path, buffer.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike[str], steps: int | None = None) -> "Schedule":
        """Reads a schedule: an .npz that `save` wrote, or a JSON list of orders.

        A JSON list says nothing of groups, so it takes its sizes from `steps`; for an .npz, `steps`
        may be left out and has to agree where given. Raises UserError if the file is missing,
        damaged, something else, or at odds with `steps`.
        """
        path = Path(path)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(
                f"cannot read the schedule {path}: {error.strerror or error}"
            ) from error
        read = cls._from_npz if content.startswith(b"PK") else cls._from_json
        try:
            return read(content, steps)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error.__cause__

    @classmethod
    def _from_npz(cls, content: bytes, steps: int | None) -> "Schedule":
        try:
            _check_headers(content)
            with np.load(io.BytesIO(content), allow_pickle=False) as archive:
                sizes, orders = archive["group_sizes"], archive["orders"]
                meta = json.loads(str(archive["meta"]))
            grid = meta.pop("grid")
            schedule = cls(sizes, orders, **meta)
        except UserError:
            raise
        except Exception as error:  # a damaged archive fails in zipfile, zlib, NumPy or json
            raise UserError(
                "this .npz is damaged or not a schedule (a schedule holds group_sizes, orders "
                "and meta): make it again with `lpd-export schedule make`"
            ) from error
        if grid != schedule.grid:
            raise UserError(
                f"its meta says a grid of {grid}, its orders are for {schedule.grid}: the file "
                "was altered; make it again with `lpd-export schedule make`"
            )
        if steps is not None and steps != schedule.steps:
            raise UserError(
                f"this schedule has {schedule.steps} steps, but --steps {steps} was asked for: "
                f"leave --steps out, or make a schedule of {steps} steps"
            )
        return schedule

    @classmethod
    def _from_json(cls, content: bytes, steps: int | None) -> "Schedule":
        try:
            listed = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise UserError(
                "this is neither an .npz schedule nor a complete JSON list of orders: give a file "
                "from `lpd-export schedule make`, or the authors' JSON"
            ) from error
        try:
            orders = np.array(listed)
        except (ValueError, OverflowError) as error:
            raise UserError("a JSON schedule must be a list of equally long orders") from error
        orders = _checked_orders(orders)
        if steps is None:
            raise UserError(
                "a JSON list of orders does not say in how many steps they are generated: pass "
                "--steps, the number in the file's name (20 for res256_steps20_repulsion2.json)"
            )
        return cls(group_sizes(orders.shape[1], steps), orders, FOREIGN)


# ------------------------------------------------------------------------------------ checks


def _check_headers(content: bytes) -> None:
    """Raises UserError for arrays that no schedule has, before memory is taken for them.

    A damaged archive raises what zipfile and NumPy raise.
    """
    headers = {}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for name in ("group_sizes", "orders", "meta"):
            with archive.open(f"{name}.npy") as file:
                version = np.lib.format.read_magic(file)
                read = (
                    np.lib.format.read_array_header_1_0
                    if version == (1, 0)
                    else np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = read(file)
                headers[name] = shape, dtype.itemsize * math.prod(shape)
    for name, (shape, size) in headers.items():
        if size > _MOST_BYTES:
            raise UserError(
                f"its {name} of shape {list(shape)} take {size / 1e9:.3g} GB, a schedule's "
                f"at most {_MOST_BYTES / 1e9:.2g} GB: make it again with fewer orders"
            )


def _checked_orders(orders: NDArray[Any]) -> NDArray[np.int32]:
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


def _checked_sizes(sizes: Sizes, cells: int) -> NDArray[np.int32]:
    """A copy [K] int32 of sizes that are at least 1 and sum to the cells of the grid."""
    sizes = np.asarray(sizes)
    if sizes.ndim != 1 or sizes.size == 0 or sizes.dtype.kind not in "iu":
        raise UserError(
            "the group sizes must be a non-empty list of whole numbers, but they are "
            f"{sizes.dtype} of shape {list(sizes.shape)}"
        )
    if sizes.min() < 1:
        raise UserError(
            f"group {int(sizes.argmin())} has {sizes.min()} cells: every step must generate at "
            "least one"
        )
    if (total := sum(sizes.tolist())) != cells:
        raise UserError(
            f"the group sizes sum to {total}, but the grid has {cells} cells: they must be equal"
        )
    return sizes.astype(np.int32)


def _whole(name: str, value: SupportsIndex, least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise UserError(f"{name} must be a whole number, but it is {value!r}") from None
    if number < least:
        raise UserError(f"{name} must be at least {least}, but it is {number}")
    return number


def _number(name: str, value: SupportsFloat) -> float:
    if not isinstance(value, SupportsFloat) or not math.isfinite(value):
        raise UserError(f"{name} must be a finite number, but it is {value!r}")
    return float(value)
