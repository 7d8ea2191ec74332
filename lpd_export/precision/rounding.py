"""Rounds a layer's weight to levels, to the nearest or so that the layer's output changes least.

Knows one layer at a time: a weight [in, out], the levels that it may take, and the second moments
of what the layer reads. Does not know graphs, nor where moments come from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 0.01
"""Of the mean second moment, added to all: channels that were hardly seen stay well conditioned."""
SHARES = tuple(1 - 0.04 * i for i in range(13))
"""Shares of a block's largest weight at which cutting it off is tried where levels are few."""
FEW_LEVELS = 16


@dataclass(frozen=True)
class Levels:
    """The values that a weight may take: whole numbers times a scale.

    Attributes:
        lowest, highest: of the whole numbers.
        block: consecutive inputs of an output that share a scale; None for all of them.
        scale_type: of the scales; a scale is the next number of it that is not smaller.
    """

    lowest: int
    highest: int
    block: int | None = None
    scale_type: torch.dtype = torch.float32

    def scales(self, weight: Tensor) -> Tensor:
        """For a block of weights [block, out] the scale of each output [out], of `scale_type`.

        By the largest magnitude; among few levels, the share of it with the least squared error.
        """
        largest = weight.abs().amax(dim=0)
        largest = torch.where(largest > 0, largest, 1.0) / self.highest
        shares = SHARES if self.highest - self.lowest < FEW_LEVELS else (1.0,)
        tried = [self._representable(share * largest) for share in shares]
        errors = torch.stack(
            [(self.round(weight, scale) * scale - weight).square().sum(dim=0) for scale in tried]
        )
        return torch.stack(tried).gather(0, errors.argmin(dim=0)[None])[0]

    def round(self, weight: Tensor, scale: Tensor) -> Tensor:
        """The nearest levels of a weight."""
        return (weight / scale).round().clamp(self.lowest, self.highest)

    def _representable(self, scale: Tensor) -> Tensor:
        rounded = scale.to(self.scale_type)
        above = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
        return torch.where(rounded.to(scale.dtype) < scale, above, rounded).to(scale.dtype)


def round_weight(
    weight: Tensor, levels: Levels, moments: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Levels [in, out] int8 and scales [in / block, out] of `levels.scale_type` of a weight.

    With moments this is GPTQ (arXiv 2210.17323): inputs are rounded one after another, and what
    rounding one adds to the output is taken out of those that are still to come, as far as they
    were seen to go together.

    Args:
        weight: [in, out].
        levels: that it may take; the block divides `in`.
        moments: [in, in], the sum of x xT over what the layer read.
    """
    inputs, outputs = weight.shape
    block = levels.block or inputs
    left = weight.double()
    follow = None if moments is None else _correlation(moments)
    rounded = torch.zeros(inputs, outputs, dtype=torch.int8)
    scales = torch.zeros(inputs // block, outputs, dtype=left.dtype)
    for first in range(0, inputs, block):
        end = first + block
        scale = scales[first // block] = levels.scales(left[first:end])
        if follow is None:
            rounded[first:end] = levels.round(left[first:end], scale).to(torch.int8)
            continue
        errors = torch.zeros(block, outputs, dtype=left.dtype)
        for i in range(first, end):
            nearest = levels.round(left[i], scale)
            rounded[i] = nearest.to(torch.int8)
            errors[i - first] = error = (left[i] - nearest * scale) / follow[i, i]
            left[i + 1 : end] -= torch.outer(follow[i, i + 1 : end], error)
        left[end:] -= follow[first:end, end:].T @ errors
    return rounded, scales.to(levels.scale_type)


def _correlation(moments: Tensor) -> Tensor:
    """The upper triangular Cholesky factor of the inverse of damped moments."""
    moments = moments.double()
    mean = moments.diagonal().mean()
    damped = moments + DAMPING * torch.where(mean > 0, mean, 1.0) * torch.eye(len(moments))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)
