"""An image request: everything that one image follows from, whatever it is generated beside.

Knows what can be asked of an image and how what is left open follows from its seed and index.
Does not know a bundle's class names, batches or a backend.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lpd_export.bounds import Seed, checked
from lpd_export.bundle.manifest import ModelDescription
from lpd_export.errors import UserError
from lpd_export.runtime.randomness import ImageRandomness, image_randomness
from lpd_export.runtime.sampler import Sampling
from lpd_export.schedule.schedule_file import Schedule


@dataclass(frozen=True, eq=False)
class ImageRequest:
    """One image; requests of different settings, classes and given cells may share a batch.

    Raises:
        UserError: for a value of a wrong type or out of its range.
    """

    label: int | None
    """A class id, or None for no class."""
    seed: int = 0
    index: int = 0
    """With the seed it determines the image's random numbers; both from 0 to 2^64 - 1."""
    sampling: Sampling = field(default_factory=Sampling)
    order: NDArray[np.int64] | None = None
    """[S], a permutation of the cells; by default one of the schedule's, chosen by the seed."""
    given: NDArray[np.int64] | None = None
    """[S], raster order: tokens that are taken instead of draws, -1 where a token is drawn."""

    def __post_init__(self) -> None:
        for what, value in (("the seed", self.seed), ("the image's index", self.index)):
            checked(what, value, Seed)
        checked("the label", self.label, int | None)
        for name in ("order", "given"):
            cells = getattr(self, name)
            if cells is None:
                continue
            cells = np.asarray(cells)
            if cells.ndim != 1 or cells.dtype.kind not in "iu":
                raise UserError(
                    f"{name} must be whole numbers [S], one a cell, but it is {cells.dtype} of "
                    f"shape {list(cells.shape)}"
                )
            object.__setattr__(self, name, cells.astype(np.int64))
        if self.order is not None and (np.sort(self.order) != np.arange(len(self.order))).any():
            raise UserError("order must hold every cell once, from 0 on")

    def check(self, model: ModelDescription) -> None:
        """Raises UserError unless this model can make the image."""
        classes, cells = model.num_classes, model.cells
        if self.label is not None and not 0 <= self.label < classes:
            raise UserError(f"the label must be from 0 to {classes - 1}, but it is {self.label}")
        for name in ("order", "given"):
            of = getattr(self, name)
            if of is not None and len(of) != cells:
                raise UserError(f"{name} must be of the model's {cells} cells, not of {len(of)}")
        if self.given is not None:
            check_vocabulary(self.given[self.given != -1], model.vocab_size)

    def chance(self, schedule: Schedule) -> ImageRandomness:
        """The image's random numbers, and which of the schedule's orders they choose."""
        return image_randomness(self.seed, self.index, schedule.cells, schedule.count)

    def order_of(self, schedule: Schedule) -> NDArray[np.int64]:
        """The order [S] that the image follows."""
        if self.order is not None:
            return self.order
        return schedule.orders[self.chance(schedule).order_index].astype(np.int64)


@dataclass(frozen=True, eq=False)
class GeneratedImage:
    """One image and how it came about."""

    pixels: NDArray[np.uint8]
    """[height, width, 3]."""
    token_ids: NDArray[np.int64]
    """[S], raster order."""
    request: ImageRequest
    class_name: str
    schedule: Schedule

    def __repr__(self) -> str:
        height, width, _ = self.pixels.shape
        return (
            f"<GeneratedImage {self.index} of seed {self.seed}: {self.class_name}, "
            f"{width} x {height}>"
        )

    @property
    def index(self) -> int:
        """Counted from 0; with the seed it determines the image's randomness."""
        return self.request.index

    @property
    def seed(self) -> int:
        """The run's."""
        return self.request.seed

    @property
    def class_id(self) -> int | None:
        """None for no class."""
        return self.request.label

    @property
    def sampling(self) -> Sampling:
        """Guidance and filters."""
        return self.request.sampling

    @property
    def order(self) -> NDArray[np.int64]:
        """[S], the cells in the order of their generation."""
        return self.request.order_of(self.schedule)

    @property
    def order_index(self) -> int | None:
        """Which of the schedule's orders it followed; None if it had one of its own."""
        if self.request.order is not None:
            return None
        return self.request.chance(self.schedule).order_index

    def picture(self) -> Image.Image:
        """As a Pillow image."""
        return Image.fromarray(self.pixels)


def check_vocabulary(token_ids: NDArray[np.integer[Any]], vocab_size: int) -> None:
    """Raises UserError unless all of these tokens are in the codebook."""
    outside = token_ids[(token_ids < 0) | (token_ids >= vocab_size)]
    if outside.size:
        raise UserError(
            f"token {outside.flat[0]} is not in the model's codebook: its tokens are from 0 to "
            f"{vocab_size - 1}, the token ids must be below {vocab_size}"
        )
