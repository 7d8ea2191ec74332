"""The steps of a generation and the passes through the transformer that they are: what phase 7 is.

Knows group sizes, the phases that follow from them, and what each token of a phase sees of the
cache: small NumPy arrays of the size of the grid and the number of steps. Which cells a step
generates is in `orders`. Does not know a model, a backend or a file.

Words: a *cell* is a raster index into a square grid; a *group* is the cells that one *step*
generates; a *phase* is the pass that computes their logits. Phases are counted from 0, as
their files are; the steps that people read about, from 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpd_export.bounds import Positive, checked
from lpd_export.errors import UserError

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
    cells = checked("the number of cells", cells, Positive)
    steps = checked("the number of steps", steps, Positive)
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


def checked_sizes(sizes: Sizes, cells: int) -> NDArray[np.int32]:
    """A copy [K] int32 of sizes that are at least 1 and sum to the cells of the grid."""
    sizes = np.asarray(sizes)
    if sizes.ndim != 1 or sizes.size == 0 or sizes.dtype.kind not in "iu":
        raise UserError(
            "the group sizes must be a non-empty list of whole numbers, but they are "
            f"{sizes.dtype} of shape {list(sizes.shape)}"
        )
    if sizes.min() < 1:
        raise UserError(
            f"step {int(sizes.argmin()) + 1} has {sizes.min()} cells: every step must generate at "
            "least one"
        )
    if (total := sum(sizes.tolist())) != cells:
        raise UserError(
            f"the group sizes sum to {total}, but the grid has {cells} cells: they must be equal"
        )
    return sizes.astype(np.int32)


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
