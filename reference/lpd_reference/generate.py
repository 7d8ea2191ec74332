"""Generation with the reference model: the plain loop that exported runtimes are compared with.

Reads top to bottom as guidance, filtering, drawing, and the loop over the steps. Written for
clarity: it looks at one step at a time and keeps nothing that a later step does not need.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lpd_reference.lpd import LPD

GuidanceSchedule = Literal["constant", "linear"]

BANDS = 32
"""Bands of probability in which tokens are laid out for drawing; the last holds all the rest."""


class Generation(NamedTuple):
    """What `generate` returns."""

    token_ids: Tensor
    """[B, S] int64, in raster order."""
    logits: Tensor
    """[B, S, V], after guidance and before temperature and filters, in generation order."""


def guidance_scale(cfg: float, schedule: GuidanceSchedule, cells: int) -> Tensor:
    """Classifier-free guidance's factor [S] for each generation index (paper section 4.1).

    `constant` is cfg throughout; `linear` grows from 1 at index 0 towards cfg at index S.
    """
    if schedule == "constant":
        return torch.full((cells,), cfg)
    if schedule == "linear":
        return 1 + (cfg - 1) * torch.arange(cells) / cells
    raise ValueError(f"guidance schedule {schedule!r} is neither 'constant' nor 'linear'")


def filter_logits(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Logits [..., V] with everything but the top k, then the top-p nucleus, set to -inf."""
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None and top_p < 1:
        ranked, index = logits.sort(dim=-1, descending=True, stable=True)
        probability = ranked.softmax(dim=-1)
        # An entry stays while the ones before it have not yet reached p: so the first always does.
        outside = probability.cumsum(dim=-1) - probability >= top_p
        outside[..., 0] = False
        logits = logits.masked_fill(outside.scatter(-1, index, outside), -torch.inf)
    return logits


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Token ids [...] by inverse transform sampling: logits [..., V] at uniform [...] in [0, 1).

    Tokens are laid out along [0, 1) in bands, the most probable first: band k holds those k to
    k + 1 nats below the best. Within a band they are laid out by id. In order of id alone, the
    borders of thousands of tiny intervals would move with every rounding error before them, and
    two implementations would soon draw different tokens.
    """
    depth = logits.amax(dim=-1, keepdim=True) - logits
    layout = depth.clamp(max=BANDS - 1).floor().argsort(dim=-1, stable=True)
    cumulative = logits.double().softmax(dim=-1).gather(-1, layout).cumsum(dim=-1)
    target = uniform.double().unsqueeze(-1) * cumulative[..., -1:]
    place = torch.searchsorted(cumulative, target, right=True)
    return layout.gather(-1, place).squeeze(-1)


@torch.inference_mode()
def generate(
    model: LPD,
    labels: Tensor | None,
    orders: Tensor,
    group_sizes: Sequence[int],
    uniform: Tensor,
    *,
    cfg: float = 1.0,
    guidance: GuidanceSchedule = "linear",
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    given: Tensor | None = None,
) -> Generation:
    """Generates B images, step by step (paper section 3.2).

    Args:
        model: the network.
        labels: [B] int64 class ids, or None for no condition (guidance then has no effect).
        orders: [B, S] int64, each row a permutation of the cells.
        group_sizes: K sizes that sum to S; step k fills group_sizes[k] cells.
        uniform: [B, S] in [0, 1), one number a token in generation order.
        cfg: guidance scale; 1 is no guidance.
        guidance: how the scale grows with the generation index.
        temperature: divides the guided logits.
        top_k: keep this many of the most probable tokens; 1 is greedy.
        top_p: keep the smallest set whose probability reaches this.
        given: [B, S] int64 in raster order, tokens to take instead of drawing, -1 where to draw:
            an edit, whose order has the kept cells first.

    Raises:
        ValueError: if the group sizes do not sum to the number of cells.
    """
    batch, cells = orders.shape
    if sum(group_sizes) != cells or cells != model.config.cells:
        raise ValueError(
            f"{sum(group_sizes)} cells in groups, {cells} in the orders, "
            f"{model.config.cells} in the model's grid: all three must be equal"
        )
    guided = cfg != 1.0 and labels is not None
    scale = guidance_scale(cfg, guidance, cells).to(orders.device)
    token_ids = torch.zeros_like(orders)
    logits_by_step = []
    cache = model.new_cache()

    context = model.condition(labels, batch)
    context_positions = torch.zeros_like(orders[:, :1])
    if guided:
        context = torch.cat([context, model.condition(None, batch)])
    first = 0
    for size in group_sizes:
        cells_of_step = orders[:, first : first + size]
        positions = torch.cat([context_positions, cells_of_step + 1], dim=1)
        if guided:
            positions = positions.repeat(2, 1)
        logits = model.decode_step(context, positions, cache)
        if guided:
            conditional, unconditional = logits.chunk(2)
            factor = scale[first : first + size, None]
            logits = unconditional + factor * (conditional - unconditional)
        filtered = filter_logits(logits / temperature, top_k, top_p)
        drawn = draw(filtered, uniform[:, first : first + size])
        if given is not None:
            kept = given.gather(1, cells_of_step)
            drawn = torch.where(kept >= 0, kept, drawn)
        token_ids.scatter_(1, cells_of_step, drawn)
        logits_by_step.append(logits)

        context = model.token_emb(drawn)
        if guided:
            context = torch.cat([context, context])
        context_positions = cells_of_step + 1
        first += size
    return Generation(token_ids, torch.cat(logits_by_step, dim=1))
