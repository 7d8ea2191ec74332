"""From logits to tokens: guidance, temperature, filters, and the draw.

Each image of a batch has settings of its own: they are rows of tensors, never constants.
Plain tensor operations on the executor's device, of fixed shapes and without a look at a value
from the host, so that on a GPU they can be captured with the graphs around them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self, get_args

import torch
from torch import Tensor

from lpd_export.bounds import Cfg, GuidanceSchedule, Positive, Probability, Temperature, checked

GUIDANCE_SCHEDULES: tuple[GuidanceSchedule, ...] = get_args(GuidanceSchedule)

BANDS = 32
"""Bands of probability, a factor of e each, in which tokens are laid out; the last has the rest."""


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


def guide(logits: Tensor, scale: Tensor) -> Tensor:
    """Guided logits [B, Q, V] float32 of conditional rows, then null rows: [2B, Q, V].

    scale: [B, Q], or [Q] for all.
    """
    conditional, null = logits.float().tensor_split(2)
    return null + scale.unsqueeze(-1) * (conditional - null)


def sample(logits: Tensor, uniform: Tensor, rows: SamplingRows, filtered: bool = True) -> Tensor:
    """Token ids [B, Q] int64: the inverse of the filtered distribution's CDF at uniform [B, Q].

    logits: [B, Q, V], after guidance. uniform: float64 in [0, 1). filtered: whether any row has a
    filter: without, they are not looked at, and nothing is sorted.

    Tokens are laid out along [0, 1) in bands of probability and by id within a band (see
    `lpd_reference.generate.draw`), so that backends whose logits differ by rounding draw the same.
    The band is found first, then the token in it: a sort would take longer than all the rest.
    """
    kept = logits.float() / rows.temperature[:, None, None]
    if filtered:
        kept = _filter(kept, rows)
    depth = kept.amax(dim=-1, keepdim=True) - kept
    # NaN has no band, but must not break this lookup or the next: the caller reports it.
    band = depth.nan_to_num(nan=0.0).clamp_(max=BANDS - 1).long()
    weight = depth.double().neg_().exp_()
    mass = weight.new_zeros(*weight.shape[:-1], BANDS).scatter_add_(-1, band, weight)
    chosen, rest = _invert(mass, uniform.unsqueeze(-1))
    within = torch.where(band == chosen, weight, 0.0)
    return _invert(within, rest)[0].squeeze(-1)


def _invert(weight: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Where uniform [..., 1] falls among weights [..., N], and how far into it, in [0, 1)."""
    cumulative = weight.cumsum(dim=-1)
    target = uniform * cumulative[..., -1:]
    place = torch.searchsorted(cumulative, target, right=True).clamp_(max=weight.shape[-1] - 1)
    size = weight.gather(-1, place)
    into = (target - (cumulative.gather(-1, place) - size)) / size
    return place, into.clamp_(0, 1 - 2**-53)


def _filter(logits: Tensor, rows: SamplingRows) -> Tensor:
    """Logits with everything outside the top k, then outside the top-p nucleus, at -inf."""
    ranked, index = logits.sort(dim=-1, descending=True, stable=True)
    last = (rows.top_k - 1)[:, None, None].expand(*ranked.shape[:-1], 1)
    least = ranked.gather(-1, last)
    probability = ranked.masked_fill(ranked < least, -torch.inf).softmax(dim=-1)
    # What comes before the first entry sums to 0, so the first always stays.
    before = (probability.cumsum(dim=-1) - probability).clamp_(min=0)
    outside = before >= rows.top_p[:, None, None]
    outside[..., :1] = False
    outside = outside.scatter(-1, index, outside)
    return logits.masked_fill(outside | (logits < least), -torch.inf)
