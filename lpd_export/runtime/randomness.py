"""The random numbers of an image, a function of (seed, image index) alone.

They are the same whatever the batch size, the worker, the backend or a restart; what a backend's
rounding makes of them is not this module's to promise.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class ImageRandomness(NamedTuple):
    """All chance in one image."""

    order_index: int
    """Which of the schedule's orders the image follows."""
    uniform: NDArray[np.float64]
    """[S] in [0, 1): one number a token, in generation order."""


def image_randomness(seed: int, image_index: int, cells: int, orders: int) -> ImageRandomness:
    """Draws from Philox, a counter-based generator, keyed by (seed, image_index).

    Args:
        seed, image_index: 0 to 2^64 - 1.
        cells: S, the number of tokens of an image.
        orders: how many orders the schedule holds.
    """
    key = np.array([seed, image_index], np.uint64)
    # The counter's top word keeps these apart from other uses of the same key.
    generator = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, 2]))
    choice, *_ = draws = generator.random(1 + cells)
    return ImageRandomness(int(choice * orders), draws[1:])
