"""An edit: what is kept of a picture, as given cells of requests, and the picture whole again.

An edit is a generation in which some draws are given. Knows pictures, masks and cells; does not
know a backend or how cells are generated.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from lpd_export.bounds import checked
from lpd_export.bundle.manifest import Manifest, ModelDescription
from lpd_export.errors import UserError
from lpd_export.files import check_file
from lpd_export.images import BLANK, to_uint8
from lpd_export.pictures import Fit, Picture, fit_mask, fit_picture, read_mask, read_picture
from lpd_export.runtime.requests import GeneratedImage, ImageRequest, check_vocabulary
from lpd_export.runtime.sampler import Sampling
from lpd_export.schedule.orders import edit_orders
from lpd_export.schedule.schedule_file import Schedule

Source = Picture | GeneratedImage | NDArray[np.integer[Any]]
"""What is edited: a picture, a `.npy` of token ids or these [S] themselves, a generated image."""
Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels of the picture; the right and bottom ones are outside."""


@dataclass(frozen=True, eq=False)
class Edit:
    """A picture, and which of its cells are made anew."""

    picture: NDArray[np.uint8]
    """[height, width, 3], as it was given, at the model's resolution."""
    original: NDArray[np.uint8]
    """As `picture`, or for outpainting in its new place, surrounded by its outermost pixels."""
    token_ids: NDArray[np.int64]
    """[S], raster order, of the whole picture."""
    kept: NDArray[np.bool_]
    """[S]; the other cells are new."""
    notes: tuple[str, ...] = ()
    """What must be said of how the picture was taken."""

    def requests(
        self,
        labels: Sequence[int | None],
        seed: int,
        sampling: Sampling,
        schedule: Schedule,
        order: str = "locality",
        first_index: int = 0,
    ) -> list[ImageRequest]:
        """One for each label, their indices counted up; without kept cells those of a plain run."""
        each = list(enumerate(labels, first_index))
        if not self.kept.any():
            return [ImageRequest(label, seed, index, sampling) for index, label in each]
        given = np.where(self.kept, self.token_ids, -1)
        keys = [(seed, index) for index, _ in each]
        thresholds = {
            name: value
            for name in ("repulsion", "proximity")
            if (value := getattr(schedule, name)) is not None
        }
        orders = edit_orders(schedule.group_sizes, self.kept, keys, order, **thresholds)
        return [
            ImageRequest(label, seed, index, sampling, order, given)
            for (index, label), order in zip(each, orders, strict=True)
        ]

    def paste(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The decoder's pixels [..., height, width, 3] where cells are new, elsewhere the original.

        The seam lies in the kept cells: over half a cell, the original fades into what the decoder
        made of the same tokens.
        """
        side, grid = len(self.original), round(len(self.kept) ** 0.5)
        radius = max(side // grid // 4, 1)
        new = Image.fromarray(self.new_pixels.astype(np.uint8) * 255)
        # Wider by the radius, then blurred by it: whole where cells are new, and gone after twice
        # the radius.
        seam = new.filter(ImageFilter.MaxFilter(2 * radius + 1))
        share = np.asarray(seam.filter(ImageFilter.BoxBlur(radius)), np.float32)[..., None] / 255
        return np.rint(share * pixels + (1 - share) * self.original).astype(np.uint8)

    @property
    def new_pixels(self) -> NDArray[np.bool_]:
        """[height, width]: the pixels of new cells."""
        grid = round(len(self.kept) ** 0.5)
        stride = len(self.original) // grid
        return ~self.kept.reshape(grid, grid).repeat(stride, axis=0).repeat(stride, axis=1)

    @property
    def masked(self) -> NDArray[np.uint8]:
        """The original with its new cells blank."""
        return np.where(self.new_pixels[..., None], np.array(BLANK, np.uint8), self.original)


@dataclass(frozen=True, eq=False)
class Selection:
    """A picture as it was taken, and what of it is made anew: an edit that no model has seen."""

    source: NDArray[np.uint8] | NDArray[np.int64]
    """Pixels [side, side, 3] uint8 at the model's resolution, or token ids [S] int64."""
    outpaint: int | None
    kept: NDArray[np.bool_]
    """[S]; the other cells are new."""
    notes: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Of the source."""
        return hashlib.sha256(self.source.tobytes()).hexdigest()

    def edit(
        self,
        tokenize: Callable[[Sequence[Picture]], NDArray[np.int64]],
        detokenize: Callable[[NDArray[np.int64]], NDArray[np.float32]],
    ) -> Edit:
        """With its pixels and its token ids, by a tokenizer's two functions."""
        if self.source.ndim == 1:
            token_ids = self.source.astype(np.int64)
            picture = to_uint8(detokenize(token_ids[None]))[0]
        else:
            picture = self.source.astype(np.uint8, copy=False)
        original = picture if self.outpaint is None else surround(picture, self.outpaint)
        if self.source.ndim != 1 or self.outpaint is not None:
            (token_ids,) = tokenize([original])
        return Edit(picture, original, token_ids, self.kept, self.notes)


def select(
    source: Source,
    manifest: Manifest,
    mask: Picture | None = None,
    box: Box | None = None,
    outpaint: int | None = None,
    fit: Fit = "crop",
) -> Selection:
    """What `Pipeline.prepare_edit` says, as far as it needs no model.

    Raises:
        UserError: if nothing says what is new, all is kept, or something cannot be read.
    """
    if sum(how is not None for how in (mask, box, outpaint)) != 1:
        raise UserError(
            "say what is to be made anew, by one of: a mask, white where the image is to change; a "
            "box of pixels; or outpaint, so many pixels around the image"
        )
    side, grid, notes = manifest.resolution, manifest.model.grid, []
    taken: NDArray[np.uint8] | NDArray[np.int64] | None = read_token_ids(source, manifest.model)
    size = (side, side)
    if taken is None:
        picture = read_picture(source)  # type: ignore[arg-type]
        taken, size = fit_picture(picture, side, fit), picture.size
    stride = side // grid
    if outpaint is not None:
        new = margin_mask(side, outpaint, stride)
    elif box is not None:
        new = fit_mask(box_mask(box, size), side, fit)
        if not new.any():
            raise UserError(
                f"the box {','.join(map(str, box))} lies outside of what fit {fit!r} leaves of the "
                "image: use pad or stretch, or another box"
            )
    else:
        assert mask is not None
        white = read_mask(mask)
        new = fit_mask(white, side, fit)
        if white.shape not in (size[::-1], (grid, grid)):
            notes.append(
                f"the mask is {white.shape[1]} x {white.shape[0]}, the image {size[0]} x "
                f"{size[1]}: both are made {side} x {side} in the same way"
            )
    kept = ~new.reshape(grid, stride, grid, stride).any(axis=(1, 3)).reshape(-1)
    if kept.all():
        raise UserError(
            "the mask keeps all of the image, there is nothing to do: make white what is to change"
        )
    if not kept.any():
        notes.append("nothing of the image is kept: the images are those of a run without it")
    return Selection(taken, outpaint, kept, tuple(notes))


def read_token_ids(source: Source, model: ModelDescription) -> NDArray[np.int64] | None:
    """The token ids [S] of a source that holds such, or None.

    Raises:
        UserError: if they are not of this model's grid and codebook, or cannot be read.
    """
    if isinstance(source, GeneratedImage):
        values: NDArray[Any] = source.token_ids
    elif isinstance(source, str | os.PathLike) and Path(source).suffix == ".npy":
        check_file(source, "the token ids", 2**30)
        try:
            # Mapped: NumPy would take the memory that the header asks for before it reads on.
            values = np.asarray(open_memmap(source, mode="r"))
        except (
            Exception
        ) as error:  # of a damaged header, NumPy and Python's tokenizer raise anything
            raise UserError(f"{source} is damaged or no array of NumPy: {error}") from error
    elif isinstance(source, np.ndarray) and source.dtype.kind in "iu" and source.ndim == 1:
        values = source
    else:
        return None
    if values.dtype.kind not in "iu" or values.size != model.cells:
        raise UserError(
            f"token ids must be whole numbers, one for each of the model's {model.cells} "
            f"cells, but they are {values.dtype} of shape {list(values.shape)}"
        )
    check_vocabulary(values, model.vocab_size)
    return values.reshape(-1).astype(np.int64)


def box_mask(box: Box, size: tuple[int, int]) -> NDArray[np.bool_]:
    """A mask [H, W] of a picture of size (width, height), true in the box.

    Raises:
        UserError: if the box is empty, or none of the picture.
    """
    if len(box) != 4:
        raise UserError(f"a box is X0,Y0,X1,Y1, but it is {box!r}")
    left, top, right, bottom = (checked("an edge of the box", edge, int) for edge in box)
    width, height = size
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise UserError(
            f"the box {left},{top},{right},{bottom} is not inside the image, which is {width} x "
            f"{height}: it is X0,Y0,X1,Y1 with 0 <= X0 < X1 <= {width} and 0 <= Y0 < Y1 <= {height}"
        )
    mask = np.zeros((height, width), np.bool_)
    mask[top:bottom, left:right] = True
    return mask


def margin_mask(side: int, around: int, stride: int) -> NDArray[np.bool_]:
    """A mask [side, side], true in so many pixels on each side.

    Raises:
        UserError: if no cell would be left inside.
    """
    around = checked("outpaint", around, int)
    most = (side - stride) // 2 // stride * stride
    if not 1 <= around <= most:
        raise UserError(
            f"outpaint must be from 1 to {most} pixels of the model's {side}, but it is {around}"
        )
    inner = side - 2 * around
    return np.pad(np.zeros((inner, inner), np.bool_), around, constant_values=True)


def surround(picture: NDArray[np.uint8], around: int) -> NDArray[np.uint8]:
    """The picture made smaller by so many pixels on each side: [side, side, 3].

    Around it are its outermost pixels again, so that the kept cells at the border are read as cells
    of a picture.
    """
    inner = len(picture) - 2 * around
    small = Image.fromarray(picture).resize((inner, inner), Image.Resampling.LANCZOS)
    return np.pad(np.asarray(small), [(around, around), (around, around), (0, 0)], mode="edge")
