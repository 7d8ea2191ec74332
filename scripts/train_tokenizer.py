"""Trains a VQ tokenizer on a folder of images, from where the last call left off.

    python scripts/train_tokenizer.py data/lpd-emoji
    python scripts/train_tokenizer.py data/lpd-emoji --export tokenizer.safetensors

The images are `<folder>/train/<class>/<file>.png` and `<folder>/validation/...`, all of one size,
with the class names in `<folder>/classes.json`. The run's folder holds a checkpoint, a log of JSON
lines and a sheet of reconstructions. With --export nothing is trained: the weight average of the
last checkpoint is written in the released format.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
import numpy as np
import torch
from rich.console import Console
from torch import nn

from lpd_export.errors import UserError
from lpd_export.images import contact_sheet, save_png, to_uint8
from reference.train import (
    Precision,
    Recipe,
    TrainingStopped,
    config_of,
    export_average,
    open_device,
    read_checkpoint,
    train,
)
from reference.train_tokenizer import TokenizerTask, psnr, reconstruct
from reference.training_data import ImageSet, TrainingError, load_image_set, to_signed
from reference.vq import NORM_GROUPS, VQConfig, VQTokenizer

EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130
SHEET_IMAGES = 16


@click.command()
@click.argument("images", type=click.Path(path_type=Path))
@click.option(
    "--run",
    "folder",
    type=click.Path(path_type=Path),
    default=Path("training/lpd-emoji/tokenizer"),
    show_default=True,
    help="The run's folder.",
)
@click.option("--export", "export_path", type=click.Path(path_type=Path), help="Write weights.")
@click.option("--steps", default=6000, show_default=True)
@click.option("--batch-size", default=16, show_default=True)
@click.option("--learning-rate", default=1e-3, show_default=True)
@click.option("--warmup-steps", default=100, show_default=True)
@click.option(
    "--stable",
    default=0.0,
    show_default=True,
    help="Share of the steps at the full rate, before it falls.",
)
@click.option("--weight-decay", default=1e-4, show_default=True)
@click.option("--average-decay", default=0.998, show_default=True)
@click.option("--channels", default=32, show_default=True)
@click.option("--multipliers", default="1,2,2", show_default=True, help="Of the channels, a level.")
@click.option("--res-blocks", default=1, show_default=True, help="Residual blocks a level.")
@click.option("--z-channels", default=64, show_default=True)
@click.option("--codebook-size", default=1024, show_default=True)
@click.option("--codebook-start", default=200, show_default=True, help="Steps without a codebook.")
@click.option("--revive-every", default=50, show_default=True, help="Steps.")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="bf16", show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Parts of a batch computed at a time; by default one a CPU core.",
)
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--checkpoint-minutes",
    type=click.FloatRange(min=0),
    default=3.0,
    show_default=True,
    help="How much training a kill may cost.",
)
@click.option(
    "--validate-every",
    type=click.IntRange(min=1),
    default=500,
    show_default=True,
    help="Steps between two validations and sheets.",
)
def main(
    images: Path,
    folder: Path,
    export_path: Path | None,
    steps: int,
    batch_size: int,
    learning_rate: float,
    warmup_steps: int,
    stable: float,
    weight_decay: float,
    average_decay: float,
    channels: int,
    multipliers: str,
    res_blocks: int,
    z_channels: int,
    codebook_size: int,
    codebook_start: int,
    revive_every: int,
    precision: Precision,
    device: str,
    workers: int | None,
    seed: int,
    checkpoint_minutes: float,
    validate_every: int,
) -> None:
    """Trains a VQ tokenizer on a folder of images."""
    console = Console(stderr=True)
    try:
        if export_path is not None:
            checkpoint = read_checkpoint(folder)
            tokenizer = VQTokenizer(config_of(checkpoint, VQConfig))
            export_average(tokenizer, checkpoint, export_path, {"dataset": images.name})
            console.print(f"{export_path}: {export_path.stat().st_size / 1e6:.2f} MB")
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
        recipe = Recipe(
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            warmup_steps=warmup_steps,
            stable=stable,
            weight_decay=weight_decay,
            betas=(0.9, 0.99),
            average_decay=average_decay,
            precision=precision,
            seed=seed,
        )
        training, validation = load_image_set(images, "train"), load_image_set(images, "validation")
        task = TokenizerTask(
            config,
            recipe,
            training,
            validation,
            open_device(device),
            codebook_start=codebook_start,
            revive_every=revive_every,
        )
        parameters = sum(parameter.numel() for parameter in task.model.parameters())
        console.print(
            f"{len(training)} images of {training.resolution} px to train on, {len(validation)} to "
            f"validate with; {parameters / 1e6:.2f} M parameters; run in {folder}"
        )

        def preview(step: int, model: nn.Module) -> None:
            write_sheet(model, validation, folder / "reconstructions.png")

        figures = train(
            task,
            recipe,
            folder,
            checkpoint_minutes=checkpoint_minutes,
            validate_every=validate_every,
            workers=workers or (torch.get_num_threads() if device == "cpu" else 1),
            preview=preview,
            console=console,
        )
        words = ", ".join(f"{name} {value:g}" for name, value in figures.items())
        console.print(f"finished: {words}")
    except (TrainingError, UserError) as error:
        click.echo(f"train_tokenizer: error: {error}", err=True)
        sys.exit(EXIT_MISTAKE)
    except TrainingStopped as stopped:
        click.echo(f"train_tokenizer: {stopped}", err=True)
        sys.exit(EXIT_INTERRUPTED)


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
