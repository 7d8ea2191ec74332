"""Trains a VQ tokenizer on a folder of images, from where the last call left off.

    python scripts/train_tokenizer.py data/lpd-emoji
    python scripts/train_tokenizer.py data/lpd-emoji --export tokenizer.safetensors

The images are `<folder>/train/<class>/<file>.png` and `<folder>/validation/...`, all of one size,
with the class names in `<folder>/classes.json`; those of `<folder>/unsorted/`, of no class, are
trained on as well. The run's folder holds a checkpoint, a log of JSON
lines and a sheet of reconstructions. With --export nothing is trained: the weight average of the
last checkpoint is written in the released format.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # `training` is not installed

import click
import numpy as np
import torch
from torch import nn

from lpd_export.images import contact_sheet, save_png, to_uint8
from lpd_reference.vq import NORM_GROUPS, VQConfig, VQTokenizer
from training.command import (
    TrainingOptions,
    execution_options,
    export_option,
    export_run,
    recipe_options,
    run_options,
    run_training,
    tell_finished,
    training_command,
)
from training.data import ImageSet, TrainingError, load_image_set, load_unsorted, to_signed
from training.loop import open_device
from training.tokenizer import TokenizerTask, psnr, reconstruct

SHEET_IMAGES = 16


@training_command("train_tokenizer")
@run_options("runs/lpd-emoji/tokenizer")
@export_option
@recipe_options(
    steps=6000,
    batch_size=16,
    learning_rate=1e-3,
    warmup_steps=100,
    stable=0.0,
    weight_decay=1e-4,
    average_decay=0.998,
)
@click.option("--channels", default=32, show_default=True)
@click.option("--multipliers", default="1,2,2", show_default=True, help="Of the channels, a level.")
@click.option("--res-blocks", default=1, show_default=True, help="Residual blocks a level.")
@click.option("--z-channels", default=64, show_default=True)
@click.option("--codebook-size", default=1024, show_default=True)
@click.option("--codebook-start", default=200, show_default=True, help="Steps without a codebook.")
@click.option("--revive-every", default=50, show_default=True, help="Steps.")
@execution_options
def main(
    options: TrainingOptions,
    channels: int,
    multipliers: str,
    res_blocks: int,
    z_channels: int,
    codebook_size: int,
    codebook_start: int,
    revive_every: int,
) -> None:
    """Trains a VQ tokenizer on a folder of images."""
    if options.export_path is not None:
        export_run(options, options.export_path, VQTokenizer, VQConfig)
        return
    if channels < 1 or channels % NORM_GROUPS:
        raise TrainingError(f"--channels must be a multiple of {NORM_GROUPS}, not {channels}")
    config = VQConfig(
        channels=channels,
        channel_multipliers=read_multipliers(multipliers),
        num_res_blocks=res_blocks,
        z_channels=z_channels,
        codebook_size=codebook_size,
    )
    recipe = options.recipe(betas=(0.9, 0.99))
    training = with_unsorted(load_image_set(options.images, "train"), options.images)
    validation = load_image_set(options.images, "validation")
    task = TokenizerTask(
        config,
        recipe,
        training,
        validation,
        open_device(options.device),
        codebook_start=codebook_start,
        revive_every=revive_every,
    )

    def preview(step: int, model: nn.Module) -> None:
        write_sheet(model, validation, options.folder / "reconstructions.png")

    tell_finished(run_training(options, task, recipe, training, validation, preview))


def with_unsorted(images: ImageSet, folder: Path) -> ImageSet:
    """These images and those of no class, which a tokenizer learns from as well."""
    unsorted = load_unsorted(folder)
    if unsorted is None:
        return images
    if unsorted.shape[1:] != images.pixels.shape[1:]:
        raise TrainingError(
            f"{folder / 'unsorted'} holds images of {unsorted.shape[1]} pixels, where the classes' "
            f"are {images.resolution}: give all the same size"
        )
    return replace(
        images,
        pixels=torch.cat([images.pixels, unsorted]),
        # Their class is never asked for.
        labels=torch.cat([images.labels, torch.zeros(len(unsorted), dtype=torch.int64)]),
    )


def read_multipliers(text: str) -> tuple[int, ...]:
    """Whole numbers above 0, separated by commas."""
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise TrainingError(f"--multipliers {text!r} must be whole numbers such as 1,2,2")
    return tuple(int(word) for word in words)


def write_sheet(model: nn.Module, validation: ImageSet, path: Path) -> None:
    """Rows of originals, each above a row of their reconstructions with the PSNR in dB."""
    assert isinstance(model, VQTokenizer)
    places = torch.linspace(0, len(validation) - 1, min(SHEET_IMAGES, len(validation))).long()
    pixels = validation.pixels[places]
    decoded = reconstruct(model, pixels).float().cpu()
    ratios = psnr(decoded, to_signed(pixels)).tolist()
    made = to_uint8(decoded.numpy())
    originals, reconstructions = list(pixels.numpy()), list(made)
    names = [validation.class_names[label] for label in validation.labels[places].tolist()]
    columns = 8
    sheet, labels = [], []
    for start in range(0, len(originals), columns):
        row = slice(start, start + columns)
        sheet += originals[row] + reconstructions[row]
        labels += names[row] + [f"{ratio:.1f} dB" for ratio in ratios[row]]
    save_png(np.asarray(contact_sheet(sheet, labels, columns)), path)


if __name__ == "__main__":
    main()
