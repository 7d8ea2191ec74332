"""A folder of images as training data: reading it, its order, and augmentation.

Knows the layout `<folder>/<split>/<class-name>/<file>.png` with `<folder>/classes.json`, and small
changes to an image that do not change what it means. It does not know a model or a loss.

Whatever is random here follows from a seed and a step alone, so a run that was cut off and goes on
sees what it would have seen.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
NEUTRAL_LUMA = (0.299, 0.587, 0.114)
"""Share of red, green and blue in how bright a colour looks (ITU-R BT.601)."""


class TrainingError(ValueError):
    """Training that cannot start or go on: one sentence with the value and what to do."""


@dataclass(frozen=True)
class ImageSet:
    """Images of one size in memory, each of one class."""

    pixels: Tensor
    """[N, H, H, 3] uint8."""
    labels: Tensor
    """[N] int64 class ids."""
    class_names: tuple[str, ...]
    mirrored: tuple[str, ...] = ()
    """Classes whose images mean the same when they are mirrored."""

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def resolution(self) -> int:
        """H, the side of an image in pixels."""
        return self.pixels.shape[1]

    def digest(self) -> str:
        """16 hexadecimal digits that tell this set from any other."""
        content = hashlib.sha256(self.pixels.numpy().tobytes())
        content.update(self.labels.numpy().tobytes())
        content.update(json.dumps([self.class_names, self.mirrored]).encode())
        return content.hexdigest()[:16]

    def may_mirror(self, labels: Tensor) -> Tensor:
        """Which images of these labels may be mirrored: bool, of the same shape."""
        allowed = torch.tensor([name in self.mirrored for name in self.class_names])
        return allowed[labels]


def load_image_set(folder: Path, split: str) -> ImageSet:
    """The images of `<folder>/<split>/<class-name>/`, sorted by path, composed on white.

    Class ids are places in `<folder>/classes.json`, a JSON list of names; `mirrored.json`, if there
    is one, lists those whose images may be mirrored.

    Raises:
        TrainingError: if the folder or the list is missing or damaged, a class folder is not in
            the list, an image cannot be read, or images differ in size or are not square.
    """
    class_names = read_class_names(folder / "classes.json")
    mirrored_file = folder / "mirrored.json"
    mirrored = read_class_names(mirrored_file) if mirrored_file.exists() else []
    split_folder = folder / split
    if not split_folder.is_dir():
        raise TrainingError(f"there is no folder {split_folder}: put one folder a class into it")
    pixels: list[np.ndarray] = []
    labels: list[int] = []
    for class_folder in sorted(path for path in split_folder.iterdir() if path.is_dir()):
        if class_folder.name not in class_names:
            raise TrainingError(
                f"{class_folder} is not a class of {folder / 'classes.json'}: add its name there "
                "or take the folder away"
            )
        label = class_names.index(class_folder.name)
        for path in sorted(class_folder.iterdir()):
            if path.suffix.lower() not in IMAGE_SUFFIXES:
                continue
            image = read_image(path)
            if pixels and image.shape != pixels[0].shape:
                raise TrainingError(
                    f"{path} is {image.shape[1]}x{image.shape[0]} pixels, where the images before "
                    f"it are {pixels[0].shape[1]}x{pixels[0].shape[0]}: give all the same size"
                )
            pixels.append(image)
            labels.append(label)
    if not pixels:
        raise TrainingError(
            f"{split_folder} holds no images: put {', '.join(IMAGE_SUFFIXES)} files into one "
            "folder a class"
        )
    return ImageSet(
        torch.from_numpy(np.stack(pixels)),
        torch.tensor(labels),
        tuple(class_names),
        tuple(mirrored),
    )


def load_unsorted(folder: Path) -> Tensor | None:
    """The images of `<folder>/unsorted/`, which are of no class: [N, H, H, 3] uint8; None if none.

    Raises:
        TrainingError: if an image cannot be read or is not square.
    """
    paths = sorted(
        path for path in (folder / "unsorted").glob("*") if path.suffix.lower() in IMAGE_SUFFIXES
    )
    return torch.from_numpy(np.stack([read_image(path) for path in paths])) if paths else None


def read_class_names(path: Path) -> list[str]:
    """The class names of a JSON list of strings."""
    try:
        names = json.loads(path.read_bytes())
    except OSError as error:
        raise TrainingError(
            f"cannot read {path}: {error.strerror or error}; it must hold a JSON list of the class "
            "names"
        ) from error
    except ValueError as error:
        raise TrainingError(
            f"{path} is not JSON: it must hold a list of the class names"
        ) from error
    if (
        not isinstance(names, list)
        or not names
        or not all(isinstance(name, str) for name in names)
        or len(set(names)) != len(names)
    ):
        raise TrainingError(f"{path} must hold a JSON list of class names, each once")
    return names


def read_image(path: Path) -> np.ndarray:
    """Pixels [H, H, 3] uint8 of a file; what is transparent becomes white."""
    try:
        with Image.open(path) as image:
            rgba = image.convert("RGBA")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise TrainingError(f"cannot read the image {path}: replace it or take it away") from error
    if rgba.width != rgba.height:
        raise TrainingError(f"{path} is {rgba.width}x{rgba.height} pixels: images must be square")
    white = Image.new("RGBA", rgba.size, "white")
    return np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))


def batch_of_step(step: int, batch_size: int, weights: Tensor, seed: int) -> Tensor:
    """Which images step `step` (from 0) trains on: [batch_size] int64.

    weights: [N] float64, how often each image is seen in N draws, up to rounding; they sum to N.
    With weights of 1 every image is seen once before any is seen again. Each N draws have their
    own order.
    """
    images = len(weights)
    indices: list[int] = []
    first = step * batch_size
    while len(indices) < batch_size:
        epoch, place = divmod(first + len(indices), images)
        generator = seeded(seed, 1, epoch)
        order = torch.randperm(images, generator=generator)
        # Systematic sampling: every image has its stretch, and a point falls each 1.
        points = torch.arange(images) + torch.rand(1, generator=generator, dtype=torch.float64)
        drawn = torch.searchsorted(weights.cumsum(0), points, right=True).clamp_max(images - 1)
        indices += drawn[order[place : place + batch_size - len(indices)]].tolist()
    return torch.tensor(indices)


def class_weights(labels: Tensor, balance: float) -> Tensor:
    """How often images [N] of these labels are drawn, for `batch_of_step`: [N] float64.

    balance: 0 draws every image as often, 1 every class, between the two a class of n images as
    often as n to the power of 1 - balance says.
    """
    counts = torch.bincount(labels).double()
    weights = counts[labels] ** -balance
    return weights * (len(labels) / weights.sum())


def seeded(*words: int) -> torch.Generator:
    """A generator on the CPU that follows from these numbers and nothing else."""
    digest = hashlib.sha256(",".join(map(str, words)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def to_signed(pixels: Tensor) -> Tensor:
    """Pixels [B, H, W, 3] uint8 as model input [B, 3, H, W] float32 in [-1, 1]."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def augment(pixels: Tensor, generator: torch.Generator, may_mirror: Tensor) -> Tensor:
    """Model input [B, 3, H, W] of pixels [B, H, W, 3] uint8, each a little changed.

    Mirrors half of the images that may be, [B] bool, left to right. Moves up to 1/16 of the side by
    whole pixels, with white coming in; for half of the images a zoom of 0.9 to 1.1; small changes
    of hue, saturation and gamma, which leave white white. Nothing is turned: that would change what
    some images mean.
    """
    images = to_signed(pixels)
    mirrored = may_mirror & (torch.rand(len(pixels), generator=generator) < 0.5)
    images[mirrored] = images[mirrored].flip(-1)
    return shift_and_zoom(jitter_colours(images, generator), generator)


def jitter_colours(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1] with hue, saturation and gamma changed a little."""
    count = len(images)

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, 1, generator=generator)

    gamma = torch.exp(between(-0.15, 0.15))
    saturation, angle = between(0.85, 1.15).flatten(), between(-0.12, 0.12).flatten()
    coloured = ((images + 1) / 2).clamp(0, 1).pow(gamma)
    # Hue turns around the axis of the greys, saturation scales the distance from it.
    luma = torch.tensor(NEUTRAL_LUMA)
    axis = torch.full((3,), 1 / math.sqrt(3))
    cross = torch.linalg.cross(torch.eye(3), axis.expand(3, 3))
    turn = (
        angle.cos()[:, None, None] * torch.eye(3)
        + angle.sin()[:, None, None] * cross
        + (1 - angle.cos())[:, None, None] * torch.outer(axis, axis)
    )
    grey = luma.expand(3, 3)
    saturate = grey + saturation[:, None, None] * (torch.eye(3) - grey)
    changed = torch.einsum("bij,bjhw->bihw", saturate @ turn, coloured)
    return (changed.clamp(0, 1) * 2 - 1).contiguous()


def shift_and_zoom(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images [B, 3, H, H] in [-1, 1] moved by whole pixels and, half of them, zoomed a little."""
    count, side = len(images), images.shape[-1]
    reach = side // 16
    zoom = torch.exp(math.log(1.1) * (2 * torch.rand(count, generator=generator) - 1))
    zoom[torch.rand(count, generator=generator) < 0.5] = 1.0
    shift = torch.randint(-reach, reach + 1, (count, 2), generator=generator) * (2 / side)
    transform = torch.zeros(count, 2, 3)
    transform[:, 0, 0] = transform[:, 1, 1] = 1 / zoom
    transform[:, :, 2] = shift
    grid = F.affine_grid(transform, list(images.shape), align_corners=False)
    # Outside is 0, so white is moved there and back. At zoom 1 bicubic weights give the pixel.
    moved = F.grid_sample(images - 1, grid, mode="bicubic", align_corners=False)
    return (moved + 1).clamp(-1, 1)
