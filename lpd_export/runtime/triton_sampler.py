"""The sampler as Triton kernels: two launches with filters, one without, in place of some sixty.

Gives the tokens of `sampler.draw_step`: every operation on floats is rounded as there (no products
are contracted, division is exact), and weights are whole numbers. A program has one row: a cell of
an image. Knows nothing of phases, orders or graphs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lpd_export.runtime.sampler import BANDS, TO_WHOLE, WHOLE, SamplingRows, StepCells

BLOCK = 2048
"""Tokens that a program looks at at once."""
LANES = 512
"""Tokens whose weights it adds to their bands at once: BANDS sums of each are in registers."""
OPTIONS = {"num_warps": 16, "enable_fp_fusion": False}
"""Of the compiler. A product and a sum that were rounded as one would move draws."""

# What differs from step to step must not make other kernels.
SIZES = ["queries", "stride", "count"]
VIEWS = ["scales", "uniforms", "givens", "tokens", "finites"]

BAND_COUNT = tl.constexpr(BANDS)
WEIGHT_OF_BEST = tl.constexpr(WHOLE)
ADDED_TO_ROUND = tl.constexpr(TO_WHOLE)


def draw_step(
    logits: Tensor, cells: StepCells, rows: SamplingRows, guided: bool, filtered: bool
) -> None:
    """See `sampler.draw_step`; the cells' tensors are views of [B, S] tensors, logits are float32.

    Raises:
        RuntimeError: if a kernel cannot be compiled here.
    """
    images, queries = cells.tokens.shape
    vocab_size = logits.shape[-1]
    (stride,) = {tensor.stride(0) for tensor in cells}
    count = images * queries
    weights = logits.new_empty((count, vocab_size) if filtered else 1, dtype=torch.int64)
    sizes = (queries, stride, vocab_size, count)
    settings = {"GUIDED": guided, "BLOCK": BLOCK, **OPTIONS}
    if filtered:
        _filter[(count,)](
            logits,
            cells.scale,
            rows.temperature,
            rows.top_k,
            rows.top_p,
            weights,
            *sizes,
            **settings,
        )
    _draw[(count,)](
        logits,
        cells.scale,
        cells.uniform,
        cells.given,
        rows.temperature,
        weights,
        cells.tokens,
        cells.finite,
        *sizes,
        FILTERED=filtered,
        LANES=LANES,
        **settings,
    )


@triton.jit
def _guided(logits, scale, token, row, count, vocab_size, GUIDED: tl.constexpr):
    """Guided logits of a row at these tokens; -inf beyond the vocabulary."""
    inside = token < vocab_size
    own = logits + row.to(tl.int64) * vocab_size
    value = tl.load(own + token, mask=inside, other=0.0)
    if GUIDED:
        of_null = own + count.to(tl.int64) * vocab_size
        null = tl.load(of_null + token, mask=inside, other=0.0)
        value = null + scale * (value - null)
    return tl.where(inside, value, float("-inf"))


@triton.jit
def _highest(logits, scale, row, count, vocab_size, GUIDED: tl.constexpr, BLOCK: tl.constexpr):
    """The highest of a row's guided logits, and whether all are finite."""
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    finite = tl.full((BLOCK,), 1, tl.int32)
    for start in range(0, vocab_size, BLOCK):
        token = start + tl.arange(0, BLOCK)
        value = _guided(logits, scale, token, row, count, vocab_size, GUIDED)
        highest = tl.maximum(highest, value)
        finite &= ((tl.abs(value) < float("inf")) | (token >= vocab_size)).to(tl.int32)
    return tl.max(highest, 0), tl.min(finite, 0)


@triton.jit
def _depth(value, highest, temperature):
    """How far logits lie below the highest at a temperature, in nats; 0 where that is no number."""
    depth = tl.div_rn(highest, temperature) - tl.div_rn(value, temperature)
    return tl.where(depth == depth, depth, 0.0)


@triton.jit
def _weight(depth):
    weight = tl.exp(-depth.to(tl.float64)) * WEIGHT_OF_BEST
    return ((weight + ADDED_TO_ROUND) - ADDED_TO_ROUND).to(tl.int64)


@triton.jit
def _weighed(depth, weights, token, vocab_size, FILTERED: tl.constexpr):
    """Weights and bands of tokens: 0 beyond the vocabulary; what `_filter` left, if it ran."""
    if FILTERED:
        weight = tl.load(weights + token, mask=token < vocab_size, other=0)
    else:
        weight = tl.where(token < vocab_size, _weight(depth), 0)
    return weight, tl.minimum(depth, BAND_COUNT - 1.0).to(tl.int32)


@triton.jit
def _rank(value, temperature):
    """Whole numbers from 0 to 2^32 - 1, in the order of logits at a temperature."""
    kept = tl.div_rn(value, temperature)
    bits = tl.where(kept == 0.0, 0.0, kept).to(tl.int32, bitcast=True)  # so that -0 is 0
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=VIEWS)
def _filter(
    logits,
    scales,
    temperatures,
    top_ks,
    top_ps,
    weights,
    queries,
    stride,
    vocab_size,
    count,
    GUIDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Weights [count, V], 0 outside the top k of a row's logits and then outside its nucleus.

    The least rank inside is found bit by bit, where others sort.
    """
    row = tl.program_id(0)
    image = row // queries
    scale = tl.load(scales + image * stride + row % queries)
    temperature = tl.load(temperatures + image)
    weights += row.to(tl.int64) * vocab_size
    highest, _ = _highest(logits, scale, row, count, vocab_size, GUIDED, BLOCK)

    least = tl.zeros((), tl.int64)
    top_k = tl.load(top_ks + image)
    if top_k < vocab_size:
        for bit in range(32):
            trial = least + (tl.full((), 2147483648, tl.int64) >> bit)
            found = tl.zeros((BLOCK,), tl.int64)
            for start in range(0, vocab_size, BLOCK):
                token = start + tl.arange(0, BLOCK)
                value = _guided(logits, scale, token, row, count, vocab_size, GUIDED)
                inside = (token < vocab_size) & (_rank(value, temperature) >= trial)
                found += inside.to(tl.int64)
            least = tl.where(tl.sum(found, 0) >= top_k, trial, least)

    masses = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, vocab_size, BLOCK):
        token = start + tl.arange(0, BLOCK)
        value = _guided(logits, scale, token, row, count, vocab_size, GUIDED)
        weight = _weight(_depth(value, highest, temperature))
        weight = tl.where(_rank(value, temperature) >= least, weight, 0)
        tl.store(weights + token, weight, mask=token < vocab_size)
        masses += tl.where(token < vocab_size, weight, 0)
    tl.debug_barrier()  # what one thread has written, others read

    top_p = tl.load(top_ps + image)
    if top_p < 1.0:
        reached = top_p.to(tl.float64) * tl.sum(masses, 0).to(tl.float64)
        least = tl.zeros((), tl.int64)
        above = tl.zeros((), tl.int64)  # what those of higher rank weigh
        for bit in range(32):
            trial = least + (tl.full((), 2147483648, tl.int64) >> bit)
            masses = tl.zeros((BLOCK,), tl.int64)
            for start in range(0, vocab_size, BLOCK):
                token = start + tl.arange(0, BLOCK)
                value = _guided(logits, scale, token, row, count, vocab_size, GUIDED)
                weight = tl.load(weights + token, mask=token < vocab_size, other=0)
                masses += tl.where(_rank(value, temperature) >= trial, weight, 0)
            mass = tl.sum(masses, 0)
            enough = mass.to(tl.float64) >= reached
            least = tl.where(enough, trial, least)
            above = tl.where(enough, above, mass)
        tl.debug_barrier()  # all have read what is now overwritten
        for start in range(0, vocab_size, BLOCK):
            token = start + tl.arange(0, BLOCK)
            value = _guided(logits, scale, token, row, count, vocab_size, GUIDED)
            weight = tl.load(weights + token, mask=token < vocab_size, other=0)
            rank = _rank(value, temperature)
            # Of equal logits those with the lower ids stay, until p is reached.
            tied = tl.where(rank == least, weight, 0)
            before = above + tl.cumsum(tied, 0) - tied
            stays = (rank > least) | ((rank == least) & (before.to(tl.float64) < reached))
            tl.store(weights + token, tl.where(stays, weight, 0), mask=token < vocab_size)
            above += tl.sum(tied, 0)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=VIEWS)
def _draw(
    logits,
    scales,
    uniforms,
    givens,
    temperatures,
    weights,
    tokens,
    finites,
    queries,
    stride,
    vocab_size,
    count,
    GUIDED: tl.constexpr,
    FILTERED: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """A row's token, and whether its logits are finite."""
    row = tl.program_id(0)
    image = row // queries
    cell = image * stride + row % queries
    scale = tl.load(scales + cell)
    temperature = tl.load(temperatures + image)
    weights += row.to(tl.int64) * vocab_size
    highest, finite = _highest(logits, scale, row, count, vocab_size, GUIDED, BLOCK)

    # A band a column; the sums of all lanes are added up once, at the end.
    column = tl.arange(0, BAND_COUNT)
    masses = tl.zeros((LANES, BAND_COUNT), tl.int64)
    for start in range(0, vocab_size, LANES):
        token = start + tl.arange(0, LANES)
        value = _guided(logits, scale, token, row, count, vocab_size, GUIDED)
        depth = _depth(value, highest, temperature)
        weight, band = _weighed(depth, weights, token, vocab_size, FILTERED)
        masses += tl.where(band[:, None] == column[None, :], weight[:, None], 0)
    mass = tl.sum(masses, 0)
    total = tl.sum(mass, 0)
    target = (tl.load(uniforms + cell) * total.to(tl.float64)).to(tl.int64)
    target = tl.minimum(target, total - 1)
    chosen = tl.sum((tl.cumsum(mass, 0) <= target).to(tl.int32), 0)
    rest = target - tl.sum(tl.where(column < chosen, mass, 0), 0)

    # The block of the band in which the rest falls, then the token in the block.
    first = -BLOCK
    before = tl.zeros((), tl.int64)
    after = tl.zeros((), tl.int64)
    within = tl.zeros((BLOCK,), tl.int64)
    while (after <= rest) & (first + BLOCK < vocab_size):
        first += BLOCK
        token = first + tl.arange(0, BLOCK)
        value = _guided(logits, scale, token, row, count, vocab_size, GUIDED)
        depth = _depth(value, highest, temperature)
        weight, band = _weighed(depth, weights, token, vocab_size, FILTERED)
        within = tl.where(band == chosen, weight, 0)
        before = after
        after += tl.sum(within, 0)
    passed = before + tl.cumsum(within, 0) <= rest
    drawn = first + tl.sum(passed.to(tl.int32), 0)
    given = tl.load(givens + cell)
    tl.store(tokens + cell, tl.where(given < 0, drawn.to(tl.int64), given))
    tl.store(finites + cell, finite != 0)
