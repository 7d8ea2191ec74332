"""From logits to tokens: guidance, temperature, filters, and the draw.

Each image of a batch has settings of its own: they are rows of arrays, never constants.
Plain array operations on the executor's device, of fixed shapes and without a look at a value
from the host, so that on a GPU they can be captured with the graphs around them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import product
from math import prod
from typing import NamedTuple, Self, get_args

import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray

from lpd_export.bounds import Cfg, GuidanceSchedule, Positive, Probability, Temperature, checked
from lpd_export.runtime.arrays import Array, Arrays, arrays_of, look_up, on_host

GUIDANCE_SCHEDULES: tuple[GuidanceSchedule, ...] = get_args(GuidanceSchedule)

BANDS = 32
"""Bands of probability, a factor of e each, in which tokens are laid out; the last has the rest."""

WHOLE = 2.0**34
"""The weight of a row's most probable token. Weights are whole numbers, whose sums are the same in
any order: whatever adds them up draws the same. A sum of 2^18 tokens is exact in a float64."""

TO_WHOLE = 2.0**52
"""Added to a smaller float64 and taken away again, it leaves the nearest whole number."""

IN_CACHE = 2**17
"""Logits drawn from at once on a CPU, so that what is computed of them stays in its cache."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn from logits (paper section 4.1 for the guidance schedules).

    cfg is the guidance scale, 1 for none; `linear` guidance grows from 1 at the first token
    towards cfg at the last. top_k and top_p are off when None. Raises UserError for a value out
    of its range.
    """

    cfg: float = 1.0
    guidance: GuidanceSchedule = "linear"
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        checked("cfg", self.cfg, Cfg)
        checked("guidance", self.guidance, GuidanceSchedule)
        checked("temperature", self.temperature, Temperature)
        checked("top-k", self.top_k, Positive | None)
        checked("top-p", self.top_p, Probability | None)

    @property
    def guided(self) -> bool:
        """Whether each image needs a second row, for the null condition."""
        return self.cfg != 1.0

    @property
    def filtered(self) -> bool:
        """Whether a token's rank decides if it may be drawn: by top_k or top_p."""
        return self.top_k is not None or (self.top_p is not None and self.top_p < 1)

    def scale(self, cells: int) -> NDArray[np.float32]:
        """The guidance factor [S] float32 of each generation index."""
        if self.guidance == "constant":
            return np.full(cells, self.cfg, np.float32)
        growth = np.float32(self.cfg - 1) * np.arange(cells, dtype=np.float32)
        return np.float32(1) + growth / np.float32(cells)


class SamplingRows(NamedTuple):
    """The settings of B images as arrays; B may be of different users."""

    scale: Array
    """[B, S] float32, the guidance factor of each generation index."""
    temperature: Array
    """[B] float32."""
    top_k: Array
    """[B] int64, at most V; V keeps all."""
    top_p: Array
    """[B] float32; infinity keeps all."""

    @classmethod
    def of(cls, samplings: Sequence[Sampling], cells: int, vocab_size: int) -> Self:
        """On the host, for S cells and V tokens."""
        p = [np.inf if s.top_p is None or s.top_p >= 1 else s.top_p for s in samplings]
        return cls(
            np.stack([sampling.scale(cells) for sampling in samplings]),
            np.array([s.temperature for s in samplings], np.float32),
            np.array([min(s.top_k or vocab_size, vocab_size) for s in samplings]),
            np.array(p, np.float32),
        )

    def on(self, arrays: Arrays) -> Self:
        """The same on a device."""
        return type(self)(*(arrays.put(values) for values in self))


class StepCells(NamedTuple):
    """What is drawn from and to at the cells of a step: [B, Q], views of [B, S]."""

    uniform: Array
    """float64 in [0, 1)."""
    scale: Array
    """float32, the guidance factor."""
    given: Array
    """int64, the token to be taken instead of a draw; below 0 if there is none."""
    tokens: Array
    """int64, written."""
    finite: Array
    """bool, written: whether the guided logits are finite; the token is any if not."""


DrawStep = Callable[[Array, StepCells, SamplingRows, bool, bool], None]


def draw_step(
    logits: Array,
    cells: StepCells,
    rows: SamplingRows,
    guided: bool,
    filtered: bool,
) -> None:
    """Draws the tokens of a step into `cells`.

    Args:
        logits: [R, Q, V] float32, conditional rows and, if guided, null rows after them.
        cells: of the step.
        rows: the settings of each image.
        guided: whether there are null rows.
        filtered: whether any image has a filter.
    """
    images, queries = cells.tokens.shape
    together = queries
    if on_host(logits):
        together = max(1, IN_CACHE // (images * logits.shape[-1]))
    for first in range(0, queries, together):
        of_some = logits[:, first : first + together]
        some = StepCells(*(view[:, first : first + together] for view in cells))
        # What is not finite is said of the image, not by NumPy of each operation.
        with np.errstate(all="ignore"):
            guided_logits = guide(of_some, some.scale) if guided else of_some
            drawn, finite = sample(guided_logits, some.uniform, rows, filtered)
        some.finite[...] = finite
        some.tokens[...] = array_namespace(drawn).where(some.given < 0, drawn, some.given)


@cache
def choose_draw_step(device: str) -> DrawStep:
    """How to draw on a device: `draw_step`, or the same in one or two kernels on a GPU with Triton.

    The kernels are tried first, against `draw_step`; a RuntimeWarning says why they are not used.
    """
    if not device.startswith("cuda") or find_spec("triton") is None:
        return draw_step
    try:
        from lpd_export.runtime import triton_sampler

        difference = first_difference(triton_sampler.draw_step, arrays_of(device))
    except Exception as error:  # of a compiler, a driver or Triton itself
        difference = f"{type(error).__name__}: {error}".splitlines()[0]
    if difference is None:
        return triton_sampler.draw_step
    warnings.warn(
        f"tokens are drawn in some 60 launches a step, which takes longer than Triton's kernels: "
        f"{difference}",
        RuntimeWarning,
        stacklevel=2,
    )
    return draw_step


def first_difference(draw: DrawStep, arrays: Arrays) -> str | None:
    """What a way to draw does unlike `draw_step`, with all settings that it may be given."""
    images, queries, vocab_size = 4, 5, 3000
    chance = np.random.default_rng(0)
    logits = 3 * chance.standard_normal((2 * images, queries, vocab_size), np.float32)
    uniform = chance.random((images, queries))
    samplings = [
        Sampling(cfg=4.8),
        Sampling(cfg=2, temperature=0.5, top_k=40),
        Sampling(cfg=3, top_p=0.9),
        Sampling(guidance="constant", temperature=2, top_k=500, top_p=0.5),
    ]
    rows = SamplingRows.of(samplings, queries, vocab_size).on(arrays)
    given = np.full((images, queries), -1)
    given[:, 2] = 7
    for guided, filtered in product((False, True), repeat=2):
        results = []
        for one in (draw, draw_step):
            cells = StepCells(
                arrays.put(uniform),
                rows.scale,
                arrays.put(given),
                arrays.zeros((images, queries), "int64"),
                arrays.zeros((images, queries), "bool"),
            )
            of_step = logits if guided else logits[:images]
            one(arrays.put(of_step), cells, rows, guided, filtered)
            results.append((arrays.take(cells.tokens), arrays.take(cells.finite)))
        if not all(np.array_equal(a, b) for a, b in zip(*results, strict=True)):
            return f"they draw other tokens here (guided: {guided}, filtered: {filtered})"
    return None


def guide(logits: Array, scale: Array) -> Array:
    """Guided logits [B, Q, V] float32 of conditional rows, then null rows: [2B, Q, V].

    scale: [B, Q], or [Q] for all.
    """
    images = logits.shape[0] // 2
    guided = logits[:images] - logits[images:]
    guided *= scale[..., None]
    guided += logits[images:]
    return guided


def sample(
    logits: Array, uniform: Array, rows: SamplingRows, filtered: bool = True
) -> tuple[Array, Array]:
    """The inverse of the filtered distribution's CDF at uniform [B, Q].

    Args:
        logits: [B, Q, V] float32, after guidance.
        uniform: float64 in [0, 1).
        rows: the settings of each image.
        filtered: whether any row has a filter: without, they are not looked at, nothing is sorted.

    Tokens are laid out along [0, 1) in bands of probability and by id within a band (see
    `lpd_reference.generate.draw`), so that backends whose logits differ by rounding draw the same.
    The band is found first, then the token in it: a sort would take longer than all the rest.

    Returns:
        token ids [B, Q] int64, and whether all logits were finite [B, Q]: if not, any token.
    """
    xp = array_namespace(logits)
    # Either is NaN if any logit is.
    low, high = (of(logits, axis=-1, keepdims=True) for of in (xp.min, xp.max))
    finite = (xp.isfinite(low) & xp.isfinite(high))[..., 0]
    temperature = rows.temperature[:, None, None]
    kept = logits / temperature
    below = kept - high / temperature
    # NaN is not below anything, but must not break a lookup.
    below = xp.fmin(below, xp.zeros_like(high), out=below)
    weight = _weight(below)
    if filtered:
        weight = _filter(kept, weight, rows)
    below = xp.fmax(below, xp.full_like(high, 1 - BANDS), out=below)
    band = -xp.astype(below, xp.int64)
    mass = _masses(weight, band)
    total = xp.sum(mass, axis=-1)
    target = xp.minimum(xp.floor(uniform * total), total - 1)[..., None]
    chosen, rest = _find(mass, target)
    return _find_in_band(weight, band == chosen, rest), finite


def _masses(weight: Array, band: Array) -> Array:
    """What the tokens of each band weigh together [..., BANDS], of weights and bands [..., V]."""
    if not on_host(weight):
        return weight.new_zeros((*weight.shape[:-1], BANDS)).scatter_add_(-1, band, weight)
    rows = prod(weight.shape[:-1])
    places = band.reshape(rows, -1) + BANDS * np.arange(rows)[:, None]
    masses = np.bincount(places.ravel(), weight.ravel(), minlength=rows * BANDS)
    return masses.reshape(*weight.shape[:-1], BANDS)


def _find(weight: Array, target: Array) -> tuple[Array, Array]:
    """Where target [..., 1] falls among weights [..., N] laid end to end, and how far into it."""
    xp = array_namespace(weight)
    cumulative = xp.cumulative_sum(weight, axis=-1)
    place = xp.sum(cumulative <= target, axis=-1, keepdims=True)
    return place, target - (look_up(cumulative, place) - look_up(weight, place))


def _find_in_band(weight: Array, inside: Array, target: Array) -> Array:
    """The token [...] at which target [..., 1] falls among those inside the band [..., V]."""
    if not on_host(weight):
        weight *= inside
        return _find(weight, target)[0][..., 0]
    tokens = np.zeros(inside.shape[:-1], np.int64)
    for row in np.ndindex(tokens.shape):
        some = np.flatnonzero(inside[row])
        place = np.searchsorted(weight[row][some].cumsum(), target[row], side="right")[0]
        tokens[row] = some[min(place, len(some) - 1)] if len(some) else 0  # of what is not finite
    return tokens


def _weight(below: Array) -> Array:
    """Whole weights, as float64, of tokens whose logits are so far (at most 0) below the best."""
    xp = array_namespace(below)
    weight = xp.astype(below, xp.float64)
    weight = xp.exp(weight, out=weight)
    weight *= WHOLE
    weight += TO_WHOLE
    weight -= TO_WHOLE
    return weight


def _filter(logits: Array, weight: Array, rows: SamplingRows) -> Array:
    """Weights [B, Q, V], 0 outside the top k of logits and then outside the top-p nucleus."""
    xp = array_namespace(logits)
    # NumPy sorts with vector instructions.
    ranked = xp.sort(logits, axis=-1, descending=True)
    last = xp.broadcast_to((rows.top_k - 1)[:, None, None], (*ranked.shape[:-1], 1))
    least = look_up(ranked, last)
    of_ranked = _weight(ranked - ranked[..., :1])
    of_ranked *= ranked >= least
    cumulative = xp.cumulative_sum(of_ranked, axis=-1)
    reached = xp.astype(rows.top_p, xp.float64)[:, None, None] * cumulative[..., -1:]
    # A token stays while those before it have not reached p: the first always does.
    stay = 1 + xp.sum(cumulative[..., :-1] < reached, axis=-1, keepdims=True)
    border = look_up(ranked, stay - 1)
    tied = logits == border
    # Of equal logits those with the lower ids.
    of_tied = stay - xp.sum(ranked > border, axis=-1, keepdims=True)
    nth = xp.cumulative_sum(xp.astype(tied, xp.int64), axis=-1)
    inside = (logits > border) | (tied & (nth <= of_tied))
    weight *= inside & (logits >= least)
    return weight
