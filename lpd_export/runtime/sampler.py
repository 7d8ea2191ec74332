"""From logits to tokens: guidance, temperature, filters, and the draw.

Each image of a batch has settings of its own: they are rows of tensors, never constants.
Plain tensor operations on the executor's device, of fixed shapes and without a look at a value
from the host, so that on a GPU they can be captured with the graphs around them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from itertools import product
from typing import NamedTuple, Self, get_args

import numpy as np
import torch
from torch import Tensor

from lpd_export.bounds import Cfg, GuidanceSchedule, Positive, Probability, Temperature, checked

GUIDANCE_SCHEDULES: tuple[GuidanceSchedule, ...] = get_args(GuidanceSchedule)

BANDS = 32
"""Bands of probability, a factor of e each, in which tokens are laid out; the last has the rest."""

WHOLE = 2.0**44
"""The weight of a row's most probable token. Weights are whole numbers, whose sums are the same in
any order: whatever adds them up draws the same. A sum of 2^18 tokens fits in 64 bits."""

IN_CACHE = 2**16
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

    def scale(self, cells: int) -> Tensor:
        """The guidance factor [S] float32 of each generation index."""
        if self.guidance == "constant":
            return torch.full((cells,), self.cfg, dtype=torch.float32)
        return 1 + (self.cfg - 1) * torch.arange(cells, dtype=torch.float32) / cells


class SamplingRows(NamedTuple):
    """The settings of B images as tensors; B may be of different users."""

    scale: Tensor
    """[B, S] float32, the guidance factor of each generation index."""
    temperature: Tensor
    """[B] float32."""
    top_k: Tensor
    """[B] int64, at most V; V keeps all."""
    top_p: Tensor
    """[B] float32; infinity keeps all."""

    @classmethod
    def of(cls, samplings: Sequence[Sampling], cells: int, vocab_size: int) -> Self:
        """On the CPU, for S cells and V tokens."""
        p = [torch.inf if s.top_p is None or s.top_p >= 1 else s.top_p for s in samplings]
        return cls(
            torch.stack([sampling.scale(cells) for sampling in samplings]),
            torch.tensor([s.temperature for s in samplings], dtype=torch.float32),
            torch.tensor([min(s.top_k or vocab_size, vocab_size) for s in samplings]),
            torch.tensor(p, dtype=torch.float32),
        )


class StepCells(NamedTuple):
    """What is drawn from and to at the cells of a step: [B, Q], views of [B, S]."""

    uniform: Tensor
    """float64 in [0, 1)."""
    scale: Tensor
    """float32, the guidance factor."""
    given: Tensor
    """int64, the token to be taken instead of a draw; below 0 if there is none."""
    tokens: Tensor
    """int64, written."""
    finite: Tensor
    """bool, written: whether the guided logits are finite; the token is any if not."""


DrawStep = Callable[[Tensor, StepCells, SamplingRows, bool, bool], None]


def draw_step(
    logits: Tensor,
    cells: StepCells,
    rows: SamplingRows,
    guided: bool,
    filtered: bool,
    threads: int = 1,
) -> None:
    """Draws the tokens of a step into `cells`.

    Args:
        logits: [R, Q, V], conditional rows and, if guided, null rows after them.
        cells: of the step.
        rows: the settings of each image.
        guided: whether there are null rows.
        filtered: whether any image has a filter.
        threads: that draw at once on a CPU, each for other cells.
    """
    images, queries = cells.tokens.shape
    together = queries
    if logits.device.type == "cpu":
        together = max(1, IN_CACHE // (images * logits.shape[-1]))
    inference = torch.is_inference_mode_enabled()  # of this thread

    def draw(first: int) -> None:
        of_some = logits[:, first : first + together]
        some = StepCells(*(view[:, first : first + together] for view in cells))
        with torch.inference_mode(inference):
            guided_logits = guide(of_some, some.scale) if guided else of_some
            drawn, finite = sample(guided_logits, some.uniform, rows, filtered)
            some.finite.copy_(finite)
            torch.where(some.given < 0, drawn, some.given, out=some.tokens)

    firsts = range(0, queries, together)
    in_parts = _drawing_threads(threads).map if threads > 1 and len(firsts) > 1 else map
    for _ in in_parts(draw, firsts):
        pass  # what went wrong in a part is raised here


@cache
def _drawing_threads(count: int) -> ThreadPoolExecutor:
    """Threads on each of which torch computes alone."""
    return ThreadPoolExecutor(count, "draw", torch.set_num_threads, (1,))


@cache
def choose_draw_step(device: torch.device, threads: int = 1) -> DrawStep:
    """How to draw on a device: `draw_step`, or the same in one or two kernels on a GPU with Triton.

    The kernels are tried first, against `draw_step`; a RuntimeWarning says why they are not used.
    """
    if device.type == "cpu" and threads > 1:
        return partial(draw_step, threads=threads)
    if device.type != "cuda" or find_spec("triton") is None:
        return draw_step
    try:
        from lpd_export.runtime import triton_sampler

        difference = first_difference(triton_sampler.draw_step, device)
    except Exception as error:  # of a compiler, a driver or Triton itself
        difference = f"{type(error).__name__}: {error}".splitlines()[0]
    if difference is None:
        return triton_sampler.draw_step
    warnings.warn(
        f"tokens are drawn in some 40 launches a step, which takes longer than Triton's kernels: "
        f"{difference}",
        RuntimeWarning,
        stacklevel=2,
    )
    return draw_step


def first_difference(draw: DrawStep, device: torch.device) -> str | None:
    """What a way to draw does unlike `draw_step`, with all settings that it may be given."""
    shape = images, queries, vocab_size = 4, 5, 3000
    chance = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2 * images, queries, vocab_size, generator=chance)
    uniform = torch.rand(shape[:2], dtype=torch.float64, generator=chance)
    samplings = [
        Sampling(cfg=4.8),
        Sampling(cfg=2, temperature=0.5, top_k=40),
        Sampling(cfg=3, top_p=0.9),
        Sampling(guidance="constant", temperature=2, top_k=500, top_p=0.5),
    ]
    rows = SamplingRows.of(samplings, queries, vocab_size)
    rows = SamplingRows(*(values.to(device) for values in rows))
    given = torch.full(shape[:2], -1).index_fill_(1, torch.tensor([2]), 7)
    for guided, filtered in product((False, True), repeat=2):
        results = []
        for one in (draw, draw_step):
            tokens, finite = torch.zeros_like(given), torch.zeros_like(given, dtype=torch.bool)
            views = (uniform, rows.scale, given, tokens, finite)
            cells = StepCells(*(values.to(device) for values in views))
            of_step = logits if guided else logits[:images]
            one(of_step.to(device), cells, rows, guided, filtered)
            results.append((cells.tokens, cells.finite))
        if not all(a.equal(b) for a, b in zip(*results, strict=True)):
            return f"they draw other tokens here (guided: {guided}, filtered: {filtered})"
    return None


def guide(logits: Tensor, scale: Tensor) -> Tensor:
    """Guided logits [B, Q, V] float32 of conditional rows, then null rows: [2B, Q, V].

    scale: [B, Q], or [Q] for all.
    """
    conditional, null = logits.float().tensor_split(2)
    return null + scale.unsqueeze(-1) * (conditional - null)


def sample(
    logits: Tensor, uniform: Tensor, rows: SamplingRows, filtered: bool = True
) -> tuple[Tensor, Tensor]:
    """The inverse of the filtered distribution's CDF at uniform [B, Q].

    Args:
        logits: [B, Q, V], after guidance.
        uniform: float64 in [0, 1).
        rows: the settings of each image.
        filtered: whether any row has a filter: without, they are not looked at, nothing is sorted.

    Tokens are laid out along [0, 1) in bands of probability and by id within a band (see
    `lpd_reference.generate.draw`), so that backends whose logits differ by rounding draw the same.
    The band is found first, then the token in it: a sort would take longer than all the rest.

    Returns:
        token ids [B, Q] int64, and whether all logits were finite [B, Q]: if not, any token.
    """
    logits = logits.float()
    # Either is NaN if any logit is. `aminmax` takes some ten times as long on a CPU.
    low, high = logits.amin(dim=-1, keepdim=True), logits.amax(dim=-1, keepdim=True)
    finite = (low.isfinite() & high.isfinite()).squeeze(-1)
    temperature = rows.temperature[:, None, None]
    kept = logits / temperature
    # NaN has no depth, but must not break a lookup.
    depth = (high / temperature - kept).nan_to_num_(nan=0.0)
    weight = _weight(depth)
    if filtered:
        weight = _filter(kept, weight, rows)
    band = depth.clamp_(max=BANDS - 1).long()
    mass = weight.new_zeros(*weight.shape[:-1], BANDS).scatter_add_(-1, band, weight)
    total = mass.sum(dim=-1)
    target = (uniform * total).long().minimum(total - 1).unsqueeze(-1)
    chosen, rest = _find(mass, target)
    within = weight.masked_fill_(band != chosen, 0)
    return _find(within, rest)[0].squeeze(-1), finite


def _find(weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Where target [..., 1] falls among weights [..., N] laid end to end, and how far into it."""
    cumulative = weight.cumsum(dim=-1)
    place = torch.searchsorted(cumulative, target, right=True)
    before = cumulative.gather(-1, place) - weight.gather(-1, place)
    return place, target - before


def _weight(depth: Tensor) -> Tensor:
    """Whole weights of tokens that are so many nats below the best."""
    return depth.double().neg_().exp_().mul_(WHOLE).add_(0.5).long()


def _filter(logits: Tensor, weight: Tensor, rows: SamplingRows) -> Tensor:
    """Weights [B, Q, V], 0 outside the top k of logits and then outside the top-p nucleus."""
    ranked = _descending(logits)
    least = ranked.gather(-1, (rows.top_k - 1)[:, None, None].expand(*ranked.shape[:-1], 1))
    depth = (ranked[..., :1] - ranked).nan_to_num_(nan=0.0)
    cumulative = _weight(depth).masked_fill_(ranked < least, 0).cumsum(dim=-1)
    reached = rows.top_p.double()[:, None, None] * cumulative[..., -1:]
    # A token stays while those before it have not reached p: the first always does.
    stay = 1 + (cumulative[..., :-1] < reached).sum(dim=-1, keepdim=True)
    border = ranked.gather(-1, stay - 1)
    tied = logits == border
    # Of equal logits those with the lower ids.
    of_tied = stay - (ranked > border).sum(dim=-1, keepdim=True)
    inside = (logits > border) | (tied & (tied.cumsum(dim=-1) <= of_tied))
    return weight.masked_fill(~inside | (logits < least), 0)


def _descending(logits: Tensor) -> Tensor:
    if logits.device.type == "cpu":  # NumPy sorts with vector instructions, torch does not
        return torch.from_numpy(np.sort(logits.numpy(), axis=-1)).flip(-1)
    return logits.sort(dim=-1, descending=True).values
