"""Trains an LPD on a folder of images and a trained tokenizer, from where the last call left off.

    python scripts/train_lpd.py data/lpd-emoji
    python scripts/train_lpd.py data/lpd-emoji --export lpd.safetensors

The images are those that scripts/train_tokenizer.py takes, the tokenizer is what its --export
writes. The run's folder holds a checkpoint, a
log of JSON lines and a sheet of samples. With --export nothing is trained: the weight average of
the last checkpoint is written in the released format.
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
from lpd_export.schedule import group_sizes, make_orders
from reference import LPD, CheckpointError, LPDConfig, VQTokenizer, generate, load_tokenizer
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
from reference.train_lpd import LPDTask
from reference.training_data import TrainingError, load_image_set

EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130
SHEET_CLASSES = 16
SHEET_COLUMNS = 4
SHEET_STEPS = 20
SHEET_SEED = 0


@click.command()
@click.argument("images", type=click.Path(path_type=Path))
@click.option(
    "--tokenizer",
    "tokenizer_path",
    default="training/lpd-emoji/tokenizer.safetensors",
    show_default=True,
    help="A trained tokenizer's weights.",
)
@click.option(
    "--run",
    "folder",
    type=click.Path(path_type=Path),
    default=Path("training/lpd-emoji/lpd"),
    show_default=True,
    help="The run's folder.",
)
@click.option("--export", "export_path", type=click.Path(path_type=Path), help="Write weights.")
@click.option("--steps", default=9000, show_default=True, help="More than before extend a run.")
@click.option("--batch-size", default=16, show_default=True)
@click.option("--learning-rate", default=1e-3, show_default=True)
@click.option("--warmup-steps", default=200, show_default=True)
@click.option(
    "--stable",
    default=0.0,
    show_default=True,
    help="Share of the steps at the full rate, before it falls.",
)
@click.option("--weight-decay", default=0.05, show_default=True)
@click.option("--average-decay", default=0.999, show_default=True)
@click.option("--dim", default=256, show_default=True)
@click.option("--depth", default=8, show_default=True)
@click.option("--heads", default=4, show_default=True)
@click.option(
    "--dropout",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.1,
    show_default=True,
    help="Share of the channels of what a block adds.",
)
@click.option(
    "--balance",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    help="From 0, every image is drawn as often, to 1, every class is.",
)
@click.option(
    "--null-share",
    type=click.FloatRange(0, 1),
    default=0.1,
    show_default=True,
    help="Share of the samples that get the null condition.",
)
@click.option(
    "--schedules",
    default="20:3,32:3,256:1,64:1,12:1,8:1",
    show_default=True,
    help="Decoding steps that are trained for, each with how often.",
)
@click.option("--cfg", default=3.0, show_default=True, help="Guidance of the sheet of samples.")
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
    tokenizer_path: str,
    folder: Path,
    export_path: Path | None,
    steps: int,
    batch_size: int,
    learning_rate: float,
    warmup_steps: int,
    stable: float,
    weight_decay: float,
    average_decay: float,
    dim: int,
    depth: int,
    heads: int,
    dropout: float,
    balance: float,
    null_share: float,
    schedules: str,
    cfg: float,
    precision: Precision,
    device: str,
    workers: int | None,
    seed: int,
    checkpoint_minutes: float,
    validate_every: int,
) -> None:
    """Trains an LPD on a folder of images and a trained tokenizer."""
    console = Console(stderr=True)
    try:
        if export_path is not None:
            checkpoint = read_checkpoint(folder)
            model = LPD(config_of(checkpoint, LPDConfig))
            export_average(model, checkpoint, export_path, {"dataset": images.name})
            console.print(f"{export_path}: {export_path.stat().st_size / 1e6:.2f} MB")
            return
        recipe = Recipe(
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            warmup_steps=warmup_steps,
            stable=stable,
            weight_decay=weight_decay,
            average_decay=average_decay,
            precision=precision,
            seed=seed,
        )
        training, validation = load_image_set(images, "train"), load_image_set(images, "validation")
        tokenizer = load_tokenizer(tokenizer_path)
        if heads < 1 or dim % heads:
            raise TrainingError(f"--dim {dim} does not divide into --heads {heads}")
        grid = training.resolution // tokenizer.config.stride
        config = LPDConfig(
            dim=dim,
            depth=depth,
            heads=heads,
            grid=grid,
            num_classes=len(training.class_names),
            vocab_size=tokenizer.config.codebook_size,
        )
        weights = read_schedules(schedules)
        task = LPDTask(
            config,
            recipe,
            training,
            validation,
            tokenizer,
            open_device(device),
            group_sizes={count: group_sizes(config.cells, count).tolist() for count in weights},
            group_weights=weights,
            balance=balance,
            null_share=null_share,
            dropout=dropout,
        )
        parameters = sum(parameter.numel() for parameter in task.model.parameters())
        console.print(
            f"{len(training)} images of {training.resolution} px to train on, {len(validation)} to "
            f"validate with; {parameters / 1e6:.2f} M parameters; run in {folder}"
        )

        def preview(step: int, model: nn.Module) -> None:
            write_samples(model, tokenizer, training.class_names, cfg, folder / "samples.png")

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
    except (TrainingError, CheckpointError, UserError) as error:
        click.echo(f"train_lpd: error: {error}", err=True)
        sys.exit(EXIT_MISTAKE)
    except TrainingStopped as stopped:
        click.echo(f"train_lpd: {stopped}", err=True)
        sys.exit(EXIT_INTERRUPTED)


def read_schedules(text: str) -> dict[int, float]:
    """How often each number of steps is trained for, of `STEPS:WEIGHT,...`."""
    try:
        pairs = [pair.split(":") for pair in text.split(",")]
        weights = {int(steps): float(weight) for steps, weight in pairs}
    except ValueError as error:
        raise TrainingError(
            f"--schedules {text!r} is not of the form STEPS:WEIGHT,STEPS:WEIGHT,..."
        ) from error
    if not all(weight > 0 for weight in weights.values()):
        raise TrainingError(f"--schedules {text!r} holds a weight that is not above 0")
    return weights


def write_samples(
    model: nn.Module, tokenizer: VQTokenizer, names: tuple[str, ...], cfg: float, path: Path
) -> None:
    """A row of samples a class, in 20 steps, locality-aware orders and linear guidance."""
    assert isinstance(model, LPD)
    shown = np.linspace(0, len(names) - 1, min(SHEET_CLASSES, len(names))).round().astype(int)
    labels = torch.from_numpy(shown.repeat(SHEET_COLUMNS))
    device = next(model.parameters()).device
    cells = model.config.cells
    sizes = group_sizes(cells, min(SHEET_STEPS, cells)).tolist()
    orders = make_orders(model.config.grid, sizes, "locality", len(labels), SHEET_SEED)
    generator = torch.Generator().manual_seed(SHEET_SEED)
    uniform = torch.rand(len(labels), cells, generator=generator)
    pictures, captions = [], []
    for part in torch.arange(len(labels)).split(SHEET_COLUMNS):
        drawn = generate(
            model,
            labels[part].to(device),
            torch.from_numpy(orders).long()[part].to(device),
            sizes,
            uniform[part].to(device),
            cfg=cfg,
        )
        with torch.inference_mode():
            pictures += list(to_uint8(tokenizer.decode(drawn.token_ids).float().cpu().numpy()))
        captions += [names[label] for label in labels[part].tolist()]
    save_png(np.asarray(contact_sheet(pictures, captions, 2 * SHEET_COLUMNS)), path)


if __name__ == "__main__":
    main()
