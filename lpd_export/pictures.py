"""Pictures as people have them, made to what a model takes: any file, Pillow image or array.

Knows Pillow: modes, orientation, transparency, sizes. Does not know cells, tokens or a model.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from lpd_export.bounds import checked
from lpd_export.errors import UserError
from lpd_export.files import check_file

Picture = str | os.PathLike[str] | io.BytesIO | Image.Image | NDArray[np.uint8] | NDArray[np.bool_]
"""A file or its content, a Pillow image, or an array [H, W], [H, W, 3] or [H, W, 4], uint8 or bool.
"""

Fit = Literal["crop", "pad", "stretch"]
"""How a picture becomes square: its middle, all of it on white, or distorted."""


FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What pictures come in. Pillow reads forty more, EPS by running the program in it."""
MOST_BYTES = 2**30
"""Of a file, however many pixels it may hold."""


def read_picture(picture: Picture, background: str = "white") -> Image.Image:
    """A picture as RGB, upright, what is transparent in it on the background.

    Raises:
        UserError: if it cannot be read, is no image, or is so large that reading it would be a
            mistake (Pillow's limit against decompression bombs).
    """
    if isinstance(picture, np.ndarray):
        shaped = picture.ndim == 2 or (picture.ndim == 3 and picture.shape[2] in (3, 4))
        if picture.dtype not in (np.uint8, np.bool_) or not shaped or not picture.size:
            raise UserError(
                "an image as an array must be uint8 or bool, [H, W], [H, W, 3] or [H, W, 4], but "
                f"it is {picture.dtype} of shape {list(picture.shape)}"
            )
        levels = picture.astype(np.uint8) * (255 if picture.dtype == np.bool_ else 1)
        return _as_rgb(Image.fromarray(levels), background)
    if isinstance(picture, Image.Image):
        return _as_rgb(picture, background)
    if not isinstance(picture, str | os.PathLike | io.BytesIO):
        raise UserError(
            f"an image must be a file, a Pillow image or an array, but it is {picture!r}"
        )
    with _opened(picture) as opened:
        return _as_rgb(opened, background)


def read_transparent(picture: str | os.PathLike[str] | io.BytesIO) -> NDArray[np.bool_] | None:
    """What is wholly transparent in a picture, upright: [H, W] bool, or None if nothing is.

    Raises:
        UserError: as `read_picture`.
    """
    with _opened(picture) as opened:
        upright = ImageOps.exif_transpose(opened)
        if not upright.has_transparency_data:
            return None
        transparent = np.asarray(upright.convert("RGBA"))[..., 3] == 0
        return transparent if transparent.any() else None


@contextlib.contextmanager
def _opened(picture: str | os.PathLike[str] | io.BytesIO) -> Iterator[Image.Image]:
    name = getattr(picture, "name", "the upload") if isinstance(picture, io.BytesIO) else picture
    if not isinstance(picture, io.BytesIO):
        check_file(picture, "the image", MOST_BYTES)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tags that do not matter
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(picture, formats=FORMATS) as opened:
                yield opened
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UserError(
            f"{name} is too large: an image may have {Image.MAX_IMAGE_PIXELS or 0} pixels, and "
            "reading more could exhaust the memory; make it smaller first"
        ) from error
    except UnidentifiedImageError as error:
        raise UserError(f"{name} is no image of a known format: {', '.join(FORMATS)}") from error
    except Exception as error:  # OSError, and of damaged files what their format's reader raises
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the image {name}: {reason}") from error


def _as_rgb(picture: Image.Image, background: str) -> Image.Image:
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip
        levels = np.asarray(picture).astype(np.int64) // 257
        return Image.fromarray(levels.clip(0, 255).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        whole = Image.new("RGBA", picture.size, background)
        picture = Image.alpha_composite(whole, picture.convert("RGBA"))
    return picture.convert("RGB")


def read_mask(mask: Picture) -> NDArray[np.bool_]:
    """What is white in a picture: [H, W] bool; transparent is black.

    Raises:
        UserError: as `read_picture`.
    """
    return np.asarray(read_picture(mask, "black").convert("L")) >= 128


def fit_picture(picture: Image.Image, side: int, fit: Fit) -> NDArray[np.uint8]:
    """A picture as pixels [side, side, 3] uint8."""
    checked("fit", fit, Fit)
    return np.asarray(_fitted(picture, side, fit, Image.Resampling.LANCZOS, "white"))


def fit_mask(mask: NDArray[np.bool_], side: int, fit: Fit) -> NDArray[np.bool_]:
    """A mask [side, side] bool, fitted as a picture: true where any part of a pixel is true."""
    checked("fit", fit, Fit)
    shares = Image.fromarray(mask.astype(np.float32))
    return np.asarray(_fitted(shares, side, fit, Image.Resampling.BOX, 0)) > 0


def _fitted(
    picture: Image.Image, side: int, fit: Fit, resampling: Image.Resampling, around: str | int
) -> Image.Image:
    size = (side, side)
    if fit == "crop":
        return ImageOps.fit(picture, size, resampling)
    if fit == "pad":
        inside = ImageOps.contain(picture, size, resampling)
        whole = Image.new(picture.mode, size, around)
        whole.paste(inside, ((side - inside.width) // 2, (side - inside.height) // 2))
        return whole
    return picture.resize(size, resampling)
